"""Laws of the bad-key throttle: 20 failures in any minute from an address, and a memory that does not grow."""

from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.bad_key_throttle import ADDRESSES_MAX, FAILURES_PER_MIN, WINDOW_S, AddressThrottle


def test_twenty_failures_are_answered_and_the_next_is_refused_until_the_first_is_a_minute_old() -> None:
    throttle = AddressThrottle()
    assert [throttle.failed("a", now=float(second)) for second in range(20)] == [None] * 20
    assert throttle.failed("a", now=20.0) == 40.0
    assert throttle.failed("a", now=59.0) == 1.0
    assert throttle.failed("a", now=60.0) is None
    assert throttle.failed("a", now=60.0) == 1.0


def test_knocking_while_refused_does_not_prolong_the_wait() -> None:
    throttle = AddressThrottle()
    for _ in range(20):
        throttle.failed("a", now=0.0)
    for second in range(60):
        assert throttle.failed("a", now=float(second)) == WINDOW_S - second
    assert throttle.failed("a", now=60.0) is None


def test_asking_counts_nothing() -> None:
    throttle = AddressThrottle()
    for _ in range(100):
        assert throttle.refused_for_s("a", now=0.0) is None
    for _ in range(20):
        throttle.failed("a", now=0.0)
    assert throttle.refused_for_s("a", now=10.0) == 50.0
    assert throttle.refused_for_s("a", now=60.0) is None


def test_addresses_do_not_count_for_one_another() -> None:
    throttle = AddressThrottle()
    for _ in range(20):
        throttle.failed("a", now=0.0)
    assert throttle.failed("b", now=0.0) is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 20)), max_size=300))
def test_no_address_is_answered_more_than_twenty_times_in_any_minute(steps: list[tuple[str, float]]) -> None:
    throttle, now = AddressThrottle(), 0.0
    answered: dict[str, list[float]] = {"a": [], "b": []}
    for address, pause_s in steps:
        now += pause_s / 10
        in_the_last_minute = [at for at in answered[address] if now - at < WINDOW_S]
        wait_s = throttle.failed(address, now=now)
        assert (wait_s is None) is (len(in_the_last_minute) < FAILURES_PER_MIN)
        if wait_s is None:
            answered[address].append(now)
        else:
            assert 0 < wait_s <= WINDOW_S


def test_memory_is_bounded_and_the_address_that_failed_longest_ago_goes_first() -> None:
    throttle = AddressThrottle()
    for _ in range(20):
        throttle.failed("oldest", now=0.0)
        throttle.failed("busy", now=0.0)
    for number in range(ADDRESSES_MAX - 2):
        throttle.failed(str(number), now=1.0)
    assert throttle.refused_for_s("oldest", now=1.0) is not None
    throttle.failed("one more", now=1.0)
    assert throttle.refused_for_s("oldest", now=1.0) is None
    assert throttle.refused_for_s("busy", now=1.0) is not None
    assert len(throttle._failed_at) == ADDRESSES_MAX
