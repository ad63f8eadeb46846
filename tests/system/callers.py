"""People who ask through an app's key or one of their own, and what the operator can read about them afterwards.

What it is: requests in the gateway's words (user, tier, conversation, label, deadline), sent by `scripted.fetch`. What
it is not: a retry, an SDK, or a judge of what comes back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.system.conftest import Gateway, until
from tests.system.raw_http import ask
from tests.system.scripted import Reply, fetch

from headgate.storage.database import open_database
from headgate.storage.keys import KeyStore

SONNET = "claude-sonnet-4-6"
HAIKU = "claude-haiku-4-5"
OPUS = "claude-opus-4-7"


def asking(text: str = "Xin chào", *, model: str = SONNET, max_tokens: int = 100, **more: Any) -> bytes:
    """A body of one message."""
    fields = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]}
    return json.dumps(fields | more).encode()


def on_behalf(
    user: str = "", *, tier: str = "", conversation: str = "", label: str = "", deadline_s: float | None = None
) -> list[tuple[str, str]]:
    """The headers that an app speaks for its people with."""
    said = {"user": user, "tier": tier, "conversation": conversation, "endpoint": label}
    said["deadline-s"] = "" if deadline_s is None else str(deadline_s)
    return [(f"x-headgate-{name}", value) for name, value in said.items() if value]


@dataclass
class Desk:
    """A gateway with a key of an app that also reads and resumes as its operator."""

    gateway: Gateway
    key: str

    @classmethod
    def of(cls, gateway: Gateway) -> Desk:
        """With a fresh key."""
        desk = cls(gateway, "")
        (desk.key,) = desk.keys({"name": "desk", "scopes": ("messages", "app", "admin:read", "admin:write")})
        return desk

    def keys(self, *wanted: dict[str, Any]) -> list[str]:
        """Fresh keys (see `KeyStore.create`), known to the running gateway. The command line takes longer for each."""
        engine = open_database(self.gateway.data_dir, now_ns=time.time_ns)
        try:
            store = KeyStore(engine, now_ns=time.time_ns)
            keys = [store.create(**one).key for one in wanted]
        finally:
            engine.dispose()
        for key in keys:
            until(lambda key=key: self._knows(key), what="the gateway to know a fresh key")
        return keys

    def _knows(self, key: str) -> bool:
        return ask(self.gateway.operator_url, "GET", "/admin/usage", {"x-api-key": key}).status != 401

    def ask(
        self, user: str, body: bytes | None = None, *, key: str = "", within_s: float = 60.0, **whose: Any
    ) -> Coroutine[Any, Any, Reply]:
        """One message of this person's; `whose` is for `on_behalf`."""
        headers = on_behalf(user, **whose)
        return fetch(self.gateway.url, key or self.key, body or asking(), headers=headers, within_s=within_s)

    def get(self, target: str, *, key: str = "", public: bool = False) -> Any:
        """What a path of the operator's listener, or of the public one, answers."""
        url = self.gateway.url if public else self.gateway.operator_url
        response = ask(url, "GET", target, {"x-api-key": key or self.key})
        assert response.status == 200, response.body
        return response.json()

    def limits(self, class_id: str) -> dict[str, Any]:
        """How one model class stands."""
        classes: list[dict[str, Any]] = self.get("/admin/limits")["classes"]
        return next(one for one in classes if one["name"] == class_id)

    def waiting(self) -> list[dict[str, Any]]:
        """Everybody who waits, as the operator sees them."""
        found: list[dict[str, Any]] = self.get("/admin/limits")["waiting"]
        return found

    def calls(self, users: Iterable[str], count: int) -> list[dict[str, Any]]:
        """So many ended calls of these users in the ledger, oldest first; more fail the test."""
        wanted = set(users)

        def read() -> list[dict[str, Any]] | None:
            found = [one for one in self.get("/admin/calls?limit=1000")["calls"] if one["user"] in wanted]
            assert len(found) <= count, found
            ended = all(one["outcome"] and one["state"] != "open" for one in found)
            return found[::-1] if len(found) == count and ended else None

        calls: list[dict[str, Any]] = until(read, what=f"{count} calls of {wanted} in the ledger")
        return calls

    def log_line(self, reply: Reply) -> dict[str, Any]:
        """The log's one line about a reply."""
        call_id = reply.headers["x-headgate-call"]
        (line,) = until(lambda: self.gateway.process.lines(event="call", call_id=call_id), what=f"a line of {call_id}")
        return line


Send = Callable[[Coroutine[Any, Any, Reply]], "asyncio.Task[Reply]"]


@asynccontextmanager
async def crowd() -> AsyncIterator[Send]:
    """Requests that are under way together. Who has no answer at the end hangs up."""
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Reply]] = []

        def send(call: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
            tasks.append(group.create_task(call))
            return tasks[-1]

        try:
            yield send
        finally:
            hang_up(tasks)


def hang_up(tasks: Iterable[asyncio.Task[Reply]]) -> None:
    """Leave, all that have no answer."""
    for task in tasks:
        task.cancel()


async def together(*calls: Coroutine[Any, Any, Reply]) -> list[Reply]:
    """The answers to requests that are sent at once."""
    return await asyncio.gather(*calls)


async def soon(condition: Callable[[], Any], *, what: str, within_s: float = 10.0) -> Any:
    """As `until`, while requests are under way."""
    return await asyncio.to_thread(until, condition, within_s=within_s, what=what)


async def so_many(tasks: Iterable[asyncio.Task[Reply]], count: int) -> list[Reply]:
    """The first answers, once there are so many."""
    watched = list(tasks)
    while sum(task.done() for task in watched) < count:
        await asyncio.wait([task for task in watched if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    return [task.result() for task in watched if task.done()]


def queue_ms(reply: Reply) -> int:
    """What the reply says of its wait."""
    return int(reply.headers["x-headgate-queue-ms"])


def told_s(reply: Reply) -> float:
    """The wait that a refusal tells, in seconds; its three ways of telling must agree."""
    wait_s = float(reply.error["details"]["retry_after_s"])
    assert wait_s <= int(reply.headers["retry-after"]) <= wait_s + 1, reply.headers
    if "retry-after-ms" in reply.headers:
        assert abs(int(reply.headers["retry-after-ms"]) / 1000 - wait_s) < 0.01
    return wait_s
