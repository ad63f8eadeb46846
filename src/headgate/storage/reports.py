"""What the ledger's tables tell: `headgate usage|calls|bill` and `/admin/usage|calls|experiments`, in exact forms.

What it is: queries on a connection, records of what they found, and `…_json` for the forms of the interface.
What it is not: a page or a table on a terminal. The queries block for up to seconds: never call them on the loop.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from operator import add
from typing import Any, Literal, get_args

import msgspec
import sqlalchemy as sa

from headgate.policy.experiments import (
    Estimate,
    Experiment,
    Unit,
    arm_label,
    cost_per_request,
    differs,
    error_rate,
)
from headgate.policy.pricing import RATE_DAYS, MonthProjection, project_month
from headgate.policy.records import AttemptEntry, LedgerEntry
from headgate.storage.fold import decode_usage
from headgate.storage.tables import attempts, calls
from headgate.wire.usage import NO_USAGE, Usage

GroupBy = Literal["user", "key", "model", "endpoint", "day", "arm"]
GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)
BILL_GROUPS: tuple[GroupBy, ...] = ("model", "user", "endpoint", "day")
CALLS_LIMIT_MAX = 1_000
TOKEN_FIELDS = ("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "output_tokens")

_DAY_NS = 86_400 * 10**9
_COLUMN: dict[GroupBy, sa.ColumnElement[Any]] = {
    "user": calls.c.user_id,
    "key": calls.c.key_id,
    "model": calls.c.model,
    "endpoint": calls.c.endpoint,
    "day": calls.c.at_ns // _DAY_NS,
    "arm": calls.c.arm,
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SUMMED = (*TOKEN_FIELDS, "cost_nanousd", "saved_nanousd")
_OF_THE_BILL = ("reused", "reused_nanousd")
_BILLED = ("requests", "errors", *_SUMMED, *_OF_THE_BILL)


class InvalidQuery(ValueError):
    """A report cannot be asked like that; the text says why, for who asked."""


class UsageRow(msgspec.Struct, frozen=True):
    """What one group used. Percentiles are of calls that were completed, nearest rank; None when there were none."""

    group: str
    """The user, key id, model, endpoint, arm, or the UTC day as `2026-01-31`; empty in a total."""
    requests: int = 0
    errors: int = 0
    """Calls that failed, were cut or were refused. A client that left is no error."""
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    cost_nanousd: int = 0
    saved_nanousd: int = 0
    """By caching and by reused answers."""
    reused: int = 0
    """Calls that were answered by the answer of an earlier one."""
    reused_nanousd: int = 0
    """What those saved, of `saved_nanousd`."""
    p50_ms: int | None = None
    p95_ms: int | None = None
    first_byte_p50_ms: int | None = None
    first_byte_p95_ms: int | None = None


class UsageReport(msgspec.Struct, frozen=True):
    """Usage of a span of time. The dearest group comes first; days come in their order."""

    group_by: GroupBy
    rows: tuple[UsageRow, ...]
    total: UsageRow


class CallsPage(msgspec.Struct, frozen=True):
    """Calls, the newest first. `cursor` asks for the next page; None: there is none."""

    calls: tuple[LedgerEntry, ...]
    cursor: str | None


class Bill(msgspec.Struct, frozen=True):
    """The month so far, by UTC days."""

    month: str
    """`2026-01`."""
    total: UsageRow
    projection: MonthProjection
    cached_share: float | None
    """Part of all prompt tokens that was read from the cache, 0 to 1; None when there were none."""
    by: dict[GroupBy, tuple[UsageRow, ...]]
    """By model, user, endpoint and day."""


class ArmReport(msgspec.Struct, frozen=True):
    """How one arm of an experiment did. The estimates are None when it had no request."""

    arm: str
    model: str
    """Where its requests go now; empty when it is not in the settings any more."""
    units: int
    """Conversations, and persons where there was none: what was dealt to the arm."""
    used: UsageRow
    error_rate: Estimate | None
    cost_per_request: Estimate | None
    """In nano-dollars."""
    error_rate_differs: bool | None
    """From that of the experiment's first arm, at 95 %. None for the first arm, and where it cannot be told."""
    cost_differs: bool | None


class ExperimentReport(msgspec.Struct, frozen=True):
    """An experiment's arms, in the order of the settings; those that are not there any more come after, by name."""

    experiment: str
    arms: tuple[ArmReport, ...]


def usage(connection: sa.Connection, group_by: str, *, since_ns: int, until_ns: int) -> UsageReport:
    """Calls that began in [since_ns, until_ns), grouped. Raises InvalidQuery for a group there is not."""
    if group_by not in _COLUMN:
        raise InvalidQuery(f"group_by is one of {', '.join(GROUPS)}")
    group = _COLUMN[group_by].label("of")
    sums = connection.execute(usage_statement(group, since_ns=since_ns, until_ns=until_ns)).all()
    spans = _timings(connection, group, since_ns=since_ns, until_ns=until_ns)
    rows: list[UsageRow] = []
    whole = _Timings()
    for of, *counts in sums:
        rows.append(_row(_name(group_by, of), counts, spans[of]))
        whole.total_ms += spans[of].total_ms
        whole.first_byte_ms += spans[of].first_byte_ms
    total = _row("", [sum(column) for column in zip(*(counts for _, *counts in sums), strict=True)], whole)
    return UsageReport(group_by, _ordered(group_by, rows), total)


def experiments(
    connection: sa.Connection, running: Sequence[Experiment], *, since_ns: int, until_ns: int
) -> tuple[ExperimentReport, ...]:
    """How the arms did of calls that began in [since_ns, until_ns): first those of `running`, with calls or without,
    then what the ledger knows of others. Intervals are made as `policy/experiments.py` says."""
    in_an_arm = calls.c.arm != ""
    # Ids of conversations and names of people are told apart by the column they stand in. Literals: PostgreSQL takes
    # an expression with a parameter for another one where it stands again, in GROUP BY.
    nothing: sa.ColumnElement[str] = sa.literal_column("''")
    unit = (calls.c.conversation, sa.case((calls.c.conversation == nothing, calls.c.user_id), else_=nothing))
    counts: defaultdict[str, list[Sequence[int]]] = defaultdict(list)
    statement = usage_statement(calls.c.arm, *unit, since_ns=since_ns, until_ns=until_ns).where(in_an_arm)
    for label, _, _, *unit_counts in connection.execute(statement):
        counts[label].append(unit_counts)
    timings = _timings(connection, calls.c.arm, in_an_arm, since_ns=since_ns, until_ns=until_ns)
    models = {arm_label(one.name, arm.name): arm.model for one in running for arm in one.arms}
    arms: dict[str, list[ArmReport]] = {one.name: [] for one in running}
    for label in (*models, *sorted(counts.keys() - models.keys())):
        experiment, _, arm = label.partition(":")
        of_experiment = arms.setdefault(experiment, [])
        first = of_experiment[0] if of_experiment else None
        of_experiment.append(_arm_report(arm, models.get(label, ""), counts[label], timings[label], first))
    return tuple(ExperimentReport(name, tuple(reports)) for name, reports in arms.items())


def calls_page(connection: sa.Connection, *, limit: int = 50, cursor: str = "") -> CallsPage:
    """At most `limit` calls (1 to 1,000), newest first, older than those of the page that gave `cursor`.

    A call that comes in between is on no page twice and pushes none off. Raises InvalidQuery.
    """
    if not 1 <= limit <= CALLS_LIMIT_MAX:
        raise InvalidQuery(f"limit is 1 to {CALLS_LIMIT_MAX}")
    found = connection.execute(calls_statement(limit=limit + 1, cursor=cursor)).mappings().all()
    rows = found[:limit]
    tried: defaultdict[str, list[AttemptEntry]] = defaultdict(list)
    of_these = attempts.c.call_id.in_([row["call_id"] for row in rows])
    for attempt in connection.execute(sa.select(attempts).where(of_these).order_by(attempts.c.number)).mappings():
        tried[attempt["call_id"]].append(_attempt_entry(attempt))
    entries = tuple(_ledger_entry(row, tuple(tried[row["call_id"]])) for row in rows)
    more = len(found) > limit
    return CallsPage(entries, f"{entries[-1].at_ns}.{entries[-1].call_id}" if more else None)


def bill(connection: sa.Connection, *, now_ns: int) -> Bill:
    """The bill of the month that `now_ns` is in, and where it is heading."""
    today = _date(now_ns)
    month = today.replace(day=1)
    month_ns, end_ns = _start_ns(month), _start_ns(today) + _DAY_NS
    # One pass over the month, rolled up here, instead of one for each group.
    cube = [_COLUMN[group_by].label(group_by) for group_by in BILL_GROUPS]
    found = connection.execute(usage_statement(*cube, since_ns=month_ns, until_ns=end_ns)).all()
    by: dict[GroupBy, tuple[UsageRow, ...]] = {}
    for at, group_by in enumerate(BILL_GROUPS):
        counts: dict[Any, list[int]] = {}
        for cell in found:
            cell_counts = cell[len(cube) :]
            before = counts.get(cell[at], [0] * len(cell_counts))
            counts[cell[at]] = [*map(add, before, cell_counts)]
        rows = [_row(_name(group_by, of), row_counts, _Timings()) for of, row_counts in counts.items()]
        by[group_by] = _ordered(group_by, rows)
    total = _row("", [sum(column) for column in zip(*(cell[len(cube) :] for cell in found), strict=True)], _Timings())
    # The projection's daily rate may reach back into last month.
    rate_ns = month_ns - RATE_DAYS * _DAY_NS
    day, cost = _COLUMN["day"].label("day"), sa.func.sum(calls.c.cost_nanousd)
    within = (calls.c.at_ns >= rate_ns, calls.c.at_ns < end_ns)
    daily = connection.execute(sa.select(day, cost).where(*within).group_by(day)).all()
    return Bill(
        month=month.isoformat()[:7],
        total=total,
        projection=project_month({_date(number * _DAY_NS): cost_nanousd for number, cost_nanousd in daily}, today),
        cached_share=cached_share(total),
        by=by,
    )


def cached_share(row: UsageRow) -> float | None:
    """Part of the group's prompt tokens that was read from the cache, 0 to 1; None when it had none."""
    prompt_tokens = row.input_tokens + row.cache_read_tokens + row.cache_write_5m_tokens + row.cache_write_1h_tokens
    return row.cache_read_tokens / prompt_tokens if prompt_tokens else None


def usage_statement(*groups: sa.ColumnElement[Any], since_ns: int, until_ns: int) -> sa.Select[Any]:
    """The groups, then the counts of a UsageRow in its order: for the reports, and for the test that explains it."""
    failed = calls.c.outcome.in_(("failed", "cut", "refused"))
    again = calls.c.reused == 1
    counts = (
        sa.func.count(),
        sa.func.count().filter(failed),
        *(sa.func.sum(calls.c[name]) for name in _SUMMED),
        sa.func.count().filter(again),
        sa.func.coalesce(sa.func.sum(calls.c.saved_nanousd).filter(again), 0),
    )
    within = (calls.c.at_ns >= since_ns, calls.c.at_ns < until_ns)
    return sa.select(*groups, *counts).where(*within).group_by(*groups)


def calls_statement(*, limit: int, cursor: str) -> sa.Select[Any]:
    """The query of `calls_page`, for it and for the test that explains it. Raises InvalidQuery."""
    statement = sa.select(calls).order_by(calls.c.at_ns.desc(), calls.c.call_id.desc()).limit(limit)
    if not cursor:
        return statement
    at_ns, _, call_id = cursor.partition(".")
    if not (at_ns.isascii() and at_ns.isdigit() and len(at_ns) < 20 and call_id):
        raise InvalidQuery("this is not a cursor that a page gave")
    return statement.where(sa.tuple_(calls.c.at_ns, calls.c.call_id) < sa.tuple_(int(at_ns), call_id))


def usage_json(report: UsageReport) -> dict[str, object]:
    """The report as `headgate usage --json` and `/admin/usage` give it."""
    total = _used(report.total)
    del total["group"]
    return {"rows": [_row_json(report.group_by, row) for row in report.rows], "total": total}


def experiments_json(found: Sequence[ExperimentReport]) -> dict[str, object]:
    """The report as `/admin/experiments` gives it."""
    return {
        "experiments": [{"experiment": one.experiment, "arms": [_arm_json(arm) for arm in one.arms]} for one in found]
    }


def calls_json(page: CallsPage) -> dict[str, object]:
    """The page as `headgate calls --json` and `/admin/calls` give it."""
    return {"calls": [call_json(entry) for entry in page.calls], "cursor": page.cursor}


def call_json(entry: LedgerEntry) -> dict[str, object]:
    """One call, as those give it."""
    return {
        "call_id": entry.call_id,
        "at": _rfc3339(entry.at_ns),
        "key_id": entry.key_id,
        "user": entry.user,
        "tier": entry.tier,
        "endpoint": entry.endpoint,
        "conversation": entry.conversation,
        "model_asked": entry.model_asked,
        "model": entry.model,
        "arm": entry.arm,
        "status": entry.status,
        "error_code": entry.error_code,
        "outcome": entry.outcome,
        "state": entry.state,
        "estimated": entry.state == "estimated",
        "stop_reason": entry.stop_reason,
        "streamed": entry.streamed,
        **_tokens(entry.usage),
        "cost_nanousd": entry.cost_nanousd,
        "saved_nanousd": entry.saved_nanousd,
        "queue_ms": entry.queue_ms,
        "first_byte_ms": entry.first_byte_ms,
        "total_ms": entry.total_ms,
        "family": entry.family,
        "reused": entry.reused,
        "attempts": [
            {
                "number": attempt.number,
                "model": attempt.model,
                "state": attempt.state,
                "status": attempt.status,
                "error_code": attempt.error_code,
                "upstream_request_id": attempt.upstream_request_id,
                **_tokens(attempt.usage),
                "cost_nanousd": attempt.cost_nanousd,
            }
            for attempt in entry.attempts
        ],
    }


def bill_json(report: Bill) -> dict[str, object]:
    """The bill as `headgate bill --json` gives it."""
    total = {name: value for name, value in msgspec.structs.asdict(report.total).items() if name in _BILLED}
    return {
        "month": report.month,
        "total": total,
        "so_far_nanousd": report.projection.so_far_nanousd,
        "projected_nanousd": report.projection.projected_nanousd,
        "rate_days": report.projection.rate_days,
        "cached_share": report.cached_share,
        "cache_saved_nanousd": report.total.saved_nanousd - report.total.reused_nanousd,
        **{f"by_{group_by}": [_bill_row_json(group_by, row) for row in rows] for group_by, rows in report.by.items()},
    }


def _bill_row_json(group_by: GroupBy, row: UsageRow) -> dict[str, object]:
    kept = {name: value for name, value in msgspec.structs.asdict(row).items() if name in _BILLED}
    return {group_by: row.group, **kept, "cached_share": cached_share(row)}


class _Timings:
    """What percentiles are taken of."""

    __slots__ = ("first_byte_ms", "total_ms")

    def __init__(self) -> None:
        self.total_ms = array("q")
        self.first_byte_ms = array("q")


def _timings(
    connection: sa.Connection,
    group: sa.ColumnElement[Any],
    *where: sa.ColumnElement[bool],
    since_ns: int,
    until_ns: int,
) -> defaultdict[Any, _Timings]:
    """By group. Percentiles are taken here: window functions sort in the database and take three times as long."""
    statement = sa.select(group, calls.c.total_ms, calls.c.first_byte_ms).where(
        calls.c.at_ns >= since_ns, calls.c.at_ns < until_ns, calls.c.outcome == "completed", *where
    )
    found: defaultdict[Any, _Timings] = defaultdict(_Timings)
    for of, total_ms, first_byte_ms in connection.execute(statement):
        found[of].total_ms.append(total_ms)
        if first_byte_ms is not None:
            found[of].first_byte_ms.append(first_byte_ms)
    return found


def _arm_report(
    arm: str, model: str, counts: Sequence[Sequence[int]], timings: _Timings, first: ArmReport | None
) -> ArmReport:
    """`counts` holds those of each unit, in the order of `_BILLED`."""
    requests, errors, cost = (_BILLED.index(name) for name in ("requests", "errors", "cost_nanousd"))
    units = [Unit(of[requests], of[errors], of[cost]) for of in counts]
    of_errors, of_cost = error_rate(units), cost_per_request(units)
    return ArmReport(
        arm=arm,
        model=model,
        units=len(units),
        used=_row("", [sum(column) for column in zip(*counts, strict=True)], timings),
        error_rate=of_errors,
        cost_per_request=of_cost,
        error_rate_differs=differs(first.error_rate, of_errors) if first else None,
        cost_differs=differs(first.cost_per_request, of_cost) if first else None,
    )


def _arm_json(report: ArmReport) -> dict[str, object]:
    used = _used(report.used)
    del used["group"]
    rate, rate_low, rate_high = _parts(report.error_rate)
    costs = [None if value is None else round(value) for value in _parts(report.cost_per_request)]
    return {
        "arm": report.arm,
        "model": report.model,
        "units": report.units,
        **used,
        "error_rate": rate,
        "error_rate_low": rate_low,
        "error_rate_high": rate_high,
        "error_rate_differs": report.error_rate_differs,
        "cost_per_request_nanousd": costs[0],
        "cost_per_request_low_nanousd": costs[1],
        "cost_per_request_high_nanousd": costs[2],
        "cost_differs": report.cost_differs,
    }


def _parts(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)


def _row(name: str, counts: Sequence[int], timings: _Timings) -> UsageRow:
    total_ms, first_byte_ms = sorted(timings.total_ms), sorted(timings.first_byte_ms)
    return UsageRow(
        name,
        **dict(zip(_BILLED, counts, strict=False)),  # none when there are no calls
        p50_ms=_percentile(total_ms, 50),
        p95_ms=_percentile(total_ms, 95),
        first_byte_p50_ms=_percentile(first_byte_ms, 50),
        first_byte_p95_ms=_percentile(first_byte_ms, 95),
    )


def _percentile(ordered: list[int], percent: int) -> int | None:
    """Nearest rank: the smallest value that `percent` of all do not exceed."""
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else None


def _ordered(group_by: GroupBy, rows: list[UsageRow]) -> tuple[UsageRow, ...]:
    if group_by == "day":
        return tuple(sorted(rows, key=lambda row: row.group))
    return tuple(sorted(rows, key=lambda row: (-row.cost_nanousd, row.group)))


def _row_json(group_by: GroupBy, row: UsageRow) -> dict[str, object]:
    fields = _used(row)
    return {group_by: fields.pop("group"), **fields}


def _used(row: UsageRow) -> dict[str, Any]:  # Any: the values of a record
    """The row's fields, but for those that only the bill tells."""
    return {name: value for name, value in msgspec.structs.asdict(row).items() if name not in _OF_THE_BILL}


def _tokens(used: Usage) -> dict[str, int]:
    return {name: getattr(used, name) for name in TOKEN_FIELDS}


def _attempt_entry(row: sa.RowMapping) -> AttemptEntry:
    values = {name: row[name] for name in AttemptEntry.__struct_fields__}
    return AttemptEntry(**{**values, "usage": decode_usage(row["usage"])})


def _ledger_entry(row: sa.RowMapping, tried: tuple[AttemptEntry, ...]) -> LedgerEntry:
    named = {name: row[name] for name in LedgerEntry.__struct_fields__ if name in row}
    return LedgerEntry(
        **{**named, "streamed": bool(row["streamed"]), "reused": bool(row["reused"])},
        user=row["user_id"],
        usage=tried[-1].usage if tried else NO_USAGE,
        attempts=tried,
    )


def _name(group_by: GroupBy, of: Any) -> str:  # Any: a text, or the number of a day
    return _date(of * _DAY_NS).isoformat() if group_by == "day" else str(of)


def _date(at_ns: int) -> date:
    return _EPOCH.date() + timedelta(days=at_ns // _DAY_NS)


def _start_ns(day: date) -> int:
    return (day - _EPOCH.date()).days * _DAY_NS


def _rfc3339(at_ns: int) -> str:
    at = _EPOCH + timedelta(milliseconds=at_ns // 10**6)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
