"""The two C programs are the ruler: the upstream keeps the grammar and counts its streams, the load is exact."""

import http.client
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import bodies
import kit
import measure
import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("taskset") is None, reason="the kit needs a C compiler and taskset"
)
GONE_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Bench]:
    build, scratch = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("scratch")
    kit.compile_tools(build)
    core = min(os.sched_getaffinity(0))
    with kit.started_upstream(build, scratch, core) as upstream:
        yield kit.Bench(build, scratch, core, core, upstream, patient_until=0.0)


def events(text: str) -> list[tuple[str, dict]]:
    pairs = []
    for frame in text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        pairs.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return pairs


def post(port: int, body: bytes) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("POST", "/v1/messages", body)
    answer = connection.getresponse().read()
    connection.close()
    return answer


def test_a_stream_follows_the_grammar_and_names_its_usage_twice(bench: kit.Bench):
    bench.upstream.pace(0)
    pairs = events(post(bench.upstream.port, bodies.make_body("stream")).decode())
    assert all(name == data["type"] for name, data in pairs)
    names = [name for name, _ in pairs]
    deltas = ["content_block_delta"] * measure.EVENTS_A_STREAM_UNPACED
    end = ["content_block_stop", "message_delta", "message_stop"]
    assert names == ["message_start", "content_block_start", *deltas, *end]
    started, ended = pairs[0][1]["message"]["usage"], pairs[-2][1]["usage"]
    assert started["input_tokens"] == ended["input_tokens"] == 312
    assert started["output_tokens"] < ended["output_tokens"]


def test_bodies_have_the_sizes_that_the_table_names():
    assert len(bodies.make_body("small")) == len(bodies.make_body("stream")) == bodies.SMALL_BYTES
    assert len(bodies.make_body("large")) == bodies.LARGE_BYTES
    assert len(json.loads(bodies.make_body("large"))["system"]) == bodies.LARGE_SYSTEM_BYTES


def test_a_closed_loop_counts_every_answer_and_no_error(bench: kit.Bench, tmp_path: Path):
    bench.upstream.pace(0)
    requests = bodies.Bodies(tmp_path, port=bench.upstream.port, key="k")
    for body in ("large", "stream"):
        result = bench.load(
            "closed",
            port=bench.upstream.port,
            request=requests.path(body),
            gateway_pid=None,
            connections=2,
            seconds=0.2,
        )
        assert result.completed > 0
        assert result.errors == 0


def test_an_open_loop_starts_what_was_planned(bench: kit.Bench, tmp_path: Path):
    bench.upstream.pace(0)
    request = bodies.Bodies(tmp_path, port=bench.upstream.port, key="k").path("small")
    result = bench.load("open", port=bench.upstream.port, request=request, gateway_pid=None, rate=500, seconds=0.2)
    assert (result.planned, result.completed, result.errors) == (100, 100, 0)
    assert 0 < result.latency_p50_ms <= result.latency_p99_ms


def test_streams_are_counted_until_their_readers_leave(bench: kit.Bench, tmp_path: Path):
    bench.upstream.pace(100)
    request = bodies.Bodies(tmp_path, port=bench.upstream.port, key="k").path("stream")
    result = bench.load(
        "streams", port=bench.upstream.port, request=request, gateway_pid=None, connections=20, seconds=0.3
    )
    assert (result.streams, result.streams_lost) == (20, 0)
    assert result.events > 0
    until = time.monotonic() + GONE_WITHIN_S
    while bench.upstream.streams_open() and time.monotonic() < until:
        pass
    assert bench.upstream.streams_open() == 0
