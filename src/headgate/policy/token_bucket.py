"""A level that refills continuously up to a capacity, and may be driven below zero by what turned out dearer.

Pure arithmetic on floats; time is an argument. `policy/limiter.py` decides with it, and the script that does the same
in Redis repeats it operation by operation, so that both come to the same bits.
"""

from __future__ import annotations

import math

SLACK = 1e-6
"""What a level may lack. Without it a float that is one bit short would be told to wait for no time at all."""


def refilled(level: float, *, at: float, now: float, rate_s: float, capacity: float) -> float:
    """The level now, after `rate_s` units a second since `at`; at most `capacity`. A clock gone back adds nothing."""
    if now > at:
        level = level + (now - at) * rate_s
    return min(level, capacity)


def wait_s(level: float, need: float, *, rate_s: float, capacity: float) -> float:
    """Seconds until `need` may be taken, 0.0 when it may be now, infinite where nothing refills.

    More than the capacity never comes together: such a need waits for a full bucket, and leaves a debt behind.
    """
    short = min(need, capacity) - level
    if short <= SLACK:
        return 0.0
    return short / rate_s if rate_s > 0.0 else math.inf
