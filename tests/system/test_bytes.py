"""What passes through the gateway is what was sent, in both directions, to the byte."""

from __future__ import annotations

import base64
import gzip
import json
import zlib

import pytest
from tests.system.conftest import UPSTREAM_KEY, get_json, until
from tests.system.generated_bodies import bodies
from tests.system.raw_http import Response, ask, request, send
from tests.system.scripted import Act, ScriptedUpstream, chunks

BODIES = 10_000
VERSION = (b"anthropic-version", b"2023-06-01")
MESSAGES = "/v1/messages"


@pytest.fixture(scope="module")
def simulator(shared_stack):
    """One that takes fields it does not know, and limits nothing."""
    return shared_stack.simulator("--tier", "none", "--lenient", "--answer-tokens", "4", "--batch-clock", "2000")


@pytest.fixture(scope="module")
def gateway(shared_stack, simulator):
    """In front of it."""
    return shared_stack.gateway(simulator.url, RETRY__BASE_DELAY_S="0.01", LOG__CALLS="false")


@pytest.fixture(scope="module")
def key(gateway):
    """May send messages and batches, and names users."""
    return gateway.key("bytes", "--scope", "messages", "--scope", "batch", "--scope", "app").encode()


@pytest.fixture(scope="module")
def scripted():
    """An upstream that answers exactly what a test wrote."""
    upstream = ScriptedUpstream()
    yield upstream
    upstream.close()


@pytest.fixture(scope="module")
def scripted_gateway(shared_stack, scripted):
    """In front of that."""
    return shared_stack.gateway(scripted.url, RETRY__BASE_DELAY_S="0.01")


@pytest.fixture(scope="module")
def scripted_key(scripted_gateway):
    """Its key."""
    return scripted_gateway.key("scripted").encode()


@pytest.fixture
def arrived(simulator):
    """The simulator, forgetful of all before; gives what it received since."""
    simulator.reset()
    return simulator.requests


def sent(record: dict) -> bytes:
    """The body that a record of the simulator's holds."""
    assert record["body_kept"]
    return base64.b64decode(record["body_base64"])


def names(record: dict) -> list[str]:
    return [name.lower() for name, _ in record["headers"]]


def values(record: dict, name: str) -> list[str]:
    return [value for key, value in record["headers"] if key.lower() == name]


# requests


def test_ten_thousand_generated_bodies_arrive_to_the_byte_streamed_and_not(simulator, gateway, key):
    simulator.reset()
    generated = list(bodies(BODIES, seed=20261122))
    responses = send(
        gateway.url,
        *(
            request("POST", MESSAGES, [VERSION, (b"x-api-key", key), (b"anthropic-number", b"%d" % number)], body)
            for number, (body, _) in enumerate(generated)
        ),
        connections=8,
        window=8,
    )
    refused = [(number, one.status, one.body[:300]) for number, one in enumerate(responses) if one.status != 200]
    assert not refused, refused[:3]
    kinds = [one.header(b"content-type").partition(b";")[0] == b"text/event-stream" for one in responses]
    assert kinds == [streamed for _, streamed in generated]
    seen = set()
    for since in range(0, BODIES, 1000):
        for record in get_json(f"{simulator.url}/sim/requests?since={since}&limit=1000")["requests"]:
            number = int(values(record, "anthropic-number")[0])
            assert sent(record) == generated[number][0], number
            assert values(record, "x-api-key") == [UPSTREAM_KEY]
            assert record["streamed"] is generated[number][1]
            seen.add(number)
    assert seen == set(range(BODIES))


ODD_BODIES = [
    b'{"model":"claude-haiku-4-5","max_tokens":1e0,"messages":[]}',
    b'{"messages":[{"role":"user","content":"x"}],"max_tokens":00001,"model":"claude-haiku-4-5"}'.replace(b"0000", b""),
    b'\r\n\t {"model" : "claude-haiku-4-5"}\r\n\r\n',
    b'{"model":"claude-haiku-4-5","a":1e400,"b":-1E+400,"c":0.000000000000000000000000000000000000001}',
    b'{"model":"claude-haiku-4-5","x":{"a":1,"a":2,"\\u0061":3}}',
    b'{"model":"claude-haiku-4-5","\\u0000":"\\u0000","":""}',
    b'{"model":"\\u0063laude-haiku-4-5"}',
    b'{"model":"claude-haiku-4-5","x":"' + b"\\" * 2000 + b'"}',
    b'{"model":"claude-haiku-4-5","x":' + b"[" * 190 + b"]" * 190 + b"}",
    b'{"model":"claude-haiku-4-5","x":"' + "🇻🇳".encode() * 50_000 + b'"}',
    b'{"model":"claude-haiku-4-5","stream":false,"x":"\\"stream\\":true"}',
]


@pytest.mark.parametrize("body", ODD_BODIES, ids=range(len(ODD_BODIES)))
def test_a_body_that_anthropic_may_judge_arrives_as_it_is(gateway, key, arrived, body):
    ask(gateway.url, "POST", MESSAGES, {"x-api-key": key.decode(), "anthropic-version": "2023-06-01"}, body)
    (record,) = arrived()
    assert sent(record) == body


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", "/v1/messages/count_tokens", b'{ "model" : "claude-haiku-4-5", "messages":[], "n": 1.0e+0 }'),
        ("POST", "/v1/messages/batches", b'{"requests":[ {"custom_id":"a","params":{"x":1.50}} ], "y":"\\u0041"}'),
        ("POST", "/v1/messages/batches", b"not JSON at all \xff\xfe\x00"),
        ("POST", "/v1/messages/count_tokens", b""),
        ("GET", "/v1/models", b""),
    ],
)
def test_what_is_no_message_arrives_to_the_byte_too(gateway, key, arrived, method, target, body):
    ask(gateway.url, method, target, {"x-api-key": key.decode(), "anthropic-version": "2023-06-01"}, body)
    (record,) = arrived()
    assert (record["method"], record["path"], sent(record)) == (method, target, body)
    assert values(record, "x-api-key") == [UPSTREAM_KEY]


BODY = (
    b'{"model": "claude-haiku-4-5", "max_tokens": 2, "messages": [{"role":"user","content":"\\u0058in ch\xc3\xa0o"}]}'
)


@pytest.mark.parametrize("target", [MESSAGES, "/v1/messages/count_tokens", "/v1/messages/batches"])
@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress)],
)
def test_a_compressed_body_arrives_decoded_and_says_nothing_of_its_encoding(
    gateway, key, arrived, target, encoding, encode
):
    headers = {"x-api-key": key.decode(), "anthropic-version": "2023-06-01", "content-encoding": encoding}
    ask(gateway.url, "POST", target, headers, encode(BODY))
    (record,) = arrived()
    assert sent(record) == BODY
    assert "content-encoding" not in names(record)
    assert values(record, "content-length") == [str(len(BODY))]


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_a_chunked_body_arrives_whole(gateway, key, arrived, piece):
    pieces = [BODY[at : at + piece] for at in range(0, len(BODY), piece)]
    head = b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: %b\r\nanthropic-version: 2023-06-01\r\n" % key
    (response,) = send(gateway.url, head + b"transfer-encoding: chunked\r\n\r\n" + chunks(*pieces) + b"0\r\n\r\n")
    assert response.status == 200
    (record,) = arrived()
    assert sent(record) == BODY
    assert values(record, "content-length") == [str(len(BODY))]


@pytest.mark.parametrize("target", [MESSAGES, "/v1/models", "/v1/messages/batches", "/v1/messages/count_tokens"])
def test_the_query_arrives_as_it_is(gateway, key, arrived, target):
    query = "beta=true&x=%20%c3%A0&&after_id=&lifecycle%5B%5D=active&y=a+b;c"
    method = "GET" if target == "/v1/models" else "POST"
    headers = {"x-api-key": key.decode(), "anthropic-version": "2023-06-01"}
    ask(gateway.url, method, f"{target}?{query}", headers, BODY if method == "POST" else b"")
    (record,) = arrived()
    assert (record["path"], record["query"]) == (target, query)


# request headers

PASSED = [
    (b"anthropic-version", b"2023-06-01"),
    (b"anthropic-beta", b"context-1m-2025-08-07,never-heard-of-2031-01-01"),
    (b"Anthropic-Beta", b"z-second-line, a-third ;q=1"),
    (b"anthropic-workspace-id", b"wrkspc_x"),
    (b"ANTHROPIC-Never-Heard-Of", b'  {"a": "b"}  , \t c'),
    (b"anthropic-bytes", "Hà Nội ✓".encode()),
    (b"anthropic-user-profile-id", b""),
    (b"content-type", b"application/json; charset=utf-8"),
    (b"accept", b"application/json"),
    (b"user-agent", b"Program/1.0 (of a user)"),
    (b"X-Stainless-Retry-Count", b"1"),
    (b"x-stainless-never-heard-of", b"1"),
    (b"x-app", b"cli"),
    (b"x-claude-code-session-id", b"6c1c"),
    (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    (b"tracestate", b"vendor=1"),
]
NEVER = [
    (b"authorization", b"Bearer sk-ant-oat01-of-the-client"),
    (b"cookie", b"session=of-the-client"),
    (b"proxy-authorization", b"Basic b2YtdGhlLWNsaWVudA=="),
    (b"proxy-connection", b"keep-alive"),
    (b"keep-alive", b"timeout=5"),
    (b"te", b"trailers"),
    (b"trailer", b"x-of-the-client"),
    (b"forwarded", b"for=192.0.2.1"),
    (b"x-forwarded-for", b"192.0.2.1"),
    (b"x-forwarded-host", b"elsewhere.test"),
    (b"x-real-ip", b"192.0.2.1"),
    (b"x-headgate-user", b"minh"),
    (b"x-headgate-tier", b"paid"),
    (b"x-headgate-conversation", b"c1"),
    (b"x-headgate-endpoint", b"chat"),
    (b"x-headgate-deadline-s", b"5"),
    (b"X-Headgate-Hop", b"of-the-client"),
    (b"x-headgate-never-heard-of", b"1"),
    (b"x-sim", b"tokens=9"),
    (b"accept-encoding", b"gzip, br"),
    (b"origin", b"https://elsewhere.test"),
    (b"referer", b"https://elsewhere.test/"),
    (b"x-never-heard-of", b"1"),
]
ROUTES = [
    ("POST", MESSAGES, BODY),
    ("POST", MESSAGES, BODY[:-1] + b',"stream":true}'),
    ("POST", "/v1/messages/count_tokens", BODY),
    ("POST", "/v1/messages/batches", b"{}"),
    ("GET", "/v1/messages/batches", b""),
    ("GET", "/v1/messages/batches/msgbatch_1", b""),
    ("GET", "/v1/messages/batches/msgbatch_1/results", b""),
    ("POST", "/v1/messages/batches/msgbatch_1/cancel", b""),
    ("DELETE", "/v1/messages/batches/msgbatch_1", b""),
    ("GET", "/v1/models", b""),
    ("GET", "/v1/models/claude-haiku-4-5", b""),
]


@pytest.mark.parametrize(("method", "target", "body"), ROUTES)
def test_headers_of_anthropics_pass_in_their_order_and_nothing_else_of_the_clients_does(
    gateway, key, arrived, method, target, body
):
    mixed = [pair for pairs in zip(PASSED, NEVER[: len(PASSED)], strict=True) for pair in pairs] + NEVER[len(PASSED) :]
    send(gateway.url, request(method, target, [*mixed, (b"x-api-key", key)], body))
    (record,) = arrived()
    received = [(name.encode(), value.encode("latin-1")) for name, value in record["headers"]]
    ours = {b"host", b"content-length", b"accept-encoding", b"x-api-key", b"x-headgate-hop"}
    passed = [(name.lower(), value) for name, value in received if name.lower() not in ours]
    # A field's value has no spaces around it (RFC 9110 §5.5).
    assert passed == [(name.lower(), value.strip()) for name, value in PASSED]
    (host,), (encoding,) = values(record, "host"), values(record, "accept-encoding")
    assert f"http://{host}" == gateway.environment["HEADGATE_UPSTREAM_URL"]
    assert encoding == "identity"
    assert values(record, "x-api-key") == [UPSTREAM_KEY]
    assert "of-the-client" not in str(record["headers"])
    assert key.decode() not in str(record["headers"])


def test_what_a_client_calls_hop_by_hop_ends_at_the_gateway(gateway, key, arrived):
    headers = [VERSION, (b"connection", b"Anthropic-One, x-stainless-two"), (b"anthropic-one", b"1")]
    headers += [(b"x-stainless-two", b"2"), (b"anthropic-three", b"3"), (b"x-api-key", key)]
    send(gateway.url, request("POST", MESSAGES, headers, BODY))
    (record,) = arrived()
    assert "anthropic-one" not in names(record)
    assert "x-stainless-two" not in names(record)
    assert "connection" not in names(record)
    assert values(record, "anthropic-three") == ["3"]


@pytest.mark.parametrize(
    "credentials",
    [
        [("x-api-key", "{key}")],
        [("x-api-key", "  {key} ")],
        [("authorization", "Bearer {key}")],
        [("authorization", "bearer   {key} ")],
        [("x-api-key", "{key}"), ("authorization", "Bearer sk-ant-of-the-client")],
        [("x-api-key", "sk-ant-of-the-client"), ("authorization", "Bearer {key}")],
        [("X-API-KEY", "{key}"), ("Authorization", "Bearer {key}")],
    ],
    ids=str,
)
def test_whatever_a_client_shows_as_its_key_anthropic_is_shown_ours_once(gateway, key, arrived, credentials):
    headers = [(name, value.format(key=key.decode())) for name, value in credentials]
    (response,) = send(gateway.url, request("POST", MESSAGES, [VERSION, *headers], BODY))
    assert response.status == 200, response.body
    (record,) = arrived()
    assert values(record, "x-api-key") == [UPSTREAM_KEY]
    assert values(record, "authorization") == []
    assert "of-the-client" not in str(record["headers"])


# answers

STREAMS = {
    "text": "tokens=60",
    "one token": "tokens=1",
    "thinking": "thinking=30 tokens=20",
    "tool": 'tool=look_up input="{\\"a\\":1.50}"',
    "refusal": "stop=refusal",
    "refusal in mid-stream": "stop=refusal_mid tokens=40",
    "empty": "stop=empty",
    "text of all kinds": 'text="Xin chào 日本 😀 \u2028 </script> event: error"',
    "unknown event before the first block": "error=unknown-event at=1 tokens=20",
    "unknown event among deltas": "error=unknown-event at=8 tokens=40",
    "unknown event before the end": "error=unknown-event at=9 tokens=10",
    "CRLF": "error=crlf tokens=40",
    "pings before every event": "error=ping-flood tokens=6",
    "odd block numbers": "error=index-jump tokens=20",
    "large event": "error=giant-event at=900000 tokens=20",
}


def asked(text: str, *, stream: bool, **more: object) -> bytes:
    """A message that asks something of the simulator."""
    schema = {"type": "object", "properties": {"a": {"type": "number"}}}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if "thinking" in text else {}
    tools = {"tools": [{"name": "look_up", "input_schema": schema}]} if "tool=" in text else {}
    return json.dumps(
        {
            "model": "claude-haiku-4-5",
            "max_tokens": 2000,
            "stream": stream,
            **thinking,
            **tools,
            "messages": [{"role": "user", "content": f"[[sim: {text}]]"}],
            **more,
        }
    ).encode()


def with_and_without_the_gateway(simulator, gateway, key, body: bytes) -> tuple[Response, Response]:
    """The same request answered through the gateway and by the simulator itself, each the first of a fresh one."""
    line = request("POST", MESSAGES, [VERSION, (b"x-api-key", key)], body)
    simulator.reset()
    (through,) = send(gateway.url, line)
    simulator.reset()
    (direct,) = send(simulator.url, line)
    return through, direct


@pytest.mark.parametrize("text", STREAMS.values(), ids=STREAMS)
def test_a_stream_is_the_same_to_the_byte_as_without_the_gateway(simulator, gateway, key, text):
    through, direct = with_and_without_the_gateway(simulator, gateway, key, asked(text, stream=True))
    assert (through.status, direct.status) == (200, 200), direct.body
    assert direct.body.startswith((b"event: message_start", b"event: ping"))
    assert through.body == direct.body
    assert through.header(b"request-id") == direct.header(b"request-id") is not None
    assert through.header(b"content-type") == direct.header(b"content-type")


@pytest.mark.parametrize("text", [text for text in STREAMS.values() if "error=" not in text])
def test_a_whole_message_is_the_same_to_the_byte_as_without_the_gateway(simulator, gateway, key, text):
    through, direct = with_and_without_the_gateway(simulator, gateway, key, asked(text, stream=False))
    assert (through.status, direct.status) == (200, 200), direct.body
    assert through.body == direct.body
    assert through.header(b"request-id") == direct.header(b"request-id") is not None


def scripted_head(status: bytes, *lines: bytes) -> bytes:
    """A response's head without its framing."""
    return b"HTTP/1.1 %b\r\n" % status + b"".join(line + b"\r\n" for line in lines)


def whole(status: bytes, body: bytes, *lines: bytes) -> tuple[bytes, Act]:
    """A play: this answer, then the connection goes on."""
    return (scripted_head(status, *lines) + b"content-length: %d\r\n\r\n%b" % (len(body), body), Act.KEEP)


def streamed(*pieces: bytes, lines: tuple[bytes, ...] = (b"content-type: text/event-stream",)) -> tuple[bytes, Act]:
    """A play: these pieces, a chunk each."""
    head = scripted_head(b"200 OK", *lines, b"transfer-encoding: chunked")
    return (head + b"\r\n" + chunks(*pieces) + b"0\r\n\r\n", Act.KEEP)


def play(scripted, gateway, key, *plays: tuple, stream: bool) -> Response:
    """The answer to a message that gets these plays."""
    body = asked(scripted.plan(*plays), stream=stream)
    (response,) = send(gateway.url, request("POST", MESSAGES, [VERSION, (b"x-api-key", key)], body))
    return response


START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant",'
    b'"model":"claude-haiku-4-5","content":[],"stop_reason":null,"usage":{"input_tokens":3,"output_tokens":1}}}\n\n'
)
BLOCK = (
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":'
    b'{"type":"text","text":""}}\n\n'
)
DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
    b'{"type":"text_delta","text":"\\u0058in ch\xc3\xa0o"}}\n\n'
)
END = (
    b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":5}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
ODD_STREAMS = {
    "comments everywhere": b": hello\n\n"
    + START
    + b":\n\n"
    + BLOCK
    + b": \xe2\x9c\x93 \n: two\n\n"
    + DELTA
    + b":x\n\n"
    + END,
    "comments within an event": START + BLOCK + DELTA.replace(b"\ndata", b"\n: aside\ndata") + END,
    "ids and retry": b"retry: 3000\n\n" + START.replace(b"data:", b"id: 7\ndata:") + BLOCK + DELTA + END,
    "no space after the colon": START.replace(b": {", b":{") + BLOCK + DELTA.replace(b"a: {", b"a:{") + END,
    "data in several lines": START + BLOCK + DELTA.replace(b',"index"', b',\ndata: "index"') + END,
    "unknown events": b"event: hello\ndata: [1, 2.50]\n\n"
    + START
    + b'event: x\ndata: "\\u0041"\n\n'
    + BLOCK
    + DELTA
    + END,
    "unknown fields": START.replace(b'"usage"', b'"new":{"a":1.0e0},"usage"') + BLOCK + DELTA + END,
    "unknown block and delta": START
    + BLOCK.replace(b'"text","text":""', b'"hologram","z":1.50')
    + DELTA.replace(b'"text_delta","text"', b'"hologram_delta","z"')
    + END,
    "blank lines to spare": START + b"\n" + BLOCK + b"\n\n" + DELTA + END,
    "CR alone": (START + BLOCK + DELTA + END).replace(b"\n", b"\r"),
    "CRLF and LF mixed": START.replace(b"\n", b"\r\n") + BLOCK + DELTA.replace(b"\n", b"\r\n") + END,
    "ping first": b'event: ping\ndata: {"type": "ping"}\n\n' + START + BLOCK + DELTA + END,
    "pings within": START
    + b'event: ping\ndata:{ "type":"ping" }\n\n'
    + BLOCK
    + b"event: ping\ndata: {}\n\n"
    + DELTA
    + END,
    "two deltas of usage": START
    + BLOCK
    + DELTA
    + b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":2}}\n\n'
    + END,
}


@pytest.mark.parametrize("size", [10_000, 64, 1])
@pytest.mark.parametrize("stream", ODD_STREAMS.values(), ids=ODD_STREAMS)
def test_every_spelling_of_events_passes_to_the_byte_however_it_is_cut(
    scripted, scripted_gateway, scripted_key, stream, size
):
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    response = play(scripted, scripted_gateway, scripted_key, streamed(*pieces), stream=True)
    assert response.status == 200, response.body
    assert response.body == stream


ODD_MESSAGES = {
    "spaces": b' {\r\n "usage" : { "input_tokens" : 3 , "output_tokens":5 } , "content": [ ],"stop_reason":null}\n',
    "order": b'{"usage":{"output_tokens":5,"input_tokens":3},"id":"msg_1","type":"message","content":[{"type":"x"}]}',
    "escapes": b'{"type":"message","content":[{"text":"\\u00e0\\/\\ud83d\\ude00"}],"usage":{"input_tokens":1}}',
    "numbers": b'{"content":[],"x":1.0,"y":1e5,"z":123456789012345678901,"usage":{"input_tokens":1,"output_tokens":1}}',
    "unknown fields": b'{"new":{"a":[null]},"content":[{"type":"hologram"}],"usage":{"input_tokens":1,"new":{"b":1}}}',
    "a key twice": b'{"content":[],"x":1,"x":2,"usage":{"input_tokens":1,"output_tokens":1}}',
    "CJK": '{"content":[{"type":"text","text":"日本語 👩‍👩‍👧"}],"usage":{"input_tokens":1,"output_tokens":1}}'.encode(),
}


@pytest.mark.parametrize("body", ODD_MESSAGES.values(), ids=ODD_MESSAGES)
def test_every_spelling_of_a_message_passes_to_the_byte(scripted, scripted_gateway, scripted_key, body):
    answer = whole(b"200 OK", body, b"content-type: application/json")
    response = play(scripted, scripted_gateway, scripted_key, answer, stream=False)
    assert (response.status, response.body) == (200, body)


def error_body(error_type: str, code: str = "") -> bytes:
    """An error in a spelling of its own."""
    details = b', "details" : {"error_code":"%b", "n": 1.0}' % code.encode() if code else b""
    return (
        b'{"type":"error",  "error":{"message":"\\u0054he words \xe2\x80\x93 as they are","type":"%b"%b},\r\n'
        b'"request_id":"req_scripted", "new_field": 1.50}\n' % (error_type.encode(), details)
    )


HTML = b"<html>\r\n<body><h1>Sorry</h1> \xff\xfe</body>\r\n</html>\r\n"
ERRORS = [
    (400, "invalid_request_error", error_body("invalid_request_error")),
    (400, "invalid_request_error", error_body("invalid_request_error", "organization_on_hold")),
    (400, "not of the API", b"plain words"),
    (402, "billing_error", error_body("billing_error")),
    (404, "not_found_error", error_body("not_found_error")),
    (405, "invalid_request_error", error_body("invalid_request_error")),
    (408, "timeout_error", error_body("timeout_error")),
    (409, "conflict_error", error_body("conflict_error")),
    (413, "request_too_large", error_body("request_too_large")),
    (413, "an edge's page", HTML),
    (422, "invalid_request_error", error_body("invalid_request_error")),
    (424, "never heard of", error_body("never_heard_of_error")),
    (429, "rate_limit_error", error_body("rate_limit_error")),
    (429, "spend cap", error_body("rate_limit_error", "enforced_spend_limit_reached")),
    (429, "ramp", error_body("rate_limit_error", "ramp_limit_exceeded")),
    (500, "api_error", error_body("api_error")),
    (502, "an edge's page", HTML),
    (503, "api_error", error_body("api_error", "cmek_key_unreachable")),
    (504, "timeout_error", error_body("timeout_error")),
    (520, "an edge's own status", HTML),
    (529, "overloaded_error", error_body("overloaded_error")),
    (529, "empty", b""),
]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    ("status", "body"), [(status, body) for status, _, body in ERRORS], ids=[f"{s}-{kind}" for s, kind, _ in ERRORS]
)
def test_an_error_of_anthropics_passes_to_the_byte(scripted, scripted_gateway, scripted_key, status, body, stream):
    kind = b"content-type: text/html" if body == HTML else b"content-type: application/json"
    answer = whole(b"%d Some Reason" % status, body, kind, b"request-id: req_scripted", b"anthropic-new: 1")
    response = play(scripted, scripted_gateway, scripted_key, answer, stream=stream)
    assert (response.status, response.body) == (status, body)
    assert response.header(b"content-type") == kind.partition(b": ")[2]
    assert response.header(b"request-id") == b"req_scripted"
    assert response.header(b"anthropic-new") == b"1"
    assert response.header(b"x-should-retry") == b"false"


@pytest.mark.parametrize("status", [429, 500, 529])
def test_where_anthropic_says_not_to_retry_it_is_asked_once(scripted, scripted_gateway, scripted_key, status):
    error = whole(b"%d Some Reason" % status, error_body("api_error"), b"x-should-retry: false", b"retry-after: 1")
    name = scripted.plan(error)
    line = request("POST", MESSAGES, [VERSION, (b"x-api-key", scripted_key)], asked(name, stream=False))
    (response,) = send(scripted_gateway.url, line)
    assert (response.status, response.header(b"x-should-retry")) == (status, b"false")
    assert response.header(b"retry-after") == b"1"
    assert len(scripted.attempts(name)) == 1


def test_an_error_of_a_path_that_is_no_message_passes_to_the_byte(simulator, gateway, key):
    for method, target in (
        ("GET", "/v1/models/claude-nonesuch"),
        ("GET", "/v1/messages/batches/msgbatch_nonesuch"),
        ("GET", "/v1/messages/batches/msgbatch_nonesuch/results"),
        ("POST", "/v1/messages/batches"),
        ("POST", "/v1/messages/count_tokens"),
    ):
        line = request(method, target, [VERSION, (b"x-api-key", key)], b'{"model": 1}' if method == "POST" else b"")
        simulator.reset()
        (through,) = send(gateway.url, line)
        simulator.reset()
        (direct,) = send(simulator.url, line)
        assert (through.status, through.body) == (direct.status, direct.body), target
        assert 400 <= direct.status < 500


# response headers

ANSWERED = [
    (b"request-id", b"req_scripted"),
    (b"anthropic-organization-id", b"0f2f0c5e"),
    (b"anthropic-workspace-id", b"wrkspc_1"),
    (b"Anthropic-Never-Heard-Of", b"a, b;c"),
    (b"date", b"Sun, 22 Nov 2026 03:00:00 GMT"),
    (b"server", b"cloudflare"),
    (b"Via", b"1.1 google"),
    (b"cf-ray", b"8f-SIN"),
    (b"CF-Cache-Status", b"DYNAMIC"),
    (b"x-robots-tag", b"none"),
    (b"x-never-heard-of", b"one"),
    (b"x-never-heard-of", b"two"),
    (b"cache-control", b"no-cache"),
    (b"vary", b"accept-encoding"),
    (b"x-latin", b"caf\xe9"),
    (b"x-empty", b""),
]
REPLACED = [
    (b"anthropic-ratelimit-requests-limit", b"50"),
    (b"Anthropic-Ratelimit-Requests-Remaining", b"49"),
    (b"anthropic-ratelimit-input-tokens-reset", b"2026-11-22T03:00:00Z"),
    (b"anthropic-ratelimit-unified-status", b"allowed"),
    (b"x-headgate-cost-usd", b"forged"),
    (b"set-cookie", b"__cf_bm=of-the-edge; HttpOnly"),
    (b"strict-transport-security", b"max-age=31536000"),
    (b"alt-svc", b'h3=":443"'),
    (b"keep-alive", b"timeout=5"),
]
WHOLE_BODY = b'{"content":[],"usage":{"input_tokens":1,"output_tokens":1}}'


@pytest.mark.parametrize("kind", ["whole", "streamed", "error", "models"])
def test_response_headers_pass_as_they_are_but_for_those_that_are_replaced(
    scripted, scripted_gateway, scripted_key, kind
):
    lines = tuple(b"%b: %b" % pair for pairs in zip(ANSWERED, REPLACED, strict=False) for pair in pairs)
    lines += tuple(b"%b: %b" % pair for pair in ANSWERED[len(REPLACED) :])
    plays = {
        "whole": whole(b"200 OK", WHOLE_BODY, b"content-type: application/json", *lines),
        "streamed": streamed(START + BLOCK + DELTA + END, lines=(b"content-type: text/event-stream", *lines)),
        "error": whole(b"404 Not Found", error_body("not_found_error"), b"content-type: application/json", *lines),
        "models": whole(b"200 OK", b"{}", b"content-type: application/json", *lines),
    }
    if kind == "models":
        body = scripted.plan(plays[kind]).encode()
        line = request("POST", "/v1/messages/count_tokens", [VERSION, (b"x-api-key", scripted_key)], body)
        (response,) = send(scripted_gateway.url, line)
    else:
        response = play(scripted, scripted_gateway, scripted_key, plays[kind], stream=kind == "streamed")
    kept = {name.lower() for name, _ in ANSWERED}
    assert [pair for pair in response.headers if pair[0] in kept] == [(name.lower(), v) for name, v in ANSWERED]
    others = {name for name, _ in response.headers} - kept
    own = {name for name in others if name.startswith(b"x-headgate-")}
    assert b"x-headgate-call" in own
    framing = {b"content-length", b"transfer-encoding", b"content-type", b"x-should-retry", b"x-accel-buffering"}
    # The caller's own limit stands where Anthropic's headers told of ours; a token count tells of none.
    limit = {name for name in others if name.startswith(b"anthropic-ratelimit-requests-")}
    assert len(limit) == (0 if kind == "models" else 3)
    assert not {b"50", b"49"} & {value for name, value in response.headers if name in limit}
    assert others - own - limit <= framing, others - own - limit - framing
    assert b"forged" not in dict(response.headers).values()


def test_an_answer_that_nobody_asked_to_be_compressed_is_decoded_and_says_so(scripted, scripted_gateway, scripted_key):
    packed = gzip.compress(WHOLE_BODY)
    answer = whole(b"200 OK", packed, b"content-type: application/json", b"content-encoding: gzip")
    response = play(scripted, scripted_gateway, scripted_key, answer, stream=False)
    assert (response.status, response.body) == (200, WHOLE_BODY)
    assert response.header(b"content-encoding") is None
    assert response.header(b"content-length") == b"%d" % len(WHOLE_BODY)


# batches


def test_of_a_batch_only_the_origin_of_its_results_url_is_changed(scripted, scripted_gateway):
    key = scripted_gateway.key("nights", "--scope", "batch").encode()
    url = b"https:\\/\\/api.anthropic.com/v1/messages/batches/msgbatch_1/results"
    before = b'{ "id":"msgbatch_1" , "x":1.50, "results_url" :"%b",\r\n "y":"\\u0041 https://api.anthropic.com/" }\n'
    name = scripted.plan(whole(b"200 OK", before % url, b"content-type: application/json"))
    headers = [VERSION, (b"x-api-key", key)]
    (response,) = send(scripted_gateway.url, request("POST", "/v1/messages/batches", headers, name.encode()))
    # The client reached the gateway as gateway.test.
    assert response.body == before % b"http://gateway.test/v1/messages/batches/msgbatch_1/results"


def test_results_of_a_batch_pass_to_the_byte(simulator, gateway, key):
    params = {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    body = json.dumps({"requests": [{"custom_id": f"r{n}", "params": params} for n in range(50)]}).encode()
    headers = {"x-api-key": key.decode(), "anthropic-version": "2023-06-01"}
    made = ask(gateway.url, "POST", "/v1/messages/batches", headers, body).json()
    target = f"/v1/messages/batches/{made['id']}"

    def ended() -> bool:
        return ask(gateway.url, "GET", target, headers).json()["processing_status"] == "ended"

    until(ended, what="the batch to end")
    through = ask(gateway.url, "GET", f"{target}/results", headers)
    direct = ask(simulator.url, "GET", f"{target}/results", headers)
    assert through.body == direct.body
    assert through.body.count(b"\n") == 50
    assert through.header(b"content-type") == direct.header(b"content-type")
