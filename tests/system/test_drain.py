"""A restart that is announced: streams finish or hear of it, nobody waits for idle sockets, nothing is lost.

Design §2 and failure-model §2.4, SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import anthropic
import pytest
from tests.system.conftest import Gateway, Simulator, Stack, until
from tests.system.scripted import (
    Act,
    Books,
    Reply,
    ScriptedUpstream,
    app_key,
    body_of,
    connect,
    fetch,
    head_of,
    read_head,
    sized,
)

DRAIN_S = 3.0
EXIT_WITHIN_S = DRAIN_S + 5.0
STREAMS = 50
OTPS = 100


@pytest.fixture
def simulator(stack: Stack) -> Simulator:
    return stack.simulator("--tier", "none", "--speed", "1", "--ttft-s", "0.05", "--otps", str(OTPS))


def start(stack: Stack, upstream_url: str, **settings: str) -> Gateway:
    return stack.gateway(upstream_url, **{"SERVER__DRAIN_TIMEOUT_S": str(DRAIN_S), **settings})


@contextmanager
def held_sockets(gateway: Gateway, number: int, said: bytes = b"") -> Iterator[list[socket.socket]]:
    """Clients that are connected and say no more than this."""
    parts = urlsplit(gateway.url)
    with ExitStack() as closing_all:
        sockets = []
        for _ in range(number):
            held = closing_all.enter_context(socket.create_connection((parts.hostname, parts.port)))
            held.sendall(said)
            sockets.append(held)
        yield sockets


def is_closed(held: socket.socket) -> bool:
    """Whether the other side has ended the connection."""
    held.setblocking(False)
    try:
        while held.recv(1 << 16):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def accepts(gateway: Gateway, *, operator: bool = False) -> bool:
    """Whether a new connection is taken."""
    parts = urlsplit(gateway.operator_url if operator else gateway.url)
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=5):
            return True
    except ConnectionError:  # refused, or reset in the backlog of a listener that is just being closed
        return False


def wait_for_exit(gateway: Gateway, began_at: float) -> float:
    """Seconds from the signal to the end; the end must be a good one."""
    code = gateway.process.popen.wait(60)
    took_s = time.monotonic() - began_at
    assert code == 0, gateway.process.text()
    return took_s


def drain_under_streams(
    simulator: Simulator, gateway: Gateway, key: str, tokens: list[int], *, held: int
) -> tuple[dict[str, Reply], float, float]:
    """SIGTERM when all streams run: their answers, the exit's and the refusal's time."""
    names = {f"drained-{number}-{wanted}": wanted for number, wanted in enumerate(tokens)}

    async def run() -> tuple[dict[str, Reply], float, float]:
        async with asyncio.TaskGroup() as group:
            streams = {
                name: group.create_task(
                    fetch(
                        gateway.url,
                        key,
                        body_of(
                            name,
                            max_tokens=5000,
                            messages=[{"role": "user", "content": f"Xin chào [[sim: tokens={wanted}]]"}],
                        ),
                    )
                )
                for name, wanted in names.items()
            }
            while (await asyncio.to_thread(simulator.streams))["count"] < len(names):  # noqa: ASYNC110  in another process
                await asyncio.sleep(0.01)
            began_at = time.monotonic()
            gateway.process.popen.send_signal(signal.SIGTERM)
            while await asyncio.to_thread(accepts, gateway):  # noqa: ASYNC110  in another process
                await asyncio.sleep(0.01)
            refused_s = time.monotonic() - began_at
            took_s = await asyncio.to_thread(wait_for_exit, gateway, began_at)
        return {name: stream.result() for name, stream in streams.items()}, took_s, refused_s

    with held_sockets(gateway, held):
        return asyncio.run(run())


def test_streams_that_end_in_time_are_whole_and_the_exit_waits_for_no_longer(stack, simulator, capsys):
    gateway = start(stack, simulator.url)
    replies, took_s, refused_s = drain_under_streams(simulator, gateway, app_key(gateway), [100] * STREAMS, held=500)
    assert len(replies) == STREAMS
    for reply in replies.values():
        assert reply.whole
        assert reply.frames[-1].startswith(b"event: message_stop")
    assert refused_s <= 0.5
    assert took_s <= DRAIN_S, "it ends with the last stream, though 500 sockets are held"
    with capsys.disabled():
        print(f"\n{STREAMS} streams drained whole, 500 sockets held: exit after {took_s:.2f} s")  # noqa: T201


def test_streams_that_outlast_the_limit_hear_that_it_restarts_and_all_are_booked(stack, simulator, capsys):
    gateway = start(stack, simulator.url)
    key = app_key(gateway)
    replies, took_s, _ = drain_under_streams(
        simulator, gateway, key, [60] * (STREAMS // 2) + [2000] * (STREAMS // 2), held=500
    )
    for name, reply in replies.items():
        assert (reply.whole, reply.status) == (True, 200)
        assert reply.sends(b"message_start") == 1
        if name.endswith("-60"):
            assert reply.frames[-1].startswith(b"event: message_stop")
        else:
            assert reply.frames[-1].startswith(b"event: error")
            assert reply.error["type"] == "overloaded_error"
            assert reply.error["details"]["error_code"] == "restarting"
    assert DRAIN_S <= took_s <= EXIT_WITHIN_S
    restarted = stack.gateway(simulator.url, data_dir=gateway.data_dir)
    rows = Books(restarted, key).of_users(replies)
    requests = {request["request_id"]: request for request in simulator.requests()}
    for name, row in rows.items():
        (attempt,) = row["attempts"]
        usage = requests[attempt["upstream_request_id"]]["usage"]
        assert row["input_tokens"] == usage["input_tokens"]
        if name.endswith("-60"):
            assert (row["outcome"], row["state"]) == ("completed", "settled")
            assert row["output_tokens"] == usage["output_tokens"]
        else:
            assert (row["outcome"], row["state"]) == ("cut", "estimated")
            assert row["output_tokens"] == pytest.approx(usage["output_tokens"], rel=0.15)
    assert not gateway.process.lines(event="ledger_orphan_closed")
    assert not restarted.process.lines(event="ledger_orphan_closed"), "what was told to the client was booked then"
    with capsys.disabled():
        print(f"\n{STREAMS // 2} streams outlast a drain of {DRAIN_S:.0f} s: exit after {took_s:.2f} s")  # noqa: T201


def test_the_sdk_raises_when_the_gateway_restarts_under_its_stream(stack, simulator, sdk):
    gateway = start(stack, simulator.url, SERVER__DRAIN_TIMEOUT_S="0.3")
    client = sdk(gateway.url, gateway.key())

    def read_on() -> None:
        with client.messages.stream(
            model="claude-sonnet-4-6",
            max_tokens=5000,
            messages=[{"role": "user", "content": "Xin chào [[sim: tokens=3000]]"}],
        ) as stream:
            for number, _ in enumerate(stream):
                if number == 5:
                    gateway.process.popen.send_signal(signal.SIGTERM)

    with pytest.raises(anthropic.APIStatusError) as raised:
        read_on()
    assert raised.value.body["error"]["type"] == "overloaded_error"
    assert gateway.process.popen.wait(20) == 0


def test_readiness_is_off_at_once_on_every_connection(stack):
    """A balancer that asks on a kept connection must not be told `ok` again: 503, or the connection's end."""
    upstream = ScriptedUpstream()
    gateway = start(stack, upstream.url)
    key = app_key(gateway)

    async def run() -> None:
        reader, writer = await connect(gateway.url)
        ask = b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n"
        writer.write(ask)
        status, headers = await read_head(reader)
        await reader.readexactly(int(headers["content-length"]))
        assert status == 200
        busy = upstream.plan((Act.HANG,))
        body = body_of(busy)
        held_reader, held_writer = await connect(gateway.url)
        held_writer.write(head_of(gateway.url, key, len(body)) + body)
        await held_writer.drain()
        until(lambda: upstream.attempts(busy))
        gateway.process.popen.send_signal(signal.SIGTERM)
        until(lambda: gateway.process.lines(event="draining"))
        try:
            writer.write(ask)
            assert (await read_head(reader))[0] == 503
        except (OSError, EOFError):
            pass  # closed: the other way of saying it
        assert not accepts(gateway)
        with pytest.raises(urllib.error.HTTPError) as refused:
            await asyncio.to_thread(urllib.request.urlopen, f"{gateway.operator_url}/readyz", timeout=5)
        assert refused.value.code == 503
        refused.value.close()
        assert (await asyncio.wait_for(read_head(held_reader), 15))[0] == 529
        for one in (writer, held_writer):
            one.transport.abort()

    try:
        asyncio.run(run())
        assert gateway.process.popen.wait(20) == 0
    finally:
        upstream.close()


def test_calls_that_have_no_answer_at_the_limit_get_a_529_and_are_booked(stack):
    """Waiting for a head, waiting for a whole answer, waiting to try again: none has shown anything yet."""
    upstream = ScriptedUpstream()
    gateway = start(stack, upstream.url, SERVER__DRAIN_TIMEOUT_S="0.5")
    key = app_key(gateway)
    refused = sized(
        b'{"type":"error","error":{"type":"rate_limit_error","message":"x"}}',
        status=b"429 Wait",
        head=b"content-type: application/json\r\nretry-after: 15\r\n",
    )
    calls = {
        upstream.plan((Act.HANG,)): True,
        upstream.plan((Act.HANG,)): False,
        upstream.plan((refused, Act.KEEP)): True,
    }

    async def run() -> list[Reply]:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(fetch(gateway.url, key, body_of(name, stream=stream)))
                for name, stream in calls.items()
            ]
            while not all(upstream.attempts(name) for name in calls):  # noqa: ASYNC110  on another thread
                await asyncio.sleep(0.01)
            gateway.process.popen.send_signal(signal.SIGTERM)
        return [task.result() for task in tasks]

    try:
        began_at = time.monotonic()
        for reply in asyncio.run(run()):
            assert (reply.status, reply.error["type"]) == (529, "overloaded_error")
            assert reply.error["details"]["error_code"] == "restarting"
            assert (reply.headers["x-should-retry"], reply.headers["retry-after"]) == ("true", "1")
        assert wait_for_exit(gateway, began_at) <= 0.5 + 5.0
        rows = Books(stack.gateway(upstream.url, data_dir=gateway.data_dir), key).of_users(calls)
        for name, row in rows.items():
            assert row["outcome"] == "failed"
            assert len(upstream.attempts(name)) == 1, "nothing is sent any more"
    finally:
        upstream.close()


@pytest.mark.parametrize(
    "said",
    [b"", b"POST /v1/messages HTTP/1.1\r\nhost: x\r\n", b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"],
    ids=["nothing", "half a head", "a request and no more"],
)
def test_held_sockets_do_not_hold_up_the_exit(stack, said):
    """With the header limit at 1 s, a half-sent head is given up then, not at the end of a long drain."""
    gateway = start(stack, "http://127.0.0.1:9", SERVER__DRAIN_TIMEOUT_S="12", SERVER__HEADER_TIMEOUT_S="1")
    with held_sockets(gateway, 500, said) as sockets:
        began_at = time.monotonic()
        gateway.process.popen.send_signal(signal.SIGTERM)
        assert wait_for_exit(gateway, began_at) <= 6.0
        assert all(is_closed(held) for held in sockets)


def test_a_passed_through_call_finishes_before_the_exit(stack):
    upstream = ScriptedUpstream()
    gateway = start(stack, upstream.url)
    name = upstream.plan((1.0, sized(b'{"input_tokens": 7}', head=b"content-type: application/json\r\n"), Act.KEEP))
    request = urllib.request.Request(
        f"{gateway.url}/v1/messages/count_tokens",
        json.dumps({"model": "claude-sonnet-4-6", "messages": [{"role": "user", "content": name}]}).encode(),
        {"x-api-key": gateway.key(), "content-type": "application/json", "anthropic-version": "2023-06-01"},
    )

    def ask() -> Any:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    async def run() -> Any:
        asked = asyncio.get_running_loop().run_in_executor(None, ask)
        while not upstream.attempts(name):  # noqa: ASYNC110  on another thread
            await asyncio.sleep(0.01)
        gateway.process.popen.send_signal(signal.SIGTERM)
        return await asked

    try:
        assert asyncio.run(run()) == {"input_tokens": 7}
        assert gateway.process.popen.wait(20) == 0
    finally:
        upstream.close()


def test_a_second_signal_does_not_break_the_drain(stack, simulator):
    gateway = start(stack, simulator.url)
    key = app_key(gateway)
    messages = [{"role": "user", "content": "[[sim: tokens=100]]"}]

    async def run() -> Reply:
        async with asyncio.TaskGroup() as group:
            stream = group.create_task(fetch(gateway.url, key, body_of("twice", max_tokens=500, messages=messages)))
            while not (await asyncio.to_thread(simulator.streams))["count"]:  # noqa: ASYNC110  in another process
                await asyncio.sleep(0.01)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                gateway.process.popen.send_signal(number)
        return stream.result()

    assert asyncio.run(run()).frames[-1].startswith(b"event: message_stop")
    assert gateway.process.popen.wait(20) == 0


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.drill)])
def test_restarts_in_a_row_cause_no_call_and_lose_nothing(stack, simulator, times):
    gateway = start(stack, simulator.url)
    key = app_key(gateway)
    assert asyncio.run(fetch(gateway.url, key, body_of("before"))).status == 200
    (before,) = Books(gateway, key).of_users(["before"]).values()
    calls = len(simulator.requests())
    for _ in range(times):
        assert gateway.process.stop(signal.SIGTERM) == 0
        gateway = stack.gateway(simulator.url, data_dir=gateway.data_dir)
    assert len(simulator.requests()) == calls
    books = Books(gateway, key)
    assert books.of_users(["before"]) == {"before": before}
    assert books.newest() == [before]
    assert asyncio.run(fetch(gateway.url, key, body_of("after"))).status == 200
    assert len(books.of_users(["before", "after"])) == 2


@pytest.mark.parametrize("setting", ["LISTEN", "OPERATOR_LISTEN"])
def test_a_port_that_is_taken_stops_the_start_with_the_setting_that_moves_it(stack, setting):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AssertionError, match="ended with"):
            stack.gateway("http://127.0.0.1:9", **{setting: address})
        process = stack.processes[-1]
        assert process.popen.returncode > 0
        assert address in process.text()
        assert f"HEADGATE_{setting}" in process.text()
        assert "Traceback" not in process.text()


@pytest.mark.parametrize("attempt", range(3))
def test_both_doors_take_connections_once_they_are_announced(stack, attempt):
    gateway = start(stack, "http://127.0.0.1:9")
    assert accepts(gateway)
    assert accepts(gateway, operator=True)
