"""Stops sending to a model that is down, and finds out soon and gently that it is back.

               trouble                      a probe succeeds                 `successes` in a row
    CLOSED ──────────────▶ OPEN ──────────────────────────────▶ HALF_OPEN ─────────────────────────▶ CLOSED
                            ▲ │ a probe fails: the wait starts anew  │ a failure: twice as long
                            │ └──────────────────────────────────────│──▶ OPEN
                            └────────────────────────────────────────┘

What it is: `Breaker` for one model, `Breakers` for all of them, `AccountBreaker` for money that has run out.
What it is not: a clock, dice, or the judge of what a failure means; whoever drives it tells each attempt's end as one
of three: it succeeded, it failed, or it says nothing (`neutral`: a 429, another 4xx, a client that left), as column B
of failure-model §2.1 has it.

An attempt begins with `started`, whose token is given back at its end. The token tells attempts that began before the
breaker opened from the probes: what began before says nothing about now, so it neither closes nor extends.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable

from headgate.policy.records import Record

MODELS_MAX = 256
"""Models that are remembered. The catalogue has some twenty; the rest is what clients invent."""
BINS = 10
"""Parts of the window that are forgotten one after the other: memory does not grow with the traffic."""
BUSY_OUTCOMES = 50
"""Outcomes in the full bins from which on a short run of failures is also weighed against chance."""
RUN_GAP_S = 300.0
"""Failures further apart are not in a row: a body that is poison counts once in ten minutes, and alone must not open a
quiet model (failure-model §2.1, last row)."""
CHANCE_MAX = 0.001
"""Runs that chance would show in one window, below which a run is no chance. At 30 s: one false opening in 8 hours."""
OUTAGE_SHARE = 1 / 6
"""Part of an outage's length that lies between two probes at most, so that its end is noticed in proportion."""
TRIAL_S_MAX = 20.0
"""What came back and broke again must hold this long at most before it is trusted."""
BESIDE_S = 3.0
"""An answer begins within this time, mostly."""
ASK_AGAIN_S = 1.0
"""While a probe is out nobody knows when it ends."""
ACCOUNT_PROBE_S = 15 * 60.0
"""Between two probes of an account whose money has run out (failure-model §2.1)."""

STRAY = 0
"""Token of an attempt that was started though it was not admitted: its end counts nothing."""


class State(enum.Enum):
    """State of one model's breaker."""

    CLOSED = "closed"
    OPEN = "open"
    """Nothing is sent but, when its time is over, one probe at a time."""
    HALF_OPEN = "half_open"
    """A probe has succeeded, and more must before the model is trusted; one at a time."""


class BreakerPolicy(Record, frozen=True, gc=False):
    """When it opens, for how long, and what closes it (failure-model §2.7)."""

    failures: int = 3
    """In a row; any success resets the count, and so do five minutes without a failure."""
    window_s: float = 30.0
    window_requests_min: int = 10
    failure_ratio: float = 0.5
    """Of the outcomes in the window, once there are `window_requests_min`."""
    open_s: float = 10.0
    """The first wait, ± 20 %. It doubles each time the model came back and broke again."""
    open_s_max: float = 120.0
    """The longest wait, ± 20 %."""
    successes: int = 3
    """Probes in a row."""
    stable_s: float = 120.0
    """Closed for this long, its earlier openings are forgotten."""
    probe_s_max: float = 150.0
    """A probe that has not ended after this long is lost, and another may go. Above the first-byte timeout."""


class Transition(Record, frozen=True, gc=False):
    """A change of state, for the log, the alert and whoever waits. `at` is monotonic seconds."""

    model: str
    before: State
    after: State
    reason: str
    """`failures_in_a_row` or `failure_ratio` (opened), `probe_succeeded`, `probe_failed`, `recovered` (closed)."""
    at: float


class BreakerView(Record, frozen=True, gc=False):
    """A breaker for people. Seconds are from now."""

    model: str
    state: State
    for_s: float
    """Since the last change."""
    retry_in_s: float
    """0.0: an attempt may start now."""
    probing: bool
    failures_in_a_row: int
    window_outcomes: int
    window_failures: int
    reopened: int
    """How often it came back and broke again; each doubled the wait."""
    transitions: int


class Breaker:
    """The state of one model. `now` is monotonic seconds everywhere; a clock that goes back does no harm."""

    __slots__ = (
        "_bad", "_bin_at", "_bin_until", "_bins", "_changed_at", "_failed_at", "_jitter", "_newest_failed", "_ok",
        "_out", "_policy", "_probe", "_probe_at", "_retry_at", "_retry_s", "_run", "_serial", "_stable_from",
        "_successes", "_valid_from", "model", "reopened", "state", "transitions",
    )  # fmt: skip

    def __init__(self, model: str, *, policy: BreakerPolicy, jitter: Callable[[], float], now: float) -> None:
        """`jitter` rolls in [0, 1)."""
        self.model = model
        self.state = State.CLOSED
        self.transitions = 0
        self.reopened = 0
        self._policy = policy
        self._jitter = jitter
        self._changed_at = now
        self._stable_from = now
        """While closed: from here on earlier openings are forgotten."""
        self._run = 0
        self._failed_at = now
        """When the run last grew."""
        self._ok = self._bad = 0
        """Outcomes in the bin that is being filled."""
        self._bins: deque[tuple[int, int]] = deque(maxlen=BINS - 1)
        self._bin_at = now
        self._bin_until = now + policy.window_s / BINS
        self._serial = 1
        self._out: dict[int, float] = {}
        """Attempts that wait for the first word of an answer, in the order in which they started, with the time."""
        self._newest_failed = STRAY
        """The youngest attempt of the run."""
        self._valid_from = 1
        """Tokens below it are of attempts that began before the last opening, or of lost probes."""
        self._probe = STRAY
        """The probe that is out."""
        self._probe_at = now
        self._successes = 0
        self._retry_at = now
        self._retry_s = 0.0

    def __repr__(self) -> str:
        return f"<Breaker {self.model} {self.state.value} run {self._run} reopened {self.reopened}>"

    def apply(self, policy: BreakerPolicy) -> None:
        """Another policy holds from now on."""
        self._policy = policy

    def admits(self, now: float) -> bool:
        """Whether an attempt may start now."""
        if self.state is State.CLOSED:
            return True
        self._mend_clock(now)
        if self._probe:
            return now - self._probe_at >= self._policy.probe_s_max
        return self.state is State.HALF_OPEN or now >= self._retry_at

    def started(self, now: float) -> int:
        """An attempt starts; while not closed it is the probe. The token is given back at its end."""
        if self.state is State.CLOSED:
            self._serial = token = self._serial + 1
            self._out[token] = now
            return token
        if not self.admits(now):
            return STRAY
        self._serial += 1
        if self._probe:
            self._valid_from = self._serial
        self._probe, self._probe_at = self._serial, now
        return self._serial

    def answering(self, token: int, now: float) -> Transition | None:
        """The answer has begun. For a probe this is the success, so that recovery does not wait for whole answers.

        Nor does a crowd that left together: what fails in it fails at once, and what goes well takes its time. Its end
        is told all the same: should it break later, that counts as a failure.
        """
        if self.state is State.CLOSED:
            if self._out.pop(token, None) is not None:
                self._well(now)
            return None
        if token != self._probe or not token:
            return None
        return self._probe_succeeded(now)

    def succeeded(self, token: int, now: float) -> Transition | None:
        """The attempt ended well."""
        if self.state is not State.CLOSED:
            return self.answering(token, now)
        if token >= self._valid_from:
            if self._out.pop(token, None) is not None:
                self._well(now)
            self._run = 0
        return None

    def failed(self, token: int, now: float) -> Transition | None:
        """The attempt failed in a way that tells of an outage."""
        if token < self._valid_from:
            return None
        match self.state:
            case State.CLOSED:
                if not self._bin_at <= now < self._bin_until:
                    self._turn(now)
                self._out.pop(token, None)
                self._bad += 1
                self._run = self._run + 1 if now - self._failed_at < RUN_GAP_S else 1
                self._newest_failed = token if self._run == 1 else max(token, self._newest_failed)
                self._failed_at = now
                reason = self._trouble()
                return self._open(now, reason) if reason else None
            case State.OPEN:
                if token == self._probe:
                    # It was open and stays so: no change of state, and no reason to wait twice as long. Waiting in
                    # proportion to the outage keeps the probes few and its end noticed soon.
                    self._probe = STRAY
                    self._mend_clock(now)
                    self._wait(now, (now - self._changed_at) * OUTAGE_SHARE)
                return None
            case State.HALF_OPEN:
                if self._successes >= self._policy.successes:
                    # It was trusted already and only had to hold: one fault among so many answers is no outage. Else
                    # a model with 5 % of faults could hardly come through its trial.
                    self._successes = 0
                    self.neutral(token, now)
                    return None
                return self._open(now, "probe_failed")

    def neutral(self, token: int, now: float) -> None:
        """The attempt ended in a way that says nothing. A probe's place is free again."""
        self._out.pop(token, None)
        if token == self._probe:
            self._probe = STRAY
            self._mend_clock(now)

    def retry_at(self, now: float) -> float | None:
        """When it is worth asking again; None when an attempt may start now."""
        if self.admits(now):
            return None
        if self._probe:
            return min(now + ASK_AGAIN_S, self._probe_at + self._policy.probe_s_max)
        return self._retry_at

    def snapshot(self, now: float) -> BreakerView:
        """For `/admin`."""
        retry_at = self.retry_at(now)
        if not self._bin_at <= now < self._bin_until:
            self._turn(now)
        outcomes, failures = self._window()
        return BreakerView(
            model=self.model,
            state=self.state,
            for_s=max(now - self._changed_at, 0.0),
            retry_in_s=0.0 if retry_at is None else max(retry_at - now, 0.0),
            probing=self._probe != STRAY,
            failures_in_a_row=self._run,
            window_outcomes=outcomes,
            window_failures=failures,
            reopened=self.reopened,
            transitions=self.transitions,
        )

    @property
    def last_outcome_at(self) -> float:
        """When something was last counted, give or take a bin."""
        return self._bin_at

    def _trouble(self) -> str:
        """Why it opens after this failure; empty when it does not."""
        policy = self._policy
        outcomes, failures = self._window()
        in_a_row = self._run >= policy.failures and self._run >= policy.failure_ratio * (self._run + self._beside())
        if in_a_row and not self._is_chance():
            return "failures_in_a_row"
        if outcomes >= policy.window_requests_min and failures >= policy.failure_ratio * (outcomes + self._beside()):
            return "failure_ratio"
        return ""

    def _beside(self) -> int:
        """Attempts that started with those that failed, or shortly before, and may yet go well."""
        beside = 0
        for token, started_at in reversed(self._out.items()):
            if self._failed_at - started_at > BESIDE_S:
                break
            beside += token < self._newest_failed
        return beside

    def _well(self, now: float) -> None:
        """An answer has come, or begins to."""
        if not self._bin_at <= now < self._bin_until:
            self._turn(now)
        self._ok += 1
        self._run = 0

    def _is_chance(self) -> bool:
        """Whether the run of failures is one that a busy model with scattered faults shows anyway.

        At 50 requests/s with 5 % of them faulty there are three in a row 21 times an hour. Two more failures tell them
        from an outage, and at that pace they come within 40 ms. Chance is judged by the bins that are full: what began
        to fail in this one must not pass for the usual.
        """
        outcomes, failures = self._of_full_bins()
        outcomes -= (run_before := max(self._run - self._bad, 0))
        if outcomes < BUSY_OUTCOMES or self._run >= self._policy.window_requests_min:
            return False
        ratio = (max(failures - run_before, 0) + 1) / (outcomes + 2)
        return bool(outcomes * ratio**self._run > CHANCE_MAX)

    def _probe_succeeded(self, now: float) -> Transition | None:
        self._mend_clock(now)
        self._probe = STRAY
        if self.state is State.OPEN:
            self._successes = 0
        self._successes += 1
        # What broke once is trusted after some successes. What came back and broke again must also hold for a while:
        # three answers fit into the good seconds of a model that flaps.
        half_open_s = now - self._changed_at if self.state is State.HALF_OPEN else 0.0
        if self._successes >= self._policy.successes and half_open_s >= self._trial_s():
            self._run = 0
            self._clear_window(now)
            self._stable_from = now + self._policy.stable_s
            return self._change(State.CLOSED, "recovered", now)
        if self.state is State.OPEN:
            return self._change(State.HALF_OPEN, "probe_succeeded", now)
        return None

    def _trial_s(self) -> float:
        if not self.reopened:
            return 0.0
        return min(self._longest_wait_s() / 2, TRIAL_S_MAX)

    def _longest_wait_s(self) -> float:
        # 16 doublings are beyond every sensible maximum, and an integer that is cheap still.
        return min(self._policy.open_s * (1 << min(self.reopened, 16)), self._policy.open_s_max)

    def _open(self, now: float, reason: str) -> Transition:
        if self.state is State.HALF_OPEN or (self.transitions and now < self._stable_from):
            self.reopened += 1
        else:
            self.reopened = 0
        self._probe = STRAY
        self._out.clear()
        self._serial += 1
        self._valid_from = self._serial
        self._wait(now, 0.0)
        return self._change(State.OPEN, reason, now)

    def _wait(self, now: float, at_least_s: float) -> None:
        wait_s = min(max(self._longest_wait_s(), at_least_s), self._policy.open_s_max)
        self._retry_s = wait_s * (0.8 + 0.4 * self._jitter())
        self._retry_at = now + self._retry_s

    def _change(self, after: State, reason: str, now: float) -> Transition:
        transition = Transition(self.model, self.state, after, reason, now)
        self.state = after
        self.transitions += 1
        self._changed_at = now
        return transition

    def _mend_clock(self, now: float) -> None:
        """After a clock went back, no wait is longer than it was meant to be."""
        if now < self._changed_at:
            self._changed_at = now
        if now < self._probe_at:
            self._probe_at = now
        if self._retry_at - now > self._retry_s:
            self._retry_at = now + self._retry_s

    def _window(self) -> tuple[int, int]:
        """Outcomes and failures among them."""
        outcomes, failures = self._of_full_bins()
        return outcomes + self._ok + self._bad, failures + self._bad

    def _of_full_bins(self) -> tuple[int, int]:
        """The same without the bin that is being filled."""
        return sum(ok + bad for ok, bad in self._bins), sum(bad for _, bad in self._bins)

    def _turn(self, now: float) -> None:
        """Start the bin that `now` is in."""
        bin_s = self._policy.window_s / BINS
        bins = int((now - self._bin_at) / bin_s) if now > self._bin_at else 0
        if bins >= BINS:
            self._clear_window(now)
            return
        if bins:
            self._bins.append((self._ok, self._bad))
            self._bins.extend([(0, 0)] * (bins - 1))
            self._ok = self._bad = 0
            self._bin_at += bins * bin_s
        if now < self._bin_at:
            self._bin_at = now
        self._bin_until = self._bin_at + bin_s

    def _clear_window(self, now: float) -> None:
        self._bins.clear()
        self._ok = self._bad = 0
        self._bin_at = now
        self._bin_until = now + self._policy.window_s / BINS


class Breakers:
    """A breaker for each model, at most `models_max`; beyond it the closed one goes that was quiet longest.

    The methods are those of `Breaker`, with the model in front.
    """

    __slots__ = ("_by_model", "_jitter", "_models_max", "_policy", "transitions")

    def __init__(self, policy: BreakerPolicy, *, jitter: Callable[[], float], models_max: int = MODELS_MAX) -> None:
        self._policy = policy
        self._jitter = jitter
        self._models_max = models_max
        self._by_model: dict[str, Breaker] = {}
        self.transitions = 0
        """Changes of state since the start, over all models."""

    def __len__(self) -> int:
        return len(self._by_model)

    def apply(self, policy: BreakerPolicy) -> None:
        """Another policy holds from now on; what is open stays open as long as it was to be."""
        self._policy = policy
        for breaker in self._by_model.values():
            breaker.apply(policy)

    def admits(self, model: str, now: float) -> bool:
        """Whether an attempt may start now. A model that was never asked for is up."""
        breaker = self._by_model.get(model)
        return breaker is None or breaker.state is State.CLOSED or breaker.admits(now)

    def started(self, model: str, now: float) -> int:
        """An attempt starts."""
        breaker = self._by_model.get(model)
        if breaker is None:
            if len(self._by_model) >= self._models_max:
                self._forget_one()
            breaker = self._by_model[model] = Breaker(model, policy=self._policy, jitter=self._jitter, now=now)
        return breaker.started(now)

    def answering(self, model: str, token: int, now: float) -> Transition | None:
        """The answer has begun."""
        breaker = self._by_model.get(model)
        return None if breaker is None else self._counted(breaker.answering(token, now))

    def succeeded(self, model: str, token: int, now: float) -> Transition | None:
        """The attempt ended well."""
        breaker = self._by_model.get(model)
        return None if breaker is None else self._counted(breaker.succeeded(token, now))

    def failed(self, model: str, token: int, now: float) -> Transition | None:
        """The attempt failed in a way that tells of an outage."""
        breaker = self._by_model.get(model)
        return None if breaker is None else self._counted(breaker.failed(token, now))

    def neutral(self, model: str, token: int, now: float) -> None:
        """The attempt ended in a way that says nothing."""
        breaker = self._by_model.get(model)
        if breaker:
            breaker.neutral(token, now)

    def retry_at(self, model: str, now: float) -> float | None:
        """When it is worth asking again; None when an attempt may start now."""
        breaker = self._by_model.get(model)
        return None if breaker is None else breaker.retry_at(now)

    def state(self, model: str) -> State:
        """The model's state."""
        breaker = self._by_model.get(model)
        return breaker.state if breaker else State.CLOSED

    def snapshot(self, now: float) -> tuple[BreakerView, ...]:
        """All models, for `/admin`."""
        return tuple(breaker.snapshot(now) for breaker in self._by_model.values())

    def _counted(self, transition: Transition | None) -> Transition | None:
        if transition is not None:
            self.transitions += 1
        return transition

    def _forget_one(self) -> None:
        # A model that is down is kept before all that are up: forgotten, it would be asked at once.
        quietest = min(self._by_model.values(), key=lambda b: (b.state is not State.CLOSED, b.last_outcome_at))
        del self._by_model[quietest.model]


class AccountView(Record, frozen=True, gc=False):
    """The account for people. `code` is empty while money is left."""

    code: str
    for_s: float
    probe_in_s: float


class AccountBreaker:
    """Money has run out at Anthropic: nothing is sent for 15 min, then one probe each 15 min until one succeeds.

    Only an operator or the calendar can help, so there is no backoff and no half-open state.
    """

    __slots__ = ("_probe_at", "_serial", "_tripped_at", "_valid_from", "code", "probe_s")

    def __init__(self, *, probe_s: float = ACCOUNT_PROBE_S) -> None:
        self.code = ""
        """Why nothing is sent; empty while it is."""
        self.probe_s = probe_s
        self._tripped_at = 0.0
        self._probe_at = 0.0
        self._serial = 1
        self._valid_from = 1

    def __repr__(self) -> str:
        return f"<AccountBreaker {self.code or 'closed'}>"

    def admits(self, now: float) -> bool:
        """Whether an attempt may start now."""
        if not self.code:
            return True
        self._probe_at = min(self._probe_at, now + self.probe_s)  # should the clock have gone back
        return now >= self._probe_at

    def started(self, now: float) -> int:
        """An attempt starts; while nothing is sent it is the probe. The token is given back when it succeeds."""
        if not self.code:
            return self._serial
        if not self.admits(now):
            return STRAY
        self._probe_at = now + self.probe_s
        self._serial += 1
        return self._serial

    def tripped(self, now: float, code: str) -> bool:
        """An answer said that money has run out. True the first time, so that one alert goes out."""
        assert code, "a code tells a tripped account from one that works"
        if self.code:
            return False
        self.code = code
        self._tripped_at = now
        self._probe_at = now + self.probe_s
        self._valid_from = self._serial + 1
        return True

    def succeeded(self, token: int) -> bool:
        """An attempt was answered. True when this ends the pause; what began before the pause does not."""
        return token >= self._valid_from and self.reset()

    def reset(self) -> bool:
        """An operator says that there is money again. True when there was a pause to end."""
        paused = self.code != ""
        self.code = ""
        return paused

    def retry_at(self, now: float) -> float | None:
        """When the next probe may go; None when an attempt may start now."""
        return None if self.admits(now) else self._probe_at

    def snapshot(self, now: float) -> AccountView:
        """For `/admin`."""
        retry_at = self.retry_at(now)
        return AccountView(
            code=self.code,
            for_s=max(now - self._tripped_at, 0.0) if self.code else 0.0,
            probe_in_s=0.0 if retry_at is None else retry_at - now,
        )
