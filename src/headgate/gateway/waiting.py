"""A wait that can be ended early: backoff, for a client that may leave or a process that may stop meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Wait:
    """At most one wait at a time."""

    __slots__ = ("_clock", "_woken")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._woken: asyncio.Future[None] | None = None

    async def until(self, at: float) -> None:
        """Return at this second of the clock, or when `wake` is called."""
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        timer = loop.call_later(max(at - self._clock(), 0.0), self.wake)
        await self._woken
        timer.cancel()
        self._woken = None

    @property
    def waiting(self) -> bool:
        """Whether somebody waits now."""
        return self._woken is not None

    def wake(self) -> None:
        """End the wait, if there is one."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)
