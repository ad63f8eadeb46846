"""The limits of one process: the policy object itself, with a clock.

What it is: `interfaces.Limits` for a gateway that shares its limits with nobody. What it is not: the fallback of
several processes that have lost Redis; that is in `redis_limits.py`, and gives each of them a share.
"""

from __future__ import annotations

from collections.abc import Callable

from headgate.policy.limiter import Ask, ClassLimits, ClassSnapshot, Limiter, Subject, Verdict
from headgate.wire.headers import RateLimits

EXPIRE_EVERY_S = 1.0
"""A look at every attempt under way, which is 0.1 ms for 5,000 of them."""


class LocalLimits:
    """See `interfaces.Limits`. Every answer comes before the call returns."""

    shared = False
    replicas = 1

    def __init__(self, limiter: Limiter, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._limiter = limiter
        self._clock = clock
        self._expire_at = 0.0

    def admit(self, ask: Ask, answered: Callable[[Verdict], None]) -> None:
        """See `Limits.admit`."""
        answered(self._limiter.admit(ask, self._clock()))

    def correct(self, ask_id: str, *, input_tokens: int, output_tokens: int) -> None:
        """See `Limits.correct`."""
        self._limiter.correct(ask_id, input_tokens=input_tokens, output_tokens=output_tokens, now=self._clock())

    def settle(self, ask_id: str, *, input_tokens: int, output_tokens: int) -> None:
        """See `Limits.settle`."""
        self._limiter.settle(ask_id, input_tokens=input_tokens, output_tokens=output_tokens, now=self._clock())

    def renew(self, ask_id: str, *, lease_s: float) -> None:
        """See `Limits.renew`."""
        self._limiter.renew(ask_id, lease_s=lease_s, now=self._clock())

    def observe(self, ask_id: str, rate_limits: RateLimits) -> None:
        """See `Limits.observe`."""
        self._limiter.observe(ask_id, rate_limits, self._clock())

    def throttled(self, class_id: str, limits: ClassLimits, *, retry_after_s: float | None, ramp: bool) -> None:
        """See `Limits.throttled`."""
        self._limiter.throttled(class_id, limits, retry_after_s=retry_after_s, ramp=ramp, now=self._clock())

    def snapshot(self, class_id: str, limits: ClassLimits) -> ClassSnapshot:
        """See `Limits.snapshot`."""
        return self._limiter.snapshot(class_id, limits, self._clock())

    def subject_level(self, subject: Subject) -> float | None:
        """See `Limits.subject_level`."""
        return self._limiter.subject_level(subject, self._clock())

    def effective(self, class_id: str, limits: ClassLimits) -> ClassLimits:
        """See `Limits.effective`."""
        return self._limiter.effective(class_id, limits)

    def tick(self, now: float) -> None:
        """See `Limits.tick`."""
        if now >= self._expire_at:
            self._expire_at = now + EXPIRE_EVERY_S
            self._limiter.expire(now)
