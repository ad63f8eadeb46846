"""Which parts of the prompts of a key and endpoint come back: what the cache planner has learned.

What it is: for each scope (a key and an endpoint) its prompt families, and for each prefix that ends at a block how
often it was used again within 5 minutes, within an hour, or not. What it is not: a decision to mark anything
(`prompt_cache.py`), or a copy of prompts: digests and counts alone are kept.

A family is one prompt with what varies in it: two prompts that share most of their phrases are of one family, whatever
the order of tools, and whatever time or user stands in them.

All memory is bounded: PREFIXES_MAX prefixes of some 400 bytes, SCOPES_MAX scopes of at most FAMILIES_MAX families of
some 2 KB, TAILS_MAX ends of conversations of some 150 bytes: about 45 MB when all is full, 10 MB for 200 scopes.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from hashlib import blake2b
from math import inf

from headgate.policy.cache_ttl import TTL_S, Gaps, TtlChoice
from headgate.policy.records import Record
from headgate.wire.prompt import Ttl

PREFIXES_MAX = 16_384
SCOPES_MAX = 1_024
FAMILIES_MAX = 8
TAILS_MAX = 16_384
DEPTHS_MAX = 16
"""Depths of a family whose uses are counted apart: deeper ones share the last."""

_SIGNATURE_MAX = 64
_PHRASE_BYTES_MIN = 8
_SIGNED_BYTES = 32 << 10
_SAME_SHARE = 0.5
"""Of the smaller signature's phrases, for two prompts to be of one family."""
_NAMED_BY = 4
_PRIOR_READS: dict[Ttl, float] = {"5m": 1.0, "1h": 2.0}
_COUNT_MAX = 64.0
_TTL_5M_S, _TTL_1H_S = TTL_S["5m"], TTL_S["1h"]
_FAMILY_BYTES = 8
_PHRASE_ENDS = bytes.maketrans(b'.,;:!?{}[]"()-_/=0123456789', b"\n" * 27)
"""Digits among them: times, counters and ids then leave nothing behind that is long enough to be a phrase."""


class Uses:
    """Uses of something that could be cached: by how long after the use before. Halved when they are many."""

    __slots__ = ("later", "within_1h", "within_5m")

    def __init__(self) -> None:
        self.within_5m = 0.0
        self.within_1h = 0.0
        """Beyond 5 minutes."""
        self.later = 0.0
        """And first uses."""

    @property
    def total(self) -> float:
        """All of them, ≥ 0."""
        return self.within_5m + self.within_1h + self.later

    def add(self, gap_s: float) -> None:
        """One more use, so long after the last; infinite for the first."""
        if gap_s <= _TTL_5M_S:
            self.within_5m += 1.0
        elif gap_s <= _TTL_1H_S:
            self.within_1h += 1.0
        else:
            self.later += 1.0
        if self.within_5m + self.within_1h + self.later > _COUNT_MAX:
            self.within_5m /= 2
            self.within_1h /= 2
            self.later /= 2

    def reads_per_write(self, ttl: Ttl, *, prior: float = 1.0) -> float:
        """What one write is expected to be read. The prior is so many writes that nobody has seen, with a read each;
        with two for an hour, which pays after the second (claude-api §7.3)."""
        reads = self.within_5m + (self.within_1h if ttl == "1h" else 0.0)
        return (prior * _PRIOR_READS[ttl] + reads) / max(prior + self.total - reads, 0.5)


class Prefix:
    """One prefix on one model: everything up to a block's end."""

    __slots__ = ("barren", "child", "family", "last", "last_gap_s", "tokens", "uses", "varied")

    def __init__(self, family: Family) -> None:
        self.family = family
        self.uses = Uses()
        self.last = -inf
        self.last_gap_s = inf
        """Between the last two uses."""
        self.child = b""
        """The digest of what followed last."""
        self.varied = False
        """Different things were seen to follow."""
        self.tokens = 0
        """As Anthropic counted them; 0 until it has."""
        self.barren = False
        """A mark on it made neither a read nor a write: it is below what the model takes."""

    def used(self, now: float) -> float:
        """It was used; the seconds since the last time, infinite for the first."""
        gap_s = self.last_gap_s = now - self.last
        self.last = now
        self.uses.add(gap_s)
        return gap_s

    def followed_by(self, child: bytes) -> None:
        """What came right after it this time."""
        if self.child and self.child != child:
            self.varied = True
        self.child = child


class Family:
    """One prompt with its variants."""

    __slots__ = ("choices", "depths", "gaps", "id", "model", "prefix_tokens", "seen_at", "signature", "token_ratios")

    def __init__(self, family_id: str, signature: frozenset[int]) -> None:
        self.id = family_id
        self.signature = signature
        self.depths: dict[str, Uses] = {}
        self.gaps = Gaps()
        """Between uses of the longest static prefix."""
        self.seen_at = -inf
        self.model = ""
        self.prefix_tokens = 0
        self.token_ratios: dict[str, float] = {}
        """By tokenizer: real tokens of this family's prefixes for one of the cautious estimate."""
        self.choices: dict[str, tuple[float, TtlChoice]] = {}
        """By model: the TTL, and the number of gaps it was chosen by."""

    def seen(self, gap_s: float, now: float) -> None:
        """Its static prefix was used."""
        if self.seen_at > -inf:
            self.gaps.span_s += max(now - self.seen_at, 0.0)
        self.seen_at = now
        self.gaps.add(gap_s)


class FamilyView(Record, frozen=True, gc=False):
    """A family as an operator sees it. No prompt text."""

    family: str
    key_id: str
    endpoint: str
    model: str
    prefix_tokens: int
    ttl: str
    reason: str
    uses: int
    """Weighted: old ones count half."""
    seen_at: float


class Scope:
    """What is known of one key and endpoint."""

    __slots__ = ("depths", "endpoint", "families", "first_turns", "key_id", "name", "turns")

    def __init__(self, key_id: str, endpoint: str) -> None:
        self.key_id = key_id
        self.endpoint = endpoint
        self.name = _digest(key_id.encode(), endpoint.encode())
        self.families: OrderedDict[str, Family] = OrderedDict()
        self.depths: dict[str, Uses] = {}
        self.first_turns = Turns()
        self.turns = Turns()

    def family_of(self, signature: frozenset[int]) -> Family:
        """The family of a prompt that was not seen before, by what `sign` says of it; a new one where it resembles
        none. The one longest unused goes when there are too many."""
        best, best_share = None, _SAME_SHARE
        for family in self.families.values():
            share = _likeness(signature, family.signature)
            if share >= best_share:
                best, best_share = family, share
        if best is None:
            named_by = sorted(signature)[:_NAMED_BY]
            family_id = _digest(self.name, b"".join(b"%08x" % part for part in named_by), size=_FAMILY_BYTES).hex()
            best = self.families.get(family_id) or Family(family_id, signature)
        else:
            best.signature = signature
        self.keep(best)
        return best

    def keep(self, family: Family) -> None:
        """The family is in use."""
        self.families[family.id] = family
        self.families.move_to_end(family.id)
        if len(self.families) > FAMILIES_MAX:
            self.families.popitem(last=False)

    def expected_reads(self, family: Family, depth: str, ttl: Ttl, *, prior: float = 1.0) -> float:
        """Reads for a write of a prefix that nobody has seen: by the family's record of the depth, or the scope's."""
        uses = family.depths.get(depth)
        if uses is None or not uses.total:
            uses = self.depths.get(depth)
        return uses.reads_per_write(ttl, prior=prior) if uses is not None else _PRIOR_READS[ttl] * prior

    def learn(self, family: Family, depth: str, gap_s: float) -> None:
        """A prefix of this depth was used, so long after its last use."""
        for depths in (family.depths, self.depths):
            uses = depths.get(depth)
            if uses is None:
                uses = depths[depth if len(depths) < DEPTHS_MAX else "deeper"] = Uses()
            uses.add(gap_s)


class Turns:
    """How many requests of a kind there were, and how many of them went on within the time a cache lives."""

    __slots__ = ("count", "went_on")

    def __init__(self) -> None:
        self.count = 0.0
        self.went_on = 0.0

    def add(self) -> None:
        """A request of this kind."""
        self.count += 1.0
        if self.count > _COUNT_MAX:
            self.count /= 2
            self.went_on /= 2

    def share(self, prior: float) -> float:
        """Of them that go on, 0 to 1. The prior is so many that nobody has seen, and which all did."""
        total = prior + self.count
        return min((prior + self.went_on) / total, 1.0) if total else 0.0


class Families:
    """All scopes of a process. Time is monotonic seconds."""

    __slots__ = ("_prefixes", "_scopes", "_tails")

    def __init__(self) -> None:
        self._scopes: OrderedDict[tuple[str, str], Scope] = OrderedDict()
        self._prefixes: OrderedDict[tuple[bytes, str, bytes], Prefix] = OrderedDict()
        self._tails: OrderedDict[bytes, tuple[float, bool]] = OrderedDict()

    def scope(self, key_id: str, endpoint: str) -> Scope:
        """The scope; a new one where it is not known."""
        scope = self._scopes.get((key_id, endpoint))
        if scope is None:
            scope = self._scopes[key_id, endpoint] = Scope(key_id, endpoint)
            if len(self._scopes) > SCOPES_MAX:
                self._scopes.popitem(last=False)
        else:
            self._scopes.move_to_end((key_id, endpoint))
        return scope

    def prefix(self, scope: Scope, model: str, digest: bytes) -> Prefix | None:
        """What is known of a prefix."""
        return self._prefixes.get((scope.name, model, digest))

    def known(self, scope_name: bytes, model: str, digest: bytes) -> Prefix | None:
        """The same, by the scope's name."""
        return self._prefixes.get((scope_name, model, digest))

    def touch(self, scope: Scope, model: str, digest: bytes, family: Family) -> Prefix:
        """The prefix, a new one where it is not known; the one longest unused goes when there are too many."""
        key = (scope.name, model, digest)
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = self._prefixes[key] = Prefix(family)
            if len(self._prefixes) > PREFIXES_MAX:
                self._prefixes.popitem(last=False)
        else:
            self._prefixes.move_to_end(key)
        return prefix

    def turn(self, scope: Scope, before: bytes, after: bytes, now: float) -> None:
        """A request whose messages end at digest `after` and, where an assistant has spoken, go on from `before`
        (b"" otherwise)."""
        continues = bool(before)
        if continues:
            known = self._tails.pop(before, None)
            if known is not None and now - known[0] <= _TTL_5M_S:
                (scope.turns if known[1] else scope.first_turns).went_on += 1.0
        (scope.turns if continues else scope.first_turns).add()
        self._tails[after] = (now, continues)
        if len(self._tails) > TAILS_MAX:
            self._tails.popitem(last=False)

    def views(self) -> tuple[FamilyView, ...]:
        """Every family that is remembered, the scope longest unused first."""
        found = []
        for scope in self._scopes.values():
            for family in scope.families.values():
                _, choice = family.choices.get(family.model, (0.0, None))
                found.append(
                    FamilyView(
                        family.id,
                        scope.key_id,
                        scope.endpoint,
                        family.model,
                        family.prefix_tokens,
                        choice.ttl if choice else "",
                        choice.reason if choice else "",
                        round(family.gaps.total),
                        family.seen_at,
                    )
                )
        return tuple(found)

    def family(self, key_id: str, endpoint: str, family_id: str) -> Family | None:
        """One family, for the arithmetic of keeping it warm."""
        scope = self._scopes.get((key_id, endpoint))
        return None if scope is None else scope.families.get(family_id)


def sign(tools: bytes, system: bytes) -> frozenset[int]:
    """The phrases of a prompt with the smallest checksums: of two prompts that share most phrases, mostly the same.

    Looks at 32 KB of each field.
    """
    phrases = set()
    for field in (tools, system):
        text = field[:_SIGNED_BYTES].replace(b"\\n", b"\n").replace(b"\\t", b"\n").translate(_PHRASE_ENDS)
        phrases.update(text.split(b"\n"))
    return frozenset(
        sorted(zlib.crc32(phrase) for phrase in phrases if len(phrase) >= _PHRASE_BYTES_MIN)[:_SIGNATURE_MAX]
    )


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    """The share of phrases that two prompts have in common, 0 to 1. Two prompts without any are alike."""
    if not one or not other:
        return 1.0 if not one and not other else 0.0
    # Of a long prompt only the smallest checksums are known: what lies beyond the other's largest cannot be compared.
    edge = min(max(one), max(other)) if len(one) == _SIGNATURE_MAX or len(other) == _SIGNATURE_MAX else 1 << 32
    comparable = min(sum(part <= edge for part in one), sum(part <= edge for part in other))
    return len(one & other) / max(comparable, 1)


def _digest(*parts: bytes, size: int = 16) -> bytes:
    rolling = blake2b(digest_size=size)
    for part in parts:
        rolling.update(b"%d:" % len(part))
        rolling.update(part)
    return rolling.digest()
