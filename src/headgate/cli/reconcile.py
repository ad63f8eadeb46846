"""`headgate reconcile`: the ledger beside Anthropic's usage and cost report, and its estimates corrected by it."""

import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from headgate.cli import inputs, output, stores
from headgate.cli.admin_api import AdminApi, ReportUnreadable
from headgate.cli.errors import CommandError, Exit
from headgate.cli.family import AsJson, family
from headgate.policy.reconciliation import (
    DEFAULT_WORKSPACE,
    Line,
    ReportLine,
    Tokens,
    compare,
    report_lines,
)
from headgate.storage import reconcile as ledger
from headgate.storage.reconcile import LedgerChanged, Written
from headgate.wire.catalog import packaged
from headgate.wire.usage_report import date_text, day_of

app = family("The ledger beside Anthropic's report.")

DAYS_MAX = 366
COLUMNS = ("day", "model", "workspace", "ledger>", "report>", "gap>", "gap tokens in>", "out>", "corrected>", "")


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate reconcile …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.command()
def reconcile(
    since: Annotated[
        str, typer.Option(metavar="2d", help="A span back from now, a date, or a time; from the start of that UTC day.")
    ] = "2d",
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Likewise; left out, up to today, which is not complete.")
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The workspace of the gateway's key; `default` for the one without an id."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the ledger with Anthropic's usage and cost report, and correct what was estimated."""
    now_ns = time.time_ns()
    first_day = day_of(inputs.moment_ns(since, now_ns=now_ns))
    # A day that has begun by `until` is compared whole: the report has dollars by day only.
    end_day = day_of(now_ns) if until is None else day_of(inputs.moment_ns(until, now_ns=now_ns) - 1) + 1
    span = f"from {date_text(first_day)} until {date_text(end_day)}"
    if end_day <= first_day:
        raise CommandError(
            Exit.USAGE, f"{span} there is no whole day to compare. Today is left out unless --until says otherwise."
        )
    if end_day - first_day > DAYS_MAX:
        raise CommandError(Exit.USAGE, f"{span} are {end_day - first_day:,} days; at most {DAYS_MAX} are compared.")
    settings = stores.settings()
    catalog = packaged()
    try:
        api = AdminApi(settings.upstream_url, settings.anthropic_admin_key.get_secret_value())
        usage = api.usage(first_day=first_day, end_day=end_day)
        costs = api.costs(first_day=first_day, end_day=end_day)
    except ReportUnreadable as error:
        raise CommandError(Exit.USAGE, str(error)) from None
    report = report_lines(usage, costs, catalog)
    ours = _workspace(workspace, report)
    with stores.database() as engine:
        with engine.connect() as connection:
            lines = compare(
                ledger.ledger_lines(connection, catalog, first_day=first_day, end_day=end_day),
                report,
                workspace=ours,
            )
        written = Written(0, 0, 0)
        if not dry_run:
            try:
                written = ledger.write(engine, lines, first_day=first_day, end_day=end_day, now_ns=now_ns)
            except LedgerChanged as error:
                raise CommandError(
                    Exit.FAILED,
                    f"the ledger was corrected by another meanwhile ({error}). Nothing was written; run again.",
                ) from None
    others = [line for line in report if line.workspace != ours]
    agrees = all(line.agrees for line in lines)
    if as_json:
        output.print_json(
            {
                "since": date_text(first_day),
                "until": date_text(end_day),
                "workspace": ours or DEFAULT_WORKSPACE,
                "agrees": agrees,
                "dry_run": dry_run,
                "corrected_attempts": written.attempts,
                "lines": [_line_json(line) for line in lines],
                "other_workspaces": _by_workspace(others),
            }
        )
    else:
        _print(lines, others, written, dry_run=dry_run)
    if not agrees:
        raise typer.Exit(Exit.FAILED)


def _workspace(asked: str | None, report: Sequence[ReportLine]) -> str:
    """The workspace to compare with, as the report calls it. Raises CommandError where that is a guess."""
    there = sorted({line.workspace for line in report})
    if asked is not None:
        return "" if asked == DEFAULT_WORKSPACE else asked
    if len(there) > 1:
        sums = ", ".join(f"{name} {output.usd(nanousd)}" for name, nanousd in _by_workspace(report).items())
        raise CommandError(
            Exit.USAGE,
            f"the report has several workspaces ({sums}). Say with --workspace which one the gateway's key is of.",
        )
    return there[0] if there else ""


def _by_workspace(report: Sequence[ReportLine]) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in report:
        name = line.workspace or DEFAULT_WORKSPACE
        found[name] = found.get(name, 0) + line.nanousd
    return found


def _line_json(line: Line) -> dict[str, object]:
    return {
        "day": date_text(line.day),
        "model": line.model,
        "workspace": line.workspace,
        "ledger_nanousd": line.ledger_nanousd,
        "reported_nanousd": line.reported_nanousd,
        "corrected_nanousd": line.corrected_nanousd,
        "gap_nanousd": line.gap_nanousd,
        "left_nanousd": line.left_nanousd,
        "ledger_tokens": msgspec.structs.asdict(line.ledger_tokens),
        "reported_tokens": msgspec.structs.asdict(line.reported_tokens),
        "estimated_attempts": line.estimated_attempts,
        "agrees": line.agrees,
        "cause": line.cause,
    }


def _print(lines: Sequence[Line], others: Sequence[ReportLine], written: Written, *, dry_run: bool) -> None:
    if not lines:
        print("Neither the ledger nor the report has anything in these days.")
        return
    output.print_table(COLUMNS, [_cells(line) for line in lines])
    print()
    if dry_run:
        corrections = sum(len(line.corrections) for line in lines)
        print(f"Nothing was written. {corrections:,} estimated attempts would be corrected.")
    elif written.attempts:
        print(
            f"Corrected {written.attempts:,} estimated attempts, {output.usd(written.before_nanousd)} to "
            f"{output.usd(written.after_nanousd)} in all."
        )
    else:
        print("No estimate was changed.")
    for name, nanousd in _by_workspace(others).items():
        print(f"Not compared: workspace {name}, {output.usd(nanousd)}.")
    apart = sum(not line.agrees for line in lines)
    if apart:
        print(f"{apart} of {len(lines)} lines are still apart by more than 1 % or $0.05.")


def _cells(line: Line) -> tuple[str, ...]:
    gap = line.reported_tokens - line.ledger_tokens
    return (
        date_text(line.day),
        line.model or "–",
        line.workspace,
        output.usd(line.ledger_nanousd),
        output.usd(line.reported_nanousd),
        output.usd(line.gap_nanousd),
        f"{_prompt(gap):+,}",
        f"{gap.output_tokens:+,}",
        output.usd(line.corrected_nanousd),
        line.cause if line.agrees else f"! {line.cause}",
    )


def _prompt(tokens: Tokens) -> int:
    return tokens.input_tokens + tokens.cache_read_tokens + tokens.cache_write_5m_tokens + tokens.cache_write_1h_tokens
