"""Laws of the breakers: what opens them, the single probe, what flapping teaches them, and what they must not forget.

`outcomes` are written as letters: `F` failed, `S` succeeded, `N` neutral.
"""

import heapq
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headgate.policy.breaker import (
    ACCOUNT_PROBE_S,
    ASK_AGAIN_S,
    BINS,
    MODELS_MAX,
    RUN_GAP_S,
    STRAY,
    AccountBreaker,
    Breaker,
    BreakerPolicy,
    Breakers,
    State,
    Transition,
)

POLICY = BreakerPolicy()
CLOSED, OPEN, HALF_OPEN = State


def middle():
    """A roll that leaves waits as they are."""
    return 0.5


def breaker(jitter=middle, now=0.0, **policy):
    return Breaker("m", policy=BreakerPolicy(**policy), jitter=jitter, now=now)


def feed(it, outcomes, now=0.0, every_s=0.0):
    """One attempt after the other; the transitions they made, as `before>after reason`."""
    made = []
    for letter in outcomes:
        token = it.started(now)
        end = {"F": it.failed, "S": it.succeeded, "N": it.neutral}[letter]
        transition = end(token, now)
        if transition is not None:
            made.append(f"{transition.before.value}>{transition.after.value} {transition.reason}")
        now += every_s
    return made


def opened(reopened=0, now=0.0, **policy):
    """A breaker that opened at `now`, having come back and broken again `reopened` times in the 100 s before."""
    it = breaker(now=now - 1000, **policy)
    it.transitions = 1
    it._stable_from = now + 1.0 if reopened else 0.0
    it.reopened = max(reopened - 1, 0)
    feed(it, "FFF", now)
    assert (it.state, it.reopened) == (OPEN, reopened)
    return it


# --- What opens it


@pytest.mark.parametrize(
    ("outcomes", "made"),
    [
        ("FF", []),
        ("FFF", ["closed>open failures_in_a_row"]),
        ("FFSFF", []),
        ("FFNF", ["closed>open failures_in_a_row"]),
        ("SSSSSFFF", ["closed>open failures_in_a_row"]),
        ("N" * 1000, []),
        ("FN" * 2 + "N" * 1000, []),
        ("SF" * 4, []),
        ("SF" * 5, ["closed>open failure_ratio"]),
        ("S" * 5 + "FFSFFSFFS", []),
        ("S" * 3 + "FFSFFSF", ["closed>open failure_ratio"]),
    ],
)
def test_what_opens_it(outcomes, made):
    assert feed(breaker(), outcomes, every_s=0.1) == made


def test_failures_further_apart_than_five_minutes_are_not_in_a_row():
    assert feed(breaker(), "F" * 10, every_s=RUN_GAP_S) == []
    assert feed(breaker(), "FFF", every_s=RUN_GAP_S - 1) == ["closed>open failures_in_a_row"]


def test_failures_that_are_older_than_the_window_are_forgotten():
    it = breaker()
    assert feed(it, "SFSFSFSF", now=0.0) == []
    assert feed(it, "SFSFSFSF", now=31.0) == []
    assert it.snapshot(31.0).window_outcomes == 8
    assert feed(it, "SF", now=32.0) == ["closed>open failure_ratio"]


def test_the_window_forgets_bin_by_bin():
    it = breaker()
    feed(it, "S" * 30, every_s=1.0)
    seen = [it.snapshot(30.0 + second).window_outcomes for second in range(0, 40, 3)]
    assert seen == sorted(seen, reverse=True)
    assert (seen[0], seen[-1]) == (27, 0)


def test_seconds_without_traffic_count_for_the_window_too():
    it = breaker()
    assert feed(it, "SFSFSFSF", now=0.0) == []
    assert feed(it, "S", now=15.0) == []
    assert it.snapshot(29.9).window_outcomes == 9
    assert it.snapshot(30.1).window_outcomes == 1


def test_a_busy_model_with_scattered_faults_needs_a_run_that_chance_does_not_show():
    it = breaker()
    background = ("S" * 19 + "F") * 70
    assert feed(it, background, every_s=0.02) == []
    assert feed(it, "FFF", now=28.0) == []  # with the last of the background four in a row
    assert feed(it, "F", now=28.1) == ["closed>open failures_in_a_row"]


def test_a_busy_model_without_faults_opens_at_the_third():
    it = breaker()
    assert feed(it, "S" * 1400, every_s=0.02) == []
    assert feed(it, "FFF", now=28.0) == ["closed>open failures_in_a_row"]


def test_a_run_over_several_bins_is_not_taken_for_its_own_background():
    it = breaker()
    assert feed(it, "S" * 54, every_s=0.5) == []
    assert feed(it, "F", now=27.1) == []
    assert feed(it, "F", now=29.0) == []
    assert feed(it, "F", now=30.1) == ["closed>open failures_in_a_row"]


# --- Open, half-open, closed


def test_one_life():
    it = breaker()
    assert feed(it, "FFF", now=100.0) == ["closed>open failures_in_a_row"]
    assert not it.admits(100.0)
    assert not it.admits(109.9)
    assert it.retry_at(109.9) == 110.0
    assert it.admits(110.0)
    assert it.retry_at(110.0) is None
    probe = it.started(110.0)
    assert not it.admits(110.1)
    assert it.failed(probe, 111.0) is None, "it was open, and stays so"
    assert it.retry_at(111.0) == 121.0
    probe = it.started(121.0)
    assert it.succeeded(probe, 122.0) == Transition("m", OPEN, HALF_OPEN, "probe_succeeded", 122.0)
    probe = it.started(122.0)
    assert not it.admits(122.0)
    assert it.succeeded(probe, 123.0) is None
    probe = it.started(123.0)
    assert it.succeeded(probe, 124.0) == Transition("m", HALF_OPEN, CLOSED, "recovered", 124.0)
    assert it.admits(124.0)
    assert it.transitions == 3


def test_a_failure_in_half_open_reopens_for_twice_as_long():
    it = opened()
    assert feed(it, "SF", now=10.0) == ["open>half_open probe_succeeded", "half_open>open probe_failed"]
    assert it.retry_at(10.0) == 30.0


def test_successes_before_it_reopened_are_forgotten():
    it = opened()
    feed(it, "SSF", now=10.0)
    feed(it, "SS", now=30.0)
    assert feed(it, "S", now=40.0) == ["half_open>closed recovered"]
    it = opened()
    feed(it, "SSF", now=10.0)
    feed(it, "S", now=30.0)
    assert feed(it, "S", now=40.0) == []


@pytest.mark.parametrize(("roll", "wait_s"), [(0.0, 8.0), (0.5, 10.0), (1.0, 12.0)])
def test_waits_are_spread_by_a_fifth(roll, wait_s):
    it = breaker(jitter=lambda: roll)
    feed(it, "FFF")
    assert it.retry_at(0.0) == pytest.approx(wait_s)


@pytest.mark.parametrize(("reopened", "wait_s"), [(0, 10), (1, 20), (2, 40), (3, 80), (4, 120), (5, 120), (5000, 120)])
def test_each_time_it_came_back_and_broke_again_doubles_the_wait(reopened, wait_s):
    assert opened(reopened).retry_at(0.0) == wait_s


def test_closed_for_a_stable_while_its_past_is_forgotten():
    it = opened()
    feed(it, "SSS", now=10.0)
    assert it.state is CLOSED
    feed(it, "FFF", now=10.0 + POLICY.stable_s - 1)
    assert it.reopened == 1
    it = opened()
    feed(it, "SSS", now=10.0)
    feed(it, "FFF", now=10.0 + POLICY.stable_s)
    assert it.reopened == 0


@pytest.mark.parametrize(("outage_s", "wait_s"), [(12, 10), (60, 10), (120, 20), (600, 100), (720, 120), (90_000, 120)])
def test_between_probes_lies_a_sixth_of_the_outage(outage_s, wait_s):
    it = opened()
    assert it.failed(it.started(outage_s), outage_s) is None
    assert it.retry_at(outage_s) == pytest.approx(outage_s + wait_s)
    assert it.transitions == 2, "one by the table's own making, one opening"


def test_what_came_back_and_broke_again_must_also_hold_for_a_while():
    it = opened(reopened=1)
    assert feed(it, "S" * 20, now=20.0, every_s=0.5) == ["open>half_open probe_succeeded"]
    assert feed(it, "S", now=30.0) == ["half_open>closed recovered"]


def test_one_fault_after_enough_successes_does_not_end_a_trial_and_two_do():
    it = opened(reopened=1)
    assert feed(it, "SSSFSSSF", now=20.0) == ["open>half_open probe_succeeded"]
    assert feed(it, "F", now=21.0) == ["half_open>open probe_failed"]
    it = opened(reopened=1)
    feed(it, "SSSF", now=20.0)
    assert feed(it, "SSS", now=30.0) == ["half_open>closed recovered"]


def test_one_success_may_be_enough():
    it = opened(successes=1)
    assert feed(it, "S", now=10.0) == ["open>closed recovered"]


# --- The probe


def test_a_neutral_end_frees_the_place_and_counts_nothing():
    it = opened()
    assert feed(it, "N" * 100 + "SNSN", now=10.0) == ["open>half_open probe_succeeded"]
    assert feed(it, "S", now=10.0) == ["half_open>closed recovered"]


def test_a_lost_probe_is_given_up_and_its_late_end_ignored():
    it = opened()
    lost = it.started(10.0)
    assert not it.admits(159.9)
    assert it.admits(160.0)
    second = it.started(160.0)
    assert not it.admits(160.1)
    assert it.failed(lost, 161.0) is None
    assert it.succeeded(lost, 161.0) is None
    assert not it.admits(161.0), "the second is still out"
    assert it.succeeded(second, 162.0).after is HALF_OPEN
    assert it.failed(lost, 163.0) is None
    assert it.state is HALF_OPEN


def test_while_a_probe_is_out_it_is_asked_again_soon_and_at_its_bound():
    it = opened()
    it.started(10.0)
    assert it.retry_at(20.0) == 20.0 + ASK_AGAIN_S
    assert it.retry_at(159.5) == 160.0


def test_attempts_that_began_before_it_opened_neither_extend_nor_close():
    it = breaker()
    before = [it.started(-9.0) for _ in range(10)]
    feed(it, "FFF", now=1.0)
    for token in before[:5]:
        assert it.failed(token, 5.0) is None
        assert it.succeeded(token, 5.0) is None
    assert it.retry_at(5.0) == 11.0
    probe = it.started(11.0)
    it.failed(before[5], 11.5)
    it.succeeded(before[5], 11.5)
    it.neutral(before[5], 11.5)
    assert not it.admits(11.5), "the probe's place is still taken"
    it.succeeded(probe, 12.0)
    assert it.failed(before[6], 12.5) is None
    assert it.state is HALF_OPEN
    feed(it, "SS", now=13.0)
    for token in before[7:]:
        assert it.failed(token, 14.0) is None
        assert it.succeeded(token, 14.0) is None
    assert it.state is CLOSED
    assert it.snapshot(14.0).window_outcomes == 0


def test_what_was_started_without_being_admitted_counts_nothing():
    it = opened()
    token = it.started(5.0)
    assert token == STRAY
    it.succeeded(token, 6.0)
    it.failed(token, 6.0)
    it.neutral(token, 6.0)
    assert it.retry_at(6.0) == 10.0


def test_recovery_does_not_wait_for_whole_answers():
    it = opened()
    first, second = it.started(10.0), None
    assert it.answering(first, 11.0).after is HALF_OPEN
    second = it.started(11.0)
    assert it.answering(second, 12.0) is None
    third = it.started(12.0)
    assert it.answering(third, 13.0).after is CLOSED
    # Their ends are told all the same, and count like others.
    assert it.succeeded(first, 40.0) is None
    assert it.failed(second, 41.0) is None
    assert it.snapshot(41.0).window_outcomes == 1, "the first counted as a success when it began"


def test_an_answer_that_breaks_after_it_began_reopens_half_open():
    it = opened()
    first = it.started(10.0)
    it.answering(first, 11.0)
    second = it.started(11.0)
    assert it.failed(first, 12.0).after is OPEN
    assert it.succeeded(second, 13.0) is None
    assert it.state is OPEN


def test_an_answer_that_begins_is_a_success_and_its_good_end_no_second_one():
    it = breaker()
    token = it.started(0.0)
    feed(it, "FF", now=0.5)
    assert it.answering(token, 1.0) is None
    assert it.succeeded(token, 2.0) is None
    view = it.snapshot(2.0)
    assert (view.window_outcomes, view.window_failures, view.failures_in_a_row) == (3, 2, 0)


# --- A crowd: what fails in it fails at once, and what goes well takes its time


def test_three_of_a_crowd_that_left_together_are_no_three_in_a_row():
    it = breaker()
    crowd = [it.started(0.0) for _ in range(16)]
    for token in (crowd[3], crowd[7], crowd[12]):
        assert it.failed(token, 0.001) is None
    for token in crowd:
        it.answering(token, 2.0)
    assert it.state is CLOSED
    assert it.snapshot(2.0).failures_in_a_row == 0


def test_ten_of_a_large_crowd_are_no_half_of_it():
    it = breaker()
    crowd = [it.started(0.0) for _ in range(200)]
    for token in crowd[::20]:
        assert it.failed(token, 0.001) is None


def test_the_first_three_of_a_crowd_are_three_in_a_row():
    it = breaker()
    crowd = [it.started(0.0) for _ in range(16)]
    assert [it.failed(token, 0.001) is not None for token in crowd[:8]] == [False] * 2 + [True] + [False] * 5


def test_a_model_that_hangs_opens_it_though_a_crowd_waits():
    it = breaker()
    tokens = [it.started(at / 50) for at in range(6_000)]
    for number, token in enumerate(tokens[:3]):
        opened_by = it.failed(token, 120.0 + number / 50)
    assert opened_by is not None


# --- The clock


def test_a_clock_that_went_back_prolongs_no_wait():
    it = opened(now=1_000_000.0)
    assert not it.admits(5.0)
    assert it.retry_at(5.0) == 15.0
    it.started(15.0)
    it._probe_at = 1_000_000.0
    assert not it.admits(16.0)
    assert it.admits(16.0 + POLICY.probe_s_max)


def test_a_clock_that_went_back_while_closed_loses_no_outcome():
    it = breaker(now=1_000_000.0)
    feed(it, "SF" * 4, now=1_000_000.0)
    assert feed(it, "SF", now=5.0) == ["closed>open failure_ratio"]


def test_a_clock_that_went_back_does_not_keep_the_window_for_ever():
    it = breaker(now=1_000_000.0)
    feed(it, "SF" * 4, now=1_000_000.0)
    feed(it, "S", now=5.0)
    assert it.snapshot(30.0).window_outcomes == 9
    assert it.snapshot(36.0).window_outcomes == 0


def test_a_clock_that_went_back_prolongs_no_trial():
    it = opened(reopened=1, now=1_000_000.0)
    feed(it, "SSS", now=1_000_020.0)
    assert feed(it, "SSS", now=5.0) == []
    assert feed(it, "S", now=15.0) == ["half_open>closed recovered"]


# --- A model of the weather


def weather(seed, *, is_down, per_s, until_s, answer_s=(0.3, 1.0), faults=0.0):
    """Poisson arrivals against an upstream that is down at times; whatever is not admitted is not sent.

    Gives the transitions and the end of each attempt, in order.
    """
    dice = random.Random(seed)
    it = breaker(jitter=dice.random)
    ends: list[tuple[float, int, int, bool]] = []
    transitions, answered, now, number = [], [], 0.0, 0
    while now < until_s:
        now += dice.expovariate(per_s)
        while ends and ends[0][0] <= now:
            at, _, token, good = heapq.heappop(ends)
            answered.append(good)
            transition = (it.succeeded if good else it.failed)(token, at)
            if transition is not None:
                transitions.append(transition)
        if it.admits(now):
            number += 1
            good = not is_down(now) and dice.random() >= faults
            heapq.heappush(ends, (now + dice.uniform(*answer_s), number, it.started(now), good))
    return transitions, answered


@pytest.mark.parametrize("per_s", [5, 20])
def test_five_seconds_up_and_five_down_for_five_minutes_make_at_most_twelve_transitions(per_s):
    for seed in range(30):
        for offset_s in (0, 2, 4, 6, 8):
            transitions, _ = weather(
                seed, is_down=lambda now, by=offset_s: (now + by) % 10 >= 5, per_s=per_s, until_s=300
            )
            assert 1 <= len(transitions) <= 12, (seed, offset_s)


def test_the_end_of_a_minute_of_outage_is_noticed_within_a_quarter_of_it():
    for seed in range(50):
        transitions, answered = weather(seed, is_down=lambda now: 60 <= now < 120, per_s=20, until_s=150)
        assert [transition.after for transition in transitions] == [OPEN, HALF_OPEN, CLOSED]
        assert transitions[0].at < 62
        assert transitions[-1].at < 135
        assert answered.count(False) < 40


def test_scattered_faults_do_not_open_it():
    transitions, answered = weather(7, is_down=lambda now: False, per_s=50, until_s=1800, faults=0.05)
    assert transitions == []
    assert "FFF" in "".join("S" if good else "F" for good in answered)


# --- Properties


class BreakerMachine(RuleBasedStateMachine):
    """Any history of attempts, waits and ends, against what must hold in each state."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = random.Random(0)
        self.it = Breaker("m", policy=POLICY, jitter=self.dice.random, now=0.0)
        self.now = 0.0
        self.out: list[tuple[int, int]] = []
        """Attempts under way: token, and how often it had opened by then."""
        self.told = self.openings = 0
        self.opened_at = 0.0

    def told_of(self, transition):
        if transition is None:
            return
        self.told += 1
        assert transition.before is not transition.after
        assert transition.after is self.it.state
        if transition.after is OPEN:
            self.opened_at = self.now
            self.openings += 1
            assert not self.it.admits(self.now)
        if transition.before is OPEN:
            assert self.now >= self.opened_at + 0.8 * POLICY.open_s - 1e-6, "never before the shortest wait"

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.5, 3.0, 9.0, 40.0, 200.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule(data=st.data())
    def start(self, data):
        if not self.it.admits(self.now):
            if data.draw(st.booleans()):
                assert self.it.started(self.now) == STRAY
            return
        before = self.it.state
        self.out.append((self.it.started(self.now), self.openings))
        if before is not CLOSED:
            assert not self.it.admits(self.now), "one probe at a time"

    @precondition(lambda self: self.out)
    @rule(data=st.data(), how=st.sampled_from(["succeeded", "failed", "failed", "neutral", "answering"]))
    def end(self, data, how):
        index = data.draw(st.integers(0, len(self.out) - 1))
        token, openings = self.out[index]
        if how != "answering":
            del self.out[index]
        before = self.it.snapshot(self.now)
        transition = getattr(self.it, how)(token, self.now)
        if openings < self.openings:
            assert transition is None
            assert self.it.snapshot(self.now) == before, "what began before it opened says nothing"
        self.told_of(transition)

    @invariant()
    def bounds(self):
        it = self.it
        assert it.transitions == self.told
        assert len(it._bins) < BINS
        retry_at = it.retry_at(self.now)
        assert (retry_at is None) is it.admits(self.now)
        if retry_at is not None:
            assert self.now < retry_at <= self.now + 1.2 * POLICY.open_s_max
        if it.state is CLOSED:
            assert it.admits(self.now)
        view = it.snapshot(self.now)
        assert 0 <= view.window_failures <= view.window_outcomes
        assert view.for_s >= 0
        assert 0 <= view.retry_in_s <= 1.2 * POLICY.open_s_max

    @rule()
    def can_always_close_again(self):
        """However it stands, whatever is lost: enough good probes close it."""
        if self.told % 5 != 4:
            return
        for _ in range(60):
            if self.it.state is CLOSED:
                return
            self.now += POLICY.probe_s_max
            assert self.it.admits(self.now)
            self.told_of(self.it.succeeded(self.it.started(self.now), self.now))
        raise AssertionError("it is wedged")


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@given(st.lists(st.tuples(st.sampled_from("FSNLA"), st.floats(-1e6, 1e6)), max_size=80))
def test_a_clock_that_jumps_as_it_likes_does_no_harm(steps):
    it, out = breaker(jitter=lambda: 0.99), []
    last = 0.0
    for letter, now in steps:
        if it.admits(now):
            out.append(it.started(now))
        if out and letter != "L":
            token = out[-1] if letter == "A" else out.pop(0)
            {"F": it.failed, "S": it.succeeded, "N": it.neutral, "A": it.answering}[letter](token, now)
        view = it.snapshot(now)
        assert 0 <= view.window_failures <= view.window_outcomes
        assert 0 <= view.retry_in_s <= POLICY.probe_s_max
        last = now
    # From wherever it was left, time alone lets an attempt start.
    assert it.admits(last + POLICY.probe_s_max)


@given(st.text("SN", max_size=300), st.floats(0.001, 5))
def test_without_a_failure_it_never_opens(outcomes, every_s):
    it = breaker()
    assert feed(it, outcomes, every_s=every_s) == []
    assert it.state is CLOSED


# --- Many models


def breakers(models_max=MODELS_MAX):
    return Breakers(POLICY, jitter=middle, models_max=models_max)


def fail(them, model, now, times=3):
    for _ in range(times):
        them.failed(model, them.started(model, now), now)


def test_models_do_not_count_for_one_another():
    them = breakers()
    fail(them, "a", 0.0)
    assert (them.state("a"), them.state("b")) == (OPEN, CLOSED)
    assert (them.admits("a", 1.0), them.admits("b", 1.0)) == (False, True)
    assert (them.retry_at("a", 1.0), them.retry_at("b", 1.0)) == (10.0, None)
    assert them.transitions == 1
    token = them.started("a", 10.0)
    assert them.answering("a", token, 10.5).after is HALF_OPEN
    token = them.started("a", 11.0)
    them.neutral("a", token, 11.0)
    assert them.succeeded("a", them.started("a", 11.0), 11.0) is None
    assert them.succeeded("a", them.started("a", 11.0), 11.0).after is CLOSED
    assert them.transitions == 3
    assert [(view.model, view.state, view.transitions) for view in them.snapshot(12.0)] == [("a", CLOSED, 3)]


def test_asking_remembers_nothing():
    them = breakers()
    assert all(them.admits(str(number), 0.0) for number in range(1000))
    for end in (them.succeeded, them.failed, them.answering):
        assert end("unknown", 1, 0.0) is None
    them.neutral("unknown", 1, 0.0)
    assert len(them) == 0


def test_memory_is_bounded_and_the_quietest_closed_one_goes():
    them = breakers()
    fail(them, "down", 0.0)
    them.succeeded("quiet", them.started("quiet", 0.0), 0.0)
    them.succeeded("busy", them.started("busy", 0.0), 0.0)
    for number in range(MODELS_MAX * 3):
        now = 1.0 + number
        them.started(str(number), now)
        them.succeeded("busy", them.started("busy", now), now)
        assert len(them) <= MODELS_MAX
    known = {view.model for view in them.snapshot(1000.0)}
    assert {"down", "busy"} <= known
    assert "quiet" not in known


def test_where_all_are_down_the_oldest_goes():
    them = breakers(models_max=3)
    for number in range(4):
        fail(them, str(number), float(number))
    assert [view.model for view in them.snapshot(4.0)] == ["1", "2", "3"]


# --- The account


def test_the_account_is_probed_once_in_a_quarter_of_an_hour_until_a_success():
    it = AccountBreaker()
    early = it.started(0.0)
    assert it.admits(0.0)
    assert it.tripped(0.0, "enforced_spend_limit_reached")
    assert not it.tripped(1.0, "billing_error"), "one alert"
    assert it.code == "enforced_spend_limit_reached"
    assert not it.succeeded(early), "what began before says nothing"
    sent = []
    for second in range(0, 7200, 5):
        if it.admits(float(second)):
            sent.append((second, it.started(float(second))))
            it.tripped(float(second), "enforced_spend_limit_reached")
    assert [second for second, _ in sent] == [900, 1800, 2700, 3600, 4500, 5400, 6300]
    assert it.succeeded(sent[-1][1])
    assert it.admits(7200.0)
    assert it.retry_at(7200.0) is None
    assert it.tripped(7201.0, "billing_error"), "a new trouble is a new alert"


def test_an_operator_ends_the_pause_of_the_account():
    it = AccountBreaker()
    assert not it.reset()
    it.tripped(0.0, "billing_error")
    assert it.retry_at(10.0) == ACCOUNT_PROBE_S
    assert it.snapshot(10.0).probe_in_s == ACCOUNT_PROBE_S - 10.0
    assert it.started(10.0) == STRAY
    assert not it.succeeded(STRAY)
    assert it.reset()
    assert it.admits(10.0)
    assert it.snapshot(10.0).code == ""


def test_a_success_while_money_is_left_ends_nothing():
    it = AccountBreaker()
    assert not it.succeeded(it.started(0.0))


@given(st.lists(st.tuples(st.sampled_from(["ask", "trip", "old"]), st.floats(0, 400)), max_size=100))
def test_no_quarter_of_an_hour_sees_two_probes_and_no_trouble_two_alerts(steps):
    it, now, sent, alerts = AccountBreaker(), 1000.0, [], 0
    old = it.started(now)
    alerts += it.tripped(now, "x")
    sent.append(now)
    for what, pause_s in steps:
        now += pause_s
        if what == "ask" and it.admits(now):
            assert it.started(now) != STRAY
            sent.append(now)
        elif what == "trip":
            alerts += it.tripped(now, "x")
        elif what == "old":
            assert not it.succeeded(old)
    assert alerts == 1
    assert all(later - earlier >= ACCOUNT_PROBE_S for earlier, later in itertools.pairwise(sent))


def test_a_clock_that_went_back_does_not_prolong_the_pause_of_the_account():
    it = AccountBreaker()
    it.tripped(1_000_000.0, "x")
    assert not it.admits(5.0)
    assert it.admits(5.0 + ACCOUNT_PROBE_S)
    assert it.snapshot(5.0).for_s == 0.0
