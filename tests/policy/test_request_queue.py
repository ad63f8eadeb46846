"""The queue of a model class: transcripts of its order. Histories, shares and estimates have files of their own."""

import math

import pytest
from tests.policy.queue_scenes import (
    PAID,
    Named,
    all_admitted,
    background,
    by_class,
    by_person,
    named,
    queue_of,
)

from headgate.policy.request_queue import ASKS_MAX, Entry, QueueBounds, QueueTotals, RequestQueue


def all_named(queue: RequestQueue, now: float = 0.0) -> list[Named]:
    """Everybody who may ask at once."""
    entries = []
    while (entry := queue.next(now)) is not None:
        entries.append(entry)
    return entries


# order


def test_an_empty_queue_is_false_and_names_nobody():
    queue = queue_of()
    assert not queue
    assert (queue.next(0.0), queue.expired(0.0), queue.wake_at()) == (None, [], None)


def test_a_persons_requests_are_served_in_the_order_they_came():
    assert all_admitted(queue_of(*named("a1", "a2", "a3"))) == "a1 a2 a3"


def test_people_take_turns():
    assert all_admitted(queue_of(*named("a1", "a2", "a3", "b1", "b2", "c1"))) == "a1 b1 c1 a2 b2 a3"


def test_a_paid_person_has_five_turns_for_one_of_a_free_one():
    paid = named(*(f"p{number}" for number in range(1, 8)), weight=PAID)
    free = named("f1", "f2")
    assert all_admitted(queue_of(*paid, *free)) == "p1 p2 p3 p4 p5 f1 p6 p7 f2"


def test_turns_are_of_capacity_and_not_of_requests():
    small = named(*(f"s{number}" for number in range(1, 7)), cost_s=1.0)
    large = named("l1", "l2", cost_s=3.0)
    assert all_admitted(queue_of(*large, *small)) == "s1 s2 l1 s3 s4 s5 l2 s6"


def test_who_comes_later_does_not_wait_for_a_whole_turn_of_the_others():
    queue = queue_of(*named("a1", "a2", "a3", "b1", "b2", "b3", cost_s=5.0))
    assert queue.admitted(queue.next(0.0), 0.0)
    queue.join(Named("p1", weight=PAID), 0.0)
    assert all_admitted(queue) == "b1 p1 a2 b2 a3 b3"


def test_coming_and_going_earns_nothing():
    queue = queue_of(*named(*(f"a{number}" for number in range(10))))
    served = []
    for turn in range(8):
        queue.join(Named(f"b{turn}"), 0.0)
        entry = queue.next(0.0)
        assert queue.admitted(entry, 0.0)
        served.append(entry.user)
    assert abs(served.count("a") - served.count("b")) <= 1


def test_a_retry_goes_before_what_its_person_has():
    queue = queue_of(*named("a1", "a2", "b1"))
    queue.join(Named("a0", head=True), 0.0)
    order = all_admitted(queue).split()
    assert order[0] == "a0"
    assert [name for name in order if name[0] == "a"] == ["a0", "a1", "a2"]


def test_a_retry_is_due_at_once_and_costs_its_person_nothing():
    queue = queue_of(*named("a1", "a2"), *named(*(f"b{number}" for number in range(1, 7)), cost_s=0.3))
    for _ in range(3):
        assert queue.admitted(queue.next(0.0), 0.0)
    queue.join(Named("a0", head=True), 0.0)
    assert all_admitted(queue).startswith("a0 a1 b4")


def test_a_retry_that_comes_while_its_person_asks_is_next():
    queue = queue_of(*named("a1", "a2"))
    asking = queue.next(0.0)
    queue.join(Named("a0", head=True), 0.0)
    assert queue.next(0.0) is None
    assert queue.admitted(asking, 0.0)
    assert all_admitted(queue) == "a0 a2"


# answers of the class


def test_a_class_that_refuses_is_not_asked_until_its_wait_is_over():
    queue = queue_of(*named("a1", "b1"))
    queue.denied(queue.next(0.0), by_class(3.0), 0.0)
    assert queue.next(2.9) is None
    assert queue.wake_at() == 3.0
    assert all_admitted(queue, 3.0) == "a1 b1"


@pytest.mark.parametrize("reason", ["class_rpm", "class_itpm", "class_otpm", "frozen", "slow_start"])
def test_a_small_request_of_somebody_else_does_not_overtake_what_the_class_refused(reason):
    queue = queue_of(Named("large", cost_s=9.0))
    for now in (0.0, 5.0, 10.0):
        asking = queue.next(now)
        assert asking.name == "large"
        queue.denied(asking, by_class(5.0, reason), now)
        queue.join(Named(f"small{now:g}", weight=PAID, cost_s=0.01), now)
    assert all_admitted(queue, 15.0).startswith("large small")


def test_several_that_ask_at_once_are_refused_and_named_again_in_their_order():
    queue = queue_of(*named("a1", "a2", "b1", "c1"))
    asking = all_named(queue)
    assert [entry.name for entry in asking] == ["a1", "b1", "c1"], "one of a person"
    for entry in reversed(asking):
        queue.denied(entry, by_class(1.0), 0.1)
    assert queue.next(1.0) is None
    first = queue.next(1.1)
    assert first.name == "a1"
    assert queue.next(1.1) is None, "nobody asks beside the one that the class has refused before"
    assert queue.admitted(first, 1.2)
    assert all_admitted(queue, 1.2) == "b1 c1 a2"


def test_at_most_so_many_ask_at_once():
    queue = queue_of(*(Named("x", user=f"u{number}") for number in range(ASKS_MAX + 3)))
    asking = all_named(queue)
    assert len(asking) == ASKS_MAX
    assert queue.wake_at() is None
    queue.admitted(asking[0], 0.0)
    assert len(all_named(queue)) == 1


def test_a_class_that_got_something_back_may_be_asked_at_once():
    queue = queue_of(*named("a1", "b1"))
    queue.denied(queue.next(0.0), by_class(30.0, "frozen"), 0.0)
    assert queue.next(1.0) is None
    queue.unblock()
    assert all_admitted(queue, 1.0) == "a1 b1"


def test_a_refusal_from_before_something_was_given_back_holds_nobody_up():
    queue = queue_of(*named("a1"))
    asking = queue.next(0.0)
    queue.unblock()
    queue.denied(asking, by_class(30.0), 0.1)
    assert queue.next(0.1) is asking
    queue.denied(asking, by_class(29.9), 0.2)
    assert (queue.next(0.2), queue.wake_at()) == (None, pytest.approx(30.1))


def test_what_was_refused_before_something_was_given_back_is_asked_again_after_a_retry_of_its_person():
    refused = Named("a1")
    queue = queue_of(refused)
    queue.denied(queue.next(0.0), by_class(30.0), 0.0)
    queue.join(Named("a0", head=True), 0.0)
    queue.unblock()
    assert all_admitted(queue) == "a0 a1"


def test_a_hold_of_what_blocks_the_class_lets_others_go():
    queue = queue_of(*named("a1", "b1"))
    blocking = queue.next(0.0)
    queue.denied(blocking, by_class(9.0), 0.0)
    assert queue.next(0.0) is None
    queue.hold(blocking, None, 0.0)
    assert all_admitted(queue) == "b1"


def test_when_the_one_that_blocks_the_class_leaves_the_next_may_ask():
    large, small = Named("large", cost_s=9.0), Named("small", cost_s=0.1)
    queue = queue_of(large)
    queue.denied(queue.next(0.0), by_class(9.0), 0.0)
    queue.join(small, 0.0)
    assert queue.next(0.0) is None
    queue.leave(large)
    assert all_admitted(queue) == "small"


def test_a_wait_of_nothing_is_still_a_wait():
    queue = queue_of(*named("a1", "b1"))
    queue.denied(queue.next(0.0), by_class(0.0), 0.0)
    assert queue.next(0.0) is None
    queue = queue_of(*named("a1"))
    queue.denied(queue.next(0.0), by_person(0.0), 0.0)
    assert queue.next(0.0) is None


def test_what_was_asked_before_it_joined_is_reported_after():
    entry = Named("a1")
    queue = queue_of(entry)
    queue.denied(entry, by_class(2.0), 0.0)
    assert (queue.next(1.0), queue.wake_at()) == (None, 2.0)
    assert queue.next(2.0) is entry


# answers of a person


def test_a_person_over_their_own_limit_waits_and_others_go_on():
    queue = queue_of(*named("a1", "a2", "b1", "b2"))
    queue.denied(queue.next(0.0), by_person(3.0), 0.0)
    assert queue.wake_at() == 3.0
    assert all_admitted(queue, 1.0) == "b1 b2"
    assert all_admitted(queue, 3.0) == "a1 a2"


@pytest.mark.parametrize("reason", ["user_rpm", "user_otpm", "key_rpm", "count_rpm"])
def test_who_is_blocked_saves_nothing(reason):
    queue = queue_of(*named("a1", "a2", "a3", *(f"b{number}" for number in range(1, 9))))
    queue.denied(queue.next(0.0), by_person(1.0, reason), 0.0)
    for _ in range(4):
        assert queue.admitted(queue.next(0.0), 0.0)
    assert all_admitted(queue, 1.0) == "a1 b5 a2 b6 a3 b7 b8"


def test_a_slot_of_a_person_is_waited_for_until_it_is_free():
    queue = queue_of(*named("a1", "b1"))
    queue.denied(queue.next(0.0), by_person(math.inf, "user_concurrency"), 0.0)
    assert all_admitted(queue) == "b1"
    assert queue.wake_at() is None
    queue.freed("somebody")
    assert queue.next(99.0) is None
    queue.freed("a")
    assert all_admitted(queue, 99.0) == "a1"


def test_freed_does_not_end_a_wait_of_known_length():
    queue = queue_of(*named("a1"))
    queue.denied(queue.next(0.0), by_person(3.0), 0.0)
    queue.freed("a")
    assert queue.next(1.0) is None


def test_what_is_held_is_named_when_its_model_is_back():
    queue = queue_of(*named("a1", "a2", "b1"))
    held = queue.next(0.0)
    queue.hold(held, None, 0.0)
    assert all_admitted(queue) == "b1"
    queue.freed("a")
    assert queue.next(5.0) is None
    queue.release()
    assert all_admitted(queue, 5.0) == "a1 a2"


def test_release_does_not_end_a_wait_for_ones_own_limit():
    queue = queue_of(*named("a1"))
    queue.denied(queue.next(0.0), by_person(3.0), 0.0)
    queue.release()
    assert queue.next(1.0) is None


def test_what_is_held_until_a_time_is_named_then():
    queue = queue_of(*named("a1"))
    queue.hold(queue.next(0.0), 4.0, 0.0)
    assert (queue.next(3.9), queue.wake_at()) == (None, 4.0)
    assert queue.next(4.0).name == "a1"


def test_what_is_held_until_the_past_is_held_for_a_moment():
    queue = queue_of(*named("a1"))
    queue.hold(queue.next(5.0), 1.0, 5.0)
    assert queue.next(5.0) is None


def test_what_stands_behind_the_held_goes_on_when_that_leaves():
    first, second = named("a1", "a2")
    queue = queue_of(first, second)
    queue.hold(queue.next(0.0), None, 0.0)
    queue.leave(first)
    assert all_admitted(queue) == "a2"


def test_a_hold_of_one_that_is_not_first_waits_for_its_turn():
    first, second = named("a1", "a2")
    queue = queue_of(first, second)
    queue.hold(second, None, 0.0)
    assert all_admitted(queue) == "a1 a2"


def test_what_waits_may_be_held_before_it_was_named():
    first, second = named("a1", "b1")
    queue = queue_of(first, second)
    queue.hold(first, 4.0, 0.0)
    assert all_admitted(queue) == "b1"
    assert all_admitted(queue, 4.0) == "a1"


# leaving and deadlines


@pytest.mark.parametrize("at", ["waiting", "asking", "refused by the class", "refused for its person", "held"])
def test_one_may_leave_at_any_time_and_twice(at):
    first, second, other = named("a1", "a2", "b1", bytes=7)
    queue = queue_of(first, second, other)
    if at != "waiting":
        assert queue.next(0.0) is first
    if at == "refused by the class":
        queue.denied(first, by_class(1.0), 0.0)
    if at == "refused for its person":
        queue.denied(first, by_person(1.0), 0.0)
    if at == "held":
        queue.hold(first, None, 0.0)
    queue.leave(first)
    queue.leave(first)
    assert len(queue) == 2
    assert sorted(all_admitted(queue, 1.0).split()) == ["a2", "b1"]
    assert len(queue) == 0


def test_nothing_is_heard_of_one_that_left_while_it_asked():
    gone, other = named("a1", "b1")
    queue = queue_of(gone, other)
    assert queue.next(0.0) is gone
    queue.leave(gone)
    queue.denied(gone, by_class(60.0), 0.1)
    assert not queue.admitted(gone, 0.1)
    queue.hold(gone, None, 0.1)
    assert all_admitted(queue, 0.1) == "b1"


def test_one_whose_deadline_is_over_is_not_named_but_told():
    late, other = Named("a1", deadline=2.0), Named("a2")
    queue = queue_of(late, other)
    assert queue.wake_at() == 2.0
    assert queue.next(2.0) is other
    assert len(queue) == 2
    assert queue.wake_at() == 2.0
    assert queue.expired(2.0) == [late]
    assert (len(queue), queue.wake_at()) == (1, None)


def test_one_whose_answer_comes_after_its_deadline_may_not_go():
    late = Named("a1", deadline=2.0)
    queue = queue_of(late)
    assert queue.next(1.9) is late
    assert not queue.admitted(late, 2.1)
    assert queue.next(2.1) is None
    assert queue.expired(2.1) == [late]
    assert not queue


def test_one_that_expires_while_it_asks_frees_its_person():
    late, second = Named("a1", deadline=2.0), Named("a2")
    queue = queue_of(late, second)
    queue.next(1.0)
    assert queue.expired(2.0) == [late]
    assert queue.next(2.0) is second
    assert not queue.admitted(late, 2.1)


# background


def test_background_goes_behind_people_and_takes_all_when_there_are_none():
    assert all_admitted(queue_of(*background("x1", "x2", "y1"), *named("a1", "a2"))) == "a1 a2 x1 y1 x2"


def test_background_has_a_tenth_under_any_load():
    people = named(*(f"a{number}" for number in range(40)))
    order = all_admitted(queue_of(*people, *background(*(f"x{number}" for number in range(9))))).split()
    assert [place for place, name in enumerate(order) if name[0] == "x"][:4] == [9, 19, 29, 39]


def test_background_that_the_class_refused_does_not_hold_people_up():
    queue = queue_of(*background("x1", cost_s=9.0))
    queue.denied(queue.next(0.0), by_class(9.0), 0.0)
    assert (queue.next(0.0), queue.wake_at()) == (None, 9.0)
    queue.join(Named("a1"), 1.0)
    assert all_admitted(queue, 1.0) == "a1"
    assert all_admitted(queue, 9.0) == "x1"


def test_background_is_not_passed_by_people_once_its_tenth_is_due():
    queue = queue_of(*named(*(f"a{number}" for number in range(12))), *background("x1"))
    for _ in range(9):
        assert queue.admitted(queue.next(0.0), 0.0)
    asking = queue.next(0.0)
    assert asking.name == "x1"
    queue.denied(asking, by_class(1.0), 0.0)
    assert queue.next(0.5) is None
    assert all_admitted(queue, 1.0) == "x1 a9 a10 a11"


def test_a_tenth_that_was_not_taken_is_kept_while_background_waits():
    x1, x2 = background("x1", "x2")
    queue = queue_of(*named(*(f"a{number}" for number in range(12))), x1, x2)
    for _ in range(9):
        assert queue.admitted(queue.next(0.0), 0.0)
    assert queue.next(0.0) is x1
    queue.leave(x1)
    assert queue.next(0.0) is x2
    queue.denied(x2, by_person(1.0), 0.0)
    assert queue.admitted(queue.next(0.0), 0.0)
    assert queue.next(1.0) is x2


def test_background_saves_nothing_before_it_comes():
    queue = queue_of(*named(*(f"a{number}" for number in range(20))), *background("x1"))
    for _ in range(10):
        assert queue.admitted(queue.next(0.0), 0.0)
    queue.join(*background("x2"), 0.0)
    assert all_admitted(queue).split().index("x2") == 9


def test_a_person_and_their_background_work_are_two_lines():
    queue = queue_of(Named("a1", waiting_max=1), Named("a2", background=True, waiting_max=1))
    assert [entry.name for entry in all_named(queue)] == ["a1", "a2"]


# bounds


def refusal(queue: RequestQueue, entry: Entry) -> str | None:
    shed, reason = queue.join(entry, 0.0)
    assert not (shed and reason)
    return reason


def test_a_person_has_so_many_waiting_over_all_classes():
    totals = QueueTotals(QueueBounds())
    sonnet, haiku = RequestQueue(totals), RequestQueue(totals)
    first = Named("a1", waiting_max=2)
    assert refusal(sonnet, first) is None
    assert refusal(haiku, Named("a2", waiting_max=2)) is None
    assert refusal(sonnet, Named("a3", waiting_max=2)) == "person_queue_full"
    assert refusal(sonnet, Named("b1", waiting_max=2)) is None
    sonnet.leave(first)
    assert refusal(haiku, Named("a4", waiting_max=2)) is None


def test_so_many_wait_in_all():
    queue = queue_of(*named("a1", "b1"), bounds=QueueBounds(waiting_max=2))
    assert refusal(queue, Named("c1")) == "queue_full"


def test_so_many_bytes_wait_in_all():
    queue = queue_of(Named("a1", bytes=6), bounds=QueueBounds(bytes_max=10))
    assert refusal(queue, Named("b1", bytes=5)) == "queue_bytes"
    assert refusal(queue, Named("b2", bytes=4)) is None


def test_a_retry_is_never_refused():
    bounds = QueueBounds(waiting_max=1, bytes_max=10)
    queue = queue_of(Named("a1", bytes=10), bounds=bounds)
    assert refusal(queue, Named("a0", bytes=10, head=True, waiting_max=1)) is None
    assert len(queue) == 2


def test_full_in_all_sheds_the_newest_of_the_longest_line_of_the_lightest():
    entries = [*named("a1", "b1", "b2"), *named("p1", "p2", "p3", weight=PAID), *background("x1", "y1", "y2")]
    queue = queue_of(*entries, bounds=QueueBounds(waiting_max=len(entries)))
    shed_in_turn = []
    for number in range(7):
        shed, reason = queue.join(Named("q", user=f"q{number}", weight=PAID), 0.0)
        shed_in_turn.append(reason or " ".join(map(repr, shed)))
    assert shed_in_turn == ["y2", "y1", "x1", "b2", "b1", "a1", "queue_full"]
    assert len(queue) == len(entries)


def test_nobody_is_shed_for_an_equal_or_a_lighter_one():
    bounds = QueueBounds(waiting_max=2)
    assert refusal(queue_of(*named("a1", "b1"), bounds=bounds), Named("c1")) == "queue_full"
    assert refusal(queue_of(*named("p1", "q1", weight=PAID), bounds=bounds), Named("c1")) == "queue_full"
    assert refusal(queue_of(*named("a1", "b1"), bounds=bounds), *background("x1", weight=PAID)) == "queue_full"


def test_neither_a_retry_nor_what_asks_is_shed():
    queue = queue_of(Named("a1"), bounds=QueueBounds(waiting_max=2))
    assert queue.next(0.0).name == "a1"
    queue.join(Named("b1", head=True), 0.0)
    assert refusal(queue, Named("p1", weight=PAID)) == "queue_full"


def test_shedding_reaches_over_classes_and_makes_room_for_bytes():
    totals = QueueTotals(QueueBounds(bytes_max=10))
    sonnet, haiku = RequestQueue(totals), RequestQueue(totals)
    for entry in named("a1", "b1", "c1", bytes=3):
        assert refusal(haiku, entry) is None
    shed, reason = sonnet.join(Named("p1", weight=PAID, bytes=6), 0.0)
    assert (len(shed), reason) == (2, None)
    assert (len(haiku), len(sonnet), totals.bytes) == (1, 1, 9)
    assert sonnet.join(Named("q1", weight=PAID, bytes=9), 0.0) == ((), "queue_bytes"), "in vain nobody is shed"
    assert len(haiku) == 1


# what others read


def test_wake_at_is_the_first_change_by_time_alone():
    late = Named("d1", deadline=9.0)
    queue = queue_of(*named("a1", "b1"), late)
    assert queue.wake_at() == 9.0
    queue.denied(queue.next(0.0), by_person(3.0), 0.0)
    assert queue.wake_at() == 3.0
    queue.denied(queue.next(0.0), by_class(5.0), 0.0)
    assert queue.wake_at() == 5.0, "while the class is blocked the end of a person's block changes nothing"
    assert queue.next(5.0).name == "b1"
    assert queue.wake_at() == 9.0, "while it asks again nothing but deadlines change by time"
    assert queue.expired(9.0) == [late]
    assert queue.wake_at() is None


def test_a_block_of_somebody_who_left_wakes_nobody():
    gone = Named("a1")
    queue = queue_of(gone, Named("b1"))
    queue.denied(queue.next(0.0), by_person(3.0), 0.0)
    queue.leave(gone)
    assert queue.wake_at() is None


def test_the_snapshot_says_how_it_stands():
    queue = queue_of(
        Named("a1", bytes=5, enqueued_at=-2.0), Named("a2", bytes=6), Named("b1"), *background("x1", enqueued_at=1.0)
    )
    queue.denied(queue.next(0.0), by_class(3.0), 0.0)
    snapshot = queue.snapshot(1.0)
    assert (snapshot.waiting, snapshot.bytes, snapshot.people, snapshot.background) == (4, 11, 3, 1)
    assert (snapshot.oldest_wait_s, snapshot.blocked_s, snapshot.reason) == (3.0, 2.0, "class_itpm")
    assert snapshot.expected_wait_s == pytest.approx(2.0 + 2.0)
    empty = queue_of().snapshot(1.0)
    assert (empty.waiting, empty.oldest_wait_s, empty.blocked_s, empty.expected_wait_s) == (0, 0.0, None, 0.0)


def test_it_lists_who_waits():
    queue = queue_of(*named("a1", "b1", "a2"), *background("x1"))
    assert [entry.name for entry in queue] == ["a1", "a2", "b1", "x1"]
    assert "4 waiting" in repr(queue)
    assert repr(Entry("a", cost_s=1.5, deadline=3.0, enqueued_at=0.0, background=True)) == (
        "<Entry a background 1.5 s until 3>"
    )


def test_ten_thousand_people_leave_no_trace():
    queue = queue_of(Named("stays"), bounds=QueueBounds(waiting_max=5))
    totals = queue._totals
    for number in range(10_000):
        now = float(number)
        entry = Named("x", user=f"u{number}", background=number % 7 == 0, deadline=now + 1000.0)
        assert refusal(queue, entry) is None
        if number % 3 == 0:
            queue.denied(entry, by_person(math.inf if number % 2 else 1000.0), now)
        if number % 5 == 0:
            queue.hold(entry, now + 1000.0, now)
        queue.leave(entry)
    held = [queue._people.heap, queue._background.heap, queue._blocks, queue._deadlines]
    assert sum(map(len, held)) < 400
    assert (len(queue._people.lines), len(queue._background.lines)) == (1, 0)
    assert all_admitted(queue, 1e6) == "stays"
    assert [len(one) for one in held[2:]] == [0, 0]
    assert (totals.waiting, totals.bytes, totals.by_user) == (0, 0, ({}, {}))
    assert not queue._people.heap
