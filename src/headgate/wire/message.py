"""A Messages request: the client's original bytes plus the spans of the fields we read.

What it is: a scanner that finds where the top-level values of a JSON object lie, and edits that splice bytes there.
What it is not: a parser of the request. Nested values are never decoded unless somebody asks, nothing is ever
re-serialised, and a field nobody reads passes as it came.

The grammar is held by `msgspec`, whose skipping of raw values is strict (measured: it refuses NaN, lone surrogates,
bad escapes, control characters, leading zeros and trailing commas). What it does not hold is held here: UTF-8,
nesting of at most 200, and one value for each top-level key.
"""

from __future__ import annotations

from collections.abc import Container
from itertools import accumulate

import msgspec

DEPTH_MAX = 200
"""Levels of nesting a body may have (failure-model §2.2: parsers behind us die at about 5,000)."""

KEYS_MAX = 100_000
"""Keys that a body may have, at all levels together: three million of them would hold the loop up for seconds."""
STRUCTURE_BYTES_MAX = 1_000_000
"""Brackets and quotes that are looked through for the depth."""
_COUNTED_FROM_BYTES = 256 << 10
_SPACES_BY_HAND = 16

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])
_string = msgspec.json.Decoder(str)

_QUOTE, _COLON, _COMMA, _CLOSE_OBJECT, _CLOSE_ARRAY = b'":,}]'
_WHITESPACE = frozenset(b" \t\n\r")
_TOKENS = {
    key: b'"%b"' % key.encode()
    for key in ("model", "max_tokens", "messages", "system", "tools", "stream", "metadata", "thinking", "tool_choice")
}
_LEVELS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_LEVELS = bytes(c for c in range(256) if c not in b'[]{}"')
_PEELS = 12


class InvalidBody(ValueError):
    """The body cannot be what the Messages API takes. The text is safe to show to its sender."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """Bytes `start` to `end` (exclusive) of a body."""

    start: int
    end: int

    def of(self, body: bytes) -> bytes:
        """The bytes themselves."""
        return body[self.start : self.end]


class Splice(msgspec.Struct, frozen=True, gc=False):
    """Replace bytes `start` to `end` of the original by `insert`; an insertion has `start == end`."""

    start: int
    end: int
    insert: bytes


class MessageRequest:
    """The scanned body of `/v1/messages` or `count_tokens`."""

    __slots__ = ("_raws", "_spans", "body", "chars")

    def __init__(self, body: bytes, raws: dict[str, msgspec.Raw], spans: dict[str, Span] | None, chars: int) -> None:
        """`spans` None: the body is compact, without whitespace between values, escapes in keys or a key twice."""
        self._raws = raws
        self._spans = spans
        self.body = body
        self.chars = chars
        """Characters of the body (not bytes); an escape counts as it is written."""

    @property
    def fields(self) -> dict[str, Span]:
        """Every top-level key with the span of its value, in the order of the body."""
        if self._spans is None:
            self._spans = _compact_members(self._raws)
        return self._spans

    def raw(self, name: str) -> bytes | None:
        """The bytes of a top-level value, None when the key is absent."""
        raw = self._raws.get(name)
        return None if raw is None else bytes(raw)

    @property
    def model(self) -> str:
        """The model asked for. Raises InvalidBody when it is absent or not a string."""
        raw = self.raw("model")
        if raw is None:
            raise InvalidBody("model: Field required")
        if raw[0] != _QUOTE:
            raise InvalidBody("model: Input should be a valid string")
        return _string.decode(raw) if b"\\" in raw else raw[1:-1].decode()

    @property
    def stream(self) -> bool:
        """Whether a stream is asked for. Raises InvalidBody for anything but true, false, null, absent."""
        raw = self.raw("stream")
        if raw is None or raw in (b"false", b"null"):
            return False
        if raw == b"true":
            return True
        raise InvalidBody("stream: Input should be a valid boolean")

    @property
    def max_tokens(self) -> int:
        """`max_tokens`; 0 when it is absent or no whole number, which Anthropic then refuses in its own words."""
        raw = self.raw("max_tokens")
        return int(raw) if raw is not None and raw.isdigit() and len(raw) <= 18 else 0

    @property
    def metadata_user_id(self) -> str:
        """`metadata.user_id`, empty when absent or not a string."""
        raw = self.raw("metadata")
        if raw is None or raw[:1] != b"{":
            return ""
        user_id = bytes(_object.decode(raw).get("user_id", b""))
        return _string.decode(user_id) if user_id[:1] == b'"' else ""

    @property
    def speed(self) -> str:
        """`speed` as it is asked for; `standard` where it is not."""
        raw = self.raw("speed") or b""
        if b"\\" in raw and raw[0] == _QUOTE:
            raw = msgspec.json.encode(_string.decode(raw))  # who spells it out gets the same
        return "fast" if raw == b'"fast"' else "standard"

    @property
    def uses_server_state(self) -> bool:
        """True for requests whose state lives at Anthropic and must not be sent anywhere else (design §6)."""
        return any(name in self._raws for name in ("thread", "previous_message_id", "container"))

    @property
    def cache_marks(self) -> int:
        """How many `cache_control` keys the body has, wherever they stand (text that spells it escaped is not one)."""
        return sum(1 for at in _occurrences(self.body, b'"cache_control"') if _is_key(self.body, at + 15))


def scan(body: bytes) -> MessageRequest:
    """Find the top-level fields of a request body.

    Raises InvalidBody: not UTF-8, not JSON, not an object, nested deeper than 200, a key twice, NaN, a lone surrogate,
    more keys or brackets than a body of any use has.
    """
    if body.isascii():
        chars = len(body)
    else:
        try:
            chars = len(body.decode())
        except UnicodeDecodeError as error:
            raise InvalidBody(f"The request body is not valid UTF-8 at byte {error.start}.") from None
    if len(body) > _COUNTED_FROM_BYTES and body.count(b'":') > KEYS_MAX:
        raise InvalidBody(f"The request body has more than {KEYS_MAX} keys.")
    # Counting by what is gone after a replace: 0.8 µs for 18 KB, where bytes.count takes 5.5 (it uses no memchr).
    if len(body) - len(body.replace(b"{", b"").replace(b"[", b"")) > DEPTH_MAX and _deeper_than(body, DEPTH_MAX):
        raise InvalidBody(f"The request body is nested deeper than {DEPTH_MAX} levels.")
    try:
        raws = _object.decode(body)
    except msgspec.ValidationError:
        raise InvalidBody("The request body must be a JSON object.") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidBody(f"The request body is not valid JSON: {_reason(error)}") from None
    # A second value for a key is dropped by the decoder, so the lengths tell: a compact body is as long as what was
    # decoded, and any other one is walked key by key.
    compact = sum(map(len, raws)) + sum(map(len, raws.values())) + 4 * len(raws) + 1
    spans = None if len(body) == compact and raws else _walk_members(body, raws, body.index(b"{"))
    return MessageRequest(body, raws, spans, chars)


def members(body: bytes, span: Span) -> dict[str, Span]:
    """Spans of the values of a nested object. Raises InvalidBody when a key stands twice or it is no object."""
    try:
        raws = _object.decode(span.of(body))
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise InvalidBody(_reason(error)) from None
    return _walk_members(body, raws, span.start)


def elements(body: bytes, span: Span) -> list[Span]:
    """Spans of the elements of a nested array. Raises InvalidBody when it is no array."""
    try:
        raws = _array.decode(span.of(body))
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise InvalidBody(_reason(error)) from None
    spans = []
    at = span.start + 1
    for raw in raws:
        if body[at] in _WHITESPACE:
            at = _skip_whitespace(body, at)
        end = at + len(bytes(raw))
        spans.append(Span(at, end))
        at = (_skip_whitespace(body, end) if body[end] in _WHITESPACE else end) + 1
    return spans


def without(body: bytes, span: Span, names: Container[str]) -> list[Splice]:
    """What takes the members of these names out of the object at `span`; names that it has not are no error.

    A member goes with one comma and with the whitespace between that comma and itself. One call names all that goes
    from an object: cuts of two calls may overlap. Raises InvalidBody as `members` does.
    """
    return _cuts(body, span.start, [(name in names, value.end) for name, value in members(body, span).items()])


def without_elements(body: bytes, span: Span, numbers: Container[int]) -> list[Splice]:
    """The same for elements of the array at `span`, by their place from 0. Raises InvalidBody as `elements` does."""
    return _cuts(body, span.start, [(at in numbers, element.end) for at, element in enumerate(elements(body, span))])


def member_after(value: Span, name: str, insert: bytes) -> Splice:
    """A new member `name` with the JSON `insert`, right behind the member whose value is at `value`.

    That member may be replaced in the same splicing, but not be taken out. The object must not have `name` yet.
    """
    return Splice(value.end, value.end, b",%b:%b" % (msgspec.json.encode(name), insert))


def splice(body: bytes, splices: list[Splice]) -> bytes:
    """The body with the splices applied; every byte outside them is untouched.

    Splices may come in any order and must not overlap (ValueError).
    """
    parts: list[bytes] = []
    at = 0
    for edit in sorted(splices, key=lambda edit: (edit.start, edit.end)):
        if edit.start < at or not edit.start <= edit.end <= len(body):
            raise ValueError(f"splice {edit.start}..{edit.end} overlaps another or lies outside of {len(body)} bytes")
        parts += (body[at : edit.start], edit.insert)
        at = edit.end
    parts.append(body[at:])
    return b"".join(parts)


def _walk_members(body: bytes, raws: dict[str, msgspec.Raw], start: int) -> dict[str, Span]:
    """Walk the object at `start` key by key beside what the decoder saw.

    The decoder keeps the last of two equal keys; then this walk, which checks every key and every value against the
    body, cannot end on the closing brace. Values are compared whole, so the walk stands on a member's start by
    induction and no crafted length can lead it astray.
    """
    fields = {}
    at = start + 1
    last = len(raws)
    for number, (key, raw) in enumerate(raws.items(), 1):
        if body[at] != _QUOTE:
            at = _skip_whitespace(body, at)
        token = _TOKENS.get(key) or b'"%b"' % key.encode()
        if body.startswith(token, at):
            at += len(token)
        else:
            at = _skip_escaped_key(body, at, key)
        if body[at] != _COLON:
            at = _skip_whitespace(body, at)
        at += 1
        if body[at] in _WHITESPACE:
            at = _skip_whitespace(body, at)
        value = bytes(raw)
        if not body.startswith(value, at):
            raise _duplicate(key)
        end = at + len(value)
        fields[key] = Span(at, end)
        at = end
        if body[at] in _WHITESPACE:
            at = _skip_whitespace(body, at)
        if body[at] != (_COMMA if number < last else _CLOSE_OBJECT):
            raise _duplicate(key)
        at += 1
    return fields


def _compact_members(raws: dict[str, msgspec.Raw]) -> dict[str, Span]:
    """Where the values lie in a body of which `scan` found that it is as long as what was decoded."""
    fields = {}
    at = 1
    for key, raw in raws.items():
        at += len(key) + 3
        end = at + len(raw)
        fields[key] = Span(at, end)
        at = end + 1
    return fields


def _cuts(body: bytes, opening: int, items: list[tuple[bool, int]]) -> list[Splice]:
    """Cuts for items of an object or array, each given as whether it goes and where it ends.

    An item goes with the comma before it; those in front of the first that stays, with the commas behind them.
    """
    cuts = []
    first = _skip_whitespace(body, opening + 1)
    stays = False
    end = first
    for goes, item_end in items:
        if goes and stays:
            cuts.append(Splice(end, item_end, b""))
        elif not goes and not stays:
            stays = True
            if end > first:
                cuts.append(Splice(first, _skip_whitespace(body, body.index(b",", end) + 1), b""))
        end = item_end
    if not stays and items:
        cuts.append(Splice(first, end, b""))
    return cuts


def _skip_escaped_key(body: bytes, at: int, key: str) -> int:
    """The end of a key that is written with escapes; raises when it is not this key after all."""
    end = at + 1
    while body[end] != _QUOTE:
        end += 2 if body[end] == 0x5C else 1
    end += 1
    if _string.decode(body[at:end]) != key:
        raise _duplicate(key)
    return end


def _skip_whitespace(body: bytes, at: int) -> int:
    for _ in range(_SPACES_BY_HAND):
        if body[at] not in _WHITESPACE:
            return at
        at += 1
    return len(body) - len(body[at:].lstrip(b" \t\n\r"))


def _duplicate(key: str) -> InvalidBody:
    # The walk fails at or after the first of the two keys; which one it was is found out for the message alone.
    return InvalidBody(f"The request body has a top-level key twice (near {key[:64]!r}).")


def _deeper_than(body: bytes, depth_max: int) -> bool:
    """Whether brackets outside of strings nest deeper than `depth_max`. What is no JSON is left to the decoder.

    As many levels as requests have are peeled off whole, innermost pairs first; what is left, which is little or the
    work of an attacker, is walked: of bounded length, for 32 MB of brackets would take two seconds.
    """
    if b"\\" in body:
        # First of all: without its letters, the escape of a line feed would swallow the quote that follows it.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = body.translate(_LEVELS, _NOT_LEVELS)
    if len(marks) > STRUCTURE_BYTES_MAX:
        raise InvalidBody(f"The request body has more than {STRUCTURE_BYTES_MAX} brackets and quotes.")
    levels = b"".join(marks.split(b'"')[::2])
    for _ in range(_PEELS):
        levels = levels.replace(b"\x01\xff", b"")
    return max(accumulate(memoryview(levels).cast("b")), default=0) > depth_max - _PEELS


def _occurrences(body: bytes, token: bytes) -> list[int]:
    found = []
    at = body.find(token)
    while at >= 0:
        found.append(at)
        at = body.find(token, at + len(token))
    return found


def _is_key(body: bytes, at: int) -> bool:
    """Whether a quoted token that ends at `at` is a key: a colon follows."""
    return body[_skip_whitespace(body, at)] == _COLON


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
