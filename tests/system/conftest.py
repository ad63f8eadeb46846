"""Real processes on loopback: the simulator, the gateway in front of it, and the command line beside them.

What a test needs it starts through `stack`; everything is stopped by its own process id at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import pytest

UNLIMITED = {
    "PACING__RPM": "10000000",
    "PACING__ITPM": "1000000000",
    "PACING__OTPM": "1000000000",
    "PACING__COUNT_TOKENS_RPM": "10000000",
    "TIERS__FREE__RPM": "10000000",
    "TIERS__FREE__COUNT_TOKENS_RPM": "10000000",
    "ROUTING__FALLBACK": "",
    "BREAKER__FAILURES": "1000000",
    "BREAKER__WINDOW_REQUESTS_MIN": "1000000",
    "BREAKER__POISON_FAILURES": "1000000000",
    "BREAKER__SPEND_CAP_PROBE_S": "0.001",
    "CACHE__PLAN": "false",
    "CACHE__SINGLE_FLIGHT": "false",
    "CACHE__DIAGNOSTICS": "false",
    "VELOCITY__ENABLED": "false",
}
"""What a gateway is told that is not to stand in a test's way."""
UPSTREAM_KEY = "sk-ant-api03-only-the-gateway-may-know-this"
START_S = 30.0
"""What a program may take to start while others use the processor: no test is about it. Some 1 s otherwise."""


def until(condition: Callable[[], Any], *, within_s: float = 10.0, what: str = "") -> Any:
    """The condition's first true value. Fails the test when there is none in time."""
    give_up_at = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > give_up_at:
            raise AssertionError(f"not within {within_s} s: {what or condition}")
        time.sleep(0.01)


def get_json(url: str, *, data: Any = None, method: str | None = None) -> Any:
    """What a control path answers."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read()
    return json.loads(text) if text else None


@dataclass
class Process:
    """One of our programs."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """All it has printed."""
        return self.log.read_text()

    def lines(self, **match: Any) -> list[dict[str, Any]]:
        """Its JSON lines with these values."""
        found = []
        for line in self.text().splitlines():
            if line.startswith("{"):
                fields = json.loads(line)
                if all(fields.get(name) == value for name, value in match.items()):
                    found.append(fields)
        return found

    def stop(self, number: int = signal.SIGTERM, *, within_s: float = 20.0) -> int:
        """Send a signal and wait for the end."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            return self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"{self.name} did not stop within {within_s} s; it printed:\n{self.text()}") from None


@dataclass
class Simulator:
    """A running simulator."""

    process: Process
    url: str

    def requests(self) -> list[dict[str, Any]]:
        """Every request it has received, in order."""
        found: list[dict[str, Any]] = get_json(f"{self.url}/sim/requests?limit=10000")["requests"]
        return found

    def bill(self) -> dict[str, Any]:
        """What it would bill."""
        return get_json(f"{self.url}/sim/bill")  # type: ignore[no-any-return]

    def streams(self) -> Any:
        """Streams that are open now."""
        return get_json(f"{self.url}/sim/streams")

    def fault(self, **script: Any) -> None:
        """Script a fault (docs/simulator.md)."""
        get_json(f"{self.url}/sim/faults", data=script)

    def reset(self) -> None:
        """Forget everything."""
        get_json(f"{self.url}/sim/reset", data={})


@dataclass
class Gateway:
    """A running gateway."""

    process: Process
    url: str
    operator_url: str
    data_dir: Path
    environment: dict[str, str]

    def headgate(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on the gateway's data directory."""
        return subprocess.run(
            [sys.executable, "-m", "headgate", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=60,
        )

    def key(self, name: str = "tester", *options: str) -> str:
        """A fresh virtual key, known to the running gateway."""
        created = json.loads(self.headgate("keys", "create", "--name", name, *options, "--json").stdout)
        key: str = created["key"]
        until(lambda: self._knows(key), what="the gateway to know a fresh key")
        return key

    def _knows(self, key: str) -> bool:
        # Asked of the operator's listener: on the public one each refusal would count as a bad key of this address.
        request = urllib.request.Request(f"{self.operator_url}/admin/usage", headers={"x-api-key": key})
        try:
            with urllib.request.urlopen(request, timeout=10):
                return True
        except urllib.error.HTTPError as error:
            return error.code != 401

    def calls(self, at_least: int = 0, *, settled: bool = True) -> list[dict[str, Any]]:
        """The ledger's calls, oldest first, once there are `at_least` and none is open."""

        def read() -> list[dict[str, Any]] | None:
            calls = json.loads(self.headgate("calls", "--limit", "1000", "--json").stdout)["calls"]
            if len(calls) < at_least or (settled and any(call["outcome"] is None for call in calls)):
                return None
            return calls[::-1] or [{}]

        return [call for call in until(read, what=f"{at_least} calls in the ledger") if call]


@dataclass
class Stack:
    """Starts programs for one test and stops them after it."""

    directory: Path
    processes: list[Process] = field(default_factory=list)

    def start(self, name: str, *arguments: str, environment: dict[str, str]) -> Process:
        """Start `headgate …` and keep what it prints."""
        log = self.directory / f"{name}-{len(self.processes)}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", "headgate", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def simulator(self, *options: str) -> Simulator:
        """A simulator on a free port; by default it does not pace its answers."""
        speed = () if "--speed" in options else ("--speed", "0")
        process = self.start("simulator", "simulator", "--port", "0", *speed, *options, environment=base_environment())
        url = until(
            lambda: _announced(process, "simulator listening on "), within_s=START_S, what="the simulator to listen"
        )
        return Simulator(process, url)

    def gateway(
        self, upstream_url: str, *, data_dir: Path | None = None, limits: bool = False, **settings: str
    ) -> Gateway:
        """A gateway on free ports. `settings` are environment variables, `QUEUE__DEADLINE_S="2"` and the like.

        Without `limits` nobody is slowed down, and a failure is followed by nothing but a retry: most tests send more
        than any person would, and break the upstream on purpose.
        """
        data_dir = data_dir or self.directory / f"data-{len(self.processes)}"
        environment = {
            **base_environment(),
            "ANTHROPIC_API_KEY": UPSTREAM_KEY,
            "HEADGATE_DATA_DIR": str(data_dir),
            "HEADGATE_UPSTREAM_URL": upstream_url,
            "HEADGATE_LISTEN": "127.0.0.1:0",
            "HEADGATE_OPERATOR_LISTEN": "127.0.0.1:0",
            **({} if limits else {f"HEADGATE_{name}": value for name, value in UNLIMITED.items()}),
            **{f"HEADGATE_{name}": value for name, value in settings.items()},
        }
        process = self.start("gateway", "gateway", environment=environment)
        (listening,) = until(lambda: _gateway_listens(process), within_s=START_S, what="the gateway to listen")
        return Gateway(process, listening["gateway"], listening["operator"], data_dir, environment)

    def stop(self) -> None:
        """Stop all that runs, the last first."""
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()


def base_environment() -> dict[str, str]:
    """This environment without settings of ours or credentials that happen to be in it."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("HEADGATE_", "ANTHROPIC_", "CLAUDE_"))
    }


def _announced(process: Process, prefix: str) -> str | None:
    _fail_if_ended(process)
    for line in process.text().splitlines():
        if line.startswith(prefix):
            return line.removeprefix(prefix).strip()
    return None


def _gateway_listens(process: Process) -> list[dict[str, Any]]:
    _fail_if_ended(process)
    return process.lines(event="listening")


def _fail_if_ended(process: Process) -> None:
    if process.popen.poll() is not None:
        raise AssertionError(f"{process.name} ended with {process.popen.returncode}; it printed:\n{process.text()}")


@pytest.fixture
def sdk() -> Iterator[Callable[..., anthropic.Anthropic]]:
    """Makes clients of the official SDK that do not try again, and closes them: an open socket is a warning, later."""
    with ExitStack() as clients:
        yield lambda url, key: clients.enter_context(anthropic.Anthropic(base_url=url, api_key=key, max_retries=0))


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Programs of one test."""
    running = Stack(tmp_path)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def shared_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Programs that the tests of one file share."""
    running = Stack(tmp_path_factory.mktemp("stack"))
    yield running
    running.stop()
