"""What each failure leads to, row by row of the failure model, and the bound on all retries together."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.records import Failure
from headgate.policy.retry import Cause, GiveUp, RetryAt, RetryBudget, RetryPolicy, cause, decide
from headgate.wire.errors import SPEND_CAP_CODES, STATUS_BY_TYPE

POLICY = RetryPolicy()
NOW, DEADLINE = 100.0, 120.0


def status(code: int, **fields) -> Failure:
    return Failure(kind="status", status=code, **fields)


def decided(
    failure: Failure, *, attempts_made=1, ambiguous_made=None, now=NOW, deadline=DEADLINE, jitter=0.5, policy=POLICY
):
    """As if all attempts had failed alike, unless something else is said."""
    if ambiguous_made is None:
        ambiguous_made = attempts_made if cause(failure) is Cause.AMBIGUOUS else 0
    return decide(
        failure,
        attempts_made=attempts_made,
        ambiguous_made=ambiguous_made,
        now=now,
        deadline=deadline,
        policy=policy,
        jitter=jitter,
    )


def waits(failure: Failure, *, attempts_made=1) -> tuple[float, float]:
    """The shortest and the longest wait that the dice can give."""
    ends = [decided(failure, attempts_made=attempts_made, jitter=roll) for roll in (0.0, math.nextafter(1.0, 0.0))]
    assert all(isinstance(end, RetryAt) for end in ends), ends
    return ends[0].at - NOW, ends[1].at - NOW


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (status(429), Cause.RATE_LIMIT),
        (status(429, error_code="ramp_limit_exceeded"), Cause.RATE_LIMIT),
        *((status(429, error_code=code), Cause.SPEND_CAP) for code in sorted(SPEND_CAP_CODES)),
        (status(402), Cause.SPEND_CAP),
        (status(400, message="You have reached your specified API usage limits."), Cause.SPEND_CAP),
        (status(400, message="You have reached the end."), Cause.CALLER),
        (status(529), Cause.OVERLOADED),
        (status(500), Cause.SERVER),
        (status(502), Cause.SERVER),
        (status(503), Cause.SERVER),
        (status(599), Cause.SERVER),
        (status(302), Cause.SERVER),
        (status(504), Cause.AMBIGUOUS),
        (status(408), Cause.AMBIGUOUS),
        (status(409), Cause.AMBIGUOUS),
        (status(401), Cause.CREDENTIAL),
        (status(403), Cause.CREDENTIAL),
        (status(400), Cause.CALLER),
        (status(404), Cause.CALLER),
        (status(413), Cause.CALLER),
        (status(422), Cause.CALLER),
        (Failure(kind="connect", sent=False), Cause.CONNECT),
        (Failure(kind="tls", sent=False), Cause.CREDENTIAL),
        *((Failure(kind=kind), Cause.AMBIGUOUS) for kind in ("reset", "timeout", "stall", "truncated", "malformed")),
        *((Failure(kind=kind, sent=False), Cause.CONNECT) for kind in ("reset", "timeout")),
        (Failure(kind="stream_error", status=200, error_type="overloaded_error"), Cause.OVERLOADED),
        (Failure(kind="stream_error", status=200, error_type="rate_limit_error"), Cause.RATE_LIMIT),
        (Failure(kind="stream_error", status=200, error_type="api_error"), Cause.SERVER),
        (Failure(kind="stream_error", status=200, error_type="a_new_error"), Cause.SERVER),
        (Failure(kind="stream_error", status=200, error_type="invalid_request_error"), Cause.CALLER),
        (
            Failure(kind="stream_error", error_type="rate_limit_error", error_code="enforced_spend_limit_reached"),
            Cause.SPEND_CAP,
        ),
    ],
)
def test_whose_fault_a_failure_is(failure, expected):
    assert cause(failure) is expected


@pytest.mark.parametrize("seconds", [0.5, 1.0, 15.0])
@pytest.mark.parametrize("code", [429, 529, 500, 503, 504])
def test_retry_after_is_a_floor_and_the_dice_come_after_it(code, seconds):
    shortest, longest = waits(status(code, retry_after_s=seconds))
    assert shortest == pytest.approx(seconds)
    assert seconds * 1.15 < longest <= seconds * 1.25


def test_a_retry_after_of_milliseconds_spreads_its_waiters():
    ends = {decided(status(429, retry_after_s=2.0), jitter=roll / 50).at for roll in range(50)}
    assert len(ends) == 50


@pytest.mark.parametrize("code", [429, 529])
def test_a_limit_or_overload_without_advice_backs_off_by_doubling_with_full_jitter(code):
    first, second = waits(status(code)), waits(status(code), attempts_made=2)
    assert first == (pytest.approx(0.1), pytest.approx(1.0))
    assert second == (pytest.approx(0.2), pytest.approx(2.0))


def test_the_backoff_is_capped():
    policy = RetryPolicy(attempts_max=9)
    longest = max(
        decided(status(429), attempts_made=made, jitter=0.999, policy=policy).at - NOW for made in range(1, 9)
    )
    assert 7.9 < longest <= policy.delay_s_max


@pytest.mark.parametrize("code", [500, 502, 503])
def test_a_server_error_is_tried_again_within_half_a_second_and_then_as_overload(code):
    assert waits(status(code)) == (pytest.approx(0.25), pytest.approx(0.5))
    assert waits(status(code), attempts_made=2) == (pytest.approx(0.2), pytest.approx(2.0))


@pytest.mark.parametrize(
    "failure", [status(504), status(408), *(Failure(kind=kind) for kind in ("reset", "timeout", "stall", "truncated"))]
)
def test_what_may_have_been_billed_is_tried_again_once(failure):
    assert waits(failure) == (pytest.approx(0.25), pytest.approx(0.5))
    assert decided(failure, attempts_made=2) == GiveUp("attempts_exhausted")


def test_what_was_never_sent_is_tried_again_at_once():
    failure = Failure(kind="connect", sent=False)
    assert waits(failure)[1] <= 0.1
    assert sum(waits(failure, attempts_made=made)[1] for made in (1, 2)) <= 0.5


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        *((status(429, error_code=code), "spend_cap") for code in sorted(SPEND_CAP_CODES)),
        (status(402), "spend_cap"),
        (status(401), "credential"),
        (status(403), "credential"),
        (Failure(kind="tls", sent=False), "credential"),
        *((status(code), "caller") for code in (400, 404, 413, 422)),
        (status(529, should_retry=False), "x_should_retry_false"),
        (status(429, should_retry=False, retry_after_s=1.0), "x_should_retry_false"),
    ],
)
def test_what_cannot_get_better_is_never_tried_again(failure, reason):
    assert decided(failure) == GiveUp(reason)


@pytest.mark.parametrize("code", [400, 401, 402, 404])
def test_upstream_cannot_talk_us_into_retrying_what_fails_everywhere(code):
    assert isinstance(decided(status(code, should_retry=True, retry_after_s=0.1)), GiveUp)


@pytest.mark.parametrize("failure", [status(429), status(500), status(529), Failure(kind="connect", sent=False)])
def test_no_fourth_attempt_is_made(failure):
    assert isinstance(decided(failure, attempts_made=2), RetryAt)
    assert decided(failure, attempts_made=3) == GiveUp("attempts_exhausted")


@pytest.mark.parametrize("seconds", [20.1, 300.0, 4_294_967_295.0])
def test_a_wait_beyond_the_deadline_is_refused_now_not_later(seconds):
    assert decided(status(429, retry_after_s=seconds), jitter=0.0) == GiveUp("past_deadline")


def test_a_wait_that_ends_at_the_deadline_is_made():
    assert decided(status(429, retry_after_s=20.0), jitter=0.0) == RetryAt(DEADLINE, "rate_limit")


FAILURES = st.builds(
    Failure,
    kind=st.sampled_from(["status", "connect", "tls", "reset", "timeout", "stall", "truncated", "malformed"]),
    status=st.sampled_from([0, 200, 302, 400, 401, 408, 429, 500, 503, 504, 529]),
    error_code=st.sampled_from(["", "ramp_limit_exceeded", "enforced_spend_limit_reached"]),
    error_type=st.sampled_from(["", "x", *STATUS_BY_TYPE]),
    retry_after_s=st.none() | st.floats(0, 1e12),
    should_retry=st.sampled_from([None, True, False]),
    sent=st.booleans(),
)


@given(
    FAILURES,
    st.integers(1, 5),
    st.floats(0, 1e9),
    st.floats(-10, 1e6),
    st.floats(0, 1, exclude_max=True),
)
def test_no_wait_ends_before_now_or_after_the_deadline(failure, attempts_made, now, remaining_s, jitter):
    decision = decided(failure, attempts_made=attempts_made, now=now, deadline=now + remaining_s, jitter=jitter)
    if isinstance(decision, RetryAt):
        assert now <= decision.at <= now + remaining_s
        assert attempts_made < POLICY.attempts_max
        if failure.retry_after_s is not None:
            assert decision.at >= now + failure.retry_after_s
    assert decision.reason


@given(
    st.lists(st.booleans(), max_size=400),
    st.sampled_from([0.0, 0.1, 0.2, 0.5]),
    st.sampled_from([1.0, 10.0]),
)
def test_attempts_are_bounded_by_the_requests_for_any_history(history, ratio, capacity):
    budget = RetryBudget(ratio=ratio, capacity=capacity)
    requests = retries = 0
    for is_request in history:
        if is_request:
            budget.deposit()
            requests += 1
        else:
            retries += budget.withdraw()
        assert requests + retries <= (1 + ratio) * requests + capacity + 1e-9
        assert 0 <= budget.snapshot() <= capacity


def test_an_outage_spends_the_capital_and_then_one_retry_in_five_requests():
    budget = RetryBudget()
    retries = 0
    for _ in range(1_000):
        budget.deposit()
        retries += budget.withdraw() + budget.withdraw()
    assert 190 <= retries <= 210


def test_a_refused_retry_costs_the_budget_nothing():
    budget = RetryBudget(capacity=1.0)
    assert budget.withdraw()
    assert [budget.withdraw() for _ in range(5)] == [False] * 5
    for _ in range(5):
        budget.deposit()
    assert budget.withdraw()
