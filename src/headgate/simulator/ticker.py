"""Many waits on one timer: wakes callbacks on a grid of a few milliseconds, so that 50,000 events a second need 250
wake-ups and not 50,000.

Single-threaded, one event loop. Cancels nothing: a callback that is no longer wanted must know so itself.
"""

import asyncio
import heapq
import math
from collections.abc import Callable

Wake = Callable[[float], None]
"""Called with the clock's time, in seconds."""

TICK_S = 0.004


class Ticker:
    """Waits, kept in slots of `tick_s`. A wait never ends early, and ends late by at most a slot when the loop is
    free.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float], tick_s: float = TICK_S) -> None:
        self._loop = loop
        self._clock = clock
        self._tick_s = tick_s
        self._slots: dict[int, list[Wake]] = {}
        self._order: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._armed_slot = 0
        self.late_s_max = 0.0
        """The longest a slot was woken after its time, since the last `reset`."""

    def at(self, due_s: float, wake: Wake) -> None:
        """Calls `wake` once the clock has passed `due_s`; at the next slot if it has already."""
        slot = math.ceil(due_s / self._tick_s)
        waiting = self._slots.get(slot)
        if waiting is not None:
            waiting.append(wake)
            return
        self._slots[slot] = [wake]
        heapq.heappush(self._order, slot)
        if self._timer is None or slot < self._armed_slot:
            self._arm()

    def reset(self) -> None:
        """Starts the lateness record anew."""
        self.late_s_max = 0.0

    def close(self) -> None:
        """Forgets every wait."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._slots.clear()
        self._order.clear()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_slot = self._order[0]
        self._timer = self._loop.call_later(max(0.0, self._armed_slot * self._tick_s - self._clock()), self._fire)

    def _fire(self) -> None:
        self._timer = None
        now_s = self._clock()
        while self._order and self._order[0] * self._tick_s <= now_s:
            slot = heapq.heappop(self._order)
            self.late_s_max = max(self.late_s_max, now_s - slot * self._tick_s)
            for wake in self._slots.pop(slot):
                try:
                    wake(now_s)
                except Exception as error:  # the top of background work: one stream's defect must not stop the others
                    self._loop.call_exception_handler({"message": "simulator: a wait failed", "exception": error})
        if self._order and self._timer is None:
            self._arm()
