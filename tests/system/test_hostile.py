"""Clients that mean it harm: they get a 4xx or a closed connection, never a 5xx, and nobody else notices.

Here: what they send. Floods, logs and what comes back: test_hostile_floods.py.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.system.conftest import UPSTREAM_KEY, Stack, base_environment, until
from tests.system.hostile import (
    BODY,
    MESSAGE,
    Answer,
    Recorder,
    answers,
    connect,
    forget_peak,
    post,
    read,
    resident_bytes,
    response,
    talk,
)
from tests.system.hostile_house import BODY_TIMEOUT_S, HEADER_TIMEOUT_S, House, newest_calls, start

DOCUMENTED = (503, 505, 508, 529)
"""Statuses above 499 that the gateway may answer by itself."""
SMUGGLED = b"smuggled-request"


@pytest.fixture(scope="module")
def running(shared_stack: Stack) -> Iterator[House]:
    upstream = Recorder()
    house = start(shared_stack, upstream)
    house.app_key = house.gateway.key("app", "--scope", "messages", "--scope", "app")
    house.admin_key = house.gateway.key("admin", "--scope", "admin:read", "--scope", "messages")
    yield house
    upstream.close()


@pytest.fixture
def house(running: House) -> Iterator[House]:
    """The gateway that the tests share; after each of them it must live, serve, and have nothing to regret."""
    running.upstream.forget()
    yield running
    running.upstream.forget()
    running.healthy()
    log = running.gateway.process.text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    for event in ("call_failed", "passthrough_failed", "task_crashed"):
        assert event not in log


# what is not HTTP/1.1 as it should be

GOOD_LINES = b"host: gateway\r\nx-api-key: KEY\r\ncontent-type: application/json\r\n"
INNER = (
    b"POST /v1/messages HTTP/1.1\r\n"
    + GOOD_LINES
    + b"x-stainless-lang: "
    + SMUGGLED
    + b"\r\ncontent-length: 2\r\n\r\n{}"
)


def framed(lines: bytes, rest: bytes = b"0\r\n\r\n" + INNER) -> bytes:
    return b"POST /v1/messages HTTP/1.1\r\n" + GOOD_LINES + lines + b"\r\n" + rest


SMUGGLING = {
    "CL+TE": framed(b"content-length: 5\r\ntransfer-encoding: chunked\r\n"),
    "TE+CL": framed(b"transfer-encoding: chunked\r\ncontent-length: %d\r\n" % (len(INNER) + 5)),
    "two CLs": framed(b"content-length: 5\r\ncontent-length: 0\r\n"),
    "two equal CLs": framed(b"content-length: 5\r\ncontent-length: 5\r\n"),
    "CL list": framed(b"content-length: 5, 0\r\n"),
    "CL plus": framed(b"content-length: +5\r\n"),
    "CL minus": framed(b"content-length: -5\r\n"),
    "CL hex": framed(b"content-length: 0x5\r\n"),
    "CL empty": framed(b"content-length:\r\n"),
    "CL underscore": framed(b"content-length: 0_5\r\n"),
    "CL beyond 64 bits": framed(b"content-length: 18446744073709551621\r\n"),
    "TE identity, chunked": framed(b"transfer-encoding: identity, chunked\r\n"),
    "TE chunked, identity": framed(b"transfer-encoding: chunked, identity\r\n"),
    "TE xchunked": framed(b"transfer-encoding: xchunked\r\ncontent-length: 5\r\n"),
    "TE twice": framed(b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n"),
    "TE quoted": framed(b'transfer-encoding: "chunked"\r\ncontent-length: 5\r\n'),
    "TE vertical tab": framed(b"transfer-encoding: \x0bchunked\r\ncontent-length: 5\r\n"),
    "TE space before colon": framed(b"transfer-encoding : chunked\r\ncontent-length: 5\r\n"),
    "TE on a folded line": framed(b"transfer-encoding:\r\n chunked\r\ncontent-length: 5\r\n"),
    "TE after a bare LF": framed(b"x-a: b\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n"),
    "TE after a bare CR": framed(b"x-a: b\rtransfer-encoding: chunked\r\ncontent-length: 5\r\n"),
    "TE with a NUL": framed(b"transfer-encoding: chunked\x00\r\ncontent-length: 5\r\n"),
    "TE under HTTP/1.0": framed(b"connection: keep-alive\r\ntransfer-encoding: chunked\r\n").replace(b"1.1", b"1.0", 1),
    "chunk size overflow": framed(b"transfer-encoding: chunked\r\n", b"10000000000000000\r\n\r\n0\r\n\r\n" + INNER),
    "chunk size negative": framed(b"transfer-encoding: chunked\r\n", b"-1\r\n\r\n0\r\n\r\n" + INNER),
    "chunk size 0x": framed(b"transfer-encoding: chunked\r\n", b"0x0\r\n\r\n" + INNER),
    "chunk size blank": framed(b"transfer-encoding: chunked\r\n", b" \r\n\r\n" + INNER),
    "chunk without CRLF": framed(b"transfer-encoding: chunked\r\n", b"1\r\nab\r\n0\r\n\r\n" + INNER),
    "chunk with a bare LF": framed(b"transfer-encoding: chunked\r\n", b"1\na\r\n0\r\n\r\n" + INNER),
    "chunk end bare LF": framed(b"transfer-encoding: chunked\r\n", b"1\r\na\n0\n\n" + INNER),
    "chunk extension LF": framed(b"transfer-encoding: chunked\r\n", b"1;a\nb\r\na\r\n0\r\n\r\n" + INNER),
    "body on GET": b"GET /v1/models HTTP/1.1\r\n" + GOOD_LINES + b"content-length: x\r\n\r\n" + INNER,
}
MALFORMED = {
    "two Hosts": framed(b"host: other\r\ncontent-length: 2\r\n", b"{}"),
    "no Host": b"POST /v1/messages HTTP/1.1\r\nx-api-key: KEY\r\ncontent-length: 2\r\n\r\n{}",
    "bare LF everywhere": framed(b"content-length: 2\r\n", b"{}").replace(b"\r\n", b"\n"),
    "bare LF once": framed(b"x-a: 1\ncontent-length: 2\r\n", b"{}"),
    "bare CR": framed(b"x-a: 1\r2\r\ncontent-length: 2\r\n", b"{}"),
    "bare CR as line end": framed(b"content-length: 2\r\n", b"{}").replace(b"\r\n", b"\r"),
    "obs-fold": framed(b"x-a: 1\r\n 2\r\ncontent-length: 2\r\n", b"{}"),
    "obs-fold with a tab": framed(b"x-a: 1\r\n\t2\r\ncontent-length: 2\r\n", b"{}"),
    "NUL in a value": framed(b"x-a: 1\x002\r\ncontent-length: 2\r\n", b"{}"),
    "NUL in a name": framed(b"x\x00a: 1\r\ncontent-length: 2\r\n", b"{}"),
    "space in a name": framed(b"x a: 1\r\ncontent-length: 2\r\n", b"{}"),
    "no name": framed(b": 1\r\ncontent-length: 2\r\n", b"{}"),
    "a line without a colon": framed(b"nonsense\r\ncontent-length: 2\r\n", b"{}"),
    "absolute-form": framed(b"content-length: 2\r\n", b"{}").replace(b"/v1", b"http://gateway/v1", 1),
    "absolute-form elsewhere": framed(b"content-length: 2\r\n", b"{}").replace(b"/v1", b"http://127.0.0.1:1/v1", 1),
    "authority-form": b"CONNECT gateway:443 HTTP/1.1\r\nhost: gateway\r\n\r\n",
    "asterisk-form": b"OPTIONS * HTTP/1.1\r\nhost: gateway\r\n\r\n",
    "TRACE": b"TRACE /v1/messages HTTP/1.1\r\nhost: gateway\r\nx-api-key: KEY\r\n\r\n",
    "no such method": b"HACK /v1/messages HTTP/1.1\r\nhost: gateway\r\nx-api-key: KEY\r\n\r\n",
    "lower case method": b"post /v1/messages HTTP/1.1\r\nhost: gateway\r\nx-api-key: KEY\r\ncontent-length: 0\r\n\r\n",
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "HTTP/2.0": b"GET /v1/models HTTP/2.0\r\nhost: gateway\r\nx-api-key: KEY\r\n\r\n",
    "HTTP/1.2": b"GET /v1/models HTTP/1.2\r\nhost: gateway\r\nx-api-key: KEY\r\n\r\n",
    "HTTP/11": b"GET /v1/models HTTP/11\r\nhost: gateway\r\nx-api-key: KEY\r\n\r\n",
    "h2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    "raw target bytes": b"GET /v1/models/\xff\xfe HTTP/1.1\r\nhost: gateway\r\nx-api-key: KEY\r\n\r\n",
    "target with a tab": b"GET /v1/models\t/x HTTP/1.1\r\nhost: gateway\r\nx-api-key: KEY\r\n\r\n",
    "2 MB header": framed(b"x-big: " + b"a" * 2_000_000 + b"\r\ncontent-length: 2\r\n", b"{}"),
    "2 MB header name": framed(b"a" * 2_000_000 + b": 1\r\ncontent-length: 2\r\n", b"{}"),
    "65 headers": framed(b"".join(b"x-%d: 1\r\n" % n for n in range(61)) + b"content-length: 2\r\n", b"{}"),
    "3 KB target": framed(b"content-length: 2\r\n", b"{}").replace(b"messages", b"messages?" + b"q" * 3000, 1),
}


def _sent(house: House, raw: bytes, key: str) -> list[Answer]:
    """The answers to an item of a corpus: at most one, 4xx (or the documented 505), or just a closed connection."""
    with connect(house.url) as sock:
        try:
            sock.sendall(raw.replace(b"KEY", key.encode()))
        except ConnectionError:
            pass
        data = read(sock, within_s=HEADER_TIMEOUT_S + 3)
    return answers(data)


@pytest.mark.parametrize("key", ["good", "bad", "none"])
def test_what_is_malformed_is_refused_once_and_goes_nowhere(house, key):
    corpus = {**MALFORMED, **SMUGGLING}
    presented = {"good": house.key, "bad": "hg_aaaaaaaa_" + "b" * 43, "none": ""}[key]
    with ThreadPoolExecutor(32) as pool:
        results = dict(zip(corpus, pool.map(lambda raw: _sent(house, raw, presented), corpus.values()), strict=True))
    wrong = {
        name: found
        for name, found in results.items()
        if len(found) > 1 or any(not 400 <= answer.status < 500 and answer.status != 505 for answer in found)
    }
    if key == "good":
        # RFC 9112 6.1: served or refused, but the connection ends after it.
        allowed = wrong.pop("TE under HTTP/1.0", [])
        assert len(allowed) <= 1
    assert not wrong
    assert SMUGGLED not in house.upstream.bytes
    assert house.upstream.heard == []


@pytest.mark.parametrize(
    ("name", "status"),
    [("2 MB header", 431), ("65 headers", 431), ("3 KB target", 414), ("two Hosts", 400), ("CL+TE", 400)],
)
def test_the_refusal_names_what_is_wrong(house, name, status):
    (answer,) = _sent(house, {**MALFORMED, **SMUGGLING}[name], house.key)
    assert answer.status == status
    error = json.loads(answer.body)
    assert error["type"] == "error"
    assert error["request_id"].startswith("call_")
    assert answer.header("x-should-retry") == "false"
    assert answer.header("connection") == "close"


@pytest.fixture(scope="module")
def nginx(running: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """nginx in front of the gateway, with connections that it keeps alive and shares between its clients."""
    directory = tmp_path_factory.mktemp("nginx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = running.url.removeprefix("http://")
    (directory / "nginx.conf").write_text(
        f"""
        daemon off; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log;
        events {{ worker_connections 256; }}
        http {{
          access_log off; client_max_body_size 40m;
          client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
          fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
          upstream gateway {{ server {backend}; keepalive 1; }}
          server {{
            listen 127.0.0.1:{port}; ignore_invalid_headers off; underscores_in_headers on;
            location / {{
              proxy_pass http://gateway; proxy_http_version 1.1; proxy_set_header Connection "";
              proxy_buffering off; proxy_request_buffering off;
            }}
          }}
        }}
        """
    )
    process = subprocess.Popen(
        [shutil.which("nginx") or "nginx", "-c", str(directory / "nginx.conf"), "-p", str(directory)],
        env=base_environment(),
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"

    def listens() -> bool:
        try:
            connect(url).close()
        except OSError:
            return False
        return True

    until(listens, what="nginx to listen")
    yield url
    process.terminate()
    process.wait(10)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("name", SMUGGLING)
def test_nothing_is_smuggled_past_nginx_into_the_next_clients_answer(house, nginx, name):
    house.upstream.answer = lambda heard: response(MESSAGE, b"x-echo: " + (heard.header(b"x-stainless-os") or [b""])[0])
    raw = SMUGGLING[name].replace(b"KEY", house.key.encode())
    with connect(nginx) as attacker:
        try:
            attacker.sendall(raw)
        except ConnectionError:
            pass
        for victim in range(3):
            mark = b"victim-%d" % victim
            found = talk(nginx, post(house.key, BODY, b"x-stainless-os: " + mark), count=1)
            assert [answer.status for answer in found] == [200]
            assert found[0].header("x-echo") == mark.decode(), "a client got another's answer"
        data = read(attacker, within_s=HEADER_TIMEOUT_S + 3)
    # What nginx itself takes for a second request of its client is the attacker's own business.
    own = [heard for heard in house.upstream.heard if SMUGGLED in heard.head]
    assert len(own) <= max(len(answers(data)) - 1, 0)


# sizes and times


def test_a_body_over_the_limit_is_refused_at_once_and_is_not_held(house):
    size = 33 << 20
    forget_peak(house.pid)
    before = resident_bytes(house.pid)
    began = time.monotonic()
    head = post(house.key)[: -len(BODY)].replace(b"content-length: %d" % len(BODY), b"content-length: %d" % size)
    (answer,) = talk(house.url, head, *[bytes(1 << 20)] * 33, count=1)
    assert time.monotonic() - began < 1
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert resident_bytes(house.pid, "VmHWM") - before < 5 << 20


def test_a_body_without_a_length_is_refused_when_it_passes_the_limit(house):
    head = post(house.key)[: -len(BODY)].replace(b"content-length: %d" % len(BODY), b"transfer-encoding: chunked")
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    (answer,) = talk(house.url, head, *[chunk] * 33, count=1)
    assert answer.status == 413


def test_a_chunked_body_without_an_end_is_closed_by_its_deadline(house):
    head = b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nx-api-key: %b\r\ntransfer-encoding: chunked\r\n\r\n"

    def closed(case: tuple[bytes, str]) -> tuple[float, list[int]]:
        rest, key = case
        began = time.monotonic()
        with connect(house.url) as sock:
            sock.sendall(head % key.encode() + rest)
            data = b""
            sock.settimeout(BODY_TIMEOUT_S * 2 + 5)
            while piece := sock.recv(65536):
                data += piece
        return time.monotonic() - began, [answer.status for answer in answers(data)]

    rests = (b"", b"5\r\nab", b"2\r\nab\r\n", b"2\r\nab\r\n0\r\nx-trailer: 1")
    for key, status in ((house.key, 408), ("hg_" + "x" * 52, 401)):
        with ThreadPoolExecutor(4) as pool:
            for taken_s, statuses in pool.map(closed, [(rest, key) for rest in rests]):
                assert taken_s < BODY_TIMEOUT_S + 4
                assert statuses == [status]
    assert house.upstream.heard == []


@pytest.mark.parametrize("key", ["good", "bad"])
def test_a_trailer_without_an_end_stops_nobody(house, key):
    """Joined piece by piece it kept the loop busy for everybody, before any key was looked at."""
    presented = house.key if key == "good" else "hg_" + "x" * 52
    opening = b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nx-api-key: %b\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-t: "
    cpu_s = _cpu_s(house.pid)
    with connect(house.url) as sock:
        try:
            sock.sendall(opening % presented.encode())
            for _ in range(48):
                sock.sendall(b"a" * (1 << 20))
        except ConnectionError:
            pass  # it may be cut off on the way
        found = answers(read(sock, count=1, within_s=3))
    assert [answer.status in (400, 401, 431) for answer in found] in ([True], [])
    assert _cpu_s(house.pid) - cpu_s < 1.0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_user_in_a_trailer_does_not_count(house):
    body = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    head = b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nx-api-key: %b\r\ntransfer-encoding: chunked\r\n"
    head %= house.app_key.encode()
    for named in (b"x-headgate-user: alice\r\n", b""):
        talk(house.url, head + named + b"\r\n" + body + b"x-headgate-user: mallory\r\nx-api-key: x\r\n\r\n", count=1)
    until(lambda: [call["user"] for call in newest_calls(house, 2)] == ["app", "alice"], what="the rows of both")
    assert b"mallory" not in house.upstream.bytes


def _slow(house: House, count: int) -> list[socket.socket]:
    """Half of them stop within their header, half within their body."""
    socks = []
    for number in range(count):
        sock = connect(house.url)
        sock.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nx-a" if number % 2 else post(house.key)[:-1])
        socks.append(sock)
    return socks


def test_five_hundred_slow_sockets_harm_nobody_and_are_closed_by_their_deadlines(house):
    began = time.monotonic()
    slow = _slow(house, 500)
    taken_s = []
    with connect(house.url) as sock:
        while time.monotonic() - began < HEADER_TIMEOUT_S + 0.5 or len(taken_s) < 200:
            at = time.monotonic()
            sock.sendall(post(house.key))
            (answer,) = answers(read(sock, count=1))
            taken_s.append(time.monotonic() - at)
            assert answer.status == 200
    assert statistics.quantiles(taken_s, n=100)[98] <= 0.1
    closed = 0
    for sock in slow:
        sock.settimeout(max(began + HEADER_TIMEOUT_S + 6 - time.monotonic(), 0.01))
        data = b""
        while piece := sock.recv(65536):
            data += piece
        closed += 1
        assert [answer.status for answer in answers(data)] == [408]
        sock.close()
    assert closed == 500


# bodies


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_a_body_of_depth_a_hundred_thousand_is_a_bad_request(house, opening):
    deep = BODY[:-1] + b',"metadata":' + opening * 100_000
    for body in (opening * 100_000, deep, deep.replace(b'"metadata"', b'"messages"')):
        (answer,) = talk(house.url, post(house.key, body), count=1)
        assert (answer.status, answer.code) == (400, "invalid_request")
    assert house.upstream.heard == []


def _mutated(dice: random.Random) -> bytes:
    body = bytearray(dice.choice([BODY, MESSAGE, b"{}", b'{"model":"m","max_tokens":1,"messages":[],"stream":true}']))
    for _ in range(dice.randint(0, 6)):
        at = dice.randrange(len(body) + 1)
        match dice.randrange(6):
            case 0:
                body[at:at] = bytes([dice.randrange(256)])
            case 1:
                del body[at : at + dice.randint(1, 20)]
            case 2:
                body[at:at] = dice.choice(
                    [b"{", b"[", b'"', b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"\xff", b",", b":", b"null", b"-0"]
                )
            case 3:
                body[at:at] = body[: dice.randrange(len(body) + 1)]
            case 4:
                body[at:at] = b'"model":' + dice.choice(
                    [b'"x"', b"1", b"null", b"[]", b'"\\r\\nx: y"', b'"' + b"m" * 999 + b'"']
                )
            case _:
                body[at:at] = b'"stream":' + dice.choice([b"true", b"1", b"null", b'"yes"'])
    return bytes(body)


def _pipelined(house: House, requests: list[bytes]) -> list[Answer]:
    """Sixteen at a time on one connection, each of which must be answered."""
    found: list[Answer] = []
    sock = connect(house.url)
    for at in range(0, len(requests), 16):
        batch = requests[at : at + 16]
        sock.sendall(b"".join(batch))
        got = answers(read(sock, count=len(batch), within_s=30))
        assert len(got) == len(batch), f"{len(got)} answers to {len(batch)} requests"
        found += got
    sock.close()
    return found


def _no_server_errors(found: list[Answer]) -> None:
    bad = [answer for answer in found if answer.status >= 500 and answer.status not in DOCUMENTED]
    assert not bad, bad[:3]
    assert all(answer.status == 200 or json.loads(answer.body)["type"] == "error" for answer in found)


def test_ten_thousand_mangled_bodies_make_no_server_error(house):
    # Streams are answered with a message here, which is the upstream's fault and a 502; so the upstream streams.
    stream = b"event: message_stop\ndata: {}\n\n"
    house.upstream.answer = lambda heard: (
        response(b'{"type":"error","error":{"type":"invalid_request_error","message":"no"}}', status=b"400 Bad Request")
        if b'"stream"' in heard.body
        else response(MESSAGE)
    )
    assert stream
    dice = random.Random(20260822)
    found = _pipelined(house, [post(house.key, _mutated(dice)) for _ in range(10_000)])
    _no_server_errors(found)
    assert {200, 400} <= {answer.status for answer in found}
    for heard in house.upstream.heard:
        json.loads(heard.body)


def test_a_gzip_bomb_is_refused(house):
    bomb = gzip.compress(bytes(200_000_000), 9)
    assert len(bomb) < 200_000
    before = resident_bytes(house.pid)
    forget_peak(house.pid)
    (answer,) = talk(house.url, post(house.key, bomb, b"content-encoding: gzip"), count=1)
    assert (answer.status, answer.code) == (413, "request_body_too_large_after_decoding")
    assert resident_bytes(house.pid, "VmHWM") - before < 128 << 20
    assert house.upstream.heard == []


# headers

_NAMES = b"""
    x-api-key authorization proxy-authorization cookie host2 forwarded x-forwarded-for x-forwarded-host
    x-real-ip via te trailer keep-alive proxy-connection upgrade-insecure x-headgate-user x-headgate-hop
    x-headgate-tier x-headgate-deadline-s x-headgate-endpoint x-headgate-conversation anthropic-version
    anthropic-beta anthropic-custom x-stainless-os x-claude-code-session traceparent baggage accept
    accept-encoding user-agent content-type expect2 x-http-method-override x-original-url x-rewrite-url
    x_api_key anthropic_version
""".split()


def _random_lines(dice: random.Random, secret: bytes) -> list[bytes]:
    lines = []
    for _ in range(dice.randint(0, 12)):
        name = dice.choice(_NAMES)
        name = bytes(dice.choice((c, c ^ 32)) if chr(c).isalpha() else c for c in name)
        value = dice.choice(
            [
                b"", b" ", b"x", b"\t", b"Bearer " + secret, secret, b"\xff\xfe", "mật khẩu".encode(), b"a" * 300,
                b"nan",
                b"-1", b"1e308", b"inf", b"%0d%0ax-evil: 1", b"\\r\\nx-evil: 1", b"${jndi:ldap://x}", b"' OR 1=1 --",
            ]
        )  # fmt: skip
        lines.append(name + b": " + value)
    if dice.random() < 0.5:
        named = b", ".join(dice.sample([*_NAMES, b"host", b"content-length", b"close"], dice.randint(1, 4)))
        lines.append(b"Connection: keep-alive, " + named.replace(b"close", b"x-none"))
    return lines


def test_in_a_thousand_sets_of_headers_upstream_sees_our_key_only(house):
    dice = random.Random(7)
    secret = b"sk-ant-api03-of-the-client"
    requests = []
    for _ in range(1000):
        lines = _random_lines(dice, secret)
        own = b"x-api-key: " + dice.choice([house.key, house.app_key]).encode()
        request = post("", BODY, *lines).replace(b"x-api-key: \r\n", own + b"\r\n", 1)
        requests.append(request)
    found = _pipelined(house, requests)
    _no_server_errors(found)
    for request, answer in zip(requests, found, strict=True):
        # With two keys in a request either may count.
        two_keys = len(re.findall(rb"(?i)\r\nx-api-key:", request)) > 1
        assert answer.status == 200 or (two_keys and answer.status == 401), (request, answer)
    assert len(house.upstream.heard) > 700
    for heard in house.upstream.heard:
        assert heard.header(b"x-api-key") == [UPSTREAM_KEY.encode()]
        assert heard.header(b"host") == [house.upstream.url.removeprefix("http://").encode()]
        assert len(heard.header(b"content-length")) == 1
        for name in (b"authorization", b"proxy-authorization", b"cookie", b"connection", b"te", b"trailer", b"x-evil"):
            assert heard.header(name) == [], heard.head
        for name in (
            b"x-headgate-user",
            b"x-headgate-tier",
            b"x-forwarded-for",
            b"forwarded",
            b"via",
            b"accept-encoding2",
        ):
            assert heard.header(name) == [], heard.head
        assert heard.header(b"accept-encoding") == [b"identity"]
        assert heard.body == BODY
    for leaked in (house.key, house.app_key):
        assert leaked.encode() not in house.upstream.bytes


@pytest.mark.parametrize("named", [b"x-api-key", b"host", b"content-length", b"accept-encoding", b"x-headgate-hop"])
@pytest.mark.parametrize("form", [b"%b", b"close, %b", b"keep-alive,%b", b"%b\r\nconnection: x"])
def test_a_client_cannot_name_our_own_headers_away(house, named, form):
    (answer,) = talk(house.url, post(house.key, BODY, b"connection: " + form % named), count=1)
    assert answer.status == 200
    (heard,) = house.upstream.heard
    assert heard.header(b"x-api-key") == [UPSTREAM_KEY.encode()]
    for name in (b"host", b"content-length", b"accept-encoding", b"x-headgate-hop"):
        assert len(heard.header(name)) == 1
    assert heard.header(b"connection") == []


@pytest.mark.parametrize("evil", [b"\r\n\r\nx", b"\n", b"\r", b"\x00", b"\x0b", b"\x7f"])
def test_no_header_value_carries_a_line_break_across(house, evil):
    for name in (b"anthropic-beta", b"user-agent", b"x-headgate-user", b"traceparent", b"x-stainless-os"):
        found = talk(house.url, post(house.app_key, BODY, name + b": a" + evil + b"x-evil: 1"), within_s=5)
        assert len(found) <= 1
        assert all(answer.status < 500 for answer in found)
        assert all(answer.header("x-evil") == "" for answer in found)
    for heard in house.upstream.heard:
        assert heard.header(b"x-evil") == []
        assert heard.header(b"x-api-key") == [UPSTREAM_KEY.encode()]


@pytest.mark.parametrize(
    "model",
    [
        "a\r\nx-evil: 1",
        "a\n\nx-evil: 1",
        "\u0000",
        "\u2028x-evil: 1",
        "mô hình",
        "\u001b[31mred",
        "m" * 300_000,
        "",
        "\r\n" * 9,
    ],
)
@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found"])
def test_a_model_name_breaks_no_header(house, model, status):
    house.upstream.answer = lambda heard: response(MESSAGE, status=status)
    body = json.dumps({"model": model, "max_tokens": 5, "messages": []}).encode()
    (answer,) = talk(house.url, post(house.key, body), count=1)
    assert answer.status in (200, 400, 404)
    assert answer.header("x-evil") == ""
    assert sum(len(name) + len(value) for name, value in answer.headers) < 8192
    assert all(heard.body == body for heard in house.upstream.heard)


def test_an_answer_of_upstreams_cannot_be_split_either(house):
    house.upstream.answer = lambda heard: response(MESSAGE, b"x-a: b\rx-evil: 1", b"x-c: d\x00e")
    with connect(house.url) as sock:
        sock.sendall(post(house.key))
        data = read(sock, count=1)
    assert b"x-evil" not in data or b"\r\nx-evil" not in data
    (answer,) = answers(data)
    assert answer.status == 502


# paths

LONG_ID = b"/v1/models/" + b"a" * 129
NOT_OURS = rb"""
    //v1/messages /v1//messages /v1/messages/ /v1/./messages /v1/../v1/messages /V1/messages /v1/Messages
    /v1%2fmessages /%76%31/messages /v1/messages;x=1 /v1/messages%00 /v1/messages%20 /v1/messages.json
    /v1\messages /v1/models/.. /v1/models/../messages /v1/models/%2e%2e/messages /v1/models/a/b
    /v1/models/a;b/../c /v1/messages/batches/.. /v1/messages/batches/../../../x
    /v1/messages/batches/a/../results /v1/messages/batches/a%2fresults /v1/messages/batches/./results
    /v1/messages/batches//results /admin/usage /admin/calls /metrics /docs /openapi.json /sim/bill
    /v1/models/../../admin/usage /v1/messages#x /v1/complete /v1/files /.env /v1/messages/count_tokens/
    /v1/messages/count_tokens%3f /v1/models/
""".split()


@pytest.mark.parametrize("path", [*NOT_OURS, LONG_ID])
def test_a_path_that_is_not_exactly_ours_is_nothing(house, path):
    for method in (b"GET", b"POST", b"DELETE"):
        request = post(house.admin_key, BODY, path=path).replace(b"POST", method, 1)
        found = talk(house.url, request, count=1)
        assert [answer.status for answer in found] == [404]
        assert found[0].code == "no_such_path"
    assert house.upstream.heard == []


def test_a_thousand_random_paths_reach_nothing_but_what_is_listed(house):
    dice = random.Random(11)
    parts = rb"/ // v1 messages models batches .. . %2e %2f ; ? a ~ %00 results cancel admin V1 \ # : @".split()
    listed = (b"/v1/messages", b"/v1/models", b"/v1/messages/count_tokens")
    requests = []
    for _ in range(1000):
        path = b"/" + b"".join(dice.choice(parts) for _ in range(dice.randint(0, 9)))
        if dice.random() < 0.5:
            path = b"/v1/" + path.lstrip(b"/")
        requests.append(post(house.key, BODY, path=path).replace(b"POST", dice.choice([b"GET", b"POST"]), 1))
    found = _pipelined(house, requests)
    _no_server_errors([answer for answer in found if answer.body != b"ok\n"])
    for heard in house.upstream.heard:
        path = heard.head.split(b" ")[1].partition(b"?")[0]
        assert path in listed or (path.startswith(b"/v1/models/") and path.count(b"/") == 3 and b".." not in path)


# hops


@pytest.mark.parametrize(
    "lines",
    [
        b"connection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\n",
    ],
)
@pytest.mark.parametrize("target", [b"GET /livez", b"GET /v1/models", b"HEAD /", b"POST /v1/messages"])
def test_an_upgrade_gets_one_answer_and_no_other_protocol(house, target, lines):
    house.upstream.answer = lambda heard: response(b'{"data":[]}' if b"models" in heard.head else MESSAGE)
    request = b"%b HTTP/1.1\r\nhost: a\r\nx-api-key: %b\r\nconnection: upgrade\r\n%b" % (
        target,
        house.key.encode(),
        lines,
    )
    request += b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY) if target.startswith(b"POST") else b"\r\n"
    with connect(house.url) as sock:
        sock.sendall(request + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        data = read(sock, within_s=5)
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", data)) == 1
    assert data[9:12] in (b"200", b"400")


def test_a_gateway_that_is_its_own_upstream_says_so_after_one_hop(stack):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    gateway = stack.gateway(f"http://{address}", LISTEN=address, RETRY__BASE_DELAY_S="0.01")
    (answer,) = talk(gateway.url, post(gateway.key()), count=1)
    assert answer.status == 508
    (call,) = gateway.calls(1)
    assert (call["outcome"], call["status"]) == ("failed", 508)
    assert call["cost_nanousd"] == 0
