"""The supervisor by itself: what it starts, starts again, gives up on and ends. Its workers are little programs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SUPERVISOR = """
import sys, json
from headgate.gateway.app import configure_logging
from headgate.gateway.workers import Supervisor, WorkersFailed
from headgate.policy.restarts import Restarts
program, count, delay_s, steady_s, drain_s = sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:])
configure_logging()
restarts = lambda: Restarts(delays_s=[delay_s], steady_s=steady_s)
try:
    command = lambda index: [sys.executable, "-c", program, str(index)]
    Supervisor(command, count, restarts=restarts, drain_s=drain_s).run()
except WorkersFailed as error:
    print(json.dumps({"event": "failed", "text": str(error), "code": error.code}), flush=True)
    sys.exit(error.code)
"""

WORKER = """
import os, signal, socket, sys, time
from pathlib import Path
index, supervisor = int(sys.argv[1]), socket.socket(fileno=0)
def told(number, _):
    with open("signals", "a") as file:
        file.write(f"{index} {signal.Signals(number).name}\\n")
    if number == signal.SIGTERM:
        sys.exit(0)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGHUP, told)
with open("starts", "a") as file:
    file.write(f"{index} {os.getpid()}\\n")
"""
SERVES = WORKER + "supervisor.send(b'listening\\n')\n"
UNTIL_ORPHANED = "supervisor.recv(1)\nopen('orphans', 'a').write(f'{index}\\n')\n"
GOOD = SERVES + UNTIL_ORPHANED


class Supervised:
    """A running supervisor and what its workers wrote down."""

    def __init__(
        self, folder: Path, program: str, *, count: int, delay_s: float, steady_s: float, drain_s: float
    ) -> None:
        self.folder = folder
        arguments = [program, str(count), str(delay_s), str(steady_s), str(drain_s)]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, *arguments], cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )

    def written(self, name: str) -> list[list[str]]:
        """The words of each line of a file."""
        path = self.folder / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def starts(self, index: int | None = None) -> list[int]:
        """Process ids of the workers started, in order."""
        return [int(pid) for number, pid in self.written("starts") if index is None or int(number) == index]

    def events(self, event: str) -> list[dict[str, object]]:
        """Lines of its log."""
        lines = (self.folder / "log").read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["event"] == event]


Start = Callable[..., Supervised]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Supervised] = []

    def begin(
        program: str, *, count: int = 2, delay_s: float = 0.01, steady_s: float = 60.0, drain_s: float = 20.0
    ) -> Supervised:
        running.append(Supervised(tmp_path, program, count=count, delay_s=delay_s, steady_s=steady_s, drain_s=drain_s))
        return running[-1]

    yield begin
    for each in running:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        try:
            eventually(lambda each=each: not any(map(is_alive, each.starts())), what="no worker is left")
        finally:
            for pid in filter(is_alive, each.starts()):
                os.kill(pid, signal.SIGKILL)


def eventually(condition: Callable[[], object], *, what: str, within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def up(supervised: Supervised) -> None:
    eventually(lambda: supervised.events("workers_listening"), what="all listen")


def test_the_first_worker_starts_alone_and_the_others_when_it_listens(start, tmp_path):
    hesitant = WORKER + "while index == 0 and not Path('go').exists(): time.sleep(0.005)\n"
    supervised = start(hesitant + "supervisor.send(b'listening\\n')\n" + UNTIL_ORPHANED, count=3)
    eventually(lambda: supervised.starts(0), what="the first starts")
    assert supervised.starts() == supervised.starts(0)
    (tmp_path / "go").write_text("")
    up(supervised)
    assert sorted(int(index) for index, _ in supervised.written("starts")) == [0, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_reaches_every_worker_and_the_end_is_a_good_one(start, number):
    supervised = start(GOOD, count=3)
    up(supervised)
    supervised.process.send_signal(number)
    assert supervised.process.wait(20) == 0
    assert sorted(supervised.written("signals")) == [["0", "SIGTERM"], ["1", "SIGTERM"], ["2", "SIGTERM"]]
    assert not any(map(is_alive, supervised.starts()))


def test_a_hangup_reaches_every_worker_and_ends_none(start):
    supervised = start(GOOD)
    up(supervised)
    supervised.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(supervised.written("signals")) == 2, what="both are told")
    assert sorted(supervised.written("signals")) == [["0", "SIGHUP"], ["1", "SIGHUP"]]
    assert all(map(is_alive, supervised.starts()))


def test_a_worker_that_starts_while_a_hangup_comes_is_told_once_it_listens(start, tmp_path):
    """It may have read its settings before the hangup, and has no handler before it listens."""
    late = (
        WORKER.replace("signal.signal(signal.SIGHUP, told)", "") + "while not Path('go').exists(): time.sleep(0.005)\n"
    )
    late += "signal.signal(signal.SIGHUP, told)\nsupervisor.send(b'listening\\n')\n" + UNTIL_ORPHANED
    supervised = start(late)
    eventually(lambda: supervised.starts(0), what="the first starts")
    supervised.process.send_signal(signal.SIGHUP)
    (tmp_path / "go").write_text("")
    up(supervised)
    eventually(lambda: supervised.written("signals") == [["0", "SIGHUP"]], what="the first is told")
    assert len(supervised.starts()) == 2


def test_a_worker_that_dies_is_started_again_and_the_others_go_on(start):
    supervised = start(GOOD)
    up(supervised)
    (first,), (second,) = supervised.starts(0), supervised.starts(1)
    os.kill(second, signal.SIGKILL)
    eventually(lambda: len(supervised.starts(1)) == 2, what="it is started again")
    assert supervised.starts(0) == [first]
    assert is_alive(first)
    (ended,) = supervised.events("worker_ended")
    assert (ended["worker"], ended["pid"], ended["how"]) == (1, second, "SIGKILL")


def test_one_that_cannot_be_started_again_leaves_the_others_in_peace(start, tmp_path):
    supervised = start(WORKER + "if Path('broken').exists() and index: sys.exit(3)\n" + GOOD.removeprefix(WORKER))
    up(supervised)
    (tmp_path / "broken").write_text("")
    os.kill(supervised.starts(1)[0], signal.SIGKILL)
    eventually(lambda: len(supervised.events("worker_ended")) > 8, what="it is tried again and again")
    assert is_alive(supervised.starts(0)[0])
    assert supervised.process.poll() is None
    (tmp_path / "broken").unlink()
    eventually(lambda: len(supervised.events("workers_listening")) == 2, what="it comes back when it can")


def test_when_none_can_be_started_again_it_gives_up(start, tmp_path):
    supervised = start(WORKER + "if Path('broken').exists(): sys.exit(5)\n" + GOOD.removeprefix(WORKER))
    up(supervised)
    (tmp_path / "broken").write_text("")
    for pid in supervised.starts():
        os.kill(pid, signal.SIGKILL)
    assert supervised.process.wait(20) == 5
    assert supervised.events("workers_gave_up")


def test_what_a_worker_refuses_to_start_with_is_not_tried_twice(start):
    supervised = start(WORKER + "sys.exit(6)\n", count=4)
    assert supervised.process.wait(20) == 6
    assert len(supervised.starts()) == 1
    (failed,) = supervised.events("failed")
    assert failed["text"] == "worker 0 did not start (exit 6); it says why above. Stopped the rest."


def test_one_that_dies_again_and_again_before_all_have_been_up_ends_the_others_too(start):
    supervised = start(WORKER + "if index: os.kill(os.getpid(), signal.SIGSEGV)\n" + GOOD.removeprefix(WORKER))
    assert supervised.process.wait(20) == 1
    assert len(supervised.starts(1)) == 5
    assert supervised.written("signals") == [["0", "SIGTERM"]]
    (failed,) = supervised.events("failed")
    assert "ended 5 times in a row (SIGSEGV)" in str(failed["text"])


def test_when_the_supervisor_is_killed_the_workers_hear_of_it(start):
    supervised = start(GOOD, count=3)
    up(supervised)
    supervised.process.kill()
    eventually(lambda: len(supervised.written("orphans")) == 3, what="all hear of it")
    eventually(lambda: not any(map(is_alive, supervised.starts())), what="none is left")


def test_one_that_does_not_end_in_time_is_killed_and_that_is_no_good_end(start):
    deaf = SERVES + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile index: time.sleep(1)\n" + UNTIL_ORPHANED
    supervised = start(deaf, drain_s=0.3)
    up(supervised)
    eventually(lambda: deaf_to_sigterm(supervised.starts(1)[0]), what="it is deaf")
    supervised.process.terminate()
    assert supervised.process.wait(20) == 1
    assert supervised.events("workers_killed")
    assert not any(map(is_alive, supervised.starts()))


def deaf_to_sigterm(pid: int) -> bool:
    ignored = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) & 1 << signal.SIGTERM - 1)


def test_ending_it_while_a_worker_starts_is_a_good_end(start):
    supervised = start(
        "import time\nopen('starts', 'a').write('0 %d\\n' % __import__('os').getpid())\ntime.sleep(60)\n"
    )
    eventually(lambda: supervised.starts(), what="the first starts")
    supervised.process.terminate()
    assert supervised.process.wait(20) == 0
