"""The guard against runaway spending, and the way of an alert from the loop to the log and the table.

What it is: `SpendGuard`, which tells `policy/spend_velocity.py` of each call and says who is held, and `AlertSink`,
which logs an alert at once and has a thread keep it. What it is not: a limit. Who is held gets a concurrency of 1 from
`held_to_one`, and the limiter does the rest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import msgspec
import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from headgate.policy.alerts import Alert, AlertBook, AlertKind, CallCost
from headgate.policy.limiter import Subject
from headgate.policy.records import Record
from headgate.policy.spend_velocity import (
    BUCKET_S,
    GRACE_S,
    NANOUSD_PER_USD,
    WINDOW_S,
    Loop,
    LoopDetector,
    SpendVelocity,
    SubjectSpend,
    Trip,
    VelocityPolicy,
)
from headgate.storage import alerts as alert_table

WAITING_MAX = 1_000
"""Alerts that the database has not taken yet, some 1 MB. Beyond it the oldest is only in the log."""
RETRY_S = 1.0
CLOSE_S_MAX = 5.0
TICK_EVERY_S = 1.0

_log = structlog.get_logger(__name__)


class _End(Record, frozen=True, gc=False):
    """A cause that is over."""

    kind: str
    subject: str
    by: str
    at_ns: int


class AlertSink:
    """Where alerts go. `raise_alert` and `end` cost their caller no I/O but a line of the log; for any thread.

    Weather: a database that is down is asked again each second, and what waits for it (at most 1,000) is kept in memory
    as long as the process lives. The log has it in any case.
    """

    def __init__(self, engine: sa.Engine | None, *, now_ns: Callable[[], int]) -> None:
        """`engine` None: alerts are logged and not kept."""
        self._engine = engine
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._book = AlertBook()
        self._waiting: deque[Alert | _End] = deque()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="alert-writer", daemon=True)
        self.dropped = 0
        """Rows that the table will never have."""

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def raise_alert(self, kind: AlertKind, subject: str, message: str, calls: Iterable[CallCost] = ()) -> bool:
        """Tell of it, unless its cause has been told within a day and goes on. True when it was told."""
        return self.raised(Alert(kind, subject, message, self._now_ns(), tuple(calls)))

    def raised(self, alert: Alert) -> bool:
        """The same, of an alert that is made already."""
        with self._lock:
            told = self._book.raised(alert)
        if told is None:
            return False
        # Not `log.error("alert", kind=…)` with prompts or keys: a message holds neither.
        _log.error(
            "alert",
            kind=told.kind,
            subject=told.subject,
            message=told.message,
            calls=[call.call_id for call in told.calls],
            repeats=told.repeats,
        )
        self._put(told)
        return True

    def end(self, kind: AlertKind, subject: str, *, by: str) -> bool:
        """The cause is over. False when there was none."""
        with self._lock:
            known = self._book.ended(kind, subject)
        if known:
            _log.info("alert_ended", kind=kind, subject=subject, by=by)
            self._put(_End(kind, subject, by, self._now_ns()))
        return known

    def forget(self, kind: str, subject: str) -> None:
        """Its row was ended by somebody else: the next of its kind is told."""
        with self._lock:
            self._book.ended(kind, subject)

    def repeats(self, kind: str, subject: str) -> int:
        """How often the cause was met again since this process told it; the table is not asked each time."""
        with self._lock:
            return self._book.repeats(kind, subject)

    @property
    def waiting(self) -> int:
        """Rows that the table has not got yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Write what waits, if the database takes it within some seconds, and stop."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S_MAX)
        if self._waiting:
            _log.error("alerts_not_kept", alerts=len(self._waiting), trouble=self._trouble)

    def _put(self, row: Alert | _End) -> None:
        if self._engine is None:
            return
        if len(self._waiting) >= WAITING_MAX:
            try:
                self._waiting.popleft()
            except IndexError:  # the writer was quicker
                pass
            self.dropped += 1
        self._waiting.append(row)
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            while not self._drain() and not self._stopping.wait(RETRY_S):
                pass
        self._drain()

    def _drain(self) -> bool:
        """Write what waits. False: the database does not take it."""
        assert self._engine is not None
        while True:
            try:
                row = self._waiting.popleft()
            except IndexError:  # nothing waits; `_put` takes from it too
                return True
            try:
                if isinstance(row, Alert):
                    alert_table.save(self._engine, row)
                else:
                    alert_table.end_cause(self._engine, row.kind, row.subject, by=row.by, at_ns=row.at_ns)
            except SQLAlchemyError as error:
                self._waiting.appendleft(row)
                if not self._trouble:
                    _log.error("alerts_waiting", trouble=str(error), mend="they are kept once the database answers")
                self._trouble = str(error)
                return False
            except Exception as error:  # the top of a thread: one row must not stop those behind it
                self.dropped += 1
                _log.error("alert_not_kept", subject=row.subject, trouble=repr(error))
            else:
                self._trouble = ""


class VelocityView(msgspec.Struct, frozen=True):
    """What `/admin/velocity` shows: the lines in force, and the subjects, who is held first."""

    enabled: bool
    line_nanousd: int
    history_factor: float
    hold_s: float
    subjects: tuple[SubjectSpend, ...]


class SpendGuard:
    """Watches what each person and key spends in ten minutes. For the loop's thread; some microseconds a call.

    A call is told twice: `began` before it is given a turn, `settled` once its cost is known. What it spends counts for
    its person first, and for the key as well only while that one is neither held nor released by an operator: a key may
    speak for many, and one of them that runs away must not slow down the others; and whom an operator has released must
    not be held for the same money by another name.
    """

    def __init__(
        self,
        policy: VelocityPolicy,
        alerts: AlertSink,
        *,
        clock: Callable[[], float],
        enabled: bool = True,
    ) -> None:
        """`clock`: monotonic seconds."""
        self.enabled = enabled
        self._alerts = alerts
        self._clock = clock
        self._velocity = SpendVelocity(policy)
        self._loops = LoopDetector()
        self._tick_at = float("-inf")

    def apply(self, policy: VelocityPolicy, *, enabled: bool) -> None:
        """Settings were read again: they hold from the next call on, and nothing that was seen is forgotten."""
        self._velocity.policy = policy
        self.enabled = enabled

    def seed(self, history: Mapping[str, Mapping[int, int]]) -> None:
        """What the ledger knows of the last week (`storage/spend_history.py`), before the first call."""
        self._velocity.seed(history, self._clock())

    def began(
        self,
        user: str,
        key_id: str,
        call_id: str,
        expected_nanousd: int = 0,
        *,
        user_cap_nanousd: int | None = None,
        key_cap_nanousd: int | None = None,
    ) -> tuple[str, ...]:
        """A call is about to wait for its turn; returns what `held` would. `expected_nanousd`: what it will probably
        cost, not the most it could; 0: as much as the last ones. The caps are those of a day, None where there is none.
        """
        if not self.enabled:
            return ()
        velocity, now, person, key = self._velocity, self._clock(), f"user:{user}", f"key:{key_id}"
        is_held = False
        if user:
            velocity.began(person, call_id, expected_nanousd, now, cap_day_nanousd=user_cap_nanousd)
            is_held = velocity.throttled(person, now)
        if is_held or (user and velocity.graced(person, now)):
            velocity.forget_call(key, call_id)
        else:
            velocity.began(key, call_id, expected_nanousd, now, person=user, cap_day_nanousd=key_cap_nanousd)
        is_key_held = velocity.throttled(key, now)
        return ((person,) if is_held else ()) + ((key,) if is_key_held else ())

    def settled(
        self,
        user: str,
        key_id: str,
        cost_nanousd: int,
        call_id: str,
        digest: str = "",
        *,
        user_cap_nanousd: int | None = None,
        key_cap_nanousd: int | None = None,
    ) -> None:
        """A call has ended, however it did: each that began, once. `digest` of the whole request: equal ones are
        counted."""
        if not self.enabled:
            return
        now, person, key = self._clock(), f"user:{user}", f"key:{key_id}"
        if user:
            trip = self._velocity.spent(person, cost_nanousd, call_id, now, cap_day_nanousd=user_cap_nanousd)
            if trip is not None:
                self._tell_trip(trip)
        if user and (self._velocity.tripped(person) or self._velocity.graced(person, now)):
            self._velocity.forget_call(key, call_id)
        else:
            trip = self._velocity.spent(key, cost_nanousd, call_id, now, person=user, cap_day_nanousd=key_cap_nanousd)
            if trip is not None:
                self._tell_trip(trip)
        loop = self._loops.called(person if user else key, digest, CallCost(call_id, cost_nanousd), now)
        if loop is not None:
            self._tell_loop(loop)

    def budget_exhausted(self, account: str, message: str) -> None:
        """A call was refused since this account may spend no more, in the words that its client was told."""
        self._alerts.raise_alert("budget_exhausted", account, f"{account}: {message}")

    def held(self, user: str, key_id: str) -> tuple[str, ...]:
        """Which of the two subjects may only have one call at a time; empty for nearly everybody."""
        if not self.enabled or not len(self._velocity):
            return ()
        now = self._clock()
        ids = (f"user:{user}", f"key:{key_id}")
        return tuple(each for each in ids if self._velocity.throttled(each, now))

    def throttled(self, user: str, key_id: str) -> bool:
        """Whether this call may only run alone."""
        return bool(self.held(user, key_id))

    def release(self, subject: str, *, by: str) -> bool:
        """An operator lets it go: its limit is double for an hour. False when it was not held."""
        released = self._velocity.release(subject, self._clock())
        if released:
            self._alerts.end("spend_velocity", subject, by=by)
        return released

    def tick(self) -> None:
        """Let go whose time is over. Cheap; it does something once a second at most."""
        now = self._clock()
        if now - self._tick_at < TICK_EVERY_S:
            return
        self._tick_at = now
        for subject in self._velocity.tick(now):
            self._alerts.end("spend_velocity", subject, by="time")
        for held in self._velocity.held_back(now):
            self._tell_trip(held)

    def snapshot(self) -> VelocityView:
        """For `/admin/velocity`."""
        policy = self._velocity.policy
        return VelocityView(
            enabled=self.enabled,
            line_nanousd=policy.line_nanousd,
            history_factor=policy.history_factor,
            hold_s=policy.hold_s,
            subjects=self._velocity.snapshot(self._clock()),
        )

    def _tell_trip(self, trip: Trip) -> None:
        policy = self._velocity.policy
        if trip.p99_nanousd is None:
            why = f"more than {_usd(trip.limit_nanousd)}, the line for who has no day of history yet"
        else:
            why = (
                f"more than {_usd(trip.limit_nanousd)}, its limit by its own last week, whose busiest ten minutes cost "
                f"{_usd(trip.p99_nanousd)}"
            )
        spent = f"{trip.subject} spent {_usd(trip.window_nanousd)} in {WINDOW_S // 60} minutes"
        until = f"until {policy.hold_s / 60:.0f} minutes after it is below that again"
        if trip.window_nanousd <= trip.limit_nanousd:
            spent += f", and what is under way will cost {_usd(trip.in_flight_nanousd)}"
            until = "while that is so"
        message = (
            f"{spent}: {why}. It is held to one call at a time, {until}. "
            f"Look at its calls; if they are meant, POST /admin/velocity/{trip.subject}/release doubles its limit for "
            f"{GRACE_S / 3600:.0f} h, and velocity.usd_per_10_min raises the line for good."
        )
        self._alerts.raise_alert("spend_velocity", trip.subject, message, trip.calls)

    def _tell_loop(self, loop: Loop) -> None:
        message = (
            f"{loop.subject} sent the same request more than {loop.calls_in_window - 1} times in {WINDOW_S // 60} "
            "minutes. Nothing is held back. Look for a retry that does not end; where it is meant, [reuse] gives the "
            "answer again for free."
        )
        self._alerts.raise_alert("loop", loop.subject, message, loop.calls)


def velocity_policy(*, usd_per_10_min: float, history_factor: float, hold_s: float) -> VelocityPolicy:
    """The [velocity] of the settings in nano-dollars. A hold is never shorter than a bucket of the window."""
    line_nanousd = round(usd_per_10_min * NANOUSD_PER_USD)
    return VelocityPolicy(line_nanousd, history_factor, max(hold_s, float(BUCKET_S)))


def held_to_one(subjects: tuple[Subject, ...], held: tuple[str, ...]) -> tuple[Subject, ...]:
    """The same subjects with a concurrency of 1 for those that are held; one that has no limits yet comes last."""
    if not held:
        return subjects
    known = {subject.id for subject in subjects}
    lowered = [msgspec.structs.replace(each, concurrency=1) if each.id in held else each for each in subjects]
    return (*lowered, *(Subject(each, concurrency=1) for each in held if each not in known))


def _usd(nanousd: int) -> str:
    return f"${nanousd / NANOUSD_PER_USD:,.2f}"
