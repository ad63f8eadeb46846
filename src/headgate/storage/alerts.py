"""Alerts in the table: kept, ended, listed. `alerts_json` is the form of `/admin/alerts` and `headgate alerts`.

What it is: transactions that block, for a thread or a command. What it is not: what decides whether to tell
(`policy/alerts.py`), though one cause has one open row, whichever process met it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from headgate.policy.alerts import TOLD_AGAIN_AFTER_NS, Alert, CallCost
from headgate.storage.database import begin_write
from headgate.storage.tables import alerts

LIST_MAX = 1_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class AlertNotFound(LookupError):
    """There is no alert of this number, or it has ended."""


class _Detail(msgspec.Struct, frozen=True, omit_defaults=True):
    """What stands in `detail`; unknown fields of a newer version are left alone."""

    calls: tuple[CallCost, ...] = ()
    repeats: int = 0


def save(engine: sa.Engine, alert: Alert) -> int:
    """Keep an alert; returns its number. Errors of the database pass through.

    Where its cause has an open row of the last day (another worker told it, or this one before a restart) that row
    counts one more repeat instead; an older one is ended, by `time`.
    """
    with begin_write(engine) as connection:
        same = _open_rows(alert.kind, alert.subject)
        row = connection.execute(sa.select(alerts).where(*same).order_by(alerts.c.id.desc()).limit(1)).one_or_none()
        if row is not None and alert.at_ns - row.at_ns < TOLD_AGAIN_AFTER_NS:
            detail = _detail(row.detail)
            repeated = msgspec.structs.replace(detail, repeats=detail.repeats + 1 + alert.repeats)
            connection.execute(sa.update(alerts).where(alerts.c.id == row.id).values(detail=_encoded(repeated)))
            return int(row.id)
        connection.execute(sa.update(alerts).where(*same).values(ended_at_ns=alert.at_ns, ended_by="time"))
        inserted = connection.execute(
            sa.insert(alerts).values(
                at_ns=alert.at_ns,
                kind=alert.kind,
                subject=alert.subject,
                message=alert.message,
                detail=_encoded(_Detail(alert.calls, alert.repeats)),
            )
        )
        (number,) = inserted.inserted_primary_key or (0,)
        return int(number)


def end(engine: sa.Engine, alert_id: int, *, by: str, at_ns: int) -> Alert:
    """End one alert; returns it as it stands then. Raises AlertNotFound."""
    with begin_write(engine) as connection:
        still = (alerts.c.id == alert_id, alerts.c.ended_at_ns.is_(None))
        if not connection.execute(sa.update(alerts).where(*still).values(ended_at_ns=at_ns, ended_by=by)).rowcount:
            raise AlertNotFound(f"there is no open alert {alert_id}; GET /admin/alerts lists them")
        return _alert(connection.execute(sa.select(alerts).where(alerts.c.id == alert_id)).one())


def end_cause(engine: sa.Engine, kind: str, subject: str, *, by: str, at_ns: int) -> int:
    """End what is open of a cause; returns how many rows that were."""
    with begin_write(engine) as connection:
        ended = sa.update(alerts).where(*_open_rows(kind, subject)).values(ended_at_ns=at_ns, ended_by=by)
        return connection.execute(ended).rowcount


def listed(
    connection: sa.Connection, *, since_ns: int = 0, only_open: bool = False, most: int = LIST_MAX
) -> tuple[Alert, ...]:
    """The newest first, since a moment, at most `most` (and LIST_MAX)."""
    query = sa.select(alerts).where(alerts.c.at_ns >= since_ns)
    if only_open:
        query = query.where(alerts.c.ended_at_ns.is_(None))
    rows = connection.execute(query.order_by(alerts.c.at_ns.desc(), alerts.c.id.desc()).limit(min(most, LIST_MAX)))
    return tuple(map(_alert, rows))


def alerts_json(found: Sequence[Alert]) -> dict[str, Any]:  # Any: JSON
    """`{"alerts": [{"id", "at", "kind", "subject", "message", "calls", "repeats", "ended_at", "ended_by"}]}`."""
    return {
        "alerts": [
            {
                "id": alert.id,
                "at": _text(alert.at_ns),
                "kind": alert.kind,
                "subject": alert.subject,
                "message": alert.message,
                "calls": [{"call_id": call.call_id, "cost_nanousd": call.cost_nanousd} for call in alert.calls],
                "repeats": alert.repeats,
                "ended_at": None if alert.ended_at_ns is None else _text(alert.ended_at_ns),
                "ended_by": alert.ended_by,
            }
            for alert in found
        ]
    }


def _open_rows(kind: str, subject: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (alerts.c.kind == kind, alerts.c.subject == subject, alerts.c.ended_at_ns.is_(None))


def _alert(row: Any) -> Alert:  # Any: SQLAlchemy's Row has no types for columns
    detail = _detail(row.detail)
    return Alert(
        kind=row.kind,
        subject=row.subject,
        message=row.message,
        at_ns=row.at_ns,
        calls=detail.calls,
        repeats=detail.repeats,
        id=row.id,
        ended_at_ns=row.ended_at_ns,
        ended_by=row.ended_by,
    )


def _detail(text: str) -> _Detail:
    return msgspec.json.decode(text, type=_Detail)


def _encoded(detail: _Detail) -> str:
    return msgspec.json.encode(detail).decode()


def _text(at_ns: int) -> str:
    at = _EPOCH + timedelta(microseconds=at_ns // 1000)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
