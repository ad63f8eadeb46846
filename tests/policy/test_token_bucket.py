"""A level that refills: what it gains, and how long a need waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.token_bucket import SLACK, refilled, wait_s

rates = st.floats(0.01, 1e5)
capacities = st.floats(1.0, 1e7)
levels = st.floats(-1e7, 1e7)
times = st.floats(0.0, 1e6)


@pytest.mark.parametrize(
    ("level", "seconds", "expected"),
    [(0.0, 3.0, 6.0), (0.0, 0.0, 0.0), (0.0, 100.0, 10.0), (10.0, 5.0, 10.0), (-4.0, 1.0, -2.0), (5.0, -60.0, 5.0)],
)
def test_a_level_gains_its_rate_up_to_its_capacity_and_nothing_from_a_clock_that_goes_back(level, seconds, expected):
    assert refilled(level, at=100.0, now=100.0 + seconds, rate_s=2.0, capacity=10.0) == expected


@pytest.mark.parametrize(
    ("level", "need", "expected"),
    [(5.0, 5.0, 0.0), (5.0, 6.0, 0.5), (-3.0, 1.0, 2.0), (0.0, 25.0, 5.0), (10.0, 25.0, 0.0), (1.0 - 1e-9, 1.0, 0.0)],
)
def test_a_need_waits_for_its_level_or_for_a_full_bucket(level, need, expected):
    assert wait_s(level, need, rate_s=2.0, capacity=10.0) == expected


def test_a_bucket_without_a_rate_is_waited_for_without_end():
    assert wait_s(0.0, 1.0, rate_s=0.0, capacity=1.0) == float("inf")


@given(levels, times, times, rates, capacities)
def test_never_above_the_capacity_nor_above_what_the_rate_gives(level, at, now, rate_s, capacity):
    after = refilled(level, at=at, now=now, rate_s=rate_s, capacity=capacity)
    assert after <= capacity
    assert after <= level + max(now - at, 0.0) * rate_s


@given(levels, st.floats(0.0, 1e7), rates, capacities)
def test_after_its_wait_a_need_can_be_met_and_not_sooner(level, need, rate_s, capacity):
    wait = wait_s(level, need, rate_s=rate_s, capacity=capacity)
    met = min(need, capacity)

    def lacking(seconds: float) -> float:
        return met - refilled(min(level, capacity), at=0.0, now=seconds, rate_s=rate_s, capacity=capacity)

    assert lacking(wait) <= max(SLACK, abs(level) * 1e-12)
    if wait > 0.0:
        assert lacking(wait * 0.999 - SLACK / rate_s) > 0.0
