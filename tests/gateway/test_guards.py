"""The guard and the way of an alert: a runaway loop in virtual time, real tables, and a database that is down."""

import heapq
import itertools
import random
import threading
import time
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from headgate.gateway.guards import WAITING_MAX, AlertSink, SpendGuard, held_to_one, velocity_policy
from headgate.policy.alerts import Alert, CallCost
from headgate.policy.limiter import Ask, ClassLimits, Limiter, Subject
from headgate.policy.spend_velocity import SpendVelocity
from headgate.storage import alerts as alert_table
from headgate.storage.database import open_database

USD = 10**9
CENT = USD // 100
START_NS = 1_785_000_000 * 10**9
POLICY = velocity_policy(usd_per_10_min=2.0, history_factor=5.0, hold_s=3600.0)


@pytest.fixture
def engine(tmp_path):
    engine = open_database(tmp_path, now_ns=time.time_ns)
    yield engine
    engine.dispose()


@pytest.fixture
def time_is():
    """A clock that is set by hand."""
    return SimpleNamespace(now=0.0)


@pytest.fixture
def guarded(time_is):
    """A guard whose alerts go to the log alone, and that log."""
    with capture_logs() as logs:
        sink = AlertSink(None, now_ns=lambda: START_NS + int(time_is.now * 1e9))
        guard = SpendGuard(POLICY, sink, clock=lambda: time_is.now)
        yield SimpleNamespace(guard=guard, sink=sink, logs=logs)


def alerts_of(logs, event="alert"):
    return [(line["kind"], line["subject"]) for line in logs if line["event"] == event]


def settle(guarded, cost, call_id="call_1", *, user="an", key_id="k1", digest="", **caps):
    guarded.guard.began(user, key_id, call_id, cost, **caps)
    guarded.guard.settled(user, key_id, cost, call_id, digest, **caps)


class World:
    """Callers of one gateway in virtual time: the limiter gives out turns, the guard says who may have one only.

    A loop keeps `concurrency` calls of `cost` going, $40 an hour together; twenty people of the same app ask for
    two cents each minute. Events are (at, order, what to do).
    """

    def __init__(self, *, concurrency: int, cost: int, estimated: bool, loops_key: str, budget: int = 20 * USD) -> None:
        self.now = 0.0
        self.limiter = Limiter()
        self.logs = []
        sink = AlertSink(None, now_ns=lambda: START_NS + int(self.now * 1e9))
        self.guard = SpendGuard(POLICY, sink, clock=lambda: self.now)
        self.cost, self.estimated, self.loops_key, self.budget = cost, estimated, loops_key, budget
        self.lasts_s = concurrency * cost * 3600 / (40 * USD)
        self.concurrency = concurrency
        self.loop_reserved = 0
        self.most_at_once_when_told = 0
        self.loop_running = 0
        self.crossed_at = self.told_at = self.started_when_held = self.stopped_at = None
        self.others = {"asked": 0, "waited": 0}
        self.numbers = itertools.count()
        self.events = []

    def at(self, when, do):
        heapq.heappush(self.events, (when, next(self.numbers), do))

    def run(self, until_s):
        with capture_logs() as self.logs:
            for lane in range(self.concurrency):
                self.at(lane * self.lasts_s / self.concurrency, self.loop_asks)
            for person in range(20):
                self.at(person * 3.0, lambda person=person: self.other_asks(person))
            while self.events and self.events[0][0] <= until_s:
                self.now, _, do = heapq.heappop(self.events)
                self.guard.tick()
                do()
                if self.told_at is None and any(line["event"] == "alert" for line in self.logs):
                    self.told_at = self.now

    def admitted(self, user, key_id, call_id, expected):
        self.guard.began(user, key_id, call_id, expected)
        subjects = held_to_one((Subject(f"user:{user}", concurrency=50),), self.guard.held(user, key_id))
        ask = Ask(call_id, "sonnet", ClassLimits(), subjects)
        return self.limiter.admit(ask, self.now).admitted

    def loop_asks(self, call_id=""):
        """One waits in the queue, as a request does, until it has a turn."""
        call_id = call_id or f"loop_{next(self.numbers)}"
        if self.loop_reserved + self.cost > self.budget:
            self.stopped_at = self.stopped_at or self.now
            self.guard.settled("loop", self.loops_key, 0, call_id)
            return
        if self.loop_reserved + self.cost > 2 * USD and self.crossed_at is None:
            self.crossed_at = self.now  # with what is under way
        if not self.admitted("loop", self.loops_key, call_id, self.cost if self.estimated else 0):
            self.started_when_held = self.started_when_held or self.loop_reserved
            self.at(self.now + 15.0, lambda: self.loop_asks(call_id))
            return
        self.loop_reserved += self.cost
        self.loop_running += 1
        if self.told_at is not None:
            self.most_at_once_when_told = max(self.most_at_once_when_told, self.loop_running)
        if self.guard.throttled("loop", self.loops_key) and self.started_when_held is None:
            self.started_when_held = self.loop_reserved
        self.at(self.now + self.lasts_s, lambda: self.loop_ends(call_id))

    def loop_ends(self, call_id):
        self.loop_running -= 1
        self.limiter.settle(call_id, input_tokens=0, output_tokens=0, now=self.now)
        self.guard.settled("loop", self.loops_key, self.cost, call_id)
        self.loop_asks()

    def other_asks(self, person):
        user, call_id = f"p{person}", f"other_{next(self.numbers)}"
        self.others["asked"] += 1
        self.others["waited"] += not self.admitted(user, "app", call_id, 2 * CENT)
        self.others["waited"] += self.guard.throttled(user, "app")

        def ends():
            self.limiter.settle(call_id, input_tokens=0, output_tokens=0, now=self.now)
            self.guard.settled(user, "app", 2 * CENT, call_id)

        self.at(self.now + 8.0, ends)
        self.at(self.now + 60.0, lambda: self.other_asks(person))


@pytest.mark.parametrize("concurrency", [1, 4, 16])
@pytest.mark.parametrize("cost", [2 * CENT, 11 * CENT])
@pytest.mark.parametrize("estimated", [True, False], ids=["estimated", "unknown"])
@pytest.mark.parametrize("loops_key", ["own", "app"])
def test_a_loop_at_40_dollars_an_hour_is_held_before_4_and_told_once_and_nobody_else_notices(
    concurrency, cost, estimated, loops_key
):
    world = World(concurrency=concurrency, cost=cost, estimated=estimated, loops_key=loops_key)
    world.run(45 * 60.0)
    assert world.started_when_held <= 2 * USD + cost < 4 * USD, "with what was under way"
    assert world.most_at_once_when_told == 1
    assert world.told_at - world.crossed_at <= 60.0
    assert alerts_of(world.logs) == [("spend_velocity", "user:loop")]
    assert world.loop_reserved <= 20 * USD
    assert (world.stopped_at is not None) is (concurrency == 1), "one at a time is as fast as it was"
    assert world.others["asked"] >= 20 * 45
    assert world.others["waited"] == 0


def test_a_hundred_calls_that_start_together_are_held_before_the_first_is_paid():
    world = World(concurrency=100, cost=11 * CENT, estimated=True, loops_key="own")
    world.lasts_s = 60.0
    for _ in range(100):
        world.at(0.0, world.loop_asks)
    world.concurrency = 0
    world.run(59.0)
    assert world.loop_reserved <= 2 * USD + 11 * CENT


def test_two_hundred_people_on_the_first_day_of_an_app_are_no_loop(guarded):
    for number in range(200):
        guarded.guard.began(f"p{number}", "app", f"call_{number}", 2 * CENT)
        assert not guarded.guard.throttled(f"p{number}", "app")
    for number in range(200):
        guarded.guard.settled(f"p{number}", "app", 2 * CENT, f"call_{number}")
    assert alerts_of(guarded.logs) == []


def test_what_one_person_has_under_way_does_not_hold_the_others_of_an_app(guarded):
    guarded.guard.seed({"key:app": dict.fromkeys(range(1, 500), CENT)})
    settle(guarded, CENT, user="binh", key_id="app")
    for number in range(100):
        guarded.guard.began("an", "app", f"call_{number}", 11 * CENT)
    assert guarded.guard.held("an", "app") == ("user:an",)
    assert guarded.guard.held("binh", "app") == ()


def test_whom_an_operator_released_no_key_holds_for_the_same_money(guarded):
    guarded.guard.seed({"user:an": dict.fromkeys(range(1, 500), CENT), "key:k1": dict.fromkeys(range(1, 500), CENT)})
    settle(guarded, 60 * CENT)
    assert guarded.guard.release("user:an", by="lan")
    settle(guarded, 90 * CENT)
    guarded.guard.began("an", "k1", "call_2", 5 * CENT)
    assert guarded.guard.held("an", "k1") == ()


def test_who_begins_is_told_at_once_who_is_held(guarded, time_is):
    guarded.guard.seed({"user:an": dict.fromkeys(range(1, 500), CENT), "key:k1": dict.fromkeys(range(1, 500), CENT)})
    dice, told = random.Random(4), set()
    for number in range(2_000):
        time_is.now += dice.choice((0.1, 1.0, 20.0))
        user, key_id, call_id = dice.choice(("an", "binh", "")), dice.choice(("k1", "k2")), f"call_{number}"
        held = guarded.guard.began(user, key_id, call_id, dice.choice((0, CENT, 20 * CENT)))
        assert held == guarded.guard.held(user, key_id)
        told.add(held)
        if dice.random() < 0.9:
            guarded.guard.settled(user, key_id, dice.choice((0, CENT, 10 * CENT)), call_id)
        if dice.random() < 0.01:
            guarded.guard.release("user:an", by="lan")
    assert told >= {(), ("user:an",), ("key:k1",)}


def test_a_small_script_that_runs_away_is_held_by_its_key_and_its_owner_is_not(guarded):
    guarded.guard.seed(
        {"user:an": dict.fromkeys(range(1, 1000), 5 * USD), "key:k1": dict.fromkeys(range(1, 500), CENT)}
    )
    settle(guarded, 60 * CENT)
    assert guarded.guard.held("an", "k1") == ("key:k1",)
    assert guarded.guard.held("an", "k2") == ()
    assert alerts_of(guarded.logs) == [("spend_velocity", "key:k1")]


def test_a_trip_is_told_in_words_with_the_calls_that_led_to_it_and_how_to_mend_it(guarded):
    for number in range(21):
        settle(guarded, 10 * CENT, f"call_{number}")
    (line,) = [line for line in guarded.logs if line["event"] == "alert"]
    assert line["message"] == (
        "user:an spent $2.10 in 10 minutes: more than $2.00, the line for who has no day of history yet. "
        "It is held to one call at a time, until 60 minutes after it is below that again. Look at its calls; if they "
        "are meant, POST /admin/velocity/user:an/release doubles its limit for 1 h, and velocity.usd_per_10_min raises "
        "the line for good."
    )
    assert line["calls"] == [f"call_{number}" for number in range(11, 21)]
    assert line["log_level"] == "error"


def test_the_words_for_who_has_a_history_name_it(guarded):
    guarded.guard.seed({"user:an": dict.fromkeys(range(1, 1000), 20 * CENT)})
    settle(guarded, 2 * USD)
    (line,) = [line for line in guarded.logs if line["event"] == "alert"]
    assert "its own last week, whose busiest ten minutes cost $0.2" in line["message"]


def test_a_release_ends_the_alert_and_the_next_trip_is_told_again(guarded):
    settle(guarded, 3 * USD)
    assert guarded.guard.throttled("an", "k1")
    assert not guarded.guard.release("user:binh", by="lan")
    assert guarded.guard.release("user:an", by="lan")
    assert not guarded.guard.throttled("an", "k1")
    assert alerts_of(guarded.logs, "alert_ended") == [("spend_velocity", "user:an")]
    settle(guarded, 3 * USD)
    assert not guarded.guard.throttled("an", "k1"), "its limit is double, and no key holds it for the same money"
    settle(guarded, 3 * USD)
    assert len(alerts_of(guarded.logs)) == 2


def test_who_is_held_back_by_what_is_under_way_is_told_of_and_let_go_with_it(guarded, time_is):
    guarded.guard.began("an", "k1", "call_1", 3 * USD)
    assert guarded.guard.throttled("an", "k1")
    for time_is.now in (10.0, 25.0, 40.0):
        guarded.guard.tick()
    (line,) = [line for line in guarded.logs if line["event"] == "alert"]
    assert "spent $0.00 in 10 minutes, and what is under way will cost $3.00: more than $2.00" in line["message"]
    assert "one call at a time, while that is so." in line["message"]
    guarded.guard.settled("an", "k1", 10 * CENT, "call_1")
    time_is.now = 61.0
    guarded.guard.tick()
    assert not guarded.guard.throttled("an", "k1")
    assert alerts_of(guarded.logs, "alert_ended") == [("spend_velocity", "user:an")]


def test_time_ends_a_trip_and_its_alert(guarded, time_is):
    settle(guarded, 3 * USD)
    time_is.now = 610.0 + 3599.0
    guarded.guard.tick()
    assert guarded.guard.throttled("an", "k1")
    time_is.now = 610.0 + 3600.0
    guarded.guard.tick()
    assert not guarded.guard.throttled("an", "k1")
    assert [line["by"] for line in guarded.logs if line["event"] == "alert_ended"] == ["time"]


def test_a_cap_a_day_reaches_the_limit(guarded):
    guarded.guard.seed({"user:an": dict.fromkeys(range(1, 1000), USD), "key:k1": dict.fromkeys(range(1, 1000), USD)})
    settle(guarded, 26 * CENT * 10, user_cap_nanousd=20 * USD)
    assert guarded.guard.held("an", "k1") == ("user:an",)
    settle(guarded, 26 * CENT * 10, user="binh", key_cap_nanousd=20 * USD)
    assert guarded.guard.held("chi", "k1") == ()


def test_equal_calls_are_told_once_and_hold_nobody(guarded, time_is):
    for number in range(40):
        time_is.now = float(number)
        settle(guarded, 1, f"call_{number}", digest="ab")
        settle(guarded, 1, f"call_b{number}", user="binh", digest=f"{number}")
    assert alerts_of(guarded.logs) == [("loop", "user:an")]
    assert guarded.sink.repeats("loop", "user:an") == 9
    assert not guarded.guard.throttled("an", "k1")


def test_a_call_without_a_person_counts_for_its_key(guarded):
    settle(guarded, 3 * USD, user="")
    assert guarded.guard.held("", "k1") == ("key:k1",)


def test_switched_off_it_does_nothing_and_settings_hold_from_the_next_call(guarded):
    guarded.guard.apply(POLICY, enabled=False)
    settle(guarded, 30 * USD)
    assert not guarded.guard.throttled("an", "k1")
    guarded.guard.apply(velocity_policy(usd_per_10_min=40, history_factor=5, hold_s=60), enabled=True)
    settle(guarded, 30 * USD)
    assert not guarded.guard.throttled("an", "k1")
    assert guarded.guard.snapshot().line_nanousd == 40 * USD


def test_who_is_held_gets_one_call_at_a_time_and_everything_else_stays(guarded):
    subjects = (Subject("user:an", 20, 100, 5), Subject("key:k1", 7))
    assert held_to_one(subjects, ()) is subjects
    assert held_to_one(subjects, ("user:an",)) == (Subject("user:an", 20, 100, 1), subjects[1])
    assert held_to_one(subjects[:1], ("key:k9",)) == (subjects[0], Subject("key:k9", concurrency=1))


def test_settings_become_nano_dollars():
    assert velocity_policy(usd_per_10_min=0.5, history_factor=3.0, hold_s=1.0).line_nanousd == USD // 2
    assert SpendVelocity(velocity_policy(usd_per_10_min=0.1, history_factor=3.0, hold_s=1.0)).policy.hold_s == 10.0


# the way of an alert


def rows(engine):
    with engine.connect() as connection:
        return alert_table.listed(connection)


def test_alerts_and_their_ends_reach_the_table_in_order(engine):
    sink = AlertSink(engine, now_ns=lambda: START_NS)
    sink.start()
    with capture_logs():
        for number in range(50):
            assert sink.raise_alert("loop", f"user:{number}", "why", [CallCost("call_1", 1)])
            assert not sink.raise_alert("loop", f"user:{number}", "why")
            if number % 2:
                assert sink.end("loop", f"user:{number}", by="lan")
        assert not sink.end("loop", "user:1", by="lan")
        sink.close()
    found = rows(engine)
    assert [each.subject for each in reversed(found)] == [f"user:{number}" for number in range(50)]
    assert [each.ended_by for each in reversed(found)] == ["", "lan"] * 25
    assert (sink.waiting, sink.dropped) == (0, 0)


def test_a_database_that_is_down_delays_alerts_and_loses_none(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'gone' / 'headgate.db'}")
    sink = AlertSink(engine, now_ns=lambda: START_NS)
    waits = threading.Event()
    with capture_logs() as logs:
        sink._stopping.wait = lambda _: (
            waits.wait(5.0) and False
        )  # the pause before the next try, made as short as is needed
        sink.start()
        for number in range(5):
            sink.raise_alert("loop", f"user:{number}", "why")
        until(lambda: any(line["event"] == "alerts_waiting" for line in logs))
        assert sink.waiting == 5
        open_database(tmp_path / "gone", now_ns=time.time_ns).dispose()
        waits.set()
        until(lambda: not sink.waiting)
        sink.close()
    assert {each.subject for each in rows(engine)} == {f"user:{number}" for number in range(5)}
    assert len([line for line in logs if line["event"] == "alerts_waiting"]) == 1
    engine.dispose()


def until(true):
    deadline = time.monotonic() + 10.0
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        threading.Event().wait(0.005)


def test_what_waits_is_bounded_and_the_oldest_goes(engine):
    sink = AlertSink(engine, now_ns=lambda: START_NS)  # not started: nothing is taken away
    with capture_logs() as logs:
        for number in range(WAITING_MAX + 3):
            sink.raise_alert("loop", f"user:{number}", "why")
        sink.close()
    assert (sink.waiting, sink.dropped) == (WAITING_MAX, 3)
    assert logs[-1]["event"] == "alerts_not_kept"


def test_a_row_that_cannot_be_written_does_not_stop_the_next(engine):
    sink = AlertSink(engine, now_ns=lambda: START_NS)
    with capture_logs() as logs:
        sink.raised(Alert("loop", "user:a", "why", at_ns=1 << 70))
        sink.raise_alert("loop", "user:b", "why")
        sink.start()
        until(lambda: not sink.waiting)
        sink.close()
    assert [each.subject for each in rows(engine)] == ["user:b"]
    assert sink.dropped == 1
    assert any(line["event"] == "alert_not_kept" for line in logs)


def test_what_another_process_ended_is_told_again():
    with capture_logs() as logs:
        sink = AlertSink(None, now_ns=lambda: START_NS)
        sink.raise_alert("loop", "user:an", "why")
        sink.forget("loop", "user:an")
        assert sink.raise_alert("loop", "user:an", "why")
    assert len(alerts_of(logs)) == 2
