"""`headgate up`: starts the gateway, before it the simulator where no Anthropic key is set, and stops both together.

Each runs as a process of its own, as it would in production. This one only watches: when one ends, the others are
stopped, since half a stack that looks alive helps nobody.
"""

import argparse
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from headgate.cli import stores
from headgate.cli.errors import CommandError, Exit
from headgate.cli.settings import environment_of_child
from headgate.cli.welcome import reachable, welcome
from headgate.gateway.settings import Settings, host_port
from headgate.storage.keys import KeyStore

READY_WITHIN_S = 30.0
"""Generous: a start takes a second, and a long journal is replayed first."""
POLL_EVERY_S = 0.05
DEFAULT_SIMULATOR_PORT = 9100


class Program:
    """One of our programs, as a child in a session of its own: Ctrl-C reaches it through us, once."""

    def __init__(self, name: str, arguments: Sequence[str], **environment: str) -> None:
        self.name = name
        self._process = subprocess.Popen(  # noqa: S603  our own words, and no shell
            [sys.executable, "-P", "-m", "headgate", *arguments],
            env=environment_of_child(**environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def wait_until_ready(self, *, host: str, port: int, path: str) -> None:
        """Return once it answers 200 on `path`. Raises CommandError when it ends or takes too long."""
        give_up_at = time.monotonic() + READY_WITHIN_S
        while not _answers(host, port, path):
            code = self._process.poll()
            if code is not None:
                raise CommandError(Exit.FAILED, f"the {self.name} did not start (exit {code}); it says why above.")
            if time.monotonic() > give_up_at:
                raise CommandError(Exit.FAILED, f"the {self.name} was not ready within {READY_WITHIN_S:.0f} s.")
            time.sleep(POLL_EVERY_S)

    def ended(self, status: int) -> str:
        """Take note that it ended, as `os.wait` told; say how."""
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return f"the {self.name} ended (exit {self._process.returncode})"

    def stop(self) -> None:
        """Ask it to stop. It may take its time: streams are let finish."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it now."""
        if self._process.poll() is None:
            self._process.kill()

    def join(self) -> None:
        """Wait until it has ended."""
        self._process.wait()


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate up` until Ctrl-C, or until one of the programs ends."""
    parser = argparse.ArgumentParser(
        prog=f"headgate {name}", description="Start the gateway; with no ANTHROPIC_API_KEY, a simulator behind it."
    )
    parser.add_argument("--simulator-port", type=int, default=DEFAULT_SIMULATOR_PORT, metavar="PORT")
    options = parser.parse_args(arguments)
    settings = stores.settings()
    elsewhere = settings.upstream_url != Settings.model_fields["upstream_url"].default
    simulated = not elsewhere and not settings.anthropic_api_key.get_secret_value()
    _refuse_taken("HEADGATE_LISTEN", *host_port(settings.listen))
    _refuse_taken("HEADGATE_OPERATOR_LISTEN", *host_port(settings.operator_listen))
    simulator_port = options.simulator_port if simulated else None
    if simulator_port is not None:
        _refuse_taken("--simulator-port", "127.0.0.1", simulator_port)
    key = _fresh_key()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
            signal.signal(number, _interrupt)
    programs: list[Program] = []
    try:
        _start(programs, settings, simulator_port=simulator_port)
        print(welcome(settings, key, simulator_port=simulator_port), flush=True)
        pid, status = os.wait()
        how = next(program.ended(status) for program in programs if program.pid == pid)
        raise CommandError(Exit.FAILED, f"{how}; stopped the rest.")
    except KeyboardInterrupt:
        print("\nStopping; open streams may finish. Ctrl-C again stops at once.", flush=True)
    finally:
        _stop(programs)


def _interrupt(_: int, __: FrameType | None) -> None:
    """SIGTERM and a closed terminal end us as Ctrl-C does."""
    raise KeyboardInterrupt


def _start(programs: list[Program], settings: Settings, *, simulator_port: int | None) -> None:
    """Start in order, each when the one before it answers. What was started is in `programs` whatever happens."""
    environment = {}
    if simulator_port is not None:
        programs.append(Program("simulator", ["simulator", "--port", str(simulator_port)]))
        programs[-1].wait_until_ready(host="127.0.0.1", port=simulator_port, path="/sim/bill")
        environment = {
            "HEADGATE_UPSTREAM_URL": f"http://127.0.0.1:{simulator_port}",
            "ANTHROPIC_API_KEY": "sk-ant-simulator",  # the simulator takes any
        }
    programs.append(Program("gateway", ["gateway"], **environment))
    for listen in (settings.listen, settings.operator_listen):
        host, port = host_port(listen)
        programs[-1].wait_until_ready(host=reachable(host), port=port, path="/readyz")


def _stop(programs: Sequence[Program]) -> None:
    """Stop the last first: the gateway may still be waiting for the simulator."""
    try:
        for program in reversed(programs):
            program.stop()
            program.join()
    except KeyboardInterrupt:
        for program in programs:
            program.kill()
            program.join()


def _fresh_key() -> str:
    with stores.database() as engine:
        return KeyStore(engine, now_ns=time.time_ns).create(name="up").key


def _refuse_taken(setting: str, host: str, port: int) -> None:
    """Say now, in words, what a child would say in a stack of lines. Raises CommandError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the servers do: what a dead connection still holds is not taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CommandError(
                Exit.ADDRESS, f"cannot listen on {host}:{port}: {error.strerror}. Choose another with {setting}."
            ) from None


def _answers(host: str, port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=1.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
