"""Laws of starting again: at once after a good life, later and later after bad ones, and some day never."""

from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.restarts import DELAYS_S, HOPELESS_AFTER, STEADY_S, Restarts


def test_one_that_was_well_is_started_again_at_once():
    restarts = Restarts()
    restarts.serves(100.0)
    assert restarts.ended(100.0 + STEADY_S) == 100.0 + STEADY_S
    assert restarts.in_a_row == 0


def test_one_that_ends_early_waits_longer_each_time_and_no_longer_than_the_last_delay():
    restarts = Restarts()
    waits = []
    for _ in range(len(DELAYS_S) + 2):
        restarts.serves(0.0)
        waits.append(restarts.ended(STEADY_S - 0.1) - (STEADY_S - 0.1))
    assert [round(wait, 6) for wait in waits] == [*DELAYS_S, DELAYS_S[-1], DELAYS_S[-1]]


def test_one_that_never_serves_is_hopeless_after_some_ends_and_a_good_life_wipes_that_out():
    restarts = Restarts()
    for number in range(HOPELESS_AFTER):
        assert not restarts.is_hopeless
        restarts.ended(float(number))
    assert restarts.is_hopeless
    restarts.serves(1_000.0)
    restarts.ended(1_000.0 + STEADY_S)
    assert not restarts.is_hopeless


def test_what_it_served_before_its_last_start_does_not_count():
    restarts = Restarts()
    restarts.serves(0.0)
    restarts.ended(STEADY_S)
    assert restarts.ended(10 * STEADY_S) == 10 * STEADY_S + DELAYS_S[0]


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=30))
def test_two_starts_are_never_within_a_second(lives: list[tuple[float, bool]]):
    """Of a life that ended before a second of service, the next start is at least a second away."""
    restarts, now = Restarts(), 0.0
    for length, serves in lives:
        began = now
        if serves:
            restarts.serves(began)
        ended = began + length
        now = restarts.ended(ended)
        assert now >= ended
        assert now - began >= 1.0
