"""What the limiter lets through, and what it never does: P1, P2, P7, P8, P10, P11 and P13 of the failure model."""

import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headgate.policy.limiter import (
    FACTOR_MIN,
    FREEZE_S_MAX,
    PROBE_S,
    SUBJECTS_KEPT_MIN,
    Ask,
    ClassLimits,
    Limiter,
    Subject,
    Verdict,
    cost_s,
)
from headgate.wire.headers import RateLimit, RateLimits

NOW = 1_000.0
SONNET = ClassLimits(rpm=60.0, itpm=6_000.0, otpm=600.0, burst_s=10.0)
"""One request, 100 input and 10 output tokens a second; ten seconds of them at once."""
BOUNDLESS = ClassLimits()
AN = Subject("user:an", rpm=6.0, otpm=60.0, concurrency=3, burst_s=60.0)
KEY = Subject("key:3x9", rpm=60.0, burst_s=60.0)


def ask(ask_id: str, **fields) -> Ask:
    return Ask(ask_id, "sonnet", fields.pop("limits", SONNET), **fields)


def admit_many(limiter: Limiter, count: int, now: float = NOW, prefix: str = "a", **fields) -> int:
    """How many of `count` asks at one moment are admitted."""
    return sum(limiter.admit(ask(f"{prefix}{number}", **fields), now).admitted for number in range(count))


def levels(limiter: Limiter, now: float = NOW, limits: ClassLimits = SONNET) -> tuple[int | None, ...]:
    return limiter.snapshot("sonnet", limits, now).levels


def headers(requests: int | None = None, input_tokens: int | None = None, **limits: int) -> RateLimits:
    """What Anthropic says is left."""
    return RateLimits(
        requests=None if requests is None else RateLimit(limits.get("rpm", 60), requests),
        input_tokens=None if input_tokens is None else RateLimit(limits.get("itpm", 6_000), input_tokens),
    )


# admit


def test_a_full_bucket_gives_its_burst_and_then_its_rate():
    limiter = Limiter()
    assert admit_many(limiter, 20) == 10
    assert limiter.admit(ask("b"), NOW + 0.5) == Verdict(False, 0.5, "class_rpm")
    assert limiter.admit(ask("b"), NOW + 1.0) == Verdict(True)
    assert admit_many(limiter, 20, NOW + 1_000.0, "c") == 10


@pytest.mark.parametrize(
    ("fields", "reason", "wait_s"),
    [
        ({"input_tokens": 300}, "class_itpm", 2.0),
        ({"output_tokens": 70}, "class_otpm", 2.0),
        ({"input_tokens": 300, "output_tokens": 80}, "class_otpm", 3.0),
    ],
)
def test_what_lacks_longest_is_the_reason_and_the_wait(fields, reason, wait_s):
    limiter = Limiter()
    assert limiter.admit(ask("a", input_tokens=900, output_tokens=50), NOW).admitted
    assert limiter.admit(ask("b", **fields), NOW) == Verdict(False, wait_s, reason)


def test_a_need_beyond_the_capacity_waits_for_a_full_bucket_and_leaves_a_debt():
    limiter = Limiter()
    assert limiter.admit(ask("a", input_tokens=100), NOW).admitted
    assert limiter.admit(ask("b", input_tokens=5_000), NOW) == Verdict(False, 1.0, "class_itpm")
    assert limiter.admit(ask("b", input_tokens=5_000), NOW + 1.0).admitted
    assert levels(limiter, NOW + 1.0)[1] == -4_000
    assert limiter.admit(ask("c", input_tokens=1), NOW + 1.0) == Verdict(False, 40.01, "class_itpm")


def test_without_limits_nothing_is_refused():
    limiter = Limiter()
    assert admit_many(limiter, 1_000, limits=BOUNDLESS, input_tokens=10**9, output_tokens=10**9) == 1_000
    assert levels(limiter, limits=BOUNDLESS) == (None, None, None)


def test_classes_have_buckets_of_their_own():
    limiter = Limiter()
    assert admit_many(limiter, 20) == 10
    assert limiter.admit(Ask("h", "haiku", SONNET), NOW).admitted


def test_a_persons_limit_is_named_before_the_classs():
    limiter = Limiter()
    assert admit_many(limiter, 10, subjects=(AN,)) == 3
    assert admit_many(limiter, 10, prefix="b") == 7
    assert limiter.admit(ask("c", subjects=(AN,)), NOW) == Verdict(False, math.inf, "user_concurrency")


def test_a_persons_requests_a_minute():
    limiter = Limiter()
    free = Subject("user:an", rpm=6.0)
    assert admit_many(limiter, 10, subjects=(free,)) == 6
    assert limiter.admit(ask("b", subjects=(free,)), NOW) == Verdict(False, 10.0, "user_rpm")
    assert limiter.subject_level(free, NOW) == 0.0
    assert limiter.subject_level(free, NOW + 5.0) == 0.5
    assert limiter.subject_level(Subject("user:binh", rpm=6.0), NOW) == 6.0
    assert limiter.subject_level(Subject("user:an"), NOW) is None


def test_of_two_subjects_the_one_that_waits_longer_is_named():
    limiter = Limiter()
    subjects = (Subject("user:an", rpm=60.0), Subject("key:1", rpm=6.0, burst_s=600.0))
    assert admit_many(limiter, 100, subjects=subjects, limits=BOUNDLESS) == 60
    assert limiter.admit(ask("b", subjects=subjects, limits=BOUNDLESS), NOW).reason == "key_rpm"


def test_output_is_paid_by_whom_it_was_produced_for_and_a_debt_is_waited_for():
    limiter = Limiter()
    assert limiter.admit(ask("a", subjects=(AN,), output_tokens=50), NOW).admitted
    limiter.settle("a", input_tokens=0, output_tokens=80, now=NOW)
    assert limiter.admit(ask("b", subjects=(AN,)), NOW) == Verdict(False, 21.0, "user_otpm")
    assert limiter.admit(ask("b", subjects=(AN,)), NOW + 21.0).admitted


def test_a_slot_is_free_again_when_its_attempt_is_over_or_its_lease_is():
    limiter = Limiter()
    one = Subject("user:an", concurrency=1)
    assert limiter.admit(ask("a", subjects=(one,), lease_s=30.0), NOW).admitted
    assert limiter.admit(ask("b", subjects=(one,)), NOW + 29.0).reason == "user_concurrency"
    assert limiter.admit(ask("b", subjects=(one,), lease_s=30.0), NOW + 30.0).admitted
    limiter.renew("b", lease_s=30.0, now=NOW + 50.0)
    assert limiter.admit(ask("c", subjects=(one,)), NOW + 70.0).reason == "user_concurrency"
    limiter.settle("b", input_tokens=0, output_tokens=0, now=NOW + 70.0)
    assert limiter.admit(ask("c", subjects=(one,)), NOW + 70.0).admitted


# correct and settle


def test_an_estimate_is_corrected_by_what_anthropic_says_and_at_the_end():
    limiter = Limiter()
    assert limiter.admit(ask("a", input_tokens=900, output_tokens=50), NOW).admitted
    limiter.correct("a", input_tokens=400, output_tokens=1, now=NOW)
    assert levels(limiter) == (9, 600, 50), "input is exact; output may still reach its estimate"
    limiter.correct("a", input_tokens=400, output_tokens=120, now=NOW)
    assert levels(limiter) == (9, 600, -20)
    limiter.settle("a", input_tokens=400, output_tokens=130, now=NOW)
    assert levels(limiter) == (9, 600, -30)
    assert len(limiter) == 0


def test_what_was_not_used_is_given_back_but_the_request_counts():
    limiter = Limiter()
    assert limiter.admit(ask("a", input_tokens=900, output_tokens=50), NOW).admitted
    limiter.settle("a", input_tokens=0, output_tokens=0, now=NOW)
    assert levels(limiter) == (9, 1_000, 100)


def test_settled_corrected_or_told_twice_is_once():
    def history(times: int) -> Limiter:
        limiter = Limiter()
        limiter.admit(ask("a", input_tokens=900, output_tokens=50, subjects=(AN,)), NOW)
        for _ in range(times):
            limiter.correct("a", input_tokens=700, output_tokens=60, now=NOW)
        for _ in range(times):
            limiter.observe("a", headers(requests=5, input_tokens=200), NOW)
        for _ in range(times):
            limiter.settle("a", input_tokens=710, output_tokens=80, now=NOW)
        return limiter

    assert levels(history(3)) == levels(history(1))
    verdict = history(1).admit(ask("b", subjects=(AN,)), NOW)
    assert verdict == history(3).admit(ask("b", subjects=(AN,)), NOW)
    assert verdict.reason == "user_otpm"


def test_what_comes_for_an_unknown_attempt_or_after_its_lease_changes_nothing():
    limiter = Limiter()
    assert limiter.admit(ask("a", input_tokens=500, lease_s=30.0), NOW).admitted
    before = levels(limiter, NOW + 30.0)
    for ask_id in ("a", "never seen"):
        limiter.correct(ask_id, input_tokens=0, output_tokens=500, now=NOW + 30.0)
        limiter.observe(ask_id, headers(requests=0, input_tokens=0), NOW + 30.0)
        limiter.renew(ask_id, lease_s=30.0, now=NOW + 30.0)
        limiter.settle(ask_id, input_tokens=0, output_tokens=500, now=NOW + 30.0)
    assert levels(limiter, NOW + 30.0) == before
    assert (limiter.expire(NOW + 30.0), len(limiter)) == (1, 0)


# observe


def test_what_is_left_of_a_limit_lowers_a_level_less_what_left_since():
    limiter = Limiter()
    assert limiter.admit(ask("a", input_tokens=100), NOW).admitted
    assert limiter.admit(ask("b", input_tokens=100), NOW).admitted
    limiter.observe("a", headers(requests=5, input_tokens=600), NOW)
    assert levels(limiter) == (4, 500, 100)


def test_what_refilled_since_the_attempt_left_is_not_lost():
    # An answer that is not streamed has its head after its last token. Without this, an account used to the full by
    # answers of 20 s would be taken for one that owes 20 s.
    limiter = Limiter()
    assert limiter.admit(ask("a"), NOW).admitted
    limiter.observe("a", headers(requests=0), NOW + 4.0)
    assert levels(limiter, NOW + 4.0)[0] == 4


def test_headers_of_an_older_attempt_than_the_last_believed_lower_nothing():
    limiter = Limiter()
    assert limiter.admit(ask("a"), NOW).admitted
    assert limiter.admit(ask("b"), NOW).admitted
    limiter.observe("b", headers(requests=6), NOW)
    limiter.observe("a", headers(requests=1), NOW)
    assert levels(limiter)[0] == 6


def test_a_lower_limit_is_believed_and_a_higher_one_where_we_were_told_to():
    for learn, expected in ((False, 60.0), (True, 120.0)):
        limiter = Limiter()
        limits = ClassLimits(rpm=60.0, itpm=6_000.0, learn=learn)
        assert limiter.admit(ask("a", limits=limits), NOW).admitted
        limiter.observe("a", headers(requests=100, input_tokens=3_000, rpm=120, itpm=3_000), NOW)
        effective = limiter.effective("sonnet", limits)
        assert (effective.rpm, effective.itpm, effective.otpm) == (expected, 3_000.0, None)
        assert limiter.snapshot("sonnet", limits, NOW).learned == (120.0, 3_000.0, None)
        assert limiter.effective("haiku", limits) == limits


def test_a_limit_of_nothing_is_not_believed():
    limiter = Limiter()
    assert limiter.admit(ask("a"), NOW).admitted
    limiter.observe("a", RateLimits(requests=RateLimit(0, 0)), NOW)
    assert levels(limiter)[0] == 9


def test_a_limit_that_nobody_configured_begins_where_anthropic_says():
    limiter = Limiter()
    assert admit_many(limiter, 500, limits=BOUNDLESS) == 500
    limiter.throttled("sonnet", BOUNDLESS, retry_after_s=1.0, ramp=True, now=NOW)
    assert levels(limiter, limits=BOUNDLESS) == (None, None, None)
    limiter.observe("a499", headers(requests=4), NOW + 1.0)
    assert levels(limiter, NOW + 1.0, BOUNDLESS)[0] == 4
    assert admit_many(limiter, 20, NOW + 1.0, "b", limits=BOUNDLESS) == 4


def test_a_limit_that_was_taken_away_and_comes_back_owes_nothing():
    limiter = Limiter()
    assert admit_many(limiter, 10) == 10
    assert admit_many(limiter, 500, prefix="b", limits=BOUNDLESS) == 500
    assert admit_many(limiter, 20, prefix="c") == 10


# throttled


def test_nothing_leaves_while_frozen_and_what_refills_meanwhile_leaves_after():
    limiter = Limiter()
    assert admit_many(limiter, 2) == 2
    limiter.throttled("sonnet", SONNET, retry_after_s=5.0, ramp=False, now=NOW)
    assert limiter.admit(ask("b"), NOW + 1.0) == Verdict(False, 4.0, "frozen")
    assert limiter.admit(Ask("h", "haiku", SONNET), NOW + 1.0).admitted
    assert admit_many(limiter, 20, NOW + 5.0, "c") == 5


def test_a_shorter_retry_after_does_not_end_a_longer_freeze():
    limiter = Limiter()
    limiter.throttled("sonnet", SONNET, retry_after_s=9.0, ramp=False, now=NOW)
    limiter.throttled("sonnet", SONNET, retry_after_s=1.0, ramp=False, now=NOW + 2.0)
    limiter.throttled("sonnet", SONNET, retry_after_s=None, ramp=False, now=NOW + 2.0)
    assert limiter.admit(ask("b"), NOW + 3.0) == Verdict(False, 6.0, "frozen")


def test_a_limit_met_halves_the_burst_which_regrows():
    limiter = Limiter()
    limiter.throttled("sonnet", SONNET, retry_after_s=1.0, ramp=False, now=NOW)
    snapshot = limiter.snapshot("sonnet", SONNET, NOW)
    assert (snapshot.levels, snapshot.burst, snapshot.pace, snapshot.frozen_s) == ((0, 0, 0), 0.5, 1.0, 1.0)
    assert admit_many(limiter, 20, NOW + 20.0, "b") == 6, "half of ten, and twice a tenth more in twenty seconds"
    assert admit_many(limiter, 20, NOW + 500.0, "c") == 10


def test_fifty_that_meet_one_limit_are_one_piece_of_news():
    limiter = Limiter()
    for number in range(50):
        limiter.throttled("sonnet", SONNET, retry_after_s=2.0, ramp=False, now=NOW + number / 100)
    assert limiter.snapshot("sonnet", SONNET, NOW + 0.5).burst == pytest.approx(0.5, abs=0.01)


def test_a_ramp_limit_halves_the_rate_and_says_so():
    limiter = Limiter()
    assert admit_many(limiter, 10) == 10
    limiter.throttled("sonnet", SONNET, retry_after_s=None, ramp=True, now=NOW)
    assert limiter.admit(ask("b"), NOW) == Verdict(False, 2.0, "class_rpm", 0.5)
    verdict = limiter.admit(ask("b"), NOW + 2.0)
    assert verdict.admitted
    assert 0.5 < verdict.pace < 0.52
    assert limiter.admit(ask("c"), NOW + 74.0) == Verdict(True)


@pytest.mark.parametrize(("count", "pace"), [(0, 1 / 16), (4, 0.2), (10, 0.5)])
def test_of_a_rate_that_was_not_in_use_what_was_in_use_is_halved(count, pace):
    limiter = Limiter()
    assert admit_many(limiter, count) == count
    limiter.throttled("sonnet", SONNET, retry_after_s=1.0, ramp=True, now=NOW)
    assert limiter.snapshot("sonnet", SONNET, NOW).pace == pytest.approx(pace)
    limiter.throttled("sonnet", SONNET, retry_after_s=1.0, ramp=True, now=NOW + 1.5)
    assert limiter.snapshot("sonnet", SONNET, NOW + 1.5).pace == pytest.approx(pace / 2, rel=0.02)


def test_a_rate_is_never_halved_to_nothing():
    limiter = Limiter()
    for number in range(20):
        limiter.throttled("sonnet", SONNET, retry_after_s=None, ramp=True, now=NOW + 1.01 * number)
    assert limiter.snapshot("sonnet", SONNET, NOW + 20.0).pace == pytest.approx(FACTOR_MIN, rel=0.02)
    assert limiter.snapshot("sonnet", SONNET, NOW + 1e9).pace == 1.0


@pytest.mark.parametrize("retry_after_s", [20.0, 299.0, 301.0, 86_400.0, 4_294_967_295.0, 1e300])
def test_after_a_long_freeze_one_probe_goes_and_its_answer_lets_the_others_go(retry_after_s):
    limiter = Limiter()
    limiter.throttled("sonnet", SONNET, retry_after_s=retry_after_s, ramp=False, now=NOW)
    back = NOW + min(retry_after_s, FREEZE_S_MAX)
    assert limiter.admit(ask("a"), back - 0.1).reason == "frozen"
    assert admit_many(limiter, 20, back, "probe") == 1
    assert limiter.admit(ask("b"), back + 1.0) == Verdict(False, PROBE_S - 1.0, "frozen")
    limiter.observe("probe0", headers(requests=9), back + 1.0)
    assert limiter.admit(ask("b"), back + 1.0).admitted
    assert back + 1.0 - NOW <= 305.0


def test_a_probe_that_fails_or_is_lost_is_followed_by_another():
    limiter = Limiter()
    limiter.throttled("sonnet", SONNET, retry_after_s=60.0, ramp=False, now=NOW)
    assert admit_many(limiter, 20, NOW + 60.0, "failed") == 1
    limiter.settle("failed0", input_tokens=0, output_tokens=0, now=NOW + 61.0)
    assert admit_many(limiter, 20, NOW + 61.0, "lost") == 1
    assert admit_many(limiter, 20, NOW + 61.0 + PROBE_S, "answered") == 1
    limiter.correct("answered0", input_tokens=1, output_tokens=1, now=NOW + 100.0)
    assert admit_many(limiter, 20, NOW + 100.0, "b") > 1


@pytest.mark.parametrize("settled_first", [False, True])
def test_a_probe_that_is_throttled_freezes_for_what_it_was_told(settled_first):
    limiter = Limiter()
    assert admit_many(limiter, 10) == 10
    limiter.throttled("sonnet", SONNET, retry_after_s=60.0, ramp=True, now=NOW)
    assert admit_many(limiter, 20, NOW + 60.0, "probe") == 1
    before = limiter.snapshot("sonnet", SONNET, NOW + 61.0).pace
    if settled_first:
        limiter.settle("probe0", input_tokens=0, output_tokens=0, now=NOW + 61.0)
    limiter.throttled("sonnet", SONNET, retry_after_s=3.0, ramp=True, now=NOW + 61.0)
    limiter.settle("probe0", input_tokens=0, output_tokens=0, now=NOW + 61.0)
    snapshot = limiter.snapshot("sonnet", SONNET, NOW + 61.0)
    assert (snapshot.frozen_s, snapshot.pace) == (3.0, before / 2)
    assert admit_many(limiter, 20, NOW + 64.0, "next") == 1


# owe


def test_what_is_owed_comes_off_a_level_and_is_repaid():
    limiter = Limiter()
    limiter.owe("sonnet", SONNET, (4.0, 1_200.0, 0.0), NOW)
    assert levels(limiter) == (6, -200, 100)
    assert levels(limiter, NOW + 3.0) == (9, 100, 100)
    assert limiter.taken("sonnet") == (4.0, 1_200.0, 0.0)
    assert limiter.taken("haiku") == (0.0, 0.0, 0.0)


# the whole


def test_what_a_call_costs_is_its_dearest_dimension():
    assert cost_s(SONNET, 100, 0) == pytest.approx(1.0)
    assert cost_s(SONNET, 400, 0) == pytest.approx(4.0)
    assert cost_s(SONNET, 400, 90) == pytest.approx(9.0)
    assert 0 < cost_s(BOUNDLESS, 400, 90) < 1e-3


def test_memory_is_bounded_by_who_was_here_in_the_last_minutes():
    limiter = Limiter()
    for number in range(20 * SUBJECTS_KEPT_MIN):
        subject = Subject(f"user:{number}", rpm=20.0, concurrency=2)
        limiter.admit(Ask(f"a{number}", "sonnet", BOUNDLESS, (subject,), lease_s=30.0), NOW + number)
        if number % 100 == 0:
            limiter.expire(NOW + number)
    assert limiter.subjects <= 2 * SUBJECTS_KEPT_MIN
    assert len(limiter) <= 131


class Histories(RuleBasedStateMachine):
    """Any order of operations, duplicated, lost and late, under a clock that also jumps back and forth."""

    CAPACITIES = (10.0, 1_000.0)
    RATES_S = (1.0, 100.0)

    def __init__(self) -> None:
        super().__init__()
        self.limiter = Limiter()
        self.now = self.latest = NOW
        self.ids: list[str] = []
        self.charged: dict[str, int] = {}
        self.moments: deque[tuple[float, float, float]] = deque(maxlen=400)
        """When something was taken, and all that was taken before: requests, input."""
        self.taken = [0.0, 0.0]
        self.highest = [math.inf, math.inf]

    def _took(self, requests: float, input_tokens: float) -> None:
        self.moments.append((self.latest, self.taken[0], self.taken[1]))
        self.taken[0] += requests
        self.taken[1] += input_tokens

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0, 7.0, 60.0, 400.0, -0.5, -30.0, -1_000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.latest = max(self.latest, self.now)

    @rule(
        input_tokens=st.sampled_from([0, 1, 50, 400, 1_000]),
        output_tokens=st.sampled_from([0, 20, 90]),
        subjects=st.sampled_from([(), (AN,), (KEY,), (AN, KEY)]),
        lease_s=st.sampled_from([5.0, 60.0, 600.0]),
    )
    def asked(self, input_tokens: int, output_tokens: int, subjects: tuple[Subject, ...], lease_s: float) -> None:
        ask_id = f"a{len(self.ids)}"
        one = ask(ask_id, input_tokens=input_tokens, output_tokens=output_tokens, subjects=subjects, lease_s=lease_s)
        verdict = self.limiter.admit(one, self.now)
        assert 0.0 < verdict.pace <= 1.0
        assert verdict.admitted == (verdict.reason == "") == (verdict.wait_s == 0.0)
        if not verdict.admitted:
            return
        self.ids.append(ask_id)
        self.charged[ask_id] = input_tokens
        self._took(1.0, input_tokens)
        # P1, for every start that is still remembered and this moment as the end.
        for at, requests, tokens in self.moments:
            seconds = self.latest - at
            assert self.taken[0] - requests <= self.CAPACITIES[0] + self.RATES_S[0] * seconds + 1e-5
            assert self.taken[1] - tokens <= self.CAPACITIES[1] + self.RATES_S[1] * seconds + 1e-5

    def _some(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([*self.ids[-8:], "never seen"]))

    @rule(data=st.data(), input_tokens=st.sampled_from([0, 40, 300, 3_000]), output_tokens=st.integers(0, 500))
    def corrected(self, data: st.DataObject, input_tokens: int, output_tokens: int) -> None:
        ask_id = self._some(data)
        held = self.limiter.holds(ask_id, self.now)
        self.limiter.correct(ask_id, input_tokens=input_tokens, output_tokens=output_tokens, now=self.now)
        if held:
            self._took(0.0, input_tokens - self.charged[ask_id])
            self.charged[ask_id] = input_tokens

    @rule(data=st.data(), input_tokens=st.sampled_from([0, 40, 300, 3_000]), output_tokens=st.integers(0, 500))
    def settled(self, data: st.DataObject, input_tokens: int, output_tokens: int) -> None:
        ask_id = self._some(data)
        held = self.limiter.holds(ask_id, self.now)
        self.limiter.settle(ask_id, input_tokens=input_tokens, output_tokens=output_tokens, now=self.now)
        if held:
            self._took(0.0, input_tokens - self.charged[ask_id])
        assert not self.limiter.holds(ask_id, self.now)
        # P8: a second time, with other numbers, is nothing.
        before = self.limiter.snapshot("sonnet", SONNET, self.now)
        self.limiter.settle(ask_id, input_tokens=0, output_tokens=0, now=self.now)
        assert self.limiter.snapshot("sonnet", SONNET, self.now) == before

    @rule(data=st.data(), lease_s=st.sampled_from([5.0, 600.0]))
    def renewed(self, data: st.DataObject, lease_s: float) -> None:
        self.limiter.renew(self._some(data), lease_s=lease_s, now=self.now)

    @rule(
        data=st.data(),
        requests=st.one_of(st.none(), st.integers(0, 100)),
        input_tokens=st.one_of(st.none(), st.integers(0, 10).map(lambda thousands: 1_000 * thousands)),
        rpm=st.sampled_from([60, 60, 30, 600]),
    )
    def told(self, data: st.DataObject, requests: int | None, input_tokens: int | None, rpm: int) -> None:
        # P11: never above the level without these headers.
        before = levels(self.limiter, self.now)
        self.limiter.observe(self._some(data), headers(requests, input_tokens, rpm=rpm), self.now)
        assert all(after <= level for after, level in zip(levels(self.limiter, self.now), before, strict=True))

    @rule(retry_after_s=st.sampled_from([None, 0.0, 0.5, 3.0, 20.0, 1e9]), ramp=st.booleans())
    def throttled(self, retry_after_s: float | None, ramp: bool) -> None:
        self.limiter.throttled("sonnet", SONNET, retry_after_s=retry_after_s, ramp=ramp, now=self.now)
        assert all(level <= 0 for level in levels(self.limiter, self.now))

    @rule()
    def expired(self) -> None:
        self.limiter.expire(self.now)

    @invariant()
    def levels_keep_to_their_capacity(self) -> None:
        snapshot = self.limiter.snapshot("sonnet", SONNET, self.now)
        assert all(
            level <= capacity for level, capacity in zip(snapshot.levels, (*self.CAPACITIES, 100.0), strict=True)
        )
        assert snapshot.frozen_s <= FREEZE_S_MAX + 1e-6 + max(self.latest - self.now, 0.0)

    def teardown(self) -> None:
        # P7: what nobody ends, ends by itself: nothing is reserved, every slot is free, and the class is back.
        self.limiter.expire(self.latest + 601.0)
        assert len(self.limiter) == 0
        later = self.latest + 10_000.0
        assert self.limiter.admit(ask("probe"), later).admitted
        self.limiter.correct("probe", input_tokens=0, output_tokens=0, now=later)
        got = [self.limiter.admit(ask(f"last{n}", subjects=(AN,)), later + 60.0).reason for n in range(4)]
        assert got == ["", "", "", "user_concurrency"]


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


steps = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 1.0, 4.0]), st.sampled_from([0, 64, 512, 1_024]), st.integers(0, 3)),
    max_size=60,
)
EXACT = ClassLimits(rpm=60.0, itpm=64.0 * 60.0, otpm=60.0, burst_s=16.0)
"""Rates whose levels are exact in binary: a comparison of two histories meets no rounding."""
EXACT_SUBJECTS = (Subject("user:an", rpm=30.0, concurrency=6), Subject("key:1", rpm=15.0), Subject("user:binh"))


@given(steps)
def test_who_was_denied_has_taken_nothing(moves):
    # P2: the same history without those who were denied ends the same for all the others.
    def run(skipped: set[int]) -> list[Verdict]:
        limiter, now, verdicts = Limiter(), NOW, []
        for number, (seconds, input_tokens, who) in enumerate(moves):
            now += seconds
            if number in skipped:
                continue
            one = ask(f"a{number}", limits=EXACT, input_tokens=input_tokens, subjects=EXACT_SUBJECTS[:who])
            verdicts.append(limiter.admit(one, now))
        return verdicts

    everybody = run(set())
    denied = {number for number, verdict in enumerate(everybody) if not verdict.admitted}
    assert run(denied) == [verdict for verdict in everybody if verdict.admitted]


@given(steps)
def test_after_its_wait_the_same_ask_passes(moves):
    limiter, now = Limiter(), NOW
    for number, (seconds, input_tokens, who) in enumerate(moves):
        now += seconds
        one = ask(f"a{number}", input_tokens=input_tokens, subjects=EXACT_SUBJECTS[:who])
        for _ in range(4):  # a person's limit hides a class's
            verdict = limiter.admit(one, now)
            if verdict.admitted or math.isinf(verdict.wait_s):
                break
            assert verdict.wait_s > 0.0
            now += verdict.wait_s
        assert verdict.admitted or verdict.reason == "user_concurrency"


class Anthropic:
    """The other side: buckets that refill and a limit on growth, as claude-api §6 has them. Not our code."""

    def __init__(self, itpm: float, *, burst_s: float, ramp_factor: float = math.inf) -> None:
        self.rate_s, self.capacity = itpm / 60.0, itpm / 60.0 * burst_s
        self.itpm, self.level, self.at = itpm, itpm / 60.0 * burst_s, NOW
        self.ramp_factor = ramp_factor
        self.recent: deque[tuple[float, int]] = deque()

    def send(self, tokens: int, now: float) -> str:
        """`ramp`, `limit`, or nothing when it was served."""
        self.level, self.at = min(self.capacity, self.level + (now - self.at) * self.rate_s), now
        while self.recent and self.recent[0][0] < now - 360.0:
            self.recent.popleft()
        if self.ramp_factor < math.inf:
            minute = tokens + sum(count for at, count in self.recent if at >= now - 60.0)
            before = sum(count for at, count in self.recent if at < now - 60.0) / 5.0
            if minute > self.ramp_factor * before:
                return "ramp"
        if self.level < tokens:
            return "limit"
        self.level -= tokens
        self.recent.append((now, tokens))
        return ""

    def headers(self) -> RateLimits:
        remaining = max(0, round(self.level / 1_000) * 1_000)
        return RateLimits(input_tokens=RateLimit(int(self.itpm), remaining))


TIER_2 = ClassLimits(rpm=1_000.0, itpm=450_000.0, otpm=90_000.0)


def drive(
    limiter: Limiter,
    upstream: Anthropic,
    *,
    limits: ClassLimits,
    tokens: int,
    per_s: float,
    latency_s: float,
    start: float,
    seconds: float,
    queue_max: int = 10**9,
    tag: str = "",
) -> tuple[int, list[tuple[float, str]]]:
    """Constant demand against both: tokens that were served, and each 429 with its moment."""
    served, waiting, arrived = 0, 0, 0
    ends: deque[tuple[float, str, RateLimits]] = deque()
    refused: list[tuple[float, str]] = []
    now, sent, ask_at = start, 0, start
    while now < start + seconds:
        while ends and ends[0][0] <= now:
            _, ask_id, told = ends.popleft()
            limiter.observe(ask_id, told, now)
            limiter.settle(ask_id, input_tokens=tokens, output_tokens=0, now=now)
        due = int((now - start) * per_s)
        waiting, arrived = min(waiting + due - arrived, queue_max), due
        while waiting and now >= ask_at:
            ask_id = f"{tag}{sent}"
            verdict = limiter.admit(Ask(ask_id, "sonnet", limits, input_tokens=tokens), now)
            if not verdict.admitted:
                ask_at = now + verdict.wait_s
                break
            sent += 1
            answer = upstream.send(tokens, now)
            if answer:
                refused.append((now, answer))
                limiter.throttled("sonnet", limits, retry_after_s=5.0, ramp=answer == "ramp", now=now)
                limiter.settle(ask_id, input_tokens=0, output_tokens=0, now=now)
                break
            waiting -= 1
            served += tokens
            ends.append((now + latency_s, ask_id, upstream.headers()))
        now += 0.02
    return served, refused


@pytest.mark.parametrize("upstream_burst_s", [10.0, 60.0])
@pytest.mark.parametrize("latency_s", [0.5, 5.0, 30.0])
def test_at_twice_the_demand_what_is_allowed_is_used(latency_s, upstream_burst_s):
    # P13. Not one 429 either: what we count is what they count.
    limiter, upstream = Limiter(), Anthropic(450_000.0, burst_s=upstream_burst_s)
    served, refused = drive(
        limiter, upstream, limits=TIER_2, tokens=4_500, per_s=3.33, latency_s=latency_s, start=NOW, seconds=240.0
    )
    assert served >= 0.95 * 450_000.0 * 4
    assert refused == []


@pytest.mark.parametrize("headroom", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("factor", [1.5, 2.0])
def test_a_ramp_limit_is_met_at_most_three_more_times_in_its_first_minute(factor, headroom):
    # Five minutes at a steady rate, then three times of it. `headroom`: how far above that demand our limit is.
    limits = ClassLimits(itpm=450_000.0 * headroom)
    limiter, upstream = Limiter(), Anthropic(10_000_000.0, burst_s=60.0)
    demand = 450_000.0 / 60.0 / 4_500
    told = {"limits": limits, "tokens": 4_500, "latency_s": 1.0}
    _, early = drive(limiter, upstream, per_s=demand / 3, start=NOW, seconds=360.0, **told)
    assert early == []
    upstream.ramp_factor = factor
    served, refused = drive(
        limiter, upstream, per_s=demand, start=NOW + 360.0, seconds=180.0, queue_max=200, tag="b", **told
    )
    ramps = [at for at, answer in refused if answer == "ramp"]
    assert 1 <= len([at for at in ramps if at - ramps[0] <= 60.0]) <= 1 + 3, ramps
    assert served >= 180.0 * demand / 3 * 4_500 * 0.75
