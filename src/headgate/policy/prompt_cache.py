"""Where a request is marked for Anthropic's prompt cache, and what is known to be in that cache.

What it is: for each request a `CachePlan`: the body with marks spliced in where they are expected to pay, the prompt's
family and prefix, and whether that prefix is cold. It learns from every request what comes back
(`prompt_families.py`) and from every answer what Anthropic counted. What it is not: a judge of the caller's own marks,
which are never touched: a body that has one is sent as it came.

The rules, each with its reason in the plan:

- At most 4 marks: the longest static prefix that is expected to be read more often than its write costs, a document
  that is asked again, automatic caching for a conversation that goes on, and with what is left shorter prefixes after
  which different things were seen to follow. A mark before another costs nothing: tokens are written once.
- A prefix that nobody has seen is marked by the record of its depth, first of all with one read for one write that
  nobody has seen, so that the first request of a burst writes; three that never came back end that.
- Never below the model's minimum, by an estimate that errs on the short side (`cautious_tokens`), or by what Anthropic
  counted for the same prefix. A mark that made neither a read nor a write is not made again.
- 1h before 5m, which is the order of the prompt here: all static marks have one TTL, documents and tails 5 minutes.

Memory is bounded: PART_BYTES_MAX of raw tools and systems, LIVE_MAX keys of some 200 bytes, and `Families`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from datetime import date
from hashlib import blake2b, sha256
from math import inf
from typing import TypeVar

import msgspec

from headgate.policy.cache_ttl import TTL_S, KeepWarm, TtlChoice, TtlSetting, choose_ttl, keep_warm_worth
from headgate.policy.forecast import prefixes as caller_prefixes
from headgate.policy.prompt_families import Families, Family, FamilyView, Prefix, Scope, sign
from headgate.policy.records import Record
from headgate.wire.catalog import DAY_NS, Catalog, Model, Price
from headgate.wire.message import MessageRequest, Span, Splice, splice
from headgate.wire.prompt import (
    NO_PART,
    Part,
    Text,
    Ttl,
    first_spans,
    has_assistant,
    has_marks,
    has_thoughts,
    last_turn,
    mark,
    message_text,
    read_block,
    read_system,
    read_tools,
    system_marked,
)
from headgate.wire.usage import Usage

MARKS_MAX = 4
PART_BYTES_MAX = 32 << 20
"""Of raw `tools`, `system` and blocks of first messages that are remembered with what was found in them: three, three
and two eighths."""
STATICS_MAX = 4_096
LIVE_MAX = 16_384

_Value = TypeVar("_Value")

TOKENS_SHARE = 0.9
"""Of the cautious estimate that must reach the minimum. English prose was measured at up to 4.6 characters a token
where the estimate says 4.3, and 3.6 where it says 3.4 (claude-api §9.1): 7 % more. Beyond that nothing is known."""
DOCUMENT_CHARS_MIN = 2_000
"""A text block of the first message that is shorter is a question, and not what it is about."""
BINDING_SINCE = date(2026, 9, 1)
"""Models released from this day on bind thinking blocks to the conversation before them (claude-api §2.5)."""

_PROSE: dict[str, float] = {"pre-4.7": 4.3, "opus-4.7": 3.4}
_DENSE: dict[str, float] = {"pre-4.7": 1.6, "opus-4.7": 1.5}
_TOKENS_PER_LETTER, _TOKENS_PER_CJK, _TOKENS_PER_OTHER = 1.5, 0.9, 0.5
_VIETNAMESE_SHARE = 0.02
_PAGE_TOKENS = 1_500
"""Of a PDF's page with its picture, the least (claude-api §9.1)."""
_FLOOR_MAX = 4_096
"""No model's minimum is higher; a longer prompt that was not cached was not cached for another reason."""
_RATIO_MIN, _RATIO_MAX, _RATIO_WEIGHT = 0.5, 4.0, 0.3
_FIRST_TURNS_MIN = 4.0
_DOCUMENTS_MIN = 4.0
_CHOOSE_EVERY = 16.0
_LIVE_MARGIN_S = 5.0
"""A prefix lives from the start of a request, and `began` is told at its first byte."""
_EDGES = 4
_CANDIDATES = 3
_FIRST_BLOCKS_MAX = 64
_DOCUMENTS = frozenset({"document", "search_result"})
_SAMPLE_BYTES = 48
_SAME_SAMPLE_MAX = 8


class Marked(Record, frozen=True, gc=False):
    """A prefix with a mark in the body that is sent, ours or the caller's."""

    key: bytes
    """Model and prefix: what is cold or live."""
    digest: bytes
    tokens: int
    """By the cautious estimate, uncorrected."""
    ttl: Ttl


class CachePlan(Record, frozen=True, gc=False):
    """What is sent, and what is known of its prompt. Kept by the caller, to be told to `began`."""

    body: bytes
    prefix: str
    """Hex, of the longest prefix that is marked or would be; of all tools and system where there is none; empty where
    the request has neither."""
    prefix_tokens: int
    """Estimate of its tokens; as Anthropic counted them where it has."""
    digest: str
    """Hex, of the whole request as the client sent it."""
    family: str
    cold: bytes
    """The key of the shortest marked prefix that is not known to be in the cache: what others may wait for. Shared
    prefixes are shorter than private ones, so they are written once. Empty where nothing is to be written."""
    prefixes: tuple[int, ...]
    """For `policy/forecast.py`: a number for what stands before each mark, and for the conversation's last turn."""
    marks: int
    """How many were put in."""
    ttl: str
    """Of the static marks that were put in, else of the others; empty without any."""
    reasons: tuple[str, ...]
    model: str = ""
    marked: tuple[Marked, ...] = ()
    tail: bool = False
    """Automatic caching was asked for by us."""
    scope: bytes = b""


class _Boundary(Record, frozen=True, gc=False):
    """The end of a block of tools or system."""

    depth: str
    digest: bytes
    tokens_old: int
    """Cautious, of everything up to it, by the tokenizer before 4.7."""
    tokens_new: int
    in_tools: bool
    mark_at: int
    is_string: bool
    mark: str


class _Static(Record, frozen=True, gc=False):
    """Tools and system together."""

    digest: bytes
    text: Text
    tokens_old: int
    tokens_new: int
    boundaries: tuple[_Boundary, ...]
    has_system: bool
    signature: frozenset[int]


class _Rates(Record, frozen=True, gc=False):
    """What the cache costs on a model: the part of a read that is saved, and the part of a write that is extra."""

    price: Price
    saved: float
    extra_5m: float
    extra_1h: float

    def pays(self, reads_per_write: float, ttl: Ttl) -> bool:
        """Whether so many reads for a write cost less than sending the tokens plain."""
        return reads_per_write * self.saved > (self.extra_1h if ttl == "1h" else self.extra_5m)


class _Choice(msgspec.Struct, gc=False):
    """One mark to be made."""

    boundary: _Boundary
    known: Prefix
    is_document: bool
    tokens: int


class PromptCache:
    """The planner of one process. Not for several threads; several processes learn each on its own."""

    __slots__ = (
        "_catalog",
        "_families",
        "_first",
        "_floors",
        "_last_static",
        "_live",
        "_price_rates",
        "_setting",
        "_statics",
        "_systems",
        "_tools",
    )

    def __init__(self, catalog: Catalog, *, ttl: TtlSetting = "auto") -> None:
        self._catalog = catalog
        self._setting: TtlSetting = ttl
        self._families = Families()
        self._tools = _Parts(read_tools, PART_BYTES_MAX * 3 // 8)
        self._systems = _Parts(read_system, PART_BYTES_MAX * 3 // 8)
        self._first = _Parts(read_block, PART_BYTES_MAX // 4)
        self._price_rates: dict[str, tuple[int, _Rates]] = {}
        self._statics: OrderedDict[bytes, _Static] = OrderedDict()
        self._last_static: tuple[Part, Part, _Static] | None = None
        """What was looked up last: most requests of a process have the prompt of the one before."""
        self._live: OrderedDict[bytes, float] = OrderedDict()
        self._floors: dict[str, int] = {}

    def plan(
        self,
        request: MessageRequest,
        *,
        key_id: str,
        endpoint: str,
        model: str,
        at_ns: int,
        now: float,
        mark: bool,
    ) -> CachePlan:
        """Plans one request for `model`, whose name its body has. Never raises for a body that `scan` took.

        `mark` False: the body stays as it is, and everything else is told all the same. To be called once for a
        request and model: each call counts as a use of the prompt. `at_ns` (UTC) picks the prices, `now` is monotonic.
        """
        body, fields = request.body, request.fields
        tools = self._tools.of(request.raw("tools"))
        system = self._systems.of(request.raw("system"))
        static = self._static_of(tools, system)
        messages_at = fields.get("messages")
        messages = b"" if messages_at is None else messages_at.of(body)
        digest, turn_from, turn_to, marked_elsewhere = _digests(request, tools, system, static, messages)

        warming = request.raw("max_tokens") == b"0"
        known_model = self._catalog.resolve(model)
        model_id = model if known_model is None else known_model.id
        scope = self._families.scope(key_id, endpoint)
        family = self._family(scope, model_id, static)
        marked_by_caller = tools.has_marks or system.has_marks or marked_elsewhere
        spoken = turn_from != b"" or has_assistant(messages)
        if marked_by_caller or known_model is None:
            if not warming:
                _learn(scope, family, static, self._touch(scope, family, model_id, static), now)
                self._families.turn(scope, turn_from, turn_to, now)
            return self._callers(
                request, static, scope, family, known_model, model_id, digest, now, has_marks=marked_by_caller
            )

        rates = self._rates(known_model, at_ns)
        choice = self._ttl(family, known_model, rates)
        bound = known_model.released >= BINDING_SINCE and has_thoughts(messages)
        choices, why, last = self._choose(
            scope, family, known_model, static, messages, rates, choice.ttl, now, bound=bound, learn=not warming
        )
        tail = self._goes_on(scope, rates, spoken) and self._long_enough(family, known_model, static, messages, choices)
        if not warming:
            self._families.turn(scope, turn_from, turn_to, now)
        prefix, tokens = self._longest(family, known_model, static, choices[-1] if choices else None, last)
        family.model, family.prefix_tokens = model_id, tokens
        if warming or not mark:
            reason = "cache:warming" if warming else "cache:off"
            return CachePlan(
                body, prefix, tokens, digest, family.id, b"", (), 0, "", (reason,), model_id, scope=scope.name
            )
        choices = choices[-(MARKS_MAX - tail) :]
        return self._marked(
            request,
            scope,
            family,
            model_id,
            choices,
            tail,
            choice.ttl,
            why,
            prefix,
            tokens,
            digest,
            (turn_from, turn_to),
            now,
        )

    def began(self, plan: CachePlan, *, model: str, usage: Usage, now: float) -> None:
        """An answer to the plan's body began: what it read and wrote is known. `now` is monotonic.

        Also for a warming request, with the plan of the request whose prefix it warmed.
        """
        known = self._catalog.resolve(model)
        if plan.model != (model if known is None else known.id) or not usage.prompt_tokens:
            return
        cached = usage.cache_read_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
        for one in plan.marked:
            # What is not cached at all is never cold: nobody is to wait for it.
            _remember(self._live, one.key, now + TTL_S[one.ttl] - _LIVE_MARGIN_S if cached else inf, LIVE_MAX)
            if not cached:
                prefix = self._families.known(plan.scope, plan.model, one.digest)
                if prefix is not None:
                    prefix.barren = True
        if known is None:
            return
        if not cached and plan.tail and usage.prompt_tokens <= _FLOOR_MAX:
            self._floors[known.id] = max(self._floors.get(known.id, 0), usage.prompt_tokens + 1)
        if cached and plan.marks and plan.marked and not plan.tail:
            self._counted(plan, known, cached)

    def is_cold(self, key: bytes, now: float) -> bool:
        """Whether a plan's `cold` prefix is still not known to be in the cache."""
        return self._live.get(key, -inf) <= now

    def families(self) -> tuple[FamilyView, ...]:
        """What is known of every family."""
        return self._families.views()

    def keep_warm(
        self, key_id: str, endpoint: str, family_id: str, *, at_ns: int, budget_nanousd_day: int | None = None
    ) -> KeepWarm | None:
        """Whether a family's prefix is worth keeping warm on the model that it last ran on; None where it is not
        known."""
        family = self._families.family(key_id, endpoint, family_id)
        model = None if family is None else self._catalog.resolve(family.model)
        if family is None or model is None:
            return None
        rates = self._rates(model, at_ns)
        return keep_warm_worth(
            family.gaps,
            prefix_tokens=family.prefix_tokens,
            price=rates.price,
            ttl=self._ttl(family, model, rates).ttl,
            budget_nanousd_day=budget_nanousd_day,
        )

    # ------------------------------------------------------------------ reading

    def _static_of(self, tools: Part, system: Part) -> _Static:
        known = self._last_static
        if known is not None and known[0] is tools and known[1] is system:
            return known[2]
        key = tools.digest + b"/" + system.digest
        static = self._statics.get(key)
        if static is None:
            static = _static(tools, system)
            _remember(self._statics, key, static, STATICS_MAX)
        else:
            self._statics.move_to_end(key)
        self._last_static = (tools, system, static)
        return static

    def _family(self, scope: Scope, model: str, static: _Static) -> Family:
        """By the longest system prefix that was seen before, or by likeness."""
        for boundary in reversed(static.boundaries):
            if boundary.in_tools and static.has_system:
                break
            known = self._families.prefix(scope, model, boundary.digest)
            if known is not None:
                scope.keep(known.family)
                return known.family
        return scope.family_of(static.signature)

    def _rates(self, model: Model, at_ns: int) -> _Rates:
        day = at_ns // DAY_NS
        known = self._price_rates.get(model.id)
        if known is None or known[0] != day:
            price = self._catalog.price_row(model.id, at_ns)
            plain = price.input_nanousd
            rates = _Rates(
                price,
                1 - price.cache_read_nanousd / plain,
                price.cache_write_5m_nanousd / plain - 1,
                price.cache_write_1h_nanousd / plain - 1,
            )
            known = self._price_rates[model.id] = (day, rates)
        return known[1]

    def _ttl(self, family: Family, model: Model, rates: _Rates) -> TtlChoice:
        chosen = family.choices.get(model.id)
        if chosen is None or not 0 <= family.gaps.total - chosen[0] < _CHOOSE_EVERY:
            choice = choose_ttl(
                family.gaps, prefix_tokens=family.prefix_tokens, price=rates.price, setting=self._setting
            )
            chosen = family.choices[model.id] = (family.gaps.total, choice)
        return chosen[1]

    # ------------------------------------------------------------------ deciding

    def _touch(self, scope: Scope, family: Family, model: str, static: _Static) -> list[Prefix]:
        """What is known of each prefix."""
        touch = self._families.touch
        return [touch(scope, model, boundary.digest, family) for boundary in static.boundaries]

    def _choose(
        self,
        scope: Scope,
        family: Family,
        model: Model,
        static: _Static,
        messages: bytes,
        rates: _Rates,
        ttl: Ttl,
        now: float,
        *,
        bound: bool,
        learn: bool,
    ) -> tuple[list[_Choice], list[str], Prefix | None]:
        """Static marks in the order of the prompt, those that matter least first; why; and the longest prefix."""
        boundaries = static.boundaries
        found = self._touch(scope, family, model.id, static)
        fits: list[bool] = []
        expected: dict[int, float] = {}
        for at, known in enumerate(found):
            each = boundaries[at]
            fits.append(
                each.mark_at >= 0 and not (bound and each.is_string) and self._reaches(family, model, known, each)
            )
            if known.last == -inf:
                # What is expected of a prefix that is new comes from before it was counted.
                expected[at] = scope.expected_reads(family, each.depth, ttl)
        if learn:
            _learn(scope, family, static, found, now)
        why: list[str] = []
        chosen = -1
        for at in range(len(found) - 1, -1, -1):
            if not fits[at]:
                continue
            new = at in expected
            if rates.pays(expected[at] if new else found[at].uses.reads_per_write(ttl), ttl):
                chosen = at
                where = "tools" if boundaries[at].in_tools else "system"
                why.append(f"cache:{where}:{ttl}:{'expected' if new else 'seen'}")
                break
        if chosen < 0:
            why.append("cache:none:varies" if True in fits else "cache:none:short" if found else "cache:none:no_static")
        if learn and found:
            family.seen(found[chosen].last_gap_s, now)
        choices = []
        if chosen >= 0:
            extra = self._shorter(static, found, fits, chosen, is_new=chosen in expected) if chosen else ()
            choices = [self._choice(model, boundaries[at], found[at]) for at in (*extra, chosen)]
        spans = first_spans(messages)
        if spans and len(spans) <= _FIRST_BLOCKS_MAX:
            document = self._document(scope, family, model, static, messages, spans, rates, now, learn=learn)
            if document is not None:
                choices.append(document)
                why.append("cache:document:seen")
        # Whoever cuts the list to its slots takes from the front: tools first, then shorter prefixes.
        return choices, why, found[-1] if found else None

    def _shorter(
        self, static: _Static, found: list[Prefix], fits: list[bool], chosen: int, *, is_new: bool
    ) -> list[int]:
        """At most one shorter prefix of system, and that of tools, where different things follow them. Of a prefix
        that is all new, the one before its last block: that may be what the others share."""
        system = -1
        for at in range(chosen - 1, -1, -1):
            if fits[at] and not static.boundaries[at].in_tools and found[at].varied:
                system = at
                break
        if system < 0 and chosen and is_new and fits[chosen - 1] and not static.boundaries[chosen - 1].in_tools:
            system = chosen - 1
        tools = [at for at in range(chosen) if static.boundaries[at].in_tools and fits[at] and found[at].varied]
        return [*tools[-1:], *([system] if system >= 0 else [])]

    def _document(
        self,
        scope: Scope,
        family: Family,
        model: Model,
        static: _Static,
        messages: bytes,
        spans: list[Span],
        rates: _Rates,
        now: float,
        *,
        learn: bool,
    ) -> _Choice | None:
        """The last large block of the first message, whose blocks lie at `spans`, where its prefix comes back."""
        text, digest = static.text, static.digest
        candidates: list[_Boundary] = []
        for span in spans:
            part = self._first.of(span.of(messages))
            digest = _digest(digest, part.digest)
            for block in part.blocks:
                text += block.text
                if block.mark_at >= 0 and (
                    block.kind in _DOCUMENTS or (block.kind == "text" and block.text.chars >= DOCUMENT_CHARS_MIN)
                ):
                    mark_at = span.start + block.mark_at
                    candidates.append(_Boundary("document", digest, *_both(text), False, mark_at, False, ""))
        best: _Choice | None = None
        record = family.depths.get("document")
        optimistic = (
            record is not None
            and record.total >= _DOCUMENTS_MIN
            and rates.pays(record.reads_per_write("5m", prior=0.0), "5m")
        )
        for boundary in candidates[-_CANDIDATES:]:
            known = self._families.touch(scope, model.id, boundary.digest, family)
            new = known.last == -inf
            if learn:
                scope.learn(family, "document", known.used(now))
            uses = known.uses
            if (
                optimistic if new else uses.within_5m > 0 and rates.pays(uses.reads_per_write("5m"), "5m")
            ) and self._reaches(family, model, known, boundary):
                best = self._choice(model, boundary, known)
                best.is_document = True
        return best

    def _goes_on(self, scope: Scope, rates: _Rates, spoken: bool) -> bool:
        """Whether a conversation is expected to go on while its end is in the cache."""
        if spoken:
            return rates.pays(scope.turns.share(prior=1.0), "5m")
        turns = scope.first_turns
        return turns.count >= _FIRST_TURNS_MIN and rates.pays(turns.share(prior=0.0), "5m")

    def _long_enough(
        self, family: Family, model: Model, static: _Static, messages: bytes, choices: list[_Choice]
    ) -> bool:
        """Whether the whole prompt reaches the minimum. Messages are only measured where tools and system do not."""
        minimum = self._minimum(model)
        if choices or self._corrected(family, model, static) * TOKENS_SHARE >= minimum:
            return True
        if len(messages) + static.text.chars < minimum:
            return False
        text = static.text + message_text(messages)
        return cautious_tokens(text, model.tokenizer) * TOKENS_SHARE >= minimum

    def _reaches(self, family: Family, model: Model, known: Prefix, what: _Boundary) -> bool:
        if known.barren:
            return False
        tokens = known.tokens or self._corrected(family, model, what) * TOKENS_SHARE
        return tokens >= self._minimum(model)

    def _minimum(self, model: Model) -> int:
        return max(model.cache_min_tokens, self._floors.get(model.id, 0)) if self._floors else model.cache_min_tokens

    def _corrected(self, family: Family, model: Model, what: _Boundary | _Static) -> float:
        tokens = what.tokens_old if model.tokenizer == "pre-4.7" else what.tokens_new
        return tokens * family.token_ratios.get(model.tokenizer, 1.0)

    def _choice(self, model: Model, boundary: _Boundary, known: Prefix) -> _Choice:
        return _Choice(boundary, known, False, _tokens(boundary, model.tokenizer))

    # ------------------------------------------------------------------ telling

    def _longest(
        self, family: Family, model: Model, static: _Static, longest: _Choice | None, last: Prefix | None
    ) -> tuple[str, int]:
        """Digest and tokens of the longest prefix that is marked, or of all tools and system, of which `last` is."""
        if longest is not None:
            known, what = longest.known, longest.boundary
        elif last is not None:
            known, what = last, static.boundaries[-1]
        else:
            return "", 0
        return what.digest.hex(), known.tokens or round(self._corrected(family, model, what))

    def _marked(
        self,
        request: MessageRequest,
        scope: Scope,
        family: Family,
        model_id: str,
        choices: list[_Choice],
        tail: bool,
        ttl: Ttl,
        why: list[str],
        prefix: str,
        tokens: int,
        digest: str,
        turn: tuple[bytes, bytes],
        now: float,
    ) -> CachePlan:
        fields = request.fields
        later: Ttl = "5m" if self._setting == "auto" else self._setting
        splices: list[Splice] = []
        marked: list[Marked] = []
        numbers: list[int] = []
        for each in choices:
            boundary = each.boundary
            own: Ttl = later if each.is_document else ttl
            at = fields["messages" if each.is_document else "tools" if boundary.in_tools else "system"]
            if boundary.is_string:
                splices.append(Splice(at.start, at.end, system_marked(at.of(request.body), own)))
            else:
                where = at.start + boundary.mark_at
                splices.append(Splice(where, where, b',"cache_control":' + mark(own)))
            key = _live_key(request, model_id, boundary.digest)
            marked.append(Marked(key, boundary.digest, each.tokens, own))
            numbers.append(_number(boundary.digest))
        if tail:
            end = fields["messages"].end
            splices.append(Splice(end, end, b',"cache_control":' + mark(later)))
            numbers += [_number(each) for each in turn if each]
            why.append(f"cache:tail:{later}")
        return CachePlan(
            splice(request.body, splices) if splices else request.body,
            prefix,
            tokens,
            digest,
            family.id,
            self._cold(marked, now),
            tuple(numbers),
            len(splices),
            marked[0].ttl if marked else later if tail else "",
            tuple(why),
            model_id,
            tuple(marked),
            tail,
            scope.name,
        )

    def _callers(
        self,
        request: MessageRequest,
        static: _Static,
        scope: Scope,
        family: Family,
        model: Model | None,
        model_id: str,
        digest: str,
        now: float,
        *,
        has_marks: bool,
    ) -> CachePlan:
        """The plan of a body that is sent as it came, for it has marks of its own or a model nobody knows."""
        tokenizer = "opus-4.7" if model is None else model.tokenizer
        marked: list[Marked] = []
        longest = static.boundaries[-1] if static.boundaries else None
        for boundary in static.boundaries:
            if not boundary.mark:
                continue
            longest = boundary
            known = self._families.prefix(scope, model_id, boundary.digest)
            tokens = _tokens(boundary, tokenizer)
            if model is None or known is None or self._reaches(family, model, known, boundary):
                ttl: Ttl = "1h" if boundary.mark == "1h" else "5m"
                marked.append(Marked(_live_key(request, model_id, boundary.digest), boundary.digest, tokens, ttl))
        tokens = 0 if longest is None else round(_tokens(longest, tokenizer) * family.token_ratios.get(tokenizer, 1.0))
        family.model, family.prefix_tokens = model_id, tokens
        return CachePlan(
            body=request.body,
            prefix="" if longest is None else longest.digest.hex(),
            prefix_tokens=tokens,
            digest=digest,
            family=family.id,
            cold=self._cold(marked, now),
            prefixes=caller_prefixes(request),
            marks=0,
            ttl=marked[-1].ttl if marked else "",
            reasons=("cache:caller" if has_marks else "cache:unknown_model",),
            model=model_id,
            marked=tuple(marked),
            scope=scope.name,
        )

    def _cold(self, marked: list[Marked], now: float) -> bytes:
        return next((one.key for one in marked if self.is_cold(one.key, now)), b"")

    def _counted(self, plan: CachePlan, model: Model, cached: int) -> None:
        """Anthropic counted the longest prefix of the plan."""
        longest = plan.marked[-1]
        prefix = self._families.known(plan.scope, plan.model, longest.digest)
        if prefix is None:
            return
        prefix.tokens = cached
        ratios = prefix.family.token_ratios
        seen = min(max(cached / max(longest.tokens, 1), _RATIO_MIN), _RATIO_MAX)
        known = ratios.get(model.tokenizer)
        ratios[model.tokenizer] = seen if known is None else known + _RATIO_WEIGHT * (seen - known)


class _Parts:
    """Fields that were read before, found by their bytes. Bounded by the bytes; those longest unused go first.

    Hashing 15 KB takes longer than all else here (15 to 80 µs; comparing takes 1), so a field is looked up by its
    length and three samples, and then compared whole with the few that share them.
    """

    __slots__ = ("_by_sample", "_bytes", "_bytes_max", "_last", "_read")

    def __init__(self, read: Callable[[bytes], Part], bytes_max: int) -> None:
        self._read = read
        self._bytes_max = bytes_max
        self._bytes = 0
        self._last = NO_PART
        """The part that was asked for last, which is remembered and longest from being forgotten."""
        self._by_sample: OrderedDict[tuple[int, bytes, bytes, bytes], list[Part]] = OrderedDict()

    def of(self, raw: bytes | None) -> Part:
        """The field, read."""
        if raw is None:
            return NO_PART
        if raw == self._last.raw:
            return self._last
        size = len(raw)
        sample = (size, raw[:_SAMPLE_BYTES], raw[-_SAMPLE_BYTES:], raw[size // 2 : size // 2 + _SAMPLE_BYTES])
        same = self._by_sample.get(sample)
        if same is not None:
            self._by_sample.move_to_end(sample)
            for part in same:
                if part.raw == raw:
                    self._last = part
                    return part
        part = self._read(raw)
        # A block and its place take some 400 bytes, more than the text of a small one.
        if size > self._bytes_max // 4:
            return part
        if same is None:
            same = self._by_sample[sample] = []
        elif len(same) >= _SAME_SAMPLE_MAX:
            self._bytes -= _weight(same.pop(0))
        same.append(part)
        self._bytes += _weight(part)
        while self._bytes > self._bytes_max:
            _, gone = self._by_sample.popitem(last=False)
            self._bytes -= sum(map(_weight, gone))
        self._last = part
        return part


def cautious_tokens(text: Text, tokenizer: str) -> int:
    """Tokens that a text has at least, ≥ 0: an estimate on the short side, by the tokenizer's generation.

    ASCII counts as English prose, the script with most characters a token (claude-api §9.1); code and JSON have
    more tokens. Letters with marks count 1.5 in a Vietnamese text, and in any other half a token.
    """
    plain = text.chars - text.foreign
    if text.vietnamese > _VIETNAMESE_SHARE * text.chars:
        foreign = (text.foreign - text.cjk) * _TOKENS_PER_LETTER
    else:
        foreign = (text.foreign - text.cjk) * _TOKENS_PER_OTHER
    tokens = plain / _PROSE[tokenizer] + foreign + text.cjk * _TOKENS_PER_CJK
    if not text.cjk:
        tokens = min(tokens, text.chars / _DENSE[tokenizer])
    return int(tokens) + text.pages * _PAGE_TOKENS


def _both(text: Text) -> tuple[int, int]:
    return cautious_tokens(text, "pre-4.7"), cautious_tokens(text, "opus-4.7")


def _tokens(what: _Boundary | _Static, tokenizer: str) -> int:
    return what.tokens_old if tokenizer == "pre-4.7" else what.tokens_new


def _static(tools: Part, system: Part) -> _Static:
    """Where a prefix may end: behind the tools, behind the first and last blocks of system, and at a caller's marks."""
    boundaries: list[_Boundary] = []
    text = Text()
    last = len(tools.blocks) - 1
    for at, block in enumerate(tools.blocks):
        text += block.text
        if at == last or block.mark:
            digest = _digest(b"tools", block.digest)
            boundaries.append(_Boundary("tools", digest, *_both(text), True, block.mark_at, False, block.mark))
    before = tools.blocks[-1].digest if tools.blocks else b""
    count = len(system.blocks)
    for at, block in enumerate(system.blocks):
        text += block.text
        if at < _EDGES or at >= count - _EDGES or block.mark:
            depth = f"system.{at}" if at < _EDGES else f"system.{at - count}"
            digest = _digest(b"system", before, block.digest)
            boundaries.append(
                _Boundary(depth, digest, *_both(text), False, block.mark_at, system.is_string, block.mark)
            )
    return _Static(
        digest=_digest(b"static", tools.digest, system.digest),
        text=text,
        tokens_old=cautious_tokens(text, "pre-4.7"),
        tokens_new=cautious_tokens(text, "opus-4.7"),
        boundaries=tuple(boundaries),
        has_system=bool(system.blocks),
        signature=sign(tools.raw, system.raw),
    )


def _digests(
    request: MessageRequest, tools: Part, system: Part, static: _Static, messages: bytes
) -> tuple[str, bytes, bytes, bool]:
    """Hex of the whole request; digests of the conversation before its last answer (b"" where there is none) and to
    its end; and whether a mark stands outside of tools and system. Every byte is hashed once, or was before:
    by SHA-256, which takes 2 µs for 3 KB where blake2b takes 5.
    """
    body, fields = request.body, request.fields
    before_at, end_at = last_turn(messages)
    if before_at:
        rolling = sha256(static.digest + messages[:before_at])
        before = rolling.digest()[:16]
        rolling.update(messages[before_at:end_at])
    else:
        rolling, before = sha256(static.digest + messages[:end_at]), b""
    after = rolling.digest()[:16]
    read = {"tools": tools.digest, "system": system.digest, "messages": after}
    pieces: list[bytes] = []
    at = 0
    for name, span in fields.items():
        if name in read:
            pieces += (body[at : span.start], read[name])
            at = span.end
    pieces += (body[at:], messages[end_at:])
    # A mark does not begin in one piece and end in the next: what is cut out are whole values.
    outside = b"".join(pieces)
    return sha256(outside).hexdigest()[:32], before, after, has_marks(outside) or has_marks(messages)


def _learn(scope: Scope, family: Family, static: _Static, found: list[Prefix], now: float) -> None:
    """Counts a use of each prefix."""
    before: Prefix | None = None
    for known, boundary in zip(found, static.boundaries, strict=True):
        if before is not None:
            before.followed_by(boundary.digest)
        scope.learn(family, boundary.depth, known.used(now))
        before = known


def _live_key(request: MessageRequest, model: str, digest: bytes) -> bytes:
    """Model, speed (each has a cache of its own, claude-api §7.5) and prefix."""
    return b"%b/%b/%b" % (model.encode(), request.raw("speed") or b"", digest)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"".join(b"%d:%b" % (len(part), part) for part in parts), digest_size=16).digest()


def _weight(part: Part) -> int:
    return len(part.raw) + 400 * len(part.blocks)


def _remember(table: OrderedDict[bytes, _Value], key: bytes, value: _Value, entries_max: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > entries_max:
        table.popitem(last=False)
