"""Laws of the guard against runaway spending: who is held, from when, and until when; and who never is."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.alerts import CallCost
from headgate.policy.spend_velocity import (
    _WORTH,
    CALLS_SHOWN,
    HISTORY_WINDOWS,
    IN_FLIGHT_MAX,
    IN_FLIGHT_S_MAX,
    LOOP_CALLS,
    LOOP_DIGESTS_MAX,
    WINDOW_S,
    LoopDetector,
    SpendVelocity,
    VelocityPolicy,
    _level,
)

USD = 10**9
CENT = USD // 100
AN, BINH = "user:an", "user:binh"
DAY_S, WEEK = 86_400.0, HISTORY_WINDOWS


def week_of(nanousd: int, windows: int = WEEK) -> dict[int, int]:
    """So much in each of the last windows before now."""
    return dict.fromkeys(range(1, windows), nanousd)


def seeded(nanousd: int, windows: int = WEEK, *, policy: VelocityPolicy | None = None) -> SpendVelocity:
    velocity = SpendVelocity(policy or VelocityPolicy())
    velocity.seed({AN: week_of(nanousd, windows)}, 0.0)
    return velocity


def limit_of(velocity: SpendVelocity, subject: str = AN, now_s: float = 0.0) -> int:
    return next(each for each in velocity.snapshot(now_s) if each.subject == subject).limit_nanousd


def spend(velocity: SpendVelocity, nanousd: int, now_s: float, subject: str = AN, **options):
    return velocity.spent(subject, nanousd, f"call_{now_s}", now_s, **options)


def run_until_trip(velocity: SpendVelocity, *, cost: int, every_s: float, most: int = 10_000) -> tuple[int, float]:
    """What was spent when it tripped, and when."""
    for number in range(most):
        if spend(velocity, cost, number * every_s) is not None:
            return (number + 1) * cost, number * every_s
    raise AssertionError("it never tripped")


# the limit


def test_without_a_day_of_history_the_absolute_line_trips():
    velocity = SpendVelocity()
    assert spend(velocity, 2 * USD, 0.0) is None
    assert not velocity.throttled(AN, 1.0)
    trip = spend(velocity, 1, 1.0)
    assert trip is not None
    assert (trip.subject, trip.window_nanousd, trip.limit_nanousd, trip.p99_nanousd) == (AN, 2 * USD + 1, 2 * USD, None)
    assert trip.in_flight_nanousd == 0
    assert velocity.throttled(AN, 1.0)
    assert velocity.tripped(AN)
    assert not velocity.throttled(BINH, 1.0)


def test_what_is_ten_minutes_old_no_longer_counts():
    velocity = SpendVelocity()
    spend(velocity, 2 * USD, 0.0)
    assert spend(velocity, 2 * USD, WINDOW_S + 10.0) is None
    assert spend(velocity, 1, WINDOW_S + 11.0) is not None


@pytest.mark.parametrize("every_s", [1.0, 2.25, 9.9])
def test_a_loop_at_40_dollars_an_hour_trips_before_4(every_s):
    cost = int(40 * USD * every_s / 3600)
    total, at = run_until_trip(SpendVelocity(), cost=cost, every_s=every_s)
    assert total <= 2 * USD + cost < 4 * USD
    assert at < 200.0, "three minutes of it"


def test_a_customer_who_pays_30_dollars_an_hour_all_week_is_not_held():
    velocity = SpendVelocity()
    velocity.seed({AN: week_of(5 * USD)}, 0.0)
    for number in range(2 * 6 * 60):
        now_s = number * 10.0
        assert spend(velocity, 30 * USD // 360, now_s) is None
        assert not velocity.throttled(AN, now_s)
    assert limit_of(velocity, now_s=7_190.0) == pytest.approx(25 * USD, rel=0.1)


def test_the_same_customer_earns_it_without_a_seed_once_released_for_a_day():
    velocity = SpendVelocity(VelocityPolicy(line_nanousd=6 * USD))
    for number in range(int(DAY_S / 10) + 60):
        assert spend(velocity, 30 * USD // 360, number * 10.0) is None
    velocity.policy = VelocityPolicy()
    for number in range(int(DAY_S / 10) + 60, int(DAY_S / 10) + 420):
        assert spend(velocity, 30 * USD // 360, number * 10.0) is None


def test_who_spends_a_cent_is_held_at_the_floor_and_not_at_five_cents_nor_at_the_line():
    velocity = seeded(CENT)
    assert spend(velocity, 50 * CENT, 0.0) is None
    trip = spend(velocity, CENT, 1.0)
    assert trip is not None
    assert trip.limit_nanousd == 50 * CENT


def test_in_between_it_is_five_times_the_own_percentile_under_the_line_too():
    velocity = seeded(20 * CENT)
    assert 1 * USD <= limit_of(velocity) <= 1.1 * USD
    trip = spend(velocity, 110 * CENT, 0.0)
    assert trip is not None
    assert 20 * CENT <= trip.p99_nanousd <= 22 * CENT


def test_a_floor_above_the_line_is_the_line():
    velocity = seeded(CENT, policy=VelocityPolicy(line_nanousd=10 * CENT))
    assert limit_of(velocity) == 10 * CENT


@pytest.mark.parametrize(
    ("windows", "counts"),
    [(144, False), (145, True)],  # 143 and 144 windows: a day is 144
)
def test_less_than_a_day_is_no_history(windows, counts):
    velocity = seeded(CENT, windows)
    assert limit_of(velocity) == (50 * CENT if counts else 2 * USD)


def test_few_windows_are_no_history_however_old():
    velocity = SpendVelocity()
    velocity.seed({AN: dict.fromkeys(range(500, 511), CENT), BINH: dict.fromkeys(range(500, 512), CENT)}, 0.0)
    assert limit_of(velocity) == 2 * USD
    assert limit_of(velocity, BINH) == 50 * CENT


def test_idle_hours_are_not_counted_as_cheap_ones():
    velocity = SpendVelocity()
    velocity.seed({AN: dict.fromkeys(range(900, 915), 40 * CENT)}, 0.0)
    assert limit_of(velocity) == pytest.approx(2 * USD, rel=0.1)


def test_one_dear_window_of_a_short_history_is_no_excuse():
    velocity = SpendVelocity()
    velocity.seed({AN: dict.fromkeys(range(150, 200), CENT) | {170: 10 * USD}}, 0.0)
    assert limit_of(velocity) == 50 * CENT


def test_who_has_a_cap_a_day_may_spend_an_eighth_of_it_or_twice_their_own():
    for p99, cap, limit in ((USD, 20 * USD, 2.5 * USD), (2 * USD, 20 * USD, 4 * USD), (USD, 1000 * USD, 5 * USD)):
        velocity = seeded(p99)
        velocity.began(AN, "call_1", 1, 0.0, cap_day_nanousd=cap)
        assert limit_of(velocity) == pytest.approx(limit, rel=0.1)


def test_the_loop_on_a_20_dollar_key_trips_before_4_also_with_busy_hours_behind_it():
    velocity = seeded(USD)
    for number in range(1_000):
        if spend(velocity, 11 * CENT, number * 9.9, cap_day_nanousd=20 * USD) is not None:
            break
    assert (number + 1) * 11 * CENT < 4 * USD


def test_a_key_without_history_has_the_limits_of_its_people_and_none_of_its_own():
    velocity = SpendVelocity()
    for number in range(200):
        assert spend(velocity, 10 * CENT, 0.1 * number, "key:app", person=f"p{number}") is None
    (stands,) = velocity.snapshot(20.0)
    assert (stands.limit_nanousd, stands.limit_from, stands.people) == (None, "people", 200)
    assert not velocity.throttled("key:app", 20.0)
    (stands,) = velocity.snapshot(5_000.0)
    assert (stands.limit_nanousd, stands.limit_from, stands.people) == (2 * USD, "line", 0)


def test_people_raise_the_limit_of_a_key_with_history_and_never_lower_it():
    velocity = SpendVelocity()
    velocity.seed({"key:app": week_of(CENT), "key:big": week_of(10 * USD)}, 0.0)
    for person in ("an", "binh", "chi"):
        spend(velocity, CENT, 0.0, "key:app", person=person)
        spend(velocity, CENT, 0.0, "key:big", person=person)
    assert limit_of(velocity, "key:app") == 6 * USD
    assert limit_of(velocity, "key:big") > 40 * USD


# what is under way


def test_what_is_under_way_holds_back_and_is_forgotten_once_it_is_known_better():
    velocity = SpendVelocity()
    for number in range(20):
        velocity.began(AN, f"call_{number}", 11 * CENT, 0.0)
    assert velocity.throttled(AN, 0.0)
    assert not velocity.tripped(AN), "an estimate raises no alert"
    for number in range(20):
        assert velocity.spent(AN, CENT, f"call_{number}", 5.0) is None
    assert not velocity.throttled(AN, 5.0)
    (stands,) = velocity.snapshot(5.0)
    assert (stands.in_flight_nanousd, stands.window_nanousd) == (0, 20 * CENT)


def test_without_an_estimate_a_call_is_expected_to_cost_what_the_last_ones_did():
    velocity = SpendVelocity()
    velocity.spent(AN, 30 * CENT, "call_0", 0.0)
    for number in range(1, 6):
        velocity.began(AN, f"call_{number}", 0, 1.0)
    assert not velocity.throttled(AN, 1.0)
    velocity.began(AN, "call_6", 0, 1.0)
    assert velocity.throttled(AN, 1.0)


def test_a_call_of_which_nothing_is_known_is_expected_to_cost_what_the_last_ten_did():
    velocity = SpendVelocity()
    for number in range(30):
        velocity.spent(AN, (number + 1) * CENT // 100, f"call_{number}", 0.0)
    velocity.began(AN, "call_30", 0, 0.0)
    (stands,) = velocity.snapshot(0.0)
    assert stands.in_flight_nanousd == sum(range(21, 31)) * CENT // 100 // 10


def test_what_is_under_way_without_an_estimate_counts_once_the_first_is_paid():
    velocity = SpendVelocity()
    for number in range(20):
        velocity.began(AN, f"call_{number}", 0, 0.0)
    assert not velocity.throttled(AN, 0.0)
    velocity.spent(AN, 11 * CENT, "call_0", 1.0)
    assert velocity.throttled(AN, 1.0)
    for number in range(1, 20):
        velocity.spent(AN, CENT, f"call_{number}", 2.0)
    assert velocity.snapshot(2.0)[0].in_flight_nanousd == 0


def test_what_is_told_twice_of_a_call_counts_once_and_the_last_word_counts():
    velocity = SpendVelocity()
    for expected in (CENT, 3 * CENT, 2 * CENT):
        velocity.began(AN, "call_1", expected, 0.0)
    assert velocity.snapshot(0.0)[0].in_flight_nanousd == 2 * CENT
    velocity.forget_call(AN, "call_1")
    velocity.forget_call(AN, "call_1")
    velocity.forget_call(BINH, "call_1")
    assert velocity.snapshot(0.0)[0].in_flight_nanousd == 0


def test_a_call_that_cost_nothing_leaves_nothing():
    velocity = SpendVelocity()
    velocity.began(AN, "call_1", USD, 0.0)
    assert velocity.spent(AN, 0, "call_1", 1.0) is None
    (stands,) = velocity.snapshot(1.0)
    assert (stands.in_flight_nanousd, stands.window_nanousd, stands.history_windows) == (0, 0, 0)


def test_a_call_whose_end_is_never_told_is_forgotten_after_an_hour():
    velocity = SpendVelocity()
    velocity.began(AN, "call_1", 3 * USD, 0.0)
    assert velocity.throttled(AN, IN_FLIGHT_S_MAX - 1)
    assert not velocity.throttled(AN, IN_FLIGHT_S_MAX)


def test_who_is_held_back_for_half_a_minute_is_told_of_once_and_let_go_with_the_calls():
    velocity = SpendVelocity()
    velocity.began(AN, "call_1", 3 * USD, 0.0)
    assert velocity.throttled(AN, 0.0)
    assert [velocity.held_back(now_s) for now_s in (10.0, 20.0, 29.9)] == [(), (), ()]
    (told,) = velocity.held_back(30.0)
    assert (told.subject, told.window_nanousd, told.in_flight_nanousd, told.limit_nanousd) == (AN, 0, 3 * USD, 2 * USD)
    assert velocity.held_back(31.0) == ()
    assert velocity.tick(40.0) == ()
    velocity.spent(AN, USD, "call_1", 41.0)
    assert not velocity.throttled(AN, 41.0)
    assert velocity.tick(51.0) == ()
    assert velocity.tick(51.1) == (AN,), "twenty seconds after it was last seen"
    assert velocity.tick(52.0) == ()
    velocity.began(AN, "call_2", 3 * USD, 60.0)
    assert velocity.throttled(AN, 60.0)
    assert [len(velocity.held_back(now_s)) for now_s in (75.0, 90.0)] == [0, 1], "and told again"


def test_who_is_refused_and_comes_again_has_been_held_back_all_the_time():
    velocity = SpendVelocity()
    for now_s in (0.0, 15.0, 30.0, 45.0):
        velocity.began(AN, "call_1", 3 * USD, now_s)
        assert velocity.throttled(AN, now_s)
        velocity.forget_call(AN, "call_1")
        told = velocity.held_back(now_s + 1.0)
        assert len(told) == (now_s == 30.0)
        assert velocity.tick(now_s + 1.0) == ()


def test_who_is_held_back_can_be_released_too():
    velocity = SpendVelocity()
    velocity.began(AN, "call_1", 3 * USD, 0.0)
    assert velocity.throttled(AN, 0.0)
    assert velocity.snapshot(0.0)[0].held_back
    assert velocity.release(AN, 1.0)
    assert not velocity.throttled(AN, 1.0)
    assert not velocity.snapshot(1.0)[0].held_back
    assert velocity.tick(60.0) == ()


def test_who_is_held_back_for_a_moment_is_not_told_of():
    velocity = SpendVelocity()
    velocity.began(AN, "call_1", 3 * USD, 0.0)
    assert velocity.throttled(AN, 0.0)
    velocity.forget_call(AN, "call_1")
    assert velocity.held_back(40.0) == ()
    assert velocity.tick(40.0) == ()
    velocity.began(AN, "call_2", 3 * USD, 50.0)
    assert velocity.throttled(AN, 50.0)
    assert velocity.held_back(60.0) == (), "it was not held back all the time"
    assert [len(velocity.held_back(now_s)) for now_s in (70.0, 80.0)] == [0, 1]


def test_who_is_told_of_and_then_trips_is_let_go_by_the_trip_alone():
    velocity = SpendVelocity()
    velocity.began(AN, "call_1", 3 * USD, 0.0)
    velocity.throttled(AN, 0.0)
    assert [len(velocity.held_back(now_s)) for now_s in (15.0, 30.0)] == [0, 1]
    assert velocity.spent(AN, 3 * USD, "call_1", 31.0) is not None
    assert velocity.held_back(62.0) == ()
    assert velocity.tick(4_000.0) == ()
    assert velocity.tick(5_000.0) == (AN,)


def test_what_is_under_way_is_bounded():
    velocity = SpendVelocity()
    for number in range(IN_FLIGHT_MAX + 5):
        velocity.began(AN, f"call_{number}", 1, 0.0)
    assert velocity.snapshot(0.0)[0].in_flight_nanousd == IN_FLIGHT_MAX


# the trip


def test_a_trip_shows_the_last_ten_calls_with_their_cost():
    velocity = SpendVelocity()
    for number in range(21):
        trip = velocity.spent(AN, 10 * CENT, f"call_{number}", float(number))
    assert trip is not None
    assert trip.calls == tuple(CallCost(f"call_{number}", 10 * CENT) for number in range(11, 21))
    assert len(trip.calls) == CALLS_SHOWN


def test_it_trips_once_and_holds_until_an_hour_after_it_has_calmed_down():
    velocity = SpendVelocity()
    assert spend(velocity, 3 * USD, 0.0) is not None
    assert spend(velocity, 3 * USD, 300.0) is None
    # The window that holds both is below the line when the second has left it, at 300 + 610.
    assert velocity.tick(910.0 + 3599.0) == ()
    assert velocity.throttled(AN, 910.0 + 3599.0)
    assert velocity.tick(910.0 + 3600.0) == (AN,)
    assert velocity.tick(910.0 + 3600.0) == ()
    assert not velocity.throttled(AN, 910.0 + 3600.0)
    assert not velocity.tripped(AN)
    assert spend(velocity, 3 * USD, 5000.0) is not None, "and trips again"


def test_who_goes_on_slowly_below_the_limit_is_let_go_in_time():
    velocity = SpendVelocity()
    spend(velocity, 2 * USD + 1, 0.0)
    for minute in range(1, 70):
        assert velocity.throttled(AN, minute * 60.0)
        spend(velocity, CENT, minute * 60.0)
    assert velocity.tick(72 * 60.0) == (AN,)


def test_who_was_released_has_twice_the_limit_for_an_hour_and_what_was_spent_is_forgiven():
    velocity = SpendVelocity()
    assert not velocity.release(AN, 0.0)
    spend(velocity, 2 * USD + 1, 0.0)
    assert velocity.release(AN, 60.0)
    assert not velocity.release(AN, 60.0)
    assert velocity.graced(AN, 60.0)
    assert not velocity.graced(BINH, 60.0)
    assert not velocity.throttled(AN, 60.0)
    assert spend(velocity, 4 * USD, 61.0) is None
    assert spend(velocity, 1, 62.0) is not None, "a loop that goes on trips again, after four dollars"
    assert velocity.release(AN, 63.0)
    assert spend(velocity, 8 * USD, 64.0) is None
    assert limit_of(velocity, now_s=63.0 + 3599.0) == 8 * USD
    assert limit_of(velocity, now_s=63.0 + 3600.0) == 2 * USD
    assert not velocity.graced(AN, 63.0 + 3600.0)


def test_no_release_lifts_a_limit_beyond_sixteen_times():
    velocity = SpendVelocity()
    for number in range(10):
        spend(velocity, 100 * USD, float(number))
        assert velocity.release(AN, float(number))
    assert limit_of(velocity, now_s=10.0) == 32 * USD


def test_a_loop_is_not_its_own_excuse():
    velocity = seeded(CENT)
    for number in range(12 * 60):
        spend(velocity, 10 * CENT, number * 10.0)
    assert limit_of(velocity, now_s=7_200.0) == 50 * CENT
    assert velocity.throttled(AN, 7_200.0)


def test_what_an_operator_released_is_history():
    velocity = SpendVelocity(VelocityPolicy(hold_s=10.0))
    for window in range(150):
        now_s = window * 600.0
        velocity.tick(now_s)
        if spend(velocity, 5 * USD, now_s) is not None:
            velocity.release(AN, now_s + 1.0)
    assert limit_of(velocity, now_s=150 * 600.0) == pytest.approx(25 * USD, rel=0.1)


def test_a_trip_that_was_released_at_once_is_history_too():
    velocity = SpendVelocity()
    for number in range(30):
        now_s = number * 7_200.0
        if spend(velocity, 5 * USD, now_s) is not None:
            velocity.release(AN, now_s + 1.0)
    assert limit_of(velocity, now_s=30 * 7_200.0) == pytest.approx(25 * USD, rel=0.1)


def test_a_window_that_tripped_teaches_nothing_when_time_released_it():
    velocity = seeded(CENT, 200, policy=VelocityPolicy(hold_s=10.0))
    for number in range(10):
        now_s = number * 3_000.0
        velocity.tick(now_s)
        assert spend(velocity, USD, now_s) is not None
    assert limit_of(velocity, now_s=30_000.0) == 50 * CENT


def test_history_is_a_week_long():
    velocity = seeded(5 * USD)
    assert limit_of(velocity, now_s=3 * DAY_S) > 20 * USD
    assert limit_of(velocity, now_s=8 * DAY_S) == 2 * USD


def test_the_ten_minutes_before_a_start_count():
    velocity = SpendVelocity()
    velocity.seed({AN: {0: 190 * CENT}}, 10_000.0)
    assert not velocity.throttled(AN, 10_000.0)
    assert spend(velocity, 11 * CENT, 10_001.0) is not None
    other = SpendVelocity()
    other.seed({AN: {0: 190 * CENT}}, 10_000.0)
    assert spend(other, 11 * CENT, 10_400.0) is None, "they have left the window"


# bounds and oddities


def test_memory_is_bounded_and_who_is_held_goes_last():
    velocity = SpendVelocity(subjects_max=100)
    spend(velocity, 3 * USD, 0.0)
    for number in range(1_000):
        spend(velocity, CENT, 1.0, f"user:{number}")
        assert len(velocity) <= 100
    assert velocity.throttled(AN, 2.0)
    for number in range(1_000):
        spend(velocity, 3 * USD, 3.0, f"user:held{number}")
        assert len(velocity) <= 100
    assert not velocity.throttled(AN, 4.0)
    assert len(velocity.tick(100_000.0)) == 100


def test_the_people_of_a_key_are_bounded():
    velocity = SpendVelocity()
    for number in range(IN_FLIGHT_MAX + 5):
        velocity.spent("key:app", 0, "call", 0.0, person=f"p{number}")
    assert velocity.snapshot(0.0)[0].people == IN_FLIGHT_MAX


def test_asking_remembers_nothing():
    velocity = SpendVelocity()
    assert not velocity.throttled(AN, 0.0)
    assert not velocity.release(AN, 0.0)
    assert len(velocity) == 0


def test_a_clock_that_goes_back_stands_still():
    velocity = SpendVelocity()
    spend(velocity, USD, 10_000.0)
    spend(velocity, USD, 0.0)
    assert spend(velocity, 1, 5_000.0) is not None
    assert velocity.tick(10_000.0 + 610.0 + 3600.0) == (AN,)


def test_a_level_is_never_less_than_what_it_stands_for_and_at_most_a_tenth_more():
    for nanousd in (1, 999, 1_000, 1_001, CENT, 37 * CENT, USD, 5 * USD, 3_000 * USD):
        worth = _WORTH[_level(nanousd)]
        assert nanousd <= worth <= max(nanousd * 1.092, 1_000)
    assert _level(0) == 0
    assert _level(10**18) == 255


COSTS = st.integers(0, 3 * USD)
STEPS = st.tuples(st.floats(0, 400), COSTS, st.sampled_from([AN, BINH]))


@given(st.lists(STEPS, max_size=80))
def test_the_window_is_what_a_full_record_of_ten_minutes_would_say(steps):
    velocity, now_s = SpendVelocity(), 0.0
    record: dict[str, deque[tuple[float, int]]] = {AN: deque(), BINH: deque()}
    for pause_s, cost, subject in steps:
        now_s += pause_s
        trip = spend(velocity, cost, now_s, subject)
        record[subject].append((now_s, cost))
        least = sum(spent for at, spent in record[subject] if now_s - at <= WINDOW_S)
        most = sum(spent for at, spent in record[subject] if now_s - at < WINDOW_S + 10)
        stands = next(each for each in velocity.snapshot(now_s) if each.subject == subject)
        assert least <= stands.window_nanousd <= most
        if cost and least > stands.limit_nanousd:
            assert velocity.tripped(subject), "whoever went over is held"
        assert trip is None or most > trip.limit_nanousd, "and nobody else is"


# equal calls


def call(number: int) -> CallCost:
    return CallCost(f"call_{number}", CENT)


def test_more_than_thirty_equal_calls_in_ten_minutes_are_a_loop():
    detector = LoopDetector()
    for number in range(LOOP_CALLS):
        assert detector.called(AN, "d", call(number), number * 20.0 - 1.0) is None
    loop = detector.called(AN, "d", call(30), 598.0)
    assert loop is not None
    assert (loop.subject, loop.digest, loop.calls_in_window) == (AN, "d", 31)
    assert loop.calls == tuple(call(number) for number in range(21, 31))


def test_equal_calls_of_others_or_over_hours_or_without_a_digest_are_none():
    detector = LoopDetector()
    for number in range(200):
        assert detector.called(f"user:{number % 10}", "d", call(number), float(number)) is None
        assert detector.called(AN, "slow", call(number), number * 20.0) is None
        assert detector.called(AN, f"{number}", call(number), float(number)) is None
        assert detector.called(AN, "", call(number), float(number)) is None


def test_the_memory_of_equal_calls_is_bounded():
    detector = LoopDetector()
    for number in range(LOOP_DIGESTS_MAX + 10):
        detector.called(AN, f"{number}", call(number), 0.0)
    assert len(detector) == LOOP_DIGESTS_MAX
