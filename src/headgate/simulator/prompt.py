"""A request's prompt as the API caches it: tools, then system, then messages, block by block, each with the hash of
all before.

Pure. Knows breakpoints and token counts; what is in the cache is `cache`'s business.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import msgspec

from headgate.simulator import tokens
from headgate.simulator.jsonvalue import Json, JsonObject, content_blocks, list_in, object_in, text_in
from headgate.simulator.models import Model, Tokenizer

Ttl = Literal["5m", "1h"]
Level = Literal["tools", "system", "messages"]

HASH_BYTES = 16
UNMARKABLE = frozenset({"thinking", "redacted_thinking"})
"""Blocks that cannot carry a mark; they are cached inside a later prefix (docs: prompt caching)."""


@dataclass(frozen=True, slots=True)
class Block:
    """One position of the prompt."""

    level: Level
    prefix: bytes
    """Hash of everything up to and including this block."""
    tokens: int
    """Tokens up to and including this block."""
    ttl: Ttl | None
    """The breakpoint on this block, if any; the automatic one included."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The whole prompt; `tokens` is what the request costs with an empty cache."""

    blocks: tuple[Block, ...]
    tokens: int
    render: bytes
    """Hash of what changes the messages level only: tool_choice, thinking, effort, images, betas."""

    def end_of(self, level: Level) -> bytes:
        """Hash of the last block of a level, or b"" if it has none."""
        found = b""
        for block in self.blocks:
            if block.level == level:
                found = block.prefix
        return found


def build_prompt(
    body: JsonObject, model: Model, *, thinking: str, effort: str, speed: str, betas: frozenset[str]
) -> Prompt:
    """The prompt of a validated body. `thinking`, `effort` and `speed` are the values in force, defaults filled in."""
    tools = [tool for tool in list_in(body.get("tools")) if isinstance(tool, dict)]
    choice = body.get("tool_choice")
    messages = [message for message in list_in(body.get("messages")) if isinstance(message, dict)]
    images = any(block.get("type") == "image" for m in messages for block in content_blocks(m.get("content")))
    render = _digest(msgspec.json.encode([choice, thinking, effort, images, sorted(betas)]))

    rolling = blake2b(model.id.encode(), digest_size=HASH_BYTES)
    total = tokens.REQUEST_TOKENS
    blocks: list[Block] = []

    def add(level: Level, block: JsonObject, extra_tokens: int) -> None:
        nonlocal total
        rolling.update(canonical(block))
        total += block_tokens(block, model.tokenizer) + extra_tokens
        blocks.append(Block(level, rolling.digest(), total, ttl_of(block)))

    forced = object_in(choice).get("type") in ("any", "tool")
    for position, tool in enumerate(tools):
        add("tools", tool, model.tool_tokens[forced] if position == 0 else 0)
    rolling.update(b"system:" + speed.encode())
    for block in content_blocks(body.get("system")):
        add("system", block, 0)
    rolling.update(b"messages:" + render)
    role: Json = None
    for message in messages:
        turn = message.get("role") != role
        role = message.get("role")
        if turn:  # consecutive turns of one role are merged (docs: api/messages)
            rolling.update(b"role:" + text_in(role).encode())
        for position, block in enumerate(content_blocks(message.get("content"))):
            add("messages", block, tokens.MESSAGE_TOKENS if turn and position == 0 else 0)

    automatic = body.get("cache_control")
    if isinstance(automatic, dict):
        _mark_last(blocks, body, _ttl(automatic))
    return Prompt(tuple(blocks), total, render)


def canonical(block: JsonObject) -> bytes:
    """A block's bytes as rendered: without its cache mark, key order kept, whitespace gone."""
    return msgspec.json.encode({key: value for key, value in block.items() if key != "cache_control"})


def ttl_of(block: JsonObject) -> Ttl | None:
    """The breakpoint a block carries, if any."""
    mark = block.get("cache_control")
    return _ttl(mark) if isinstance(mark, dict) else None


def _ttl(mark: JsonObject) -> Ttl:
    return "1h" if mark.get("ttl") == "1h" else "5m"


def markable(block: JsonObject) -> bool:
    """Whether a breakpoint may sit on the block."""
    if block.get("type") == "text":
        return bool(text_in(block.get("text")))
    return text_in(block.get("type")) not in UNMARKABLE


def _mark_last(blocks: list[Block], body: JsonObject, ttl: Ttl) -> None:
    """Automatic caching: the breakpoint goes to the last block that can carry one, walking back."""
    raw: list[JsonObject] = [tool for tool in list_in(body.get("tools")) if isinstance(tool, dict)]
    raw += content_blocks(body.get("system"))
    for message in list_in(body.get("messages")):
        raw += content_blocks(object_in(message).get("content"))
    for position in range(len(blocks) - 1, -1, -1):
        if markable(raw[position]):
            old = blocks[position]
            blocks[position] = Block(old.level, old.prefix, old.tokens, old.ttl or ttl)
            return


def block_tokens(block: JsonObject, tokenizer: Tokenizer) -> int:
    """Tokens of one tool, system or content block."""
    match block.get("type"):
        case "text":
            return tokens.count(text_in(block.get("text")), tokenizer)
        case "thinking" | "redacted_thinking":
            return 0  # thinking of earlier turns is not counted (docs: token counting)
        case "image":
            return tokens.IMAGE_TOKENS[tokenizer]
        case "document":
            source = object_in(block.get("source"))
            if source.get("type") in ("text", "content"):
                return tokens.count(text_in(source.get("data")), tokenizer) or _content_tokens(source, tokenizer)
            return tokens.DOCUMENT_TOKENS
        case "tool_result":
            return tokens.MESSAGE_TOKENS + _content_tokens(block, tokenizer)
        case _:
            return tokens.count(canonical(block).decode(), tokenizer)


def _content_tokens(block: JsonObject, tokenizer: Tokenizer) -> int:
    return sum(block_tokens(inner, tokenizer) for inner in content_blocks(block.get("content")))


def conversation_hash(body: JsonObject, message_count: int) -> bytes:
    """What a thinking block of message number `message_count` is bound to: tools, system and the messages before it.

    Cache marks and thinking blocks are not part of it, because neither is rendered for a finished turn.
    """
    rolling = blake2b(digest_size=HASH_BYTES)
    for tool in list_in(body.get("tools")):
        rolling.update(canonical(object_in(tool)))
    rolling.update(b"system:")
    for block in content_blocks(body.get("system")):
        rolling.update(canonical(block))
    for message in list_in(body.get("messages"))[:message_count]:
        rolling.update(b"role:" + text_in(object_in(message).get("role")).encode())
        for block in content_blocks(object_in(message).get("content")):
            if text_in(block.get("type")) not in UNMARKABLE:
                rolling.update(canonical(block))
    return rolling.digest()


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()
