"""The Claude models, what each accepts, and their dated prices, as `catalog.toml` states them.

What it is: the file's shape, the checks it must pass, and the two look-ups of the hot path (`resolve`, `price_row`).
What it is not: a calculation of cost (see `policy/pricing.py`), nor an opinion on which model to use.

Prices are read as decimals and kept as whole nano-dollars per token (1 USD per million tokens is 1,000 of them), so
no float ever touches money.
"""

from __future__ import annotations

import functools
import math
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from datetime import date
from decimal import Decimal
from fractions import Fraction
from importlib import resources
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

import msgspec

Effort = Literal["low", "medium", "high", "xhigh", "max"]
Thinking = Literal["adaptive", "between_tools", "disabled", "enabled"]

DAY_NS = 86_400_000_000_000
FOREVER_NS = 2**63 - 1
"""The largest instant the ledger can hold; the end of a price row that still holds."""
PRICE_USD_MAX = 1_000_000
"""Far above any price; keeps a slip of the pen from overflowing the ledger's 64-bit sums."""


class CatalogError(ValueError):
    """The catalogue's file is wrong. The message names the model and the row."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the file's tables: an unknown key is a mistake, not an extension."""


class Source(_Table, frozen=True):
    """Where facts were read. `as_of` is the day the text was of; `verified` is False for a third party's table."""

    as_of: date
    title: str
    url: str
    verified: bool


class PriceRow(_Table, frozen=True, kw_only=True):
    """One dated price, USD per million tokens, for requests that start in [effective_from, effective_to), UTC days."""

    effective_from: date
    effective_to: date | None = None
    speed: Literal["standard", "fast"]
    prompt_over: int
    """The row prices prompts (input, cache reads and writes) of more than this many tokens. 0: any prompt."""
    input: Decimal
    cache_write_5m: Decimal
    cache_write_1h: Decimal
    cache_read: Decimal
    output: Decimal
    source: str


class Model(_Table, frozen=True, kw_only=True):
    """One model: identity, life, limits, and what it accepts (claude-api §2.4, §6.2, §10)."""

    id: str
    """The id Anthropic's answers report."""
    aliases: tuple[str, ...] = ()
    line: Literal["fable", "mythos", "opus", "sonnet", "haiku"]
    rate_class: str
    """Models of one class share Anthropic's RPM, ITPM and OTPM buckets."""
    status: Literal["active", "deprecated", "retired"]
    released: date
    deprecated_at: date | None = None
    retires_at: date | None = None
    retires_not_before: date | None = None
    context_tokens: int
    max_output_tokens: int
    max_output_batch_tokens: int | None = None
    """With beta `output-300k-2026-03-24`, batches only; None where the beta does not reach."""
    cache_min_tokens: int
    """A shorter prefix is never cached, and no error says so."""
    tokenizer: Literal["pre-4.7", "opus-4.7"]
    us_multiplier: bool
    """`inference_geo: "us"` is accepted, and costs more."""
    counts_cache_reads_in_itpm: bool = False
    thinking: tuple[Thinking, ...]
    """The values of `thinking.type` that do not answer 400."""
    thinking_default: Thinking
    thinking_disabled_effort_max: Effort | None = None
    """The highest effort that `disabled` may be sent with; None where any may."""
    prefill: bool
    """The conversation may end with an assistant message."""
    sampling: Literal["none", "one", "any"]
    """Of `temperature`, `top_p`, `top_k` under version 2023-06-01: none; `temperature` or `top_p` alone; any."""
    forced_tool_choice: bool
    """`tool_choice` may be `any` or `tool`."""
    efforts: tuple[Effort, ...]
    """Accepted values of `output_config.effort`; empty: the field answers 400."""
    effort_default: Effort | None = None
    source: str
    unverified: tuple[str, ...] = ()
    """Names of fields above that no page of Anthropic was seen to state."""
    prices: tuple[PriceRow, ...] = msgspec.field(name="price")


class Modifiers(_Table, frozen=True):
    """What multiplies every token's price. They multiply one another, too."""

    batch: Decimal
    us_inference: Decimal


class ServerTools(_Table, frozen=True):
    """Fees beside tokens, which no modifier touches. Web fetch is free; code execution is not in `usage`."""

    web_search_per_1000_usd: Decimal
    source: str


class CatalogFile(_Table, frozen=True):
    """`catalog.toml` as written."""

    as_of: date
    modifiers: Modifiers
    server_tools: ServerTools
    sources: dict[str, Source]
    models: tuple[Model, ...] = msgspec.field(name="model")


class Price(msgspec.Struct, frozen=True, gc=False):
    """One price row, ready to multiply: whole nano-dollars per token."""

    id: str
    """`model/effective_from/speed/prompt_over`, as in `claude-haiku-5-5/2026-10-07/standard/100000`; stable over
    releases. An assumed price has `assumed/` before the row it was taken from."""
    input_nanousd: int
    cache_read_nanousd: int
    cache_write_5m_nanousd: int
    cache_write_1h_nanousd: int
    output_nanousd: int
    us_multiplier: bool
    assumed: bool = False
    """True when the catalogue has no price for what was asked and the dearest row of its day stands in."""


class _Span(NamedTuple):
    """Which requests a price holds for, and until when its model could be called."""

    speed: str
    prompt_tokens_min: int
    start_ns: int
    end_ns: int
    retires_ns: int
    price: Price


class Catalog:
    """The catalogue, checked and indexed. Immutable; made by `load_catalog`."""

    __slots__ = (
        "_dearest",
        "_dearest_from_ns",
        "_models",
        "_spans",
        "as_of",
        "factor_scale",
        "factors",
        "models",
        "sources",
        "web_search_nanousd",
    )

    def __init__(self, file: CatalogFile) -> None:
        _check(file)
        self.as_of: date = file.as_of
        self.sources: Mapping[str, Source] = file.sources
        self.models: tuple[Model, ...] = file.models
        """In the order of the file: current line-up first."""
        self.web_search_nanousd: int = _whole_nanousd(
            file.server_tools.web_search_per_1000_usd, tokens_or_uses=1_000, where="server_tools"
        )
        """For one search."""
        batch, us = Fraction(file.modifiers.batch), Fraction(file.modifiers.us_inference)
        self.factor_scale: int = math.lcm(batch.denominator, us.denominator, (batch * us).denominator)
        """What an amount multiplied by one of `factors` must be divided by: 20 for 0.5 and 1.1."""
        self.factors: tuple[tuple[int, int], tuple[int, int]] = (
            (self.factor_scale, int(batch * self.factor_scale)),
            (int(us * self.factor_scale), int(batch * us * self.factor_scale)),
        )
        """`factors[us][batch]`: the modifiers as whole parts of `factor_scale`."""

        self._models = {name: model for model in file.models for name in (model.id, *model.aliases)}
        spans = {model.id: sorted(_spans(model), key=lambda span: -span.prompt_tokens_min) for model in file.models}
        self._spans = {
            (name, speed): tuple(span for span in spans[model.id] if span.speed == speed)
            for name, model in self._models.items()
            for speed in {span.speed for span in spans[model.id]}
        }
        self._dearest_from_ns, self._dearest = _dearest_by_day([span for of in spans.values() for span in of])

    def resolve(self, model_id: str) -> Model | None:
        """The model of an id or alias, as a request or an answer names it. None: the catalogue does not know it."""
        return self._models.get(model_id)

    def price_row(self, model_id: str, at_ns: int, speed: str = "standard", prompt_tokens: int = 0) -> Price:
        """The price of a request that started at `at_ns` (UTC nanoseconds).

        `speed` is `usage.speed`; `prompt_tokens` is input, cache reads and cache writes together. What the catalogue
        does not know (the model, this speed of it, or this day of it) gets the dearest row of the day among models
        that could be called, with `assumed` set: of the standard rows for standard speed, of all rows for another.
        """
        # Highest band first: the first that fits is the one.
        for _, prompt_tokens_min, start_ns, end_ns, _, price in self._spans.get((model_id, speed), ()):
            if prompt_tokens >= prompt_tokens_min and start_ns <= at_ns < end_ns:
                return price
        standard, any_speed = self._dearest[max(bisect_right(self._dearest_from_ns, at_ns) - 1, 0)]
        return standard if speed == "standard" else any_speed


def load_catalog(data: bytes) -> Catalog:
    """The catalogue of a TOML file shaped as `CatalogFile`. Raises `CatalogError` and nothing else."""
    try:
        return Catalog(msgspec.convert(tomllib.loads(data.decode(), parse_float=Decimal), CatalogFile))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise CatalogError(f"catalogue: {error}") from error


@functools.cache
def packaged() -> Catalog:
    """The catalogue this release ships."""
    return load_catalog(resources.files("headgate.wire").joinpath("catalog.toml").read_bytes())


def day_start_ns(day: date) -> int:
    """00:00 UTC of `day` in nanoseconds since 1970."""
    return (day.toordinal() - date(1970, 1, 1).toordinal()) * DAY_NS


def _whole_nanousd(usd: Decimal, *, tokens_or_uses: int, where: str) -> int:
    """USD for `tokens_or_uses` of something, as nano-dollars for one. Anything but a whole positive number is refused:
    a price that needs a fraction would need another unit, not a silent rounding."""
    if not usd.is_finite() or not 0 < usd <= PRICE_USD_MAX:
        raise CatalogError(f"{where}: a price of {usd} USD is not between 0 and {PRICE_USD_MAX}")
    nanousd = Fraction(usd) * 1_000_000_000 / tokens_or_uses
    if nanousd.denominator != 1:
        raise CatalogError(f"{where}: {usd} USD for {tokens_or_uses:,} is not a whole number of nano-dollars each")
    return nanousd.numerator


def _per_token(usd_per_mtok: Decimal, where: str) -> int:
    return _whole_nanousd(usd_per_mtok, tokens_or_uses=1_000_000, where=where)


def _price_id(model: Model, row: PriceRow) -> str:
    return f"{model.id}/{row.effective_from}/{row.speed}/{row.prompt_over}"


def _start_ns(row: PriceRow) -> int:
    return day_start_ns(row.effective_from)


def _end_ns(row: PriceRow) -> int:
    return day_start_ns(row.effective_to) if row.effective_to else FOREVER_NS


def _spans(model: Model) -> Iterator[_Span]:
    retires_ns = day_start_ns(model.retires_at) if model.retires_at else FOREVER_NS
    for row in model.prices:
        where = _price_id(model, row)
        yield _Span(
            speed=row.speed,
            # The lowest band takes a prompt of no tokens, too; a higher one begins above its threshold.
            prompt_tokens_min=row.prompt_over + 1 if row.prompt_over else 0,
            start_ns=_start_ns(row),
            end_ns=_end_ns(row),
            retires_ns=retires_ns,
            price=Price(
                id=where,
                input_nanousd=_per_token(row.input, where),
                cache_read_nanousd=_per_token(row.cache_read, where),
                cache_write_5m_nanousd=_per_token(row.cache_write_5m, where),
                cache_write_1h_nanousd=_per_token(row.cache_write_1h, where),
                output_nanousd=_per_token(row.output, where),
                us_multiplier=model.us_multiplier,
            ),
        )


def _dearest_by_day(spans: list[_Span]) -> tuple[list[int], list[tuple[Price, Price]]]:
    """The instants at which the dearest row may change, and from each on the dearest standard row and row of any speed.

    A retired model's row no longer counts: nobody can be charged it. Instants before the first have the first's.
    """
    from_ns: list[int] = []
    dearest: list[tuple[Price, Price]] = []
    for at_ns in sorted({edge for span in spans for edge in (span.start_ns, span.end_ns, span.retires_ns)}):
        in_force = [span for span in spans if span.start_ns <= at_ns < min(span.end_ns, span.retires_ns)]
        standard = [span.price for span in in_force if span.speed == "standard"]
        # Nothing in force (every model retired): the dearest of before stands.
        if standard:
            from_ns.append(at_ns)
            any_speed = [span.price for span in in_force]
            dearest.append((_assume(max(standard, key=_dearness)), _assume(max(any_speed, key=_dearness))))
    return from_ns, dearest


def _dearness(price: Price) -> tuple[int, ...]:
    return (
        price.output_nanousd,
        price.input_nanousd,
        price.cache_write_1h_nanousd,
        price.cache_write_5m_nanousd,
        price.cache_read_nanousd,
    )


def _assume(price: Price) -> Price:
    # The modifier for US inference stays on: of a model we do not know, the dearer is assumed.
    return msgspec.structs.replace(price, id=f"assumed/{price.id}", us_multiplier=True, assumed=True)


def _check(file: CatalogFile) -> None:
    if not 0 < file.modifiers.batch <= 1:
        raise CatalogError(f"modifiers.batch: {file.modifiers.batch} is not above 0 and at most 1")
    if not 1 <= file.modifiers.us_inference <= 10:
        raise CatalogError(f"modifiers.us_inference: {file.modifiers.us_inference} is not between 1 and 10")
    if not file.models:
        raise CatalogError("catalogue: it holds no model")
    _check_source(file, file.server_tools.source, "server_tools")
    names: set[str] = set()
    for model in file.models:
        for name in (model.id, *model.aliases):
            if name in names:
                raise CatalogError(f"{name}: two models have this id or alias")
            names.add(name)
        _check_model(file, model)
        _check_prices(file, model)


def _check_source(file: CatalogFile, source: str, where: str) -> None:
    if source not in file.sources:
        raise CatalogError(f"{where}: source {source!r} is not in [sources]")


def _check_model(file: CatalogFile, model: Model) -> None:
    _check_source(file, model.source, model.id)
    for name in model.unverified:
        if name not in Model.__struct_fields__:
            raise CatalogError(f"{model.id}: unverified names {name!r}, which is no fact of a model")
    if model.thinking_default not in model.thinking:
        raise CatalogError(f"{model.id}: thinking_default {model.thinking_default!r} is not among thinking")
    if (model.effort_default in model.efforts) is not bool(model.efforts):
        raise CatalogError(f"{model.id}: effort_default {model.effort_default!r} is not among efforts")
    if model.status == "retired" and model.retires_at is None:
        raise CatalogError(f"{model.id}: retired without retires_at")
    if model.retires_at is not None and model.retires_at <= model.released:
        raise CatalogError(f"{model.id}: retires on {model.retires_at}, before its release")
    for name in ("context_tokens", "max_output_tokens", "cache_min_tokens"):
        if getattr(model, name) <= 0:
            raise CatalogError(f"{model.id}: {name} is not above 0")


def _check_prices(file: CatalogFile, model: Model) -> None:
    for row in model.prices:
        where = _price_id(model, row)
        _check_source(file, row.source, where)
        if row.prompt_over < 0:
            raise CatalogError(f"{where}: prompt_over is below 0")
        if row.effective_to is not None and row.effective_to <= row.effective_from:
            raise CatalogError(f"{where}: ends on {row.effective_to}, before it began")
    for one, other in combinations(model.prices, 2):
        if one.speed != other.speed or min(_end_ns(one), _end_ns(other)) <= max(_start_ns(one), _start_ns(other)):
            continue
        if one.prompt_over == other.prompt_over:
            raise CatalogError(f"{_price_id(model, one)}: overlaps {_price_id(model, other)}")
        low, high = sorted((one, other), key=lambda row: row.prompt_over)
        # Reservations rely on it: the row of the longest prompt bounds the cost of every shorter one.
        for kind in ("input", "cache_write_5m", "cache_write_1h", "cache_read", "output"):
            if getattr(high, kind) < getattr(low, kind):
                raise CatalogError(f"{_price_id(model, high)}: {kind} is cheaper than for a shorter prompt")
    standard = sorted((row for row in model.prices if row.speed == "standard" and row.prompt_over == 0), key=_start_ns)
    if not standard or standard[0].effective_from > model.released:
        raise CatalogError(f"{model.id}: no standard price from its release on {model.released}")
    for before, after in pairwise(standard):
        if before.effective_to != after.effective_from:
            raise CatalogError(f"{model.id}: no standard price from {before.effective_to} to {after.effective_from}")
    if standard[-1].effective_to is not None:
        raise CatalogError(f"{model.id}: no standard price from {standard[-1].effective_to} on")
