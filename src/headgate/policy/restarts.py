"""When a process that ended is started again, and when that is no use any more.

What it is: one of these for each process; times are arguments. What it is not: the supervisor that starts and waits
(`gateway/workers.py`), nor a judge of exit codes.
"""

from __future__ import annotations

from collections.abc import Sequence

STEADY_S = 10.0
"""Who has served this long was well: its end is the first of a row."""
DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""After the first, second, … end in a row; the last for all further ones. Never less than a second: what a process
derives from the second of its start must differ from what the one before it derived (`gateway/worker.py`, call ids)."""
HOPELESS_AFTER = 5
"""Ends in a row."""


class Restarts:
    """Starts and ends of one process. Seconds are monotonic."""

    __slots__ = ("_delays_s", "_serving_since", "_steady_s", "in_a_row")

    def __init__(self, *, delays_s: Sequence[float] = DELAYS_S, steady_s: float = STEADY_S) -> None:
        self._delays_s = delays_s
        self._steady_s = steady_s
        self._serving_since: float | None = None
        self.in_a_row = 0
        """Ends since it was well."""

    @property
    def is_hopeless(self) -> bool:
        """It has ended again and again."""
        return self.in_a_row >= HOPELESS_AFTER

    def serves(self, now: float) -> None:
        """It has started, and does its work from now on."""
        self._serving_since = now

    def ended(self, now: float) -> float:
        """It has ended, however. When to start it again; at once when it had been well."""
        since, self._serving_since = self._serving_since, None
        if since is not None and now - since >= self._steady_s:
            self.in_a_row = 0
            return now
        self.in_a_row += 1
        return now + self._delays_s[min(self.in_a_row, len(self._delays_s)) - 1]
