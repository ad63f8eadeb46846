"""What is measured of one gateway, each as a small record of numbers for results.json.

The figure to trust on a machine that others use too is CPU a request: time that other work takes does not count in it.
"""

import contextlib
import http.client
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bodies import Bodies
from gateways import Command, Gateway, Tls, nginx_argv, write_tls_terminator
from kit import Bench, BenchError, LoadResult, cpu_s, free_port, pinned, rss_kb, running, wait_ready

EVENTS_A_STREAM_UNPACED = 66
ABORT_STREAMS = 200
ABORT_WAIT_S = 1.0
IDLE_S = 0.5
WARM_UP_REQUESTS = 5
WARM_UP_PATIENCE_S = 30.0
SETTLE_LOOK_S = 0.2
SETTLE_S_MAX = 20.0
SETTLED_SHARE = 0.06
"""Of a core. What /proc tells comes in steps of 10 ms, so that less cannot be seen in one look."""
OPEN_WITHIN_S = 10.0
CARRIED_SHARE_MIN = 0.95
"""Of the load offered; below it the gateway did not carry the load, and the result says what it carried instead."""

EVENT_LOADS = ((200, 50), (20, 50))
"""Streams and events a second of each; the lighter load only for a gateway that does not carry the first."""
MEMORY_STREAMS = (1000, 100)
MEMORY_EVENTS_PER_S = 2
OPEN_LOOP_RATES_PER_S = (500, 100, 10)
"""The last only for a gateway that cannot do the one before."""

TRIES_MAX = 4
OTHERS_SHARE_MAX = 0.1
"""Of the gateway's core, for others; a load with more is measured again."""

Record = dict[str, float]


@dataclass(frozen=True, slots=True)
class Durations:
    closed_s: float
    events_s: float
    open_s: float
    memory_s: float
    warmup_s: float


FULL = Durations(closed_s=3, events_s=4, open_s=5, memory_s=3, warmup_s=1)
QUICK = Durations(closed_s=1.5, events_s=2, open_s=2, memory_s=2, warmup_s=0.5)
WARM = Durations(closed_s=2, events_s=0, open_s=0, memory_s=0, warmup_s=0)


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that is up, or the upstream itself where there is none (pid is None)."""

    port: int
    pid: int | None
    bodies: Bodies
    connections: int
    start_to_ready_s: float = 0.0


@contextlib.contextmanager
def started(bench: Bench, gateway: Gateway, *, tls: Tls | None = None) -> Iterator[Running]:
    home = Path(tempfile.mkdtemp(prefix=f"{gateway.name}-", dir=bench.scratch))
    command: Command = gateway.command(home, upstream_port=bench.upstream.port, tls=tls)
    log = home / "log"
    env = {**os.environ, **command.env}
    with running(pinned(bench.gateway_core, command.argv), env=env, cwd=home, log=log) as process:
        ready_s = wait_ready(process, command.port, command.ready_path, within_s=command.ready_within_s, log=log)
        bodies = Bodies(home, port=command.port, key=command.client_key)
        yield Running(command.port, process.pid, bodies, gateway.connections, ready_s)
    shutil.rmtree(home)


def direct(bench: Bench) -> Running:
    home = Path(tempfile.mkdtemp(prefix="direct-", dir=bench.scratch))
    return Running(bench.upstream.port, None, Bodies(home, port=bench.upstream.port, key="direct"), connections=32)


@contextlib.contextmanager
def tls_terminator(bench: Bench) -> Iterator[Tls]:
    """nginx on the load's core, with a self-signed P-256 certificate for localhost, in front of the upstream."""
    home = Path(tempfile.mkdtemp(prefix="tls-", dir=bench.scratch))
    certificate, key = home / "certificate.pem", home / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    port = free_port()
    write_tls_terminator(home, port=port, upstream_port=bench.upstream.port, certificate=certificate, key=key)
    log = home / "log"
    with running(pinned(bench.load_core, nginx_argv(home)), env=dict(os.environ), cwd=home, log=log):
        time.sleep(0.3)  # it answers no plain request that readiness could be asked by
        yield Tls(port, certificate)


def warm_up(up: Running) -> None:
    """The first requests load code and open connections, and in some gateways take seconds."""
    head, _, body = up.bodies.path("small").read_bytes().partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    for _ in range(WARM_UP_REQUESTS):
        connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=WARM_UP_PATIENCE_S)
        connection.request("POST", "/v1/messages", body, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status != 200:
            raise BenchError(f"the first request is answered {answer.status}: {text[:500].decode(errors='replace')}")


def settle(up: Running) -> None:
    """Waits until the gateway is done with what the load before left it."""
    if up.pid is None:
        return
    for _ in range(round(SETTLE_S_MAX / SETTLE_LOOK_S)):
        before_s = cpu_s(up.pid)
        time.sleep(SETTLE_LOOK_S)
        if cpu_s(up.pid) - before_s < SETTLED_SHARE * SETTLE_LOOK_S:
            return


def _must_answer(result: LoadResult, what: str) -> None:
    if result.errors > result.completed / 100 or not result.completed:
        raise BenchError(
            f"{what}: {result.errors} errors beside {result.completed} answers, "
            f"the first with status {result.first_bad_status}"
        )


def _us(cpu_s: float, count: int) -> float:
    return round(cpu_s / count * 1e6, 2) if count else 0.0


def cpu_a_request(bench: Bench, gateway: Running, body: str, durations: Durations) -> Record:
    """A closed loop that keeps the gateway's core busy. body: small, large, or stream (66 events at once)."""
    bench.upstream.pace(0)
    result = bench.load(
        "closed",
        port=gateway.port,
        request=gateway.bodies.path(body),
        gateway_pid=gateway.pid,
        connections=gateway.connections,
        warmup=durations.warmup_s,
        seconds=durations.closed_s,
    )
    _must_answer(result, f"closed loop, {body} body")
    # A stream that the measured time cuts is counted by its end, its events by theirs.
    whole_streams = result.completed - gateway.connections
    if body == "stream" and result.events < whole_streams * EVENTS_A_STREAM_UNPACED:
        raise BenchError(f"events were lost: {result.events} in {result.completed} streams")
    return {
        "cpu_us": _us(result.gateway_cpu_s, result.completed),
        "requests_per_s": round(result.completed / result.seconds, 1),
        "p50_ms": result.latency_p50_ms,
        "p99_ms": result.latency_p99_ms,
        "others_share": result.others_share,
    }


def cpu_an_event(bench: Bench, gateway: Running, durations: Durations, *, in_step: bool) -> Record:
    """In step: all streams speak at the same moments, so that a gateway serves many at each wake-up. Else each speaks
    at moments of its own, as streams of people do, and most events cost a wake-up."""
    for streams, rate in EVENT_LOADS:
        settle(gateway)
        bench.upstream.pace(rate, in_step=in_step)
        result = bench.load(
            "streams",
            port=gateway.port,
            request=gateway.bodies.path("stream"),
            gateway_pid=gateway.pid,
            connections=streams,
            open_within=OPEN_WITHIN_S,
            seconds=durations.events_s,
        )
        bench.upstream.pace(0)
        carried_per_s = result.events / result.seconds
        if carried_per_s >= CARRIED_SHARE_MIN * streams * rate:
            break
    return {
        "cpu_us": _us(result.gateway_cpu_s, result.events),
        "offered_per_s": streams * rate,
        "carried_per_s": round(carried_per_s, 1),
        "p50_ms": result.delay_p50_ms,
        "p99_ms": result.delay_p99_ms,
        "others_share": result.others_share,
    }


def latency(bench: Bench, gateway: Running, durations: Durations, rate: int) -> Record:
    bench.upstream.pace(0)
    result = bench.load(
        "open",
        port=gateway.port,
        request=gateway.bodies.path("large"),
        gateway_pid=gateway.pid,
        rate=rate,
        warmup=durations.warmup_s,
        seconds=durations.open_s,
    )
    return {
        "p50_ms": result.latency_p50_ms,
        "p99_ms": result.latency_p99_ms,
        "offered_per_s": rate,
        "carried_per_s": round(result.completed / max(result.seconds, durations.open_s), 1),
        "others_share": result.others_share,
    }


def latencies(bench: Bench, up: Running, durations: Durations) -> dict[str, Record]:
    """A rate above what a short closed loop reaches is not tried: its backlog would weigh on what comes next."""
    reached_per_s = cpu_a_request(bench, up, "large", durations)["requests_per_s"]
    records: dict[str, Record] = {}
    for rate in OPEN_LOOP_RATES_PER_S:
        if reached_per_s < rate:
            records[f"latency_{rate}"] = {"offered_per_s": rate, "carried_per_s": reached_per_s}
        elif up.pid is None or rate >= 100 or reached_per_s < 100:
            records[f"latency_{rate}"] = latency(bench, up, durations, rate)
    return records


def streams_left(bench: Bench, gateway: Running) -> Record:
    """Upstream streams still open one second after 200 clients left theirs at once."""
    bench.upstream.pace(5)
    result = bench.load(
        "streams",
        port=gateway.port,
        request=gateway.bodies.path("stream"),
        gateway_pid=gateway.pid,
        connections=ABORT_STREAMS,
        open_within=OPEN_WITHIN_S,
        seconds=1,
    )
    time.sleep(ABORT_WAIT_S)
    left = bench.upstream.streams_open()
    bench.upstream.pace(0)
    return {"left": left, "opened": result.streams - result.streams_lost}


def memory_a_stream(bench: Bench, gateway: Gateway, durations: Durations, *, tls: Tls | None) -> Record:
    """Resident memory that open streams add to a gateway that was warmed by two seconds of ordinary requests."""
    for streams in MEMORY_STREAMS:
        with started(bench, gateway, tls=tls) as up:
            assert up.pid is not None
            warm_up(up)
            warm = cpu_a_request(bench, up, "small", WARM)
            settle(up)
            before_kb = rss_kb(up.pid)
            bench.upstream.pace(MEMORY_EVENTS_PER_S)
            result = bench.load(
                "streams",
                port=up.port,
                request=up.bodies.path("stream"),
                gateway_pid=up.pid,
                read_rss_after_s=durations.memory_s - 0.5,
                connections=streams,
                open_within=OPEN_WITHIN_S,
                seconds=durations.memory_s,
            )
            bench.upstream.pace(0)
        opened = result.streams - result.streams_lost
        if opened >= CARRIED_SHARE_MIN * streams:
            break
    return {
        "kb_a_stream": round((result.gateway_rss_kb - before_kb) / opened, 2) if opened else 0.0,
        "asked": streams,
        "opened": opened,
        "warm_cpu_us": warm["cpu_us"],
    }


def start(up: Running) -> Record:
    assert up.pid is not None
    time.sleep(IDLE_S)
    return {"ready_s": round(up.start_to_ready_s, 3), "idle_rss_mb": round(rss_kb(up.pid) / 1024, 1)}


def measure(
    bench: Bench, gateway: Gateway, durations: Durations, only: frozenset[str]
) -> tuple[dict[str, Record], list[str]]:
    """One repetition: every wanted measurement of one gateway, and what went wrong in those that are missing."""
    records: dict[str, Record] = {}
    failures: list[str] = []
    if only != {"memory"}:
        try:
            with started(bench, gateway) as up:
                records["start"] = start(up)
                warm_up(up)
                records |= traffic(bench, up, durations, only, failures)
        except BenchError as e:
            failures.append(str(e))
    if not only or "memory" in only:
        with tls_terminator(bench) as terminator:
            for name, tls in (("memory_plain", None), ("memory_tls", terminator)):
                try:
                    records[name] = memory_a_stream(bench, gateway, durations, tls=tls)
                except BenchError as e:
                    failures.append(f"{name}: {e}")
    return records, failures


def least_disturbed(bench: Bench, measurement: Callable[[], dict[str, Record]]) -> dict[str, Record]:
    """Measures again, a few times at most, while others worked on the gateway's core; the quietest one counts."""

    def disturbance(records: dict[str, Record]) -> float:
        return max(record.get("others_share", 0.0) for record in records.values())

    best: dict[str, Record] | None = None
    for _ in range(TRIES_MAX):
        bench.wait_for_quiet()
        records = measurement()
        if best is None or disturbance(records) < disturbance(best):
            best = records
        if disturbance(best) <= OTHERS_SHARE_MAX or not bench.patient:
            break
    assert best is not None
    return best


def traffic(
    bench: Bench, up: Running, durations: Durations, only: frozenset[str], failures: list[str]
) -> dict[str, Record]:
    """The measurements that need no start of their own; also of the upstream without a gateway."""
    records: dict[str, Record] = {}
    groups: dict[str, list[Callable[[], dict[str, Record]]]] = {
        "cpu": [
            partial(lambda body: {f"cpu_{body}": cpu_a_request(bench, up, body, durations)}, body)
            for body in ("small", "large", "stream")
        ],
        "events": [
            lambda: {"events_in_step": cpu_an_event(bench, up, durations, in_step=True)},
            lambda: {"events_spread": cpu_an_event(bench, up, durations, in_step=False)},
        ],
        "latency": [lambda: latencies(bench, up, durations)],
        "aborts": [lambda: {"aborts": streams_left(bench, up)}],
    }
    for group, measurements in groups.items():
        for measurement in measurements if not only or group in only else ():
            settle(up)
            try:
                records |= least_disturbed(bench, measurement)
            except BenchError as e:
                failures.append(str(e))
    return records
