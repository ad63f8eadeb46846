"""The ledger beside Anthropic's report, by day, model and workspace: what the gap is, where it comes from, and what it
corrects.

What it is: sums and words over records; integer arithmetic. Corrected are estimates and nothing else, in proportion,
between nothing and the most each attempt could have cost, and always from what was estimated first: so the same
report corrects the same, however often, and a later report begins anew.
What it is not: the reading of a report or a ledger (`wire/usage_report.py`, `storage/reconcile.py`).

Estimates are corrected only where they can be what the gap comes from. Where the report has more than they could have
cost at most, others have used the account, or a price is wrong; to put that on the people whose answers were cut would
be a false bill. Then they stay, and the gap is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from headgate.policy.records import Record
from headgate.wire.catalog import DAY_NS, Catalog
from headgate.wire.usage_report import ReportedCost, ReportedUsage

TOLERANCE_SHARE = Fraction(1, 100)
TOLERANCE_NANOUSD = 50_000_000
"""1 % and $0.05: a gap must be within both (failure-model §3.3)."""
PRICE_TOLERANCE = Fraction(1, 100)
DEFAULT_WORKSPACE = "default"
"""How the workspace without an id is called."""
_LONGEST_PROMPT = 1 << 40

_PRICE_FIELD = {
    "uncached_input_tokens": ("input_tokens", "input_nanousd", "input"),
    "cache_read_input_tokens": ("cache_read_tokens", "cache_read_nanousd", "cache read"),
    "cache_creation.ephemeral_5m_input_tokens": ("cache_write_5m_tokens", "cache_write_5m_nanousd", "5-minute write"),
    "cache_creation.ephemeral_1h_input_tokens": ("cache_write_1h_tokens", "cache_write_1h_nanousd", "1-hour write"),
    "output_tokens": ("output_tokens", "output_nanousd", "output"),
}
"""A `token_type` of the cost report, as the fields of usage and of prices call it, and as people do."""


class Tokens(Record, frozen=True, gc=False):
    """Counts by kind, summed over many answers; web searches with them."""

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    web_search_requests: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(*(getattr(self, name) + getattr(other, name) for name in Tokens.__struct_fields__))

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(*(getattr(self, name) - getattr(other, name) for name in Tokens.__struct_fields__))


class Estimate(Record, frozen=True, gc=False):
    """One estimated attempt."""

    call_id: str
    number: int
    estimated_nanousd: int
    """What was estimated when it ended; ≥ 0."""
    upper_nanousd: int
    """The most it can have cost; ≥ `estimated_nanousd`."""
    cost_nanousd: int
    """What the ledger says now, after corrections."""


class LedgerLine(Record, frozen=True, gc=False):
    """What the ledger has of a day and model."""

    day: int
    """UTC days since 1970, of the attempt's start."""
    model: str
    settled_nanousd: int = 0
    batch_nanousd: int = 0
    """Part of `settled_nanousd` that is of tier `batch`."""
    fast: bool = False
    """Some answer was of fast mode, which has prices of its own."""
    settled: Tokens = Tokens()
    estimated: Tokens = Tokens()
    """Tokens as they were estimated; a correction changes money alone."""
    estimates: tuple[Estimate, ...] = ()


class ReportLine(Record, frozen=True, gc=False):
    """What the report has of a day, model and workspace."""

    day: int
    model: str
    """Empty for what is no model's: code execution, and searches whose cost is not that of their number."""
    workspace: str
    nanousd: int = 0
    """With web searches, and with Priority Tier at the standard price, since the cost report leaves that out."""
    batch_nanousd: int = 0
    tokens: Tokens = Tokens()
    prices: tuple[str, ...] = ()
    """Prices that are not the catalogue's, in words."""
    fast_prices: tuple[str, ...] = ()
    """The same, if there was fast mode."""
    others: tuple[str, ...] = ()
    """What the money of no model is for."""


class Correction(Record, frozen=True, gc=False):
    """What an estimated attempt is to cost from now on."""

    call_id: str
    number: int
    before_nanousd: int
    """What it says now."""
    estimated_nanousd: int
    after_nanousd: int


class Line(Record, frozen=True, gc=False):
    """One day, model and workspace, compared."""

    day: int
    model: str
    workspace: str
    """An id, or `default`."""
    ledger_nanousd: int
    """Settled, and estimated as it was at first."""
    reported_nanousd: int
    corrected_nanousd: int
    """The ledger after the correction."""
    ledger_tokens: Tokens
    reported_tokens: Tokens
    estimated_attempts: int
    cause: str
    """What the gap comes from, in words; empty where there is none."""
    agrees: bool
    """What is left of the gap is within both bounds."""
    corrections: tuple[Correction, ...] = ()
    """Attempts whose cost changes: none when they say it already."""

    @property
    def gap_nanousd(self) -> int:
        """Report less ledger, before the correction."""
        return self.reported_nanousd - self.ledger_nanousd

    @property
    def left_nanousd(self) -> int:
        """Report less ledger, after it."""
        return self.reported_nanousd - self.corrected_nanousd


def compare(ledger: Iterable[LedgerLine], report: Iterable[ReportLine], *, workspace: str) -> tuple[Line, ...]:
    """Every day and model of the ledger and of this workspace of the report (empty: the default one), in order."""
    ours = {(line.day, line.model): line for line in ledger}
    theirs = {(line.day, line.model): line for line in report if line.workspace == workspace}
    # A day of which the report has nothing at all is late, or another key's: it is no word on what a call cost.
    told = {line.day for line in theirs.values() if line.nanousd}
    return tuple(
        _compared(
            ours.get(key) or LedgerLine(*key), theirs.get(key) or ReportLine(*key, workspace), told=key[0] in told
        )
        for key in sorted(ours.keys() | theirs.keys())
    )


def distribute(estimates: Sequence[Estimate], total_nanousd: int) -> tuple[tuple[int, ...], int]:
    """Amounts for the estimates, in their order, and what is left of `total_nanousd` that they cannot take.

    In proportion to what was estimated; none is below 0 or above its upper bound; amounts and rest add up to the
    total exactly. What is estimated at nothing gets its part when all others are at their bound. Equal for equal
    input: of parts of a nano-dollar the greatest are rounded up, the first first.
    """
    uppers = [one.upper_nanousd for one in estimates]
    wanted = min(max(total_nanousd, 0), sum(uppers))
    weights = [one.estimated_nanousd for one in estimates]
    amounts = _filled(
        weights, uppers, min(wanted, sum(top for top, weight in zip(uppers, weights, strict=True) if weight))
    )
    missing = wanted - sum(amounts)
    if missing:
        empty = [0 if weight else top for top, weight in zip(uppers, weights, strict=True)]
        amounts = [*map(sum, zip(amounts, _filled(empty, empty, missing), strict=True))]
    return tuple(amounts), total_nanousd - wanted


def report_lines(
    usage: Iterable[ReportedUsage], costs: Iterable[ReportedCost], catalog: Catalog
) -> tuple[ReportLine, ...]:
    """The report by day, model and workspace: dated names of a model are one with its id, tiers are summed.

    Web searches stand in the cost report without a model. They are put to the models by their number, and what their
    cost is more or less than that goes with the rest to a line of its own, with no model.
    """
    sums: dict[tuple[int, str, str], _Sum] = {}
    rest: dict[tuple[int, str], _Sum] = {}
    for row in usage:
        searches_nanousd = row.web_search_requests * catalog.web_search_nanousd
        found = sums.setdefault((row.day, model_id(row.model, catalog), row.workspace), _Sum())
        found.usage(row)
        if row.service_tier.startswith("priority"):
            found.nanousd += _at_list_price(row, catalog) + searches_nanousd
        else:
            found.nanousd += searches_nanousd
            if row.web_search_requests:
                rest.setdefault((row.day, row.workspace), _Sum()).nanousd -= searches_nanousd
    for cost in costs:
        if cost.model:
            sums.setdefault((cost.day, model_id(cost.model, catalog), cost.workspace), _Sum()).cost(cost)
        else:
            rest.setdefault((cost.day, cost.workspace), _Sum()).cost(cost)
    lines = [
        ReportLine(
            day,
            model,
            workspace,
            found.nanousd,
            found.batch_nanousd,
            found.tokens,
            found.wrong_prices(day, model, catalog, fast=False),
            found.wrong_prices(day, model, catalog, fast=True),
        )
        for (day, model, workspace), found in sums.items()
    ]
    for (day, workspace), found in rest.items():
        if found.nanousd:
            lines.append(ReportLine(day, "", workspace, found.nanousd, others=tuple(sorted(found.described))))
    return tuple(lines)


def model_id(name: str, catalog: Catalog) -> str:
    """The id of the model of this name or dated alias; a name that the catalogue does not know stays."""
    model = catalog.resolve(name)
    return name if model is None else model.id


class _Sum:
    """A line of the report while it is added up."""

    __slots__ = ("batch_nanousd", "costs", "described", "nanousd", "tokens", "tokens_by", "us")

    def __init__(self) -> None:
        self.nanousd = self.batch_nanousd = 0
        self.tokens = Tokens()
        self.tokens_by: dict[str, Tokens] = {}
        self.costs: dict[tuple[str, str], int] = {}
        self.described: set[str] = set()
        self.us = False

    def usage(self, row: ReportedUsage) -> None:
        tokens = Tokens(*(getattr(row, name) for name in Tokens.__struct_fields__))
        self.tokens += tokens
        self.tokens_by[row.service_tier] = self.tokens_by.get(row.service_tier, Tokens()) + tokens
        self.us = self.us or row.inference_geo not in ("global", "not_available")

    def cost(self, row: ReportedCost) -> None:
        self.nanousd += row.nanousd
        if row.service_tier == "batch":
            self.batch_nanousd += row.nanousd
        self.described.add(row.cost_type.replace("_", " ") or row.description or "other")
        kind = (row.service_tier or "standard", row.token_type)
        self.costs[kind] = self.costs.get(kind, 0) + row.nanousd

    def wrong_prices(self, day: int, model: str, catalog: Catalog, *, fast: bool) -> tuple[str, ...]:
        """Prices that are outside of what the catalogue has for the day: between the shortest and longest prompts."""
        low = catalog.price_row(model, day * DAY_NS)
        highs = [catalog.price_row(model, day * DAY_NS, "standard", _LONGEST_PROMPT)]
        fastest = catalog.price_row(model, day * DAY_NS, "fast", _LONGEST_PROMPT)
        if fast and not fastest.assumed:
            highs.append(fastest)
        said: list[str] = []
        for (tier, token_type), nanousd in sorted(self.costs.items()):
            tokens_name, price_name, word = _PRICE_FIELD.get(token_type, ("", "", ""))
            tokens = getattr(self.tokens_by.get(tier, Tokens()), tokens_name, 0)
            if tier not in ("standard", "batch") or not tokens:
                continue
            batch, scale = tier == "batch", catalog.factor_scale
            floor = Fraction(getattr(low, price_name) * catalog.factors[False][batch], scale)
            us = self.us and low.us_multiplier
            ceiling = max(Fraction(getattr(row, price_name) * catalog.factors[us][batch], scale) for row in highs)
            each = Fraction(nanousd, tokens)
            if not floor * (1 - PRICE_TOLERANCE) <= each <= ceiling * (1 + PRICE_TOLERANCE):
                of = f"{word} of batches" if batch else word
                known = f"${float(floor) / 1000:.4f} in the catalogue"
                if low.assumed:
                    known = f"and ${float(floor) / 1000:.4f} was assumed: the catalogue does not know the model"
                said.append(f"{of} costs ${float(each) / 1000:.4f} a million in the report, {known}")
        return tuple(said)


def _at_list_price(row: ReportedUsage, catalog: Catalog) -> int:
    """Tokens at the catalogue's price of the day, for prompts of the lowest band."""
    price = catalog.price_row(row.model, row.day * DAY_NS)
    factor = catalog.factors[row.inference_geo == "us" and price.us_multiplier][False]
    scaled = factor * sum(getattr(row, tokens) * getattr(price, each) for tokens, each, _ in _PRICE_FIELD.values())
    return int(scaled // catalog.factor_scale)


def _compared(ours: LedgerLine, theirs: ReportLine, *, told: bool) -> Line:
    estimated_nanousd = sum(one.estimated_nanousd for one in ours.estimates)
    ledger_nanousd = ours.settled_nanousd + estimated_nanousd
    amounts, rest_nanousd = distribute(ours.estimates, theirs.nanousd - ours.settled_nanousd)
    prices = theirs.fast_prices if ours.fast else theirs.prices
    explained = told and bool(ours.estimates) and _agrees(theirs.nanousd - rest_nanousd, theirs.nanousd) and not prices
    if not explained:
        amounts = tuple(one.estimated_nanousd for one in ours.estimates)
    corrected_nanousd = ours.settled_nanousd + sum(amounts)
    ledger_tokens = ours.settled + ours.estimated
    return Line(
        day=ours.day,
        model=ours.model,
        workspace=theirs.workspace or DEFAULT_WORKSPACE,
        ledger_nanousd=ledger_nanousd,
        reported_nanousd=theirs.nanousd,
        corrected_nanousd=corrected_nanousd,
        ledger_tokens=ledger_tokens,
        reported_tokens=theirs.tokens,
        estimated_attempts=len(ours.estimates),
        cause=_cause(ours, theirs, prices, explained=explained, ledger_nanousd=ledger_nanousd),
        agrees=_agrees(corrected_nanousd, theirs.nanousd),
        corrections=tuple(
            Correction(one.call_id, one.number, one.cost_nanousd, one.estimated_nanousd, amount)
            for one, amount in zip(ours.estimates, amounts, strict=True)
            if amount != one.cost_nanousd
        ),
    )


def _agrees(ledger_nanousd: int, reported_nanousd: int) -> bool:
    gap_nanousd = abs(reported_nanousd - ledger_nanousd)
    # Of a report of nothing, 1 % is nothing.
    return gap_nanousd <= TOLERANCE_NANOUSD and gap_nanousd <= TOLERANCE_SHARE * reported_nanousd


def _cause(ours: LedgerLine, theirs: ReportLine, prices: Sequence[str], *, explained: bool, ledger_nanousd: int) -> str:
    """Why the two differ, most certain first."""
    gap_nanousd = theirs.nanousd - ledger_nanousd
    count = len(ours.estimates)
    estimates = f"{count:,} estimated attempt{'' if count == 1 else 's'} that day"
    if not ours.model:
        return f"{', '.join(theirs.others) or 'web search'}: not in the ledger"
    if prices:
        return f"price differs: {'; '.join(prices)}. See `headgate prices`, and reprice"
    if explained and gap_nanousd:
        return estimates
    if _agrees(ledger_nanousd, theirs.nanousd):
        return ""
    batches_nanousd = theirs.batch_nanousd - ours.batch_nanousd
    if batches_nanousd and _agrees(ledger_nanousd + batches_nanousd, theirs.nanousd):
        return f"batches: the report has {_usd(theirs.batch_nanousd)} for them, the ledger {_usd(ours.batch_nanousd)}"
    if gap_nanousd > 0:
        known = (
            f"the report has more than the ledger, even with its {estimates} at their most"
            if count
            else ("the report has more than the ledger")
        )
        return f"calls that did not go through this gateway: {known}"
    if not theirs.nanousd:
        return "ledger has more: the report has nothing; it may be late, or this is another workspace's key"
    return "ledger has more: the report is late, or a call ran over midnight, or a price of the ledger is too high"


def _usd(nanousd: int) -> str:
    return f"${nanousd / 1_000_000_000:,.4f}"


def _filled(weights: Sequence[int], uppers: Sequence[int], total: int) -> list[int]:
    """`total` in proportion to the weights, none above its bound; `total` is at most the bounds of those with a weight.

    Whoever reaches the bound first (the least room for the weight) is taken out, until the rest can keep its
    proportion.
    """
    amounts = [0] * len(weights)
    order = sorted(
        (at for at, weight in enumerate(weights) if weight), key=lambda at: Fraction(uppers[at], weights[at])
    )
    weight_left = sum(weights)
    for done, at in enumerate(order):
        if uppers[at] * weight_left > total * weights[at]:
            parts = {one: divmod(total * weights[one], weight_left) for one in order[done:]}
            for one, (whole, _) in parts.items():
                amounts[one] = whole
            over = total - sum(whole for whole, _ in parts.values())
            # `over` is below the number of parts that are not whole, and those have room for one more.
            for one in sorted(parts, key=lambda one: (-parts[one][1], one))[:over]:
                amounts[one] += 1
            break
        amounts[at] = uppers[at]
        total -= uppers[at]
        weight_left -= weights[at]
    return amounts
