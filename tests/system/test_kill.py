"""`kill -9` and a full disk: what was paid is in the ledger, once, and the gateway is back by itself.

Design §5.7, failure-model §2.4 and I1, I14.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.system.conftest import Gateway, Simulator, Stack, get_json, until
from tests.system.scripted import Books, app_key, body_of, connect, fetch, gather, head_of, read_body, read_head

STREAMS = 20
OTPS = 100
KILL_AFTER_S = (0.1, 3.0)
READY_WITHIN_S = 10.0
LOST_OUTPUT_S = 2.0
"""Progress is written every 2 s: what a kill may cost."""
NOTICE_S = 0.5
"""How coarse clocks and ticks are, here and there."""


def is_ready(gateway: Gateway) -> bool:
    """Whether it serves."""
    with suppress(OSError), urllib.request.urlopen(f"{gateway.url}/readyz", timeout=5) as answer:
        return answer.status == 200  # type: ignore[no-any-return]
    return False


async def keep_streaming(gateway: Gateway, key: str, names: Iterator[str], dice: random.Random) -> None:
    """Twenty clients that ask again and again, until nobody answers."""

    async def client() -> None:
        with suppress(OSError, EOFError):
            while True:
                stream = dice.random() < 0.85
                tokens = dice.choice((5, 30, 200, 450))
                body = body_of(
                    next(names),
                    stream=stream,
                    max_tokens=1000,
                    messages=[{"role": "user", "content": f"Xin chào [[sim: tokens={tokens}]]"}],
                )
                reader, writer = await connect(gateway.url)
                try:
                    writer.write(head_of(gateway.url, key, len(body)) + body)
                    status, headers = await read_head(reader)
                    assert status == 200
                    await read_body(reader, headers)
                finally:
                    writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for _ in range(STREAMS):
            group.create_task(client())


def kill_and_restart(
    stack: Stack, gateway: Gateway, key: str, names: Iterator[str], seed: int
) -> tuple[Gateway, float]:
    """Kill it at a random moment of its work; returns its successor, and how long that took to be ready."""
    dice = random.Random(seed)

    async def until_killed() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(dice.uniform(*KILL_AFTER_S), gateway.process.popen.send_signal, signal.SIGKILL)
        await keep_streaming(gateway, key, names, dice)

    asyncio.run(until_killed())
    assert gateway.process.popen.wait(10) == -signal.SIGKILL
    began_at = time.monotonic()
    successor = stack.gateway(gateway.environment["HEADGATE_UPSTREAM_URL"], data_dir=gateway.data_dir)
    until(lambda: is_ready(successor), within_s=READY_WITHIN_S, what="ready after a kill")
    return successor, time.monotonic() - began_at


def received(simulator: Simulator) -> dict[str, dict[str, Any]]:
    """Requests that reached the simulator, by the user that they name. Fails when one came twice."""
    found = {}
    after = 0
    while True:
        page = get_json(f"{simulator.url}/sim/requests?limit=5000&since={after}")["requests"]
        for request in page:
            after = request["number"]
            name = re.search(rb'"user_id": "(kill-[^"]+)"', base64.b64decode(request["body_base64"] or b""))
            if name:
                assert name[1] not in found, "no attempt was made twice"
                found[name[1].decode()] = request
        if not page:
            return found


def check_books(simulator: Simulator, rows: list[dict[str, Any]]) -> tuple[int, float]:
    """Every law of the ledger after kills; returns lost calls and the largest cost error in seconds of output."""
    requests = received(simulator)
    by_user = Counter(row["user"] for row in rows)
    assert max(by_user.values()) == 1, "no call twice"
    assert requests.keys() <= by_user.keys(), "no attempt without a row"
    lost, worst_s = 0, 0.0
    for row in rows:
        assert row["outcome"] is not None
        states = [attempt["state"] for attempt in row["attempts"]]
        assert states in (["settled"], ["estimated"]), row
        (attempt,) = row["attempts"]
        request = requests.get(row["user"])
        if request is None:
            assert (states, attempt["error_code"]) == (["estimated"], "process_lost"), "an intent that never left"
            continue
        if states == ["settled"]:
            assert row["cost_nanousd"] == request["cost_nanousd"]
            continue
        lost += 1
        assert attempt["error_code"] == "process_lost"
        assert row["cost_nanousd"] > 0
        if request["streamed"] and request["usage"]:
            if attempt["upstream_request_id"]:
                assert row["input_tokens"] == request["usage"]["input_tokens"]
            error = abs(request["usage"]["output_tokens"] - row["output_tokens"])
            worst_s = max(worst_s, error / OTPS)
    return lost, worst_s


def drill(stack: Stack, seeds: range, capsys: Any) -> None:
    simulator = stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0.05", "--otps", str(OTPS))
    gateway = stack.gateway(simulator.url)
    key = app_key(gateway)
    ready_s = []
    for seed in seeds:
        names = (f"kill-{seed}-{number}" for number in count())
        gateway, took_s = kill_and_restart(stack, gateway, key, names, seed)
        ready_s.append(took_s)
    until(lambda: simulator.streams()["count"] == 0, what="the simulator to have billed everything")
    books = Books(gateway, key)
    rows = [row for row in books.newest() if row["user"].startswith("kill-")]
    lost, worst_s = check_books(simulator, rows)
    ready_s.sort()
    with capsys.disabled():
        print(  # noqa: T201  a drill's figures are read by people
            f"\n{len(seeds)} kills under {STREAMS} streams, {len(rows)} calls, {lost} cut by a kill: ready again after "
            f"{ready_s[len(ready_s) // 2]:.2f} s (p50), {ready_s[-1]:.2f} s (max); "
            f"at most {worst_s:.2f} s of output lost in a row"
        )
    assert lost >= len(seeds), "a drill that cuts nothing proves nothing"
    assert worst_s <= LOST_OUTPUT_S + NOTICE_S


def test_eight_kills_at_random_moments_lose_no_call_and_book_none_twice(stack, capsys):
    drill(stack, range(8), capsys)


@pytest.mark.drill
def test_fifty_kills_at_random_moments_lose_no_call_and_book_none_twice(stack, capsys):
    drill(stack, range(100, 150), capsys)


def test_an_attempt_is_in_the_journal_before_its_first_byte_leaves(stack, tmp_path):
    """Killed the moment its request is seen upstream, again and again: the row is always there."""
    simulator = stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "30")
    gateway = stack.gateway(simulator.url)
    key = app_key(gateway)
    names = [f"kill-seen-{number}" for number in range(2)]
    for name in names:

        async def run(gateway: Gateway = gateway, name: str = name) -> None:
            _, writer = await connect(gateway.url)
            body = body_of(name)
            writer.write(head_of(gateway.url, key, len(body)) + body)
            await writer.drain()
            until(lambda: name in received(simulator), what="the request upstream")
            gateway.process.popen.kill()
            writer.transport.abort()

        asyncio.run(run())
        gateway.process.popen.wait(10)
        gateway = stack.gateway(simulator.url, data_dir=gateway.data_dir)
    rows = Books(gateway, key).of_users(names)
    assert {(row["state"], row["attempts"][0]["error_code"]) for row in rows.values()} == {
        ("estimated", "process_lost")
    }
    assert all(row["cost_nanousd"] > 0 for row in rows.values())


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(path: Path) -> None:
    """Write until there is no room."""
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which only root may")
def test_a_full_disk_refuses_new_calls_lets_streams_finish_and_heals_by_itself(stack, small_disk, capsys):
    simulator = stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0.05", "--otps", str(OTPS))
    gateway = stack.gateway(simulator.url, data_dir=small_disk / "data")
    key = app_key(gateway)
    books = Books(gateway, key)
    filler = small_disk / "filler"

    def short(name: str) -> Any:
        return fetch(gateway.url, key, body_of(name, messages=[{"role": "user", "content": "[[sim: tokens=5]]"}]))

    before = [f"kill-before-{number}" for number in range(20)]
    for reply in asyncio.run(gather(short(name) for name in before)):
        assert reply.status == 200
    live = [f"kill-live-{number}" for number in range(10)]
    refused: list[str] = []

    async def full() -> list[Any]:
        messages = [{"role": "user", "content": "[[sim: tokens=400]]"}]
        async with asyncio.TaskGroup() as group:
            streams = [
                group.create_task(fetch(gateway.url, key, body_of(name, max_tokens=1000, messages=messages)))
                for name in live
            ]
            while len(received(simulator)) < len(before) + len(live):  # noqa: ASYNC110  in another process
                await asyncio.sleep(0.01)
            await asyncio.to_thread(fill, filler)
            for number in range(1000):
                # What others on this disk free is taken at once: it stays full.
                await asyncio.to_thread(fill, filler)
                refused.append(f"kill-refused-{number}")
                reply = await short(refused[-1])
                if reply.status == 503:
                    break
            assert (reply.status, reply.error["details"]["error_code"]) == (503, "ledger_unavailable")
            assert reply.headers["x-should-retry"] == "true"
            for number in range(20):
                refused.append(f"kill-refused-again-{number}")
                assert (await short(refused[-1])).status == 503
        return [stream.result() for stream in streams]

    for reply in asyncio.run(full()):
        assert (reply.status, reply.frames[-1].startswith(b"event: message_stop")) == (200, True)
    assert gateway.process.popen.poll() is None
    filler.unlink()
    freed_at = time.monotonic()
    after = "kill-after"
    until(lambda: asyncio.run(short(after)).status == 200, within_s=10.0, what="service after space returned")
    healed_s = time.monotonic() - freed_at
    requests = received(simulator)
    passed = [name for name in requests if name.startswith("kill-refused")]
    rows = books.of_users([*before, *live, *passed, after])
    for name, row in rows.items():
        assert (row["outcome"], row["state"]) == ("completed", "settled"), row
        assert row["cost_nanousd"] == requests[name]["cost_nanousd"]
    booked = {row["user"] for row in books.newest() if row["attempts"]}
    assert booked <= requests.keys() | {"app"}, "nothing was booked that was not sent"
    with capsys.disabled():
        print(f"\na full disk: served again {healed_s:.2f} s after space returned")  # noqa: T201


def test_a_data_directory_that_is_a_file_stops_the_start_with_a_clear_word(stack, tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(AssertionError, match="ended with"):
        stack.gateway("http://127.0.0.1:9", data_dir=tmp_path / "data")
    process = stack.processes[-1]
    assert process.popen.returncode not in (0, None)
    assert "Traceback" not in process.text()
    assert str(tmp_path / "data") in process.text()
