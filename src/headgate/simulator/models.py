"""The models of the simulated API: what each accepts, how fast it is and what it costs. Read from models.toml, beside
this file.

Says nothing about a request and bills nothing: `validate` and `bill` use these facts.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from importlib.resources import files
from typing import Any, Literal, cast

Tokenizer = Literal["old", "new"]
"""`new` since Claude 4.7: about 30 % more tokens for the same text (docs: token counting)."""

PICOUSD_PER_USD = 10**12
TOKENS_PER_PRICE = 10**6


@dataclass(frozen=True, slots=True)
class Price:
    """What a token costs, in pico-dollars (10^-12 USD), while the row holds."""

    valid_from: date
    valid_to: date | None
    """Exclusive; None while the row is the current one."""
    speed: str
    prompt_over_tokens: int
    """The row holds for prompts longer than this (input + cache reads + cache writes)."""
    input_picousd: int
    write_5m_picousd: int
    write_1h_picousd: int
    read_picousd: int
    output_picousd: int


@dataclass(frozen=True, slots=True)
class Model:
    """One row of the catalogue."""

    id: str
    aliases: tuple[str, ...]
    display_name: str
    line: str
    rate_class: str
    """Models of one class share one set of rate-limit buckets."""
    lifecycle: Literal["active", "deprecated", "retired"]
    released: date
    deprecated_at: date | None
    retires_at: date | None
    context_tokens: int
    output_tokens_max: int
    batch_output_tokens_max: int
    """With the 300K-output beta, in batches only; else equal to `output_tokens_max`."""
    cache_min_tokens: int
    tokenizer: Tokenizer
    us: bool
    """Accepts `inference_geo`, and charges `us` 1.1 times."""
    reads_count: bool
    """Whether cache reads count against the input-token limit (Haiku 3.5 alone)."""
    thinking: tuple[str, ...]
    thinking_default: Literal["off", "adaptive"]
    thinking_display: Literal["omitted", "summarized"]
    disabled_effort_max: str | None
    """The highest effort at which `thinking: disabled` is accepted; None for no such rule."""
    binding: bool
    """Whether thinking blocks that come back are bound to the conversation before them."""
    prefill: bool
    sampling: bool
    forced_tools: bool
    effort: tuple[str, ...]
    default_effort: str
    tool_tokens: tuple[int, int]
    """Hidden system prompt when tools are present: for `auto`/`none`, for `any`/`tool`."""
    base_s: float
    prefill_tps: int
    cached_tps: int
    output_tps: int
    prices: tuple[Price, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a request may use for it."""
        return (self.id, *self.aliases)

    @property
    def fast(self) -> bool:
        """Whether the model has ever had a fast mode."""
        return any(price.speed == "fast" for price in self.prices)


@dataclass(frozen=True, slots=True)
class Modifiers:
    """Factors over the token prices, exact."""

    batch: Decimal
    us_inference: Decimal
    web_search_picousd: int


class Catalogue:
    """Every model, found by id or alias."""

    def __init__(self, models: tuple[Model, ...], modifiers: Modifiers) -> None:
        self.models = models
        self.modifiers = modifiers
        self._by_name = {name: model for model in models for name in model.names}

    def find(self, name: str) -> Model | None:
        """The model of that id or alias, retired ones included; None if there is none."""
        return self._by_name.get(name)


def load_catalogue() -> Catalogue:
    """The catalogue shipped with the package. A wrong row raises KeyError or TypeError at start."""
    text = files(__package__).joinpath("models.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text, parse_float=Decimal)
    modifiers = document["modifiers"]
    return Catalogue(
        tuple(_model(row) for row in document["model"]),
        Modifiers(
            batch=Decimal(modifiers["batch"]),
            us_inference=Decimal(modifiers["us_inference"]),
            web_search_picousd=_picousd(modifiers["web_search_usd"]),
        ),
    )


def _model(row: Mapping[str, Any]) -> Model:  # Any: a TOML table; the constructor below gives each key its type
    return Model(
        id=row["id"],
        aliases=tuple(row["aliases"]),
        display_name=row["display_name"],
        line=row["line"],
        rate_class=row["class"],
        lifecycle=row["lifecycle"],
        released=row["released"],
        deprecated_at=row.get("deprecated_at"),
        retires_at=row.get("retires_at"),
        context_tokens=row["context"],
        output_tokens_max=row["max_output"],
        batch_output_tokens_max=row.get("max_output_batch", row["max_output"]),
        cache_min_tokens=row["cache_min_tokens"],
        tokenizer=row["tokenizer"],
        us=row["us"],
        reads_count=row.get("reads_count", False),
        thinking=tuple(row["thinking"]),
        thinking_default=row["thinking_default"],
        thinking_display=row["thinking_display"],
        disabled_effort_max=row.get("disabled_effort_max"),
        binding=row["binding"],
        prefill=row["prefill"],
        sampling=row["sampling"],
        forced_tools=row["forced_tools"],
        effort=tuple(row["effort"]),
        default_effort=row["default_effort"],
        tool_tokens=cast(tuple[int, int], tuple(row["tool_tokens"])),
        base_s=float(row["base_s"]),
        prefill_tps=row["prefill_tps"],
        cached_tps=row["cached_tps"],
        output_tps=row["output_tps"],
        prices=tuple(_price(price) for price in row["price"]),
    )


def _price(row: Mapping[str, Any]) -> Price:  # Any: as above
    return Price(
        valid_from=row["from"],
        valid_to=row.get("to"),
        speed=row["speed"],
        prompt_over_tokens=row["over"],
        input_picousd=_picousd(row["input"]) // TOKENS_PER_PRICE,
        write_5m_picousd=_picousd(row["write_5m"]) // TOKENS_PER_PRICE,
        write_1h_picousd=_picousd(row["write_1h"]) // TOKENS_PER_PRICE,
        read_picousd=_picousd(row["read"]) // TOKENS_PER_PRICE,
        output_picousd=_picousd(row["output"]) // TOKENS_PER_PRICE,
    )


def _picousd(usd: Decimal) -> int:
    """Exact: every published price is a whole number of pico-dollars a token."""
    picousd = Decimal(usd) * PICOUSD_PER_USD
    assert picousd == int(picousd), usd
    return int(picousd)
