"""What a run is judged by: the simulator's record of every call it got, and how the gateway's queues stood meanwhile.

What it is: reading, and sums over what was read. The simulator shares no code with the gateway, so it is believed.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from load.crowd import at
from load.stage import Place, get_json

NUMBER_IN_BODY = re.compile(rb"\[(\d+)\]")
"""Questions begin with their number, which tells attempts of one request from those of another."""


@dataclass(frozen=True)
class Arrival:
    """One call as the simulator received it."""

    serial: int
    """Its number at the simulator, from 1."""
    received_at: float
    """Monotonic seconds."""
    model: str
    status: int | None
    fault: str
    """Empty where the simulator meant well."""
    input_tokens: int
    """That count against the input limit: 0 where they were given back."""
    cost_nanousd: int
    complete: bool
    number: int | None = None
    """Of the question, where bodies were read."""

    @property
    def limited(self) -> bool:
        """Refused by the simulator's limits, and not by an order to fail."""
        return self.status == 429 and not self.fault


def count_of(simulator_url: str) -> int:
    """How many requests the simulator has had."""
    count: int = get_json(f"{simulator_url}/sim/requests?limit=0")["count"]
    return count


def arrivals(simulator_url: str, *, since: int = 0, bodies: bool = False) -> list[Arrival]:
    """Every call to /v1/messages after that number, in order."""
    found = get_json(f"{simulator_url}/sim/requests?since={since}&limit=10000&body={int(bodies)}")["requests"]
    calls = []
    for one in found:
        if one["path"] != "/v1/messages":
            continue
        usage = one["usage"] or {}
        number = NUMBER_IN_BODY.search(base64.b64decode(one.get("body_base64") or "")) if bodies else None
        calls.append(
            Arrival(
                serial=one["number"],
                received_at=one["received_s"],
                model=one["model"] or "",
                status=one["status"],
                fault=one["fault"] or "",
                input_tokens=usage.get("input_tokens", 0) + usage.get("write_5m_tokens", 0),
                cost_nanousd=one["cost_nanousd"],
                complete=one["end"] == "complete",
                number=int(number[1]) if number else None,
            )
        )
    return calls


@dataclass(frozen=True)
class ClassMoment:
    """How one model class stood when it was looked at."""

    waiting: int
    held: bool
    """Its model's breaker was not closed: who waits, waits for it and not for the limits."""


@dataclass
class Watch:
    """Looks at `/admin/limits` at a steady pace while a run goes on: `run` is a task beside it."""

    place: Place
    every_s: float
    models: dict[str, str]
    """Class by model, for those that the run asks."""
    moments: list[tuple[float, dict[str, ClassMoment]]] = field(default_factory=list)

    async def run(self) -> None:
        """Look until cancelled."""
        due = time.monotonic()
        while True:
            view = await asyncio.to_thread(get_json, f"{self.place.operator_url}/admin/limits", key=self.place.key)
            breakers = {self.models.get(one["model"], ""): one["state"] for one in view["breakers"]}
            classes = {
                one["name"]: ClassMoment(
                    waiting=one["waiting"],
                    held=breakers.get(one["name"], "closed") != "closed",
                )
                for one in view["classes"]
            }
            self.moments.append((time.monotonic(), classes))
            due = max(due + self.every_s, time.monotonic())
            await at(due)

    def demand(self, class_id: str, begin: float, end: float) -> list[tuple[float, float]]:
        """Spans within these moments in which somebody waited for a class whose model was up."""
        spans: list[tuple[float, float]] = []
        for (since, before), (until, after) in pairwise(self.moments):
            was, then = before.get(class_id), after.get(class_id)
            if was is None or then is None or was.held or then.held or not (was.waiting and then.waiting):
                continue
            since, until = max(since, begin), min(until, end)
            if since < until:
                if spans and spans[-1][1] == since:
                    spans[-1] = (spans[-1][0], until)
                else:
                    spans.append((since, until))
        return spans

    def waiting_max(self) -> int:
        """The longest the queues were, over all classes."""
        return max((sum(one.waiting for one in classes.values()) for _, classes in self.moments), default=0)


def tokens_within(calls: Iterable[Arrival], models: Sequence[str], spans: Sequence[tuple[float, float]]) -> int:
    """Input tokens that arrived for these models within these spans."""
    return sum(
        call.input_tokens
        for call in calls
        if call.model in models and any(since <= call.received_at < until for since, until in spans)
    )


def attempts_of_each(calls: Iterable[Arrival]) -> Counter[int]:
    """Attempts by the number of their question."""
    return Counter(call.number for call in calls if call.number is not None)
