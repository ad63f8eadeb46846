"""The cache linter: names what keeps the prompts of a family from being read from the cache, and what that costs.

What it is: memory of the last prompt of each family, the faults one prompt shows by itself (`check`), the arithmetic of
a loss, and sums by family, cause and UTC day that a writer takes away (`take_deltas`) and stores.
What it is not: the comparison (`prompt_diff.py`), a store (`storage/cache_report.py`), or a change to any prompt.

Of a prompt nothing leaves but a finding: an offset, a cause and two masked snippets of 40 characters.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from headgate.policy.prompt_diff import (
    BY_THEMSELVES,
    CAUSES,
    LOOK_BACK_BLOCKS,
    MENDS,
    Cause,
    Finding,
    Part,
    PromptParts,
    compare,
    continues,
)
from headgate.policy.records import Record
from headgate.policy.token_estimate import input_tokens
from headgate.wire.catalog import Price
from headgate.wire.message import MessageRequest, Span, elements, members

__all__ = [
    "BY_THEMSELVES",
    "CAUSES",
    "LOOK_BACK_BLOCKS",
    "AnthropicDiagnosis",
    "CacheDeltas",
    "Cause",
    "FamilyDelta",
    "FamilyLinter",
    "Finding",
    "FindingDelta",
    "PromptParts",
    "check",
    "compare",
    "diagnosis",
    "lost_nanousd",
    "tokens_of",
    "tokens_paid_again",
]

BYTES_MAX = 32 << 20
"""Prompts that are remembered, over all families; the family that was used longest ago goes first."""
PROMPT_BYTES_MAX = BYTES_MAX // 4
"""A longer prompt is not remembered, and counted as skipped."""
FAMILIES_MAX = 4_096
DELTAS_MAX = 10_000
"""Sums that wait for the writer: some 5 MB. What comes beyond is counted as dropped."""
COMPARES_PER_S = 2.0
"""Of one family, after a first burst of as many: what parts beyond is counted with the last cause that was named."""
COMPARES_BURST = 4.0
VARIANTS_MAX = 32_768
"""Of all families together, beginnings that were seen: returning to one that the cache still holds loses nothing. Some
200 bytes each."""
TEMPLATES: frozenset[Cause] = frozenset({"text_changed", "tools_changed", "tool_added", "tool_removed"})
"""Changes that a second template of the same family explains as well. The first of them in a family waits for another
one, and is counted with it; a beginning that comes back is a template, and none."""
TOKENS_PER_BYTE_MIN, TOKENS_PER_BYTE_MAX = 0.05, 1.5
"""Of text and JSON. What was counted beyond that was mostly pictures and files, and says nothing about text."""
_COUNT_WEIGHT = 0.3
MARKS_MAX = 4
BELOW_MINIMUM_SHARE = 0.8
"""A prefix is called too short when its estimate is below this part of the minimum: estimates err by some percent."""
DIAGNOSIS = "anthropic:"
"""What the cause of a row begins with that Anthropic named and not we."""
FAMILY_EVERY_NS = 60 * 10**9
DAY_NS = 86_400 * 10**9
TTL_S = {"": 300.0, "5m": 300.0, "1h": 3600.0}

_Variant = tuple[str, int, int]
"""A beginning of a prompt: its model, tools and system."""
_MARK = b'"cache_control"'
_ORDER: tuple[Part, ...] = ("tools", "system", "messages")
_NOT_JSON = (msgspec.MsgspecError, ValueError, IndexError, RecursionError)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


class AnthropicDiagnosis(Record, frozen=True):
    """Why Anthropic says that an earlier prompt could not be read (claude-api §7.8)."""

    type: str
    """`system_changed`, `tools_changed`, `messages_changed`, `model_changed`, `unavailable`, …: an open list."""
    missed_tokens: int | None = None


class FindingDelta(Record, frozen=True):
    """What is to be added to a row of `cache_findings`."""

    family: str
    cause: str
    """A `Cause`, or `anthropic:` and the type of a diagnosis of theirs."""
    day: int
    """UTC days since 1970."""
    count: int
    lost_nanousd: int
    first_at_ns: int
    last_at_ns: int
    detail: str
    """JSON of the latest: a `Finding` without its cause, or `{"missed_tokens": N}`."""


class FamilyDelta(Record, frozen=True):
    """What a row of `cache_families` is to say now."""

    family: str
    key_id: str
    endpoint: str
    model: str
    detail: str
    """JSON: `ttl` and `ttl_reason`."""
    updated_at_ns: int


class CacheDeltas(Record, frozen=True):
    """What came together since the writer took it last."""

    findings: tuple[FindingDelta, ...]
    families: tuple[FamilyDelta, ...]


class _Mark(Record, frozen=True):
    """A cache mark of a prompt."""

    part: Part
    at: int
    """Offset of the marked block in its part."""
    end: int
    ttl: str
    empty: bool


class _Family:
    """The last prompt of a family, and what was said of it."""

    __slots__ = (
        *("compares", "compares_at", "finding", "last_at", "lost_nanousd", "parts", "size", "tokens_per_byte"),
        *("variant", "variants", "waiting"),
    )

    def __init__(self, parts: PromptParts, now: float) -> None:
        self.parts = parts
        self.size = _size(parts)
        self.last_at = now
        self.compares = COMPARES_BURST
        self.compares_at = now
        self.finding: Finding | None = None
        self.lost_nanousd = 0
        self.variant: _Variant = _variant(parts)
        self.variants = 1
        """How many beginnings there were."""
        self.waiting: tuple[Finding, int, int] | None = None
        """A finding that may be a second template, what it lost and when."""
        self.tokens_per_byte = 0.0
        """As Anthropic counted; 0.0: not known."""

    def may_compare(self, now: float) -> bool:
        """Take one of the comparisons that are left."""
        self.compares = min(COMPARES_BURST, self.compares + (now - self.compares_at) * COMPARES_PER_S)
        self.compares_at = now
        if self.compares < 1.0:
            return False
        self.compares -= 1.0
        return True


class FamilyLinter:
    """Watches the prompts of all families. One thread uses it; `take_deltas` may be called where `observe` is.

    Where system prompt and tools are the same, `observe` costs a look-up and comparisons of bytes (measured: 7 µs of
    CPU for 48 KB with another question each time); a whole comparison of such prompts 0.2 ms, a few times a second.
    """

    __slots__ = (
        *("_bytes", "_bytes_max", "_families", "_family_deltas", "_findings", "_told", "_variants"),
        *("dropped", "skipped"),
    )

    def __init__(self, *, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._families: OrderedDict[str, _Family] = OrderedDict()
        self._findings: dict[tuple[str, str, int], FindingDelta] = {}
        self._family_deltas: dict[str, FamilyDelta] = {}
        self._told: OrderedDict[str, FamilyDelta] = OrderedDict()
        self._variants: OrderedDict[tuple[str, _Variant], float] = OrderedDict()
        self.skipped = 0
        """Prompts that were too long to be remembered."""
        self.dropped = 0
        """Findings that no sum was kept of, because the writer did not come."""

    def observe(
        self,
        family: str,
        parts: PromptParts,
        *,
        at_ns: int,
        now: float,
        price: Price | None = None,
        write: str = "",
        min_tokens: int = 0,
    ) -> Finding | None:
        """What keeps this prompt, as it was sent, from reading what the one before it in its family wrote.

        `now` is monotonic seconds and `at_ns` UTC nanoseconds. `price` is the model's row, None: losses are not
        counted. `write` says at which price the tokens were paid again: "5m", "1h", or "" plain. `min_tokens` is the
        model's minimum, 0: unknown. A prefix that could not be cached any more, for its TTL is over or it is below the
        minimum, is named and loses nothing.
        """
        known = self._families.get(family)
        if known is None:
            fresh = _Family(parts, now)
            self._keep(family, fresh)
            self._see(family, fresh.variant, now)
            return self._note(fresh, family, check(parts, min_tokens=min_tokens), 0, at_ns)
        before, last_at = known.parts, known.last_at
        same = before.tools == parts.tools and before.system == parts.system and before.model == parts.model
        if same and before.messages == parts.messages:
            known.last_at = now
            self._families.move_to_end(family)
            self._see(family, known.variant, now)
            return None
        if not same:
            known.variant = _variant(parts)
        seen_at = self._see(family, known.variant, now)
        is_new = seen_at is None
        known.variants += is_new
        # A prompt that came before, under other ones between, is read from the cache: two templates of one family that
        # take turns lose nothing.
        is_warm = not same and seen_at is not None and now - seen_at <= TTL_S.get(write, 300.0)
        found: Finding | None = None
        lost = 0
        if not is_warm and known.may_compare(now):
            found = compare(before, parts) or check(parts, min_tokens=min_tokens)
            if found is not None and price is not None and now - last_at <= TTL_S.get(write, 300.0):
                tokens = tokens_paid_again(
                    before, parts, found, min_tokens=min_tokens, tokens_per_byte=known.tokens_per_byte
                )
                lost = lost_nanousd(tokens, price, write)
        elif not is_warm and not same and known.finding is not None:
            found, lost = known.finding, known.lost_nanousd
        self._replace(family, known, parts, now)
        if found is not None and found.cause in TEMPLATES and found.part != "messages" and not same:
            if not is_new:
                return None
            if known.variants == 2:
                known.waiting = found, lost, at_ns
                return None
        if found is not None and known.waiting is not None and is_new:
            self._note(known, family, *known.waiting)
            known.waiting = None
        return self._note(known, family, found, lost, at_ns)

    def counted(self, family: str, *, body_bytes: int, prompt_tokens: int) -> None:
        """What Anthropic counted for a body of this family: losses are told in its tokens and not in estimates.

        An estimate errs by a quarter in English, and by more where a client escapes what is not ASCII.
        """
        known = self._families.get(family)
        if known is None or not body_bytes:
            return
        ratio = prompt_tokens / body_bytes
        if TOKENS_PER_BYTE_MIN <= ratio <= TOKENS_PER_BYTE_MAX:
            old = known.tokens_per_byte
            known.tokens_per_byte = old + _COUNT_WEIGHT * (ratio - old) if old else ratio

    def describe(
        self, family: str, *, key_id: str, endpoint: str, model: str, at_ns: int, ttl: str = "", ttl_reason: str = ""
    ) -> None:
        """Whose a family is, and which TTL it is written with and why. Told again when it changed or a minute later."""
        told = self._told.get(family)
        detail = msgspec.json.encode({"ttl": ttl, "ttl_reason": ttl_reason}).decode()
        delta = FamilyDelta(family, key_id, endpoint, model, detail, at_ns)
        if told is not None:
            is_same = (told.key_id, told.endpoint, told.model, told.detail) == (key_id, endpoint, model, detail)
            if is_same and at_ns - told.updated_at_ns < FAMILY_EVERY_NS:
                return
        self._told[family] = self._family_deltas[family] = delta
        self._told.move_to_end(family)
        if len(self._told) > FAMILIES_MAX:
            forgotten, _ = self._told.popitem(last=False)
            self._family_deltas.pop(forgotten, None)

    def note(self, family: str, diagnosis: AnthropicDiagnosis, *, at_ns: int) -> None:
        """Anthropic's own word on a request of this family, to stand beside ours."""
        detail = msgspec.json.encode({"missed_tokens": diagnosis.missed_tokens}).decode()
        self._add(family, f"{DIAGNOSIS}{diagnosis.type[:40]}", 0, at_ns, detail)

    def take_deltas(self) -> CacheDeltas:
        """All sums since the last time; they are the caller's to store now."""
        deltas = CacheDeltas(tuple(self._findings.values()), tuple(self._family_deltas.values()))
        self._findings, self._family_deltas = {}, {}
        return deltas

    def snapshot(self) -> dict[str, int]:
        """Families and bytes that are remembered, and what was left out."""
        return {
            "families": len(self._families),
            "bytes": self._bytes,
            "skipped": self.skipped,
            "dropped": self.dropped,
        }

    def _keep(self, family: str, fresh: _Family) -> None:
        if fresh.size > min(PROMPT_BYTES_MAX, self._bytes_max):
            self.skipped += 1
            return
        self._families[family] = fresh
        self._bytes += fresh.size
        self._shrink()

    def _replace(self, family: str, known: _Family, parts: PromptParts, now: float) -> None:
        size = _size(parts)
        known.last_at = now
        self._families.move_to_end(family)
        if size > min(PROMPT_BYTES_MAX, self._bytes_max):
            self.skipped += 1
            return
        self._bytes += size - known.size
        known.parts, known.size = parts, size
        self._shrink()

    def _shrink(self) -> None:
        while self._bytes > self._bytes_max or len(self._families) > FAMILIES_MAX:
            _, oldest = self._families.popitem(last=False)
            self._bytes -= oldest.size

    def _see(self, family: str, variant: _Variant, now: float) -> float | None:
        """A beginning was used; returns when it was before, None where that is not known."""
        key = (family, variant)
        seen_at = self._variants.pop(key, None)
        self._variants[key] = now
        if len(self._variants) > VARIANTS_MAX:
            self._variants.popitem(last=False)
        return seen_at

    def _note(self, known: _Family, family: str, found: Finding | None, lost: int, at_ns: int) -> Finding | None:
        if found is None:
            return None
        known.finding, known.lost_nanousd = found, lost
        shown = {name: getattr(found, name) for name in Finding.__struct_fields__ if name != "cause"}
        self._add(family, found.cause, lost, at_ns, msgspec.json.encode(shown).decode())
        return found

    def _add(self, family: str, cause: str, lost: int, at_ns: int, detail: str) -> None:
        day = at_ns // DAY_NS
        known = self._findings.get((family, cause, day))
        if known is None:
            if len(self._findings) >= DELTAS_MAX:
                self.dropped += 1
                return
            known = FindingDelta(family, cause, day, 0, 0, at_ns, at_ns, detail)
        self._findings[family, cause, day] = FindingDelta(
            family,
            cause,
            day,
            known.count + 1,
            known.lost_nanousd + lost,
            min(known.first_at_ns, at_ns),
            max(known.last_at_ns, at_ns),
            detail,
        )


def check(parts: PromptParts, *, min_tokens: int = 0) -> Finding | None:
    """The first fault that one prompt shows by itself: of its marks. `min_tokens` 0: the minimum is unknown."""
    if not (parts.automatic or any(_MARK in raw for raw in (parts.tools, parts.system, parts.messages))):
        return None
    try:
        marks = _marks(parts)
    except _NOT_JSON:
        return None
    if not marks:
        return None
    for at, mark in enumerate(marks):
        if mark.empty:
            return _of_mark("empty_mark", mark, "", "")
        if mark.ttl == "1h" and any(earlier.ttl != "1h" for earlier in marks[:at]):
            return _of_mark("ttl_order", mark, "5m", "1h")
    if len(marks) + parts.automatic > MARKS_MAX:
        return _of_mark("too_many_marks", marks[MARKS_MAX - parts.automatic], "", f"{len(marks)} marks")
    last = marks[-1]
    # An automatic mark is on the last block: then the whole prompt has to be too short.
    tokens = tokens_of(_before(parts, last.part, len(_raw(parts, last.part)) if parts.automatic else last.end))
    if tokens < min_tokens * BELOW_MINIMUM_SHARE:
        return _of_mark("below_minimum", last, f"about {tokens} tokens", f"{min_tokens} are needed")
    return None


def lost_nanousd(tokens: int, price: Price, write: str = "") -> int:
    """Nano-dollars that it cost to pay for tokens again instead of reading them. `write` as in `observe`."""
    paid = {"5m": price.cache_write_5m_nanousd, "1h": price.cache_write_1h_nanousd}.get(write, price.input_nanousd)
    return tokens * max(paid - price.cache_read_nanousd, 0)


def tokens_paid_again(
    previous: PromptParts, current: PromptParts, finding: Finding, *, min_tokens: int = 0, tokens_per_byte: float = 0.0
) -> int:
    """Tokens that would have been read without what was found: an estimate.

    They are what both prompts share, from the last place before it where the cache has an entry: the end of a caller's
    mark or, where the caller set none and so the planner does, the start of the block it stands in. A time at the end
    of a prompt that is one string costs the whole prompt. Of the messages only what the previous prompt had counts,
    when it was the same conversation. 0 for a prompt that is shorter than the model's minimum, and for a
    fault that lost nothing (a mark that the API refuses, or one that does nothing). `tokens_per_byte` is what Anthropic
    counted for prompts like these, 0.0: not known, an estimate by the kind of text.
    """

    def tokens(raw: bytes) -> int:
        return round(len(raw) * tokens_per_byte) if tokens_per_byte else tokens_of(raw)

    if finding.cause in {"ttl_order", "too_many_marks", "empty_mark", "below_minimum"}:
        return 0
    shared = [current.tools, current.system]
    if finding.part == "messages" or continues(previous.messages, current.messages):
        shared.append(previous.messages if len(previous.messages) < len(current.messages) else current.messages)
    if tokens(b"".join(shared)) < min_tokens:
        return 0
    at, skip = _entry(current, finding)
    before = b"".join(shared[:at]) + shared[at][:skip]
    whole = b"".join(shared)
    # An entry that is shorter than the minimum is none.
    return tokens(whole if tokens(before) < min_tokens else whole[len(before) :])


def _entry(parts: PromptParts, finding: Finding) -> tuple[int, int]:
    """Where the last entry of the cache before a finding ends: the number of its part and an offset in it."""
    if finding.part == "request":
        return 0, 0
    at = _ORDER.index(finding.part)
    if finding.cause == "look_back":
        # What it misses is what was written before it.
        return at, 0
    try:
        explicit = _marks(msgspec.structs.replace(parts, automatic=False))
        if explicit:
            ends = [(_ORDER.index(mark.part), mark.end) for mark in explicit]
            return max([end for end in ends if end <= (at, finding.value_at)], default=(0, 0))
        return at, _block_start(finding.part, _raw(parts, finding.part), finding.value_at)
    except _NOT_JSON:
        return at, 0


def _block_start(part: Part, raw: bytes, at: int) -> int:
    """The start of the block, tool or message that has byte `at`; `at` itself where none has it."""
    if raw[:1] != b"[":
        return 0
    for item in elements(raw, Span(0, len(raw))):
        if item.start <= at < item.end:
            content = members(raw, item).get("content") if part == "messages" else None
            if content is not None and raw[content.start : content.start + 1] == b"[":
                for block in elements(raw, content):
                    if block.start <= at < block.end:
                        return block.start
            return item.start
    return at


def tokens_of(raw: bytes) -> int:
    """Tokens of a part of a prompt, by its bytes (`token_estimate.py`); 0 of nothing."""
    return input_tokens(MessageRequest(raw, {}, None, len(raw.decode("utf-8", "replace")))) if raw else 0


def diagnosis(raw: bytes | None) -> AnthropicDiagnosis | None:
    """Of the JSON of an answer's `diagnostics`: None when it was not asked for, is pending, found nothing, or is of a
    form that we do not know."""
    try:
        reason = _object.decode(_object.decode(raw or b"null")["cache_miss_reason"])
        kind = msgspec.json.decode(reason["type"], type=str)
        missed = msgspec.json.decode(reason.get("cache_missed_input_tokens", b"null"), type=int | None)
    except (*_NOT_JSON, KeyError):
        return None
    return AnthropicDiagnosis(kind, missed)


def _size(parts: PromptParts) -> int:
    return len(parts.tools) + len(parts.system) + len(parts.messages)


def _variant(parts: PromptParts) -> _Variant:
    return parts.model, hash(parts.tools), hash(parts.system)


def _of_mark(cause: Cause, mark: _Mark, before: str, after: str) -> Finding:
    return Finding(cause, mark.part, mark.at, before, after, MENDS[cause], mark.at)


def _raw(parts: PromptParts, part: Part) -> bytes:
    return {"tools": parts.tools, "system": parts.system}.get(part, parts.messages)


def _before(parts: PromptParts, part: Part, end: int) -> bytes:
    """The prompt from its start to byte `end` of a part."""
    earlier = _ORDER[: _ORDER.index(part)]
    return b"".join(_raw(parts, name) for name in earlier) + _raw(parts, part)[:end]


def _marks(parts: PromptParts) -> list[_Mark]:
    """The explicit marks in their order. Raises what is caught as `_NOT_JSON`."""
    found: list[_Mark] = []
    _marks_in("tools", parts.tools, Span(0, len(parts.tools)), found)
    _marks_in("system", parts.system, Span(0, len(parts.system)), found)
    if _MARK in parts.messages:
        for message in elements(parts.messages, Span(0, len(parts.messages))):
            content = members(parts.messages, message).get("content")
            if content is not None:
                _marks_in("messages", parts.messages, content, found)
    if parts.automatic and not found:
        part: Part = "messages" if parts.messages else "system"
        found.append(_Mark(part, 0, len(_raw(parts, part)), "5m", False))
    return found


def _marks_in(part: Part, raw: bytes, blocks: Span, found: list[_Mark]) -> None:
    if raw[blocks.start : blocks.start + 1] != b"[" or _MARK not in blocks.of(raw):
        return
    for block in elements(raw, blocks):
        if _MARK not in block.of(raw):
            continue
        fields = members(raw, block)
        mark = fields.get("cache_control")
        if mark is None or raw[mark.start] != 0x7B:
            continue
        ttl = members(raw, mark).get("ttl")
        text = fields.get("text")
        is_empty = text is not None and not msgspec.json.decode(text.of(raw), type=str).strip()
        found.append(
            _Mark(part, block.start, block.end, "1h" if ttl is not None and b"1h" in ttl.of(raw) else "5m", is_empty)
        )
