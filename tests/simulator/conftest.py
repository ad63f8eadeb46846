"""A simulator in a thread of its own, for tests that talk to it over real sockets."""

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from headgate.simulator.server import Simulator
from headgate.simulator.settings import SimulatorSettings

DEADLINE_S = 10.0


@dataclass(frozen=True)
class Running:
    """A simulator that serves."""

    url: str
    port: int

    def get(self, path: str) -> Any:  # Any: JSON, read by the test
        """The JSON of a path."""
        with urllib.request.urlopen(self.url + path, timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def order(self, path: str, value: object, method: str = "POST") -> Any:
        """Sends JSON to a path and reads JSON back."""
        request = urllib.request.Request(self.url + path, json.dumps(value).encode(), method=method)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def until(self, path: str, good: Callable[[Any], bool]) -> Any:
        """Reads a path until it is `good`; fails after ten seconds."""
        end = time.monotonic() + DEADLINE_S
        while True:
            value = self.get(path)
            if good(value):
                return value
            assert time.monotonic() < end, value


def _serve(settings: SimulatorSettings, stack: ExitStack) -> Running:
    ready = threading.Event()
    found: list[tuple[Simulator, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        async with Simulator(settings) as simulator:
            stop = asyncio.Event()
            found.append((simulator, asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(DEADLINE_S)
    simulator, loop, stop = found[0]

    def end() -> None:
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE_S)

    stack.callback(end)
    return Running(simulator.url, simulator.port)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts simulators with the given settings (port 0 and speed 0 unless told), and stops them at the end."""
    with ExitStack() as stack:
        yield lambda **settings: _serve(SimulatorSettings(**{"port": 0, "speed": 0.0} | settings), stack)


@pytest.fixture
def simulator(start: Callable[..., Running]) -> Running:
    """One simulator that answers at once."""
    return start()
