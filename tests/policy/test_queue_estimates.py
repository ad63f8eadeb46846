"""The queue of a model class: estimates of a wait, beside what the wait then was."""

import math
import random
from itertools import pairwise

import pytest
from tests.policy.queue_scenes import (
    FREE,
    PAID,
    Bucket,
    Gate,
    Named,
    by_class,
    by_person,
    named,
    queue_of,
    waits,
)

from headgate.policy.limiter import Verdict
from headgate.policy.request_queue import HELD, QueueBounds

# estimates


def scene(dice: random.Random, *, mixed: bool, limited: bool, background: bool) -> Gate:
    """A class with up to 150 that wait, some of whose people are at their own limit."""
    gate = Gate(Bucket(level_s=dice.uniform(0, 3), person_burst=2.0))
    people = dice.randint(1, 60)
    costs = [0.06, 0.6, 0.6, 1.2, 2.5, 6.0] if mixed else [0.6]
    for number in range(dice.randint(people, 150)):
        person = dice.randint(1, people)
        gap_s = dice.choice([3.0, 0.6]) if limited and person % 3 == 0 else 0.0
        weight = PAID if person % 4 == 0 else FREE
        gate.join(Named("a", user=f"u{person}", cost_s=dice.choice(costs), weight=weight, gap_s=gap_s))
        if background and number % 5 == 0:
            gate.join(Named("x", user=f"x{number % 3}", cost_s=dice.choice(costs), background=True))
        if dice.random() < 0.3:
            gate.run(gate.now + dice.uniform(0, 0.5))
    return gate


@pytest.mark.parametrize("background", [False, True], ids=["people", "background too"])
@pytest.mark.parametrize("limited", [False, True], ids=["no limits", "own limits"])
@pytest.mark.parametrize("mixed", [False, True], ids=["equal costs", "mixed costs"])
def test_estimates_are_right_when_nobody_else_comes(mixed, limited, background):
    """Within 25 % or 0.5 s of what came; exact to a millisecond where no limit of a person is in play."""
    dice = random.Random(1)
    seen = wrong = 0
    for _ in range(25):
        gate = scene(dice, mixed=mixed, limited=limited, background=background)
        new = Named("new", cost_s=0.6, weight=dice.choice([FREE, PAID]))
        predicted = gate.queue.predicted_wait_s(new.user, new.weight, new.cost_s, False, gate.now)[0]
        assert predicted == gate.queue.expected_wait_s(new, gate.now)
        gate.join(new)
        expected = {entry: gate.queue.expected_wait_s(entry, gate.now) for entry in gate.queue}
        positions = {entry: gate.queue.position(entry) for entry in gate.queue}
        if new in expected:
            assert predicted == pytest.approx(expected[new], abs=0.5, rel=0.25)
        since, before = gate.now, len(gate.admitted)
        gate.run(math.inf)
        assert not gate.queue
        for place, (at, entry) in enumerate(gate.admitted[before:], start=1):
            wait_s = at - since
            seen += 1
            if limited:
                wrong += abs(expected[entry] - wait_s) > max(0.25 * wait_s, 0.5)
            else:
                assert expected[entry] == pytest.approx(wait_s, abs=0.001)
                assert abs(positions[entry] - place) <= (1 if background else 0)
    assert wrong <= 0.01 * seen


@pytest.mark.parametrize("weight", [FREE, PAID])
def test_later_arrivals_lengthen_a_wait_by_no_more_than_was_said(weight):
    gate = Gate(Bucket(level_s=0.0))
    for number in range(20):
        gate.join(Named("a", user=f"u{number % 7}", cost_s=0.6))
    mine = Named("mine", cost_s=1.2, weight=weight)
    predicted = gate.queue.predicted_wait_s("mine", weight, 1.2, False, 0.0)[0]
    gate.join(mine)
    for user, other_weight in (("f", FREE), ("p", PAID), ("q", PAID)):
        for _ in range(30):
            gate.join(Named("later", user=user, cost_s=0.6, weight=other_weight))
    for _ in range(30):
        gate.join(Named("later", user="x", cost_s=0.6, background=True))
    gate.run(math.inf)
    longer_s = waits(gate)[mine] - predicted
    by_people_s = (FREE + 2 * PAID) / weight * 1.2
    assert 0 < longer_s <= by_people_s + (predicted + by_people_s) / 9


def test_an_estimate_says_what_binds():
    gate = Gate(Bucket(level_s=0.0, person_burst=1.0))
    queue = gate.queue
    assert queue.predicted_wait_s("new", FREE, 0.6, False, 0.0) == (0.0, "")
    for number in range(3):
        gate.join(Named("a", user=f"u{number}", cost_s=0.6))
    wait_s, why = queue.predicted_wait_s("new", FREE, 0.6, False, 0.0)
    assert (round(wait_s, 6), why) == (2.4, "class_itpm")
    gate.run(10.0)
    for _ in range(3):
        gate.join(Named("g", cost_s=0.6, gap_s=12.0))
    assert queue.predicted_wait_s("g", FREE, 0.6, False, 10.0, gap_s=12.0) == (36.0, "user_rpm")
    assert queue.predicted_wait_s("new", FREE, 0.6, False, 10.0) == (0.0, "")


def test_an_unknown_wait_counts_as_none_and_is_named():
    queue = queue_of(*named("a1", "a2"))
    queue.denied(queue.next(0.0), by_person(math.inf, "user_concurrency"), 0.0)
    assert queue.predicted_wait_s("a", FREE, 1.0, False, 0.0) == (0.0, "user_concurrency")
    held = Named("b1")
    queue.join(held, 0.0)
    queue.hold(queue.next(0.0), None, 0.0)
    assert queue.expected(held, 0.0) == (0.0, HELD)


def test_an_estimate_counts_those_whose_block_ends_meanwhile():
    gate = Gate(Bucket(level_s=0.6, person_burst=1.0))
    for _ in range(4):
        gate.join(Named("g", cost_s=0.6, gap_s=1.0))
    for _ in range(10):
        gate.join(Named("u", cost_s=0.6))
    mine = Named("mine", cost_s=2.4)
    gate.join(mine)
    expected = gate.queue.expected_wait_s(mine, 0.0)
    gate.run(math.inf)
    assert min(expected, waits(gate)[mine]) > 2.4 + 2.4, "what stands before it without them"
    assert expected == pytest.approx(waits(gate)[mine], rel=0.25)


def test_what_passes_at_once_counts_too():
    """Nothing was refused yet: the bucket is taken to have been full, and what has passed is gone from it."""
    gate = Gate(Bucket(), latency_s=0.01, bounds=QueueBounds(waiting_max=1000))
    gate.join(Named("u0", cost_s=1.0))
    gate.run(5.0)
    for number in range(9):
        gate.join(Named("u", user=f"u{number}", cost_s=1.0))
    assert gate.queue.predicted_wait_s("new", FREE, 1.0, False, 5.0)[0] == pytest.approx(0.0)
    gate.run(5.01)
    assert not gate.queue
    assert gate.queue.predicted_wait_s("new", FREE, 2.0, False, 5.01) == (pytest.approx(1.0), "class_rpm")


def test_a_class_at_half_its_pace_takes_twice_as_long():
    queue = queue_of(*named("a1", "b1", "c1"))
    queue.denied(queue.next(0.0), Verdict(False, 2.0, "class_rpm", pace=0.5), 0.0)
    assert [queue.expected_wait_s(entry, 0.0) for entry in queue] == [2.0, 4.0, 6.0]


def test_the_expected_wait_shrinks_with_time_and_with_those_who_leave():
    first, second, third = named("a1", "b1", "c1")
    queue = queue_of(first, second, third)
    queue.denied(queue.next(0.0), by_class(1.0), 0.0)
    assert (queue.expected_wait_s(third, 0.0), queue.position(third)) == (3.0, 3)
    assert queue.expected_wait_s(third, 0.5) == 2.5
    queue.leave(second)
    assert (queue.expected_wait_s(third, 0.5), queue.position(third)) == (1.5, 2)


def test_more_than_a_full_bucket_waits_for_a_full_bucket_and_those_behind_for_its_debt():
    gate = Gate(Bucket(level_s=0.0))
    large, small = Named("large", cost_s=26.0), Named("small", cost_s=26.0)
    gate.join(large)
    gate.join(small)
    expected = [gate.queue.expected_wait_s(entry, 0.0) for entry in (large, small)]
    gate.run(math.inf)
    assert expected == pytest.approx([10.0, 36.0])
    assert list(waits(gate).values()) == pytest.approx(expected)


def test_positions_are_an_order():
    gate = Gate(Bucket(level_s=0.0))
    for number in range(60):
        gate.join(Named("a", user=f"u{number % 11}", cost_s=0.6, weight=PAID if number % 3 else FREE))
    places = sorted(gate.queue.position(entry) for entry in gate.queue)
    assert places == list(range(1, 61))
    assert all(later > sooner for sooner, later in pairwise(places))


# estimates while deadlines bind


def hurried(seed: int, arrivals: int, *, every_s: float, patience_s: tuple[float, ...]) -> tuple[float, float, float]:
    """What the last of a crowd is told before and after it joins, and what it waits though it has all the time.

    The others leave at once when they are told more than they have, and else at their deadline.
    """
    dice = random.Random(seed)
    gate = Gate(Bucket(level_s=5.0), bounds=QueueBounds(waiting_max=1000))
    for number in range(arrivals):
        gate.run(gate.now + dice.uniform(0.0, 2 * every_s))
        person, cost_s, patience = dice.randrange(12), dice.uniform(0.05, 1.0), dice.choice(patience_s)
        last = number == arrivals - 1
        entry = Named(
            "a",
            user=f"u{person}",
            cost_s=cost_s,
            weight=PAID if person % 3 == 0 else FREE,
            deadline=math.inf if last else gate.now + patience,
        )
        predicted = gate.queue.predicted_wait_s(entry.user, entry.weight, cost_s, False, gate.now)[0]
        gate.join(entry)
        told = gate.queue.expected_wait_s(entry, gate.now) if entry in set(gate.queue) else 0.0
        if not last and gate.now + told > entry.deadline:
            gate.queue.leave(entry)
            gate.pump()
    since = gate.now
    gate.run(math.inf)
    return predicted, told, waits(gate)[entry] - since


@pytest.mark.parametrize("patience_s", [(6.0,), (6.0, 6.0, 20.0), (6.0, 1e6)], ids=["equal", "two", "some stay"])
@pytest.mark.parametrize("every_s", [0.17, 0.0035], ids=["three times too many", "all at once"])
def test_who_is_refused_at_arrival_is_told_what_they_would_have_waited(every_s, patience_s):
    """A wait does not count those before it who will have given up by then."""
    refused = wrong = early = 0
    for seed in range(130):
        arrivals = 20 + seed if every_s < 0.1 else 40 + 2 * seed
        predicted, told, waited = hurried(seed, arrivals, every_s=every_s, patience_s=patience_s)
        assert predicted == pytest.approx(told, abs=0.5, rel=0.25)
        if told <= 6.0:
            continue
        refused += 1
        wrong += abs(told - waited) > max(0.25 * waited, 0.5)
        early += waited < 5.0
    assert refused >= 10
    assert wrong <= 0.05 * refused
    assert early <= 0.05 * refused


def test_an_estimate_leaves_out_who_will_be_gone_before_their_turn():
    gate = Gate(Bucket(level_s=0.0))
    queue = gate.queue
    for name, cost_s, deadline in [("a", 2.0, 9.0), ("b", 3.0, 4.0), ("c", 4.0, 9.0), ("d", 5.0, math.inf)]:
        gate.join(Named(name, cost_s=cost_s, deadline=deadline))
    a, b, c, d = queue
    # When a is gone b has its turn, and keeps it until it gives up; what was saved for it is there for c.
    assert [queue.expected_wait_s(one, 0.0) for one in (a, b, c, d)] == [2.0, 5.0, 6.0, 11.0]
    assert [queue.position(one, 0.0) for one in (a, b, c, d)] == [1, 2, 2, 3]
    assert [queue.position(one) for one in (a, b, c, d)] == [1, 2, 3, 4]
    assert queue.predicted_wait_s("e", FREE, 6.0, False, 0.0) == (17.0, "class_itpm")
    assert queue.forecasts(0.0) == [(a, 1, 2.0), (b, 2, 5.0), (c, 2, 6.0), (d, 3, 11.0)]
    gate.run(math.inf)
    assert waits(gate) == pytest.approx({a: 2.0, c: 6.0, d: 11.0})


def test_who_holds_the_class_until_they_give_up_is_waited_for_until_then():
    gate = Gate(Bucket(level_s=0.0))
    gate.join(Named("a", cost_s=9.0, deadline=8.0))
    small = Named("b", cost_s=1.0)
    gate.join(small)
    assert gate.queue.expected_wait_s(small, 0.0) == 8.0
    gate.run(math.inf)
    assert waits(gate)[small] == 8.0


def test_a_person_whose_first_gives_up_has_saved_for_the_second():
    gate = Gate(Bucket(level_s=0.0))
    for number in range(20):
        gate.join(Named("b", cost_s=1.0, user=f"b{number % 2}"))
    large, small = Named("a", cost_s=8.0, deadline=5.5), Named("a", cost_s=1.0)
    gate.join(large)
    gate.join(small)
    expected = gate.queue.expected_wait_s(small, 0.0)
    assert {entry: wait_s for entry, _, wait_s in gate.queue.forecasts(0.0)}[small] == expected
    gate.run(math.inf)
    assert waits(gate)[small] == pytest.approx(expected) == 7.0


def test_an_own_limit_is_not_counted_for_those_who_give_up():
    gate = Gate(Bucket(level_s=5.0, person_burst=1.0))
    for deadline in (99.0, 6.0, 6.0, 99.0):
        gate.join(Named("g", cost_s=0.5, gap_s=4.0, deadline=deadline))
    last = list(gate.queue)[-1]
    assert gate.queue.expected(last, 0.0) == (8.0, "user_rpm")
    gate.run(math.inf)
    assert waits(gate)[last] == 8.0


@pytest.mark.parametrize("background", [False, True], ids=["people", "background too"])
@pytest.mark.parametrize("limited", [False, True], ids=["no limits", "own limits"])
@pytest.mark.parametrize("mixed", [False, True], ids=["equal costs", "mixed costs"])
def test_forecasts_of_all_are_those_of_each(mixed, limited, background):
    """In the order of service, and right as those are."""
    dice = random.Random(2)
    seen = wrong = 0
    for _ in range(25):
        gate = scene(dice, mixed=mixed, limited=limited, background=background)
        forecasts = gate.queue.forecasts(gate.now)
        assert sorted(id(entry) for entry, _, _ in forecasts) == sorted(map(id, gate.queue))
        if not limited and not background:
            for entry, position, wait_s in forecasts:
                assert wait_s == pytest.approx(gate.queue.expected_wait_s(entry, gate.now), abs=0.001)
                assert position == gate.queue.position(entry)
        since = gate.now
        gate.run(math.inf)
        served = waits(gate, since=since)
        for entry, _, wait_s in forecasts:
            seen += 1
            if limited:
                wrong += abs(served[entry] - wait_s) > max(0.25 * served[entry], 0.5)
            else:
                assert served[entry] == pytest.approx(wait_s, abs=0.001)
    assert wrong <= 0.01 * seen


def test_forecasts_name_who_waits_for_something_unknown_too():
    queue = queue_of(*named("a1", "a2", "b1", "b2"))
    queue.denied(queue.next(0.0), by_person(math.inf, "user_concurrency"), 0.0)
    queue.denied(queue.next(0.0), by_class(1.0), 0.0)
    each = {entry: (queue.position(entry), queue.expected_wait_s(entry, 0.0)) for entry in queue}
    assert {entry: (position, wait_s) for entry, position, wait_s in queue.forecasts(0.0)} == each
