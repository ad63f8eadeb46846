"""The operator listener: `/admin/*`, `/metrics` and `/docs`, for those who run the gateway. Off the hot path: FastAPI.

Every `/admin` route demands a key with its scope. `/metrics` and the health of the process are open: the listener is
on loopback unless somebody says otherwise, and neither holds a prompt, a key or a person's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import CollectorRegistry
from starlette.exceptions import HTTPException

from headgate import __version__
from headgate.gateway.budgets import BudgetRules
from headgate.gateway.budgets_view import budgets_router
from headgate.gateway.guards import AlertSink, SpendGuard
from headgate.gateway.guards_view import guards_router
from headgate.gateway.limits_view import LimitsView
from headgate.policy.experiments import Experiment
from headgate.policy.records import Principal, Scope
from headgate.storage import cache_report, reports
from headgate.storage.interfaces import KeyRefused, KeyRing, KeysUnavailable, Money
from headgate.storage.moments import moment_ns
from headgate.wire import errors

_Answer = dict[str, Any]  # Any: JSON


class AdminError(Exception):
    """A request to `/admin` that is refused, in Anthropic's envelope like every error of ours."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def operator_app(
    engine: sa.Engine,
    keys: KeyRing,
    registry: CollectorRegistry,
    *,
    now_ns: Callable[[], int],
    is_ready: Callable[[], bool],
    limits: Callable[[], LimitsView],
    resume: Callable[[], bool],
    experiments: Callable[[], Sequence[Experiment]] = tuple,
    guard: SpendGuard,
    alerts: AlertSink,
    money: Money,
    rules: Callable[[], BudgetRules],
) -> FastAPI:
    """The application. Its queries block, so FastAPI runs them in threads. `experiments` are those that run now.

    `limits` tells how the limits stand; `resume` ends the pause after a spend cap. Both are for the loop's thread.
    """
    app = FastAPI(title="Headgate", version=__version__, openapi_url="/openapi.json", redoc_url=None)

    def allowed(scope: Scope) -> Callable[[Request], Principal]:
        def check(request: Request) -> Principal:
            authorization = request.headers.get("authorization", "")
            bearer = authorization[7:] if authorization[:7].lower() == "bearer " else ""
            presented = (request.headers.get("x-api-key") or bearer).strip()
            try:
                principal = keys.authenticate(presented.encode("latin-1", "replace"))
            except KeyRefused:
                raise AdminError(401, "invalid_key", "Send a key with scope admin:read as x-api-key.") from None
            except KeysUnavailable as error:
                raise AdminError(503, "keys_unavailable", str(error)) from None
            if scope not in principal.scopes:
                raise AdminError(403, "scope_missing", f"This key does not have the scope '{scope}'.")
            return principal

        return check

    reader = Depends(allowed("admin:read"))

    def moment(text: str, name: str) -> int:
        try:
            return moment_ns(text, now_ns=now_ns())
        except ValueError as error:
            raise AdminError(400, "invalid_request", f"{name}: {error}") from None

    @app.get("/admin/usage", dependencies=[reader])
    def usage(
        group_by: Annotated[str, Query(description=f"one of {', '.join(reports.GROUPS)}")] = "user",
        since: Annotated[str, Query(description="24h, 7d, a date or an RFC 3339 time")] = "24h",
        until: Annotated[str, Query(description="the same; empty: now")] = "",
    ) -> _Answer:
        """Requests, errors, tokens, cost and latency of a span of time, grouped."""
        until_ns = moment(until, "until") if until else now_ns() + 1
        with engine.connect() as connection:
            return reports.usage_json(
                reports.usage(connection, group_by, since_ns=moment(since, "since"), until_ns=until_ns)
            )

    @app.get("/admin/experiments", dependencies=[reader])
    def experiments_report(
        since: Annotated[str, Query(description="7d, 24h, a date or an RFC 3339 time")] = "7d",
        until: Annotated[str, Query(description="the same; empty: now")] = "",
    ) -> _Answer:
        """How the arms of experiments did: requests, errors, latency, tokens and cost, and what differs from the first.

        Errors a request have Wilson's 95 % interval, cost a request the normal one; both are made over conversations
        (persons, where there is none), which is what an arm is dealt to.
        """
        until_ns = moment(until, "until") if until else now_ns() + 1
        with engine.connect() as connection:
            return reports.experiments_json(
                reports.experiments(connection, experiments(), since_ns=moment(since, "since"), until_ns=until_ns)
            )

    @app.get("/admin/calls", dependencies=[reader])
    def calls(limit: int = 50, cursor: str = "") -> _Answer:
        """Calls with their attempts, the newest first; `cursor` of an answer asks for the next page."""
        with engine.connect() as connection:
            return reports.calls_json(reports.calls_page(connection, limit=limit, cursor=cursor))

    @app.get("/admin/cache", dependencies=[reader])
    def cache(
        since: Annotated[str, Query(description="7d, 24h, a date or an RFC 3339 time")] = "7d",
        until: Annotated[str, Query(description="the same; empty: now")] = "",
    ) -> _Answer:
        """What prompt caching saved and lost, by family of prompts, with where and why prompts parted."""
        until_ns = moment(until, "until") if until else now_ns() + 1
        with engine.connect() as connection:
            report = cache_report.cache_report(connection, moment(since, "since"), until_ns)
        return cache_report.cache_json(report)

    @app.get("/admin/limits", dependencies=[reader])
    async def limits_now() -> Response:
        """Anthropic's limits as they stand, who waits and how long, and which models are left alone."""
        return Response(msgspec.json.encode(limits()), media_type="application/json")

    @app.post("/admin/limits/resume", dependencies=[Depends(allowed("admin:write"))])
    async def resume_now() -> _Answer:
        """There is money again: send calls without waiting for the probe that would find out."""
        return {"resumed": resume()}

    app.include_router(
        guards_router(engine, guard, alerts, reader=allowed("admin:read"), writer=allowed("admin:write"), now_ns=now_ns)
    )

    app.include_router(budgets_router(engine, money, rules, reader=allowed("admin:read"), now_ns=now_ns))

    @app.get("/metrics")
    def metrics() -> Response:
        """Prometheus metrics of this process."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/livez")
    def alive() -> Response:
        """The process runs."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz")
    def ready() -> Response:
        """It serves: it is not draining."""
        well = is_ready()
        return Response("ok\n" if well else "draining\n", 200 if well else 503, media_type="text/plain")

    @app.exception_handler(AdminError)
    def refused(_: Request, error: AdminError) -> Response:
        return _error(error.status, error.code, error.message)

    @app.exception_handler(reports.InvalidQuery)
    def unanswerable(_: Request, error: reports.InvalidQuery) -> Response:
        return _error(400, "invalid_request", str(error))

    @app.exception_handler(HTTPException)
    def missing(_: Request, error: HTTPException) -> Response:
        return _error(
            error.status_code, "no_such_path" if error.status_code == 404 else "invalid_request", error.detail
        )

    @app.exception_handler(RequestValidationError)
    def unprocessable(_: Request, error: RequestValidationError) -> Response:
        problems = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors())
        return _error(400, "invalid_request", problems)

    return app


def _error(status: int, code: str, message: str) -> Response:
    error_type = errors.TYPE_BY_STATUS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    body = errors.envelope(error_type, message, code=code, request_id="")
    return Response(body, status, media_type="application/json")
