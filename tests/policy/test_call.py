"""The machine of a call: transcripts in words, and what holds for every history."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headgate.policy.call import Admit, Call, Finish, Relay, Send, Sleep, failure_code
from headgate.policy.records import Failure, Plan, Refused
from headgate.policy.retry import RetryBudget, RetryPolicy

OVERLOADED = Failure(kind="status", status=529, error_type="overloaded_error")
RATE_LIMITED = Failure(kind="status", status=429, error_type="rate_limit_error", retry_after_s=10.0)
BAD_REQUEST = Failure(kind="status", status=400, error_type="invalid_request_error")
RESET = Failure(kind="reset")
CUT = Failure(kind="truncated", status=200)
TIMEOUT = Failure(kind="timeout")
RATE_LIMITED_NO_TIME = Failure(kind="status", status=429, error_type="rate_limit_error")
CREDENTIAL = Failure(kind="status", status=401)
NO_TURN = Refused(529, "overloaded_error", "queue_deadline", "no turn in time", retry_after_s=30.0)


def call(
    *,
    models: tuple[str, ...] = ("sonnet",),
    deadline: float = 20.0,
    budget: RetryBudget | None = None,
    jitter: float = 0.5,
    shut: set[str] | frozenset[str] = frozenset(),
) -> Call:
    """A call at its first turn; `shut` are the models whose breakers are open."""
    plan = Plan(models=models, body=b"{}", streamed=True, input_tokens_estimate=1, max_tokens=1, deadline=deadline)
    return Call(
        plan,
        policy=RetryPolicy(),
        budget=budget or RetryBudget(),
        jitter=lambda: jitter,
        admits=lambda model, now: model not in shut,
    )


def words(step) -> str:
    """What the machine asks for, as one would say it."""
    match step:
        case Admit(model, again):
            return f"turn for {model}{' again' if again else ''}"
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
    """Everything it says while it is told these things, in order. Every turn is given at once."""

    def say() -> str:
        if isinstance(machine.step, Admit):
            machine.admitted()
        return words(machine.step)

    said = [say()]
    for what, *arguments in told:
        getattr(machine, what)(*arguments)
        said.append(say())
    return said


def slowly(machine: Call, *told) -> list[str]:
    """The same, where turns are given by what is told."""
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
    "admitted": (),
    "refused": (NO_TURN, 1.0),
    "diverted": (1.0,),
    "started": (),
    "commit": (),
    "completed": (200,),
    "failed": (OVERLOADED, 1.0),
    "woke": (),
    "abandoned": (),
    "stopped": (),
}
SEND = ("admitted",)
STATES = {
    "QUEUED": ([], {"admitted", "refused", "diverted", "abandoned", "stopped"}),
    "SENDING": ([SEND], {"started", "failed", "abandoned"}),
    "RELAYING": ([SEND, ("started",)], {"commit", "completed", "failed", "abandoned"}),
    "BACKOFF": ([SEND, ("failed", OVERLOADED, 0.1)], {"woke", "abandoned", "stopped"}),
    "DONE": ([SEND, ("failed", BAD_REQUEST, 0.1)], set()),
    "REFUSED": ([("refused", NO_TURN, 0.1)], set()),
    "ABANDONED": ([("abandoned",)], set()),
    "COMPLETED": ([SEND, ("started",), ("completed", 200)], set()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("move", MOVES)
def test_every_move_is_legal_or_an_assertion(state, move):
    before, legal = STATES[state]
    machine = call()
    slowly(machine, *before)
    if move in legal:
        getattr(machine, move)(*MOVES[move])
    else:
        with pytest.raises(AssertionError):
            getattr(machine, move)(*MOVES[move])


# turns and fallbacks

TWO = ("sonnet", "haiku")


def test_a_turn_comes_before_every_attempt():
    assert slowly(call(), SEND, ("failed", OVERLOADED, 1.0), ("woke",), SEND) == [
        "turn for sonnet",
        "send 1 sonnet",
        "sleep until 1.55",
        "turn for sonnet again",
        "send 2 sonnet",
    ]


def test_a_call_without_a_turn_in_time_is_refused():
    machine = call()
    assert slowly(machine, ("refused", NO_TURN, 1.0))[-1] == "refused 529 after 0 queue_deadline"
    assert machine.step.outcome.refused is NO_TURN


def test_a_retry_without_a_turn_in_time_ends_with_what_went_wrong():
    said = slowly(call(), SEND, ("failed", OVERLOADED, 1.0), ("woke",), ("refused", NO_TURN, 2.0))
    assert said[-1] == "failed 529 after 1 overloaded_error"


def test_the_third_attempt_is_the_fallbacks():
    machine = call(models=TWO)
    assert transcript(machine, ("failed", OVERLOADED, 1.0), ("woke",), ("failed", OVERLOADED, 2.0), ("started",)) == [
        "send 1 sonnet",
        "sleep until 1.55",
        "send 2 sonnet",
        "send 3 haiku",
        "relay",
    ]
    assert machine.fallback_reason == "overloaded"


def test_a_breaker_that_is_open_sends_to_the_fallback_at_once():
    machine = call(models=TWO, shut={"sonnet"})
    assert transcript(machine) == ["send 1 haiku"]
    assert machine.fallback_reason == "breaker_open"


def test_a_breaker_that_opens_by_this_failure_does_too():
    shut = set()
    machine = call(models=TWO, shut=shut)
    transcript(machine)
    shut.add("sonnet")
    assert transcript(machine, ("failed", OVERLOADED, 1.0))[-1] == "send 2 haiku"


def test_with_both_breakers_open_the_call_waits_for_its_own_model():
    assert slowly(call(models=TWO, shut={"sonnet", "haiku"})) == ["turn for sonnet"]


def test_whoever_waits_for_a_model_whose_breaker_opens_goes_elsewhere():
    shut = set()
    machine = call(models=TWO, shut=shut)
    shut.add("sonnet")
    assert slowly(machine, ("diverted", 1.0)) == ["turn for sonnet", "turn for haiku"]


def test_a_body_that_does_not_fit_the_fallback_goes_back_to_its_own_model():
    assert slowly(call(models=TWO, shut={"sonnet"}), ("unfit", "prefill", 1.0)) == ["turn for haiku", "turn for sonnet"]


def test_a_body_that_does_not_fit_the_fallback_is_tried_again_at_its_own():
    said = slowly(
        call(models=TWO),
        SEND,
        ("failed", OVERLOADED, 1.0),
        ("woke",),
        SEND,
        ("failed", OVERLOADED, 2.0),
        ("unfit", "prefill", 2.0),
        ("woke",),
        SEND,
        ("failed", OVERLOADED, 4.0),
    )
    assert said[-5:] == [
        "turn for haiku again",
        "sleep until 3.1",
        "turn for sonnet again",
        "send 3 sonnet",
        "failed 529 after 3 overloaded_error",
    ]


def test_a_fallback_that_is_full_is_no_fallback():
    said = slowly(call(models=TWO, shut={"sonnet"}), ("refused", NO_TURN, 1.0), ("refused", NO_TURN, 1.0))
    assert said == ["turn for haiku", "turn for sonnet", "refused 529 after 0 queue_deadline"]


def test_a_conversation_goes_on_with_the_fallback_it_went_to():
    plan = Plan(models=TWO, body=b"{}", streamed=True, input_tokens_estimate=1, max_tokens=1, deadline=20.0)
    machine = Call(plan, policy=RetryPolicy(), budget=RetryBudget(), jitter=lambda: 0.5, sticky="haiku")
    assert transcript(machine) == ["send 1 haiku"]
    assert machine.fallback_reason == "sticky"


def test_who_waits_for_a_fallback_goes_home_when_its_model_is_back():
    shut = {"sonnet"}
    machine = call(models=TWO, shut=shut)
    assert words(machine.step) == "turn for haiku"
    shut.clear()
    assert slowly(machine, ("diverted", 1.0))[-1] == "turn for sonnet"
    assert machine.fallback_reason == ""


def test_a_second_ambiguous_failure_is_the_last_and_a_first_one_is_not():
    assert transcript(call(), ("failed", OVERLOADED, 1.0), ("woke",), ("failed", RESET, 2.0))[-1].startswith("sleep")
    assert transcript(call(), ("failed", RESET, 1.0), ("woke",), ("failed", RESET, 2.0))[-1].startswith("failed")


def test_a_probe_that_fails_goes_to_the_fallback_whatever_the_budget_holds():
    shut = set()
    machine = call(models=TWO, budget=RetryBudget(capacity=0.0), shut=shut)
    machine.admitted(probe=True)
    shut.add("sonnet")
    machine.failed(OVERLOADED, 1.0)
    assert words(machine.step) == "turn for haiku again"


def test_a_request_pays_into_the_budget_when_it_is_sent_and_not_when_it_waits():
    budget = RetryBudget(capacity=1.0)
    assert budget.withdraw()
    waiting = [call(budget=budget) for _ in range(10)]
    assert budget.snapshot() == 0.0
    for machine in waiting[:5]:
        machine.admitted()
    assert budget.snapshot() == pytest.approx(1.0)


def test_a_slow_model_is_not_asked_twice():
    assert transcript(call(models=TWO), ("failed", TIMEOUT, 1.0))[-1] == "send 2 haiku"
    assert transcript(call(models=TWO), ("failed", TIMEOUT, 1.0), ("failed", TIMEOUT, 2.0))[-1].startswith("failed 0")


@pytest.mark.parametrize("failure", [RATE_LIMITED, BAD_REQUEST, CREDENTIAL], ids=["429", "400", "401"])
def test_what_is_not_the_models_fault_is_never_sent_to_another(failure):
    said = transcript(call(models=TWO, deadline=5.0), ("failed", failure, 1.0))
    assert said[-1].startswith("failed")


def test_a_rate_limit_that_names_no_time_may_go_elsewhere_in_the_end():
    said = transcript(
        call(models=TWO), ("failed", RATE_LIMITED_NO_TIME, 1.0), ("woke",), ("failed", RATE_LIMITED_NO_TIME, 2.0)
    )
    assert said[-1] == "send 3 haiku"


def test_a_fallback_needs_budget_like_any_retry():
    budget = RetryBudget(capacity=1.0)
    said = transcript(
        call(models=TWO, budget=budget), ("failed", OVERLOADED, 1.0), ("woke",), ("failed", OVERLOADED, 2.0)
    )
    assert said[-1] == "failed 529 after 2 overloaded_error"


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
        self.shut: set[str] = set()
        self.call = call(models=TWO, deadline=self.deadline, budget=self.budget, jitter=self.jitter, shut=self.shut)
        self.calls += 1
        self.attempts = 0
        self.outcomes = 0

    def is_at(self, *steps):
        return hasattr(self, "call") and isinstance(self.call.step, steps)

    def step_on(self):
        """The driver's part: a Finish is an outcome."""
        if self.is_at(Finish):
            self.outcomes += 1

    @rule(wait_s=st.floats(0, 5))
    def time_passes(self, wait_s):
        self.now += wait_s

    @rule(model=st.sampled_from(TWO))
    def breaker_turns(self, model):
        self.shut ^= {model}

    @precondition(lambda self: self.is_at(Admit))
    @rule()
    def admitted(self):
        self.call.admitted()
        self.sent += 1
        self.attempts += 1

    @precondition(lambda self: self.is_at(Admit))
    @rule(how=st.sampled_from(["refused", "diverted", "unfit"]))
    def no_turn(self, how):
        if how == "refused":
            self.call.refused(NO_TURN, self.now)
        elif how == "diverted":
            self.call.diverted(self.now)
        elif self.call.model != TWO[0]:
            self.call.unfit("prefill", self.now)
        self.step_on()

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
        assert (outcome.failure is None) == (outcome.kind in ("completed", "abandoned", "refused"))
        assert (outcome.refused is None) == (outcome.kind != "refused")
        self.open_call()

    @invariant()
    def bounds_hold(self):
        if not hasattr(self, "call"):
            return
        assert self.attempts == self.call.attempts <= 3
        assert self.sent <= 1.2 * self.calls + 10
        if self.is_at(Sleep):
            assert self.call.step.until <= self.deadline


TestHistories = Histories.TestCase
TestHistories.settings = MACHINES


@given(st.lists(FAILURES, min_size=3, max_size=6))
def test_any_three_failures_end_a_call_with_one_outcome(failures):
    machine, now, sent = call(deadline=1e9), 0.0, 0
    for failure in failures:
        machine.admitted()
        sent += 1
        machine.failed(failure, now)
        if isinstance(machine.step, Finish):
            break
        now = machine.step.until
        machine.woke()
    assert isinstance(machine.step, Finish)
    assert machine.step.outcome.kind == "failed"
    assert sent == machine.step.outcome.attempts <= 3


def test_a_machine_says_what_it_is_at():
    assert "QUEUED attempt 0" in repr(call())
