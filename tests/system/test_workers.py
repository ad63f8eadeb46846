"""Two workers behind one port: each call is done by one and booked once, whoever is killed, and all end together.

Design §5.9 and failure-model §2.4.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.storage.redis_server import RedisServer
from tests.system.conftest import UPSTREAM_KEY, Gateway, Process, Simulator, Stack, base_environment, until
from tests.system.scripted import Books, Reply, body_of, connect, fetch, gather, head_of, read_body, read_head
from tests.system.test_kill import received

OTPS = 100
DRAIN_S = 5.0
STREAMS = 24


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of this file's own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.kill()


class Workers:
    """A running gateway of several workers."""

    def __init__(self, process: Process, data_dir: Path, environment: dict[str, str]) -> None:
        self.process = process
        self.data_dir = data_dir
        self.environment = environment
        self.wait_until_all_listen(1)
        # Asked through any worker: they share the database.
        self.through = [
            Gateway(process, line["gateway"], line["operator"], data_dir, environment) for line in self.listening()
        ]
        self.url = self.through[0].url

    def listening(self) -> list[dict[str, Any]]:
        """What the workers announced, of each the last, by their numbers."""
        last = {line["worker"]: line for line in self.process.lines(event="listening")}
        return [last[index] for index in sorted(last)]

    def wait_until_all_listen(self, times: int, *, within_s: float = 20.0) -> None:
        """Until all have listened at once for the n-th time."""

        def all_listen() -> bool:
            assert self.process.popen.poll() is None, self.process.text()
            return len(self.process.lines(event="workers_listening")) >= times

        until(all_listen, within_s=within_s, what="all workers to listen")

    def pids(self) -> dict[int, int]:
        """Process ids of the workers that run, by their numbers."""
        parent = self.process.popen.pid
        found = {}
        for pid in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            found[int(words[words.index("--worker") + 1].partition("@")[0])] = pid
        return found

    def key(self) -> str:
        """A key whose calls are booked on `metadata.user_id`, known to every worker."""
        key = self.through[0].key(
            "app", "--tier", "paid", "--scope", "messages", "--scope", "app", "--scope", "admin:read"
        )
        until(lambda: all(each._knows(key) for each in self.through), what="all workers to know a fresh key")
        return key


@pytest.fixture
def simulator(stack: Stack) -> Simulator:
    return stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0.05", "--otps", str(OTPS))


def start(stack: Stack, upstream_url: str, redis_url: str, *, workers: int = 2, **settings: str) -> Workers:
    data_dir = stack.directory / "data"
    environment = {
        **base_environment(),
        "PYTHONUNBUFFERED": "1",  # as in a container: what is not one write shows
        "ANTHROPIC_API_KEY": UPSTREAM_KEY,
        "HEADGATE_DATA_DIR": str(data_dir),
        "HEADGATE_UPSTREAM_URL": upstream_url,
        "HEADGATE_REDIS_URL": redis_url,
        "HEADGATE_LISTEN": "127.0.0.1:0",
        "HEADGATE_OPERATOR_LISTEN": "127.0.0.1:0",
        "HEADGATE_SERVER__DRAIN_TIMEOUT_S": str(DRAIN_S),
        **{f"HEADGATE_{name}": value for name, value in settings.items()},
    }
    process = stack.start("gateway", "gateway", "--workers", str(workers), environment=environment)
    return Workers(process, data_dir, environment)


def worker_of(call_id: str) -> int:
    """Whose call it is, by its id."""
    return int(call_id[13:15], 16)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def said(name: str, tokens: int) -> bytes:
    return body_of(name, max_tokens=5000, messages=[{"role": "user", "content": f"Xin chào [[sim: tokens={tokens}]]"}])


def streams(names: list[str], workers: Workers, key: str, tokens: int) -> list[Any]:
    return [fetch(workers.url, key, said(name, tokens), within_s=60) for name in names]


async def under_streams(workers: Workers, key: str, names: list[str], act: Callable[[], None]) -> dict[str, bool]:
    """Do something when the answers to all have begun; of each, whether it came to its end."""

    async def begin(name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, dict[str, str]]:
        reader, writer = await connect(workers.url)
        body = said(name, 300)
        writer.write(head_of(workers.url, key, len(body)) + body)
        status, headers = await read_head(reader)
        assert status == 200
        return reader, writer, headers

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str]) -> bool:
        body, whole = await read_body(reader, headers)
        writer.transport.abort()
        return whole and b"event: message_stop" in body

    begun = await gather(begin(name) for name in names)
    act()
    return dict(zip(names, await gather(end(*each) for each in begun), strict=True))


def is_whole(reply: Reply) -> bool:
    return reply.status == 200 and reply.whole and reply.frames[-1].startswith(b"event: message_stop")


def check_lines(process: Process) -> None:
    """Every line of the log is one event of one process."""
    for line in process.text().splitlines():
        assert isinstance(json.loads(line), dict), line


def test_calls_are_dealt_to_both_and_each_is_booked_and_logged_once(stack, simulator, redis_url):
    workers = start(stack, simulator.url, redis_url)
    key = workers.key()
    names = [f"kill-dealt-{number}" for number in range(200)]
    replies = asyncio.run(gather(streams(names, workers, key, 3), at_once=20))
    assert all(map(is_whole, replies))
    rows = Books(workers.through[0], key).of_users(names)
    assert Books(workers.through[1], key).of_users(names) == rows, "whoever is asked"
    ids = [row["call_id"] for row in rows.values()]
    assert len(set(ids)) == len(names)
    assert set(ids) == {reply.headers["x-headgate-call"] for reply in replies}
    shares = Counter(map(worker_of, ids))
    assert shares.keys() == {0, 1}
    assert min(shares.values()) >= len(names) / 5, "SO_REUSEPORT deals by a hash of the connection"
    requests = received(simulator)
    assert {name: row["cost_nanousd"] for name, row in rows.items()} == {
        name: request["cost_nanousd"] for name, request in requests.items()
    }
    until(lambda: len(workers.process.lines(event="call")) >= len(names), what="a line for each call")
    assert Counter(line["call_id"] for line in workers.process.lines(event="call")) == Counter(ids)
    check_lines(workers.process)
    assert workers.process.stop() == 0


def test_a_worker_killed_under_streams_is_started_again_and_no_attempt_is_lost_or_doubled(stack, simulator, redis_url):
    workers = start(stack, simulator.url, redis_url)
    key = workers.key()
    names = [f"kill-worker-{number}" for number in range(STREAMS)]
    before = workers.pids()

    whole = asyncio.run(under_streams(workers, key, names, lambda: os.kill(before[1], signal.SIGKILL)))
    workers.wait_until_all_listen(2)
    after = workers.pids()
    assert after[0] == before[0]
    assert after[1] != before[1]
    rows = Books(workers.through[0], key).of_users(names)
    requests = received(simulator)  # fails when one came twice
    assert requests.keys() == rows.keys()
    cut = {name for name, row in rows.items() if worker_of(row["call_id"]) == 1}
    assert 0 < len(cut) < len(names), "the kill hit some and not all"
    for name, row in rows.items():
        (attempt,) = row["attempts"]
        if name in cut:
            assert not whole[name]
            assert (attempt["state"], attempt["error_code"]) == ("estimated", "process_lost")
            assert row["input_tokens"] == requests[name]["usage"]["input_tokens"]
            assert row["cost_nanousd"] > 0
        else:
            assert whole[name]
            assert attempt["state"] == "settled"
            assert row["cost_nanousd"] == requests[name]["cost_nanousd"]
    later = [f"kill-later-{number}" for number in range(60)]
    assert all(map(is_whole, asyncio.run(gather(streams(later, workers, key, 3)))))
    owners = {worker_of(row["call_id"]) for row in Books(workers.through[0], key).of_users(later).values()}
    assert owners == {0, 1}, "the new one works"
    assert workers.process.stop() == 0
    check_lines(workers.process)


def test_fewer_workers_than_before_book_what_all_before_left(stack, simulator, redis_url):
    """Three are killed with their supervisor in the middle of their work; then there are two."""
    workers = start(stack, simulator.url, redis_url, workers=3)
    key = workers.key()
    names = [f"kill-left-{number}" for number in range(STREAMS)]
    pids = [workers.process.popen.pid, *workers.pids().values()]

    def kill_all() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    asyncio.run(under_streams(workers, key, names, kill_all))
    workers.process.popen.wait(10)
    workers = start(stack, simulator.url, redis_url, workers=2)
    rows = Books(workers.through[1], key).of_users(names)
    assert {worker_of(row["call_id"]) for row in rows.values()} == {0, 1, 2}
    for row in rows.values():
        (attempt,) = row["attempts"]
        assert (attempt["state"], attempt["error_code"]) == ("estimated", "process_lost")
        assert row["cost_nanousd"] > 0
    assert workers.process.stop() == 0
    journal = workers.data_dir / "journal"
    assert len(list(journal.glob("*.jsonl"))) == 2, "those of the two that have just ended"


def test_sigterm_lets_streams_of_both_finish(stack, simulator, redis_url):
    workers = start(stack, simulator.url, redis_url)
    key = workers.key()
    names = [f"kill-drained-{number}" for number in range(STREAMS)]
    pids = list(workers.pids().values())

    began_at = time.monotonic()
    whole = asyncio.run(under_streams(workers, key, names, lambda: workers.process.popen.send_signal(signal.SIGTERM)))
    assert all(whole.values())
    assert workers.process.popen.wait(DRAIN_S + 5) == 0
    assert time.monotonic() - began_at < DRAIN_S + 5
    assert not any(map(is_alive, pids))
    assert {line["worker"] for line in workers.process.lines(event="stopped")} == {0, 1}
    check_lines(workers.process)


def test_when_the_supervisor_is_killed_streams_finish_and_no_process_is_left(stack, simulator, redis_url):
    workers = start(stack, simulator.url, redis_url)
    key = workers.key()
    names = [f"kill-orphaned-{number}" for number in range(8)]
    pids = list(workers.pids().values())

    whole = asyncio.run(under_streams(workers, key, names, workers.process.popen.kill))
    assert all(whole.values())
    workers.process.popen.wait(5)
    until(lambda: not any(map(is_alive, pids)), within_s=DRAIN_S + 3, what="no worker to be left")
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{workers.url}/livez", timeout=2)


def test_two_gateways_do_not_share_a_port_by_accident(stack, simulator, redis_url):
    first = start(stack, simulator.url, redis_url)
    address = first.url.removeprefix("http://")
    environment = {**first.environment, "HEADGATE_LISTEN": address, "HEADGATE_DATA_DIR": str(stack.directory / "other")}
    second = stack.start("gateway", "gateway", "--workers", "2", environment=environment)
    assert second.popen.wait(20) == 6
    assert f"cannot listen on {address}" in second.text()
    assert first.process.stop() == 0


def two_free_ports() -> int:
    """The first of two that follow each other."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port


def test_each_worker_has_the_next_operator_port(stack, simulator, redis_url):
    port = two_free_ports()
    workers = start(stack, simulator.url, redis_url, OPERATOR_LISTEN=f"127.0.0.1:{port}")
    assert [line["operator"] for line in workers.listening()] == [
        f"http://127.0.0.1:{port}",
        f"http://127.0.0.1:{port + 1}",
    ]
    assert workers.process.stop() == 0
