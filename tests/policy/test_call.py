"""The machine of a call: transcripts in words, and what holds for every history."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headgate.policy.call import Call, Finish, Relay, Send, Sleep, failure_code
from headgate.policy.records import Failure, Plan
from headgate.policy.retry import RetryBudget, RetryPolicy

OVERLOADED = Failure(kind="status", status=529, error_type="overloaded_error")
RATE_LIMITED = Failure(kind="status", status=429, error_type="rate_limit_error", retry_after_s=10.0)
BAD_REQUEST = Failure(kind="status", status=400, error_type="invalid_request_error")
RESET = Failure(kind="reset")
CUT = Failure(kind="truncated", status=200)


def call(*, deadline: float = 20.0, budget: RetryBudget | None = None, jitter: float = 0.5) -> Call:
    plan = Plan(models=("sonnet",), body=b"{}", streamed=True, input_tokens_estimate=1, max_tokens=1, deadline=deadline)
    return Call(plan, policy=RetryPolicy(), budget=budget or RetryBudget(), jitter=lambda: jitter)


def words(step) -> str:
    """What the machine asks for, as one would say it."""
    match step:
        case Send(attempt):
            return f"send {attempt.number} {attempt.model}"
        case Sleep(until):
            return f"sleep until {until:g}"
        case Relay():
            return "relay"
        case Finish(outcome):
            code = f" {outcome.error_code}" if outcome.error_code else ""
            return f"{outcome.kind} {outcome.status} after {outcome.attempts}{code}"


def transcript(machine: Call, *told) -> list[str]:
    """Everything it says while it is told these things, in order."""
    said = [words(machine.step)]
    for what, *arguments in told:
        getattr(machine, what)(*arguments)
        said.append(words(machine.step))
    return said


def test_a_call_that_goes_well():
    assert transcript(call(), ("started",), ("commit",), ("completed", 200)) == [
        "send 1 sonnet",
        "relay",
        "relay",
        "completed 200 after 1",
    ]


def test_an_answer_may_end_before_anything_was_shown():
    assert transcript(call(), ("started",), ("completed", 200))[-1] == "completed 200 after 1"


def test_overload_twice_and_then_an_answer():
    machine = call()
    assert transcript(
        machine,
        ("failed", OVERLOADED, 1.0),
        ("woke",),
        ("failed", OVERLOADED, 2.0),
        ("woke",),
        ("started",),
        ("commit",),
        ("completed", 200),
    ) == [
        "send 1 sonnet",
        "sleep until 1.55",
        "send 2 sonnet",
        "sleep until 3.1",
        "send 3 sonnet",
        "relay",
        "relay",
        "completed 200 after 3",
    ]
    assert machine.reasons == ("retry:overloaded", "retry:overloaded")


def test_overload_three_times_fails():
    machine = call()
    assert transcript(
        machine,
        ("failed", OVERLOADED, 1.0),
        ("woke",),
        ("failed", OVERLOADED, 2.0),
        ("woke",),
        ("failed", OVERLOADED, 4.0),
    )[-1] == ("failed 529 after 3 overloaded_error")
    assert machine.reasons[-1] == "give_up:attempts_exhausted"


def test_a_rate_limit_waits_for_what_it_was_told():
    assert transcript(call(), ("failed", RATE_LIMITED, 0.2), ("woke",)) == [
        "send 1 sonnet",
        "sleep until 11.2",
        "send 2 sonnet",
    ]


def test_a_rate_limit_beyond_the_deadline_fails_now():
    machine = call(deadline=10.0)
    assert transcript(machine, ("failed", RATE_LIMITED, 0.2)) == [
        "send 1 sonnet",
        "failed 429 after 1 rate_limit_error",
    ]
    assert machine.reasons == ("give_up:past_deadline",)


def test_a_bad_request_fails_at_once():
    assert transcript(call(), ("failed", BAD_REQUEST, 0.1)) == [
        "send 1 sonnet",
        "failed 400 after 1 invalid_request_error",
    ]


def test_a_stream_that_breaks_before_the_commit_is_begun_again():
    assert transcript(call(), ("started",), ("failed", CUT, 1.0), ("woke",), ("started",)) == [
        "send 1 sonnet",
        "relay",
        "sleep until 1.375",
        "send 2 sonnet",
        "relay",
    ]


def test_a_stream_that_breaks_after_the_commit_is_cut():
    assert transcript(call(), ("started",), ("commit",), ("failed", OVERLOADED, 1.0))[-1] == (
        "cut 200 after 1 overloaded_error"
    )


@pytest.mark.parametrize(
    "before",
    [
        [],
        [("started",)],
        [("started",), ("commit",)],
        [("failed", OVERLOADED, 0.1)],
        [("failed", OVERLOADED, 0.1), ("woke",)],
    ],
)
def test_a_client_may_leave_at_any_time(before):
    assert transcript(call(), *before, ("abandoned",))[-1].startswith("abandoned 499")


def test_retries_stop_when_all_calls_together_have_had_enough():
    budget = RetryBudget(capacity=1.0)
    assert transcript(call(budget=budget), ("failed", OVERLOADED, 0.1))[-1].startswith("sleep")
    starved = call(budget=budget)
    assert transcript(starved, ("failed", OVERLOADED, 0.1))[-1] == "failed 529 after 1 overloaded_error"
    assert starved.reasons == ("give_up:retry_budget",)


MOVES = {
    "started": (),
    "commit": (),
    "completed": (200,),
    "failed": (OVERLOADED, 1.0),
    "woke": (),
    "abandoned": (),
}
STATES = {
    "SENDING": ([], {"started", "failed", "abandoned"}),
    "RELAYING": ([("started",)], {"commit", "completed", "failed", "abandoned"}),
    "BACKOFF": ([("failed", OVERLOADED, 0.1)], {"woke", "abandoned"}),
    "DONE": ([("failed", BAD_REQUEST, 0.1)], set()),
    "ABANDONED": ([("abandoned",)], set()),
    "COMPLETED": ([("started",), ("completed", 200)], set()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("move", MOVES)
def test_every_move_is_legal_or_an_assertion(state, move):
    before, legal = STATES[state]
    machine = call()
    transcript(machine, *before)
    if move in legal:
        getattr(machine, move)(*MOVES[move])
    else:
        with pytest.raises(AssertionError):
            getattr(machine, move)(*MOVES[move])


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Failure(kind="status", status=429, error_type="rate_limit_error", error_code="x"), "x"),
        (OVERLOADED, "overloaded_error"),
        (Failure(kind="status", status=502), "upstream_502"),
        (Failure(kind="stream_error", error_type="api_error"), "api_error"),
        (Failure(kind="connect"), "upstream_unreachable"),
        (Failure(kind="tls"), "upstream_certificate"),
        (Failure(kind="timeout"), "upstream_timeout"),
        (Failure(kind="stall"), "upstream_stalled"),
        (Failure(kind="malformed"), "upstream_malformed"),
        (RESET, "upstream_cut"),
        (CUT, "upstream_cut"),
    ],
)
def test_every_failure_has_a_stable_name(failure, code):
    assert failure_code(failure) == code


FAILURES = st.one_of(
    st.builds(
        Failure,
        kind=st.sampled_from(["status", "stream_error"]),
        status=st.sampled_from([400, 401, 429, 500, 503, 504, 529]),
        error_type=st.sampled_from(["", "overloaded_error", "rate_limit_error"]),
        retry_after_s=st.none() | st.floats(0, 40),
        should_retry=st.sampled_from([None, None, None, False]),
    ),
    st.builds(
        Failure,
        kind=st.sampled_from(["connect", "tls", "reset", "timeout", "stall", "truncated", "malformed"]),
        sent=st.booleans(),
    ),
)
MACHINES = settings(max_examples=150, stateful_step_count=40)


class Histories(RuleBasedStateMachine):
    """Many calls over one retry budget, told anything that may happen, at times that only go on."""

    @initialize(jitter=st.floats(0, 1, exclude_max=True), deadline_s=st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    def begin(self, jitter, deadline_s):
        self.budget = RetryBudget()
        self.jitter, self.deadline_s = jitter, deadline_s
        self.now = 0.0
        self.calls = self.sent = 0
        self.open_call()

    def open_call(self):
        self.deadline = self.now + self.deadline_s
        self.call = call(deadline=self.deadline, budget=self.budget, jitter=self.jitter)
        self.calls += 1
        self.sent += 1
        self.attempts = 1
        self.outcomes = 0

    def is_at(self, *steps):
        return hasattr(self, "call") and isinstance(self.call.step, steps)

    def step_on(self):
        """The driver's part: a new Send is an attempt, a Finish an outcome."""
        if self.is_at(Send):
            self.sent += 1
            self.attempts += 1
        if self.is_at(Finish):
            self.outcomes += 1

    @rule(wait_s=st.floats(0, 5))
    def time_passes(self, wait_s):
        self.now += wait_s

    @precondition(lambda self: self.is_at(Send))
    @rule()
    def started(self):
        self.call.started()

    @precondition(lambda self: self.is_at(Relay))
    @rule()
    def commit(self):
        self.call.commit()

    @precondition(lambda self: self.is_at(Relay))
    @rule()
    def completed(self):
        self.call.completed(200)
        self.step_on()

    @precondition(lambda self: self.is_at(Send, Relay))
    @rule(failure=FAILURES)
    def failed(self, failure):
        committed = self.call.committed
        self.call.failed(failure, self.now)
        assert self.is_at(Finish) or not committed, "nothing may follow what the client has seen"
        if committed:
            assert self.call.step.outcome.kind == "cut"
        self.step_on()

    @precondition(lambda self: self.is_at(Sleep))
    @rule()
    def woke(self):
        self.now = max(self.now, self.call.step.until)
        self.call.woke()
        self.step_on()

    @precondition(lambda self: not self.is_at(Finish))
    @rule()
    def abandoned(self):
        self.call.abandoned()
        self.step_on()

    @precondition(lambda self: self.is_at(Finish))
    @rule()
    def next_call(self):
        assert self.outcomes == 1
        outcome = self.call.step.outcome
        assert outcome.attempts == self.attempts == self.call.attempts
        assert (outcome.failure is None) == (outcome.kind in ("completed", "abandoned"))
        self.open_call()

    @invariant()
    def bounds_hold(self):
        if not hasattr(self, "call"):
            return
        assert 1 <= self.attempts <= 3
        assert self.sent <= 1.2 * self.calls + 10
        if self.is_at(Sleep):
            assert self.call.step.until <= self.deadline


TestHistories = Histories.TestCase
TestHistories.settings = MACHINES


@given(st.lists(FAILURES, min_size=3, max_size=6))
def test_any_three_failures_end_a_call_with_one_outcome(failures):
    machine, now = call(deadline=1e9), 0.0
    sent = 1
    for failure in failures:
        machine.failed(failure, now)
        if isinstance(machine.step, Finish):
            break
        now = machine.step.until
        machine.woke()
        sent += 1
    assert isinstance(machine.step, Finish)
    assert machine.step.outcome.kind == "failed"
    assert sent == machine.step.outcome.attempts <= 3


def test_a_machine_says_what_it_is_at():
    assert "SENDING attempt 1" in repr(call())
