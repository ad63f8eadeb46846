"""Clients that mean it harm, second part: what they use up, what stands in logs, and what comes back to them."""

from __future__ import annotations

import gzip
import json
import random
import resource
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.system.conftest import UPSTREAM_KEY, Stack, until
from tests.system.hostile import (
    BODY,
    MESSAGE,
    Heard,
    NotHttp,
    Recorder,
    answers,
    connect,
    forget_peak,
    json_lines,
    post,
    read,
    resident_bytes,
    response,
    talk,
    tree_bytes,
)
from tests.system.hostile_house import House, newest_calls, start


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


# resources


def test_bodies_of_many_clients_stay_within_the_limit_and_each_is_answered(stack):
    upstream = Recorder()
    limit = 160 << 20
    house = start(
        stack, upstream, SERVER__BODIES_BYTES_MAX=str(limit), SERVER__BODY_TIMEOUT_S="30", QUEUE__DEADLINE_S="60"
    )
    filler = b'{"model":"claude-sonnet-4-6","max_tokens":5,"messages":[{"role":"user","content":"%b"}]}' % (
        b"a" * 30_000_000
    )
    request = post(house.key, filler)
    house.healthy()
    before = resident_bytes(house.pid)
    forget_peak(house.pid)
    upstream.go_on.clear()
    statuses: list[int] = []

    def upload(_: int) -> None:
        (answer,) = talk(house.url, request, count=1, within_s=60)
        statuses.append(answer.status)

    with ThreadPoolExecutor(64) as pool:
        uploads = [pool.submit(upload, number) for number in range(64)]
        until(
            lambda: len(statuses) >= 64 - limit // 30_000_000, within_s=45, what="those that do not fit to be told so"
        )
        peak = resident_bytes(house.pid, "VmHWM") - before
        upstream.go_on.set()
        for each in uploads:
            each.result(60)
    assert set(statuses) == {200, 529}
    assert statuses.count(200) >= limit // 30_000_000 - 1
    assert peak < 2 * limit + (64 << 20), f"{peak >> 20} MB for a limit of {limit >> 20}"
    house.healthy()
    upstream.close()


def test_decoded_bodies_count_as_what_they_are_decoded_to(stack):
    upstream = Recorder()
    limit = 100 << 20
    house = start(stack, upstream, SERVER__BODIES_BYTES_MAX=str(limit), QUEUE__DEADLINE_S="60")
    filler = b'{"model":"claude-sonnet-4-6","max_tokens":5,"messages":[{"role":"user","content":"%b"}]}' % (
        b"a" * 30_000_000
    )
    request = post(house.key, gzip.compress(filler), b"content-encoding: gzip")
    assert len(request) < 100_000
    house.healthy()
    before = resident_bytes(house.pid)
    forget_peak(house.pid)
    upstream.go_on.clear()
    statuses: list[int] = []

    def upload(_: int) -> None:
        (answer,) = talk(house.url, request, count=1, within_s=60)
        statuses.append(answer.status)

    with ThreadPoolExecutor(12) as pool:
        uploads = [pool.submit(upload, number) for number in range(12)]
        try:
            until(lambda: len(upstream.heard) + len(statuses) >= 13, within_s=30, what="all to be taken or refused")
            peak = resident_bytes(house.pid, "VmHWM") - before
        finally:
            upstream.go_on.set()
        for each in uploads:
            each.result(60)
    assert set(statuses) == {200, 529}
    assert peak < 2 * limit + (96 << 20), f"{peak >> 20} MB for a limit of {limit >> 20}"
    upstream.close()


@pytest.mark.drill
def test_tiny_chunks_cost_a_few_times_their_size_and_not_twenty(stack):
    upstream = Recorder()
    house = start(stack, upstream, SERVER__BODY_TIMEOUT_S="30")
    house.healthy()
    before = resident_bytes(house.pid)
    with connect(house.url) as sock:
        sock.sendall(
            post(house.key)[: -len(BODY)].replace(b"content-length: %d" % len(BODY), b"transfer-encoding: chunked")
        )
        for _ in range(100):
            sock.sendall(b"2\r\nab\r\n" * 20_000)
        (alive,) = talk(house.url, post(house.key), count=1)
        assert alive.status == 200
        assert resident_bytes(house.pid) - before < 32 << 20
    upstream.close()


def test_a_process_that_runs_out_of_descriptors_sheds_and_recovers(stack):
    upstream = Recorder()
    house = start(stack, upstream, SERVER__HEADER_TIMEOUT_S="60")
    with connect(house.url) as kept:
        kept.sendall(post(house.key))
        assert answers(read(kept, count=1))[0].status == 200
        resource.prlimit(house.pid, resource.RLIMIT_NOFILE, (256, 256))
        crowd = []
        for _ in range(400):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", int(house.url.rpartition(":")[2])))
            crowd.append(sock)
        for _ in range(20):
            kept.sendall(post(house.key))
            (answer,) = answers(read(kept, count=1))
            assert answer.status in (200, 502, 503, 529)
        assert house.gateway.process.popen.poll() is None
        for sock in crowd:
            sock.close()
    until(lambda: _served(house), within_s=15, what="the gateway to recover")
    assert house.gateway.process.popen.poll() is None
    log = house.gateway.process.log.read_bytes()
    assert len(log) < 2_000_000, "a full process must not fill the disk with it"
    upstream.close()


def _served(house: House) -> bool:
    try:
        found = talk(house.url, post(house.key), count=1, within_s=3)
    except (OSError, NotHttp):
        return False
    return [answer.status for answer in found] == [200]


def test_a_flood_of_answers_that_nobody_reads_does_not_grow_the_process(house):
    before = resident_bytes(house.pid)
    request = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n" * 2000
    socks = []
    sent = 0
    for _ in range(4):
        sock = connect(house.url)
        sock.settimeout(0.3)
        socks.append(sock)
        try:
            for _ in range(400):
                sent += sock.send(request)
        except TimeoutError:
            pass
    assert resident_bytes(house.pid) - before < 24 << 20
    house.healthy()
    for sock in socks:
        sock.close()


# logs and secrets

NAMED = (b"user", b"endpoint", b"conversation")
ODD_NAMES = [
    "a\nb",
    "a\r\nb",
    '{"event":"call"}',
    "\u2028x",
    "\u2029x",
    "\u0085x",
    "\u001b[31mred",
    "\u009b31m",
    "\u202eevil",
]


@pytest.mark.parametrize("text", [*ODD_NAMES, "\u0000", '"},{"', "a" * 5000])
def test_one_call_is_one_line_whatever_a_client_calls_itself(house, text):
    def log() -> bytes:
        with house.gateway.process.log.open("rb") as file:
            file.seek(read_from)
            return file.read()

    read_from = house.gateway.process.log.stat().st_size
    body = json.dumps({"model": "m" + text, "max_tokens": 5, "messages": [], "metadata": {"user_id": text}}).encode()
    raw = text.encode()
    named = [] if any(byte < 32 for byte in raw) else [b"x-headgate-%b: %b" % (name, raw) for name in NAMED]
    calls = []
    for key in (house.key, house.app_key):
        for lines in ([], named) if named else ([],):
            (answer,) = talk(house.url, post(key, body, *lines), count=1)
            calls.append(answer.header("x-headgate-call").encode())
    until(lambda: all(call in log() for call in calls), what="the log lines")
    written = log()
    for call in calls:
        assert sum(call in line for line in written.split(b"\n")) == 1
    assert len(json_lines(written)) == written.count(b"\n")
    assert len(written.decode().splitlines()) == written.count(b"\n"), "something else than a line feed ends a line"
    assert not any((byte < 32 and byte != 10) or byte == 127 for byte in written)
    assert max(map(len, written.split(b"\n"))) < 4096
    for sign in "\u009b\u202e\u2028\u2029\u0085":
        assert sign not in written.decode()


def test_no_name_keeps_a_call_out_of_the_ledger(house):
    marks = []
    for number, text in enumerate(
        [*ODD_NAMES, "\u0000", "a\u0000b", "\udfff".encode("utf-8", "replace").decode(), "'; --"]
    ):
        body = {
            "model": "claude-sonnet-4-6",
            "max_tokens": 5,
            "messages": [],
            "metadata": {"user_id": f"{number}{text}"},
        }
        (answer,) = talk(house.url, post(house.app_key, json.dumps(body).encode()), count=1)
        assert answer.status == 200
        marks.append(answer.header("x-headgate-call"))
    until(lambda: [call["call_id"] for call in newest_calls(house, len(marks))] == marks[::-1], what="a row for each")
    for number, call in enumerate(newest_calls(house, len(marks))[::-1]):
        assert call["user"].startswith(str(number))


def test_no_key_is_anywhere_after_a_storm(house):
    strangers = "sk-ant-api03-a-client-pasted-the-wrong-key"
    wrong = house.key[:-5] + "wrong"
    errors = iter(range(10_000))

    def moody(heard: Heard) -> bytes:
        number = next(errors) % 7
        statuses = [
            b"401 Unauthorized",
            b"403 Forbidden",
            b"429 Too Many",
            b"500 Oh",
            b"529 Busy",
            b"200 OK",
            b"302 Go",
        ]
        body = MESSAGE if number == 5 else b'{"type":"error","error":{"type":"api_error","message":"no"}}'
        return response(body, b"location: http://127.0.0.1:1/", status=statuses[number])

    house.upstream.answer = moody
    data = bytearray()

    def storm(number: int) -> None:
        dice = random.Random(number)
        for _ in range(12):
            key = dice.choice([house.key, house.app_key, house.admin_key, wrong, strangers, UPSTREAM_KEY, ""])
            lines = [b"authorization: Bearer " + dice.choice([strangers, wrong, UPSTREAM_KEY]).encode()]
            path = dice.choice(
                [b"/v1/messages", b"/v1/models", b"/v1/messages/count_tokens", b"/nowhere/" + wrong.encode()]
            )
            path += dice.choice([b"", b"?key=" + strangers.encode()])
            body = dice.choice([BODY, b"{", BODY.replace(b"hi", strangers.encode())])
            request = post(key, body, *lines, path=path)
            if path.startswith(b"/v1/models"):
                request = request.replace(b"POST", b"GET", 1)
            request = dice.choice([request, request, request, request[:-3], request.replace(b"\r\n", b"\n")])
            with connect(house.url) as sock:
                sock.sendall(request)
                data.extend(read(sock, count=1, within_s=4))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storm, range(8)))
    for path in ("/metrics", "/openapi.json", "/readyz", "/admin/calls?limit=500", "/admin/usage", "/nowhere"):
        for key in (house.admin_key, wrong, UPSTREAM_KEY):
            request = urllib.request.Request(house.gateway.operator_url + path, headers={"x-api-key": key})
            try:
                with urllib.request.urlopen(request, timeout=10) as found:
                    data.extend(found.read())
            except urllib.error.HTTPError as error:
                data.extend(error.read())
    places = {"responses and the operator's pages": bytes(data), "log": house.gateway.process.log.read_bytes()}
    places |= tree_bytes(house.gateway.data_dir)
    assert len(places) > 3
    needles = {
        "Anthropic's key": UPSTREAM_KEY,
        "a stranger's key": strangers,
        "a virtual key": house.key,
        "its secret": house.key[12:],
        "an app's key": house.app_key[12:],
        "an admin's key": house.admin_key[12:],
        "a wrong key": wrong,
    }
    found_in = [
        (what, where) for what, text in needles.items() for where, held in places.items() if text.encode() in held
    ]
    assert not found_in


def test_who_has_no_key_costs_no_call_and_no_row(house):
    until(lambda: _gauge(house, "calls_open") == 0, what="the calls of others to be over")
    files = {name: held for name, held in tree_bytes(house.gateway.data_dir).items() if not name.endswith("-shm")}
    newest = newest_calls(house, 1)
    bad = [post("hg_" + "a" * 8 + "_" + "b" * 43), post(""), post("x" * 5000), post(UPSTREAM_KEY), post("\xff")]
    bad += [request.replace(b"x-api-key: ", b"authorization: Bearer ", 1) for request in bad]
    bad += [
        post("hg_" + "a" * 52, path=path)
        for path in (b"/v1/models", b"/v1/messages/count_tokens", b"/v1/messages/batches")
    ]
    for request in bad * 4:
        found = talk(house.url, request, count=1)
        assert [answer.status in (401, 405, 429) for answer in found] == [True]
    assert house.upstream.heard == []
    assert newest_calls(house, 1) == newest
    after = {name: held for name, held in tree_bytes(house.gateway.data_dir).items() if not name.endswith("-shm")}
    changed = [name for name in after if after[name] != files.get(name) and "journal" in name]
    assert not changed


# the operator's door


def test_no_question_to_the_operator_makes_a_server_error(house):
    odd = [
        "",
        "abc",
        "-1",
        "0",
        "1e9",
        "99999999999999999999",
        "9" * 400,
        "%00",
        "nan",
        "1;drop",
        "%F0%9F%92%A9",
        "24h",
        "99999999999d",
        "2026-13-45",
    ]
    paths = [f"/admin/calls?limit={value}" for value in odd] + [f"/admin/calls?cursor={value}" for value in odd]
    paths += [f"/admin/usage?{name}={value}" for name in ("since", "until", "group_by") for value in odd]
    paths.append("/admin/usage?since=1h&since=2h")
    elsewhere = [
        "/admin/..%2f",
        "/admin//usage",
        "/admin/usage/",
        "/metrics/../admin/calls",
    ]
    for path in paths + elsewhere:
        for key in (house.admin_key, house.key, "", "x" * 4000):
            request = b"GET %b HTTP/1.1\r\nhost: a\r\nx-api-key: %b\r\nconnection: close\r\n\r\n" % (
                path.encode(),
                key.encode(),
            )
            with connect(house.gateway.operator_url) as sock:
                sock.sendall(request)
                data = read(sock, within_s=5)
            status = int(data[9:12])
            assert status < 500, (path, data[:500])
            if (
                key != house.admin_key
                and "admin/" in path
                and ".." not in path
                and "//" not in path
                and not path.endswith("/")
            ):
                assert status in (401, 403), path
            if status >= 400:
                body = data.partition(b"\r\n\r\n")[2]
                assert b'"type":"error"' in body.replace(b" ", b""), (path, data[:600])


# without a list


def test_no_number_of_a_client_makes_a_call_endless(stack):
    upstream = Recorder()
    house = start(stack, upstream, UPSTREAM__FIRST_BYTE_TIMEOUT_S="0.05", RETRY__ATTEMPTS_MAX="1")
    upstream.go_on.clear()
    body = BODY.replace(b'"max_tokens":5', b'"max_tokens":999999999999999999')
    (answer,) = talk(house.url, post(house.key, body), count=1, within_s=12)
    assert answer.status == 504
    upstream.close()


def test_many_keys_wrong_from_one_address_are_told_to_wait(stack):
    upstream = Recorder()
    house = start(stack, upstream, SERVER__BAD_KEYS_PER_MIN="3")
    statuses = [talk(house.url, post("hg_" + "z" * 52), count=1)[0].status for _ in range(6)]
    assert statuses[-1] == 429
    assert statuses.count(401) <= 3
    house.healthy()
    upstream.close()


def test_a_client_that_leaves_in_a_crowd_of_pipelined_requests_costs_the_first_few_calls_only(house):
    """While its requests queue up it is not read, so its leaving is seen by the first write that fails."""
    house.upstream.go_on.clear()
    before = _gauge(house, "client_connections")
    with connect(house.url) as sock:
        sock.sendall(post(house.key) * 60)
        until(lambda: house.upstream.heard, what="the first call")
    house.upstream.go_on.set()
    until(lambda: _gauge(house, "client_connections") <= before, what="its connection to be gone")
    assert len(house.upstream.heard) <= 4, "requests of a client that had left were sent and paid"


def test_clients_that_left_hold_nothing(house):
    before = _gauge(house, "client_connections")
    socks = [connect(house.url) for _ in range(100)]
    for number, sock in enumerate(socks):
        sock.sendall([post(house.key), post(house.key)[:-1], b"GET", post("bad"), post(house.key) * 20][number % 5])
    for sock in socks:
        sock.close()
    until(lambda: _gauge(house, "client_connections") <= before, what="the connections to be gone")
    until(lambda: _gauge(house, "calls_open") == 0, what="their calls to have ended")


def _gauge(house: House, name: str) -> float:
    with urllib.request.urlopen(house.gateway.operator_url + "/metrics", timeout=10) as found:
        for line in found.read().decode().splitlines():
            if line.startswith(f"headgate_{name} "):
                return float(line.split()[1])
    raise AssertionError(name)


OPENING = b'{"model":"claude-sonnet-4-6","max_tokens":5,"messages":[],'
NASTY = {
    "keys": OPENING + b",".join(b'"%x":1' % number for number in range(2_500_000)) + b"}",
    "keys below": OPENING + b'"metadata":{' + b",".join(b'"%x":1' % number for number in range(2_500_000)) + b"}}",
    "spaces": OPENING + b" " * 30_000_000 + b'"x":1}',
    "brackets in strings": OPENING + b'"x":[' + b'"[",' * 7_000_000 + b'""]}',
    "marks": OPENING + b'"x":[' + b'{"cache_control":1},' * 1_400_000 + b"1]}",
    "quotes": OPENING + b'"x":"' + b'\\"[' * 9_000_000 + b'"}',
}


@pytest.mark.parametrize("shape", NASTY)
def test_a_body_in_a_nasty_shape_does_not_stop_the_others(house, shape):
    """One key, one request of 30 MB, and every stream stood still for seconds while it was looked through."""
    before = resident_bytes(house.pid)
    forget_peak(house.pid)
    longest_s = 0.0
    with ThreadPoolExecutor(1) as pool, connect(house.url) as sock:
        nasty = pool.submit(talk, house.url, post(house.key, NASTY[shape]), count=1, within_s=30)
        while not nasty.done():
            at = time.monotonic()
            sock.sendall(post(house.key))
            assert answers(read(sock, count=1))[0].status == 200
            longest_s = max(longest_s, time.monotonic() - at)
        (answer,) = nasty.result()
    assert answer.status in (200, 400, 413)
    assert longest_s < 1.0
    assert resident_bytes(house.pid, "VmHWM") - before < 256 << 20


@pytest.mark.parametrize("shape", ["many", "keys"])
def test_a_batch_in_a_nasty_shape_does_not_stop_the_others(house, shape):
    batch = {
        "many": b'{"requests":[' + b'{"custom_id":"a","params":{}},' * 900_000 + b'{"params":{}}]}',
        "keys": b'{"requests":[{"params":{},' + NASTY["keys"][len(OPENING) :] + b"]}",
    }[shape]
    key = house.gateway.key("batcher", "--scope", "batch", "--models", "claude-haiku-4-5")
    longest_s = 0.0
    with ThreadPoolExecutor(1) as pool, connect(house.url) as sock:
        nasty = pool.submit(talk, house.url, post(key, batch, path=b"/v1/messages/batches"), count=1, within_s=30)
        while not nasty.done():
            at = time.monotonic()
            sock.sendall(post(house.key))
            assert answers(read(sock, count=1))[0].status == 200
            longest_s = max(longest_s, time.monotonic() - at)
        (answer,) = nasty.result()
    assert answer.status in (400, 403, 413)
    assert longest_s < 1.0
    assert not any(b"/batches" in heard.head for heard in house.upstream.heard)


# what comes back


def test_an_answer_that_echoes_our_key_does_not_hand_it_on(house):
    """Debugging proxies echo what they were sent; the client's key is no secret from the client, ours is."""
    echoes = (b"x-api-key", b"authorization", b"proxy-authorization", b"x-headgate-hop")

    def echoing(status: bytes) -> bytes:
        return response(MESSAGE, *[b"%b: %b" % (name, UPSTREAM_KEY.encode()) for name in echoes], status=status)

    for status in (b"200 OK", b"400 Bad Request", b"529 Busy"):
        house.upstream.answer = lambda heard, status=status: echoing(status)
        for path in (b"/v1/messages", b"/v1/messages/count_tokens"):
            with connect(house.url) as sock:
                sock.sendall(post(house.key, path=path))
                assert UPSTREAM_KEY.encode() not in read(sock, count=1)


def test_what_upstream_names_as_its_hops_own_stays_there(house):
    house.upstream.answer = lambda heard: response(MESSAGE, b"connection: x-hop, keep-alive", b"x-hop: 1", b"x-far: 2")
    answer = house.healthy()
    assert (answer.header("x-hop"), answer.header("x-far")) == ("", "2")


@pytest.mark.parametrize("status", [b"999 Odd", b"600 Odd", b"204 No Content", b"304 Not Modified", b"302 Found"])
def test_a_status_that_is_no_answer_to_a_message_is_ours_to_tell(house, status):
    house.upstream.answer = lambda heard: response(b"", status=status)
    (answer,) = talk(house.url, post(house.key), count=1)
    assert answer.status == 502
    assert json.loads(answer.body)["error"]["type"] == "api_error"


def test_an_errors_name_is_not_hoarded_in_the_log(house):
    name = "n" * 100_000
    error = {"type": "error", "error": {"type": name, "message": "no", "details": {"error_code": name}}}
    house.upstream.answer = lambda heard: response(json.dumps(error).encode(), status=b"400 Bad Request")
    before = house.gateway.process.log.stat().st_size
    (answer,) = talk(house.url, post(house.key), count=1)
    assert json.loads(answer.body) == error
    mark = answer.header("x-headgate-call").encode()
    until(lambda: mark in house.gateway.process.log.read_bytes()[before:], what="the log line")
    written = house.gateway.process.log.read_bytes()[before:]
    assert max(len(line) for line in written.split(b"\n")) < 4096


@pytest.mark.parametrize("event", [b"event: unknown\ndata: {}\n\n", b": comment\n\n", b"event: ping\ndata: {}\n\n"])
def test_a_stream_that_does_not_begin_is_not_hoarded(house, event):
    chunk = b"%x\r\n%b\r\n" % (3000 * len(event), event * 3000)
    count = 40 if b"ping" in event else 400  # pings are passed on, each by itself
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    house.upstream.answer = lambda heard: head + chunk * count + b"0\r\n\r\n"
    before = resident_bytes(house.pid)
    forget_peak(house.pid)
    with connect(house.url) as sock:
        sock.sendall(post(house.key, BODY[:-1] + b',"stream":true}'))
        data = bytearray()
        sock.settimeout(20)
        while not data.endswith(b"0\r\n\r\n") and b" 502 " not in data[:20]:
            piece = sock.recv(1 << 20)
            assert piece, "the connection ended without a word"
            data += piece
    assert resident_bytes(house.pid, "VmHWM") - before < 48 << 20
    assert data.startswith(b"HTTP/1.1 502 ") or b"event: error\n" in data[-1000:]
