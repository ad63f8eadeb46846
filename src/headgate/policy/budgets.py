"""Decides whether an attempt may be paid for: daily and monthly caps of keys, people, tiers and everybody together.

What it is: one state machine over accounts. An attempt reserves the most it can cost before it leaves, from every
window of every account or from none, and settles what it did cost: settled + reserved never passes a cap, except by
what a settlement books beyond its own reservation. What it is not: a rate (`limiter.py`), a price (`pricing.py`), a
clock, or the truth: that is the ledger, and `corrections` brings what is counted here back to it.

Several processes do the same in Redis: `storage/money.lua` repeats this file, and a test drives both with one history.

How leases and the ledger fit together. An attempt is `live`, then `settled` or `expired`. A lease that ends makes the
reservation nothing and books its whole bound, since a call whose process died may have been sent: nothing is
forgotten while nobody knows. The next reading of the ledger says what is true: an attempt that is not there never
left (its intent is written first), one that has ended costs what its row says, one still open keeps the bound until
the sweeper ends it. A reading is compared with a `Cut` that was made before it, attempt by attempt, so that what is
settled but not yet folded counts once: as booked here, and not in the sums. What cannot be told is counted, and
the next reading takes it back. So a double count ends with it, and what was paid is never left out.

Units: integer nano-dollars, 0 to NANOUSD_MAX; `now` in seconds of one monotonic clock, for leases only; `at_ns` in
UTC, which decides the day and the month. Those of a call are the ones it came in, however long it takes.
Memory: an account's windows for as long as they last, when it has spent; an attempt until LATELY_S after its end.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Literal

import msgspec

from headgate.policy.records import Record

NANOUSD_MAX = 10**15
"""The most that one attempt, and a cap, may be: a million dollars. Nine of them are still exact in Redis' numbers."""
LEASE_S = 30.0
HEARTBEAT_S = 10.0
"""How often a lease is to be renewed (failure-model §2.6)."""
LATELY_S = 20.0
"""For how long a settled attempt is remembered: a hundred times what the ledger takes to fold it."""

Window = Literal["day", "month", ""]
State = Literal["live", "settled", "expired"]
WINDOWS: tuple[Literal["day", "month"], ...] = ("day", "month")
Capped = tuple[str, str, Literal["day", "month"], int]
"""A window that has a cap: period, account, window, cap."""

_DAY_NS = 86_400 * 10**9


class Account(Record, frozen=True, gc=False):
    """Who pays: `key:ID`, `user:NAME`, `tier:NAME` or `all`. Caps ≥ 0; None is without, and then nothing is kept."""

    id: str
    day_nanousd: int | None = None
    month_nanousd: int | None = None


class MoneyAsk(Record, frozen=True, gc=False):
    """May this attempt be paid for? `id` as `ask_id` makes it; `upper_nanousd` is the most that it can cost."""

    id: str
    accounts: tuple[Account, ...]
    upper_nanousd: int
    at_ns: int
    """When the call came, UTC: as `calls.at_ns` has it, so that the ledger counts it to the same day."""
    lease_s: float = LEASE_S


class MoneyVerdict(Record, frozen=True, gc=False):
    """The answer, with the window that is nearest to its cap (of two alike, the one that lasts longer).

    `account` and `window` are empty where there is no cap. `spent_nanousd` is settled; what was asked for is part of
    `reserved_nanousd` when it is admitted. `affordable_nanousd` is what is left in every window, ≥ 0.
    """

    admitted: bool
    account: str = ""
    window: Window = ""
    cap_nanousd: int = 0
    spent_nanousd: int = 0
    reserved_nanousd: int = 0
    affordable_nanousd: int = NANOUSD_MAX
    resets_at_ns: int = 0


class AccountUse(Record, frozen=True, gc=False):
    """What stands against one window of an account."""

    account: str
    window: Literal["day", "month"]
    spent_nanousd: int
    reserved_nanousd: int


class Periods(Record, frozen=True, gc=False):
    """The UTC day and month of a moment: names (`d20781`, `m2026-11`), beginnings, and when they end."""

    day: str
    month: str
    day_ns: int
    month_ns: int
    day_resets_ns: int
    month_resets_ns: int


class Held(Record, frozen=True, gc=False):
    """One attempt that is remembered: what is reserved for it while it is live, else what is booked."""

    id: str
    state: State
    nanousd: int
    windows: tuple[str, ...]
    """As `window_id` names them."""


class Cut(Record, frozen=True):
    """What is counted at one moment: of the current day and month, and every attempt that is remembered."""

    at_ns: int
    settled: dict[str, int]
    held: tuple[Held, ...] = ()
    generation: str = ""
    """Whose count it is; empty where there is none yet (Redis has lost it)."""


class OpenAttempt(Record, frozen=True, gc=False):
    """An attempt that the ledger has as open, with the most it can cost by its intent."""

    id: str
    nanousd: int
    windows: tuple[str, ...]


class Spent(Record, frozen=True):
    """What the ledger says of the day and month of `at_ns`."""

    at_ns: int
    sums: dict[str, int]
    """Of attempts that have ended, by `window_id`; of whoever spent, with a cap or without."""
    opened: tuple[OpenAttempt, ...] = ()
    ended: dict[str, int] = msgspec.field(default_factory=dict)
    """Of the attempts it was asked about, those that have ended, with their cost."""


class Corrections(Record, frozen=True):
    """What brings a count back to the ledger. Differences, so that what happens meanwhile is not undone by them."""

    generation: str
    deltas: dict[str, int]
    forget: tuple[str, ...]
    """Expired attempts about which the ledger has the last word: what was booked for them goes."""
    adopt: tuple[OpenAttempt, ...]
    """Open attempts that nobody holds: they are booked until they are settled."""


def ask_id(call_id: str, number: int) -> str:
    """The id of an attempt's reservation: by it a ledger's row and a reservation find each other."""
    return f"{call_id}:{number}"


def window_id(period: str, account: str) -> str:
    """The name of an account's window: `d20781:user:an`."""
    return f"{period}:{account}"


@functools.lru_cache(maxsize=16)
def _periods(day: int) -> Periods:
    date = datetime.fromtimestamp(day * 86_400, UTC)
    month = date.replace(day=1)
    after = month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)
    return Periods(
        day=f"d{day}",
        month=f"m{date:%Y-%m}",
        day_ns=day * _DAY_NS,
        month_ns=int(month.timestamp()) * 10**9,
        day_resets_ns=(day + 1) * _DAY_NS,
        month_resets_ns=int(after.timestamp()) * 10**9,
    )


def periods(at_ns: int) -> Periods:
    """The UTC day and month that this moment lies in."""
    return _periods(at_ns // _DAY_NS)


def check_amount(nanousd: int) -> int:
    """The amount itself. Raises ValueError for what no amount can be: negative, too large, or no integer."""
    if type(nanousd) is not int or not 0 <= nanousd <= NANOUSD_MAX:
        raise ValueError(f"an amount is an integer of 0 to {NANOUSD_MAX} nano-dollars, and this is {nanousd!r}")
    return nanousd


def check_ask(ask: MoneyAsk) -> None:
    """Raises ValueError for an amount or a cap that none can be."""
    check_amount(ask.upper_nanousd)
    for account in ask.accounts:
        if account.day_nanousd is not None:
            check_amount(account.day_nanousd)
        if account.month_nanousd is not None:
            check_amount(account.month_nanousd)


def caps(ask: MoneyAsk) -> list[Capped]:
    """Windows that have a cap: (period, account, window, cap)."""
    at = periods(ask.at_ns)
    found: list[Capped] = []
    for account in ask.accounts:
        if account.day_nanousd is not None:
            found.append((at.day, account.id, "day", account.day_nanousd))
        if account.month_nanousd is not None:
            found.append((at.month, account.id, "month", account.month_nanousd))
    return found


def corrections(cut: Cut, spent: Spent) -> Corrections:
    """What differs between a count and a reading of the ledger that was begun after it. See the module's text."""
    at = periods(cut.at_ns)
    current = (f"{at.day}:", f"{at.month}:")
    expected = dict(spent.sums)
    opened = {one.id for one in spent.opened}
    forget = []
    for one in cut.held:
        cost = spent.ended.get(one.id)
        known_there, add = cost is not None, 0
        if one.state == "live":
            add = -(cost or 0)  # it is in the sums and will be settled here
        elif one.state == "expired":
            add = one.nanousd  # taken back by `forget`, unless it is settled in between
            if known_there or one.id not in opened:
                forget.append(one.id)
        elif not known_there:
            add = one.nanousd  # not folded yet
        if add:
            for window in one.windows:
                expected[window] = expected.get(window, 0) + add
    deltas = {}
    for window in expected.keys() | cut.settled.keys():
        delta = expected.get(window, 0) - cut.settled.get(window, 0)
        if delta and window.startswith(current):
            deltas[window] = delta
    held = {one.id for one in cut.held}
    adopt = tuple(one for one in spent.opened if one.id not in held)
    return Corrections(cut.generation, deltas, tuple(forget), adopt)


class _Sum:
    """One window of one account."""

    __slots__ = ("reserved", "settled")

    def __init__(self) -> None:
        self.settled = 0
        self.reserved = 0


class _Attempt:
    """See `Held`."""

    __slots__ = ("ends_at", "nanousd", "state", "windows")

    def __init__(
        self, windows: Sequence[tuple[str, str, Window, int | None]], nanousd: int, state: State, ends_at: float
    ) -> None:
        self.windows = windows
        """(period, account, window, cap), the last two only where this process admitted it."""
        self.nanousd = nanousd
        self.state: State = state
        self.ends_at = ends_at
        """Of the lease."""


class Budgets:
    """All accounts of a process."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, _Sum]] = {}
        """By period, then by account."""
        self._attempts: dict[str, _Attempt] = {}
        self._live: dict[str, _Attempt] = {}
        self._settled: deque[tuple[float, str]] = deque()
        """Until when it is remembered, in order: a look at what is live is all that `expire` takes."""
        self._expired = 0
        self._newest_ns = 0

    def __len__(self) -> int:
        """Attempts that hold a reservation."""
        return len(self._live)

    def __contains__(self, ask_id: str) -> bool:
        """Whether it is remembered."""
        return ask_id in self._attempts

    @property
    def remembered(self) -> int:
        """Attempts that are remembered, ended ones too."""
        return len(self._attempts)

    @property
    def uncertain(self) -> int:
        """Attempts that are booked at their bound, until the ledger says what they cost."""
        return self._expired

    def reserve(self, ask: MoneyAsk, now: float) -> MoneyVerdict:
        """Take the upper bound from every window, or nothing. An id that holds a reservation keeps it, and one that
        held another is refused. Raises ValueError for an amount that none can be."""
        check_ask(ask)
        if ask.at_ns > self._newest_ns:
            self._newest_ns = ask.at_ns
        windows = caps(ask)
        known = self._attempts.get(ask.id)
        if known is not None:
            return self._verdict(ask, windows, admitted=known.state == "live")
        if not windows:
            return MoneyVerdict(True)
        for period, account, _, cap in windows:
            if self._left(period, account, cap) < ask.upper_nanousd:
                return self._verdict(ask, windows, admitted=False)
        for period, account, _, _ in windows:
            self._sum(period, account).reserved += ask.upper_nanousd
        self._attempts[ask.id] = self._live[ask.id] = _Attempt(windows, ask.upper_nanousd, "live", now + ask.lease_s)
        return self._verdict(ask, windows, admitted=True)

    def spend(self, ask_id: str, nanousd: int) -> bool:
        """What the attempt has cost so far, absolute. False: it is beyond its reservation and there is no room for
        more: cut it. True for an unknown one, which has no cap."""
        check_amount(nanousd)
        attempt = self._attempts.get(ask_id)
        if attempt is None or attempt.state == "settled":
            return True
        more = nanousd - attempt.nanousd
        if more <= 0:
            return True
        for period, account, _, cap in attempt.windows:
            if cap is not None and self._left(period, account, cap) < more:
                return False
        self._book(attempt, nanousd)
        return True

    def settle(self, ask_id: str, nanousd: int, now: float) -> None:
        """The attempt is over and cost this much, more than was reserved or less. The first settlement holds."""
        check_amount(nanousd)
        attempt = self._attempts.get(ask_id)
        if attempt is None or attempt.state == "settled":
            return
        self._release(attempt)
        self._book(attempt, nanousd)
        self._expired -= attempt.state == "expired"
        attempt.state = "settled"
        self._live.pop(ask_id, None)
        self._settled.append((now + LATELY_S, ask_id))

    def renew(self, ask_id: str, *, lease_s: float, now: float) -> None:
        """The attempt is still under way. One whose lease had ended takes back what was booked for it."""
        attempt = self._attempts.get(ask_id)
        if attempt is None or attempt.state == "settled":
            return
        if attempt.state == "expired":
            self._expired -= 1
            for period, account, _, _ in attempt.windows:
                one = self._sum(period, account)
                one.settled -= attempt.nanousd
                one.reserved += attempt.nanousd
            attempt.state = "live"
            self._live[ask_id] = attempt
        attempt.ends_at = now + lease_s

    def expire(self, now: float) -> int:
        """End the leases that are over and forget what needs no remembering. Returns how many ended."""
        ended = [ask_id for ask_id, attempt in self._live.items() if attempt.ends_at <= now]
        for ask_id in ended:
            self._release(self._live.pop(ask_id))
        while self._settled and self._settled[0][0] <= now:
            del self._attempts[self._settled.popleft()[1]]
        self._drop_past()
        return len(ended)

    def owe(self, ask: MoneyAsk, nanousd: int, *, live: bool, now: float) -> None:
        """What was decided elsewhere, without a look at caps: `nanousd` is reserved (`live`) or was settled."""
        check_amount(nanousd)
        self._newest_ns = max(self._newest_ns, ask.at_ns)
        if ask.id not in self._attempts:
            windows = caps(ask)
            if not windows:
                return
            self._attempts[ask.id] = _Attempt(windows, 0, "expired", now)
            self._expired += 1
        attempt = self._attempts[ask.id]
        if live:
            self.renew(ask.id, lease_s=ask.lease_s, now=now)
            if attempt.state == "live" and nanousd > attempt.nanousd:
                self._book(attempt, nanousd)
        else:
            self.settle(ask.id, nanousd, now)

    def cut(self, at_ns: int) -> Cut:
        """What is counted now, to be compared with a reading of the ledger that begins after."""
        at = periods(at_ns)
        settled = {
            window_id(period, account): one.settled
            for period in (at.day, at.month)
            for account, one in self._sums.get(period, {}).items()
        }
        held = tuple(
            Held(
                ask_id,
                one.state,
                one.nanousd,
                tuple(window_id(period, account) for period, account, _, _ in one.windows),
            )
            for ask_id, one in self._attempts.items()
        )
        return Cut(at_ns, settled, held)

    def correct(self, found: Corrections) -> None:
        """Bring the count to what the ledger says."""
        for window, delta in found.deltas.items():
            period, _, account = window.partition(":")
            self._sum(period, account).settled += delta
        for one in found.adopt:
            if one.id not in self._attempts:
                windows: list[tuple[str, str, Window, int | None]] = [
                    (period, account, "", None) for period, _, account in map(_split, one.windows)
                ]
                attempt = self._attempts[one.id] = _Attempt(windows, 0, "expired", 0.0)
                self._expired += 1
                self._book(attempt, one.nanousd)
        for ask_id in found.forget:
            attempt_or_none = self._attempts.get(ask_id)
            if attempt_or_none is not None and attempt_or_none.state == "expired":
                self._book(attempt_or_none, 0)
                self._expired -= 1
                del self._attempts[ask_id]

    def uses(self, account_ids: Iterable[str], at_ns: int) -> tuple[AccountUse, ...]:
        """What stands against these accounts in the day and month of `at_ns`; 0 where nothing is kept."""
        at = periods(at_ns)
        found = []
        for account in account_ids:
            for period, window in zip((at.day, at.month), WINDOWS, strict=True):
                one = self._sums.get(period, {}).get(account) or _Sum()
                found.append(AccountUse(account, window, one.settled, one.reserved))
        return tuple(found)

    # inside

    def _sum(self, period: str, account: str) -> _Sum:
        accounts = self._sums.get(period)
        if accounts is None:
            accounts = self._sums[period] = {}
        one = accounts.get(account)
        if one is None:
            one = accounts[account] = _Sum()
        return one

    def _left(self, period: str, account: str, cap: int) -> int:
        accounts = self._sums.get(period)
        one = None if accounts is None else accounts.get(account)
        return cap if one is None else cap - one.settled - one.reserved

    def _release(self, attempt: _Attempt) -> None:
        """From reserved to booked."""
        if attempt.state == "live":
            for period, account, _, _ in attempt.windows:
                one = self._sum(period, account)
                one.reserved -= attempt.nanousd
                one.settled += attempt.nanousd
                assert one.reserved >= 0, "a reservation was given back twice"
            attempt.state = "expired"
            self._expired += 1

    def _book(self, attempt: _Attempt, nanousd: int) -> None:
        """Its amount becomes this one."""
        delta = nanousd - attempt.nanousd
        attempt.nanousd = nanousd
        for period, account, _, _ in attempt.windows:
            one = self._sum(period, account)
            if attempt.state == "live":
                one.reserved += delta
            else:
                one.settled += delta

    def _verdict(
        self,
        ask: MoneyAsk,
        windows: list[Capped],
        *,
        admitted: bool,
    ) -> MoneyVerdict:
        if not windows:
            return MoneyVerdict(admitted)
        period, account, window, cap = windows[0]
        if len(windows) > 1:
            period, account, window, cap = min(
                windows, key=lambda one: (self._left(one[0], one[1], one[3]), one[2] == "day")
            )
        one = self._sums.get(period, {}).get(account) or _Sum()
        return verdict(
            ask.at_ns, account, window, cap, admitted=admitted, spent_nanousd=one.settled, reserved_nanousd=one.reserved
        )

    def _drop_past(self) -> None:
        """Forget days before yesterday and months before the last, unless something is reserved in them."""
        newest = periods(self._newest_ns)
        yesterday = periods(max(newest.day_ns - 1, 0)).day_ns
        last_month = periods(max(newest.month_ns - 1, 0)).month
        for period in list(self._sums):
            past = period < last_month if period[0] == "m" else int(period[1:]) * _DAY_NS < yesterday
            if past and not any(one.reserved for one in self._sums[period].values()):
                del self._sums[period]


def _split(window: str) -> tuple[str, str, str]:
    return window.partition(":")


def verdict(
    at_ns: int,
    account: str,
    window: Literal["day", "month"],
    cap: int,
    *,
    admitted: bool,
    spent_nanousd: int,
    reserved_nanousd: int,
) -> MoneyVerdict:
    """A verdict about the nearest window."""
    at = periods(at_ns)
    return MoneyVerdict(
        admitted=admitted,
        account=account,
        window=window,
        cap_nanousd=cap,
        spent_nanousd=spent_nanousd,
        reserved_nanousd=reserved_nanousd,
        affordable_nanousd=max(cap - spent_nanousd - reserved_nanousd, 0),
        resets_at_ns=at.day_resets_ns if window == "day" else at.month_resets_ns,
    )


class AlertLine:
    """Everybody's day has cost more than the line: said once a day. A reading that jumps over it is enough."""

    def __init__(self) -> None:
        self._told = ""

    def crossed(self, spent_nanousd: int, line_nanousd: int | None, at_ns: int) -> bool:
        """Whether this is the moment to say so. `spent_nanousd` is settled in the day of `at_ns`."""
        day = periods(at_ns).day
        if line_nanousd is None or spent_nanousd < line_nanousd or self._told >= day:
            return False
        self._told = day
        return True
