"""The table must not flatter: what was not carried is said, and ratios are taken within a repeat."""

import pytest
import report


def figures(**gateways: list[dict[str, report.Record]]) -> dict[str, list[dict[str, report.Record]]]:
    return gateways


def row(name: str) -> report.Row:
    return next(row for row in report.ROWS if row.name.startswith(name))


def cpu(*costs: float) -> list[dict[str, report.Record]]:
    return [{"cpu_small": {"cpu_us": cost}} for cost in costs]


def test_a_ratio_is_the_median_of_the_ratios_within_each_repeat():
    results = figures(nginx=cpu(10, 20, 40), headgate=cpu(30, 60, 120))
    assert report.render(row("CPU a request, 1 KB"), "headgate", results) == "**60.0 (30.0…120.0) ×3.0** ✓"


def test_a_figure_above_the_bar_is_marked_in_our_own_column_only():
    results = figures(nginx=cpu(71), headgate=cpu(71))
    assert report.render(row("CPU a request, 1 KB"), "headgate", results) == "**71.0 ×1.0** ✗"
    assert report.render(row("CPU a request, 1 KB"), "nginx", results) == "71.0"


def test_a_rate_that_was_not_carried_gives_no_latency():
    slow = {"latency_500": {"offered_per_s": 500, "carried_per_s": 80}}
    fast = {"latency_500": {"offered_per_s": 500, "carried_per_s": 500, "p50_ms": 0.1}}
    results = figures(direct=[fast], litellm=[slow])
    assert report.render(row("added latency p50 at 500/s"), "litellm", results) == "cannot: 80/s"


def test_added_latency_is_what_the_gateway_adds_to_the_direct_run_of_its_repeat():
    def run(p50_ms: float) -> dict[str, report.Record]:
        return {"latency_500": {"offered_per_s": 500, "carried_per_s": 500, "p50_ms": p50_ms}}

    results = figures(direct=[run(0.1), run(0.9)], headgate=[run(0.4), run(1.2)])
    assert report.render(row("added latency p50 at 500/s"), "headgate", results) == "**0.30 (0.30…0.30)** ✓"


def test_a_lighter_load_is_named_beside_the_figure():
    light = {"asked": 100, "opened": 97, "kb_a_stream": 109.0}
    results = figures(nginx=[{}], litellm=[{"memory_plain": light}])
    assert report.render(row("memory an open stream"), "litellm", results) == "109.0, at 100 streams"


def test_a_bar_is_not_met_at_a_lighter_load_than_it_names():
    def event(offered: float, carried: float, cpu_us: float) -> dict[str, report.Record]:
        return {"events_in_step": {"offered_per_s": offered, "carried_per_s": carried, "cpu_us": cpu_us}}

    in_step = row("CPU a streamed event at 10,000/s, in step")
    light = figures(nginx=[{}], headgate=[event(1_000, 1_000, 20)])
    assert report.render(in_step, "headgate", light) == "**20.0, at 1,000/s** ✗"
    mixed = figures(nginx=[{}, {}], headgate=[event(1_000, 1_000, 20), event(10_000, 9_990, 25)])
    assert report.render(in_step, "headgate", mixed) == "**25.0, carried in 1 of 2 repeats** ✓"
    neither = figures(nginx=[{}], headgate=[event(1_000, 443, 20)])
    assert report.render(in_step, "headgate", neither) == "cannot: 443/s"


def test_a_repeat_that_failed_leaves_a_dash_and_not_a_zero():
    assert report.render(row("CPU a request, 1 KB"), "nginx", figures(nginx=[{}])) == "–"


def test_only_what_is_between_the_marks_is_rewritten():
    page = f"# Results\n{report.BEGIN}\nold\n{report.END}\nkept\n"
    assert report.place_between_marks(page, "new") == f"# Results\n{report.BEGIN}\n\nnew\n\n{report.END}\nkept\n"
    with pytest.raises(ValueError, match="marks"):
        report.place_between_marks("# Results\n", "new")
