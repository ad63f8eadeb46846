"""The reader of Anthropic's reports, against a server that answers what it is told to."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headgate.cli.admin_api import PAGES_MAX, AdminApi, ReportUnreadable

KEY = "sk-ant-admin01-secret"
Answer = tuple[int, dict[str, str], bytes]


class Server:
    """Answers every request by `answer(number)`; `seen` holds paths and keys."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []
        self.answer: Callable[[int], Answer] = lambda _: page("")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append((self.path, self.headers["x-api-key"]))
                status, headers, body = outer.answer(len(outer.seen))
                self.send_response(status)
                for name, value in ({"content-length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


def page(next_page: str) -> Answer:
    result = {"amount": "1", "workspace_id": None, "model": "m"}
    bucket = {"starting_at": "2026-11-01T00:00:00Z", "ending_at": "2026-11-02T00:00:00Z", "results": [result]}
    body = {"data": [bucket], "has_more": bool(next_page), "next_page": next_page or None}
    return 200, {}, json.dumps(body).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def costs(server: Server) -> int:
    return len(AdminApi(server.url, KEY).costs(first_day=20_758, end_day=20_759))


def test_pages_are_asked_until_there_is_no_more(server: Server) -> None:
    server.answer = lambda number: page("" if number == 3 else f"page_{number}")
    assert costs(server) == 3
    assert [path.rpartition("&")[2] for path, _ in server.seen] == ["limit=31", "page=page_1", "page=page_2"]
    assert {key for _, key in server.seen} == {KEY}


def test_usage_is_asked_where_usage_is(server: Server) -> None:
    assert len(AdminApi(server.url + "/", KEY).usage(first_day=20_758, end_day=20_759)) == 1
    assert server.seen[0][0].startswith("/v1/organizations/usage_report/messages?starting_at=2026-11-01T00")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {}, b'{"error":{"message":"invalid x-api-key"}}'), ("401", "invalid x-api-key", "ANTHROPIC_ADMIN_KEY")),
        ((403, {}, b"<html>"), ("403", "https://platform.claude.com/settings/admin-keys")),
        ((429, {}, b"{}"), ("429", "Try again")),
        ((529, {}, b""), ("529", "Try again")),
        ((404, {}, b'{"error":{"message":"Not found"}}'), ("404: Not found",)),
        ((200, {}, b"<html>"), ("no page of a report",)),
        ((200, {"content-length": "999"}, b'{"data":'), ("no page of a report",)),
    ],
)
def test_what_is_no_report_is_refused_in_words(server: Server, answer: Answer, words: tuple[str, ...]) -> None:
    server.answer = lambda _: answer
    with pytest.raises(ReportUnreadable) as refused:
        costs(server)
    for word in words:
        assert word in str(refused.value)
    assert KEY not in str(refused.value)


def test_a_redirect_is_not_followed_with_the_key(server: Server) -> None:
    server.answer = lambda _: (302, {"location": f"{server.url}/elsewhere"}, b"")
    with pytest.raises(ReportUnreadable, match="302"):
        costs(server)
    assert len(server.seen) == 1


def test_pages_that_go_round_or_never_end_are_given_up(server: Server) -> None:
    server.answer = lambda _: page("page_1")
    with pytest.raises(ReportUnreadable, match="do not end"):
        costs(server)
    assert len(server.seen) == 2
    server.seen.clear()
    server.answer = lambda number: page(f"page_{number}")
    with pytest.raises(ReportUnreadable, match="do not end"):
        costs(server)
    assert len(server.seen) == PAGES_MAX


def test_nobody_there_is_said_in_words() -> None:
    with pytest.raises(ReportUnreadable, match="does not answer"):
        AdminApi("http://127.0.0.1:1", KEY).costs(first_day=1, end_day=2)


@pytest.mark.parametrize("key", ["", "sk-ant-api03-x", "sk-ant-admin01-x\r\nhost: y", "sk-ant-admin01-ü"])
def test_what_cannot_be_an_admin_key_is_not_sent(key: str) -> None:
    with pytest.raises(ReportUnreadable, match="sk-ant-admin") as refused:
        AdminApi("http://127.0.0.1:1", key)
    assert not key or key not in str(refused.value)
