"""`/admin/alerts` and `/admin/velocity`, asked as an application with real keys and a real table."""

import asyncio
import json
import time

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response
from structlog.testing import capture_logs

from headgate.gateway.guards import AlertSink, SpendGuard, velocity_policy
from headgate.gateway.guards_view import guards_router
from headgate.policy.records import Principal
from headgate.storage.database import open_database

USD = 10**9
NOW_NS = 1_785_000_000 * 10**9


class Denied(Exception):
    """Not this key."""


class Console:
    """The routes behind a door that knows two names."""

    def __init__(self, engine) -> None:
        self.sink = AlertSink(engine, now_ns=lambda: NOW_NS)
        policy = velocity_policy(usd_per_10_min=2, history_factor=5, hold_s=60)
        self.guard = SpendGuard(policy, self.sink, clock=lambda: 0.0)
        self.app = FastAPI()

        def allowed(*names: str):
            def check(request: Request) -> Principal:
                name = request.headers.get("x-api-key", "")
                if name not in names:
                    raise Denied
                return Principal(f"key-{name}", name)

            return check

        @self.app.exception_handler(Denied)
        def denied(_: Request, __: Denied) -> Response:
            return Response("{}", 403)

        self.app.include_router(
            guards_router(
                engine, self.guard, self.sink, reader=allowed("reader", "boss"), writer=allowed("boss"),
                now_ns=lambda: NOW_NS + 1,
            )
        )  # fmt: skip
        self.sink.start()

    def ask(self, method: str, target: str, *, key: str = "boss"):
        """Status and answer."""
        path, _, query = target.partition("?")
        answer: list[dict] = []
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
            "headers": [(b"x-api-key", key.encode())], "http_version": "1.1", "scheme": "http", "root_path": "",
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
        }  # fmt: skip

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            answer.append(message)

        asyncio.run(self.app(scope, receive, send))
        return answer[0]["status"], json.loads(b"".join(part.get("body", b"") for part in answer[1:]))

    def settled(self) -> None:
        """Everything raised so far is in the table."""
        deadline = time.monotonic() + 10.0
        while self.sink.waiting or not self.ask("GET", "/admin/alerts")[1]["alerts"]:
            assert time.monotonic() < deadline


@pytest.fixture
def console(tmp_path):
    engine = open_database(tmp_path, now_ns=time.time_ns)
    with capture_logs():
        console = Console(engine)
        yield console
        console.sink.close()
    engine.dispose()


def test_every_route_asks_for_its_scope(console):
    reads = [("GET", "/admin/alerts"), ("GET", "/admin/velocity")]
    writes = [("POST", "/admin/alerts/1/end"), ("POST", "/admin/velocity/user:an/release")]
    assert all(console.ask(*route, key="nobody")[0] == 403 for route in reads + writes)
    assert all(console.ask(*route, key="reader")[0] == 200 for route in reads)
    assert all(console.ask(*route, key="reader")[0] == 403 for route in writes)


def test_a_loop_is_seen_released_and_its_alert_ended(console):
    console.guard.settled("a/n", "k1", 3 * USD, "call_1")
    console.settled()
    (subject,) = console.ask("GET", "/admin/velocity")[1]["subjects"]
    assert (subject["subject"], subject["tripped"], subject["window_nanousd"]) == ("user:a/n", True, 3 * USD)
    (alert,) = console.ask("GET", "/admin/alerts?open=true")[1]["alerts"]
    assert (alert["kind"], alert["calls"]) == ("spend_velocity", [{"call_id": "call_1", "cost_nanousd": 3 * USD}])
    assert console.ask("POST", "/admin/velocity/user:a/n/release") == (200, {"released": "user:a/n"})
    status, said = console.ask("POST", "/admin/velocity/user:a/n/release")
    assert (status, said["error"]["details"]["error_code"]) == (404, "not_held")
    console.settled()
    deadline = time.monotonic() + 10.0
    while console.ask("GET", "/admin/alerts?open=true")[1]["alerts"]:
        assert time.monotonic() < deadline
    assert console.ask("GET", "/admin/alerts")[1]["alerts"][0]["ended_by"] == "boss"


def test_an_alert_that_was_looked_at_is_ended_once_and_the_next_is_told(console):
    console.sink.raise_alert("loop", "user:an", "why")
    console.sink.raise_alert("loop", "user:an", "why")
    console.settled()
    (alert,) = console.ask("GET", "/admin/alerts")[1]["alerts"]
    assert alert["repeats"] == 1
    status, ended = console.ask("POST", f"/admin/alerts/{alert['id']}/end")
    assert (status, ended["id"], ended["ended_by"]) == (200, alert["id"], "boss")
    for missing in (alert["id"], 99, 0, 1 << 80):
        status, said = console.ask("POST", f"/admin/alerts/{missing}/end")
        assert (status, said["error"]["details"]["error_code"]) == (404, "no_such_alert")
    assert console.sink.raise_alert("loop", "user:an", "why")


def test_a_span_that_makes_no_sense_is_refused_with_what_would(console):
    status, said = console.ask("GET", "/admin/alerts?since=lately")
    assert status == 400
    assert "2026-11-24" in said["error"]["message"]
