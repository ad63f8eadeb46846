"""The server over raw sockets: framing, order of checks, records, leaving clients, faults and control."""

import base64
import gzip
import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

HEADERS = {"x-api-key": "k", "anthropic-version": "2023-06-01", "content-type": "application/json"}


def body(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "claude-sonnet-4-6", "max_tokens": 2_000, "messages": [{"role": "user", "content": text}]} | more


def post(
    running: Any, payload: bytes | dict[str, Any], path: str = "/v1/messages", headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """One request on a connection of its own."""
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)) as connection:
        connection.request("POST", path, raw, HEADERS if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def wire(payload: dict[str, Any]) -> bytes:
    raw = json.dumps(payload).encode()
    lines = [f"{name}: {value}" for name, value in HEADERS.items()]
    head = "\r\n".join(["POST /v1/messages HTTP/1.1", "host: x", *lines, f"content-length: {len(raw)}"])
    return head.encode() + b"\r\n\r\n" + raw


def received(client: socket.socket) -> bytes:
    """Everything until the other side closes or resets."""
    found = b""
    try:
        while piece := client.recv(65_536):
            found += piece
    except ConnectionResetError:
        found += b"<reset>"
    return found


def opened(running: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=10)


def status_and_type(answer: tuple[int, Any, bytes]) -> tuple[int, str]:
    value = json.loads(answer[2])
    assert value["request_id"] == answer[1]["request-id"]
    return answer[0], value["error"]["type"]


# ---- order of checks


def test_checks_come_in_the_order_of_the_api(start: Callable[..., Any]) -> None:
    running = start(api_keys=("good",), rpm=1)
    key = HEADERS | {"x-api-key": "good"}
    bad: dict[str, Any] = {"model": "claude-nobody", "temperature": 9}

    def ask(payload: Any, headers: dict[str, str]) -> tuple[int, str]:
        return status_and_type(post(running, payload, headers=headers))

    assert ask(bad, {"x-api-key": "bad"}) == (400, "invalid_request_error")
    assert ask(bad, HEADERS) == (401, "authentication_error")
    assert ask(bad, key | {"anthropic-beta": "nonsense"}) == (404, "not_found_error")
    known = bad | {"model": "claude-sonnet-4-6"}
    refused = post(running, known, headers=key | {"anthropic-beta": "nonsense"})
    assert b"anthropic-beta" in refused[2]
    assert ask(known, key) == (400, "invalid_request_error")
    assert post(running, body(), headers=key)[0] == 200
    assert ask(known, key) == (400, "invalid_request_error"), "a wrong request costs no rate"
    limited = post(running, body("[[sim: error=500]]"), headers=key)
    assert status_and_type(limited) == (429, "rate_limit_error"), "limits come before faults"
    assert int(limited[1]["retry-after"]) >= 1
    assert limited[1]["anthropic-ratelimit-requests-remaining"] == "0"


def test_both_forms_of_a_key_are_good_and_place_it_in_its_workspace(start: Callable[..., Any]) -> None:
    running = start(api_keys=("a=org-a/ws-a", "b"))
    version = {"anthropic-version": "2026-10-21"}
    for headers in ({"x-api-key": "a"}, {"authorization": "Bearer a"}, {"x-api-key": "a", "authorization": "Bearer z"}):
        status, answered, _ = post(running, body(), headers=version | headers)
        assert (status, answered["anthropic-organization-id"], answered["anthropic-workspace-id"]) == (
            200,
            "org-a",
            "ws-a",
        )
    assert post(running, body(), headers=version | {"authorization": "Bearer z"})[0] == 401


def test_a_body_beyond_32_mb_is_413_also_after_decoding(start: Callable[..., Any]) -> None:
    running = start()
    assert status_and_type(post(running, b" " * (32 * 2**20 + 1))) == (413, "request_too_large")
    bomb = gzip.compress(b" " * (33 * 2**20))
    packed = post(running, bomb, headers=HEADERS | {"content-encoding": "gzip"})
    assert (packed[0], json.loads(packed[2])["error"]["details"]) == (
        413,
        {"error_code": "request_body_too_large_after_decoding"},
    )
    edge = post(start(edge_413=True), b" " * (32 * 2**20 + 1))
    assert (edge[0], edge[1]["content-type"]) == (413, "text/html; charset=UTF-8")


def test_a_packed_body_is_read_and_recorded_as_it_came(simulator: Any) -> None:
    packed = gzip.compress(json.dumps(body()).encode())
    assert post(simulator, packed, headers=HEADERS | {"content-encoding": "gzip"})[0] == 200
    assert post(simulator, b"no gzip", headers=HEADERS | {"content-encoding": "gzip"})[0] == 400
    assert post(simulator, packed, headers=HEADERS | {"content-encoding": "br"})[0] == 400
    connection = http.client.HTTPConnection("127.0.0.1", simulator.port, timeout=10)
    connection.request("GET", "/sim/requests/1/body")
    assert connection.getresponse().read() == packed
    connection.close()


# ---- HTTP


def test_what_is_pipelined_is_answered_in_order_however_slow_the_first_is(start: Callable[..., Any]) -> None:
    with opened(start(speed=1.0, otps=10_000.0)) as client:
        for n, ttft_ms in enumerate((200, 50, 0)):
            client.sendall(wire(body(f'[[sim: text="answer {n}" ttft_ms={ttft_ms}]]')))
        found = b""
        while found.count(b"stop_reason") < 3:
            found += client.recv(65_536)
    assert [found.index(f"answer {n}".encode()) for n in range(3)] == sorted(
        found.index(f"answer {n}".encode()) for n in range(3)
    )


def test_a_chunked_body_after_100_continue_is_read(simulator: Any) -> None:
    raw = json.dumps(body()).encode()
    head = wire(body()).split(b"\r\n\r\n")[0].split(b"\r\ncontent-length")[0]
    with opened(simulator) as client:
        client.sendall(head + b"\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        for piece in (raw[:10], raw[10:]):
            client.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        client.sendall(b"0\r\n\r\n")
        assert received(client).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "junk", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, b"\x16\x03\x01\x02\x00"]
)
def test_what_is_not_http_is_closed_and_others_are_served(simulator: Any, junk: bytes) -> None:
    with opened(simulator) as client:
        client.sendall(junk)
        assert received(client).removesuffix(b"<reset>") in (
            b"",
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        )
    assert post(simulator, body())[0] == 200


def test_a_slow_head_is_closed_at_its_deadline(start: Callable[..., Any]) -> None:
    with opened(start(header_timeout_s=0.1)) as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: ")
        client.sendall(b"x\r\nx-more: ")
        assert received(client) == b""


def test_warmers_get_an_empty_200_and_unknown_paths_a_404(simulator: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", simulator.port, timeout=10)
    for method, path, status in (
        ("HEAD", "/", 200),
        ("HEAD", "/api/hello", 200),
        ("GET", "/v1/messages", 405),
        ("POST", "/v1/complete", 404),
        ("GET", "/sim/nothing", 404),
        ("POST", "/v1/messages?beta=true", 400),
    ):
        connection.request(method, path)
        answer = connection.getresponse()
        answer.read()
        assert (method, path, answer.status) == (method, path, status)
    connection.close()


# ---- records


def test_a_request_is_recorded_to_the_byte(simulator: Any) -> None:
    raw = b'{ "model":"claude-sonnet-4-6",\n"max_tokens":5.0e0, "messages":[] }'
    post(simulator, raw, "/v1/messages?beta=true", HEADERS | {"X-Custom": "Ünïcode".encode().decode("latin-1")})
    record = simulator.get("/sim/requests")["requests"][0]
    assert (record["method"], record["path"], record["query"]) == ("POST", "/v1/messages", "beta=true")
    assert ["X-Custom", "Ünïcode".encode().decode("latin-1")] in record["headers"]
    assert record["body_base64"] == base64.b64encode(raw).decode()
    assert (record["status"], record["end"], record["cost_nanousd"]) == (400, "error", 0)


def test_records_are_bounded_in_number_and_in_bytes(start: Callable[..., Any]) -> None:
    running = start(records_max=3, record_bytes_max=2_500)
    for n in range(5):
        post(running, body("x" * 800 + str(n)))
    shown = running.get("/sim/requests")
    assert [record["number"] for record in shown["requests"]] == [3, 4, 5]
    assert [record["body_kept"] for record in shown["requests"]] == [False, True, True]
    assert shown["count"] == 5
    assert [record["number"] for record in running.get("/sim/requests?since=3&limit=1")["requests"]] == [4]


def test_reset_forgets_everything_and_takes_a_new_seed(simulator: Any) -> None:
    def ask() -> str:
        value: str = json.loads(post(simulator, body())[2])["content"][0]["text"]
        return value

    first, again = ask(), ask()
    assert first == again
    simulator.order("/sim/faults", {"kind": "500"})
    assert simulator.order("/sim/reset", {"seed": 77}) == {"seed": 77}
    assert simulator.get("/sim/requests")["count"] == 0
    assert simulator.get("/sim/bill")["total"]["cost_nanousd"] == 0
    assert ask() != first
    simulator.order("/sim/reset", {})
    assert ask() == first


def test_reset_forgets_caches_and_batches(simulator: Any) -> None:
    system = [{"type": "text", "text": "rule " * 2_000, "cache_control": {"type": "ephemeral"}}]
    post(simulator, body(system=system))
    batch = {"requests": [{"custom_id": "a", "params": body()}]}
    assert post(simulator, batch, "/v1/messages/batches")[0] == 200
    simulator.order("/sim/reset", {})
    assert simulator.get("/sim/cache")["entries"] == []
    connection = http.client.HTTPConnection("127.0.0.1", simulator.port, timeout=10)
    connection.request("GET", "/v1/messages/batches", headers=HEADERS)
    assert json.load(connection.getresponse())["data"] == []
    connection.close()


def test_the_bill_matches_the_usage_that_was_answered(simulator: Any) -> None:
    total = 0
    for n in range(4):
        usage = json.loads(post(simulator, body(f"number {n}"))[2])["usage"]
        total += usage["input_tokens"] * 3_000 + usage["output_tokens"] * 15_000
    bill = simulator.get("/sim/bill")
    assert bill["total"]["cost_nanousd"] == total
    assert sum(line["cost_nanousd"] for line in bill["requests"]) == total


def test_the_spend_cap_ends_the_month_without_retry_after(start: Callable[..., Any]) -> None:
    running = start(spend_cap_usd=0.000001)
    assert post(running, body())[0] == 200
    capped = post(running, body())
    assert (capped[0], capped[1]["retry-after"]) == (429, None)
    assert json.loads(capped[2])["error"]["details"]["error_code"] == "enforced_spend_limit_reached"


# ---- time


def test_cold_prefixes_of_a_burst_are_all_written_and_the_first_byte_ends_that(start: Callable[..., Any]) -> None:
    running = start(speed=1.0, ttft_s=0.3, otps=10_000.0)
    system = [{"type": "text", "text": "rule " * 2_000, "cache_control": {"type": "ephemeral"}}]
    clients = [opened(running) for _ in range(5)]
    for n, client in enumerate(clients):
        client.sendall(wire(body(f"user {n}", system=system, max_tokens=5)))
    for client in clients:
        assert client.recv(65_536).startswith(b"HTTP/1.1 200")
        client.close()
    assert running.get("/sim/cache")["cold_writes"] == 5
    assert (
        json.loads(post(running, body("late", system=system, max_tokens=5))[2])["usage"]["cache_read_input_tokens"] > 0
    )
    assert running.get("/sim/cache")["cold_writes"] == 5


def test_cached_tokens_bring_the_first_byte_sooner(start: Callable[..., Any]) -> None:
    running = start(speed=4.0, otps=100_000.0)
    system = [{"type": "text", "text": "rule " * 60_000, "cache_control": {"type": "ephemeral"}}]
    for _ in range(2):
        post(running, body(system=system, max_tokens=5, stream=True))
    cold, warm = running.get("/sim/requests?body=0")["requests"]
    assert cold["head_s"] - cold["received_s"] > 2 * (warm["head_s"] - warm["received_s"])


def test_a_stream_that_is_left_stops_and_is_billed_for_what_was_produced(start: Callable[..., Any]) -> None:
    running = start(speed=1.0, ttft_s=0.0)
    client = opened(running)
    client.sendall(wire(body("[[sim: tokens=1500]]", stream=True)))
    found = b""
    while found.count(b"text_delta") < 5:
        found += client.recv(65_536)
    left_s = time.monotonic()
    client.close()
    running.until("/sim/streams", lambda streams: streams["count"] == 0)
    record = running.get("/sim/requests")["requests"][0]
    assert record["end"] == "client_left"
    assert abs(record["client_closed_s"] - left_s) < 0.25
    assert 3 <= record["usage"]["output_tokens"] == record["output_tokens"] < 500
    line = running.get("/sim/bill")["requests"][0]
    assert line["complete"] is False
    assert line["cost_nanousd"] == record["usage"]["input_tokens"] * 3_000 + record["output_tokens"] * 15_000


def test_a_stream_left_before_its_first_byte_is_billed_for_its_prompt(start: Callable[..., Any]) -> None:
    running = start(speed=1.0, ttft_s=30.0)
    client = opened(running)
    client.sendall(wire(body(stream=True)))
    running.until("/sim/streams", lambda streams: streams["count"] == 1)
    client.close()
    running.until("/sim/streams", lambda streams: streams["count"] == 0)
    record = running.get("/sim/requests")["requests"][0]
    assert (record["end"], record["head_s"], record["usage"]["output_tokens"]) == ("client_left", None, 0)
    assert record["cost_nanousd"] == record["usage"]["input_tokens"] * 3_000 > 0


def test_an_answer_that_is_not_streamed_is_produced_and_billed_though_nobody_waits(start: Callable[..., Any]) -> None:
    running = start(speed=1.0, ttft_s=0.0, otps=200.0)
    client = opened(running)
    client.sendall(wire(body("[[sim: tokens=100]]")))
    running.until("/sim/streams", lambda streams: streams["count"] == 1)
    client.close()
    running.until("/sim/streams", lambda streams: streams["count"] == 0)
    record = running.get("/sim/requests")["requests"][0]
    assert record["usage"]["output_tokens"] == 100
    assert record["client_closed_s"] < record["ended_s"]
    assert record["ended_s"] - record["received_s"] >= 0.5


def test_events_come_at_the_pace_of_the_model(start: Callable[..., Any]) -> None:
    running = start(speed=1.0, ttft_s=0.1, otps=200.0)
    post(running, body("[[sim: tokens=100]]", stream=True))
    record = running.get("/sim/requests?body=0")["requests"][0]
    assert record["head_s"] - record["received_s"] >= 0.1
    assert record["ended_s"] - record["head_s"] >= 0.4


def test_silence_is_filled_with_pings(start: Callable[..., Any]) -> None:
    running = start(speed=1.0, ttft_s=0.0, otps=100.0)
    payload = body("[[sim: thinking=450 tokens=5 ping_ms=250]]", stream=True, model="claude-opus-5", max_tokens=9_000)
    assert post(running, payload)[2].count(b"event: ping") >= 5


def test_a_client_that_does_not_read_is_waited_for_and_gets_all(simulator: Any) -> None:
    with opened(simulator) as client:
        client.sendall(wire(body("[[sim: tokens=90000]]", stream=True, max_tokens=100_000)))
        open_now = simulator.until("/sim/streams", lambda streams: streams["count"] == 1)
        assert open_now["streams"][0]["output_tokens"] < 90_000
        found = b""
        while not found.endswith(b"0\r\n\r\n"):
            found += client.recv(1_048_576)
    assert found.count(b"message_stop") == 2
    assert simulator.get("/sim/bill")["total"]["output_tokens"] == 90_000


# ---- faults


def raw_answer(running: Any, text: str = "Hello", *, stream: bool = True) -> bytes:
    with opened(running) as client:
        client.sendall(wire(body(text, stream=stream)).replace(b"host: x", b"host: x\r\nconnection: close"))
        return received(client)


def test_resets_are_resets_and_a_truncated_body_ends_cleanly(simulator: Any) -> None:
    assert raw_answer(simulator, "[[sim: error=reset]]") == b"<reset>"
    after = raw_answer(simulator, "[[sim: error=reset-after-headers]]")
    assert b"\r\n\r\n" not in after.removesuffix(b"<reset>").rstrip(b"\r\n")[:-4]
    assert after.endswith(b"<reset>")
    assert raw_answer(simulator, "[[sim: error=truncate]]").endswith(b"0\r\n\r\n")
    cut = raw_answer(simulator, "[[sim: error=cut at=300]]")
    assert not cut.endswith(b"0\r\n\r\n")
    short = raw_answer(simulator, "[[sim: error=truncate]]", stream=False)
    head, _, rest = short.partition(b"\r\n\r\n")
    assert len(rest) < int(head.partition(b"content-length: ")[2].split()[0])


def test_what_a_fault_costs(simulator: Any) -> None:
    for kind in ("529", "reset", "error-first", "reset-after-headers"):
        raw_answer(simulator, f"[[sim: error={kind}]]")
    assert simulator.get("/sim/bill")["total"]["cost_nanousd"] == 0
    raw_answer(simulator, "[[sim: error=error-mid at=10 tokens=100]]")
    assert 0 < simulator.get("/sim/bill")["total"]["output_tokens"] < 100
    ends = [(r["fault"], r["end"]) for r in simulator.get("/sim/requests")["requests"]]
    assert ends == [
        ("529", "fault"),
        ("reset", "fault"),
        ("error-first", "fault"),
        ("reset-after-headers", "fault"),
        ("error-mid", "fault"),
    ]


def test_a_script_fails_three_times_and_then_answers(simulator: Any) -> None:
    simulator.order("/sim/faults", {"kind": "529", "model": "claude-sonnet-4-6", "count": 3})
    assert [post(simulator, body())[0] for _ in range(4)] == [529, 529, 529, 200]
    simulator.order("/sim/faults", {"outage": {"kind": "503", "model": "claude-haiku-4-5"}})
    assert post(simulator, body(model="claude-haiku-4-5"))[0] == 503
    assert post(simulator, body(model="claude-haiku-4-5-20251001"))[0] == 503
    assert post(simulator, body())[0] == 200
    simulator.order("/sim/faults", {}, "DELETE")
    assert post(simulator, body(model="claude-haiku-4-5"))[0] == 200


def test_a_failed_request_gives_its_input_tokens_back(start: Callable[..., Any]) -> None:
    running = start(itpm=1_000)
    for _ in range(5):
        assert post(running, body("word " * 700 + "[[sim: error=529]]"))[0] == 529


def test_the_port_can_be_closed_for_a_while(simulator: Any) -> None:
    simulator.order("/sim/faults", {"kind": "refuse", "for_s": 0.3})
    end = time.monotonic() + 10.0
    refused = 0
    while True:
        try:
            assert post(simulator, body())[0] == 200
        except OSError:
            refused += 1
        else:
            if refused:
                break
        assert time.monotonic() < end
    assert refused


def test_a_slow_head_and_a_late_504_take_their_time(simulator: Any) -> None:
    begun_s = time.monotonic()
    assert post(simulator, body("[[sim: error=slow-headers for=0.001]]"))[0] == 200
    assert time.monotonic() - begun_s > 0.2
    begun_s = time.monotonic()
    assert post(simulator, body("[[sim: error=504 for=0.2]]"))[0] == 504
    assert time.monotonic() - begun_s >= 0.2


def test_a_wrong_order_is_a_400_with_its_reason(simulator: Any) -> None:
    for path, order in (
        ("/sim/faults", {"kind": "nonsense"}),
        ("/sim/faults", {"kindly": "529"}),
        ("/sim/reset", {"seed": "x"}),
        ("/sim/requests/x", {}),
    ):
        status, _, answered = post(simulator, order, path)
        assert (path, status) == (path, 404 if path.endswith("/x") else 400)
        assert json.loads(answered)["error"]["message"]


# ---- the program


def test_the_program_says_where_it_listens_serves_and_stops_on_sigterm() -> None:
    command = [sys.executable, "-m", "headgate.simulator", "--port", "0", "--speed", "0", "--tier", "none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        assert line.startswith("simulator listening on http://127.0.0.1:")
        connection = http.client.HTTPConnection(line.rsplit("//", 1)[1].strip(), timeout=10)
        connection.request("POST", "/v1/messages", json.dumps(body()), HEADERS)
        assert connection.getresponse().status == 200
        connection.close()
        program.terminate()
        assert program.wait(10) == 0


def test_it_serves_tls(start: Callable[..., Any], tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost "
            f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
        ).split(),
        check=True,
        capture_output=True,
    )
    running = start(tls_certificate=certificate, tls_key=key)
    assert running.url.startswith("https://")
    trust = ssl.create_default_context(cafile=certificate)
    connection = http.client.HTTPSConnection("127.0.0.1", running.port, timeout=10, context=trust)
    connection.request("POST", "/v1/messages", json.dumps(body(stream=True)), HEADERS)
    assert b"message_stop" in connection.getresponse().read()
    connection.close()
