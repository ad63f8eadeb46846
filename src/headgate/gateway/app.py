"""Composition root: settings into a running gateway. The only file here that knows clocks, dice and signals."""

from __future__ import annotations

import asyncio
import gc
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AsyncExitStack
from typing import Any

import sqlalchemy as sa
import structlog
import uvicorn
from prometheus_client.registry import CollectorRegistry

from headgate.gateway.answer_reuse import AnswerReuse
from headgate.gateway.budgets import EVERYBODY, BudgetRules, SeedTimes, spend_alert, tier_of
from headgate.gateway.endpoints import HOP_HEADER, Endpoints
from headgate.gateway.guards import AlertSink, SpendGuard, velocity_policy
from headgate.gateway.keep_warm import WarmKeeper, spent_on_warming
from headgate.gateway.limits_view import limits_view
from headgate.gateway.operator import operator_app
from headgate.gateway.pipeline import Pipeline
from headgate.gateway.policies import Policies, policies
from headgate.gateway.prompt_caching import KeptPrompts, PromptCaching
from headgate.gateway.purse import Purses
from headgate.gateway.server import Server
from headgate.gateway.settings import Settings, SettingsError, host_port, reload
from headgate.gateway.tasks import Tasks
from headgate.gateway.traffic import Traffic
from headgate.gateway.upstream import Upstream
from headgate.gateway.worker import CallIds, Worker
from headgate.policy.answer_reuse import ReuseRule
from headgate.policy.budgets import AlertLine, Budgets, periods
from headgate.policy.cache_lint import CacheDeltas
from headgate.policy.limiter import Limiter
from headgate.policy.pricing import price
from headgate.policy.spend_velocity import VelocityPolicy
from headgate.storage import cache_report
from headgate.storage.answers import FILE_NAME, Answers, SqliteAnswers, remove_file
from headgate.storage.database import begin_write, open_database
from headgate.storage.interfaces import Limits, Money
from headgate.storage.keys import LocalKeyRing
from headgate.storage.ledger import LocalLedger
from headgate.storage.limits import LocalLimits
from headgate.storage.money import LocalMoney, ledger_name, ledger_reader
from headgate.storage.redis_answers import RedisAnswers
from headgate.storage.redis_limits import RedisLimits, RedisMissing
from headgate.storage.redis_money import RedisMoney
from headgate.storage.spend_history import spend_history
from headgate.telemetry.log_writer import LogWriter
from headgate.telemetry.metrics import CallMetrics
from headgate.telemetry.shared_output import render_whole
from headgate.wire.catalog import Catalog, packaged
from headgate.wire.usage import Usage

try:
    import uvloop
except ImportError:  # not made for every platform
    uvloop = None  # type: ignore[assignment]

log = structlog.get_logger()

SWEEP_EVERY_S = 30.0
BUDGETS_EVERY_S = 1.0
FINDINGS_EVERY_S = 5.0
TICK_S_MAX = 0.25
GC_THRESHOLD = 50_000
"""Objects between two collections. A call leaves no cycles behind; the default of 700 would look twenty times a second
at what is alive (measured: 141 µs of CPU a request, 125 with this)."""


class ListenError(Exception):
    """An address cannot be listened on. The text names the setting that moves it."""


def run(settings: Settings, worker: Worker | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Without `worker` it is alone.

    Raises SettingsError, ListenError, DatabaseRefused and LedgerUnavailable before anything is served.
    """
    if not settings.anthropic_api_key.get_secret_value():
        raise SettingsError(
            "ANTHROPIC_API_KEY: not set. Set it, or ANTHROPIC_API_KEY_FILE; "
            "`headgate up` runs without one, on the simulator."
        )
    worker = worker or Worker()
    configure_logging(worker)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(Gateway(settings, worker).serve())


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (on CPython 3.11 it saves a third of a request's CPU), else asyncio's own."""
    return uvloop.new_event_loop if uvloop is not None else None  # type: ignore[redundant-expr]


def configure_logging(worker: Worker | None = None) -> None:
    """Off the hot path: one JSON line an event, on standard output like the calls'."""

    is_shared = worker is not None and worker.is_one_of_several

    def add_worker(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # structlog's
        if worker is not None and is_shared:
            event["worker"] = worker.index
        return event

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", key="ts"),
            add_worker,
            structlog.processors.format_exc_info,
            render_whole if is_shared else structlog.processors.JSONRenderer(),
        ],
        # A line and its end in one write: workers share the output.
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )


class Gateway:
    """One gateway process: made, served once, gone."""

    def __init__(self, settings: Settings, worker: Worker | None = None) -> None:
        self._settings = settings
        self._worker = worker or Worker()
        self._stopping = asyncio.Event()
        self._draining = False
        self._stopped = False
        self._new_call_id = CallIds(self._worker.index, now_ns=time.time_ns)
        self._budget_rules = BudgetRules()
        self._seed_times = SeedTimes()
        self._housekeeping = 0
        """Tasks of the process itself, beside those of calls."""
        self.port = 0
        self.operator_port = 0

    async def serve(self, started: Callable[[Gateway], None] | None = None) -> None:
        """Start, tell `started`, serve until `stop` or a signal, drain, close."""
        settings = self._settings
        async with AsyncExitStack() as stack:
            catalog = packaged()
            engine = open_database(settings.data_dir, now_ns=time.time_ns)
            stack.callback(engine.dispose)
            keys = LocalKeyRing(engine, now_ns=time.time_ns, monotonic=time.monotonic)
            keys.start()
            stack.callback(keys.close)
            ledger = LocalLedger(
                settings.data_dir,
                engine,
                price=_pricer(catalog),
                now_ns=time.time_ns,
                durability=settings.ledger.durability,
            )
            stack.callback(ledger.close)
            upstream = Upstream(settings.upstream_url, settings.upstream, clock=time.monotonic)
            stack.callback(upstream.close)
            tasks = Tasks(_crashed)
            metrics = CallMetrics(lambda: self._gauges(upstream, server, tasks, writer, pipeline))
            writer = LogWriter(
                sys.stdout.fileno() if settings.log.calls else None,
                metrics.observe,
                is_shared=self._worker.is_one_of_several,
            )
            writer.start()
            stack.callback(writer.close)
            hop = secrets.token_hex(8).encode()
            now_in_force = policies(settings, catalog)
            limits = await self._limits(stack)
            traffic = Traffic(limits, now_in_force, clock=time.monotonic, jitter=random.random)
            alerts = AlertSink(engine, now_ns=time.time_ns)
            alerts.start()
            stack.callback(alerts.close)
            guard = _guard(settings, alerts)
            money = await self._money(stack, engine, ledger, catalog, now_in_force, limits)
            await asyncio.gather(money.seed(), _seed_guard(guard, engine))
            reuse = await self._reuse(stack, catalog, tasks)
            pipeline = Pipeline(
                settings,
                policies=now_in_force,
                traffic=traffic,
                purses=Purses(money, guard, catalog),
                reuse=reuse,
                caching=PromptCaching(settings.cache, catalog, clock=time.monotonic, now_ns=time.time_ns),
                upstream=upstream,
                ledger=ledger,
                catalog=catalog,
                put_log_line=writer.put,
                tasks=tasks,
                clock=time.monotonic,
                now_ns=time.time_ns,
                jitter=random.random,
                upstream_head=_upstream_head(settings, upstream, hop),
                fingerprint_key=secrets.token_bytes(16),
            )
            endpoints = Endpoints(
                pipeline,
                keys,
                new_call_id=self._new_call_id,
                hop=hop,
                is_ready=lambda: not self._draining,
                settings=settings.server,
            )
            server = Server(endpoints, settings.server, clock=time.monotonic)
            await _listen(server, "HEADGATE_LISTEN", settings.listen, self._worker)
            self.port = server.port
            registry = CollectorRegistry()
            registry.register(metrics)
            operator = await self._start_operator(engine, keys, registry, tasks, pipeline, alerts)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            warming = self._warm_keeper(pipeline, engine, ledger)
            loop.add_signal_handler(signal.SIGHUP, self._reload, pipeline, catalog, warming)
            tasks.start(self._tick(server, upstream, pipeline, ledger))
            tasks.start(self._watch_budgets(pipeline, alerts))
            tasks.start(self._keep_findings(pipeline, engine))
            if self._worker.index == 0:
                tasks.start(warming.run())
            else:
                pipeline.caching.kept = KeptPrompts(bytes_max=0)
            self._housekeeping = len(tasks)
            # What is alive now stays alive; the collector need not look at it again.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_THRESHOLD)
            log.info(
                "listening",
                gateway=_url(settings.listen, self.port),
                operator=_url(settings.operator_listen, self.operator_port),
                upstream=settings.upstream_url,
                data_dir=str(settings.data_dir),
            )
            self._worker.listens(on_orphaned=self.stop)
            if started is not None:
                started(self)
            await self._stopping.wait()
            warming.stop()
            await self._drain(server, pipeline)
            operator.should_exit = True
            await tasks.join(timeout_s=5.0)

    async def _limits(self, stack: AsyncExitStack) -> Limits:
        """Of this process alone, or of all that share a Redis."""
        if not self._settings.redis_url:
            return LocalLimits(Limiter(), time.monotonic)
        try:
            limits = RedisLimits(self._settings.redis_url, clock=time.monotonic, replicas_expected=self._worker.count)
        except RedisMissing as error:
            raise SettingsError(str(error)) from None
        await limits.start()
        stack.push_async_callback(limits.close)
        return limits

    async def _money(
        self,
        stack: AsyncExitStack,
        engine: sa.Engine,
        ledger: LocalLedger,
        catalog: Catalog,
        in_force: Policies,
        limits: Limits,
    ) -> Money:
        """The budgets, counted here or where the limits are."""
        self._budget_rules = in_force.budgets
        read = ledger_reader(engine, ledger, catalog, lambda name: tier_of(self._budget_rules)(name))
        if not self._settings.redis_url:
            return LocalMoney(Budgets(), clock=time.monotonic, now_ns=time.time_ns, read=read)
        money = RedisMoney(
            self._settings.redis_url,
            clock=time.monotonic,
            now_ns=time.time_ns,
            read=read,
            replicas=lambda: limits.replicas,
            ledger=ledger_name(self._settings.data_dir),
        )
        await money.start()
        stack.push_async_callback(money.close)
        return money

    async def _reuse(self, stack: AsyncExitStack, catalog: Catalog, tasks: Tasks) -> AnswerReuse | None:
        """The answers that are kept; where no endpoint wants that any more, none are."""
        settings = self._settings
        if not settings.reuse.endpoints:
            await asyncio.to_thread(remove_file, settings.data_dir)
            return None
        bytes_max = settings.reuse.bytes_max
        answers: Answers = (
            RedisAnswers(settings.redis_url, bytes_max=bytes_max)
            if settings.redis_url
            else SqliteAnswers(settings.data_dir / FILE_NAME, bytes_max=bytes_max, now_ns=time.time_ns)
        )
        rules = {
            label: ReuseRule(endpoint.ttl_s, endpoint.shared_by_users)
            for label, endpoint in settings.reuse.endpoints.items()
        }
        reuse = AnswerReuse(
            answers,
            rules,
            upstream=settings.upstream_url,
            catalog=catalog,
            tasks=tasks,
            clock=time.monotonic,
            now_ns=time.time_ns,
        )
        stack.push_async_callback(reuse.close)
        return reuse

    async def _watch_budgets(self, pipeline: Pipeline, alerts: AlertSink) -> None:
        """Compare the count with the ledger now and then, and tell when everybody's day passes the alert line."""
        money, line, times = pipeline.purses.money, AlertLine(), self._seed_times
        times.due(time.monotonic(), uncertain=False)  # the start has read it
        while not self._stopped:
            await asyncio.sleep(BUDGETS_EVERY_S)
            now_ns = time.time_ns()
            said = spend_alert(line, money.snapshot([EVERYBODY]), pipeline.policies.budgets, now_ns)
            if said is not None:
                alerts.raise_alert("budget_alert_line", periods(now_ns).day, said)
            if times.due(time.monotonic(), uncertain=money.uncertain):
                await money.seed()

    async def _keep_findings(self, pipeline: Pipeline, engine: sa.Engine) -> None:
        """What the linter finds is in the database some seconds later, and at the end."""

        def keep(found: CacheDeltas) -> None:
            with begin_write(engine) as connection:
                cache_report.save(connection, found)

        while not self._stopped:
            await _until_or(lambda: self._stopped, FINDINGS_EVERY_S)
            found = pipeline.caching.take_findings()
            if not (found.findings or found.families):
                continue
            try:
                await asyncio.to_thread(keep, found)
            except sa.exc.SQLAlchemyError as error:
                # They are for a report: the next ones will do.
                log.warning("cache_findings_lost", findings=len(found.findings), reason=str(error))

    def _warm_keeper(self, pipeline: Pipeline, engine: sa.Engine, ledger: LocalLedger) -> WarmKeeper:
        """Made in every worker, and run by the first of them alone: the day's cap is that of one."""

        def read_spent(at_ns: int) -> int:
            ledger.flush()
            with engine.connect() as connection:
                return spent_on_warming(connection, at_ns)

        return WarmKeeper(
            pipeline,
            self._settings.cache,
            new_call_id=self._new_call_id,
            read_spent=read_spent,
            shares=lambda: pipeline.traffic.limits.replicas // self._worker.count,
        )

    def _reload(self, pipeline: Pipeline, catalog: Catalog, warming: WarmKeeper) -> None:
        """SIGHUP: read the settings again. Calls go on under those they began with; what is wrong changes nothing."""
        try:
            self._settings, waiting = reload(self._settings)
        except SettingsError as error:
            log.error("reload_refused", reason=str(error), mend="correct the settings and send SIGHUP again")
            return
        pipeline.policies = policies(self._settings, catalog)
        self._budget_rules = pipeline.policies.budgets
        self._seed_times.soon()  # of who had no cap until now only the ledger knows what they spent
        pipeline.traffic.apply(pipeline.policies)
        pipeline.caching.apply(self._settings.cache)
        warming.apply(self._settings.cache)
        velocity = self._settings.velocity
        pipeline.purses.guard.apply(_velocity_policy(self._settings), enabled=velocity.enabled)
        log.info("reloaded", need_restart=waiting)

    def stop(self) -> None:
        """Begin to drain. For the loop's thread."""
        self._stopping.set()

    async def _drain(self, server: Server, pipeline: Pipeline) -> None:
        """Readiness off, nothing new, streams finish up to the limit, the rest hear that we restart."""
        self._draining = True
        server.stop_accepting()
        log.info("draining", calls=len(pipeline.live), timeout_s=self._settings.server.drain_timeout_s)
        until = time.monotonic() + self._settings.server.drain_timeout_s
        await _until(lambda: not (server.busy() or pipeline.live) or time.monotonic() > until)
        if pipeline.live:
            pipeline.interrupt_all()
            soon = time.monotonic() + 2.0
            await _until(lambda: not pipeline.live or time.monotonic() > soon)
        server.abort_all()
        self._stopped = True
        log.info("stopped")

    async def _tick(self, server: Server, upstream: Upstream, pipeline: Pipeline, ledger: LocalLedger) -> None:
        """Hold every deadline: one timer for all, since a timer for each request would cost more than the request."""
        every_s = _tick_s(self._settings)
        swept_at = time.monotonic()
        while not self._stopped:
            await asyncio.sleep(every_s)
            now = time.monotonic()
            server.tick(now)
            upstream.tick(now)
            pipeline.tick(now)
            if now - swept_at > SWEEP_EVERY_S:
                swept_at = now
                ledger.sweep(pipeline.live.keys())

    async def _start_operator(
        self,
        engine: sa.Engine,
        keys: LocalKeyRing,
        registry: CollectorRegistry,
        tasks: Tasks,
        pipeline: Pipeline,
        alerts: AlertSink,
    ) -> uvicorn.Server:
        host, port = host_port(self._settings.operator_listen)
        port = self._worker.operator_port(port)
        app = operator_app(
            engine,
            keys,
            registry,
            now_ns=time.time_ns,
            is_ready=lambda: not self._draining,
            limits=lambda: limits_view(pipeline.traffic, time.monotonic()),
            resume=pipeline.traffic.account.reset,
            experiments=lambda: pipeline.policies.experiments,
            guard=pipeline.purses.guard,
            alerts=alerts,
            money=pipeline.purses.money,
            rules=lambda: pipeline.policies.budgets,
        )
        operator = uvicorn.Server(
            uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=2)
        )
        try:
            sockets = [operator.config.bind_socket()]
            sockets[0].listen()  # from here on who connects waits for uvicorn, and is not refused
        except (OSError, SystemExit):
            raise ListenError(
                f"cannot listen on {host}:{port}. Choose another with HEADGATE_OPERATOR_LISTEN."
            ) from None
        self.operator_port = sockets[0].getsockname()[1]
        tasks.start(_serve_operator(operator, sockets))
        return operator

    def _gauges(
        self, upstream: Upstream, server: Server, tasks: Tasks, writer: LogWriter, pipeline: Pipeline
    ) -> Mapping[str, int]:
        pool = upstream.snapshot()
        return {
            "client_connections": len(server),
            "calls_open": len(pipeline.live) + max(len(tasks) - self._housekeeping, 0),
            "upstream_connections": pool["open"],
            "upstream_connections_idle": pool["idle"],
            "log_lines_dropped": writer.dropped,
        }


def _velocity_policy(settings: Settings) -> VelocityPolicy:
    velocity = settings.velocity
    return velocity_policy(
        usd_per_10_min=velocity.usd_per_10_min, history_factor=velocity.history_factor, hold_s=velocity.hold_s
    )


def _guard(settings: Settings, alerts: AlertSink) -> SpendGuard:
    return SpendGuard(_velocity_policy(settings), alerts, clock=time.monotonic, enabled=settings.velocity.enabled)


async def _seed_guard(guard: SpendGuard, engine: sa.Engine) -> None:
    def read() -> dict[str, dict[int, int]]:
        with engine.connect() as connection:
            return spend_history(connection, now_ns=time.time_ns())

    guard.seed(await asyncio.to_thread(read))


async def _serve_operator(operator: uvicorn.Server, sockets: list[socket.socket]) -> None:
    # Signals are ours: uvicorn's handlers would stop the operator and leave the gateway.
    await operator._serve(sockets)


async def _listen(server: Server, setting: str, address: str, worker: Worker) -> None:
    host, port = host_port(address)
    try:
        await server.listen(host, worker.public_port(port), reuse_port=worker.is_one_of_several)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror}. Choose another with {setting}.") from None


def _url(address: str, port: int) -> str:
    return f"http://{address.rpartition(':')[0]}:{port}"


async def _until(reached: Callable[[], bool]) -> None:
    while not reached():  # noqa: ASYNC110  what is waited for is spread over many objects; ends are rare
        await asyncio.sleep(0.02)


async def _until_or(reached: Callable[[], bool], seconds: float) -> None:
    """Return after so long, or sooner when it is reached."""
    end_at = time.monotonic() + seconds
    while not reached() and time.monotonic() < end_at:  # noqa: ASYNC110  as above
        await asyncio.sleep(0.2)


def _upstream_head(settings: Settings, upstream: Upstream, hop: bytes) -> bytes:
    """The header lines every request to Anthropic begins with; the only place where the key becomes bytes."""
    return b"host: %b\r\naccept-encoding: identity\r\nx-api-key: %b\r\n%b: %b\r\n" % (
        upstream.authority,
        settings.anthropic_api_key.get_secret_value().encode(),
        HOP_HEADER,
        hop,
    )


def _pricer(catalog: Catalog) -> Callable[[Usage, str, int], tuple[int, int, str]]:
    def priced(usage: Usage, model: str, at_ns: int) -> tuple[int, int, str]:
        cost = price(usage, model, at_ns, catalog)
        return cost.cost_nanousd, cost.saved_nanousd, cost.price_id

    return priced


def _tick_s(settings: Settings) -> float:
    """Fine enough for the shortest deadline that is set: tests set short ones."""
    server, upstream = settings.server, settings.upstream
    shortest = min(
        server.header_timeout_s,
        server.body_timeout_s,
        server.write_timeout_s,
        server.ping_after_s,
        upstream.first_byte_timeout_s,
        upstream.stall_timeout_s,
    )
    return min(TICK_S_MAX, max(shortest / 5, 0.01))


def _crashed(error: BaseException) -> None:
    log.error("task_crashed", exc_info=error)
