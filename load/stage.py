"""The stage of a load run: the simulator and the gateway as child processes on free loopback ports.

What it is: how they are started, found, given keys and stopped, each by its own process id, whatever ends the run.
What it is not: the load (`crowd.py`), nor what is made of it (`witness.py`, `report.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

UPSTREAM_KEY = "sk-ant-api03-only-the-gateway-knows-this"
READY_WITHIN_S = 20.0
STOP_WITHIN_S = 5.0
T = TypeVar("T")


class StageError(Exception):
    """A program did not start, or ended by itself; the message holds what it printed."""


@dataclass
class Child:
    """One program that runs."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """All it has printed."""
        return self.log.read_text(errors="replace")


@dataclass
class Place:
    """Where a load goes to. Without a gateway, `url` is the simulator's."""

    simulator_url: str
    url: str
    key: str = "any"
    operator_url: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    """For commands on the gateway's data directory."""


def get_json(
    url: str,
    *,
    data: Any = None,
    method: str | None = None,
    key: str = "",
    headers: Mapping[str, str] | None = None,
) -> Any:
    """What a control path answers. Blocks for 10 s at most."""
    body = None if data is None else json.dumps(data).encode()
    lines = {"content-type": "application/json", **({"x-api-key": key} if key else {}), **(headers or {})}
    request = urllib.request.Request(url, body, lines, method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read()
    return json.loads(text) if text else None


class Stage:
    """Starts programs, and stops them. `with Stage() as stage: …`"""

    def __init__(self, logs: Path | None = None, *, run: Sequence[str] = ("-m", "headgate")) -> None:
        """`logs` is a folder for what the programs print; without one it is thrown away. `run` is what Python is told
        to run them.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="headgate-load-")
        self._run = tuple(run)
        self._logs = logs
        self._children: list[Child] = []

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._directory.cleanup()

    def simulator(self, options: Sequence[str]) -> str:
        """The URL of a fresh simulator."""
        child = self._start("simulator", ["simulator", "--port", "0", *options], plain_environment())
        return _waited_for(child, lambda: _announced(child, "simulator listening on "))

    def gateway(self, simulator_url: str, settings: Mapping[str, str]) -> Place:
        """A fresh gateway in front of it. `settings` are those of docs/settings.md as variables, without the prefix."""
        environment = {
            **plain_environment(),
            "ANTHROPIC_API_KEY": UPSTREAM_KEY,
            "HEADGATE_DATA_DIR": str(Path(self._directory.name) / f"data-{len(self._children)}"),
            "HEADGATE_UPSTREAM_URL": simulator_url,
            "HEADGATE_LISTEN": "127.0.0.1:0",
            "HEADGATE_OPERATOR_LISTEN": "127.0.0.1:0",
            **{f"HEADGATE_{name}": value for name, value in settings.items()},
        }
        child = self._start("gateway", ["gateway"], environment)
        listening = _waited_for(child, lambda: _event(child, "listening"))
        place = Place(simulator_url, listening["gateway"], operator_url=listening["operator"], environment=environment)
        # It may name the end user and read what the operator reads.
        place.key = self.key(place, "load", "--scope", "app", "--scope", "messages", "--scope", "admin:read")
        return place

    def key(self, place: Place, name: str, *options: str) -> str:
        """A fresh key that the gateway knows."""
        done = subprocess.run(
            [sys.executable, "-m", "headgate", "keys", "create", "--name", name, *options, "--json"],
            env=place.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise StageError(f"no key was made: {done.stderr}")
        key: str = json.loads(done.stdout)["key"]
        within(READY_WITHIN_S, lambda: _is_known(place.operator_url, key), "the gateway to know a fresh key")
        return key

    def stop(self) -> None:
        """Stop all that runs, the last first, each by its id."""
        for child in reversed(self._children):
            if child.popen.poll() is None:
                child.popen.terminate()
                try:
                    child.popen.wait(STOP_WITHIN_S)
                except subprocess.TimeoutExpired:
                    child.popen.kill()
                    child.popen.wait()
            if self._logs is not None:
                self._logs.mkdir(parents=True, exist_ok=True)
                shutil.copy(child.log, self._logs)
        self._children.clear()

    def _start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        log = Path(self._directory.name) / f"{name}-{len(self._children)}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, *self._run, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for this program, which then stops its children by itself.
                start_new_session=True,
            )
        child = Child(name, popen, log)
        self._children.append(child)
        return child


def plain_environment() -> dict[str, str]:
    """This environment without settings of ours or credentials that happen to be in it."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("HEADGATE_", "ANTHROPIC_", "CLAUDE_"))
    }


def within(seconds: float, condition: Callable[[], T], what: str) -> T:
    """The condition's first true value. Raises StageError when there is none in time."""
    give_up_at = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > give_up_at:
            raise StageError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does, so that what was started is stopped."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _waited_for(child: Child, condition: Callable[[], T | None]) -> T:
    def look() -> T | None:
        if child.popen.poll() is not None:
            raise StageError(f"{child.name} ended with {child.popen.returncode}; it printed:\n{child.text()}")
        return condition()

    found = within(READY_WITHIN_S, look, f"the {child.name} to listen")
    assert found is not None
    return found


def _announced(child: Child, prefix: str) -> str | None:
    for line in child.text().splitlines():
        if line.startswith(prefix):
            return line.removeprefix(prefix).strip()
    return None


def _event(child: Child, name: str) -> dict[str, Any] | None:
    return next((line for line in _json_lines(child) if line.get("event") == name), None)


def _json_lines(child: Child) -> Iterator[dict[str, Any]]:
    for line in child.text().splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def _is_known(operator_url: str, key: str) -> bool:
    # Asked of the operator's listener: on the public one each refusal would count as a bad key of this address.
    request = urllib.request.Request(f"{operator_url}/admin/usage", headers={"x-api-key": key})
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.HTTPError as error:
        return error.code != 401
