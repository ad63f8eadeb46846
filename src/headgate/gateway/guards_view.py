"""`/admin/alerts` and `/admin/velocity`: what should be looked at, and who is held; ended and released from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response

from headgate.gateway.guards import AlertSink, SpendGuard
from headgate.policy.alerts import Alert
from headgate.policy.records import Principal
from headgate.storage import alerts as alert_table
from headgate.storage.alerts import AlertNotFound, alerts_json
from headgate.storage.moments import moment_ns
from headgate.wire import errors

_Answer = dict[str, Any]  # Any: JSON


def guards_router(
    engine: sa.Engine,
    guard: SpendGuard,
    sink: AlertSink,
    *,
    reader: Callable[..., Principal],
    writer: Callable[..., Principal],
    now_ns: Callable[[], int],
) -> APIRouter:
    """The routes. `reader` and `writer` are dependencies that let in who has `admin:read` and `admin:write`.

    Queries run in threads; what asks the guard runs on the loop, whose it is.
    """
    router = APIRouter()
    may_read = Depends(reader)
    who = Depends(writer)

    @router.get("/admin/alerts", dependencies=[may_read])
    def listed(
        since: Annotated[str, Query(description="7d, 24h, a date or an RFC 3339 time")] = "7d",
        open: Annotated[bool, Query(description="only those that have not ended")] = False,
    ) -> Response:
        """Alerts, the newest first, at most 1,000."""
        try:
            since_ns = moment_ns(since, now_ns=now_ns())
        except ValueError as error:
            return _error(400, "invalid_request", f"since: {error}")
        with engine.connect() as connection:
            found = alert_table.listed(connection, since_ns=since_ns, only_open=open)
        return _json(alerts_json([_with_repeats(alert, sink) for alert in found]))

    @router.post("/admin/alerts/{alert_id}/end")
    def end(alert_id: int, principal: Principal = who) -> Response:
        """It has been looked at: the next of its kind is told. Who is held stays so; release them for that."""
        if not 0 < alert_id < 1 << 63:
            return _error(404, "no_such_alert", f"There is no alert {alert_id}.")
        try:
            ended = alert_table.end(engine, alert_id, by=principal.user, at_ns=now_ns())
        except AlertNotFound as error:
            return _error(404, "no_such_alert", f"{error}.")
        sink.forget(ended.kind, ended.subject)
        return _json(alerts_json([ended])["alerts"][0])

    @router.get("/admin/velocity", dependencies=[may_read])
    async def velocity() -> Response:
        """What each person and key spent in ten minutes, their limits, and who is held; of this process."""
        return _json(guard.snapshot())

    @router.post("/admin/velocity/{subject:path}/release")
    async def release(subject: str, principal: Principal = who) -> Response:
        """Let one go that is held, `user:NAME` or `key:ID`; its limit is double for an hour."""
        if not guard.release(subject, by=principal.user):
            return _error(404, "not_held", f"{subject} is not held here. GET /admin/velocity shows who is.")
        return _json({"released": subject})

    return router


def _with_repeats(alert: Alert, sink: AlertSink) -> Alert:
    """The table knows the repeats of other processes, and of before a restart."""
    if alert.ended_at_ns is not None:
        return alert
    return msgspec.structs.replace(alert, repeats=alert.repeats + sink.repeats(alert.kind, alert.subject))


def _json(answer: object) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _error(status: int, code: str, message: str) -> Response:
    error_type = errors.TYPE_BY_STATUS.get(status, "invalid_request_error")
    body = errors.envelope(error_type, message, code=code, request_id="")
    return Response(body, status, media_type="application/json")
