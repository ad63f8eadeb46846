"""What the operator is told: by `/admin`, by `/metrics` and by the command line, all three the simulator's own bill."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from tests.system.conftest import until
from tests.system.raw_http import ask, request, send

from headgate.gateway.operator import operator_app

TOKENS = ("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "output_tokens")
THEIRS = ("input_tokens", "read_tokens", "write_5m_tokens", "write_1h_tokens", "output_tokens")
"""The same in the simulator's words."""
USERS = ("khách-an", "khách-bình", "khách-chi", "khách-dũng")
CALLS = 50
LONG = "Một đoạn văn dài để nhớ lại sau này. " * 700


def operator_routes() -> list[tuple[str, str]]:
    """Every method and path under `/admin`, as the application itself has them."""
    app = operator_app(
        None,
        None,
        CollectorRegistry(),
        now_ns=lambda: 0,
        is_ready=lambda: True,
        limits=lambda: None,
        resume=lambda: False,
        guard=None,
        alerts=None,
        money=None,
        rules=None,
    )
    return sorted(
        (method, route.path)
        for route in app.routes
        if isinstance(route, APIRoute) and route.path.startswith("/admin")
        for method in route.methods
    )


def mixed(number: int) -> tuple[str, dict]:
    """The n-th of the fifty: what it is for, and its body. Each kind comes streamed and whole, by several users."""
    body: dict = {
        "model": ("claude-sonnet-4-6", "claude-haiku-4-5", "claude-opus-4-7")[number % 3],
        "max_tokens": 1500,
        "stream": number % 2 == 0,
    }
    tool = {"name": "look_up", "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    kind = ("plain", "cached", "cached 1h", "thinking", "tool", "refused", "cut short", "late", "missing", "web")[
        number * 10 // CALLS
    ]
    says = f"[[sim: tokens={20 + number}]] Câu hỏi {number}"
    mark = {"type": "ephemeral"}
    match kind:
        case "cached":
            body["system"] = [{"type": "text", "text": LONG, "cache_control": mark}]
        case "cached 1h":
            body["system"] = [{"type": "text", "text": LONG + "1", "cache_control": mark | {"ttl": "1h"}}]
        case "thinking":
            body |= {"model": "claude-haiku-4-5", "thinking": {"type": "enabled", "budget_tokens": 1024}}
            says = f"[[sim: thinking=60 tokens=30]] Câu hỏi {number}"
        case "tool":
            body["tools"] = [tool]
            says = f"[[sim: tool=look_up]] Câu hỏi {number}"
        case "refused":
            says = f"[[sim: stop={('refusal', 'refusal_mid')[number // 2 % 2]} tokens=40]] Câu hỏi {number}"
        case "cut short":
            body["max_tokens"] = 7
        case "late":
            says = f"[[sim: error=529]] Câu hỏi {number}"
        case "missing":
            body["model"] = "claude-nonesuch"
        case "web":
            says = f"[[sim: searches=2 tokens=25]] Câu hỏi {number}"
    return kind, body | {"messages": [{"role": "user", "content": says}]}


@pytest.fixture(scope="module")
def fifty(shared_stack):
    """Fifty calls of ten kinds, all over, and where to read of them."""
    simulator = shared_stack.simulator("--tier", "none")
    gateway = shared_stack.gateway(simulator.url, RETRY__BASE_DELAY_S="0.01")
    app, reader = gateway.key("shop", "--scope", "app"), gateway.key("auditor", "--scope", "admin:read")
    statuses: Counter[int] = Counter()
    for number in range(CALLS):
        _, body = mixed(number)
        headers = {"x-api-key": app, "anthropic-version": "2023-06-01", "x-headgate-endpoint": f"page-{number % 2}"}
        headers |= {"x-headgate-user": USERS[number % 4], "x-headgate-conversation": f"talk-{number % 5}"}
        (response,) = send(gateway.url, request("POST", "/v1/messages", headers.items(), json.dumps(body).encode()))
        statuses[response.status] += 1
    assert statuses == {200: 40, 529: 5, 404: 5}
    calls = gateway.calls(CALLS)

    def admin(target: str) -> dict:
        answer = ask(gateway.operator_url, "GET", target, {"x-api-key": reader})
        assert answer.status == 200, answer.body
        return answer.json()

    def cli(*arguments: str) -> dict:
        return json.loads(gateway.headgate(*arguments, "--json").stdout)

    return SimpleNamespace(
        simulator=simulator, gateway=gateway, reader=reader, calls=calls, bill=simulator.bill(), admin=admin, cli=cli
    )


def billed(line: dict) -> dict[str, int]:
    """A line of the simulator's bill in the ledger's words."""
    usage = line.get("usage", line)
    return {name: usage[theirs] for name, theirs in zip(TOKENS, THEIRS, strict=True)} | {
        "cost_nanousd": line["cost_nanousd"]
    }


def total_of(fifty) -> dict[str, int]:
    """The bill, and the tokens of what is not on it: a refusal before the first word is read, and free."""
    free = [call for call in fifty.calls if call["status"] == 200 and not call["cost_nanousd"]]
    assert len(free) == 3
    assert {call["stop_reason"] for call in free} == {"refusal"}
    charged = billed(fifty.bill["total"])
    return {name: charged[name] + summed(free)[name] for name in charged}


def summed(rows: list[dict]) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in (*TOKENS, "cost_nanousd")}


# the bill


def test_the_fifty_calls_are_of_every_kind_that_has_a_price_of_its_own(fifty):
    total = billed(fifty.bill["total"])
    assert all(total[name] > 0 for name in total), total
    assert fifty.bill["total"]["web_searches"] == 10
    assert fifty.bill["total"]["thinking_tokens"] > 0
    assert len(fifty.bill["models"]) == 3
    assert fifty.bill["total"]["requests"] < 40  # a refusal before the first word is free


def test_each_call_of_the_ledger_is_the_line_of_the_bill_with_its_request_id(fifty):
    lines = {line["request_id"]: billed(line) for line in fifty.bill["requests"]}
    assert len(fifty.calls) == CALLS
    found = set()
    for call in fifty.calls:
        assert call["state"] == ("settled" if call["status"] == 200 else "void")
        for attempt in call["attempts"]:
            line = lines.get(attempt["upstream_request_id"])
            if line is None:
                assert attempt["cost_nanousd"] == 0
            else:
                assert {name: attempt[name] for name in line} == line
                found.add(attempt["upstream_request_id"])
    assert found == set(lines)


def test_what_an_overload_cost_in_attempts_is_in_its_row(fifty):
    late = [call for call in fifty.calls if call["status"] == 529]
    assert [(len(call["attempts"]), call["outcome"], call["error_code"]) for call in late] == [
        (3, "failed", "overloaded_error")
    ] * 5
    assert {attempt["status"] for call in late for attempt in call["attempts"]} == {529}


@pytest.mark.parametrize("group", ["user", "key", "model", "endpoint", "day", "arm"])
def test_usage_is_the_bill_by_every_group_and_the_same_from_both_doors(fifty, group):
    from_cli = fifty.cli("usage", "--group-by", group, "--since", "1h")
    from_admin = fifty.admin(f"/admin/usage?group_by={group}&since=1h")
    assert from_cli == from_admin
    assert from_cli["total"]["requests"] == CALLS
    assert from_cli["total"]["errors"] == 10
    total = total_of(fifty)
    assert {name: from_cli["total"][name] for name in total} == total
    assert summed(from_cli["rows"]) == total
    if group == "model":
        by_model = {row["model"]: row["cost_nanousd"] for row in from_cli["rows"] if row["cost_nanousd"]}
        # The simulator bills the dated id behind an alias.
        undated = {re.sub(r"-\d{8}$", "", model): line for model, line in fifty.bill["models"].items()}
        assert by_model == {model: line["cost_nanousd"] for model, line in undated.items()}
    if group == "user":
        requests = {row["user"]: row["requests"] for row in from_cli["rows"]}
        assert requests == dict(zip(USERS, (13, 13, 12, 12), strict=True))
    if group == "endpoint":
        assert {row["endpoint"] for row in from_cli["rows"]} == {"page-0", "page-1"}


def test_the_months_bill_is_anthropics(fifty):
    report = fifty.cli("bill")
    total = total_of(fifty)
    assert {name: report["total"][name] for name in total} == total
    assert report["so_far_nanousd"] == fifty.bill["total"]["cost_nanousd"]
    for group in ("model", "user", "endpoint", "day"):
        assert summed(report[f"by_{group}"]) == total, group


def test_calls_are_the_same_from_both_doors_page_by_page(fifty):
    pages, cursor = [], ""
    while cursor is not None:
        page = fifty.admin(f"/admin/calls?limit=7&cursor={cursor}")
        pages += page["calls"]
        cursor = page["cursor"]
    assert pages == fifty.cli("calls", "--limit", "1000")["calls"]
    assert len({call["call_id"] for call in pages}) == len(pages) == CALLS
    assert pages == sorted(pages, key=lambda call: call["at"], reverse=True)


# metrics


def metrics(gateway) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples of `/metrics`: name, then label values in the order of their names."""
    answer = ask(gateway.operator_url, "GET", "/metrics")
    assert answer.status == 200
    assert answer.header(b"content-type").startswith(b"text/plain")
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            found[sample.name][tuple(sample.labels[name] for name in sorted(sample.labels))] = sample.value
    return found


def test_metrics_agree_with_the_ledger(fifty):
    found = until(
        lambda: (read := metrics(fifty.gateway)) and sum(read["headgate_calls_total"].values()) >= CALLS and read,
        what="the writer to have counted all calls",
    )
    assert all(name.startswith("headgate_") for name in found)
    calls = fifty.calls
    # Labels: endpoint, model, outcome, status.
    expected = Counter((call["endpoint"], call["model"], call["outcome"], str(call["status"])) for call in calls)
    assert found["headgate_calls_total"] == expected
    tokens: Counter[tuple[str, str]] = Counter()
    cost: Counter[tuple[str]] = Counter()
    saved: Counter[tuple[str]] = Counter()
    attempts: Counter[tuple[str]] = Counter()
    for call in calls:
        for name in TOKENS:
            tokens[name.removesuffix("_tokens"), call["model"]] += call[name]
        cost[call["model"],] += call["cost_nanousd"]
        saved[call["model"],] += call["saved_nanousd"]
        attempts[call["model"],] += len(call["attempts"])
    assert found["headgate_tokens_total"] == tokens
    for name, amounts in (("headgate_cost_usd_total", cost), ("headgate_cache_saved_usd", saved)):
        assert {label: round(value * 1e9) for label, value in found[name].items()} == amounts, name
    assert found["headgate_attempts_total"] == attempts
    assert sum(found["headgate_call_seconds_count"].values()) == CALLS
    assert sum(found["headgate_queue_seconds_count"].values()) == CALLS


def test_metrics_name_no_user_no_key_and_no_prompt(fifty):
    text = ask(fifty.gateway.operator_url, "GET", "/metrics").body.decode()
    for secret in (*USERS, "Câu hỏi", fifty.reader, fifty.reader[3:11], "talk-"):
        assert secret not in text


# who may read


def test_there_are_admin_routes_at_all():
    assert {("GET", "/admin/usage"), ("GET", "/admin/calls")} <= set(operator_routes())


@pytest.fixture(scope="module")
def scoped(fifty):
    """A key for each scope."""
    return {
        scope: fifty.gateway.key(scope, "--scope", scope)
        for scope in ("messages", "app", "batch", "admin:write", "admin:read")
    }


@pytest.mark.parametrize(("method", "path"), operator_routes())
def test_an_admin_route_opens_to_its_scope_and_to_no_other(fifty, scoped, method, path):
    needed = "admin:read" if method == "GET" else "admin:write"

    def status(headers: dict[str, str]) -> tuple[int, str | None]:
        response = ask(fifty.gateway.operator_url, method, path.replace("{", "").replace("}", ""), headers)
        return response.status, response.error_code if response.status in (401, 403) else None

    for headers in (
        {},
        {"x-api-key": ""},
        {"x-api-key": "hg_bad"},
        {"authorization": "Bearer hg_bad"},
        {"authorization": f"Basic {scoped[needed]}"},
        {"cookie": f"x-api-key={scoped[needed]}"},
        {"x-forwarded-for": "127.0.0.1"},
    ):
        assert status(headers) == (401, "invalid_key"), headers
    for scope, key in scoped.items():
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
            if scope == needed:
                assert status(headers)[0] not in (401, 403), (scope, headers)
            else:
                assert status(headers) == (403, "scope_missing"), (scope, headers)


def test_an_admin_keys_revocation_is_seen_within_a_second(fifty):
    made = json.loads(
        fifty.gateway.headgate("keys", "create", "--name", "leaver", "--scope", "admin:read", "--json").stdout
    )

    def status() -> int:
        return ask(fifty.gateway.operator_url, "GET", "/admin/calls", {"x-api-key": made["key"]}).status

    until(lambda: status() == 200, within_s=1.0)
    fifty.gateway.headgate("keys", "revoke", made["id"])
    until(lambda: status() == 401, within_s=1.0)


@pytest.mark.parametrize(
    "path",
    [
        *(path for _, path in operator_routes()),
        *("/admin", "/admin/", "/admin/keys", "/metrics", "/docs", "/openapi.json", "/redoc"),
        *("//admin/usage", "/v1/../admin/usage", "/admin/usage?group_by=user", "/%61dmin/usage"),
    ],
)
def test_nothing_of_the_operators_is_on_the_public_port(fifty, scoped, path):
    for key in ("", scoped["admin:read"], scoped["admin:write"]):
        for method in ("GET", "POST"):
            response = ask(fifty.gateway.url, method, path, {"x-api-key": key} if key else {})
            assert (response.status, response.error_code) == (404, "no_such_path")


def test_nothing_of_the_public_port_is_on_the_operators(fifty, scoped):
    for method, path in (("POST", "/v1/messages"), ("GET", "/v1/models")):
        response = ask(fifty.gateway.operator_url, method, path, {"x-api-key": scoped["messages"]}, b"{}")
        assert response.status == 404


# what cannot be asked


@pytest.mark.parametrize(
    "target",
    [
        *("/admin/usage?group_by=nonesuch", "/admin/usage?group_by=", "/admin/usage?group_by=user;drop"),
        *("/admin/usage?since=yesterday", "/admin/usage?until=2026-99-99", "/admin/usage?since=-5h"),
        *("/admin/usage?since=99999999999999999999d", "/admin/usage?since=9999-12-31", "/admin/usage?since=0001-01-01"),
        *("/admin/calls?limit=0", "/admin/calls?limit=-1", "/admin/calls?limit=1001", "/admin/calls?limit=x"),
        *("/admin/calls?limit=99999999999999999999", "/admin/calls?cursor=x"),
        *("/admin/calls?cursor=99999999999999999999.call_x", "/admin/calls?limit=1.5", "/admin/calls?cursor=.."),
    ],
)
def test_a_question_that_cannot_be_meant_is_400_in_anthropics_envelope_and_says_what_is_wrong(fifty, target):
    response = ask(fifty.gateway.operator_url, "GET", target.replace(" ", "%20"), {"x-api-key": fifty.reader})
    assert response.status == 400, response.body
    told = response.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert told["error"]["details"]["error_code"] == "invalid_request"
    assert len(told["error"]["message"]) > 10


def test_errors_of_the_operators_port_are_in_anthropics_envelope_too(fifty):
    for method, path, status in (("GET", "/nowhere", 404), ("POST", "/admin/usage", 405), ("DELETE", "/metrics", 405)):
        response = ask(fifty.gateway.operator_url, method, path, {"x-api-key": fifty.reader})
        assert response.status == status
        assert response.json()["type"] == "error", path
