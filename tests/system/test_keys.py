"""Who may do what with a virtual key, and what happens to everybody else."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path
from typing import get_args

import pytest
from tests.system.conftest import UPSTREAM_KEY, until
from tests.system.raw_http import Response, ask, request, send

from headgate.gateway import endpoints
from headgate.policy.records import Scope

SCOPES: tuple[str, ...] = get_args(Scope)
MODEL = "claude-haiku-4-5"
BODY = json.dumps({"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}).encode()
ID = endpoints._ID.decode()

MESSAGES = frozenset({"messages", "app"})
BATCH = frozenset({"batch"})
EVERYBODY = frozenset({*SCOPES, ""})
"""With any key, and without one."""
MATRIX = {
    ("POST", "/v1/messages"): MESSAGES,
    ("POST", "/v1/messages/count_tokens"): MESSAGES,
    ("GET", "/v1/models"): MESSAGES,
    ("GET", "/v1/queue"): MESSAGES,
    ("GET", "/v1/models/ID"): MESSAGES,
    ("GET", "/v1/messages/batches"): BATCH,
    ("POST", "/v1/messages/batches"): BATCH,
    ("GET", "/v1/messages/batches/ID"): BATCH,
    ("DELETE", "/v1/messages/batches/ID"): BATCH,
    ("POST", "/v1/messages/batches/ID/cancel"): BATCH,
    ("GET", "/v1/messages/batches/ID/results"): BATCH,
    ("HEAD", "/"): EVERYBODY,
    ("HEAD", "/api/hello"): EVERYBODY,
    ("GET", "/api/hello"): EVERYBODY,
    ("GET", "/livez"): EVERYBODY,
    ("HEAD", "/livez"): EVERYBODY,
    ("GET", "/readyz"): EVERYBODY,
    ("HEAD", "/readyz"): EVERYBODY,
}
"""Every route, and the scopes each of which alone is enough for it."""
GUARDED = [route for route, scopes in MATRIX.items() if scopes is not EVERYBODY]

_addresses = (f"127.0.{high}.{low}" for high, low in itertools.product(range(1, 250), range(1, 250)))


@pytest.fixture
def address():
    """An address that nobody has asked from: bad keys are counted by address."""
    return next(_addresses)


@pytest.fixture(scope="module")
def simulator(shared_stack):
    """One without limits."""
    return shared_stack.simulator("--tier", "none")


@pytest.fixture(scope="module")
def gateway(shared_stack, simulator):
    """In front of it."""
    return shared_stack.gateway(simulator.url, RETRY__BASE_DELAY_S="0.01")


@pytest.fixture(scope="module")
def keys(gateway):
    """A key for each scope, and none."""
    return {scope: gateway.key(scope, "--scope", scope) for scope in SCOPES} | {"": ""}


def calls(simulator) -> int:
    """How many requests the simulator has had."""
    return len(simulator.requests())


def call(gateway, key: str, *, method="POST", target="/v1/messages", body=BODY, source="127.0.0.1") -> Response:
    """A request with a key, if any."""
    headers = {"anthropic-version": "2023-06-01", "content-type": "application/json"} | (
        {"x-api-key": key} if key else {}
    )
    return ask(gateway.url, method, target, headers, body if method == "POST" else b"", source=source)


def create(gateway, *options: str) -> dict:
    """A key as it is shown when it is made."""
    made = json.loads(gateway.headgate("keys", "create", "--name", "k", *options, "--json").stdout)
    until(lambda: operator_knows(gateway, made["key"]), what="the gateway to know a fresh key")
    return made


def operator_knows(gateway, key: str) -> bool:
    return ask(gateway.operator_url, "GET", "/admin/usage", {"x-api-key": key}).status != 401


def said(response: Response) -> tuple[int, dict]:
    """Status and body without what differs from answer to answer."""
    body = response.json()
    assert body.pop("request_id") == response.header(b"request-id").decode()
    return response.status, body


def refusals_of_the_kind(gateway, key: str, source: str) -> list[tuple[int, dict]]:
    """A key shown in either header, on a message and on something else."""
    forms = [{"x-api-key": key}, {"authorization": f"Bearer {key}"}]
    return [
        said(ask(gateway.url, method, target, form, body, source=source))
        for method, target, body in (("POST", "/v1/messages", BODY), ("GET", "/v1/messages/batches/x", b""))
        for form in forms
    ]


# routes and scopes


def test_every_route_has_its_row_in_the_matrix():
    found = {(method.decode(), path.decode()) for path, routes in endpoints._EXACT.items() for method in routes}
    for pattern, routes in endpoints._PATTERNS:
        assert ID in pattern.pattern.decode()
        found |= {(method.decode(), pattern.pattern.decode().replace(ID, "ID")) for method in routes}
    assert found == set(MATRIX)


@pytest.mark.parametrize("scope", [*SCOPES, ""])
@pytest.mark.parametrize(("method", "path"), MATRIX)
def test_a_route_opens_to_the_scopes_of_its_row_and_to_no_other(simulator, gateway, keys, address, method, path, scope):
    before = calls(simulator)
    response = call(gateway, keys[scope], method=method, target=path.replace("ID", "msgbatch_1"), source=address)
    reached = calls(simulator) - before
    if scope in MATRIX[method, path]:
        assert response.status not in (401, 403)
        answered_here = MATRIX[method, path] is EVERYBODY or path == "/v1/queue"
        assert reached == (0 if answered_here else 1)
    else:
        assert response.status == (403 if scope else 401)
        assert response.error_code == ("scope_missing" if scope else "invalid_key")
        assert response.json()["error"]["type"] == ("permission_error" if scope else "authentication_error")
        assert response.header(b"x-should-retry") == b"false"
        assert reached == 0


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/messages/", "//v1/messages", "/v1//messages", "/V1/messages", "/v1/./messages", "/./v1/messages"),
        *(
            "/v1/messages%2f",
            "/v1%2fmessages",
            "/v1/messages;x=1",
            "/v1/messages%00",
            "/v1/%6dessages",
            "/v1/messages.",
        ),
        *("/v1/models/../messages", "/v1/models/..%2fmessages", "/v1/models/..", "/v1/models/.", "/v1/models/a/../b"),
        *("/v1/messages/batches/../../messages", "/v1/messages/batches/x/../../..", "/v1/messages/batches/x/results/"),
        *("/admin/usage", "/v1/complete", "/v1/files", "/v1/organizations/cost_report", "/metrics", "/sim/requests"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_a_path_that_is_no_route_is_404_with_any_key_and_reaches_nobody(
    simulator, gateway, keys, address, method, path
):
    before = calls(simulator)
    for key in ("", "hg_bad", keys["app"], keys["batch"], keys["admin:write"]):
        response = call(gateway, key, method=method, target=path, source=address)
        assert (response.status, response.error_code) == (404, "no_such_path")
    assert calls(simulator) == before


@pytest.mark.parametrize("form", ["x-api-key", "authorization", "both"])
@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_a_key_is_taken_in_either_header_everywhere(gateway, keys, method, path, form):
    key = keys["batch" if MATRIX[method, path] is BATCH else "messages"]
    headers = {"anthropic-version": "2023-06-01"}
    if form != "authorization":
        headers["x-api-key"] = key
    if form != "x-api-key":
        headers["authorization"] = f"Bearer {key}"
    response = ask(gateway.url, method, path.replace("ID", "x"), headers, BODY if method == "POST" else b"")
    assert response.status not in (401, 403)


# bad keys


def bad_keys(gateway) -> dict[str, str]:
    """A key of every kind that is not good."""
    good = create(gateway)["key"]
    revoked = create(gateway)
    gateway.headgate("keys", "revoke", revoked["id"])
    until(lambda: not operator_knows(gateway, revoked["key"]), what="a revocation")
    expired = create(gateway, "--expires", "1s")
    until(lambda: not operator_knows(gateway, expired["key"]), what="an expiry")
    return {
        "empty": "",
        "of Anthropic": "sk-ant-api03-AAAA",
        "the upstream's own": UPSTREAM_KEY,
        "malformed": "hg_",
        "unknown id": "hg_00000000_" + good[12:],
        "wrong secret": good[:-1] + ("A" if good[-1] != "A" else "B"),
        "short": good[:-1],
        "long": good + "A",
        "another case": good.swapcase(),
        "revoked": revoked["key"],
        "expired": expired["key"],
    }


def test_every_kind_of_bad_key_is_refused_in_one_text_on_every_header(gateway):
    texts = {}
    for kind, key in bad_keys(gateway).items():
        for answer in refusals_of_the_kind(gateway, key, next(_addresses)):
            texts.setdefault(json.dumps(answer), []).append(kind)
    assert len(texts) == 1, texts
    ((status, body),) = (json.loads(text) for text in texts)
    assert status == 401
    assert body["type"] == "error"
    assert (body["error"]["type"], body["error"]["details"]["error_code"]) == ("authentication_error", "invalid_key")


HOSTILE = [
    "' OR '1'='1",
    "hg_aaaaaaaa_' UNION SELECT * FROM keys --",
    'hg_"; DROP TABLE keys; --',
    "hg_%61aaaaaaa_" + "a" * 43,
    "hg_aaaaaaaa_" + "é" * 43,
    "hg_aaaaaaaa_" + "é" * 21 + "a",
    "\xff" * 55,
    "a" * 8000,
    "null",
    "hg_../../x_" + "a" * 43,
    "{key},{key}",
    "{key}\t{key}",
    "x {key}",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_key_is_a_bad_key_like_any_other(simulator, gateway, keys, address, hostile):
    before = calls(simulator)
    value = hostile.format(key=keys["messages"]).encode("latin-1" if "\xff" in hostile else "utf-8")
    for name, prefix in ((b"x-api-key", b""), (b"authorization", b"Bearer "), (b"authorization", b"Basic ")):
        (response,) = send(gateway.url, request("POST", "/v1/messages", [(name, prefix + value)], BODY), source=address)
        assert (response.status, response.error_code) == (401, "invalid_key")
    assert calls(simulator) == before


@pytest.mark.parametrize(
    "headers",
    [
        [("x-forwarded-for", "127.0.0.1")],
        [("x-forwarded-host", "localhost"), ("forwarded", "for=127.0.0.1;host=localhost")],
        [("x-headgate-user", "root"), ("x-headgate-hop", "1")],
        [("x-api-key", "hg_bad"), ("authorization", "Bearer hg_bad")],
        [("cookie", "x-api-key={key}")],
        [("proxy-authorization", "Bearer {key}")],
        [("authorization", "{key}")],
        [("authorization", "Bearer{key}")],
        [("x-goog-api-key", "{key}")],
    ],
    ids=str,
)
def test_nothing_but_a_good_key_in_its_place_opens_the_gate(simulator, gateway, keys, address, headers):
    before = calls(simulator)
    lines = [(name, value.format(key=keys["messages"])) for name, value in headers]
    target = f"/v1/messages?x-api-key={keys['messages']}&key={keys['messages']}"
    (response,) = send(gateway.url, request("POST", target, lines, BODY), source=address)
    assert (response.status, response.error_code) == (401, "invalid_key")
    assert calls(simulator) == before


def test_the_21st_bad_key_a_minute_from_an_address_waits_and_a_good_key_from_there_does_not(gateway, keys, address):
    answers = [call(gateway, "hg_bad", source=address) for _ in range(25)]
    assert [one.status for one in answers] == [401] * 20 + [429] * 5
    assert [one.error_code for one in answers] == ["invalid_key"] * 20 + ["bad_keys_exceeded"] * 5
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"
    assert all(45 <= int(one.header(b"retry-after")) <= 60 for one in answers[20:])
    # In a minute the key is as bad as it is now: an SDK that is told to retry would sleep for it in silence.
    assert all(one.header(b"x-should-retry") == b"false" for one in answers)
    assert call(gateway, keys["messages"], source=address).status == 200
    assert call(gateway, "hg_bad", source=address).status == 429
    assert call(gateway, "hg_bad", source=next(_addresses)).status == 401


def test_how_many_bad_keys_a_minute_is_a_setting(shared_stack, simulator, address):
    gateway = shared_stack.gateway(simulator.url, SERVER__BAD_KEYS_PER_MIN="3")
    assert [call(gateway, "hg_bad", source=address).status for _ in range(5)] == [401] * 3 + [429] * 2


def test_without_a_good_key_nothing_reaches_anthropic_and_not_a_byte_is_written(shared_stack, simulator):
    gateway = shared_stack.gateway(simulator.url)

    def written() -> dict[str, bytes]:
        # The -shm file holds who is reading, and is no data.
        return {
            str(path): path.read_bytes()
            for path in sorted(Path(gateway.data_dir).rglob("*"))
            if path.is_file() and not path.name.endswith("-shm")
        }

    before, calls_before = written(), calls(simulator)
    assert before
    for method, path in GUARDED:
        for key in ("", "hg_bad", "hg_00000000_" + "A" * 43):
            source = next(_addresses)
            response = call(gateway, key, method=method, target=path.replace("ID", "x"), source=source)
            assert response.status == 401
    for _ in range(30):
        call(gateway, "hg_bad")
    call(gateway, "", target="/nowhere")
    # The journal is written before a call is answered, so that what it does not hold by now it never will.
    assert written() == before
    assert calls(simulator) == calls_before
    assert call(gateway, gateway.key()).status == 200
    assert calls(simulator) == calls_before + 1
    assert written() != before
    # What the database holds it has from the journal, in order: one call, and nothing before it.
    assert len(gateway.calls(1)) == 1


# the life of a key


def test_a_revoked_key_is_refused_within_a_second_while_the_gateway_runs(gateway, address):
    made = create(gateway)
    assert call(gateway, made["key"]).status == 200
    gateway.headgate("keys", "revoke", made["id"])
    until(lambda: not operator_knows(gateway, made["key"]), within_s=1.0, what="the key to be refused")
    assert call(gateway, made["key"], source=address).error_code == "invalid_key"


def test_a_stream_that_began_before_its_key_was_revoked_ends_well(shared_stack, address):
    simulator = shared_stack.simulator("--tier", "none", "--speed", "1", "--otps", "20")
    gateway = shared_stack.gateway(simulator.url)
    made = create(gateway)
    body = json.loads(BODY) | {"stream": True, "max_tokens": 200}
    body["messages"][0]["content"] = "[[sim: tokens=60]]"

    responses: list[Response] = []
    stream = json.dumps(body).encode()
    thread = threading.Thread(target=lambda: responses.append(call(gateway, made["key"], body=stream)))
    thread.start()
    until(lambda: simulator.streams()["count"] == 1, what="the stream")
    gateway.headgate("keys", "revoke", made["id"])
    until(lambda: not operator_knows(gateway, made["key"]), within_s=1.0)
    assert thread.is_alive()
    thread.join(20)
    assert responses[0].body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert call(gateway, made["key"], source=address).status == 401


def test_a_rotated_key_and_its_successor_both_work_until_the_overlap_ends(gateway, address):
    made = create(gateway)
    rotated = json.loads(gateway.headgate("keys", "rotate", made["id"], "--overlap", "3s", "--json").stdout)
    rotated_at = time.monotonic()
    assert (rotated["id"], rotated["key"] != made["key"]) == (made["id"], True)
    until(lambda: operator_knows(gateway, rotated["key"]), within_s=1.0, what="the new secret")
    assert call(gateway, made["key"]).status == 200
    assert call(gateway, rotated["key"]).status == 200
    until(lambda: not operator_knows(gateway, made["key"]), within_s=5.0, what="the overlap to end")
    assert time.monotonic() - rotated_at > 2.0
    assert call(gateway, made["key"], source=address).error_code == "invalid_key"
    assert call(gateway, rotated["key"]).status == 200


def test_a_second_rotation_ends_the_first_secret_at_once(gateway, address):
    first = create(gateway)
    second, third = (
        json.loads(gateway.headgate("keys", "rotate", first["id"], "--overlap", "1h", "--json").stdout)["key"]
        for _ in range(2)
    )
    until(lambda: operator_knows(gateway, third), within_s=1.0)
    assert call(gateway, first["key"], source=address).status == 401
    assert call(gateway, second).status == 200
    assert call(gateway, third).status == 200


def test_a_rotated_key_keeps_its_scopes_its_models_and_its_past(gateway):
    made = create(gateway, "--models", MODEL, "--owner", "linh")
    assert call(gateway, made["key"]).status == 200
    rotated = json.loads(gateway.headgate("keys", "rotate", made["id"], "--json").stdout)
    until(lambda: operator_knows(gateway, rotated["key"]), within_s=1.0)
    assert call(gateway, rotated["key"]).status == 200
    other = json.loads(BODY) | {"model": "claude-sonnet-4-6"}
    assert call(gateway, rotated["key"], body=json.dumps(other).encode()).error_code == "model_not_allowed"

    def of_linh() -> bool:
        rows = json.loads(gateway.headgate("usage", "--group-by", "user", "--since", "1h", "--json").stdout)["rows"]
        return [row["requests"] for row in rows if row["user"] == "linh"] == [3]

    until(of_linh, what="both secrets' calls under one owner")


def test_a_key_expires_while_the_gateway_runs(gateway, address):
    made = create(gateway, "--expires", "2s")
    assert call(gateway, made["key"]).status == 200
    until(lambda: not operator_knows(gateway, made["key"]), within_s=4.0, what="the expiry")
    assert call(gateway, made["key"], source=address).error_code == "invalid_key"


# in whose name

NAMED = {"x-headgate-user": "minh", "x-headgate-tier": "paid", "x-headgate-conversation": "c1"}


@pytest.mark.parametrize(
    ("scope", "headers", "user_id", "expected"),
    [
        ("messages", {}, None, ("owner", "free", "")),
        ("messages", NAMED, "session-1", ("owner", "free", "")),
        ("app", {}, None, ("owner", "free", "")),
        ("app", {}, "session-1", ("session-1", "free", "")),
        ("app", NAMED, None, ("minh", "paid", "c1")),
        ("app", NAMED, "session-1", ("minh", "paid", "c1")),
    ],
)
def test_only_an_apps_key_speaks_for_others(gateway, scope, headers, user_id, expected):
    made = create(gateway, "--owner", "owner", "--scope", scope)
    body = json.loads(BODY) | ({"metadata": {"user_id": user_id}} if user_id else {})
    lines = {"x-api-key": made["key"], "anthropic-version": "2023-06-01"} | headers
    response = ask(gateway.url, "POST", "/v1/messages", lines, json.dumps(body).encode())
    assert response.status == 200

    def row() -> dict | None:
        found = json.loads(gateway.headgate("calls", "--limit", "50", "--json").stdout)["calls"]
        return next((one for one in found if one["key_id"] == made["id"]), None)

    found = until(row, what="the call in the ledger")
    assert (found["user"], found["tier"], found["conversation"]) == expected


# models

OTHER = "claude-sonnet-4-6"


@pytest.fixture(scope="module")
def haiku_key(gateway):
    """A key for one model."""
    return gateway.key("haiku", "--models", MODEL, "--scope", "messages", "--scope", "batch")


@pytest.mark.parametrize("spelled", [OTHER, "claude-opus-4-7", "claude-nonesuch", f" {MODEL}", f"{MODEL}-x"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_key_for_one_model_may_use_no_other(simulator, gateway, haiku_key, spelled, stream):
    before = calls(simulator)
    body = json.dumps(json.loads(BODY) | {"model": spelled, "stream": stream}).encode()
    response = call(gateway, haiku_key, body=body)
    assert (response.status, response.error_code) == (403, "model_not_allowed")
    assert response.header(b"x-should-retry") == b"false"
    assert calls(simulator) == before
    assert call(gateway, haiku_key).status == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (BODY.replace(MODEL.encode(), b"cl\\u0061ude-sonnet-4-6"), 403),
        (BODY.replace(b'"model"', b'"m\\u006fdel"').replace(MODEL.encode(), OTHER.encode()), 403),
        (BODY[:-1] + b',"model":"claude-sonnet-4-6"}', 400),
        (BODY[:-1] + b',"mod\\u0065l":"claude-sonnet-4-6"}', 400),
        (b'{"model":"claude-sonnet-4-6",' + BODY[1:], 400),
        (BODY.replace(MODEL.encode(), b""), 403),
        (BODY.replace(MODEL.encode(), b"cl\\u0061ude-haiku-4-5"), 200),
    ],
)
def test_no_spelling_of_a_body_brings_another_model_past_the_key(simulator, gateway, haiku_key, body, status):
    before = calls(simulator)
    assert call(gateway, haiku_key, body=body).status == status
    assert calls(simulator) - before == (status == 200)


def test_a_batch_brings_no_other_model_past_the_key(simulator, gateway, haiku_key):
    before = calls(simulator)
    params = [json.loads(BODY), json.loads(BODY) | {"model": OTHER}]
    batch = {"requests": [{"custom_id": f"r{number}", "params": one} for number, one in enumerate(params)]}
    response = call(gateway, haiku_key, target="/v1/messages/batches", body=json.dumps(batch).encode())
    assert (response.status, response.error_code) == (403, "model_not_allowed")
    assert calls(simulator) == before
    del batch["requests"][1]
    assert call(gateway, haiku_key, target="/v1/messages/batches", body=json.dumps(batch).encode()).status == 200


# secrets


def test_no_secret_is_in_the_data_directory_the_log_or_a_report(gateway, keys):
    call(gateway, keys["messages"])
    secrets = [key[12:] for key in keys.values() if key] + [UPSTREAM_KEY[-20:]]
    texts = {str(path): path.read_bytes() for path in gateway.data_dir.rglob("*") if path.is_file()}
    texts["log"] = gateway.process.text().encode()
    texts["list"] = gateway.headgate("keys", "list", "--json").stdout.encode()
    texts["config"] = gateway.headgate("config", "show", "--json").stdout.encode()
    assert len(texts) > 4
    for name, text in texts.items():
        for secret in secrets:
            assert secret.encode() not in text, name
