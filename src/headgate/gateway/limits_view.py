"""What `/admin/limits` shows: how each model class stands, who waits, which breakers are open. Read-only, JSON."""

from __future__ import annotations

import msgspec

from headgate.gateway.traffic import Traffic

QUEUED_MAX = 200
"""Of those that wait, the first in line are shown."""


class ClassView(msgspec.Struct, frozen=True):
    """One model class. `limit` and `level` are requests, input and output tokens; null is without limit."""

    name: str
    limit: dict[str, float | None]
    level: dict[str, int | None]
    learned: dict[str, float | None]
    """What Anthropic's headers said, where they said anything."""
    frozen_s: float
    pace: float
    burst: float
    waiting: int
    waiting_bytes: int
    people: int
    background: int
    oldest_wait_s: float
    expected_wait_s: float
    """Of an arrival now."""
    blocked_by: str


class BreakerLine(msgspec.Struct, frozen=True):
    """One model's breaker."""

    model: str
    state: str
    for_s: float
    retry_in_s: float
    failures_in_a_row: int
    window_outcomes: int
    window_failures: int
    reopened: int
    transitions: int


class QueuedView(msgspec.Struct, frozen=True):
    """One request that waits."""

    call_id: str
    user: str
    model: str
    position: int
    expected_wait_s: float
    waited_s: float


class LimitsView(msgspec.Struct, frozen=True):
    """The whole page. `shared` tells whether the limits are those of all replicas (Redis) or this process's share."""

    shared: bool
    replicas: int
    spend_cap: str
    classes: list[ClassView]
    breakers: list[BreakerLine]
    waiting: list[QueuedView]


_DIMENSIONS = ("requests", "input_tokens", "output_tokens")


def limits_view(traffic: Traffic, now: float) -> LimitsView:
    """How it stands at `now`, monotonic seconds. For the loop's thread."""
    classes = []
    for name, limits, queue in traffic.lanes():
        stands, line = traffic.limits.snapshot(name, limits), queue.snapshot(now)
        classes.append(
            ClassView(
                name=name,
                limit=dict(zip(_DIMENSIONS, stands.limits, strict=True)),
                level=dict(zip(_DIMENSIONS, stands.levels, strict=True)),
                learned=dict(zip(_DIMENSIONS, stands.learned, strict=True)),
                frozen_s=round(stands.frozen_s, 1),
                pace=round(stands.pace, 3),
                burst=round(stands.burst, 3),
                waiting=line.waiting,
                waiting_bytes=line.bytes,
                people=line.people,
                background=line.background,
                oldest_wait_s=round(line.oldest_wait_s, 1),
                expected_wait_s=round(line.expected_wait_s, 1),
                blocked_by=line.reason,
            )
        )
    waiting = sorted(traffic.waiting(), key=lambda one: one[1])[:QUEUED_MAX]
    return LimitsView(
        shared=traffic.limits.shared,
        replicas=traffic.limits.replicas,
        spend_cap=traffic.account.code,
        classes=classes,
        breakers=[
            BreakerLine(
                model=one.model,
                state=one.state.value,
                for_s=round(one.for_s, 1),
                retry_in_s=round(one.retry_in_s, 1),
                failures_in_a_row=one.failures_in_a_row,
                window_outcomes=one.window_outcomes,
                window_failures=one.window_failures,
                reopened=one.reopened,
                transitions=one.transitions,
            )
            for one in traffic.breakers.snapshot(now)
        ],
        waiting=[
            QueuedView(
                one.want.call_id,
                one.want.user,
                one.want.model,
                position,
                round(expected_s, 1),
                round(now - one.enqueued_at, 1),
            )
            for one, position, expected_s in waiting
        ],
    )
