"""Which accounts a call is paid from, and what a client is told when one of them is empty. Pure, but for `SeedTimes`.

What it is: principals and rules into `policy/budgets.py`'s accounts, verdicts into refusals. What it is not: the count.

One person with ten keys is one account, found by name whatever key is shown. A key's own budget bounds what comes
through it, and lifts nobody's. While everybody has a cap and the free tier has none of its own, that tier may use 80 %
of it together: those who pay are never locked out by those who do not (failure-model §2.6).

How a call uses `interfaces.Money`, for each of its attempts:

1. Before it is queued for: `reserve(MoneyAsk(ask_id(call_id, number), accounts_of(…), upper_bound(…), at_ns))` with
   `at_ns` the moment the call came in (`ClientRequest.received_at_ns`). Not admitted: `clamped_max_tokens` when
   `budgets.clamp` is on, and once more with what that costs; else `refused`, before anything is written or sent.
2. While it waits and while it streams: `renew` every HEARTBEAT_S; a lease is LEASE_S.
3. While it streams, every 2 s at most: `spend` with what it has cost so far (the price of the fold's usage). `over` is
   called when that is beyond the reservation and nothing is left: close the upstream, end the client's stream with
   `cut_error`, and settle as for any cut stream.
4. At its end, however it ended: `settle` with the cost that is written to the ledger, right after that is written. An
   attempt that never left costs 0. The next attempt reserves anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

import msgspec

from headgate.policy.budgets import NANOUSD_MAX, Account, AccountUse, AlertLine, MoneyVerdict, periods
from headgate.policy.records import Principal, Record, Refused
from headgate.policy.routing import DEFAULT_TIER

NANOUSD = 10**9
FREE_SHARE_PERCENT = 80
COUNTED = NANOUSD_MAX
"""The cap of an account that is only counted, for the alert line."""
SEED_EVERY_S = 600.0
SEED_SOON_S = 30.0
"""When something is uncertain: as often as orphans are swept."""

EVERYBODY = "all"
_WHOSE = {
    "user": "your budget",
    "key": "this key's budget",
    "tier": "the budget of the tier '{name}' together",
    "all": "the budget of everybody together",
}
_NS = 10**9


class Caps(Record, frozen=True, gc=False):
    """Nano-dollars a day and a month; None is without cap."""

    day_nanousd: int | None = None
    month_nanousd: int | None = None


class TierCaps(Record, frozen=True, gc=False):
    """Caps of one person of a tier, and of all of the tier together."""

    person: Caps = Caps()
    total: Caps = Caps()


_NO_CAPS = TierCaps()


class BudgetRules(Record, frozen=True):
    """What the settings say about money."""

    everybody: Caps = Caps()
    tiers: Mapping[str, TierCaps] = msgspec.field(default_factory=lambda: {DEFAULT_TIER: TierCaps()})
    """By name. A name that is not among them counts as the free tier, like its limits."""
    alert_day_nanousd: int | None = None
    clamp: bool = False


def nanousd(usd: float | None) -> int | None:
    """Dollars of a setting as nano-dollars, to the cent's thousandth. Raises ValueError for what no cap can be."""
    if usd is None:
        return None
    if not 0 <= usd * NANOUSD <= NANOUSD_MAX:
        raise ValueError(f"a budget is 0 to {NANOUSD_MAX // NANOUSD} dollars, and this is {usd!r}")
    return round(usd * 100_000) * 10_000


def tier_of(rules: BudgetRules) -> Callable[[str], str]:
    """The tier that a name counts for: for `storage.money.spent`, and for `accounts_of`."""
    return lambda name: name if name in rules.tiers else DEFAULT_TIER


def accounts_of(principal: Principal, user: str, tier: str, rules: BudgetRules) -> tuple[Account, ...]:
    """Person, key, tier, everybody: those that have a cap, so that a call without any costs nothing.

    `user` and `tier` are those the call is attributed to (and the ledger has), which an app may name.
    """
    name = tier if tier in rules.tiers else DEFAULT_TIER
    of_tier = rules.tiers.get(name, _NO_CAPS)
    person, total, everybody = of_tier.person, _total(name, of_tier.total, rules.everybody), rules.everybody
    day, month = everybody.day_nanousd, everybody.month_nanousd
    if rules.alert_day_nanousd is not None and day is None:
        day = COUNTED
    found = []
    if person.day_nanousd is not None or person.month_nanousd is not None:
        found.append(Account(f"user:{user}", person.day_nanousd, person.month_nanousd))
    if principal.budget_day_nanousd is not None or principal.budget_month_nanousd is not None:
        found.append(Account(f"key:{principal.key_id}", principal.budget_day_nanousd, principal.budget_month_nanousd))
    if total.day_nanousd is not None or total.month_nanousd is not None:
        found.append(Account(f"tier:{name}", total.day_nanousd, total.month_nanousd))
    if day is not None or month is not None:
        found.append(Account(EVERYBODY, day, month))
    return tuple(found)


def is_capped(account: Account) -> bool:
    """Whether it has a budget, rather than being counted for the alert line alone."""
    return any(cap is not None and cap != COUNTED for cap in (account.day_nanousd, account.month_nanousd))


def refused(verdict: MoneyVerdict, now_ns: int) -> Refused:
    """What a client is told: in the form of Anthropic's own gateway (claude-api §12.1), with which budget it is."""
    resets_in_s = max((verdict.resets_at_ns - now_ns) / _NS, 1.0)
    return Refused(
        status=429,
        error_type="billing_error",
        error_code="budget_exceeded",
        message=message(verdict),
        retry_after_s=resets_in_s,
        retryable=False,
        limit=verdict.cap_nanousd / NANOUSD,
    )


def cut_error(verdict_account: str, cap_nanousd: int) -> Refused:
    """What ends a stream that passed a cap while it was answered."""
    return Refused(
        status=429,
        error_type="billing_error",
        error_code="budget_exceeded",
        message=f"spend limit reached while this was answered: {_whose(verdict_account)} is used up.",
        retryable=False,
        limit=cap_nanousd / NANOUSD if cap_nanousd else None,
    )


def message(verdict: MoneyVerdict) -> str:
    """`spend limit reached (daily; resets 2026-08-08 00:00 UTC): …`."""
    at = datetime.fromtimestamp(verdict.resets_at_ns // _NS, UTC)
    each: Literal["daily", "monthly"] = "monthly" if verdict.window == "month" else "daily"
    period = "month" if verdict.window == "month" else "day"
    budget = f"{_whose(verdict.account)} of ${verdict.cap_nanousd / NANOUSD:,.2f} a {period}"
    left = verdict.affordable_nanousd / NANOUSD
    why = f"{budget} has ${left:,.4f} left, and this request may cost more." if left else f"{budget} is used up."
    return f"spend limit reached ({each}; resets {at:%Y-%m-%d %H:%M} UTC): {why}"


def spend_alert(line: AlertLine, uses: Sequence[AccountUse], rules: BudgetRules, now_ns: int) -> str | None:
    """What is said when everybody's day passes the alert line, once a day, else None. `uses` is a `Money.snapshot` of
    `EVERYBODY`; `periods(now_ns).day` makes the subject under which several processes say it once.
    """
    spent = sum(one.spent_nanousd for one in uses if (one.account, one.window) == (EVERYBODY, "day"))
    if not line.crossed(spent, rules.alert_day_nanousd, now_ns):
        return None
    date = datetime.fromtimestamp(periods(now_ns).day_ns // _NS, UTC)
    at = (rules.alert_day_nanousd or 0) / NANOUSD
    return (
        f"Everybody together has spent ${spent / NANOUSD:,.2f} on {date:%Y-%m-%d} (UTC); the alert line is ${at:,.2f}."
    )


def clamped_max_tokens(
    verdict: MoneyVerdict, *, max_tokens: int, upper_nanousd: int, output_nanousd: int, floor: int = 256
) -> int | None:
    """The `max_tokens` that what is left can pay for, None where it would be fewer than `floor`.

    `upper_nanousd` is the bound that was refused, with `max_tokens` at `output_nanousd` a token (the difference of two
    bounds by one token: `upper_bound(n, 2, …) - upper_bound(n, 1, …)`). Reserve again with the bound of the new number.
    """
    short = upper_nanousd - verdict.affordable_nanousd
    if short <= 0:
        return max_tokens
    clamped = max_tokens - -(-short // max(output_nanousd, 1))
    return clamped if clamped >= min(floor, max_tokens) else None


class SeedTimes:
    """When the count is to be compared with the ledger again."""

    def __init__(self) -> None:
        self._read_at = 0.0
        self._has_read = False
        self._again = False

    def due(self, now: float, *, uncertain: bool) -> bool:
        """Whether it is time, which then counts as done: every ten minutes, and 30 s after the last when uncertain."""
        wait_s = SEED_SOON_S if uncertain or self._again else SEED_EVERY_S
        if self._has_read and now - self._read_at < wait_s:
            return False
        self._again = self._again and not self._has_read
        self._read_at, self._has_read = now, True
        return True

    def soon(self) -> None:
        """A cap is new, or the ledger was corrected: at the next look, and once more after 30 s, since what was under
        way when a cap came holds nothing of it."""
        self._has_read, self._again = False, True


def _total(name: str, total: Caps, everybody: Caps) -> Caps:
    if name != DEFAULT_TIER or (everybody.day_nanousd is None and everybody.month_nanousd is None):
        return total
    return Caps(_free(total.day_nanousd, everybody.day_nanousd), _free(total.month_nanousd, everybody.month_nanousd))


def _free(own: int | None, everybody: int | None) -> int | None:
    if own is not None or everybody is None:
        return own
    return everybody * FREE_SHARE_PERCENT // 100


def _whose(account: str) -> str:
    kind, _, name = account.partition(":")
    return _WHOSE.get(kind, "the budget").format(name=name)
