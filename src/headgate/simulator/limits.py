"""Rate limits of an organization: token buckets for requests, input and output tokens of each model class, and the
headers that tell them.

Pure: time is an argument, in seconds of one monotonic clock. Rules of docs "rate limits": continuous refill, cache
reads free, `max_tokens` without influence, output counted as it is produced.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from headgate.simulator.cache import Scope
from headgate.simulator.errors import ApiError
from headgate.simulator.models import Model
from headgate.simulator.settings import SimulatorSettings, Tier

MINUTE_S = 60.0
RAMP_WINDOW_S = 300.0
RAMP_BIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens and requests a minute; None is without limit."""

    rpm: int | None
    itpm: int | None
    otpm: int | None


OLD_SONNET: dict[Tier, Limits] = {
    "tier1": Limits(50, 30_000, 8_000),
    "tier2": Limits(1_000, 450_000, 90_000),
    "tier3": Limits(2_000, 800_000, 160_000),
    "tier4": Limits(4_000, 2_000_000, 400_000),
}
OLD_HAIKU: dict[Tier, Limits] = {
    "tier1": Limits(50, 50_000, 10_000),
    "tier2": Limits(1_000, 450_000, 90_000),
    "tier3": Limits(2_000, 1_000_000, 200_000),
    "tier4": Limits(4_000, 4_000_000, 800_000),
}
NEW: dict[Tier, Limits] = {
    "start": Limits(1_000, 2_000_000, 400_000),
    "build": Limits(5_000, 5_000_000, 1_000_000),
    "scale": Limits(10_000, 10_000_000, 2_000_000),
}
NEW_FABLE: dict[Tier, Limits] = {
    "start": Limits(1_000, 500_000, 100_000),
    "build": Limits(2_000, 1_500_000, 300_000),
    "scale": Limits(4_000, 4_000_000, 800_000),
}
"""Start, Build and Scale since 2026-06-26 (docs: api/rate-limits), tiers 1 to 4 before it (third-party tables;
Haiku's tiers 2 and 3 between its published ends are ours).
"""
COUNT_RPM: dict[Tier, int] = {"start": 2_000, "build": 4_000, "scale": 8_000}
BATCH_RPM: dict[Tier, int] = {"start": 1_000, "build": 2_000, "scale": 4_000}
COUNT_RPM_OLD = 2_000
BATCH_RPM_OLD = 1_000
UNLIMITED = Limits(None, None, None)


def limits_for(settings: SimulatorSettings, rate_class: str) -> Limits:
    """The limits of a model class under the settings."""
    tier = settings.tier
    if tier == "none":
        base = UNLIMITED
    elif tier in NEW:
        base = (NEW_FABLE if rate_class.startswith(("fable", "mythos")) else NEW)[tier]
    else:
        base = (OLD_HAIKU if rate_class.startswith("haiku") else OLD_SONNET)[tier]
    return Limits(
        rpm=base.rpm if settings.rpm is None else settings.rpm,
        itpm=base.itpm if settings.itpm is None else settings.itpm,
        otpm=base.otpm if settings.otpm is None else settings.otpm,
    )


class Bucket:
    """A level that refills continuously up to its capacity and may go below zero."""

    def __init__(self, per_minute: int, *, burst_s: float = MINUTE_S, now_s: float) -> None:
        self.per_minute = per_minute
        self.capacity = max(per_minute * burst_s / MINUTE_S, 1.0)
        self.level = self.capacity
        self._at_s = now_s

    def refill(self, now_s: float) -> float:
        """The level now. A clock that goes back adds nothing."""
        if now_s > self._at_s:
            self.level = min(self.capacity, self.level + (now_s - self._at_s) * self.per_minute / MINUTE_S)
            self._at_s = now_s
        return self.level

    def wait_s(self, need: float, now_s: float) -> float:
        """Seconds until the level is `need`; 0.0 if it is. A need above the capacity waits for a full bucket."""
        short = min(need, self.capacity) - self.refill(now_s)
        return max(0.0, short * MINUTE_S / self.per_minute) if self.per_minute else math.inf

    def full_in_s(self, now_s: float) -> float:
        """Seconds until the bucket is full."""
        return self.wait_s(self.capacity, now_s)


@dataclass(slots=True)
class ClassBuckets:
    """The buckets of one organization and model class; None is without limit."""

    requests: Bucket | None
    input: Bucket | None
    output: Bucket | None
    recent: deque[list[float]]
    """[bin start, tokens] of the last six minutes, for the ramp rule."""


class RateLimiter:
    """All buckets of all organizations."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self._settings = settings
        self._classes: dict[tuple[str, str], ClassBuckets] = {}
        self._single: dict[tuple[str, str], Bucket] = {}

    def admit(self, scope: Scope, model: Model, input_tokens: int, now_s: float) -> ApiError | None:
        """Takes a request and its uncached input, or says why not. `input_tokens` counts against the input limit."""
        buckets = self._buckets(scope, model, now_s)
        if self._ramps(buckets, input_tokens, now_s):
            return ApiError(
                429,
                "Your request rate has increased too quickly. Please ramp up more gradually.",
                "ramp_limit_exceeded",
                headers=(("retry-after", "10"),),
            )
        needs = (
            ("requests", buckets.requests, 1.0),
            ("input tokens", buckets.input, float(input_tokens)),
            ("output tokens", buckets.output, 1.0),
        )
        waits = {name: bucket.wait_s(need, now_s) for name, bucket, need in needs if bucket is not None}
        over = any(bucket is not None and need > bucket.capacity for _, bucket, need in needs)
        if over or any(wait > 0.0 for wait in waits.values()):
            name = max(waits, key=lambda key: waits[key])
            limit = next(bucket.per_minute for label, bucket, _ in needs if label == name and bucket is not None)
            return ApiError(
                429,
                f"This request would exceed your organization's rate limit of {limit:,} {name} per minute "
                f"(model class: {model.rate_class}). Please reduce the request rate.",
                headers=(("retry-after", str(max(1, math.ceil(min(waits[name], 3_600.0))))),),
            )
        if buckets.requests is not None:
            buckets.requests.level -= 1
        if buckets.input is not None:
            buckets.input.level -= input_tokens
        if self._settings.ramp_factor is not None:
            self._note(buckets, input_tokens, now_s)
        return None

    def refund_input(self, scope: Scope, model: Model, input_tokens: int, now_s: float) -> None:
        """Gives back the input of a request that failed before the model read it; the request itself stays counted."""
        bucket = self._buckets(scope, model, now_s).input
        if bucket is not None:
            bucket.level = min(bucket.capacity, bucket.refill(now_s) + input_tokens)

    def output_meter(self, scope: Scope, model: Model, now_s: float) -> Callable[[int, float], None]:
        """A function of (tokens, now) that takes produced tokens, one call an event; the level may go below zero."""
        buckets = self._buckets(scope, model, now_s)
        output = buckets.output
        ramps = self._settings.ramp_factor is not None

        def spend(output_tokens: int, now_s: float) -> None:
            if output is not None:
                output.refill(now_s)
                output.level -= output_tokens
            if ramps:
                self._note(buckets, output_tokens, now_s)

        return spend

    def admit_single(self, scope: Scope, what: str, now_s: float) -> ApiError | None:
        """Takes one call of `count_tokens` or `batches`, which have a request limit of their own."""
        if self._settings.tier == "none":
            return None
        table, default = (COUNT_RPM, COUNT_RPM_OLD) if what == "count_tokens" else (BATCH_RPM, BATCH_RPM_OLD)
        bucket = self._single.get((scope.organization, what))
        if bucket is None:
            bucket = self._single[scope.organization, what] = Bucket(
                table.get(self._settings.tier, default), now_s=now_s
            )
        wait_s = bucket.wait_s(1.0, now_s)
        if wait_s > 0.0:
            return ApiError(
                429,
                f"This request would exceed the rate limit of {bucket.per_minute:,} {what} requests per minute.",
                headers=(("retry-after", str(max(1, math.ceil(wait_s)))),),
            )
        bucket.level -= 1
        return None

    def headers(self, scope: Scope, model: Model, now_s: float, wall_s: float) -> list[tuple[str, str]]:
        """`anthropic-ratelimit-*`, as docs "rate limits" has them: remaining tokens rounded to thousands."""
        buckets = self._buckets(scope, model, now_s)
        found: list[tuple[str, str]] = []
        if buckets.requests is not None:
            found += _header("requests", buckets.requests, buckets.requests.per_minute, 1, now_s, wall_s)
        if buckets.input is not None:
            found += _header("input-tokens", buckets.input, buckets.input.per_minute, 1_000, now_s, wall_s)
        if buckets.output is not None:
            found += _header("output-tokens", buckets.output, buckets.output.per_minute, 1_000, now_s, wall_s)
        if buckets.input is not None and buckets.output is not None:
            limit = buckets.input.per_minute + buckets.output.per_minute
            left = _rounded(buckets.input.level, 1_000) + _rounded(buckets.output.level, 1_000)
            full_s = max(buckets.input.full_in_s(now_s), buckets.output.full_in_s(now_s))
            found += _header_lines("tokens", limit, left, wall_s + full_s)
        return found

    def snapshot(self, now_s: float) -> dict[str, dict[str, float | None]]:
        """Levels by `organization/class`, for people and tests."""
        return {
            f"{organization}/{rate_class}": {
                "requests": None if buckets.requests is None else buckets.requests.refill(now_s),
                "input": None if buckets.input is None else buckets.input.refill(now_s),
                "output": None if buckets.output is None else buckets.output.refill(now_s),
            }
            for (organization, rate_class), buckets in self._classes.items()
        }

    def clear(self) -> None:
        """Fills every bucket."""
        self._classes.clear()
        self._single.clear()

    def _buckets(self, scope: Scope, model: Model, now_s: float) -> ClassBuckets:
        key = (scope.organization, model.rate_class)
        buckets = self._classes.get(key)
        if buckets is None:
            limits = limits_for(self._settings, model.rate_class)
            buckets = self._classes[key] = ClassBuckets(
                None if limits.rpm is None else Bucket(limits.rpm, burst_s=self._settings.burst_s, now_s=now_s),
                None if limits.itpm is None else Bucket(limits.itpm, now_s=now_s),
                None if limits.otpm is None else Bucket(limits.otpm, now_s=now_s),
                deque(),
            )
        return buckets

    def _note(self, buckets: ClassBuckets, tokens: int, now_s: float) -> None:
        recent = buckets.recent
        if recent and now_s - recent[-1][0] < RAMP_BIN_S:
            recent[-1][1] += tokens
        else:
            recent.append([now_s, tokens])
        while recent and now_s - recent[0][0] > RAMP_WINDOW_S + MINUTE_S:
            recent.popleft()

    def _ramps(self, buckets: ClassBuckets, tokens: int, now_s: float) -> bool:
        factor = self._settings.ramp_factor
        if factor is None:
            return False
        minute = tokens + sum(count for at_s, count in buckets.recent if now_s - at_s <= MINUTE_S)
        before = sum(count for at_s, count in buckets.recent if MINUTE_S < now_s - at_s <= MINUTE_S + RAMP_WINDOW_S)
        return minute > max(self._settings.ramp_floor_tokens, factor * before * MINUTE_S / RAMP_WINDOW_S)


def _rounded(level: float, step: int) -> int:
    return max(0, round(math.floor(level) / step) * step)


def _header(name: str, bucket: Bucket, limit: int, step: int, now_s: float, wall_s: float) -> list[tuple[str, str]]:
    return _header_lines(name, limit, _rounded(bucket.refill(now_s), step), wall_s + bucket.full_in_s(now_s))


def _header_lines(name: str, limit: int, remaining: int, reset_wall_s: float) -> list[tuple[str, str]]:
    prefix = f"anthropic-ratelimit-{name}"
    return [
        (f"{prefix}-limit", str(limit)),
        (f"{prefix}-remaining", str(remaining)),
        (f"{prefix}-reset", rfc3339(reset_wall_s)),
    ]


def rfc3339(wall_s: float) -> str:
    """Seconds since 1970 as `2026-11-22T10:00:00Z`."""
    return datetime.fromtimestamp(min(wall_s, 253_402_300_799.0), tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
