"""The ledger priced again, by a catalogue that was corrected: tokens are stored, prices are dated rows.

What it is: the stored usage of ended attempts through `policy/pricing.py`, in batches, and one row of the audit.
What it is not: a reconciliation. A cost that was corrected by Anthropic's own report is better than any price list, and
stays unless all is asked for.

What was not billed (no price row) stays unbilled, calls that are not ended are left alone, and a second run finds
nothing to do. Rows are read and written `CALLS_AT_ONCE` calls at a time, each in a transaction of its own, so that a
gateway that is running gets its turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

import msgspec
import sqlalchemy as sa

from headgate.policy.pricing import price
from headgate.storage.audit import add_audit
from headgate.storage.database import begin_write
from headgate.storage.fold import PROCESS_LOST, decode_usage
from headgate.storage.tables import attempts, calls
from headgate.wire.catalog import Catalog

CALLS_AT_ONCE = 1_000


class Repriced(msgspec.Struct, frozen=True):
    """What changed, or would."""

    since_ns: int
    until_ns: int
    catalog_as_of: date
    attempts_seen: int = 0
    attempts_changed: int = 0
    calls_changed: int = 0
    kept_reconciled: int = 0
    """Attempts that would have changed, and keep what a reconciliation corrected them to."""
    cost_before_nanousd: int = 0
    """Of all attempts seen, as the next three."""
    cost_after_nanousd: int = 0
    saved_before_nanousd: int = 0
    saved_after_nanousd: int = 0


class _Sums(msgspec.Struct, frozen=True):
    """A side of the change, as the audit keeps it."""

    cost_nanousd: int
    saved_nanousd: int


class _Whole(msgspec.Struct, frozen=True):
    """The change, as the audit keeps it."""

    cost_nanousd: int
    saved_nanousd: int
    since_ns: int
    until_ns: int
    catalog_as_of: date
    attempts: int
    calls: int


class _Change(msgspec.Struct, frozen=True):
    call_id: str
    number: int
    price_id: str
    cost_nanousd: int
    saved_nanousd: int


class _Batch(msgspec.Struct):
    """What one batch of calls comes to."""

    after: tuple[int, str]
    """Time and id of its last call."""
    changes: list[_Change]
    seen: int = 0
    kept: int = 0
    cost_before_nanousd: int = 0
    cost_after_nanousd: int = 0
    saved_before_nanousd: int = 0
    saved_after_nanousd: int = 0


def reprice(
    engine: sa.Engine,
    catalog: Catalog,
    *,
    since_ns: int,
    until_ns: int,
    dry_run: bool,
    reconciled_too: bool = False,
    actor: str = "cli",
) -> Repriced:
    """Price calls that came in [since_ns, until_ns) again. With `dry_run` nothing is written.

    The row of the audit stands before the first change and says what all of them come to: a run that is killed has
    told what it began, and the next finishes it. Raises what the database raises.
    """
    planned = Repriced(since_ns, until_ns, catalog.as_of)
    with engine.connect() as connection:
        for batch in _batches(connection, catalog, since_ns, until_ns, reconciled_too):
            planned = _added(planned, batch)
    if dry_run or not planned.attempts_changed:
        return planned
    done = Repriced(since_ns, until_ns, catalog.as_of)
    after = (since_ns, "")
    while True:
        with begin_write(engine) as connection:
            found = _batch(connection, catalog, after, until_ns, reconciled_too)
            if found is None:
                return done
            if found.changes and not done.attempts_changed:
                _tell(connection, planned, at_ns=until_ns, actor=actor)
            _write(connection, found, reconciled_too=reconciled_too)
        done, after = _added(done, found), found.after


def _batches(
    connection: sa.Connection, catalog: Catalog, since_ns: int, until_ns: int, reconciled_too: bool
) -> Iterator[_Batch]:
    after = (since_ns, "")
    while (batch := _batch(connection, catalog, after, until_ns, reconciled_too)) is not None:
        yield batch
        after = batch.after


def _batch(
    connection: sa.Connection, catalog: Catalog, after: tuple[int, str], until_ns: int, reconciled_too: bool
) -> _Batch | None:
    """The next calls that came after that one, priced again; None: there are none."""
    here = (
        sa.select(calls.c.call_id, calls.c.at_ns, calls.c.state)
        .where(sa.tuple_(calls.c.at_ns, calls.c.call_id) > sa.tuple_(*after), calls.c.at_ns < until_ns)
        .order_by(calls.c.at_ns, calls.c.call_id)
        .limit(CALLS_AT_ONCE)
    )
    found = connection.execute(here).all()
    if not found:
        return None
    batch = _Batch((found[-1].at_ns, found[-1].call_id), [])
    came_ns = {call_id: at_ns for call_id, at_ns, state in found if state != "open"}
    of_these = sa.select(attempts).where(attempts.c.call_id.in_(came_ns), attempts.c.state != "open")
    for row in connection.execute(of_these.order_by(attempts.c.call_id, attempts.c.number)):
        batch.seen += 1
        before = (row.price_id, row.cost_nanousd, row.saved_nanousd)
        now = before
        if row.price_id:
            at_ns = row.at_ns if row.error_code == PROCESS_LOST else came_ns[row.call_id]
            cost = price(decode_usage(row.usage), _priced_model(row.price_id, row.model), at_ns, catalog)
            now = (cost.price_id, cost.cost_nanousd, cost.saved_nanousd)
        if now != before and row.estimated_nanousd is not None and not reconciled_too:
            batch.kept += 1
            now = before
        if now != before:
            batch.changes.append(_Change(row.call_id, row.number, *now))
        batch.cost_before_nanousd += row.cost_nanousd
        batch.cost_after_nanousd += now[1]
        batch.saved_before_nanousd += row.saved_nanousd
        batch.saved_after_nanousd += now[2]
    return batch


def _priced_model(price_id: str, asked: str) -> str:
    """The model that was priced: the one the answer named, which its price row tells where there was one of its own."""
    known = "+" not in price_id and not price_id.startswith("assumed/")
    return price_id.partition("/")[0] if known else asked


def _write(connection: sa.Connection, batch: _Batch, *, reconciled_too: bool) -> None:
    if not batch.changes:
        return
    one = sa.update(attempts).where(
        attempts.c.call_id == sa.bindparam("of_call"), attempts.c.number == sa.bindparam("of_number")
    )
    one = one.values(
        price_id=sa.bindparam("row"), cost_nanousd=sa.bindparam("cost"), saved_nanousd=sa.bindparam("saved")
    )
    if reconciled_too:
        # It is an estimate again, which the next reconciliation may correct.
        one = one.values(estimated_nanousd=None)
    connection.execute(
        one,
        [
            {
                "of_call": change.call_id,
                "of_number": change.number,
                "row": change.price_id,
                "cost": change.cost_nanousd,
                "saved": change.saved_nanousd,
            }
            for change in batch.changes
        ],
    )
    own = attempts.c.call_id == calls.c.call_id
    cost = sa.select(sa.func.sum(attempts.c.cost_nanousd)).where(own).scalar_subquery()
    saved = sa.select(sa.func.sum(attempts.c.saved_nanousd)).where(own).scalar_subquery()
    changed = sorted({change.call_id for change in batch.changes})
    connection.execute(
        sa.update(calls).where(calls.c.call_id.in_(changed)).values(cost_nanousd=cost, saved_nanousd=saved)
    )


def _tell(connection: sa.Connection, planned: Repriced, *, at_ns: int, actor: str) -> None:
    add_audit(
        connection,
        at_ns=at_ns,
        actor=actor,
        action="reprice",
        before=msgspec.json.encode(_Sums(planned.cost_before_nanousd, planned.saved_before_nanousd)),
        after=msgspec.json.encode(
            _Whole(
                planned.cost_after_nanousd,
                planned.saved_after_nanousd,
                planned.since_ns,
                planned.until_ns,
                planned.catalog_as_of,
                planned.attempts_changed,
                planned.calls_changed,
            )
        ),
    )


def _added(so_far: Repriced, batch: _Batch) -> Repriced:
    return msgspec.structs.replace(
        so_far,
        attempts_seen=so_far.attempts_seen + batch.seen,
        attempts_changed=so_far.attempts_changed + len(batch.changes),
        calls_changed=so_far.calls_changed + len({change.call_id for change in batch.changes}),
        kept_reconciled=so_far.kept_reconciled + batch.kept,
        cost_before_nanousd=so_far.cost_before_nanousd + batch.cost_before_nanousd,
        cost_after_nanousd=so_far.cost_after_nanousd + batch.cost_after_nanousd,
        saved_before_nanousd=so_far.saved_before_nanousd + batch.saved_before_nanousd,
        saved_after_nanousd=so_far.saved_after_nanousd + batch.saved_after_nanousd,
    )
