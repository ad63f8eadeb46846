"""Prometheus metrics, all of them views of the log line, so that a dashboard and the log cannot disagree.

Counting is done by hand into dictionaries (about 2 µs a call; eight labelled client counters take 15) and turned into
metric families when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headgate.telemetry.log_line import LogLine

SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_LABELS_MAX = 500
_SERIES_MAX = 5000


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        reached = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, SECONDS_BUCKETS), "+Inf"), self.counts, strict=True):
            reached += count
            rows.append((bound, float(reached)))
        return rows


class CallMetrics(Collector):
    """Counts calls. `observe` belongs to one thread; `collect` may run in another."""

    def __init__(self, gauges: Callable[[], Mapping[str, int]]) -> None:
        self._gauges = gauges
        self._calls: defaultdict[tuple[str, str, str, str], int] = defaultdict(int)
        self._tokens: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._cost: defaultdict[str, int] = defaultdict(int)
        self._saved: defaultdict[str, int] = defaultdict(int)
        self._attempts: defaultdict[str, int] = defaultdict(int)
        self._total: defaultdict[str, _Histogram] = defaultdict(_Histogram)
        self._first_byte: defaultdict[str, _Histogram] = defaultdict(_Histogram)
        self._queue: defaultdict[str, _Histogram] = defaultdict(_Histogram)

    def observe(self, line: LogLine) -> None:
        """One call has ended."""
        model = line.model
        if model not in self._attempts and len(self._attempts) >= _LABELS_MAX:
            # A label that a caller can choose must not grow without bound.
            model = "other"
        series = (model, line.endpoint, line.outcome, str(line.status))
        if series not in self._calls and len(self._calls) >= _SERIES_MAX:
            series = (model, "other", line.outcome, str(line.status))
        self._calls[series] += 1
        tokens = self._tokens
        tokens[model, "input"] += line.input_tokens
        tokens[model, "cache_read"] += line.cache_read_tokens
        tokens[model, "cache_write_5m"] += line.cache_write_5m_tokens
        tokens[model, "cache_write_1h"] += line.cache_write_1h_tokens
        tokens[model, "output"] += line.output_tokens
        self._cost[model] += line.cost_nanousd
        self._saved[model] += line.saved_nanousd
        self._attempts[model] += line.attempts
        self._total[model].observe(line.total_ms / 1000)
        self._queue[model].observe(line.queue_ms / 1000)
        if line.first_byte_ms is not None:
            self._first_byte[model].observe(line.first_byte_ms / 1000)

    def collect(self) -> Iterator[Metric]:
        """All families, as Prometheus asks for them."""
        calls = CounterMetricFamily(
            "headgate_calls", "Calls that ended.", labels=["model", "endpoint", "outcome", "status"]
        )
        for labels, count in list(self._calls.items()):
            calls.add_metric(labels, count)
        yield calls
        tokens = CounterMetricFamily("headgate_tokens", "Tokens as billed, by kind.", labels=["model", "kind"])
        for token_labels, count in list(self._tokens.items()):
            tokens.add_metric(token_labels, count)
        yield tokens
        for name, text, values, scale in (
            ("headgate_cost_usd", "What the calls cost, in dollars.", self._cost, 1e-9),
            ("headgate_cache_saved_usd", "What prompt caching saved, in dollars.", self._saved, 1e-9),
            ("headgate_attempts", "Calls made to Anthropic.", self._attempts, 1.0),
        ):
            # Savings can be negative (a cache that is written and never read), so they are no counter.
            family: CounterMetricFamily | GaugeMetricFamily = (
                GaugeMetricFamily(name, text, labels=["model"])
                if name == "headgate_cache_saved_usd"
                else CounterMetricFamily(name, text, labels=["model"])
            )
            for model, value in list(values.items()):
                family.add_metric([model], value * scale)
            yield family
        for name, text, histograms in (
            ("headgate_call_seconds", "From the request to the end of its answer.", self._total),
            ("headgate_first_byte_seconds", "From the request to the answer's first byte.", self._first_byte),
            ("headgate_queue_seconds", "Waiting in the queue.", self._queue),
        ):
            histogram = HistogramMetricFamily(name, text, labels=["model"])
            for model, seen in list(histograms.items()):
                histogram.add_metric([model], seen.buckets(), seen.total)
            yield histogram
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(f"headgate_{name}", name.replace("_", " "), value=value)
