"""The comparison of ledger and report: how a difference is distributed, and what a gap is said to come from."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.reconciliation import (
    Estimate,
    LedgerLine,
    Line,
    ReportLine,
    Tokens,
    compare,
    distribute,
    report_lines,
)
from headgate.wire.catalog import packaged
from headgate.wire.usage_report import ReportedCost, ReportedUsage

CATALOG = packaged()
DAY = 20_780
SONNET = "claude-sonnet-4-6"
DOLLAR = 10**9


def estimate(number: int, nanousd: int, upper: int | None = None, now: int | None = None) -> Estimate:
    return Estimate(
        f"call_{number}", 1, nanousd, 10 * nanousd if upper is None else upper, nanousd if now is None else now
    )


estimates = st.lists(
    st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)).map(lambda two: (two[0], two[0] + two[1])), max_size=30
).map(lambda pairs: [estimate(at, low, high) for at, (low, high) in enumerate(pairs)])


@given(estimates, st.integers(-(10**13), 10**14))
def test_amounts_and_rest_are_the_total_and_none_is_out_of_its_bounds(found: list[Estimate], total: int) -> None:
    amounts, rest = distribute(found, total)
    assert sum(amounts) + rest == total
    assert all(0 <= amount <= one.upper_nanousd for amount, one in zip(amounts, found, strict=True))
    room = sum(one.upper_nanousd for one in found)
    assert rest == (total if total < 0 else max(total - room, 0))  # nothing is left while somebody has room


@given(estimates, st.integers(0, 10**14))
def test_those_that_are_not_at_their_bound_keep_their_proportion(found: list[Estimate], total: int) -> None:
    amounts, _ = distribute(found, total)
    free = [
        (amount, one.estimated_nanousd)
        for amount, one in zip(amounts, found, strict=True)
        if one.estimated_nanousd and amount < one.upper_nanousd
    ]
    for amount, weight in free:
        for other, other_weight in free:
            # Each is within one nano-dollar of its exact part.
            assert abs(amount * other_weight - other * weight) <= weight + other_weight


def test_parts_of_a_nano_dollar_go_to_the_greatest_rest_and_then_the_first() -> None:
    assert distribute([estimate(1, 1), estimate(2, 1), estimate(3, 1)], 4) == ((2, 1, 1), 0)
    assert distribute([estimate(1, 10), estimate(2, 20)], 10) == ((3, 7), 0)


def test_who_is_at_his_bound_leaves_the_rest_to_the_others() -> None:
    assert distribute([estimate(1, 10, 12), estimate(2, 10, 100)], 60) == ((12, 48), 0)
    assert distribute([estimate(1, 10, 12), estimate(2, 0, 5)], 15) == ((12, 3), 0)
    assert distribute([estimate(1, 10, 12)], 20) == ((12,), 8)
    assert distribute([], 7) == ((), 7)


def one_line(ours: LedgerLine, theirs: ReportLine) -> Line:
    (line,) = compare([ours], [theirs], workspace=theirs.workspace)
    return line


def test_a_gap_that_estimates_can_be_is_theirs_and_nobody_elses() -> None:
    ours = LedgerLine(DAY, SONNET, 5 * DOLLAR, estimates=(estimate(1, DOLLAR), estimate(2, 3 * DOLLAR)))
    line = one_line(ours, ReportLine(DAY, SONNET, "", 10 * DOLLAR))
    assert [(one.call_id, one.after_nanousd) for one in line.corrections] == [
        ("call_1", 1_250_000_000),
        ("call_2", 3_750_000_000),
    ]
    assert (line.gap_nanousd, line.left_nanousd, line.agrees) == (DOLLAR, 0, True)
    assert line.cause == "2 estimated attempts that day"


@given(estimates, st.integers(0, 10**13), st.integers(0, 10**13), st.integers(0, 10**13))
def test_the_same_report_corrects_once_and_a_later_one_begins_anew(
    found: list[Estimate], settled: int, first: int, later: int
) -> None:
    def run(rows: list[Estimate], reported: int) -> list[Estimate]:
        line = one_line(LedgerLine(DAY, SONNET, settled, estimates=tuple(rows)), ReportLine(DAY, SONNET, "", reported))
        after = {one.call_id: one.after_nanousd for one in line.corrections}
        rows = [msgspec.structs.replace(one, cost_nanousd=after.get(one.call_id, one.cost_nanousd)) for one in rows]
        assert sum(one.cost_nanousd for one in rows) + settled == line.corrected_nanousd
        return rows

    once = run(found, first)
    assert run(once, first) == once
    assert run(once, later) == run(found, later)


def test_more_than_the_estimates_can_be_came_by_another_way_and_they_stay() -> None:
    ours = LedgerLine(DAY, SONNET, 5 * DOLLAR, estimates=(estimate(1, DOLLAR, 2 * DOLLAR, now=2 * DOLLAR),))
    line = one_line(ours, ReportLine(DAY, SONNET, "", 20 * DOLLAR))
    assert line.corrected_nanousd == 6 * DOLLAR
    assert [one.after_nanousd for one in line.corrections] == [DOLLAR]  # back to what was estimated
    assert line.cause.startswith("calls that did not go through this gateway")
    assert not line.agrees


@pytest.mark.parametrize(
    ("ours", "theirs", "cause", "agrees"),
    [
        (LedgerLine(DAY, SONNET, DOLLAR), ReportLine(DAY, SONNET, "", DOLLAR), "", True),
        (LedgerLine(DAY, SONNET, DOLLAR), ReportLine(DAY, SONNET, "", 1_010_000_000), "", True),
        (LedgerLine(DAY, SONNET, DOLLAR), ReportLine(DAY, SONNET, "", 1_020_000_000), "calls that did not", False),
        (LedgerLine(DAY, SONNET, 100 * DOLLAR), ReportLine(DAY, SONNET, "", 100_060_000_000), "calls that", False),
        (LedgerLine(DAY, SONNET, 2 * DOLLAR), ReportLine(DAY, SONNET, "", DOLLAR), "ledger has more: the rep", False),
        (LedgerLine(DAY, SONNET, DOLLAR), ReportLine(DAY, SONNET, ""), "the report has nothing", False),
        (
            LedgerLine(DAY, SONNET, DOLLAR),
            ReportLine(DAY, SONNET, "", 3 * DOLLAR, 2 * DOLLAR),
            "batches: the report has $2.0000 for them, the ledger $0.0000",
            False,
        ),
        (
            LedgerLine(DAY, ""),
            ReportLine(DAY, "", "", DOLLAR, others=("code execution",)),
            "code execution: not",
            False,
        ),
        (
            LedgerLine(DAY, SONNET, DOLLAR, estimates=(estimate(1, DOLLAR),)),
            ReportLine(DAY, SONNET, "", 3 * DOLLAR, prices=("output costs $30",)),
            "price differs: output costs $30",
            False,
        ),
    ],
)
def test_a_gap_has_a_name(ours: LedgerLine, theirs: ReportLine, cause: str, agrees: bool) -> None:
    line = one_line(ours, theirs)
    assert cause in line.cause
    assert bool(cause) == bool(line.cause)
    assert line.agrees == agrees
    assert line.corrections == ()


def test_a_report_that_is_silent_about_a_day_corrects_nothing() -> None:
    ours = LedgerLine(DAY, SONNET, estimates=(estimate(1, DOLLAR),))
    assert compare([ours], [], workspace="")[0].corrections == ()
    told = compare([ours], [ReportLine(DAY, "claude-haiku-4-5", "", DOLLAR)], workspace="")
    assert [one.after_nanousd for line in told for one in line.corrections] == [0]


def test_another_workspace_is_not_compared() -> None:
    report = [ReportLine(DAY, SONNET, "", DOLLAR), ReportLine(DAY, SONNET, "wrkspc_2", 2 * DOLLAR)]
    (line,) = compare([LedgerLine(DAY, SONNET, 2 * DOLLAR)], report, workspace="wrkspc_2")
    assert (line.workspace, line.agrees) == ("wrkspc_2", True)


def test_the_report_is_summed_by_model_with_dated_names_tiers_and_searches() -> None:
    model = next(model for model in CATALOG.models if model.aliases)
    alias = model.aliases[0]
    price = CATALOG.price_row(model.id, DAY * 86_400 * 10**9)
    usage = [
        ReportedUsage(DAY, alias, "", "standard", input_tokens=1_000, web_search_requests=3),
        ReportedUsage(DAY, model.id, "", "batch", "global", output_tokens=100),
        ReportedUsage(DAY, model.id, "", "priority", "global", output_tokens=10),
    ]
    batch_nanousd = 100 * price.output_nanousd // 2
    costs = [
        ReportedCost(DAY, "", 1_000 * price.input_nanousd, "tokens", alias, "uncached_input_tokens", "standard"),
        ReportedCost(DAY, "", batch_nanousd, "tokens", model.id, "output_tokens", "batch"),
        ReportedCost(DAY, "", 3 * CATALOG.web_search_nanousd, "web_search"),
        ReportedCost(DAY, "w", 5, "code_execution"),
    ]
    line, other = report_lines(usage, costs, CATALOG)
    assert line == ReportLine(
        DAY,
        model.id,
        "",
        1_000 * price.input_nanousd + batch_nanousd + 10 * price.output_nanousd + 3 * CATALOG.web_search_nanousd,
        batch_nanousd,
        Tokens(input_tokens=1_000, output_tokens=110, web_search_requests=3),
    )
    assert other == ReportLine(DAY, "", "w", 5, others=("code execution",))


def test_a_price_that_is_not_the_catalogues_is_named_in_dollars_a_million() -> None:
    usage = [ReportedUsage(DAY, SONNET, "", "standard", "global", output_tokens=1_000)]
    costs = [ReportedCost(DAY, "", 30_000_000, "tokens", SONNET, "output_tokens", "standard")]
    (line,) = report_lines(usage, costs, CATALOG)
    assert line.prices == ("output costs $30.0000 a million in the report, $15.0000 in the catalogue",)


def test_bands_of_the_prompts_length_fast_mode_and_us_inference_are_no_wrong_price() -> None:
    def prices(model: str, geo: str, nanousd: int) -> tuple[bool, bool]:
        usage = [ReportedUsage(DAY, model, "", "standard", geo, output_tokens=1_000)]
        costs = [ReportedCost(DAY, "", nanousd, "tokens", model, "output_tokens", "standard")]
        (line,) = report_lines(usage, costs, CATALOG)
        return bool(line.prices), bool(line.fast_prices)

    high = CATALOG.price_row("claude-haiku-5-5", DAY * 86_400 * 10**9, "standard", 100_001).output_nanousd
    assert prices("claude-haiku-5-5", "global", high * 1_000) == (False, False)
    fast = CATALOG.price_row("claude-opus-5-5", DAY * 86_400 * 10**9, "fast").output_nanousd
    assert prices("claude-opus-5-5", "global", fast * 1_000) == (True, False)
    assert prices(SONNET, "us", 16_500_000) == (False, False)
    assert prices(SONNET, "global", 16_500_000) == (True, True)
