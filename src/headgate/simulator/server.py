"""The simulator as a running server: sockets, clocks and signals. `Simulator` inside a program or test, `run` as a
program.
"""

import asyncio
import signal
import ssl
import sys
import time
from contextlib import AsyncExitStack
from types import TracebackType

from headgate.simulator.app import App
from headgate.simulator.http import Connection
from headgate.simulator.models import load_catalogue
from headgate.simulator.settings import SimulatorSettings
from headgate.simulator.ticker import Ticker
from headgate.simulator.world import World

try:
    import uvloop
except ImportError:  # optional: plain asyncio does the same, a little slower
    new_event_loop = asyncio.new_event_loop
else:
    new_event_loop = uvloop.new_event_loop

BACKLOG = 4_096
SWEEP_S = 1.0


class Simulator:
    """A simulated Claude API on a socket, from `async with` to its end.

    async with Simulator(SimulatorSettings(port=0)) as simulator:
        client = AsyncAnthropic(base_url=simulator.url, api_key="any")
    """

    world: World
    """Its state, to look at; exists once the server runs."""

    def __init__(self, settings: SimulatorSettings | None = None) -> None:
        """Port 0 of the settings (the default here) takes a free one; `url` knows it once the server runs."""
        self.settings = settings or SimulatorSettings(port=0)
        self.port = self.settings.port
        self._stack = AsyncExitStack()
        self._connections: set[Connection] = set()
        self._connection_count = 0

    @property
    def url(self) -> str:
        """Base URL, without a slash at its end."""
        scheme = "http" if self.settings.tls_certificate is None else "https"
        return f"{scheme}://{self.settings.host}:{self.port}"

    async def __aenter__(self) -> "Simulator":
        self._loop = asyncio.get_running_loop()
        self._tls = self._tls_context()
        self._ticker = Ticker(self._loop, time.monotonic)
        self.world = World(self.settings, load_catalogue(), self._ticker, clock=time.monotonic, wall=time.time)
        self._app = App(self.world, self._refuse)
        await self._listen()
        self._tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._sweeping = self._tasks.create_task(self._sweep())
        self._refusing: asyncio.Task[None] | None = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticker.close()
        self._sweeping.cancel()
        if self._refusing is not None:
            self._refusing.cancel()
        await self._stack.aclose()
        self._server.close()
        for connection in tuple(self._connections):
            connection.reset()
        await self._server.wait_closed()

    async def _listen(self) -> None:
        self._server = await self._loop.create_server(
            self._connect, self.settings.host, self.port, ssl=self._tls, backlog=BACKLOG
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def _connect(self) -> Connection:
        self._connection_count += 1
        connection = Connection(self._connection_count, self._app.serve, time.monotonic, self._connections.discard)
        self._connections.add(connection)
        return connection

    def _refuse(self, for_s: float) -> None:
        """Closes the port and every connection, and opens the port again after `for_s` seconds."""
        if self._refusing is None or self._refusing.done():
            self._refusing = self._tasks.create_task(self._stay_closed(for_s))

    async def _stay_closed(self, for_s: float) -> None:
        self._server.close()
        for connection in tuple(self._connections):
            if connection.idle:
                connection.close()
            else:
                connection.reset()
        await self._server.wait_closed()
        await asyncio.sleep(for_s)
        await self._listen()

    async def _sweep(self) -> None:
        """Closes connections that take too long over a request head or are not used."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = time.monotonic()
            for connection in tuple(self._connections):
                limit_s = self.settings.header_timeout_s if connection.mid_request else self.settings.idle_timeout_s
                if connection.idle and now_s - connection.since_s > limit_s:
                    connection.close()

    def _tls_context(self) -> ssl.SSLContext | None:
        if self.settings.tls_certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.settings.tls_certificate, self.settings.tls_key)
        return context


def run(settings: SimulatorSettings) -> None:
    """Serves until SIGTERM or SIGINT. Prints one line with the URL to stdout once it answers."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: SimulatorSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Simulator(settings) as simulator:
        sys.stdout.write(f"simulator listening on {simulator.url}\n")
        sys.stdout.flush()
        await stop.wait()
