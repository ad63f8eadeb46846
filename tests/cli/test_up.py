"""`headgate up` as a user meets it: what it prints is pasted into a shell, and what it started is looked for after."""

import http.client
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest


@dataclass
class Stack:
    """A running `headgate up` and what it printed."""

    process: "subprocess.Popen[str]"
    printed: list[str]
    ports: dict[str, int]

    def line(self, word: str) -> str:
        """The printed line that contains a word."""
        return next(line for line in self.printed if word in line)

    def key(self) -> str:
        """The fresh key."""
        return self.line("key  ").split()[1]

    def child(self, word: str) -> int:
        """The pid of the program that was started with this word."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,command="], capture_output=True, text=True, check=True)
        rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
        return next(int(pid) for pid, parent, command in rows if int(parent) == self.process.pid and word in command)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def is_open(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def ports() -> dict[str, int]:
    """Where this test's programs listen."""
    return dict(zip(("gateway", "operator", "simulator"), free_ports(3), strict=True))


@pytest.fixture
def environment(ports: dict[str, int]) -> dict[str, str]:
    """Settings of those ports."""
    return {
        "HEADGATE_LISTEN": f"127.0.0.1:{ports['gateway']}",
        "HEADGATE_OPERATOR_LISTEN": f"127.0.0.1:{ports['operator']}",
    }


@pytest.fixture
def stack(headgate, ports: dict[str, int], environment: dict[str, str]) -> Iterator[Stack]:
    """`headgate up` without a key, once it has printed everything."""
    process = headgate.start("up", "--simulator-port", str(ports["simulator"]), **environment)
    printed = []
    for line in process.stdout:
        printed.append(line.rstrip())
        if "Ctrl-C stops" in line:
            break
    try:
        yield Stack(process, printed, ports)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def paste(command: str) -> str:
    """What a shell prints for the command."""
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_key_the_simulator_answers_and_the_banner_says_so(stack: Stack) -> None:
    assert "SIMULATOR" in "\n".join(stack.printed)


def test_the_pasted_commands_work_and_their_calls_are_in_the_ledger(headgate, stack: Stack) -> None:
    assert shutil.which("curl"), "install curl: a command to paste uses it"
    assert '"type":"message"' in paste(stack.line("curl http")).replace(": ", ":")
    assert paste(stack.line("import Anthropic")).strip()
    assert f"ANTHROPIC_AUTH_TOKEN={stack.key()} claude" in stack.line("AUTH_TOKEN")
    stack.process.terminate()
    stack.process.communicate(timeout=30)
    calls = headgate.json("calls")["calls"]
    assert [(call["outcome"], call["key_id"]) for call in calls] == [("completed", stack.key()[3:11])] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_everything(stack: Stack, number: signal.Signals) -> None:
    assert all(is_open(port) for port in stack.ports.values())
    stack.process.send_signal(number)
    _, said = stack.process.communicate(timeout=30)
    assert stack.process.returncode == 0, said
    assert not any(is_open(port) for port in stack.ports.values())


@pytest.mark.parametrize("name", ["gateway", "simulator"])
def test_when_one_program_dies_the_others_are_stopped_and_it_is_named(stack: Stack, name: str) -> None:
    subprocess.run(["kill", "-9", str(stack.child(f"headgate {name}"))], check=True)
    _, said = stack.process.communicate(timeout=30)
    assert stack.process.returncode == 1
    assert f"the {name} ended" in said
    assert not any(is_open(port) for port in stack.ports.values())


def test_a_revoked_key_is_shut_out_within_a_second_of_a_running_gateway(headgate, stack: Stack) -> None:
    assert headgate("keys", "revoke", stack.key()[3:11]).returncode == 0

    def status() -> int:
        with closing(http.client.HTTPConnection("127.0.0.1", stack.ports["gateway"], timeout=10)) as connection:
            connection.request("GET", "/v1/models", headers={"x-api-key": stack.key()})
            with connection.getresponse() as response:
                return response.status

    give_up_at = time.monotonic() + 1.0
    while status() != 401:
        assert time.monotonic() < give_up_at


@pytest.mark.parametrize(
    ("taken", "setting"),
    [("gateway", "HEADGATE_LISTEN"), ("operator", "HEADGATE_OPERATOR_LISTEN"), ("simulator", "--simulator-port")],
)
def test_a_taken_port_names_the_setting_that_moves_it_and_starts_nothing(
    headgate, ports: dict[str, int], environment: dict[str, str], taken: str, setting: str
) -> None:
    with socket.create_server(("127.0.0.1", ports[taken])):
        code, said = headgate.refusal("up", "--simulator-port", str(ports["simulator"]), **environment)
    assert code == 6
    assert setting in said
    assert str(ports[taken]) in said
    assert not any(is_open(port) for port in ports.values())


def test_with_an_upstream_of_ones_own_there_is_no_simulator(headgate, environment: dict[str, str], ports) -> None:
    # Nothing listens there: the gateway starts all the same, since Anthropic may be away as well.
    own = {"HEADGATE_UPSTREAM_URL": f"http://127.0.0.1:{ports['simulator']}", "ANTHROPIC_API_KEY": "sk-ant-mine"}
    process = headgate.start("up", **environment, **own)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "Ctrl-C stops" in line:
            break
    process.terminate()
    process.communicate(timeout=30)
    assert "SIMULATOR" not in "".join(printed)
    assert "sk-ant-mine" not in "".join(printed)
