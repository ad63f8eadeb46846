"""The catalogue: what the packaged file says, how a price is found, and which files are refused."""

from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.wire.catalog import DAY_NS, CatalogError, day_start_ns, load_catalog, packaged

CATALOG = packaged()
TODAY_NS = day_start_ns(date(2026, 11, 22))

# Written by hand from Anthropic's price list of 2026-11-22, USD per million tokens:
# id, speed, prompt tokens, input, 5m write, 1h write, read, output.
LINE_UP = """
claude-fable-5-2           standard 1       8    10    16   0.20 40
claude-fable-5-2           fast     1       16   20    32   0.40 80
claude-mythos-5-2          standard 1       8    10    16   0.20 40
claude-mythos-5-2          fast     1       16   20    32   0.40 80
claude-opus-5-5            standard 1       4    5     8    0.20 20
claude-opus-5-5            fast     1       8    10    16   0.40 40
claude-sonnet-5-5          standard 1       2    2.50  4    0.10 10
claude-haiku-5-5           standard 1       0.10 0.125 0.20 0.01 0.50
claude-haiku-5-5           standard 100000  0.10 0.125 0.20 0.01 0.50
claude-haiku-5-5           standard 100001  0.50 0.625 1.00 0.05 2.50
claude-fable-5-1           standard 1       10   12.5  20   0.25 50
claude-mythos-5-1          standard 1       10   12.5  20   0.25 50
claude-fable-5             standard 1       10   12.5  20   1.00 50
claude-mythos-5            standard 1       10   12.5  20   1.00 50
claude-opus-5              standard 1       5    6.25  10   0.50 25
claude-opus-5              fast     1       10   12.50 20   1.00 50
claude-opus-4-8            standard 1       5    6.25  10   0.50 25
claude-opus-4-8            fast     1       10   12.50 20   1.00 50
claude-opus-4-7            standard 1       5    6.25  10   0.50 25
claude-opus-4-6            standard 1       5    6.25  10   0.50 25
claude-opus-4-6            standard 900000  5    6.25  10   0.50 25
claude-opus-4-5-20251101   standard 1       5    6.25  10   0.50 25
claude-sonnet-5            standard 1       2    2.50  4    0.20 10
claude-sonnet-4-6          standard 1       3    3.75  6    0.30 15
claude-sonnet-4-6          standard 900000  3    3.75  6    0.30 15
claude-sonnet-4-5-20250929 standard 1       3    3.75  6    0.30 15
claude-haiku-4-5-20251001  standard 1       1    1.25  2    0.10 5
"""

# Written by hand: id, thinking, default thinking, prefill, sampling, forced tools, default effort, rate class, minimum.
ACCEPTED = """
claude-fable-5-2           adaptive                  adaptive no  none no  high   fable-5    512
claude-fable-5-1           adaptive                  adaptive no  none no  high   fable-5    512
claude-fable-5             adaptive                  adaptive no  none yes high   fable-5    512
claude-opus-5-5            adaptive                  adaptive no  none no  medium opus-5-5   512
claude-opus-5              adaptive,disabled         adaptive no  none yes high   opus-5     512
claude-opus-4-8            adaptive,disabled         disabled no  none yes high   opus-4     1024
claude-opus-4-7            adaptive,disabled         disabled no  none yes high   opus-4     2048
claude-opus-4-6            adaptive,disabled,enabled disabled no  any  yes high   opus-4     4096
claude-opus-4-5            disabled,enabled          disabled yes any  yes high   opus-4     4096
claude-sonnet-5-5          adaptive,between_tools    adaptive no  none no  high   sonnet-5-5 512
claude-sonnet-5            adaptive,disabled         adaptive no  none yes high   sonnet-5   1024
claude-sonnet-4-6          adaptive,disabled,enabled disabled no  any  yes high   sonnet-4   1024
claude-sonnet-4-5          disabled,enabled          disabled yes any  yes -      sonnet-4   1024
claude-haiku-5-5           adaptive                  adaptive no  none yes medium haiku-5-5  512
claude-haiku-4-5           disabled,enabled          disabled yes one  yes -      haiku-4-5  4096
"""

PRICE_IDS = """
claude-fable-5-2/2026-11-09/standard/0 claude-fable-5-2/2026-11-09/fast/0
claude-mythos-5-2/2026-11-09/standard/0 claude-mythos-5-2/2026-11-09/fast/0
claude-opus-5-5/2026-09-22/standard/0 claude-opus-5-5/2026-09-22/fast/0
claude-sonnet-5-5/2026-09-28/standard/0 claude-sonnet-5-5/2026-10-07/standard/0
claude-haiku-5-5/2026-10-07/standard/0 claude-haiku-5-5/2026-10-07/standard/100000
claude-fable-5-1/2026-09-01/standard/0 claude-mythos-5-1/2026-09-01/standard/0
claude-fable-5/2026-06-09/standard/0 claude-mythos-5/2026-06-09/standard/0
claude-opus-5/2026-07-24/standard/0 claude-opus-5/2026-07-24/fast/0
claude-opus-4-8/2026-05-28/standard/0 claude-opus-4-8/2026-05-28/fast/0
claude-opus-4-7/2026-04-16/standard/0
claude-opus-4-6/2026-02-05/standard/0 claude-opus-4-6/2026-02-05/standard/200000
claude-opus-4-5-20251101/2025-11-24/standard/0
claude-sonnet-5/2026-06-30/standard/0
claude-sonnet-4-6/2026-02-17/standard/0 claude-sonnet-4-6/2026-02-17/standard/200000
claude-haiku-4-5-20251001/2025-10-15/standard/0
claude-sonnet-4-5-20250929/2025-09-29/standard/0 claude-sonnet-4-5-20250929/2025-09-29/standard/200000
claude-opus-4-1-20250805/2025-08-05/standard/0
claude-opus-4-20250514/2025-05-14/standard/0
claude-sonnet-4-20250514/2025-05-14/standard/0
claude-3-5-haiku-20241022/2024-10-22/standard/0
"""

SMALL = """
as_of = 2026-11-22
[modifiers]
batch = 0.5
us_inference = 1.1
[server_tools]
web_search_per_1000_usd = 10.0
source = "docs"
[sources.docs]
as_of = 2026-11-22
title = "Pricing"
url = "https://platform.claude.com/docs/en/about-claude/pricing"
verified = true
[[model]]
id = "claude-one"
aliases = ["claude-first"]
line = "haiku"
rate_class = "one"
status = "active"
released = 2026-01-01
context_tokens = 200_000
max_output_tokens = 64_000
cache_min_tokens = 512
tokenizer = "opus-4.7"
us_multiplier = true
source = "docs"
unverified = ["rate_class"]
thinking = ["adaptive"]
thinking_default = "adaptive"
prefill = false
sampling = "none"
forced_tool_choice = true
efforts = ["low", "high"]
effort_default = "high"
price = [
  { effective_from = 2026-01-01, effective_to = 2026-06-01, speed = "standard", prompt_over = 0, input = 1, cache_write_5m = 1.25, cache_write_1h = 2, cache_read = 0.1, output = 5, source = "docs" },
  { effective_from = 2026-06-01, speed = "standard", prompt_over = 0, input = 2, cache_write_5m = 2.5, cache_write_1h = 4, cache_read = 0.2, output = 10, source = "docs" },
  { effective_from = 2026-06-01, speed = "standard", prompt_over = 1000, input = 3, cache_write_5m = 3.75, cache_write_1h = 6, cache_read = 0.3, output = 15, source = "docs" },
]
"""  # noqa: E501


def nanousd_per_token(usd_per_mtok: str) -> Decimal:
    return Decimal(usd_per_mtok) / 1_000_000 * 1_000_000_000


@pytest.mark.parametrize("line", LINE_UP.strip().splitlines())
def test_every_price_of_the_line_up_is_the_published_one(line: str) -> None:
    model_id, speed, prompt_tokens, *published = line.split()
    row = CATALOG.price_row(model_id, TODAY_NS, speed, int(prompt_tokens))
    assert not row.assumed
    assert [
        row.input_nanousd,
        row.cache_write_5m_nanousd,
        row.cache_write_1h_nanousd,
        row.cache_read_nanousd,
        row.output_nanousd,
    ] == [nanousd_per_token(usd) for usd in published]


def test_the_table_above_leaves_out_no_model_that_can_be_called() -> None:
    listed = {line.split()[0] for line in LINE_UP.strip().splitlines()}
    assert listed == {model.id for model in CATALOG.models if model.status != "retired"}


def test_price_ids_are_stable() -> None:
    ids = [
        f"{model.id}/{row.effective_from}/{row.speed}/{row.prompt_over}"
        for model in CATALOG.models
        for row in model.prices
    ]
    assert ids == PRICE_IDS.split()
    for model in CATALOG.models:
        for row in model.prices:
            price = CATALOG.price_row(model.id, day_start_ns(row.effective_from), row.speed, row.prompt_over + 1)
            assert price.id in ids
            assert price.id.endswith(f"/{row.prompt_over}")


def test_every_cache_write_costs_the_published_multiple_of_its_input() -> None:
    for model in CATALOG.models:
        for row in model.prices:
            assert row.cache_write_5m == row.input * Decimal("1.25"), (model.id, row)
            assert row.cache_write_1h == row.input * 2, (model.id, row)


@pytest.mark.parametrize("line", ACCEPTED.strip().splitlines())
def test_every_model_accepts_what_the_docs_say(line: str) -> None:
    model_id, thinking, default, prefill, sampling, forced, effort, rate_class, cache_min_tokens = line.split()
    model = CATALOG.resolve(model_id)
    assert model is not None
    assert ",".join(model.thinking) == thinking
    assert model.thinking_default == default
    assert model.prefill is (prefill == "yes")
    assert model.sampling == sampling
    assert model.forced_tool_choice is (forced == "yes")
    assert (model.effort_default or "-") == effort
    assert model.rate_class == rate_class
    assert model.cache_min_tokens == int(cache_min_tokens)


def test_every_fact_names_a_source_and_third_parties_are_not_called_verified() -> None:
    third_party = {name for name, source in CATALOG.sources.items() if not source.verified}
    assert third_party == {"genai-prices"}
    rows = [
        (model.id, row.prompt_over) for model in CATALOG.models for row in model.prices if row.source in third_party
    ]
    assert rows == [
        ("claude-opus-4-6", 200_000),
        ("claude-sonnet-4-6", 200_000),
        ("claude-sonnet-4-5-20250929", 200_000),
    ]


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("claude-haiku-4-5", "claude-haiku-4-5-20251001"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5-20251001"),
        ("claude-opus-4-0", "claude-opus-4-20250514"),
        ("claude-3-5-haiku-latest", "claude-3-5-haiku-20241022"),
        ("claude-sonnet-4-6", "claude-sonnet-4-6"),
    ],
)
def test_an_alias_and_the_dated_id_an_answer_reports_are_one_model(name: str, model_id: str) -> None:
    model = CATALOG.resolve(name)
    assert model is not None
    assert model.id == model_id
    assert CATALOG.price_row(name, TODAY_NS) is CATALOG.price_row(model_id, TODAY_NS)


@pytest.mark.parametrize("name", ["", "claude", "claude-sonnet-4-6-20260217", "CLAUDE-SONNET-4-6", "gpt-5"])
def test_an_id_that_is_not_in_the_catalogue_is_nobody(name: str) -> None:
    assert CATALOG.resolve(name) is None
    assert CATALOG.price_row(name, TODAY_NS).assumed


def test_a_price_changes_at_midnight_utc_to_the_nanosecond() -> None:
    midnight_ns = day_start_ns(date(2026, 10, 7))
    assert midnight_ns == 1_791_331_200 * 1_000_000_000
    assert CATALOG.price_row("claude-sonnet-5-5", midnight_ns - 1).cache_read_nanousd == 200
    assert CATALOG.price_row("claude-sonnet-5-5", midnight_ns).cache_read_nanousd == 100


def test_a_band_begins_above_its_threshold_and_a_prompt_of_nothing_has_the_lowest() -> None:
    row_ids = [
        CATALOG.price_row("claude-haiku-5-5", TODAY_NS, "standard", tokens).id.rpartition("/")[2]
        for tokens in (0, 1, 100_000, 100_001, 1_000_000)
    ]
    assert row_ids == ["0", "0", "0", "100000", "100000"]


def test_a_model_we_do_not_know_has_the_dearest_price_of_its_day_and_says_so() -> None:
    today = CATALOG.price_row("claude-next", TODAY_NS)
    assert today.id == "assumed/claude-fable-5/2026-06-09/standard/0"
    assert (today.input_nanousd, today.cache_read_nanousd, today.output_nanousd) == (10_000, 1_000, 50_000)
    assert today.assumed
    assert today.us_multiplier
    spring = CATALOG.price_row("claude-next", day_start_ns(date(2026, 4, 1)))
    assert spring.id == "assumed/claude-opus-4-1-20250805/2025-08-05/standard/0"


def test_a_retired_model_is_no_longer_the_dearest_but_keeps_its_price() -> None:
    retired_ns = day_start_ns(date(2026, 8, 5))
    assert "claude-opus-4-1" in CATALOG.price_row("claude-next", retired_ns - 1).id
    assert "claude-fable-5" in CATALOG.price_row("claude-next", retired_ns).id
    assert CATALOG.price_row("claude-opus-4-1", retired_ns).output_nanousd == 75_000


def test_a_speed_that_is_not_sold_has_the_dearest_row_of_any_speed() -> None:
    dearest = "assumed/claude-fable-5-2/2026-11-09/fast/0"
    assert CATALOG.price_row("claude-haiku-5-5", TODAY_NS, "fast").id == dearest
    assert CATALOG.price_row("claude-opus-5-5", TODAY_NS, "ludicrous").id == dearest
    last_ns = day_start_ns(date(2026, 11, 30)) - 1
    assert CATALOG.price_row("claude-opus-4-8", last_ns, "fast").id == "claude-opus-4-8/2026-05-28/fast/0"
    assert CATALOG.price_row("claude-opus-4-8", last_ns + 1, "fast").id == dearest


@pytest.mark.parametrize("at_ns", [0, 1, day_start_ns(date(2024, 10, 22)) - 1])
def test_a_clock_before_every_price_still_finds_one(at_ns: int) -> None:
    row = CATALOG.price_row("claude-sonnet-4-6", at_ns)
    assert row.id == "assumed/claude-3-5-haiku-20241022/2024-10-22/standard/0"
    assert row.assumed


def test_after_the_last_model_retires_the_last_dearest_price_stands() -> None:
    catalog = load_catalog(
        SMALL.replace("released = 2026-01-01", "released = 2026-01-01\nretires_at = 2026-07-01").encode()
    )
    row = catalog.price_row("claude-two", day_start_ns(date(2027, 1, 1)))
    assert row.id == "assumed/claude-one/2026-06-01/standard/1000"


def test_modifiers_are_whole_parts_of_one_scale() -> None:
    assert CATALOG.factor_scale == 20
    assert CATALOG.factors == ((20, 10), (22, 11))
    assert CATALOG.web_search_nanousd == 10_000_000


def test_the_small_catalogue_of_the_tests_is_in_order() -> None:
    catalog = load_catalog(SMALL.encode())
    assert catalog.price_row("claude-first", day_start_ns(date(2026, 6, 1)) - DAY_NS).input_nanousd == 1_000


@pytest.mark.parametrize(
    ("was", "becomes", "complaint"),
    [
        ("batch = 0.5", "batch = 0.5\nfast = 2.0", "unknown field `fast`"),
        ("status =", "colour = 'red'\nstatus =", "unknown field `colour`"),
        ('output = 5, source = "docs"', "output = 5", "missing required field `source`"),
        ("status = \"active\"", "status = \"alive\"", "Invalid enum value 'alive'"),
        ("status = \"active\"", "status = \"retired\"", "retired without retires_at"),
        ("released = 2026-01-01", "released = 2026-01-01\nretires_at = 2026-01-01", "before its release"),
        ("input = 1,", "input = -1,", "a price of -1 USD"),
        ("input = 1,", "input = 0,", "a price of 0 USD"),
        ("input = 1,", "input = nan,", "a price of NaN USD"),
        ("input = 1,", "input = inf,", "a price of Infinity USD"),
        ("input = 1,", "input = 1e9,", "a price of 1E"),
        ("input = 1,", "input = 0.0001,", "not a whole number of nano-dollars"),
        ("input = 1,", "input = 'one',", "Invalid decimal"),
        ("input = 3,", "input = 1.999,", "input is cheaper than for a shorter prompt"),
        ("prompt_over = 1000", "prompt_over = 0", "overlaps claude-one/2026-06-01/standard/0"),
        ("prompt_over = 1000", "prompt_over = -1", "prompt_over is below 0"),
        ("effective_to = 2026-06-01", "effective_to = 2026-06-02", "overlaps claude-one/2026-06-01/standard/0"),
        ("effective_to = 2026-06-01", "effective_to = 2026-05-31", "no standard price from 2026-05-31 to 2026-06-01"),
        ("effective_to = 2026-06-01", "effective_to = 2026-01-01", "before it began"),
        ("released = 2026-01-01", "released = 2025-12-31", "no standard price from its release on 2025-12-31"),
        ("output = 10,", "output = 10, effective_to = 2026-12-01,", "no standard price from 2026-12-01 on"),
        ('output = 15, source = "docs"', 'output = 15, source = "rumour"', "source 'rumour' is not in"),
        ('us_multiplier = true\nsource = "docs"', 'us_multiplier = true\nsource = "hope"', "source 'hope' is not in"),
        ('1000_usd = 10.0\nsource = "docs"', '1000_usd = 10.0\nsource = "guess"', "source 'guess' is not in"),
        ('unverified = ["rate_class"]', 'unverified = ["colour"]', "'colour', which is no fact"),
        ('aliases = ["claude-first"]', 'aliases = ["claude-one"]', "claude-one: two models"),
        ('thinking_default = "adaptive"', 'thinking_default = "disabled"', "thinking_default 'disabled'"),
        ('effort_default = "high"', 'effort_default = "max"', "effort_default 'max'"),
        ('effort_default = "high"', "", "effort_default None"),
        ("cache_min_tokens = 512", "cache_min_tokens = 0", "cache_min_tokens is not above 0"),
        ("batch = 0.5", "batch = 0", "modifiers.batch"),
        ("us_inference = 1.1", "us_inference = 0.9", "modifiers.us_inference"),
        ("as_of = 2026-11-22\n[modifiers]", "[modifiers]", "missing required field `as_of`"),
        ("[modifiers]", "[modifiers", "catalogue: "),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_place_and_the_reason(was: str, becomes: str, complaint: str) -> None:
    assert was in SMALL
    with pytest.raises(CatalogError) as refusal:
        load_catalog(SMALL.replace(was, becomes, 1).encode())
    assert complaint in str(refusal.value)


def test_a_catalogue_without_a_model_is_refused() -> None:
    head, _, _ = SMALL.partition("[[model]]")
    with pytest.raises(CatalogError, match="holds no model"):
        load_catalog(("model = []\n" + head).encode())


@given(st.binary(max_size=60) | st.integers(0, len(SMALL)).map(lambda cut: SMALL[:cut].encode()))
def test_any_other_bytes_are_refused_as_a_catalogue_and_not_otherwise(data: bytes) -> None:
    try:
        load_catalog(data)
    except CatalogError:
        return
    assert data.strip() == SMALL.strip().encode()
