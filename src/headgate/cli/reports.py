"""`headgate usage`, `calls` and `bill`: what the ledger tells, as tables or in the forms of /admin."""

import time
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import sqlalchemy as sa
import typer

from headgate.cli import inputs, output, stores
from headgate.cli.errors import CommandError, Exit
from headgate.cli.family import AsJson, family
from headgate.policy.records import LedgerEntry
from headgate.storage import reports
from headgate.storage.reports import BILL_GROUPS, GROUPS, GroupBy, UsageRow

app = family("Reports of the ledger.")
Report = TypeVar("Report")

USAGE_COLUMNS = (
    *("requests>", "errors>", "input>", "cache read>", "cache write>", "output>", "cost>", "saved>"),
    *("p50>", "p95>", "first byte p50>", "p95>"),
)
BILL_ROWS_MAX = 20
"""Of one table of the bill, but for its days; those that cost most come first."""
BILL_COLUMNS = (
    *("requests>", "cost>", "share>", "saved>"),
    *("input>", "cache read>", "cache write>", "output>", "cached>"),
)


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate usage|calls|bill …`."""
    app([name, *arguments], prog_name="headgate")


@app.command()
def usage(
    group_by: Annotated[str, typer.Option(metavar="|".join(GROUPS), help="What a row stands for.")] = "user",
    since: Annotated[str, typer.Option(metavar="24h", help="A span back from now, a date, or a time.")] = "24h",
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Likewise; now, when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Requests, tokens, latency and cost of a span of time."""
    now_ns = time.time_ns()
    since_ns = inputs.moment_ns(since, now_ns=now_ns)
    until_ns = now_ns if until is None else inputs.moment_ns(until, now_ns=now_ns)
    report = _read(lambda connection: reports.usage(connection, group_by, since_ns=since_ns, until_ns=until_ns))
    if as_json:
        output.print_json(reports.usage_json(report))
        return
    rows = [(row.group or "–", *_usage_cells(row)) for row in report.rows]
    output.print_table((report.group_by, *USAGE_COLUMNS), [*rows, ("total", *_usage_cells(report.total))])


@app.command()
def calls(
    limit: Annotated[int, typer.Option(help="At most so many.")] = 20,
    cursor: Annotated[str, typer.Option(help="Go on where an answer ended.")] = "",
    as_json: AsJson = False,
) -> None:
    """The latest calls, newest first."""
    page = _read(lambda connection: reports.calls_page(connection, limit=limit, cursor=cursor))
    if as_json:
        output.print_json(reports.calls_json(page))
        return
    columns = (
        "at",
        "call",
        "user",
        "model",
        "outcome",
        "status>",
        "try>",
        "input>",
        "cached>",
        "output>",
        "cost>",
        "total>",
    )
    output.print_table(columns, [_call_cells(entry) for entry in page.calls])
    if page.cursor is not None:
        print(f"\nMore: --cursor {page.cursor}")


@app.command()
def bill(as_json: AsJson = False) -> None:
    """This month so far, where it is heading, and who and what it goes to."""
    report = _read(lambda connection: reports.bill(connection, now_ns=time.time_ns()))
    if as_json:
        output.print_json(reports.bill_json(report))
        return
    projection, total = report.projection, report.total
    print(f"{report.month}: {output.usd(total.cost_nanousd)} for {total.requests:,} requests, so far")
    if not total.requests:
        return
    if projection.projected_nanousd is None:
        print("there is no whole day yet that tells where it is heading")
    else:
        by = "the last day" if projection.rate_days == 1 else f"the last {projection.rate_days} days"
        print(f"heading for {output.usd(projection.projected_nanousd)}, by {by}")
    if report.cached_share is not None:
        by_cache = output.usd(total.saved_nanousd - total.reused_nanousd)
        print(f"read from the cache: {report.cached_share:.0%} of prompt tokens; saved {by_cache}")
    if total.reused:
        print(f"answered again from what was kept: {total.reused:,} requests; saved {output.usd(total.reused_nanousd)}")
    for group_by in BILL_GROUPS:
        print()
        _print_bill_of(group_by, report.by[group_by], month_nanousd=total.cost_nanousd)


def _read(report: Callable[[sa.Connection], Report]) -> Report:
    """Ask the database. Raises CommandError."""
    with stores.database() as engine, engine.connect() as connection:
        try:
            return report(connection)
        except reports.InvalidQuery as error:
            raise CommandError(Exit.USAGE, f"{error}.") from None


def _print_bill_of(group_by: GroupBy, rows: Sequence[UsageRow], *, month_nanousd: int) -> None:
    cells = [
        (
            row.group or "–",
            f"{row.requests:,}",
            output.usd(row.cost_nanousd),
            f"{row.cost_nanousd / month_nanousd:.0%}" if month_nanousd else "–",
            output.usd(row.saved_nanousd),
            *_token_cells(row),
            _share_cell(reports.cached_share(row)),
        )
        for row in (rows if group_by == "day" else rows[:BILL_ROWS_MAX])
    ]
    output.print_table((group_by, *BILL_COLUMNS), cells)
    if len(rows) > len(cells):
        rest = sum(row.cost_nanousd for row in rows[len(cells) :])
        print(f"and {len(rows) - len(cells):,} more, together {output.usd(rest)}; --json has them all")


def _share_cell(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _usage_cells(row: UsageRow) -> tuple[str, ...]:
    return (
        f"{row.requests:,}",
        f"{row.errors:,}",
        *_token_cells(row),
        output.usd(row.cost_nanousd),
        output.usd(row.saved_nanousd),
        output.milliseconds(row.p50_ms),
        output.milliseconds(row.p95_ms),
        output.milliseconds(row.first_byte_p50_ms),
        output.milliseconds(row.first_byte_p95_ms),
    )


def _token_cells(row: UsageRow) -> tuple[str, ...]:
    cache_write_tokens = row.cache_write_5m_tokens + row.cache_write_1h_tokens
    tokens = (row.input_tokens, row.cache_read_tokens, cache_write_tokens, row.output_tokens)
    return tuple(f"{count:,}" for count in tokens)


def _call_cells(entry: LedgerEntry) -> tuple[str, ...]:
    used = entry.usage
    cost = output.usd(entry.cost_nanousd)
    return (
        output.timestamp(entry.at_ns),
        entry.call_id,
        entry.user,
        entry.model or entry.model_asked,
        entry.outcome or "open",
        f"{entry.status} {entry.error_code}".strip(),
        str(len(entry.attempts)),
        f"{used.input_tokens:,}",
        f"{used.cache_read_tokens:,}",
        f"{used.output_tokens:,}",
        f"~{cost}" if entry.state == "estimated" else cost,
        output.milliseconds(entry.total_ms),
    )
