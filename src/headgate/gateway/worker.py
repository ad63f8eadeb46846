"""One gateway process among several of one machine: what it shares with the others, and the line to who started it.

What it is: the number of the process, its share of the addresses, call ids that no other process gives out, and the
lifeline. What it is not: a supervisor (that is `workers.py`), nor anything a gateway that is alone has to know about.

The lifeline is a socket in the place of standard input. The worker says on it, once, that it listens; it hears nothing
but the end, which comes however the supervisor ends, also by `kill -9`: then the worker drains.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable

WORKERS_MAX = 64
LISTENING = b"listening\n"
_COUNTER_MAX = 0xFFFF_FFFF


class NoSupervisor(Exception):
    """This process was told to be a worker, and nobody watches over it."""


class Worker:
    """Which of `count` processes this is (`index` from 0), and where it listens."""

    def __init__(self, index: int = 0, count: int = 1, *, port: int | None = None) -> None:
        """`port` is the public one that the supervisor holds for all. Raises NoSupervisor."""
        assert 0 <= index < count <= WORKERS_MAX
        self.index = index
        self.count = count
        self._port = port
        self._lifeline = _inherited() if count > 1 else None

    @property
    def is_one_of_several(self) -> bool:
        """Whether other processes share the port and the log with this one."""
        return self.count > 1

    def public_port(self, port: int) -> int:
        """Where to listen for clients, when the settings say `port`: all workers on the same."""
        return port if self._port is None else self._port

    def operator_port(self, port: int) -> int:
        """Where the operator's listener is, when the settings say `port`: each has its own metrics, so its own port."""
        return port and port + self.index

    def listens(self, on_orphaned: Callable[[], None]) -> None:
        """Tell the supervisor, and from now on notice its end. From the loop's thread."""
        if self._lifeline is None:
            return
        lifeline = self._lifeline
        loop = asyncio.get_running_loop()

        def heard() -> None:
            try:
                if lifeline.recv(64):
                    return
            except BlockingIOError:
                return
            except OSError:
                pass  # as good as its end
            loop.remove_reader(lifeline.fileno())
            on_orphaned()

        loop.add_reader(lifeline.fileno(), heard)
        try:
            lifeline.send(LISTENING)
        except OSError:
            pass  # it has ended already, and `heard` will tell


class CallIds:
    """Makes `call_` and 24 hex digits: the second it began, the worker, dice, a counter.

    They begin with the time, so that the ledger's rows are appended and not scattered (decision 0003). Two workers of
    one gateway never make the same: their numbers differ, and one that is started again begins in a later second.
    Gateways on several machines have the dice, 24 bits for those that begin in the same second.
    """

    __slots__ = ("_counter", "_now_ns", "_prefix", "_worker")

    def __init__(self, worker: int, *, now_ns: Callable[[], int]) -> None:
        self._worker = worker
        self._now_ns = now_ns
        self._begin()

    def __call__(self) -> str:
        """The next one."""
        if self._counter == _COUNTER_MAX:
            self._begin()
        self._counter += 1
        return f"{self._prefix}{self._counter:08x}"

    def _begin(self) -> None:
        self._counter = 0
        self._prefix = f"call_{self._now_ns() // 1_000_000_000:08x}{self._worker:02x}{secrets.token_hex(3)}"


def _inherited() -> socket.socket:
    try:
        lifeline = socket.socket(fileno=0)
    except OSError:
        raise NoSupervisor("--worker is for the processes that `headgate gateway --workers` starts") from None
    lifeline.setblocking(False)
    return lifeline
