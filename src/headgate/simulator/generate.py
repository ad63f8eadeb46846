"""What the simulated model answers: blocks, stop reason and output tokens, decided by the request, its directive and
the seed alone.

Pure. Does not know time, sockets or the cache; `events` turns an answer into bytes.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate
from typing import Literal

import msgspec

from headgate.simulator import corpus, tokens
from headgate.simulator.binding import sign
from headgate.simulator.directives import Directive, last_user_text
from headgate.simulator.jsonvalue import Json, JsonObject, content_blocks, int_in, list_in, object_in, text_in
from headgate.simulator.models import Tokenizer
from headgate.simulator.prompt import conversation_hash
from headgate.simulator.usage import Usage
from headgate.simulator.validate import Ask, Display

PartKind = Literal["thinking", "text", "tool_use"]

THINKING_TOKENS = {"low": 8, "medium": 16, "high": 24, "xhigh": 64, "max": 128}
"""How long the simulated model thinks at each effort; short, so that first words stay well under half a second."""
TOOL_CALL_TOKENS = 20
SCHEMA_DEPTH_MAX = 8
ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
REFUSAL = "This request was declined by a safety classifier."


@dataclass(frozen=True, slots=True)
class Part:
    """One content block of an answer."""

    kind: PartKind
    pieces: Sequence[str]
    """Visible text (text, thinking summary) or JSON (tool input), as streamed. Empty for omitted thinking."""
    output_tokens: int
    signature: str = ""
    id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """The pieces as one."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Answer:
    """One message, whole."""

    message_id: str
    model: str
    parts: tuple[Part, ...]
    stop_reason: str
    stop_sequence: str | None
    stop_details: JsonObject | None
    usage: Usage
    billed: bool = True
    """False for a refusal before any output (docs: refusals)."""
    diagnostics: JsonObject | None = None
    diagnosed: bool = False
    """Whether `diagnostics` appears in the answer; it may appear as null."""


class Ids:
    """Ids in the API's manner, the same for the same seed and order."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def next(self, prefix: str) -> str:
        """`prefix` and 22 characters, e.g. `msg_01…`."""
        self._count += 1
        number = int.from_bytes(blake2b(f"{self._seed}/{self._count}".encode(), digest_size=17).digest(), "big")
        digits = []
        for _ in range(22):
            number, digit = divmod(number, len(ALPHABET))
            digits.append(ALPHABET[digit])
        return f"{prefix}01{''.join(digits)}"


def compose(
    ask: Ask,
    directive: Directive,
    usage: Usage,
    *,
    ids: Ids,
    seed: int,
    prompt_hash: bytes,
    answer_tokens: int,
    organization: str,
) -> Answer:
    """The answer to a valid request. `usage` has the input side filled in; the answer's has the output too."""
    dice = random.Random(int.from_bytes(blake2b(prompt_hash + str(seed).encode(), digest_size=8).digest(), "big"))
    message_id = ids.next("msg_")
    if ask.max_tokens == 0:
        return Answer(message_id, ask.model.id, (), "max_tokens", None, None, usage)
    if directive.stop == "refusal":
        return Answer(message_id, ask.model.id, (), "refusal", None, _details(directive), usage, billed=False)
    tokenizer = ask.model.tokenizer
    left = ask.max_tokens
    parts: list[Part] = []

    thinking = _thinking(ask, directive, dice, left, organization)
    if thinking is not None:
        parts.append(thinking)
        left -= thinking.output_tokens

    stop_reason, stop_sequence = "end_turn", None
    tool = None if directive.stop == "empty" else tool_to_call(ask.body, directive, dice)
    if directive.stop != "empty" and left > 0:
        part, cut = _text(*_words(ask, directive, dice, tool, answer_tokens), left)
        if directive.stop == "refusal_mid":
            part, cut = _text(part.pieces, part.output_tokens, max(1, part.output_tokens // 2))
        part, stop_sequence = _stopped(part, ask.stop_sequences, tokenizer)
        if part.pieces:
            parts.append(part)
        left -= part.output_tokens
        if stop_sequence is not None:
            stop_reason, tool = "stop_sequence", None
        elif cut:
            stop_reason, tool = "max_tokens", None
    elif left <= 0:
        stop_reason, tool = "max_tokens", None
    if tool is not None and left > 0:
        stop_reason = "tool_use"
        part, cut = _tool(tool, directive, dice, left, tokenizer, ids)
        parts.append(part)
        if cut:
            stop_reason = "max_tokens"
    if directive.stop == "refusal_mid":
        stop_reason = "refusal"
    elif directive.stop not in (None, "end_turn", "empty"):
        stop_reason = directive.stop
    if directive.stop == "max_tokens" and parts and parts[-1].kind == "text":
        parts[-1] = replace(parts[-1], pieces=parts[-1].pieces[:-1] or parts[-1].pieces)
    return Answer(
        message_id,
        ask.model.id,
        tuple(parts),
        stop_reason,
        stop_sequence,
        _details(directive) if stop_reason == "refusal" else None,
        replace(
            usage,
            output_tokens=max(1, sum(part.output_tokens for part in parts)),
            thinking_tokens=thinking.output_tokens if thinking else 0,
            web_searches=directive.searches or 0,
        ),
    )


def tool_to_call(body: JsonObject, directive: Directive, dice: random.Random) -> JsonObject | None:
    """The tool an answer calls, or None for words.

    In this order: the directive's tool; a tool that tool_choice forces; none right after tool results; a tool whose
    name the last user message contains.
    """
    tools = [
        tool for tool in list_in(body.get("tools")) if isinstance(tool, dict) and isinstance(tool.get("name"), str)
    ]
    choice = object_in(body.get("tool_choice"))
    if not tools or choice.get("type") == "none":
        return None
    by_name = {text_in(tool["name"]): tool for tool in tools}
    if directive.tool is not None:
        return by_name.get(directive.tool)
    if choice.get("type") == "tool":
        return by_name.get(text_in(choice.get("name")))
    if choice.get("type") == "any":
        return dice.choice(tools)
    messages = list_in(body.get("messages"))
    last = content_blocks(object_in(messages[-1]).get("content")) if messages else []
    if any(block.get("type") == "tool_result" for block in last):
        return None
    text = last_user_text(body)
    return next((tool for name, tool in by_name.items() if name in text), None)


def sample(schema: Json, dice: random.Random, *, root: JsonObject, depth: int = 0) -> Json:
    """A value that a JSON schema accepts, for the common keywords; `root` resolves `#/$defs/…`."""
    node = object_in(schema)
    reference = text_in(node.get("$ref"))
    if reference.startswith("#/"):
        target: Json = root
        for step in reference[2:].split("/"):
            target = object_in(target).get(step)
        return sample(target, dice, root=root, depth=depth + 1) if depth < SCHEMA_DEPTH_MAX else None
    if "const" in node:
        return node["const"]
    if list_in(node.get("enum")):
        return dice.choice(list_in(node["enum"]))
    for several in ("anyOf", "oneOf", "allOf"):
        if list_in(node.get(several)):
            return sample(list_in(node[several])[0], dice, root=root, depth=depth + 1)
    kind = node.get("type")
    if isinstance(kind, list):
        kind = next((name for name in kind if name != "null"), "null")
    match kind:
        case "object" if depth < SCHEMA_DEPTH_MAX:
            required = list_in(node.get("required"))
            return {
                name: sample(inner, dice, root=root, depth=depth + 1)
                for name, inner in object_in(node.get("properties")).items()
                if name in required or not required
            }
        case "array":
            count = max(1, int_in(node.get("minItems")) or 1) if depth < SCHEMA_DEPTH_MAX else 0
            return [sample(node.get("items"), dice, root=root, depth=depth + 1) for _ in range(min(count, 16))]
        case "integer":
            low = int_in(node.get("minimum")) or 0
            return dice.randint(low, max(low, int_in(node.get("maximum")) or low + 9))
        case "number":
            return round(dice.uniform(0, 10), 2)
        case "boolean":
            return dice.random() < 0.5
        case "string" | None:
            return dice.choice(("Hanoi", "A1042", "next week", "blue"))
        case _:
            return None


def tool_input(part: Part) -> Json:
    """A tool call's input as a value; {} when it was cut."""
    try:
        value: Json = msgspec.json.decode(part.text)
    except msgspec.DecodeError:
        return {}
    return value


def _details(directive: Directive) -> JsonObject:
    return {"type": "refusal", "category": directive.category, "explanation": REFUSAL}


def _thinking(ask: Ask, directive: Directive, dice: random.Random, left: int, organization: str) -> Part | None:
    if ask.thinking in ("off", "between_tools"):
        return None
    wished = directive.thinking
    if wished is None:
        wished = THINKING_TOKENS[ask.effort] if ask.thinking == "adaptive" else min(ask.budget_tokens or 0, 64)
    if wished == 0:
        return None
    shown: Sequence[str] = _summary(ask.display, dice)
    text = "".join(shown)
    bound = conversation_hash(ask.body, len(list_in(ask.body.get("messages"))))
    return Part("thinking", shown, min(wished, left), signature=sign(ask.model, organization, bound, text))


def _summary(display: Display, dice: random.Random) -> Sequence[str]:
    if display == "omitted":
        return ()
    thought = dice.choice(corpus.THOUGHT_PIECES)
    return (thought[0].lstrip(), *thought[1:])


def _words(
    ask: Ask, directive: Directive, dice: random.Random, tool: JsonObject | None, answer_tokens: int
) -> tuple[Sequence[str], int]:
    """The text to send before any limit cuts it: its pieces and its tokens."""
    if directive.text is not None:
        return _counted(directive.text, ask.model.tokenizer)
    shape = object_in(ask.body.get("output_config")).get("format")
    if shape is not None and tool is None:
        schema = object_in(object_in(shape).get("schema"))
        return _counted(msgspec.json.encode(sample(schema, dice, root=schema)).decode(), ask.model.tokenizer)
    if tool is not None and directive.tokens is None:
        return _counted(f"I will use {text_in(tool.get('name'))} for this.", ask.model.tokenizer)
    count = directive.tokens if directive.tokens is not None else round(answer_tokens * dice.uniform(0.5, 1.5))
    return _filled(last_user_text(ask.body), max(1, count), ask.model.tokenizer, dice)


def _counted(text: str, tokenizer: Tokenizer) -> tuple[Sequence[str], int]:
    return corpus.pieces(text), max(1, tokens.count(text, tokenizer))


def _filled(prompt: str, count: int, tokenizer: Tokenizer, dice: random.Random) -> tuple[Sequence[str], int]:
    """Sentences in the language of the prompt, `count` tokens long; pieces are shared, so that it stays small."""
    vietnamese = tokens.kind_of(prompt).startswith("vietnamese")
    sentences = corpus.VIETNAMESE_PIECES if vietnamese else corpus.ENGLISH_PIECES
    wanted = count * tokens.chars_per_token((corpus.VIETNAMESE if vietnamese else corpus.ENGLISH)[0], tokenizer)
    found: list[str] = []
    chars = 0
    position = dice.randrange(len(sentences))
    while chars < wanted:
        sentence = sentences[position % len(sentences)]
        found += sentence
        chars += sum(map(len, sentence))
        position += 1
    while len(found) > 1 and chars - len(found[-1]) >= wanted:
        chars -= len(found.pop())
    found[0] = found[0].lstrip()
    return found, count


def _text(pieces: Sequence[str], count: int, left: int) -> tuple[Part, bool]:
    """The text block, and whether `left` tokens cut it."""
    if count <= left:
        return Part("text", pieces, count), False
    return Part("text", pieces[: max(1, len(pieces) * left // count)], left), True


def _stopped(part: Part, sequences: tuple[str, ...], tokenizer: Tokenizer) -> tuple[Part, str | None]:
    """The part up to the first stop sequence in it, and that sequence."""
    if not sequences:
        return part, None
    text = part.text
    found = [(text.find(sequence), sequence) for sequence in sequences if sequence in text]
    if not found:
        return part, None
    at, sequence = min(found)
    kept = text[:at]
    return Part("text", corpus.pieces(kept), max(1, tokens.count(kept, tokenizer))), sequence


def _tool(
    tool: JsonObject, directive: Directive, dice: random.Random, left: int, tokenizer: Tokenizer, ids: Ids
) -> tuple[Part, bool]:
    """The tool call, and whether `left` tokens cut its input."""
    name = text_in(tool.get("name"))
    schema = object_in(tool.get("input_schema"))
    text = (
        directive.input
        if directive.input is not None
        else msgspec.json.encode(sample(schema, dice, root=schema)).decode()
    )
    count = tokens.count(text, tokenizer) + TOOL_CALL_TOKENS
    cut = count > left
    if cut:
        text = text[: int(len(text) * left / count)]
        count = left
    return Part("tool_use", corpus.pieces(text), count, id=ids.next("toolu_"), name=name), cut


def tokens_by_piece(part: Part) -> Iterator[int]:
    """Output tokens of a part after each of its pieces; the last is the part's whole."""
    whole = max(1, sum(map(len, part.pieces)))
    return (max(1, part.output_tokens * length // whole) for length in accumulate(map(len, part.pieces)))
