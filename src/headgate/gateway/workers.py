"""Several gateway processes behind one port: started, watched, started again, and ended together.

What it is: the supervisor of `headgate gateway --workers N`, a process that does no request's work. Each worker is the
same program anew, never a fork of a running one; the kernel deals the connections among them (`SO_REUSEPORT`), Redis
holds the limits for all, and each has a journal of its own that is folded into the one database.
What it is not: a worker (`app.py`), nor what a worker knows of being one (`worker.py`).

The first worker starts alone: what is wrong with the settings or the data directory is said once. A worker that ends
is started again (`policy/restarts.py`). While one serves, another that cannot be started is no reason to end the rest.
"""

from __future__ import annotations

import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import structlog

from headgate.gateway.app import ListenError, configure_logging
from headgate.gateway.settings import Settings, SettingsError, host_port
from headgate.gateway.worker import LISTENING, WORKERS_MAX
from headgate.policy.restarts import Restarts
from headgate.storage.database import open_database

KILL_AFTER_S = 30.0
"""Beyond the time that a drain may take."""
PORT_MAX = 65_535

log = structlog.get_logger()


class WorkersFailed(Exception):
    """The workers ended by themselves, and starting them again is no use. `code` is what the last one ended with."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def run_workers(settings: Settings, count: int) -> None:
    """Run `count` (2 to 64) workers until SIGTERM or SIGINT, then drain all.

    Raises SettingsError, ListenError and DatabaseRefused before anything is started, and WorkersFailed.
    """
    assert 1 < count <= WORKERS_MAX
    if not settings.redis_url:
        raise SettingsError(
            f"HEADGATE_REDIS_URL: not set. {count} workers keep the limits in Redis together: set it, as in "
            "redis://127.0.0.1:6379/0, or leave --workers out."
        )
    _check_operator_ports(settings, count)
    open_database(settings.data_dir, now_ns=time.time_ns).dispose()  # migrated once, before there are several
    configure_logging()
    with ExitStack() as stack:
        port = _hold_port(settings.listen, stack)

        def command(index: int) -> list[str]:
            # -P: what lies in the working directory is no module of ours.
            program = [sys.executable, "-P", "-m", "headgate"]
            return [*program, "gateway", "--workers", str(count), "--worker", f"{index}@{port}"]

        drain_s = settings.server.drain_timeout_s + KILL_AFTER_S
        Supervisor(command, count, restarts=Restarts, drain_s=drain_s).run()


class _Child:
    """A worker, running or waiting for its next start."""

    __slots__ = ("hung_up", "index", "lifeline", "process", "restarts", "serves", "start_at")

    def __init__(self, index: int, restarts: Restarts) -> None:
        self.index = index
        self.restarts = restarts
        self.process: subprocess.Popen[bytes] | None = None
        self.lifeline: socket.socket | None = None
        self.serves = False
        self.hung_up = False
        """A SIGHUP came while it started: it may have read its settings before."""
        self.start_at: float | None = None
        """Monotonic seconds; None: it runs, or it is not to be started."""

    def send(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.process is not None:
            self.process.send_signal(number)


class Supervisor:
    """Keeps `count` processes running. `command` is what to run as the worker of an index."""

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        count: int,
        *,
        restarts: Callable[[], Restarts],
        drain_s: float,
    ) -> None:
        self._command = command
        self._children = [_Child(index, restarts()) for index in range(count)]
        self._drain_s = drain_s
        self._kill_at: float | None = None
        """When those that still drain are ended; None: nothing drains."""
        self._has_been_up = False
        """All workers have served at the same time."""
        self._failure: WorkersFailed | None = None
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Until SIGTERM or SIGINT, and then until all have ended. Raises WorkersFailed."""
        hears, tells = socket.socketpair()
        tells.setblocking(False)
        hears.setblocking(False)
        self._selector.register(hears, selectors.EVENT_READ)
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
            numbers.append(signal.SIGHUP)
        handlers = {number: signal.signal(number, _leave_it_to_the_loop) for number in numbers}
        wakeup = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
        try:
            self._children[0].start_at = time.monotonic()
            while self._kill_at is None or any(child.process for child in self._children):
                self._turn(hears)
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for child in self._children:
                child.send(signal.SIGKILL)
            self._selector.close()
            hears.close()
            tells.close()
        if self._failure is not None:
            raise self._failure

    def _turn(self, hears: socket.socket) -> None:
        """Wait for the next thing to happen, and do it."""
        due = [child.start_at for child in self._children if child.start_at is not None]
        if self._kill_at is not None:
            due.append(self._kill_at)
        timeout = max(0.0, min(due) - time.monotonic()) if due else None
        numbers: set[int] = set()
        for key, _ in self._selector.select(timeout):
            if key.fileobj is hears:
                numbers.update(hears.recv(4096))
            else:
                self._hear(key.data)
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            self._drain(signal.SIGTERM)
        if signal.SIGHUP in numbers:
            for child in self._children:
                child.send(signal.SIGHUP) if child.serves else None
                child.hung_up = not child.serves
        for child in self._children:
            if child.process is not None and (code := child.process.poll()) is not None:
                self._ended(child, code)
        now = time.monotonic()
        for child in self._children:
            if child.start_at is not None and child.start_at <= now:
                self._start(child)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill()

    def _start(self, child: _Child) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # In a session of its own: Ctrl-C reaches it through us, once.
            child.process = subprocess.Popen(self._command(child.index), stdin=theirs.fileno(), start_new_session=True)  # noqa: S603
        ours.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, child)
        child.lifeline, child.start_at, child.serves, child.hung_up = ours, None, False, False

    def _hear(self, child: _Child) -> None:
        """What a worker says is that it listens; its end is told by SIGCHLD."""
        assert child.lifeline is not None
        said = b""
        with suppress(OSError):
            said = child.lifeline.recv(64)
        if not said:
            self._selector.unregister(child.lifeline)
            return
        if said != LISTENING or child.serves:
            return
        child.serves = True
        child.restarts.serves(time.monotonic())
        if child.hung_up:
            child.hung_up = False
            child.send(signal.SIGHUP)
        if self._kill_at is not None:
            return
        if not self._has_been_up:
            for other in self._children:  # the first is well, so the others may come
                if other.process is None and other.start_at is None:
                    other.start_at = time.monotonic()
        if all(each.serves for each in self._children):
            log.info("workers_listening", workers=len(self._children))
            self._has_been_up = True

    def _ended(self, child: _Child, code: int) -> None:
        assert child.process is not None
        assert child.lifeline is not None
        with suppress(KeyError, ValueError):
            self._selector.unregister(child.lifeline)
        child.lifeline.close()
        pid, served = child.process.pid, child.serves
        child.process, child.serves = None, False
        now = time.monotonic()
        if self._kill_at is not None:
            # One that has not come so far as to listen has no handler yet.
            if code and self._failure is None and (served or code != -signal.SIGTERM):
                self._failure = WorkersFailed(f"worker {child.index} did not end well ({_said(code)})", 1)
            return
        child.start_at = child.restarts.ended(now)
        again_in_s = round(child.start_at - now, 1)
        log.error("worker_ended", worker=child.index, pid=pid, how=_said(code), again_in_s=again_in_s)
        self._give_up_if_hopeless(child, code)

    def _give_up_if_hopeless(self, child: _Child, code: int) -> None:
        if self._has_been_up:
            gives_up = all(each.restarts.is_hopeless and not each.serves for each in self._children)
        else:
            # What it refuses to start with (cli/errors.py) will not mend itself.
            gives_up = child.restarts.is_hopeless or code > 1
        if not gives_up:
            return
        times = child.restarts.in_a_row
        text = (
            f"worker {child.index} ended {times} times in a row ({_said(code)})"
            if times > 1
            else (f"worker {child.index} did not start ({_said(code)})")
        )
        self._failure = WorkersFailed(f"{text}; it says why above. Stopped the rest.", code if code > 0 else 1)
        log.error("workers_gave_up", worker=child.index, times=times, how=_said(code))
        self._drain(signal.SIGTERM)

    def _drain(self, number: int) -> None:
        """End all; again is nothing new, but the signal is passed on."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._drain_s
        for child in self._children:
            child.start_at = None
            child.send(number)

    def _kill(self) -> None:
        """End those that do not."""
        left = [child.index for child in self._children if child.process is not None]
        log.error("workers_killed", workers=left)
        for child in self._children:
            child.send(signal.SIGKILL)
        self._kill_at = time.monotonic() + KILL_AFTER_S


def _leave_it_to_the_loop(_: int, __: object) -> None:
    """The number comes out of the wakeup socket."""


def _said(code: int) -> str:
    return f"exit {code}" if code >= 0 else signal.Signals(-code).name


def _check_operator_ports(settings: Settings, count: int) -> None:
    """Each worker's must be there to be had. Raises ListenError."""
    host, port = host_port(settings.operator_listen)
    if not port:
        return
    ports = range(port, port + count)
    span = f"{count} workers need the operator ports {port} to {port + count - 1}"
    mend = "Choose another first one with HEADGATE_OPERATOR_LISTEN."
    if ports[-1] > PORT_MAX:
        raise ListenError(f"{span}, and there is none above {PORT_MAX}. {mend}")
    if host_port(settings.listen)[1] in ports:
        raise ListenError(f"{span}, and clients come to {settings.listen}. {mend}")
    for each in ports:
        try:
            with ExitStack() as stack:
                _bind(host, each, stack)
        except OSError as error:
            raise ListenError(f"{span}: cannot listen on {host}:{each}: {error.strerror}. {mend}") from None


def _hold_port(address: str, stack: ExitStack) -> int:
    """Bind the public port, so that nobody else has it between two workers; returns its number. Raises ListenError.

    A socket that is bound and does not listen gets no connections.
    """
    host, port = host_port(address)
    try:
        if port:
            # Two gateways that share ports by SO_REUSEPORT would share each other's: first without.
            with ExitStack() as probe:
                _bind(host, port, probe)
        return _bind(host, port, stack, reuse_port=True)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {address}: {error.strerror}. Choose another with HEADGATE_LISTEN."
        ) from None


def _bind(host: str, port: int, stack: ExitStack, *, reuse_port: bool = False) -> int:
    """Bind every address of a host, as a server would; returns the port. Raises OSError."""
    infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in dict.fromkeys(infos):
        bound = stack.enter_context(socket.socket(family, kind, protocol))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address[0], port, *address[2:]))
        port = bound.getsockname()[1]
    return port
