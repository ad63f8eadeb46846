"""What an answer cost, what caching saved on it, what a request can cost at most, and where a month is heading.

What it is: integer arithmetic over token counts and the dated prices of `wire/catalog.py`.
What it is not: a ledger, nor a budget. It reports nothing: a caller that sees `Cost.assumed` says so, once a model.

Money is whole nano-dollars. Prices are whole nano-dollars a token, but modifiers are not (half, one tenth more), so a
cost is summed exactly in parts of a nano-dollar and rounded once, half to even: rounding never leans to one side, and
a million calls are off by $0.0005 at most.
"""

from __future__ import annotations

import calendar
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Literal

import msgspec

from headgate.wire.catalog import Catalog, Price
from headgate.wire.usage import IterationUsage, Usage

RATE_DAYS = 7
"""A projection's daily rate is the mean of this many days, so that it holds one weekend whatever the day."""


CacheWrites = Literal["none", "5m", "1h"]
"""The dearest write to the cache that a request can make."""


class Cost(msgspec.Struct, frozen=True, gc=False):
    """What one attempt is billed."""

    cost_nanousd: int = 0
    saved_nanousd: int = 0
    """What the same tokens would have cost had nothing been cached, minus `cost_nanousd`: exact, and negative while
    cache writes cost more than reads have brought back."""
    price_id: str = ""
    """Every price row used, in the order of the passes, joined by `+`. Empty when nothing is billed."""
    assumed: bool = False
    """True when the catalogue did not know a price and the dearest of the day stood in: tell the operator."""


UNBILLED = Cost()


class MonthProjection(msgspec.Struct, frozen=True):
    """A month's bill so far, and where it ends if the days to come are like the last ones."""

    so_far_nanousd: int
    projected_nanousd: int | None
    """None before there is one whole day to judge by: a guess from a part of a day would be noise."""
    rate_days: int
    """The number of whole days the rate is the mean of: 0 to 7."""


def price(usage: Usage, model: str, at_ns: int, catalog: Catalog, *, billable: bool = True) -> Cost:
    """The cost of one answer.

    `model` is the one the answer names (a server-side fallback changes it), `at_ns` the attempt's start in UTC
    nanoseconds. With `usage.iterations` every pass is priced on its own, in its own band, and the top level is not;
    web searches are billed beside either, at their full price also in a batch. Priority tier costs the standard price.
    `billable` is `is_billable` of the answer.
    """
    if not billable:
        return UNBILLED
    passes: Sequence[tuple[Usage | IterationUsage, Price]]
    if usage.iterations:
        passes = [(one, _pass_row(one, usage, model, at_ns, catalog)) for one in _billed_passes(usage.iterations)]
    else:
        passes = ((usage, catalog.price_row(model, at_ns, usage.speed, usage.prompt_tokens)),)
    factors, in_us, batch = catalog.factors, usage.inference_geo == "us", usage.service_tier == "batch"
    scaled = uncached_scaled = 0
    for one, row in passes:
        factor = factors[in_us and row.us_multiplier][batch]
        input_tokens, output = one.input_tokens, one.output_tokens * row.output_nanousd
        read, write_5m, write_1h = one.cache_read_tokens, one.cache_write_5m_tokens, one.cache_write_1h_tokens
        scaled += factor * (
            input_tokens * row.input_nanousd
            + read * row.cache_read_nanousd
            + write_5m * row.cache_write_5m_nanousd
            + write_1h * row.cache_write_1h_nanousd
            + output
        )
        uncached_scaled += factor * ((input_tokens + read + write_5m + write_1h) * row.input_nanousd + output)
    tokens_nanousd = _round_half_even(scaled, catalog.factor_scale)
    return Cost(
        tokens_nanousd + usage.web_search_requests * catalog.web_search_nanousd,
        _round_half_even(uncached_scaled, catalog.factor_scale) - tokens_nanousd,
        # One pass is the rule; joining one id would take a quarter of the whole calculation.
        row.id if len(passes) == 1 else "+".join(dict.fromkeys(row.id for _, row in passes)),
        row.assumed if len(passes) == 1 else any(row.assumed for _, row in passes),
    )


def is_billable(*, stop_reason: str, has_content: bool) -> bool:
    """False for a refusal before any output: it reports usage and is not billed; one in mid-stream is.

    Source: Anthropic's page on refusals and fallback, 2026-08-22. `has_content` tells whether the answer has a content
    block; of a stream, whether one was started.
    """
    return has_content or stop_reason != "refusal"


def upper_bound(
    input_tokens_max: int,
    max_tokens: int,
    model: str,
    at_ns: int,
    catalog: Catalog,
    *,
    speed: str = "standard",
    web_searches_max: int = 0,
    cache_writes: CacheWrites = "1h",
) -> int:
    """Nano-dollars that `price` cannot exceed for a prompt of at most `input_tokens_max` and an output of at most
    `max_tokens` tokens at `at_ns`, of `model` at `speed`.

    Takes all input at its dearest kind (a 1h write, at twice the plain price, unless `cache_writes` says that there can
    be none) and US inference where the model has it,
    for a workspace may ask for it by default; rounds up. It cannot know of passes that Anthropic adds on its own:
    server-side fallback, advisor, compaction and the turns of a server tool, which each read the prompt again.
    """
    row = catalog.price_row(model, at_ns, speed, input_tokens_max)
    dearest_nanousd = max(row.input_nanousd, row.cache_read_nanousd)
    if cache_writes != "none":
        dearest_nanousd = max(dearest_nanousd, row.cache_write_5m_nanousd)
    if cache_writes == "1h":
        dearest_nanousd = max(dearest_nanousd, row.cache_write_1h_nanousd)
    factor = catalog.factors[row.us_multiplier][False]
    scaled = factor * (input_tokens_max * dearest_nanousd + max_tokens * row.output_nanousd)
    return -(-scaled // catalog.factor_scale) + web_searches_max * catalog.web_search_nanousd


def project_month(daily_nanousd: Mapping[date, int], today: date) -> MonthProjection:
    """The bill of `today`'s month: what is spent, and the projection to its last day.

    `daily_nanousd` holds what each UTC day cost, days without calls left out or zero, and may reach back into last
    month (the rate then has its 7 days on the 1st, too). The rate is the mean of the last 7 whole days, or of those
    since the first day there is, when fewer. Days to come cost the rate, and today at least what it has already cost.
    """
    month = [day for day in daily_nanousd if (day.year, day.month) == (today.year, today.month) and day <= today]
    so_far_nanousd = sum(daily_nanousd[day] for day in month)
    began = min(daily_nanousd, default=today)
    rate_days = min(RATE_DAYS, max((today - began).days, 0))
    if rate_days == 0:
        return MonthProjection(so_far_nanousd, None, 0)
    recent_nanousd = sum(daily_nanousd.get(today - timedelta(days=back), 0) for back in range(1, rate_days + 1))
    today_nanousd = daily_nanousd.get(today, 0)
    days_left = calendar.monthrange(today.year, today.month)[1] - today.day
    projected_nanousd = (
        so_far_nanousd
        - today_nanousd
        + max(today_nanousd, recent_nanousd // rate_days)
        + recent_nanousd * days_left // rate_days
    )
    return MonthProjection(so_far_nanousd, projected_nanousd, rate_days)


def _billed_passes(iterations: tuple[IterationUsage, ...]) -> Sequence[IterationUsage]:
    """The passes that are billed: all but the hops a server-side fallback left behind before they put anything out.

    `fallback_message` is the last pass of an answer a fallback model served; what declined before it is a `message`
    (SDK 2.12.0 `beta_fallback_message_iteration_usage.py`). A `message` without output and without a fallback after
    it is a cache pre-warm, and is billed.
    """
    served = max((index for index, one in enumerate(iterations) if one.kind == "fallback_message"), default=-1)
    return [
        one for index, one in enumerate(iterations) if index > served or one.kind != "message" or one.output_tokens > 0
    ]


def _pass_row(one: IterationUsage, usage: Usage, model: str, at_ns: int, catalog: Catalog) -> Price:
    of_model = one.model or model
    row = catalog.price_row(of_model, at_ns, usage.speed, one.prompt_tokens)
    if row.assumed and of_model != model:
        # `speed` is told of the answer only. Another model's pass (an advisor, a hop) that is not sold at that speed
        # ran at the standard one.
        return catalog.price_row(of_model, at_ns, "standard", one.prompt_tokens)
    return row


def _round_half_even(scaled: int, scale: int) -> int:
    whole, rest = divmod(scaled, scale)
    return whole + (2 * rest > scale or (2 * rest == scale and whole % 2))
