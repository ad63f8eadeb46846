"""Laws of the poison table: three ambiguous failures refuse a body for ten minutes, and only the first counts."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.breaker import Breaker, BreakerPolicy, State
from headgate.policy.poison import BODIES_MAX, FAILURES, REFUSED_S, WINDOW_S, PoisonTable

A, B = b"a" * 16, b"b" * 16


def test_the_third_failure_refuses_the_body_for_ten_minutes_and_only_the_first_counts():
    table = PoisonTable()
    assert [table.failed(A, now) for now in (0.0, 100.0, 200.0)] == [True, False, False]
    assert table.refused_for_s(A, 200.0) == 600.0
    assert table.refused_for_s(A, 799.0) == 1.0
    assert table.refused_for_s(A, 800.0) is None
    assert len(table) == 0
    assert table.failed(A, 801.0), "its past is forgotten"


def test_two_failures_refuse_nothing():
    table = PoisonTable()
    table.failed(A, 0.0)
    table.failed(A, 1.0)
    assert table.refused_for_s(A, 2.0) is None


@pytest.mark.parametrize(
    ("failed_at", "counts", "refused"),
    [
        ((0, 1, 2), [True, False, False], True),
        ((0, 599, 599.5), [True, False, False], True),
        ((0, 599, 600), [True, False, True], False),
        ((0, 599, 1198), [True, False, True], False),
        ((0, 599, 1198, 1198.5), [True, False, True, False], True),
        ((0, 600, 1200), [True, True, True], False),
    ],
)
def test_failures_count_within_ten_minutes_of_one_another(failed_at, counts, refused):
    table = PoisonTable()
    assert [table.failed(A, at) for at in failed_at] == counts
    assert (table.refused_for_s(A, failed_at[-1]) is not None) is refused


def test_what_ends_while_it_is_refused_does_not_prolong():
    table = PoisonTable()
    for now in (0.0, 1.0, 2.0):
        table.failed(A, now)
    assert not table.failed(A, 500.0)
    assert table.refused_for_s(A, 501.0) == pytest.approx(101.0)


def test_bodies_do_not_count_for_one_another():
    table = PoisonTable()
    for now in (0.0, 1.0, 2.0):
        table.failed(A, now)
    assert table.failed(B, 2.0)
    assert table.refused_for_s(B, 3.0) is None


def test_a_body_that_was_answered_is_sound():
    table = PoisonTable()
    table.failed(A, 0.0)
    table.failed(A, 1.0)
    table.succeeded(A)
    table.succeeded(B)
    assert len(table) == 0
    assert table.failed(A, 2.0)


def test_a_breaker_that_opens_acquits_them_all():
    table = PoisonTable()
    for now in (0.0, 1.0, 2.0):
        table.failed(A, now)
    table.clear()
    assert table.refused_for_s(A, 3.0) is None
    assert len(table) == 0


def test_asking_remembers_nothing():
    table = PoisonTable()
    assert table.refused_for_s(A, 0.0) is None
    assert len(table) == 0


def test_memory_is_bounded_and_the_body_that_failed_longest_ago_goes():
    table = PoisonTable()
    table.failed(A, 0.0)
    table.failed(B, 1.0)
    table.failed(A, 2.0)
    for number in range(BODIES_MAX - 1):
        table.failed(number.to_bytes(16, "big"), 3.0)
        assert len(table) <= BODIES_MAX
    table.failed(A, 4.0)
    assert table.refused_for_s(A, 4.0) is not None
    assert table.failed(B, 4.0), "it was forgotten"


def test_one_person_repeating_a_poisonous_prompt_never_opens_the_breaker_for_others():
    table = PoisonTable()
    breaker = Breaker("m", policy=BreakerPolicy(), jitter=lambda: 0.5, now=0.0)
    sent = 0
    for number in range(100):
        now = number * 15.0
        if table.refused_for_s(A, now) is not None:
            continue
        sent += 1
        token = breaker.started(now)
        if table.failed(A, now + 10.0):
            breaker.failed(token, now + 10.0)
        else:
            breaker.neutral(token, now + 10.0)
    assert breaker.state is State.CLOSED
    assert sent == 9, "three in the time of each refusal"


def test_an_outage_of_many_bodies_still_opens_the_breaker():
    table = PoisonTable()
    breaker = Breaker("m", policy=BreakerPolicy(), jitter=lambda: 0.5, now=0.0)
    for number in range(3):
        token = breaker.started(0.0)
        assert table.failed(bytes([number]), 1.0)
        breaker.failed(token, 1.0)
    assert breaker.state is State.OPEN


@given(st.lists(st.tuples(st.sampled_from(["fail", "ask", "good", "clear"]), st.sampled_from([A, B, b"c"]),
                          st.sampled_from([0.0, 1.0, 150.0, 299.0, 600.0])), max_size=80))  # fmt: skip
def test_the_table_does_what_a_full_record_of_all_failures_would(steps):
    table, now = PoisonTable(), 0.0
    failed: dict[bytes, list[float]] = defaultdict(list)
    refused_until: dict[bytes, float] = defaultdict(float)
    counted: dict[bytes, float] = {}
    for what, body, pause_s in steps:
        now += pause_s
        refused = now < refused_until[body]
        match what:
            case "ask":
                left_s = table.refused_for_s(body, now)
                assert (left_s is not None) is refused
                assert left_s is None or left_s == pytest.approx(refused_until[body] - now)
            case "fail":
                counts = not refused and (body not in counted or now - counted[body] >= WINDOW_S)
                assert table.failed(body, now) is counts
                if counts:
                    counted[body] = now
                if not refused:
                    failed[body].append(now)
                    recent = [at for at in failed[body] if now - at < WINDOW_S and at >= refused_until[body]]
                    if len(recent) >= FAILURES:
                        refused_until[body] = now + REFUSED_S
            case "good":
                table.succeeded(body)
                failed[body].clear()
                refused_until[body] = 0.0
                counted.pop(body, None)
            case "clear":
                table.clear()
                failed.clear()
                refused_until.clear()
                counted.clear()
        assert len(table) <= 3


def test_after_a_clock_went_back_a_failure_counts_again_in_time():
    table = PoisonTable()
    assert table.failed(A, 1_000_000.0)
    assert table.refused_for_s(A, 0.0) is None
    assert not table.failed(A, 599.0)
    assert table.failed(A, 600.0)


def test_after_a_clock_went_back_nobody_is_refused_for_longer():
    table = PoisonTable()
    table.failed(A, 0.0)
    for _ in range(3):
        table.failed(B, 500.0)
    assert table.refused_for_s(B, 100.0) == REFUSED_S


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.floats(-2000, 2000) | st.floats(-1e6, 1e6)), max_size=60))
def test_a_clock_that_jumps_as_it_likes_refuses_nobody_for_longer(steps):
    table, now = PoisonTable(), 0.0
    for body, now in steps:
        table.failed(body, now)
        left_s = table.refused_for_s(body, now)
        assert left_s is None or 0 < left_s <= REFUSED_S
    assert table.refused_for_s(A, now + REFUSED_S) is None
    assert len(table) == 0
