"""Message Batches: their life on a clock that runs faster, and their results. Asks for answers through `Answerer`;
knows no socket.

A batch is worked off in order, a slice at a time, so that 100,000 requests never hold up a stream; its results come
shuffled, its counts stay at `processing` until the whole batch ends (docs "batch processing"). Times are true
wall-clock times; only durations are divided by the clock's factor: at 60, the 24 hours to expiry are 24 minutes.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from headgate.simulator.cache import Scope
from headgate.simulator.errors import ApiError, Rejected, default_error, invalid
from headgate.simulator.jsonvalue import JsonObject, list_in, object_in, text_in
from headgate.simulator.limits import rfc3339
from headgate.simulator.validate import TOOL_NAME

Outcome = Literal["succeeded", "errored", "canceled", "expired"]
OUTCOMES: tuple[Outcome, ...] = ("succeeded", "errored", "canceled", "expired")

REQUESTS_MAX = 100_000
EXPIRY_S = 24 * 3_600.0
BATCH_START_S = 30.0
"""Before the first request of a batch is worked on, at clock 1."""
REQUEST_S = 0.5
"""For each request, at clock 1."""
SLICE = 50
"""Requests worked off without letting anything else run."""
SLICE_S = 0.02
BATCHES_MAX = 1_000

Answerer = Callable[[JsonObject, "Batch"], tuple[Outcome, JsonObject]]
"""Answers one request's params: its outcome, and the `result` object."""


@dataclass(slots=True)
class Batch:
    """One batch. Times are seconds since 1970."""

    id: str
    scope: Scope
    betas: str | None
    version: str
    requests: list[tuple[str, JsonObject]]
    created_s: float
    expires_s: float
    due_s: float
    """When its work is done, if nothing stops it."""
    status: Literal["in_progress", "canceling", "ended"] = "in_progress"
    cancel_s: float | None = None
    ended_s: float | None = None
    done: int = 0
    """Requests worked off; they count as `processing` until the end."""
    lines: list[bytes] = field(default_factory=list)
    counts: dict[Outcome, int] = field(default_factory=dict)

    def as_json(self, results_url: str) -> JsonObject:
        """The batch as the API shows it; `results_url` appears once it ended."""
        ended = self.status == "ended"
        counts: JsonObject = {"processing": 0 if ended else len(self.requests)}
        for outcome in OUTCOMES:
            counts[outcome] = self.counts.get(outcome, 0) if ended else 0
        return {
            "id": self.id,
            "type": "message_batch",
            "processing_status": self.status,
            "request_counts": counts,
            "created_at": rfc3339(self.created_s),
            "expires_at": rfc3339(self.expires_s),
            "ended_at": None if self.ended_s is None else rfc3339(self.ended_s),
            "cancel_initiated_at": None if self.cancel_s is None else rfc3339(self.cancel_s),
            "archived_at": None,
            "results_url": results_url if ended else None,
        }


class Batches:
    """Every batch, newest last."""

    def __init__(self, *, clock_factor: float, answer: Answerer) -> None:
        self._factor = clock_factor
        self._answer = answer
        self._batches: OrderedDict[str, Batch] = OrderedDict()

    def create(
        self, batch_id: str, scope: Scope, body: JsonObject, *, betas: str | None, version: str, wall_s: float
    ) -> Batch:
        """A new batch. Rejected when its list is wrong; what is wrong inside a request shows in the results."""
        requests = _requests(body)
        work_s = (BATCH_START_S + REQUEST_S * len(requests)) / self._factor
        batch = Batch(
            batch_id, scope, betas, version, requests, wall_s, wall_s + EXPIRY_S / self._factor, wall_s + work_s
        )
        self._batches[batch_id] = batch
        while len(self._batches) > BATCHES_MAX:
            self._batches.popitem(last=False)
        return batch

    def find(self, batch_id: str, scope: Scope) -> Batch:
        """The batch of that id in the scope's workspace; Rejected with 404."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.scope != scope:
            raise Rejected(default_error(404))
        return batch

    def of(self, scope: Scope) -> dict[str, Batch]:
        """The batches of a workspace, newest first."""
        return {name: batch for name, batch in reversed(self._batches.items()) if batch.scope == scope}

    def cancel(self, batch: Batch, wall_s: float) -> None:
        """Stops what has not begun; a batch that ended stays as it is."""
        if batch.status == "in_progress":
            batch.status = "canceling"
            batch.cancel_s = wall_s

    def delete(self, batch: Batch) -> None:
        """Forgets a batch; Rejected while it has not ended."""
        if batch.status != "ended":
            raise Rejected(invalid("Message Batches can only be deleted once they have ended; cancel it first."))
        del self._batches[batch.id]

    def clear(self) -> None:
        """Forgets all; work under way finds nothing left to do."""
        for batch in self._batches.values():
            batch.status = "ended"
        self._batches.clear()

    def work(self, batch: Batch, wall_s: float, dice: random.Random) -> float | None:
        """Works off what is due, at most a slice. Returns in how many seconds to call again, or None once the batch
        ended.
        """
        if batch.status == "ended":
            return None
        stop: Outcome | None = (
            "canceled" if batch.status == "canceling" else "expired" if wall_s >= batch.expires_s else None
        )
        share = (wall_s - batch.created_s) / max(batch.due_s - batch.created_s, 1e-9)
        due = len(batch.requests) if stop or share >= 1.0 else int(len(batch.requests) * share)
        for custom_id, params in batch.requests[batch.done : min(due, batch.done + SLICE)]:
            outcome, result = (stop, {"type": stop}) if stop else self._answer(params, batch)
            batch.counts[outcome] = batch.counts.get(outcome, 0) + 1
            batch.lines.append(msgspec.json.encode({"custom_id": custom_id, "result": result}) + b"\n")
            batch.done += 1
        if batch.done < len(batch.requests) or (share < 1.0 and not stop):
            return SLICE_S
        dice.shuffle(batch.lines)
        batch.status = "ended"
        batch.ended_s = wall_s
        return None


def _requests(body: JsonObject) -> list[tuple[str, JsonObject]]:
    raw = list_in(body.get("requests"))
    if not raw:
        raise Rejected(invalid("requests: List should have at least 1 item"))
    if len(raw) > REQUESTS_MAX:
        raise Rejected(ApiError(413, f"requests: at most {REQUESTS_MAX:,} requests are allowed in a batch"))
    found: dict[str, JsonObject] = {}
    for position, item in enumerate(raw):
        custom_id = text_in(object_in(item).get("custom_id"))
        params = object_in(item).get("params")
        if not TOOL_NAME.fullmatch(custom_id):
            raise Rejected(
                invalid(f"requests.{position}.custom_id: String should match pattern '^[a-zA-Z0-9_-]{{1,64}}$'")
            )
        if custom_id in found:
            raise Rejected(invalid(f"requests.{position}.custom_id: custom_id must be unique: {custom_id}"))
        if not isinstance(params, dict):
            raise Rejected(invalid(f"requests.{position}.params: Field required"))
        found[custom_id] = params
    return list(found.items())
