"""How long a cached prefix is to live: 5 minutes or 1 hour, and whether keeping it warm between uses pays.

What it is: arithmetic over the gaps between uses of a prefix and the prices of a model. Pure functions; every answer
says why, with its numbers. What it is not: what the gaps are gaps of (`prompt_families.py`), nor the one who sends
anything.

A gap of up to the TTL is a read, for a read starts the TTL anew and costs nothing more; a longer one is a write
(claude-api §7.1). With writes at 1.25 and 2 times the input and reads at 0.1, an hour pays when more than 0.65 gaps
lie between 5 and 60 minutes for each that is longer.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal

import msgspec

from headgate.policy.records import Record
from headgate.wire.catalog import Price
from headgate.wire.message import InvalidBody, MessageRequest, Span, Splice, members, scan, splice, without
from headgate.wire.prompt import Ttl, has_marks

TtlSetting = Literal["auto", "5m", "1h"]

TTL_S: dict[Ttl, float] = {"5m": 300.0, "1h": 3600.0}
GAPS_S = (1.0, 10.0, 60.0, 120.0, 240.0, 300.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0, 7200.0, 14400.0, 86400.0)
"""Upper edges of the histogram's rows in seconds, inclusive; a last row holds what is longer, and first uses."""
_UPTO_5M = GAPS_S.index(300.0) + 1
_UPTO_1H = GAPS_S.index(3600.0) + 1

GAPS_MIN = 8
"""Fewer gaps than that say nothing: 5 minutes, whose loss is the smaller."""
_SAVING_SHARE_MIN = 0.05
"""Of the cost, before the TTL is changed: a change writes the prefix once more."""
_COUNT_MAX = 1024
_DAY_S = 86_400.0
_WARM_SHARE = 0.9
"""Of the TTL that passes before a warming request: it must begin before the entry dies."""
_WARM_TOKENS = 16
"""What a warming request sends beside its prefix, at the full input price."""
_CENT_NANOUSD = 10_000_000


class Gaps:
    """A histogram of gaps. Bounded; when it is full all counts are halved, so that old habits fade."""

    __slots__ = ("counts", "span_s", "total")

    def __init__(self, counts: list[float] | None = None, span_s: float = 0.0) -> None:
        self.counts = counts or [0.0] * (len(GAPS_S) + 1)
        self.total = sum(self.counts)
        self.span_s = span_s
        """Seconds over which these gaps were seen."""

    def add(self, gap_s: float) -> None:
        """A prefix was used again after so long; infinite for a first use."""
        self.counts[bisect_left(GAPS_S, gap_s)] += 1.0
        self.total += 1.0
        if self.total > _COUNT_MAX:
            self.counts = [count / 2 for count in self.counts]
            self.total /= 2
            self.span_s /= 2

    def hits(self, ttl: Ttl) -> float:
        """Uses that find the prefix alive."""
        return sum(self.counts[: _UPTO_5M if ttl == "5m" else _UPTO_1H])


class TtlChoice(Record, frozen=True, gc=False):
    """A TTL with its reason."""

    ttl: Ttl
    reason: str
    saved_nanousd_day: int = 0
    """Against the other TTL; an estimate."""


class KeepWarm(Record, frozen=True, gc=False):
    """Whether to keep a prefix warm, and for how long."""

    worth: bool
    every_s: float
    """Seconds after the last use or warming at which the next is due."""
    pings_max: int
    """Warming requests after a use before the prefix is let go; 0 when it is not worth it."""
    cost_nanousd_day: int
    saved_nanousd_day: int
    """What the rewrites would have cost, less `cost_nanousd_day`."""
    reason: str


def choose_ttl(gaps: Gaps, *, prefix_tokens: int, price: Price, setting: TtlSetting = "auto") -> TtlChoice:
    """The TTL that costs less for these gaps. A setting of `5m` or `1h` forces it."""
    if setting != "auto":
        return TtlChoice(setting, f"{setting}: set by cache.ttl")
    if gaps.total < GAPS_MIN:
        return TtlChoice("5m", f"5m: only {gaps.total:.0f} uses seen, {GAPS_MIN} are needed to tell")
    short, long = gaps.hits("5m"), gaps.hits("1h")
    read = price.cache_read_nanousd
    cost_5m = short * read + (gaps.total - short) * price.cache_write_5m_nanousd
    cost_1h = long * read + (gaps.total - long) * price.cache_write_1h_nanousd
    between, beyond = (long - short) / gaps.total, (gaps.total - long) / gaps.total
    hour = cost_1h < cost_5m * (1 - _SAVING_SHARE_MIN)
    days = max(gaps.span_s, 3600.0) / _DAY_S
    saved = round(abs(cost_5m - cost_1h) * prefix_tokens / days)
    shares = f"{between:.0%} of gaps lie between 5 and 60 min, {beyond:.0%} are longer or first uses"
    if hour:
        return TtlChoice("1h", f"1h: {shares}; saves {usd(saved)} a day", saved)
    saved = saved if cost_5m < cost_1h else 0
    return TtlChoice("5m", f"5m: {shares}" + (f"; 1h would cost {usd(saved)} a day more" if saved else ""), saved)


def keep_warm_worth(
    gaps: Gaps, *, prefix_tokens: int, price: Price, ttl: Ttl, budget_nanousd_day: int | None = None
) -> KeepWarm:
    """Whether a `max_tokens: 0` request every 0.9 of the TTL costs less than the writes it spares.

    For each number of warming requests after a use: gaps they bridge are read instead of written, gaps that are longer
    pay them in vain. The number that saves most is taken, of those whose cost stays within the budget of a day.
    A gap counts as the upper edge of its row, so the saving is not overstated; first uses bridge nothing.
    """
    every_s = TTL_S[ttl] * _WARM_SHARE
    write = (price.cache_write_1h_nanousd if ttl == "1h" else price.cache_write_5m_nanousd) * prefix_tokens
    read = price.cache_read_nanousd * prefix_tokens
    ping = read + _WARM_TOKENS * price.input_nanousd
    days = max(gaps.span_s, 3600.0) / _DAY_S
    if gaps.total < GAPS_MIN:
        return KeepWarm(False, every_s, 0, 0, 0, f"only {gaps.total:.0f} uses seen, {GAPS_MIN} are needed to tell")
    best = (0.0, 0, 0.0)
    for pings in range(1, int((write - read) / ping) + 1):
        cost = spared = 0.0
        for edge, count in zip((*GAPS_S, float("inf")), gaps.counts, strict=True):
            if edge <= TTL_S[ttl]:
                continue
            needed = min(pings, int(edge // every_s)) if edge != float("inf") else pings
            cost += count * needed * ping
            if edge <= TTL_S[ttl] + pings * every_s:
                spared += count * (write - read)
        if budget_nanousd_day is not None and cost / days > budget_nanousd_day:
            continue
        if spared - cost > best[0]:
            best = (spared - cost, pings, cost)
    net, pings, cost = best
    if not pings:
        return KeepWarm(False, every_s, 0, 0, 0, "no number of warming requests costs less than the writes they spare")
    cost_day, saved_day = round(cost / days), round(net / days)
    reason = f"up to {pings} warming requests after a use, {usd(cost_day)} a day, spare {usd(cost_day + saved_day)}"
    return KeepWarm(True, every_s, pings, cost_day, saved_day, reason)


def warm_body(body: bytes) -> bytes | None:
    """A request that reads the marked tools and system of `body` and answers nothing, or None where there is none.

    `body` is one that was sent, with its marks. `max_tokens` becomes 0, the conversation one placeholder; `stream`,
    `diagnostics` and automatic caching go. None for what the API refuses together with `max_tokens: 0` (thinking with
    a budget, a format, a forced tool), for state at Anthropic, and where neither tools nor system has a mark.
    """
    try:
        request = scan(body)
        fields = request.fields
        if request.uses_server_state or "messages" not in fields or "max_tokens" not in fields:
            return None
        if not any(has_marks(request.raw(name) or b"") for name in ("tools", "system")):
            return None
        if _type_of(request, "thinking") == "enabled" or _type_of(request, "tool_choice") in ("any", "tool"):
            return None
        config = fields.get("output_config")
        if config is not None and body[config.start] == ord("{"):
            wanted = members(body, config).get("format")
            if wanted is not None and wanted.of(body) != b"null":
                return None
        gone = ("stream", "diagnostics", "cache_control")
        opening = body.index(b"{")
        cut = scan(splice(body, without(body, Span(opening, body.rindex(b"}") + 1), gone)))
        messages, max_tokens = cut.fields["messages"], cut.fields["max_tokens"]
        return splice(
            cut.body,
            [
                Splice(messages.start, messages.end, b'[{"role":"user","content":"warm"}]'),
                Splice(max_tokens.start, max_tokens.end, b"0"),
            ],
        )
    except InvalidBody:
        return None


def usd(nanousd: int) -> str:
    """Dollars as a person reads them: four places below a cent, else two."""
    return f"${nanousd / 1e9:.2f}" if nanousd >= _CENT_NANOUSD else f"${nanousd / 1e9:.4f}"


def _type_of(request: MessageRequest, name: str) -> str:
    raw = request.raw(name)
    if raw is None or raw[:1] != b"{":
        return ""
    try:
        value: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, ValueError):
        return ""
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else ""
