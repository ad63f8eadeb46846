"""Where two prompts of one family part, and why: the first byte after which nothing can be read from the cache.

What it is: a comparison in Anthropic's order (tools, system, messages; claude-api §7.1 and §7.5), as the server sees
them: the white space between JSON values, the way a character is escaped and the cache marks are no difference, the
order of keys is. What is no JSON is compared byte by byte; nothing here raises.
What it is not: an opinion on what it cost, or a memory of prompts (`cache_lint.py`).

A conversation that grows is no difference, nor is another conversation behind the same system prompt. Of messages only
an edit is: something that changed while what follows it did not.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple, get_args

import msgspec

from headgate.policy.records import Record
from headgate.policy.volatile import Value, classify, first_difference, snippet
from headgate.wire.message import Span, elements, members

Part = Literal["tools", "system", "messages", "request"]
Cause = Literal[
    "timestamp",
    "date",
    "uuid",
    "user_id",
    "counter",
    "random_token",
    "key_order",
    "tool_order",
    "tool_added",
    "tool_removed",
    "tools_changed",
    "whitespace",
    "unicode_form",
    "image",
    "ttl_order",
    "below_minimum",
    "look_back",
    "too_many_marks",
    "empty_mark",
    "model_changed",
    "arm_changed",
    "text_changed",
    "placeholder",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
BY_THEMSELVES = frozenset({"timestamp", "date", "uuid", "user_id", "counter", "random_token"})
"""Causes that change with every request, or every person."""

MENDS: dict[Cause, str] = {
    "timestamp": "A time of day stands in the prompt. Put it into the last user message, or round it to the day.",
    "date": "A date stands in the prompt. Put it behind the last cache mark, or accept one miss a day.",
    "uuid": "A UUID stands in the prompt. Take it out, or put it into the last user message.",
    "user_id": "The prompt names its user. Put who it is into the last user message: users then share the prompt.",
    "counter": "A number that counts stands in the prompt. Take it out, or put it into the last user message.",
    "random_token": "A token that is made anew stands in the prompt. Take it out, or put it into the last message.",
    "key_order": "The same keys come in another order. Serialise with sorted keys.",
    "tool_order": "The same tools come in another order. Sort them by name before sending.",
    "tool_added": "A tool was added, which moves all that follows. Send every tool always; tool_choice chooses.",
    "tool_removed": "A tool is missing, which moves all that follows. Send every tool always; tool_choice chooses.",
    "tools_changed": "Tools changed. Tools come first in a prompt: whatever changes there, nothing is read.",
    "whitespace": "Only white space differs. Build the prompt from one template, and strip it in one place.",
    "unicode_form": "The same letters are composed in another way. Normalise the text to NFC before sending.",
    "image": "An image or a file came, went or changed. Put files behind what is shared, and always the same bytes.",
    "ttl_order": "A mark of 1h follows one of 5m. Put longer TTLs first.",
    "below_minimum": "The marked prefix is shorter than this model caches, so the mark does nothing.",
    "look_back": "More than 20 blocks lie between the marks of two requests. Mark every 20 blocks, or mark each turn.",
    "too_many_marks": "More than 4 cache marks: the API answers 400. Keep those where the text is reused.",
    "empty_mark": "A cache mark stands on an empty block: the API answers 400. Mark the block before it.",
    "model_changed": "Another model was asked, and each has a cache of its own. Keep a conversation on its model.",
    "arm_changed": "An experiment sent it to another model, which has a cache of its own. Deal by conversation.",
    "text_changed": "The text changed. Put what changes behind what does not, each in a block of its own.",
    "placeholder": "A placeholder is filled in for each request. Put what it stands for behind the last mark.",
}

LOOK_BACK_BLOCKS = 20
"""Positions that are looked through for an entry, the marked one included (claude-api §7.1)."""
_CONVERGES_CHARS = 64
_CONVERGES_BYTES = 256
_MESSAGES_LOOKED_AT = 50
BLOCKS_MAX = 4_000
"""Blocks, tools or messages of a part, and keys of an object, that are taken apart; what has more is compared as bytes,
and messages not at all. Without it 2 MB of small blocks would take 300 ms."""
_ESCAPE_BYTES = 12
"""Of the longest escape: a pair of surrogates."""
_MARK = b'"cache_control"'
_NOT_JSON = (msgspec.MsgspecError, ValueError, IndexError, RecursionError)
_FILES = frozenset({"image", "document", "container_upload"})

_string = msgspec.json.Decoder(str)
_array = msgspec.json.Decoder(list[msgspec.Raw])


class PromptParts(Record, frozen=True):
    """A prompt as it was sent: raw JSON of three fields, b"" where absent."""

    tools: bytes
    system: bytes
    messages: bytes
    model: str
    arm: str = ""
    user: str = ""
    """Who sent it, where known: a prompt that names its user is recognised by it."""
    automatic: bool = False
    """Whether the request has a top-level `cache_control`: a mark on its last block."""


class Finding(Record, frozen=True):
    """Why a prefix could not be read."""

    cause: Cause
    part: Part
    byte: int
    """The first byte that differs, an offset in the current prompt's raw JSON of `part`."""
    before: str
    """The previous prompt around it, masked (`volatile.snippet`), at most 40 characters."""
    after: str
    message: str
    """What it is and how to mend it, one line."""
    value_at: int = 0
    """Where the varying value starts, ≤ `byte`: the start of a timestamp whose seconds differ."""


class _Text(NamedTuple):
    """Two texts that part, and where they stand: offsets in the two parts of the first byte of the raw text."""

    one: str
    other: str
    other_raw: bytes
    other_at: int
    """Offset of `other_raw` in the part."""
    quoted: bool


class _Place(NamedTuple):
    """A difference of structure: where in the current part, and what is shown."""

    cause: Cause
    byte: int
    value_at: int
    before: str
    after: str


_Difference = _Text | _Place


def compare(previous: PromptParts, current: PromptParts) -> Finding | None:
    """The first difference that keeps `current` from reading what `previous` wrote; None when there is none."""
    if previous.model != current.model:
        cause: Cause = "arm_changed" if previous.arm != current.arm else "model_changed"
        return Finding(cause, "request", 0, previous.model[:40], current.model[:40], MENDS[cause])
    users = (previous.user, current.user)
    pairs: tuple[tuple[Part, bytes, bytes], ...] = (
        ("tools", previous.tools, current.tools),
        ("system", previous.system, current.system),
        ("messages", previous.messages, current.messages),
    )
    for part, one, other in pairs:
        if one == other:
            continue
        try:
            if part == "tools":
                found = _tools(one, other, users)
            elif part == "system":
                found = _finding("system", _content(one, _whole(one), other, _whole(other)), users)
            else:
                found = _messages(one, other, users)
                if found is None:
                    found = _look_back(previous, current)
        except _NOT_JSON:
            found = None if part == "messages" else _finding(part, _opaque(one, other), users)
        if found is not None:
            return found
    return None


def compare_texts(previous: bytes, current: bytes) -> Finding | None:
    """The same of two texts that are no JSON: files with a system prompt."""
    return None if previous == current else _finding("system", _opaque(previous, current), ("", ""))


def first_byte(one: bytes, other: bytes) -> int:
    """Offset of the first byte that differs; the shorter one's length when it begins the other."""
    low, high = 0, min(len(one), len(other))
    views = memoryview(one), memoryview(other)
    if views[0][:high] == views[1][:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def continues(previous: bytes, current: bytes) -> bool:
    """Whether messages begin with the same message: another turn of one conversation."""
    try:
        ones, others = _items(previous, _whole(previous)), _items(current, _whole(current))
        return bool(ones and others) and _message(previous, ones[0], current, others[0]) is None
    except _NOT_JSON:
        return False


def raw_offset(raw: bytes, index: int) -> int:
    """Where character `index` of a JSON string begins in its raw bytes, quotes included. Takes two decodings."""
    low, high = 1, len(raw) - 1
    if b"\\" not in raw:
        return low + len(raw[low:high].decode()[:index].encode())
    while high - low > _CONVERGES_CHARS:
        middle = _boundary(raw, low, (low + high) // 2)
        if middle <= low:
            break
        chars = len(_string.decode(b'"%b"' % raw[low:middle]))
        if chars <= index:
            low, index = middle, index - chars
        else:
            high = middle
    for _ in range(index):
        low = _next(raw, low)
    return low


def _boundary(raw: bytes, low: int, at: int) -> int:
    """The last place ≤ `at` that stands between two characters, not far before it; `low` is one."""
    place = max(low, at - _ESCAPE_BYTES)
    near = raw.rfind(b"\\", max(low, place - _ESCAPE_BYTES), place)
    if near >= 0:
        place = _run_start(raw, low, near + 1)
        # The second half of a pair of surrogates belongs to the first.
        if place - 6 >= low and raw[place - 6 : place - 4] == b"\\u" and raw[place - 4] in b"dD":
            place = _run_start(raw, low, place - 5)
    while place > low and raw[place] & 0xC0 == 0x80:
        place -= 1
    while (after := _next(raw, place)) <= at:
        place = after
    return place


def _run_start(raw: bytes, low: int, end: int) -> int:
    """Where the backslashes that end at `end` begin, which is always between two characters but within a pair of
    surrogates; of a long run a place near its end, by whole pairs."""
    start = low + len(raw[low:end].rstrip(b"\\"))
    return start + max(end - start - _ESCAPE_BYTES, 0) // 2 * 2


def _next(raw: bytes, at: int) -> int:
    """The end of the character at `at`."""
    if raw[at] == 0x5C:
        if raw[at + 1] != 0x75:
            return at + 2
        high = raw[at + 2] in b"dD" and raw[at + 3] in b"89abAB"
        return at + 12 if high else at + 6
    at += 1
    while raw[at] & 0xC0 == 0x80:
        at += 1
    return at


def _whole(raw: bytes) -> Span:
    return Span(0, len(raw))


def _items(raw: bytes, span: Span) -> list[Span]:
    """Elements of an array; none of a field that is absent or null. Raises ValueError for more than BLOCKS_MAX."""
    array = span.of(raw)
    if array in (b"", b"null"):
        return []
    if len(_array.decode(array)) > BLOCKS_MAX:
        raise ValueError(f"more than {BLOCKS_MAX} elements")
    return elements(raw, span)


def _finding(part: Part, found: _Difference | None, users: tuple[str, str]) -> Finding | None:
    if found is None:
        return None
    if isinstance(found, _Place):
        before, after = found.before, found.after
        if part == "messages" and found.cause in {"key_order", "text_changed"}:
            # Of a tool's schema the keys are a program's words; of what a model or a person said they need not be.
            before, after = snippet(before, 0, cause=found.cause), snippet(after, 0, cause=found.cause)
        return Finding(found.cause, part, found.byte, before, after, MENDS[found.cause], found.value_at)
    at = first_difference(found.one, found.other)
    value = classify(found.one, found.other, at, user_before=users[0], user_after=users[1])
    cause: Cause = value.cause
    if part == "tools" and cause == "text_changed":
        cause = "tools_changed"
    byte = _byte(found, at)
    return Finding(
        cause,
        part,
        byte,
        snippet(found.one, value.start, cause=cause),
        snippet(found.other, value.start, cause=cause),
        MENDS[cause],
        min(byte, found.other_at + _offset(found, value.start)),
    )


def _offset(found: _Text, index: int) -> int:
    if found.quoted:
        return raw_offset(found.other_raw, index)
    return len(found.other[:index].encode("utf-8", "surrogateescape"))


def _byte(found: _Text, at: int) -> int:
    """The first byte that differs: within a character of several bytes, the one that does."""
    offset = _offset(found, at)
    if found.one[at : at + 1] and found.other[at : at + 1] and found.other_raw[offset] != 0x5C:
        one, other = (text[at].encode("utf-8", "surrogateescape") for text in (found.one, found.other))
        offset += first_byte(one, other)
    return found.other_at + offset


def _opaque(one: bytes, other: bytes) -> _Text:
    texts = [raw.decode("utf-8", "surrogateescape") for raw in (one, other)]
    return _Text(texts[0], texts[1], other, 0, quoted=False)


def _value(one: bytes, a: Span, other: bytes, b: Span, *, block: bool = False) -> _Difference | None:
    """The first difference of two JSON values. Of a `block` the cache mark is not looked at."""
    raw_a, raw_b = a.of(one), b.of(other)
    if raw_a == raw_b:
        return None
    kinds = raw_a[:1] + raw_b[:1]
    if kinds == b'""':
        texts = _string.decode(raw_a), _string.decode(raw_b)
        return None if texts[0] == texts[1] else _Text(*texts, raw_b, b.start, quoted=True)
    if kinds == b"{{" and max(_keys(raw_a), _keys(raw_b)) <= BLOCKS_MAX:
        return _objects(one, a, other, b, block=block)
    if kinds == b"[[":
        ones, others = _items(one, a), _items(other, b)
        for x, y in zip(ones, others, strict=False):
            found = _value(one, x, other, y, block=True)
            if found is not None:
                return found
        return _rest(one, ones, other, b, others)
    text = _opaque(raw_a, raw_b)
    return text._replace(other_at=b.start)


def _keys(raw: bytes) -> int:
    """Keys at all levels, or a few more."""
    return raw.count(b'":') - raw.count(b'\\":')


def _objects(one: bytes, a: Span, other: bytes, b: Span, *, block: bool) -> _Difference | None:
    ones, others = list(members(one, a).items()), list(members(other, b).items())
    if block:
        ones = [item for item in ones if item[0] != "cache_control"]
        others = [item for item in others if item[0] != "cache_control"]
        if _file_in(one, dict(ones)) or _file_in(other, dict(others)):
            return _image(one, a, ones, other, b, others)
    last_a, last_b = a.start + 1, b.start + 1
    for (key_a, x), (key_b, y) in zip(ones, others, strict=False):
        if key_a != key_b:
            same = {key for key, _ in ones} == {key for key, _ in others}
            cause: Cause = "key_order" if same else "text_changed"
            key_at = other.index(b'"', last_b)
            byte = key_at + first_byte(one[one.index(b'"', last_a) : x.start], other[key_at : y.start])
            return _Place(cause, byte, key_at, _names(key for key, _ in ones), _names(key for key, _ in others))
        found = _value(one, x, other, y, block=block and key_a == "content")
        if found is not None:
            return found
        last_a, last_b = x.end, y.end
    if len(ones) == len(others):
        return None
    # One has members behind those of the other.
    at = others[len(ones)][1].start if len(others) > len(ones) else b.end - 1
    return _Place("text_changed", at, at, _names(key for key, _ in ones), _names(key for key, _ in others))


def _names(names: object) -> str:
    """Names of keys or tools, in their order: a program's words, not a prompt's."""
    assert hasattr(names, "__iter__")
    return ", ".join(str(name) for name in names)[:40]


def _file_in(raw: bytes, of: dict[str, Span]) -> bool:
    kind = of.get("type")
    if kind is None or kind.of(raw)[1:-1].decode() not in _FILES:
        return False
    source = of.get("source")
    # The text of a document is text.
    return source is None or b'"text"' not in source.of(raw)[:64]


def _image(
    one: bytes, a: Span, ones: list[tuple[str, Span]], other: bytes, b: Span, others: list[tuple[str, Span]]
) -> _Place | None:
    pairs = zip(ones, others, strict=False)
    if len(ones) == len(others) and all(
        key_a == key_b and _value(one, x, other, y) is None for (key_a, x), (key_b, y) in pairs
    ):
        return None
    byte = b.start + first_byte(a.of(one), b.of(other))
    return _Place("image", byte, b.start, _kind(one, dict(ones)), _kind(other, dict(others)))


def _kind(raw: bytes, of: dict[str, Span]) -> str:
    return of["type"].of(raw)[1:-1].decode()[:40] if "type" in of else "–"


def _rest(one: bytes, ones: list[Span], other: bytes, b: Span, others: list[Span]) -> _Place | None:
    """One array goes on where the other ends."""
    if len(ones) == len(others):
        return None
    longer, of = (other, others) if len(others) > len(ones) else (one, ones)
    extra = of[min(len(ones), len(others))]
    fields = members(longer, extra) if longer[extra.start : extra.start + 1] == b"{" else {}
    at = extra.start if len(others) > len(ones) else b.end - 1
    return _Place(
        "image" if _file_in(longer, fields) else "text_changed", at, at, f"{len(ones)} blocks", f"{len(others)} blocks"
    )


def _content(one: bytes, a: Span, other: bytes, b: Span) -> _Difference | None:
    """Two contents: each a string, which is one block of text, or an array of blocks."""
    raw_a, raw_b = a.of(one), b.of(other)
    if raw_a == raw_b:
        return None
    if raw_a[:1] == b'"' and raw_b[:1] == b'"':
        return _value(one, a, other, b)
    ones, others = _blocks(one, a), _blocks(other, b)
    for x, y in zip(ones, others, strict=False):
        if one[x.start] == other[y.start]:
            found = _value(one, x, other, y, block=True)
        else:
            found = _value(one, _text_of(one, x), other, _text_of(other, y))
        if found is not None:
            return found
    return _rest(one, ones, other, b, others)


def _blocks(raw: bytes, span: Span) -> list[Span]:
    return [span] if raw[span.start : span.start + 1] == b'"' else _items(raw, span)


def _text_of(raw: bytes, block: Span) -> Span:
    """The text of a block, where a string is one by itself."""
    return members(raw, block).get("text", block) if raw[block.start] == 0x7B else block


def _tools(one: bytes, other: bytes, users: tuple[str, str]) -> Finding | None:
    ones, others = _items(one, _whole(one)), _items(other, _whole(other))
    found: _Difference | None = None
    at = 0
    for x, y in zip(ones, others, strict=False):
        found = _value(one, x, other, y, block=True)
        if found is not None:
            break
        at += 1
    if found is None and len(ones) == len(others):
        return None
    # Those before are the same.
    names = [_tool_name(one, span) for span in ones[at:]], [_tool_name(other, span) for span in others[at:]]
    if names[0] == names[1]:
        return _finding("tools", found, users)
    counts = Counter(names[0]), Counter(names[1])
    cause: Cause = "tools_changed"
    if counts[0] == counts[1]:
        cause = "tool_order"
    elif counts[0] < counts[1]:
        cause = "tool_added"
    elif counts[1] < counts[0]:
        cause = "tool_removed"
    value_at = others[at].start if at < len(others) else max(len(other) - 1, 0)
    byte = value_at
    if at < len(ones) and at < len(others):
        byte += first_byte(ones[at].of(one), others[at].of(other))
    shown = (_names(names[0][:3]), _names(names[1][:3]))
    return Finding(cause, "tools", byte, *shown, MENDS[cause], value_at)


def _tool_name(raw: bytes, tool: Span) -> str:
    fields = members(raw, tool)
    name = fields.get("name") or fields.get("type")
    return "" if name is None else str(msgspec.json.decode(name.of(raw)))


def _message(one: bytes, a: Span, other: bytes, b: Span) -> _Difference | None:
    if a.of(one) == b.of(other):
        return None
    ones, others = members(one, a), members(other, b)
    for name in ("role", "content"):
        if (name in ones) is not (name in others):
            return _Place("text_changed", b.start, b.start, "", "")
    if "role" in ones:
        found = _value(one, ones["role"], other, others["role"])
        if found is not None:
            return found
    return _content(one, ones["content"], other, others["content"]) if "content" in ones else None


def _messages(one: bytes, other: bytes, users: tuple[str, str]) -> Finding | None:
    """An edit of what was sent before. What follows it tells an edit from another conversation."""
    ones, others = _items(one, _whole(one)), _items(other, _whole(other))
    for at, (x, y) in enumerate(zip(ones, others, strict=False)):
        found = _message(one, x, other, y)
        if found is None:
            continue
        finding = _finding("messages", found, users)
        assert finding is not None
        later = list(zip(ones[at + 1 :], others[at + 1 :], strict=False))[:_MESSAGES_LOOKED_AT]
        # All of it: a greeting from a template comes in every conversation.
        edited = bool(later) and all(_message(one, a, other, b) is None for a, b in later)
        if edited or _goes_on(found, finding, users) or _block_goes_on(one, x, other, y):
            return finding
        return _turns_dropped(one, ones, other, others, finding) if at == 0 else None
    return None


def _goes_on(found: _Difference, finding: Finding, users: tuple[str, str]) -> bool:
    """Whether the text after a value that varies by itself is the same again, and enough of it to matter."""
    if isinstance(found, _Place) or finding.cause not in BY_THEMSELVES:
        return False
    at = first_difference(found.one, found.other)
    value: Value = classify(found.one, found.other, at, user_before=users[0], user_after=users[1])
    one = found.one[value.before_end : value.before_end + _CONVERGES_CHARS]
    return len(one) == _CONVERGES_CHARS and found.other.startswith(one, value.after_end)


def _block_goes_on(one: bytes, a: Span, other: bytes, b: Span) -> bool:
    """Whether a long block behind the one that changed is the same in both messages."""
    x, y = members(one, a).get("content"), members(other, b).get("content")
    if x is None or y is None:
        return False
    pairs = list(zip(_blocks(one, x), _blocks(other, y), strict=False))
    changed = False
    for p, q in pairs:
        same = _value(one, p, other, q, block=True) is None
        if same and changed and p.end - p.start >= _CONVERGES_BYTES:
            return True
        changed = changed or not same
    return False


def _turns_dropped(one: bytes, ones: list[Span], other: bytes, others: list[Span], finding: Finding) -> Finding | None:
    """A conversation whose oldest turns were cut off: two messages that follow one another moved to the front."""
    if len(others) < 2:
        return None
    head = [others[0].of(other), others[1].of(other)]
    raws = [span.of(one) for span in ones[: 4 * _MESSAGES_LOOKED_AT]]
    if not any(raws[at : at + 2] == head for at in range(1, len(raws) - 1)):
        return None
    return msgspec.structs.replace(
        finding,
        cause="text_changed",
        message="The oldest turns were cut off, which moves all that follows. Cut rarely, and many turns at once.",
    )


def _look_back(previous: PromptParts, current: PromptParts) -> Finding | None:
    """A conversation that grew by more blocks than are looked through: its mark does not find the last entry."""
    if not (previous.automatic or current.automatic or _MARK in previous.messages or _MARK in current.messages):
        return None
    if not continues(previous.messages, current.messages):
        return None
    before, after = _marked(previous), _marked(current)
    if not before[1] or not after[1]:
        return None
    entry = before[1][-1][0]
    if any(position - LOOK_BACK_BLOCKS < entry <= position for position, _ in after[1]):
        return None
    reached = [mark for mark in after[1] if mark[0] > entry]
    if not reached:
        return None
    position, at = reached[0]
    shown = f"marked at block {entry + 1}", f"marked at block {position + 1}"
    return Finding("look_back", "messages", at, *shown, MENDS["look_back"], at)


def _marked(parts: PromptParts) -> tuple[int, list[tuple[int, int]]]:
    """Blocks of the messages, and of those that are marked the number and the offset."""
    raw = parts.messages
    number = 0
    last = 0
    marks: list[tuple[int, int]] = []
    for message in _items(raw, _whole(raw)):
        content = members(raw, message).get("content")
        for block in _blocks(raw, content) if content is not None else ():
            last = block.start
            if _MARK in block.of(raw) and raw[block.start] == 0x7B and "cache_control" in members(raw, block):
                marks.append((number, block.start))
            number += 1
    if parts.automatic and number and (not marks or marks[-1][0] != number - 1):
        marks.append((number - 1, last))
    return number, marks
