"""The ledger's side of a reconciliation: its sums by day and model, and the correction of its estimates.

What it is: a read of attempts in a span of whole UTC days, and one write: corrected costs of attempts and calls, the
rows of `reconciliations`, and a row of the audit, all or nothing.
What it is not: the decision (`policy/reconciliation.py`). Both block: never call them on the loop.

An attempt belongs to the day it began, whatever its call. Memory holds a line for each day and model and a record of
some 200 bytes for each estimated attempt; settled ones are added up as they are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from headgate.policy.pricing import upper_bound
from headgate.policy.reconciliation import Correction, Estimate, LedgerLine, Line, Tokens, model_id
from headgate.storage.audit import add_audit
from headgate.storage.database import begin_write
from headgate.storage.fold import decode_usage
from headgate.storage.tables import attempts, calls, reconciliations
from headgate.wire.catalog import DAY_NS, Catalog
from headgate.wire.usage import Usage
from headgate.wire.usage_report import day_of

LAST_ATTEMPT_NS = 3_600 * 10**9
"""No attempt begins later than this after its call: deadlines of waits and retries are minutes."""
ROWS_PER_READ = 1_000


class LedgerChanged(Exception):
    """An attempt is not any more what it was read as: another reconciliation ran. Nothing was written; ask again."""


class Written(msgspec.Struct, frozen=True):
    """What a reconciliation changed."""

    attempts: int
    before_nanousd: int
    """Sum of what the corrected attempts said."""
    after_nanousd: int


class _Audited(msgspec.Struct, frozen=True):
    first_day: int
    end_day: int
    workspace: str
    attempts: int
    cost_nanousd: int


class _Detail(msgspec.Struct, frozen=True):
    cause: str
    agrees: bool
    estimated_attempts: int
    ledger: Tokens
    reported: Tokens


def ledger_lines(
    connection: sa.Connection, catalog: Catalog, *, first_day: int, end_day: int
) -> tuple[LedgerLine, ...]:
    """What the ledger has of the UTC days [first_day, end_day), by day and model, in order.

    Attempts that are open, or whose call is, are left out: they have no cost yet. An answer with passes of several
    models is counted under the model that was asked.
    """
    sums: defaultdict[tuple[int, str], _Sum] = defaultdict(_Sum)
    statement = attempts_statement(first_day=first_day, end_day=end_day)
    for row in connection.execution_options(yield_per=ROWS_PER_READ).execute(statement).mappings():
        at_ns = row["at_ns"] or row["call_at_ns"]  # the intent of an attempt may be lost, its end never is
        day = day_of(at_ns)
        if not first_day <= day < end_day:
            continue
        usage, found = decode_usage(row["usage"]), sums[day, model_id(row["model"], catalog)]
        if row["state"] == "settled":
            found.settled += _tokens(usage)
            found.settled_nanousd += row["cost_nanousd"]
            found.batch_nanousd += row["cost_nanousd"] if usage.service_tier == "batch" else 0
            found.fast = found.fast or usage.speed == "fast"
            continue
        estimated_nanousd = row["cost_nanousd"] if row["estimated_nanousd"] is None else row["estimated_nanousd"]
        most_nanousd = upper_bound(
            max(usage.prompt_tokens, row["input_tokens_estimate"]),
            max(usage.output_tokens, row["max_tokens"]),
            row["model"],
            at_ns,
            catalog,
            speed=usage.speed,
            web_searches_max=usage.web_search_requests,
        )
        found.estimated += _tokens(usage)
        found.estimates.append(
            Estimate(
                call_id=row["call_id"],
                number=row["number"],
                estimated_nanousd=estimated_nanousd,
                upper_nanousd=max(most_nanousd, estimated_nanousd),
                cost_nanousd=row["cost_nanousd"],
            )
        )
    return tuple(found.line(day, model) for (day, model), found in sorted(sums.items(), key=lambda item: item[0]))


def attempts_statement(*, first_day: int, end_day: int) -> sa.Select[tuple[object, ...]]:
    """The query of `ledger_lines`, for it and for the test that explains it."""
    columns = (*attempts.columns, calls.c.at_ns.label("call_at_ns"))
    return (
        sa.select(*columns)
        .join(calls, calls.c.call_id == attempts.c.call_id)
        .where(
            calls.c.at_ns >= first_day * DAY_NS - LAST_ATTEMPT_NS,
            calls.c.at_ns < end_day * DAY_NS,
            calls.c.state != "open",
            attempts.c.state.in_(("settled", "estimated")),
        )
        .order_by(calls.c.at_ns, attempts.c.call_id, attempts.c.number)
    )


def write(
    engine: sa.Engine, lines: Sequence[Line], *, first_day: int, end_day: int, now_ns: int, actor: str = "cli"
) -> Written:
    """Correct the estimates and keep the lines. What is there already is left as it is, with its time.

    Raises LedgerChanged, and errors of the database; then nothing was written.
    """
    corrections = [correction for line in lines for correction in line.corrections]
    before_nanousd = sum(one.before_nanousd for one in corrections)
    after_nanousd = sum(one.after_nanousd for one in corrections)
    workspace = lines[0].workspace if lines else ""
    with begin_write(engine) as connection:
        if corrections:
            _correct(connection, corrections)
        for line in lines:
            _keep(connection, line, now_ns=now_ns)
        if corrections:
            said = (
                msgspec.json.encode(_Audited(first_day, end_day, workspace, len(corrections), nanousd))
                for nanousd in (before_nanousd, after_nanousd)
            )
            before, after = said
            add_audit(connection, at_ns=now_ns, actor=actor, action="reconcile", before=before, after=after)
    return Written(len(corrections), before_nanousd, after_nanousd)


class _Sum:
    """A line while it is added up."""

    __slots__ = ("batch_nanousd", "estimated", "estimates", "fast", "settled", "settled_nanousd")

    def __init__(self) -> None:
        self.settled_nanousd = self.batch_nanousd = 0
        self.fast = False
        self.settled = self.estimated = Tokens()
        self.estimates: list[Estimate] = []

    def line(self, day: int, model: str) -> LedgerLine:
        return LedgerLine(
            day,
            model,
            self.settled_nanousd,
            self.batch_nanousd,
            self.fast,
            self.settled,
            self.estimated,
            tuple(self.estimates),
        )


def _tokens(usage: Usage) -> Tokens:
    passes = usage.iterations or (usage,)
    return Tokens(
        sum(one.input_tokens for one in passes),
        sum(one.cache_read_tokens for one in passes),
        sum(one.cache_write_5m_tokens for one in passes),
        sum(one.cache_write_1h_tokens for one in passes),
        sum(one.output_tokens for one in passes),
        usage.web_search_requests,
    )


def _correct(connection: sa.Connection, corrections: Sequence[Correction]) -> None:
    of_call: sa.BindParameter[str] = sa.bindparam("of_call")
    # Many at once: the fold waits for the write lock, 0.2 s for 10,000, where a statement for each takes 2.8 s.
    changed = connection.execute(
        sa.update(attempts)
        .where(
            attempts.c.call_id == of_call,
            attempts.c.number == sa.bindparam("of_number"),
            attempts.c.cost_nanousd == sa.bindparam("said"),
            attempts.c.state == "estimated",
        )
        .values(cost_nanousd=sa.bindparam("now"), estimated_nanousd=sa.bindparam("first")),
        [
            {
                "of_call": one.call_id,
                "of_number": one.number,
                "said": one.before_nanousd,
                "now": one.after_nanousd,
                "first": one.estimated_nanousd,
            }
            for one in corrections
        ],
    )
    if changed.rowcount != len(corrections):
        raise LedgerChanged(f"{len(corrections) - changed.rowcount:,} of {len(corrections):,} attempts")
    connection.execute(
        sa.update(calls)
        .where(calls.c.call_id == of_call)
        .values(cost_nanousd=calls.c.cost_nanousd + sa.bindparam("more")),
        [{"of_call": one.call_id, "more": one.after_nanousd - one.before_nanousd} for one in corrections],
    )


def _keep(connection: sa.Connection, line: Line, *, now_ns: int) -> None:
    table = reconciliations
    detail = msgspec.json.encode(
        _Detail(line.cause, line.agrees, line.estimated_attempts, line.ledger_tokens, line.reported_tokens)
    ).decode()
    values = {
        "ledger_nanousd": line.ledger_nanousd,
        "reported_nanousd": line.reported_nanousd,
        "corrected_nanousd": line.corrected_nanousd,
        "detail": detail,
    }
    same_line = (table.c.day == line.day, table.c.model == line.model, table.c.workspace == line.workspace)
    kept = connection.execute(sa.select(*(table.c[name] for name in values)).where(*same_line)).first()
    if kept is None:
        named = {"day": line.day, "model": line.model, "workspace": line.workspace}
        connection.execute(sa.insert(table).values(**named, **values, at_ns=now_ns))
    elif tuple(kept) != tuple(values.values()):
        connection.execute(sa.update(table).where(*same_line).values(**values, at_ns=now_ns))
