"""Metrics say what the lines say."""

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from headgate.telemetry.metrics import CallMetrics

COMPLETED = {"model": "claude-sonnet-4-6", "endpoint": "messages", "outcome": "completed", "status": 200}


def scrape(metrics: CallMetrics) -> dict[str, float]:
    """Every sample as Prometheus reads it: `name{label="value"}` to its value."""
    registry = CollectorRegistry()
    registry.register(metrics)
    return {
        f"{sample.name}{dict(sorted(sample.labels.items()))}": sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_calls_tokens_cost_and_attempts_are_the_sums_of_the_lines(line) -> None:
    metrics = CallMetrics(dict)
    for _ in range(2):
        metrics.observe(line(**COMPLETED, input_tokens=10, output_tokens=3, cost_nanousd=75_000, attempts=2))
    metrics.observe(line(**COMPLETED | {"outcome": "failed", "status": 529}, saved_nanousd=-1_000))
    samples = scrape(metrics)
    model = "'model': 'claude-sonnet-4-6'"
    assert (
        samples[f"headgate_calls_total{{'endpoint': 'messages', {model}, 'outcome': 'completed', 'status': '200'}}"]
        == 2
    )
    assert (
        samples[f"headgate_calls_total{{'endpoint': 'messages', {model}, 'outcome': 'failed', 'status': '529'}}"] == 1
    )
    assert samples[f"headgate_tokens_total{{'kind': 'input', {model}}}"] == 20
    assert samples[f"headgate_tokens_total{{'kind': 'output', {model}}}"] == 6
    assert samples[f"headgate_attempts_total{{{model}}}"] == 4
    assert samples[f"headgate_cost_usd_total{{{model}}}"] == pytest.approx(0.000_15)
    assert samples[f"headgate_cache_saved_usd{{{model}}}"] == pytest.approx(-0.000_001)


def test_a_duration_is_in_every_bucket_that_reaches_it(line) -> None:
    metrics = CallMetrics(dict)
    for total_ms in (50, 51, 400_000):
        metrics.observe(line(**COMPLETED, total_ms=total_ms))
    samples = scrape(metrics)

    def up_to(bound: str) -> float:
        return samples[f"headgate_call_seconds_bucket{{'le': '{bound}', 'model': 'claude-sonnet-4-6'}}"]

    assert [up_to(bound) for bound in ("0.05", "0.1", "300.0", "+Inf")] == [1, 2, 2, 3]
    assert samples["headgate_call_seconds_count{'model': 'claude-sonnet-4-6'}"] == 3
    assert samples["headgate_call_seconds_sum{'model': 'claude-sonnet-4-6'}"] == pytest.approx(400.101)


def test_an_answer_without_a_first_byte_is_not_counted_as_a_fast_one(line) -> None:
    metrics = CallMetrics(dict)
    metrics.observe(line(**COMPLETED, first_byte_ms=None))
    assert not any(name.startswith("headgate_first_byte_seconds_count") for name in scrape(metrics))


def test_models_that_callers_invent_share_one_label(line) -> None:
    metrics = CallMetrics(dict)
    for number in range(2000):
        metrics.observe(line(**COMPLETED | {"model": f"model-{number}"}, attempts=1))
    attempts = {name: value for name, value in scrape(metrics).items() if name.startswith("headgate_attempts_total")}
    assert len(attempts) <= 501
    assert attempts["headgate_attempts_total{'model': 'other'}"] == 1500


def test_endpoints_that_callers_invent_share_one_label(line) -> None:
    metrics = CallMetrics(dict)
    for number in range(12_000):
        metrics.observe(line(**COMPLETED | {"endpoint": f"endpoint-{number}"}))
    calls = {name: value for name, value in scrape(metrics).items() if name.startswith("headgate_calls_total")}
    assert len(calls) <= 5_001
    assert sum(calls.values()) == 12_000
    assert any("'endpoint': 'other'" in name for name in calls)


def test_series_stay_few_also_where_models_and_endpoints_are_invented_together(line) -> None:
    metrics = CallMetrics(dict)
    for number in range(20_000):
        metrics.observe(line(**COMPLETED | {"endpoint": f"e{number % 300}", "model": f"m{number % 700}"}))
    assert sum(name.startswith("headgate_calls_total") for name in scrape(metrics)) <= 5_600


def test_gauges_are_read_at_the_scrape(line) -> None:
    gauges = {"calls_open": 1}
    metrics = CallMetrics(lambda: gauges)
    assert scrape(metrics)["headgate_calls_open{}"] == 1
    gauges["calls_open"] = 2
    assert scrape(metrics)["headgate_calls_open{}"] == 2
