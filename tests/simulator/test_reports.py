"""The Admin API's reports over a socket: who may read them, their buckets, groups and pages."""

import asyncio
import http.client
import json
import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

import pytest

from headgate.simulator.models import load_catalogue
from headgate.simulator.server import Simulator
from headgate.simulator.settings import SimulatorSettings
from headgate.simulator.usage import Usage

USAGE = "/v1/organizations/usage_report/messages"
COST = "/v1/organizations/cost_report"
ADMIN = "sk-ant-admin01-x"
DAY_S = 86_400
MONDAY = datetime(2026, 11, 2, tzinfo=UTC).timestamp()
CATALOGUE = load_catalogue()


def ask(port: int, path: str, query: list[tuple[str, str]], key: str | None = ADMIN) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"anthropic-version": "2023-06-01"} | ({} if key is None else {"x-api-key": key})
    connection.request("GET", f"{path}?{urlencode(query)}", headers=headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def with_bill(path: str, query: list[tuple[str, str]], *charges: Any) -> tuple[int, Any]:
    """What a simulator answers that has charged this: (day after Monday, model, workspace, usage) each."""

    async def main() -> tuple[int, Any]:
        async with Simulator(SimulatorSettings(port=0)) as simulator:
            for day, model, workspace, usage in charges:
                found = CATALOGUE.find(model)
                assert found is not None
                simulator.world.bill.charge(
                    found,
                    usage,
                    request=0,
                    message_id="",
                    request_id="",
                    organization="0f2f0c5e-5d7c-4e6a-9b43-1c0f5a2d7e10",
                    workspace=workspace or "wrkspc_01Simulated",
                    wall_s=MONDAY + day * DAY_S,
                    complete=True,
                )
            return await asyncio.to_thread(ask, simulator.port, path, query)

    return asyncio.run(main())


def moment(day: float) -> str:
    return datetime.fromtimestamp(MONDAY + day * DAY_S, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("key", "message"), [("sk-ant-api03-x", "invalid x-api-key"), (None, "x-api-key header is required")]
)
def test_a_key_for_messages_reads_no_report(simulator: Any, key: str | None, message: str) -> None:
    for path in (USAGE, COST):
        status, said = ask(simulator.port, path, [("starting_at", moment(0))], key)
        assert status == 401
        assert said["error"] == {"type": "authentication_error", "message": message}


def test_an_admin_key_calls_no_model_and_reads_its_own_organization(start: Any) -> None:
    running = start(api_keys=("sk-ant-api03-a=acme/w1", "sk-ant-admin01-a=acme", "sk-ant-admin01-b=other"))
    body = json.dumps({"model": "claude-sonnet-4-6", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]})
    statuses = []
    for key in ("sk-ant-admin01-a", "sk-ant-api03-a"):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        headers = {"x-api-key": key, "anthropic-version": "2023-06-01", "content-type": "application/json"}
        connection.request("POST", "/v1/messages", body, headers)
        statuses.append(connection.getresponse().status)
        connection.close()
    assert statuses == [401, 200]
    spent = {}
    for key in ("sk-ant-admin01-a", "sk-ant-admin01-b"):
        yesterday = datetime.fromtimestamp(time.time() - DAY_S, tz=UTC)  # midnight may pass meanwhile
        _, report = ask(running.port, COST, [("starting_at", yesterday.isoformat())], key)
        spent[key] = [result["amount"] for bucket in report["data"] for result in bucket["results"]]
    bill = running.get("/sim/bill")["total"]["cost_nanousd"]
    assert [round(Decimal(amount) * 10**7) for amount in spent["sk-ant-admin01-a"]] == [bill]
    assert spent["sk-ant-admin01-b"] == []


def test_usage_has_every_kind_in_whole_days_and_days_without_calls() -> None:
    usage = Usage(1, 2, 3, 4, 5, web_searches=6)
    status, report = with_bill(
        USAGE,
        [("starting_at", moment(0.7)), ("ending_at", moment(3.2))],
        (0, "claude-sonnet-4-6", "", usage),
        (2.9, "claude-sonnet-4-6", "w", usage),
        (2.9, "claude-haiku-4-5", "", usage),
        (3, "claude-haiku-4-5", "", usage),
    )
    assert status == 200
    assert [bucket["starting_at"] for bucket in report["data"]] == [moment(day) for day in range(3)]
    assert [bucket["ending_at"] for bucket in report["data"]] == [moment(day + 1) for day in range(3)]
    first, empty, last = (bucket["results"] for bucket in report["data"])
    assert empty == []
    assert first == [
        {
            "uncached_input_tokens": 1,
            "cache_creation": {"ephemeral_1h_input_tokens": 4, "ephemeral_5m_input_tokens": 3},
            "cache_read_input_tokens": 2,
            "output_tokens": 5,
            "server_tool_use": {"web_search_requests": 6},
            "account_id": None,
            "service_account_id": None,
            "api_key_id": None,
            "workspace_id": None,
            "model": None,
            "service_tier": None,
            "context_window": None,
            "inference_geo": None,
        }
    ]
    assert [result["output_tokens"] for result in last] == [10]
    assert (report["has_more"], report["next_page"]) == (False, None)


def test_groups_part_the_results_and_the_default_workspace_has_no_id() -> None:
    _, report = with_bill(
        USAGE,
        [("starting_at", moment(0)), ("ending_at", moment(1))]
        + [("group_by[]", name) for name in ("model", "workspace_id", "service_tier")],
        (0, "claude-sonnet-4-6", "", Usage(output_tokens=1)),
        (0, "claude-sonnet-4-6", "w", Usage(output_tokens=2)),
        (0, "claude-sonnet-4-6", "w", Usage(output_tokens=4, service_tier="batch")),
    )
    (bucket,) = report["data"]
    found = {
        (one["model"], one["workspace_id"], one["service_tier"]): one["output_tokens"] for one in bucket["results"]
    }
    assert found == {
        ("claude-sonnet-4-6", None, "standard"): 1,
        ("claude-sonnet-4-6", "w", "standard"): 2,
        ("claude-sonnet-4-6", "w", "batch"): 4,
    }


def test_cost_is_described_by_model_and_kind_in_cents() -> None:
    charges = (
        (0, "claude-sonnet-4-6", "", Usage(input_tokens=1_000, output_tokens=100, web_searches=2)),
        (0, "claude-sonnet-4-6", "", Usage(output_tokens=1, service_tier="batch")),
    )
    span = [("starting_at", moment(0)), ("ending_at", moment(1))]
    _, described = with_bill(COST, [*span, ("group_by[]", "description")], *charges)
    items = {
        (one["cost_type"], one["token_type"], one["model"], one["service_tier"]): one["amount"]
        for one in described["data"][0]["results"]
    }
    assert items == {
        ("tokens", "uncached_input_tokens", "claude-sonnet-4-6", "standard"): "0.3",
        ("tokens", "output_tokens", "claude-sonnet-4-6", "standard"): "0.15",
        ("web_search", None, None, None): "2",
        ("tokens", "output_tokens", "claude-sonnet-4-6", "batch"): "0.00075",
    }
    _, whole = with_bill(COST, span, *charges)
    (one,) = whole["data"][0]["results"]
    assert (one["amount"], one["currency"], one["description"], one["model"]) == ("2.45075", "USD", None, None)


def test_pages_follow_one_another_to_the_end() -> None:
    async def main() -> list[list[int]]:
        pages: list[list[int]] = []
        async with Simulator(SimulatorSettings(port=0)) as simulator:
            query = [("starting_at", moment(0)), ("ending_at", moment(10)), ("limit", "4")]
            more: list[tuple[str, str]] = []
            while not pages or more:
                _, report = await asyncio.to_thread(ask, simulator.port, USAGE, query + more)
                pages.append([datetime.fromisoformat(bucket["starting_at"]).day for bucket in report["data"]])
                assert report["has_more"] == (report["next_page"] is not None)
                more = [("page", report["next_page"])] if report["has_more"] else []
        return pages

    assert asyncio.run(main()) == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]


@pytest.mark.parametrize(
    ("path", "query", "word"),
    [
        (USAGE, [], "starting_at: Field required"),
        (USAGE, [("starting_at", "monday")], "valid datetime"),
        (USAGE, [("starting_at", moment(1)), ("ending_at", moment(0))], "after starting_at"),
        (USAGE, [("starting_at", moment(0)), ("limit", "32")], "between 1 and 31"),
        (USAGE, [("starting_at", moment(0)), ("limit", "1441"), ("bucket_width", "1m")], "between 1 and 1440"),
        (USAGE, [("starting_at", moment(0)), ("bucket_width", "1w")], "bucket_width"),
        (USAGE, [("starting_at", moment(0)), ("group_by[]", "shoe")], "group_by"),
        (USAGE, [("starting_at", moment(0)), ("page", "page_!")], "next_page"),
        (COST, [("starting_at", moment(0)), ("bucket_width", "1h")], "'1d'"),
        (COST, [("starting_at", moment(0)), ("group_by[]", "model")], "'description'"),
    ],
)
def test_a_query_that_makes_no_sense_is_a_400(simulator: Any, path: str, query: list[Any], word: str) -> None:
    status, said = ask(simulator.port, path, query)
    assert status == 400
    assert word in said["error"]["message"]
