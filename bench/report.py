"""Writes the tables of RESULTS.md from results.json, between its two marks; everything else in it stays.

    python bench/report.py [--results bench/results.json] [--page bench/RESULTS.md]

A cell is the median of the repeats (of streams left behind, the most), its range in brackets and, where it means
something, its ratio to nginx: the median of the ratios within each repeat, because what disturbs the machine disturbs
both.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

BEGIN = "<!-- figures: written by bench/report.py, not by hand -->"
END = "<!-- end of figures -->"
BASE = "nginx"
CARRIED_SHARE_MIN = 0.95
OTHERS_SHARE_MAX = 0.1
"""Of the gateway's core; a repeat with more is counted as disturbed."""

Record = dict[str, float]
Repeats = list[dict[str, Record]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of one gateway over the repeats; None where a repeat has none."""

    values: tuple[float | None, ...]
    remark: str = ""
    lighter: bool = False
    """Measured at less load than the row's name says: it cannot meet the bar."""

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    figure: Callable[[str, dict[str, Repeats]], Cell]
    digits: int = 1
    bar: str = ""
    bar_value: float | None = None
    """The most that Headgate may have."""
    ratio: bool = False
    worst: bool = False
    """The highest of the repeats is what counts, not the median."""


def plain(record: str, key: str) -> Callable[[str, dict[str, Repeats]], Cell]:
    def figure(gateway: str, results: dict[str, Repeats]) -> Cell:
        return Cell(tuple(repeat.get(record, {}).get(key) for repeat in results[gateway]))

    return figure


def capacity(record: str) -> Callable[[str, dict[str, Repeats]], Cell]:
    """Requests a second that one whole core would serve at the measured CPU a request."""

    def figure(gateway: str, results: dict[str, Repeats]) -> Cell:
        costs = plain(record, "cpu_us")(gateway, results).values
        return Cell(tuple(1e6 / cost if cost else None for cost in costs))

    return figure


def at_heaviest(records: list[Record], load: str, carried: str, key: str, *, named: float, unit: str) -> Cell:
    """The repeats at the heaviest load that was carried; a lighter one than the row names gets a remark."""
    held = [r for r in records if r and r[carried] >= CARRIED_SHARE_MIN * r[load]]
    if not held:
        most = max((r[carried] for r in records if r), default=0)
        return Cell((None,) * len(records), f"cannot: {most:,.0f}{unit}" if any(records) else "")
    heaviest = max(r[load] for r in held)
    values = tuple(r.get(key) if r in held and r[load] == heaviest else None for r in records)
    remarks = []
    if heaviest < named:
        remarks.append(f"at {heaviest:,.0f}{unit}")
    if None in values:
        remarks.append(f"carried in {sum(value is not None for value in values)} of {len(values)} repeats")
    return Cell(values, ", ".join(remarks), lighter=heaviest < named)


def events(record: str, key: str) -> Callable[[str, dict[str, Repeats]], Cell]:
    def figure(gateway: str, results: dict[str, Repeats]) -> Cell:
        records = [repeat.get(record, {}) for repeat in results[gateway]]
        return at_heaviest(records, "offered_per_s", "carried_per_s", key, named=10_000, unit="/s")

    return figure


def memory(record: str) -> Callable[[str, dict[str, Repeats]], Cell]:
    def figure(gateway: str, results: dict[str, Repeats]) -> Cell:
        records = [repeat.get(record, {}) for repeat in results[gateway]]
        return at_heaviest(records, "asked", "opened", "kb_a_stream", named=1000, unit=" streams")

    return figure


def added(rate: int, key: str) -> Callable[[str, dict[str, Repeats]], Cell]:
    """Latency beyond what the same load takes without a gateway, in the same repeat."""

    def figure(gateway: str, results: dict[str, Repeats]) -> Cell:
        values: list[float | None] = []
        remark = ""
        for repeat, direct in zip(results[gateway], results["direct"], strict=True):
            record, base = repeat.get(f"latency_{rate}", {}), direct.get(f"latency_{rate}", {})
            carried = record.get("carried_per_s", 0) >= CARRIED_SHARE_MIN * rate and key in record and key in base
            values.append(record[key] - base[key] if carried else None)
            if record and not carried:
                remark = f"cannot: {record['carried_per_s']:,.0f}/s"
        return Cell(tuple(values), remark)

    return figure


def left(gateway: str, results: dict[str, Repeats]) -> Cell:
    records = [repeat.get("aborts", {}) for repeat in results[gateway]]
    opened = min((r["opened"] for r in records if r), default=200)
    return Cell(tuple(r.get("left") for r in records), "" if opened >= 200 else f"of {opened:.0f} opened")


ROWS = (
    Row("CPU a request, 1 KB, µs", plain("cpu_small", "cpu_us"), bar="≤ 70", bar_value=70, ratio=True),
    Row("CPU a request, 17.6 KB, µs", plain("cpu_large", "cpu_us"), bar="≤ 95", bar_value=95, ratio=True),
    Row("CPU a stream of 66 events at once, µs", plain("cpu_stream", "cpu_us"), ratio=True),
    Row("CPU a streamed event at 10,000/s, in step, µs", events("events_in_step", "cpu_us"), 1, "≤ 30", 30, ratio=True),
    Row("CPU a streamed event at 10,000/s, spread, µs", events("events_spread", "cpu_us"), ratio=True),
    Row("event delay p50, spread, ms", events("events_spread", "p50_ms"), digits=2),
    Row("event delay p99, spread, ms", events("events_spread", "p99_ms"), digits=2),
    Row("requests/s a core, 1 KB (1 s / CPU a request)", capacity("cpu_small"), digits=0),
    Row("requests/s a core, 17.6 KB (1 s / CPU a request)", capacity("cpu_large"), digits=0),
    Row("requests/s reached, 1 KB", plain("cpu_small", "requests_per_s"), digits=0),
    Row("requests/s reached, 17.6 KB", plain("cpu_large", "requests_per_s"), digits=0),
    Row("memory an open stream at 1,000, KB", memory("memory_plain"), bar="≤ 16", bar_value=16, ratio=True),
    Row("the same, TLS to the upstream, KB", memory("memory_tls"), bar="≤ 90", bar_value=90, ratio=True),
    Row("added latency p50 at 500/s, ms", added(500, "p50_ms"), digits=2, bar="≤ 0.5", bar_value=0.5),
    Row("added latency p99 at 500/s, ms", added(500, "p99_ms"), digits=2, bar="≤ 3", bar_value=3),
    Row("added latency p50 at 100/s, ms", added(100, "p50_ms"), digits=2),
    Row("added latency p99 at 100/s, ms", added(100, "p99_ms"), digits=2),
    Row("added latency p50 at 10/s, ms", added(10, "p50_ms"), digits=2),
    Row("upstream streams left 1 s after 200 clients leave", left, 0, "0", 0, worst=True),
    Row("start to ready, s", plain("start", "ready_s"), digits=2, bar="≤ 1.5", bar_value=1.5),
    Row("resident memory idle, MB", plain("start", "idle_rss_mb"), bar="≤ 90", bar_value=90),
)


def ratio_to_base(cell: Cell, base: Cell) -> float | None:
    pairs = [(a, b) for a, b in zip(cell.values, base.values, strict=True) if a is not None and b]
    return median(a / b for a, b in pairs) if pairs else None


def render(row: Row, gateway: str, results: dict[str, Repeats]) -> str:
    cell = row.figure(gateway, results)
    if not cell.known:
        return cell.remark or "–"
    figure = max(cell.known) if row.worst else median(cell.known)
    text = f"{figure:,.{row.digits}f}"
    if len(cell.known) > 1:
        text += f" ({min(cell.known):,.{row.digits}f}…{max(cell.known):,.{row.digits}f})"
    if row.ratio and gateway not in (BASE, "direct") and BASE in results:
        ratio = ratio_to_base(cell, row.figure(BASE, results))
        if ratio is not None:
            text += f" ×{ratio:.1f}"
    if cell.remark:
        text += f", {cell.remark}"
    if gateway.startswith("headgate") and row.bar_value is not None:
        text = f"**{text}** " + ("✓" if figure <= row.bar_value and not cell.lighter else "✗")
    return text


def disturbed(results: dict[str, Repeats]) -> tuple[int, int]:
    shares = [
        record["others_share"]
        for repeats in results.values()
        for repeat in repeats
        for record in repeat.values()
        if "others_share" in record
    ]
    return sum(share > OTHERS_SHARE_MAX for share in shares), len(shares)


def has_figures(row: Row, results: dict[str, Repeats]) -> bool:
    cells = [row.figure(gateway, results) for gateway in results if gateway != "direct"]
    return any(cell.known or cell.remark for cell in cells)


def write_figures(figures: dict[str, object]) -> str:
    results: dict[str, Repeats] = figures["results"]  # type: ignore[assignment]
    machine: dict[str, object] = figures["machine"]  # type: ignore[assignment]
    versions: dict[str, str] = figures["versions"]  # type: ignore[assignment]
    failures: list[str] = figures["failures"]  # type: ignore[assignment]
    gateways = [name for name in results if name != "direct"]
    many, all_loads = disturbed(results)
    repeats = max(len(repeats) for repeats in results.values())
    lines = [
        f"Measured {figures['measured_at']} by `{figures['command']}`, {repeats} repeats.",
        "",
        f"- Machine: {machine['cores']} × {machine['cpu']}, {machine['memory_gb']} GB, Linux {machine['kernel']}; "
        f"{machine['compiler']}; runner on Python {machine['python']}; cores "
        + ("kept awake." if machine["cores_kept_awake"] else "free to sleep."),
        *(f"- {name}: {version}" for name, version in versions.items()),
        f"- Others on the gateway's core (or time the host took) above {OTHERS_SHARE_MAX:.0%} in {many} of {all_loads} "
        "loads: latencies and requests/s reached suffer from it, CPU a request less.",
        "",
        "| what | bar | " + " | ".join(gateways) + " |",
        "| --- | --- |" + " --- |" * len(gateways),
    ]
    for row in ROWS:
        if has_figures(row, results):
            cells = " | ".join(render(row, gateway, results) for gateway in gateways)
            lines.append(f"| {row.name} | {row.bar} | {cells} |")
    if failures:
        lines += ["", "Not measured, because it failed:", "", *(f"- {failure}" for failure in failures)]
    return "\n".join(lines)


def place_between_marks(page: str, text: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has lost its two marks")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(argv: Sequence[str]) -> int:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=here / "results.json")
    parser.add_argument("--page", type=Path, default=here / "RESULTS.md")
    options = parser.parse_args(argv)
    text = write_figures(json.loads(options.results.read_text()))
    page = options.page.read_text() if options.page.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    options.page.write_text(place_between_marks(page, text))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
