"""The prompt of a request as Anthropic's cache sees it: tools, then system, then messages, block by block, as spans.

What it is: where each block of `tools`, of `system` and of the first message lies in the raw bytes of its field, where
a `cache_control` could be put into it by a splice, and what its text is made of. What it is not: an estimate of tokens
or an opinion on what is worth caching (`policy/prompt_cache.py`). Nothing is re-serialised, and what cannot be read
has no blocks: it is Anthropic's to refuse.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Literal

import msgspec

from headgate.wire.message import InvalidBody, Span, elements, members

Ttl = Literal["5m", "1h"]

DIGEST_BYTES = 16
BLOCKS_MAX = 512
"""Tools or system blocks of a request that are looked at; a field with more counts as one that cannot be read."""

_UNMARKABLE = frozenset({"thinking", "redacted_thinking"})
"""They cannot carry a mark, and are cached inside a later prefix (claude-api §7.1)."""
_MARKS: dict[Ttl, bytes] = {"5m": b'{"type":"ephemeral"}', "1h": b'{"type":"ephemeral","ttl":"1h"}'}

_QUOTE, _BRACE, _BRACKET = b'"{['
_VIETNAMESE = (b"\xe1\xba", b"\xe1\xbb")
"""How the letters that only Vietnamese has begin in UTF-8 (U+1E80 to U+1EFF)."""
_CJK = tuple(bytes((lead,)) for lead in range(0xE3, 0xEE))
"""First bytes of kana, Chinese and Hangul (U+3000 to U+DFFF)."""
_MARK_SPELLED = re.compile(
    b'"' + b"".join(b"(?:%c|\\\\u00%02x)" % (char, char) for char in b"cache_control") + rb'"[ \t\r\n]*:', re.IGNORECASE
)
_LETTERS_ESCAPED = (b"\\u005", b"\\u006", b"\\u007")
_ASSISTANT = re.compile(rb'"role"\s*:\s*"assistant"')
_ROLE = b'"role":'
_FIRST_IS_ARRAY = re.compile(rb'\s*\[\s*\{\s*(?:"role"\s*:\s*"user"\s*,\s*)?"content"\s*:\s*\[')
_FIRST_IS_TEXT = b'[{"role":"user","content":"'
_THOUGHTS = (b'"thinking"', b'"redacted_thinking"')


class Text(msgspec.Struct, frozen=True, gc=False):
    """What text is made of, for an estimate of its tokens. Runs of whitespace count as one character."""

    chars: int = 0
    foreign: int = 0
    """Characters beyond ASCII, all kinds together."""
    vietnamese: int = 0
    """Letters that only Vietnamese has; about half of its letters with marks."""
    cjk: int = 0
    pages: int = 0
    """PDF documents: each has a page at least."""

    def __add__(self, other: Text) -> Text:
        return Text(
            self.chars + other.chars,
            self.foreign + other.foreign,
            self.vietnamese + other.vietnamese,
            self.cjk + other.cjk,
            self.pages + other.pages,
        )


NO_TEXT = Text()


class Block(msgspec.Struct, frozen=True, gc=False):
    """One position of the prompt. Offsets count within the raw bytes of its field."""

    kind: str
    """`tool`, or the block's `type`; empty where it cannot be read."""
    span: Span
    mark_at: int
    """Where `,"cache_control":…` goes, behind its last member; -1 where the block cannot carry a mark. A system that is
    a string is replaced whole."""
    mark: str
    """`5m` or `1h` where the caller marked it, else empty."""
    digest: bytes
    """Of all blocks of the field up to and including this one, as they are written."""
    text: Text
    """Of this block alone."""


class Part(msgspec.Struct, frozen=True, gc=False):
    """A field of the request that other requests repeat."""

    raw: bytes
    digest: bytes
    """Of the raw bytes: equal bytes, equal digests."""
    blocks: tuple[Block, ...]
    is_string: bool
    has_marks: bool
    """Some `cache_control` stands in it, however it is spelled."""


NO_PART = Part(b"", b"", (), False, False)


def mark(ttl: Ttl) -> bytes:
    """The JSON of a `cache_control`."""
    return _MARKS[ttl]


def read_tools(raw: bytes) -> Part:
    """`tools` as a part. A tool that is loaded on demand stands outside of the prefix, so no tool beside it can be
    marked; nor can what is no object with a name."""
    blocks = _array_of_blocks(raw, as_tools=True)
    if any(b'"defer_loading"' in block.span.of(raw) for block in blocks):
        blocks = tuple(msgspec.structs.replace(block, mark_at=-1) for block in blocks)
    return Part(raw, _digest(raw), blocks, False, has_marks(raw))


def read_system(raw: bytes) -> Part:
    """`system`, a string or an array, as a part. Only text that is not blank can be marked."""
    if raw[:1] != b'"':
        return Part(raw, _digest(raw), _array_of_blocks(raw, as_tools=False), False, has_marks(raw))
    digest = _digest(raw)
    value = _decoded(raw)
    text = value if isinstance(value, str) else ""
    block = Block("text", Span(0, len(raw)), 0 if text.strip() else -1, "", digest, measure(text))
    return Part(raw, digest, (block,), True, False)


def system_marked(raw: bytes, ttl: Ttl) -> bytes:
    """A system that is a string as an array of one block with a mark; the string's bytes stay as they are."""
    return b'[{"type":"text","text":%b,"cache_control":%b}]' % (raw, _MARKS[ttl])


def first_spans(messages: bytes) -> list[Span]:
    """Where the blocks of the first message lie, which is where an app puts documents; empty unless it is a user's
    with an array of blocks."""
    if messages.startswith(_FIRST_IS_TEXT) or _FIRST_IS_ARRAY.match(messages) is None:
        return []
    try:
        first = elements(messages, Span(0, len(messages)))[0]
        fields = members(messages, first)
        if "role" not in fields or fields["role"].of(messages) != b'"user"':
            return []
        return elements(messages, fields["content"])
    except (InvalidBody, KeyError, IndexError, RecursionError):
        return []


def read_block(raw: bytes) -> Part:
    """One content block as a part of its own; a part without blocks where it is none."""
    blocks = _blocks(raw, [Span(0, len(raw))], as_tools=False)
    return Part(raw, blocks[0].digest, blocks if blocks[0].kind else (), False, has_marks(raw))


def message_text(messages: bytes) -> Text:
    """What the text blocks and strings of all messages are made of; everything else counts for nothing."""
    turns = _decoded(messages)
    total = NO_TEXT
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        total += measure(content) if isinstance(content, str) else _texts(content)
    return total


def has_marks(raw: bytes) -> bool:
    """Whether a key `cache_control` stands anywhere, also where its letters are escaped."""
    # From the back: a third of the time that `in` takes (measured, 3 KB of prose).
    if raw.rfind(b'"cache_control"') < 0 and (
        raw.rfind(b"\\u00") < 0 or not any(letters in raw for letters in _LETTERS_ESCAPED)
    ):
        return False
    return _MARK_SPELLED.search(raw) is not None


def has_assistant(messages: bytes) -> bool:
    """Whether an assistant has spoken."""
    return messages.rfind(b'"assistant"') >= 0 and _ASSISTANT.search(messages) is not None


def has_thoughts(messages: bytes) -> bool:
    """Whether thinking blocks may come back in these messages. Errs on the side of yes."""
    return any(kind in messages for kind in _THOUGHTS) or (
        # A type whose letters are escaped: nobody writes it so, and nobody is to lose a conversation by it.
        b"\\u00" in messages and any(letters in messages for letters in _LETTERS_ESCAPED)
    )


def last_turn(messages: bytes) -> tuple[int, int]:
    """Where the request before this one ended in `messages`, and where this one does, both behind a message's brace.

    The first is 0 where no assistant has spoken. A request that goes on with another begins with the other's bytes up
    to there; where an app writes `content` before `role`, it does not, and the two are not recognised.
    """
    end = messages.rfind(b"}") + 1
    at, named_at = -1, messages.rfind(b'"assistant"')
    if named_at >= len(_ROLE) and messages.startswith(_ROLE, named_at - len(_ROLE)):
        at = named_at - len(_ROLE)
    elif named_at >= 0:
        for found in _ASSISTANT.finditer(messages, max(named_at - 64, 0)):
            at = found.start()
    return (messages.rfind(b"}", 0, at) + 1 if at > 0 else 0), end


def measure(text: str) -> Text:
    """What a text is made of."""
    # Split without an argument knows every kind of whitespace; a run of it is a token or two, however long.
    spaced = " ".join(text.split())
    chars = len(spaced)
    if spaced.isascii():
        return Text(chars)
    foreign = chars - len(spaced.encode("ascii", "ignore"))
    utf8 = spaced.encode("utf-8", "replace")
    return Text(chars, foreign, sum(map(utf8.count, _VIETNAMESE)), sum(map(utf8.count, _CJK)))


def _array_of_blocks(raw: bytes, *, as_tools: bool) -> tuple[Block, ...]:
    try:
        spans = elements(raw, Span(0, len(raw)))
        return _blocks(raw, spans, as_tools=as_tools) if len(spans) <= BLOCKS_MAX else ()
    except (InvalidBody, RecursionError):
        return ()


def _blocks(raw: bytes, spans: list[Span], *, as_tools: bool) -> tuple[Block, ...]:
    rolling = blake2b(digest_size=DIGEST_BYTES)
    found = []
    for span in spans:
        written = span.of(raw)
        rolling.update(b"%d:" % len(written))
        rolling.update(written)
        found.append(_block(raw, span, written, rolling.digest(), as_tools=as_tools))
    return tuple(found)


def _block(raw: bytes, span: Span, written: bytes, digest: bytes, *, as_tools: bool) -> Block:
    value = _decoded(written)
    try:
        fields = members(raw, span)
    except (InvalidBody, RecursionError):
        fields = {}
    if not isinstance(value, dict) or not fields:
        return Block("", span, -1, "", digest, NO_TEXT)
    kind = "tool" if as_tools else value.get("type")
    if not isinstance(kind, str):
        kind = ""
    if as_tools:
        markable = isinstance(value.get("name"), str)
        # Anthropic renders tools in its own way; without its whitespace and escapes the JSON is near to it.
        text = measure(msgspec.json.encode(value).decode())
    else:
        inner = value.get("text")
        markable = bool(kind) and kind not in _UNMARKABLE and (kind != "text" or isinstance(inner, str))
        markable = markable and not (isinstance(inner, str) and not inner.strip())
        text = _text_of(value)
    cache_control = value.get("cache_control")
    ttl = ""
    if isinstance(cache_control, dict):
        ttl = "1h" if cache_control.get("ttl") == "1h" else "5m"
    end = max(field.end for field in fields.values())
    return Block(kind, span, end if markable and "cache_control" not in value else -1, ttl, digest, text)


def _text_of(block: dict[str, object]) -> Text:
    """Text that certainly counts: images and what lies elsewhere (a URL, a file) count for nothing here."""
    inner = block.get("text")
    if isinstance(inner, str):
        return measure(inner)
    source = block.get("source")
    if isinstance(source, dict):
        data = source.get("data")
        if source.get("type") == "text" and isinstance(data, str):
            return measure(data)
        if source.get("type") == "base64" and block.get("type") == "document":
            return Text(pages=1)
        return _texts(source.get("content"))
    return _texts(block.get("content"))


def _texts(content: object) -> Text:
    if isinstance(content, str):
        return measure(content)
    total = NO_TEXT
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") != "thinking":
            total += _text_of(block)
    return total


def _decoded(raw: bytes) -> object:
    """The value, None for what the decoder cannot hold (the grammar was checked before)."""
    try:
        value: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError):
        return None
    return value


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=DIGEST_BYTES).digest()
