"""What an operator should look at, told once.

What it is: the record of an alert, and `AlertBook`, which lets one alert of a cause through until it ends or a day is
over. What it is not: what writes, sends or shows it (`storage/alerts.py`, `gateway/guards.py`), or a clock.

Failure-model §2.8: a thousand breaches of one line are one message.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import msgspec

from headgate.policy.records import Record

AlertKind = Literal["spend_velocity", "loop", "budget_alert_line", "budget_exhausted"]
TOLD_AGAIN_AFTER_NS = 24 * 3600 * 10**9
"""What has not ended by then is told again."""
OPEN_MAX = 1_000
"""Causes that a book holds, some 0.5 MB at most. Beyond it the one that was told longest ago may be told again."""


class CallCost(Record, frozen=True, gc=False):
    """A call that had its part in it, and what it cost (0 where money is not the matter)."""

    call_id: str
    cost_nanousd: int = 0


class Alert(Record, frozen=True, gc=False):
    """One alert. Times are UTC nanoseconds."""

    kind: AlertKind
    subject: str
    """Whom or what it is about: `user:alice`, `key:3x9…`, `tier:free`, `all`, a model id."""
    message: str
    """What happened and how to mend it, in plain words. No prompt text and no key."""
    at_ns: int
    calls: tuple[CallCost, ...] = ()
    """The last that led to it, at most ten, the latest last."""
    repeats: int = 0
    """How often the same was met again since this was told."""
    id: int = 0
    """In the table; 0 until it is there."""
    ended_at_ns: int | None = None
    ended_by: str = ""
    """A key's owner, or what ended it by itself (`time`)."""


class _Open:
    __slots__ = ("repeats", "told_at_ns")

    def __init__(self, told_at_ns: int) -> None:
        self.told_at_ns = told_at_ns
        self.repeats = 0


class AlertBook:
    """Which causes have been told and have not ended. Its times are those of the alerts; for one thread."""

    __slots__ = ("_open", "_open_max")

    def __init__(self, *, open_max: int = OPEN_MAX) -> None:
        self._open: OrderedDict[tuple[str, str], _Open] = OrderedDict()
        """By kind and subject; the one that was told longest ago first."""
        self._open_max = open_max

    def __len__(self) -> int:
        return len(self._open)

    def raised(self, alert: Alert) -> Alert | None:
        """The alert to tell; None when its cause was told within a day and goes on.

        Told again after a day, it says how often it was met meanwhile.
        """
        cause = (alert.kind, alert.subject)
        known = self._open.get(cause)
        if known is not None and alert.at_ns - known.told_at_ns < TOLD_AGAIN_AFTER_NS:
            known.repeats += 1
            return None
        self._open[cause] = _Open(alert.at_ns)
        self._open.move_to_end(cause)
        if len(self._open) > self._open_max:
            self._open.popitem(last=False)
        return alert if known is None else msgspec.structs.replace(alert, repeats=known.repeats)

    def ended(self, kind: str, subject: str) -> bool:
        """The cause is gone, and the next of its kind is told. False when it was not known."""
        return self._open.pop((kind, subject), None) is not None

    def is_open(self, kind: str, subject: str) -> bool:
        """Whether it was told and has not ended; after a day it still has not."""
        return (kind, subject) in self._open

    def repeats(self, kind: str, subject: str) -> int:
        """How often the cause was met again since it was told."""
        known = self._open.get((kind, subject))
        return 0 if known is None else known.repeats
