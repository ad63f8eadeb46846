"""The budgets of one process, and what the ledger says was spent.

What it is: `interfaces.Money` over the policy object with two clocks, and the query that a count is begun from and
corrected by. What it is not: the budgets of several processes (`redis_money.py`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
import structlog

from headgate.policy.budgets import (
    NANOUSD_MAX,
    AccountUse,
    Budgets,
    MoneyAsk,
    MoneyVerdict,
    OpenAttempt,
    Spent,
    ask_id,
    corrections,
    periods,
    window_id,
)
from headgate.policy.pricing import upper_bound
from headgate.policy.prompt_bound import prompt_tokens_max_of
from headgate.storage.tables import attempts, calls
from headgate.wire.catalog import Catalog

EXPIRE_EVERY_S = 1.0
"""A look at every attempt under way."""
ATTEMPTS_PER_LOOKUP = 500
FLUSH_S = 5.0
"""How long a reading waits for the ledger to be folded. What is not folded after it is not read."""

_log = structlog.get_logger(__name__)

ReadSpent = Callable[[Collection[str], int], Awaitable[Spent]]
"""(ids of attempts to look up, UTC nanoseconds) → what the ledger says. Raises whatever a store raises."""
TierOf = Callable[[str], str]
"""The tier that a tier's name in the ledger counts for: an app may send any name, and those unknown are `free`."""


class LocalMoney:
    """See `interfaces.Money`. Every answer comes before the call returns."""

    shared = False

    def __init__(
        self, budgets: Budgets, *, clock: Callable[[], float], now_ns: Callable[[], int], read: ReadSpent
    ) -> None:
        """`clock` gives monotonic seconds, `now_ns` UTC nanoseconds."""
        self._budgets = budgets
        self._clock = clock
        self._now_ns = now_ns
        self._read = read
        self._expire_at = 0.0

    @property
    def uncertain(self) -> bool:
        """See `Money.uncertain`."""
        return self._budgets.uncertain > 0

    def reserve(self, ask: MoneyAsk, answered: Callable[[MoneyVerdict], None]) -> None:
        """See `Money.reserve`."""
        answered(self._budgets.reserve(ask, self._clock()))

    def spend(self, ask_id: str, nanousd: int, over: Callable[[], None]) -> None:
        """See `Money.spend`."""
        if not self._budgets.spend(ask_id, nanousd):
            over()

    def settle(self, ask_id: str, nanousd: int) -> None:
        """See `Money.settle`."""
        self._budgets.settle(ask_id, nanousd, self._clock())

    def renew(self, ask_id: str, *, lease_s: float) -> None:
        """See `Money.renew`."""
        self._budgets.renew(ask_id, lease_s=lease_s, now=self._clock())

    async def seed(self) -> bool:
        """See `Money.seed`."""
        cut = self._budgets.cut(self._now_ns())
        try:
            spent = await self._read([one.id for one in cut.held], cut.at_ns)
        except Exception as error:
            # Weather: a database that is away. What is counted stays, and the next reading finds it.
            tell_unread(error)
            return False
        self._budgets.correct(corrections(cut, spent))
        return True

    def snapshot(self, account_ids: Collection[str]) -> tuple[AccountUse, ...]:
        """See `Money.snapshot`."""
        return self._budgets.uses(account_ids, self._now_ns())

    def tick(self, now: float) -> None:
        """See `Money.tick`."""
        if now >= self._expire_at:
            self._expire_at = now + EXPIRE_EVERY_S
            self._budgets.expire(now)


def ledger_name(data_dir: Path) -> str:
    """The name of the ledger in this directory, which its processes share: made at random by the first of them.

    Raises OSError where it cannot be kept.
    """
    file = data_dir / "ledger-name"
    if not file.exists():
        fresh = data_dir / f"ledger-name.{secrets.token_hex(8)}"
        fresh.write_text(secrets.token_hex(16))
        try:
            # Of several that start together one is first, and its name is whole when it can be seen.
            os.link(fresh, file)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return file.read_text()


def tell_unread(error: Exception) -> None:
    """The ledger could not be read for the budgets."""
    _log.warning("budgets_not_read", reason=f"{type(error).__name__}: {error}"[:200])


class _Flushed(Protocol):
    """The part of `LocalLedger` that a reading needs."""

    def flush(self, *, timeout_s: float) -> None:
        """Return when all that was written so far can be queried. Raises TimeoutError."""


def ledger_reader(engine: sa.Engine, ledger: _Flushed, catalog: Catalog, tier_of: TierOf) -> ReadSpent:
    """Reads the ledger in a thread, when what this process wrote is folded.

    Raises TimeoutError when it is not after FLUSH_S: sums that lack what was settled long ago would be taken for a
    correction.
    """

    def read_now(ids: Collection[str], at_ns: int) -> Spent:
        ledger.flush(timeout_s=FLUSH_S)
        with engine.connect() as connection, connection.begin():
            return spent(connection, at_ns, ids=ids, catalog=catalog, tier_of=tier_of)

    async def read(ids: Collection[str], at_ns: int) -> Spent:
        return await asyncio.to_thread(read_now, ids, at_ns)

    return read


def spent(
    connection: sa.Connection, at_ns: int, *, ids: Collection[str] = (), catalog: Catalog, tier_of: TierOf
) -> Spent:
    """What was spent in the day and month of `at_ns` by calls that came before it; `ids` are attempts to look up.

    One pass over the month's calls, 2.8 s of CPU for 1.5 million: never on the loop. All in the transaction of the
    connection, which must see one state throughout. An attempt that is open counts with the most that its intent can
    cost. Raises the database's errors.
    """
    at = periods(at_ns)
    sums: dict[str, int] = {}
    for key, user, tier, today, nanousd in connection.execute(spent_statement(at_ns)).all():
        for account in _accounts(key, user, tier_of(tier)):
            for period in (at.day, at.month) if today else (at.month,):
                window = window_id(period, account)
                sums[window] = sums.get(window, 0) + nanousd
    return Spent(at_ns, sums, _opened(connection, at_ns, catalog, tier_of), _ended(connection, ids))


def spent_statement(at_ns: int) -> sa.Select[Any]:  # Any: columns, as in the reports
    """Key, user, tier, whether it was today, sum: for `spent`, and for the test that explains it."""
    at = periods(at_ns)
    groups = (calls.c.key_id, calls.c.user_id, calls.c.tier, (calls.c.at_ns >= at.day_ns).label("today"))
    return (
        sa.select(*groups, sa.cast(sa.func.sum(calls.c.cost_nanousd), sa.BigInteger))
        .where(calls.c.at_ns >= at.month_ns, calls.c.at_ns < at_ns, calls.c.cost_nanousd != 0)
        .group_by(calls.c.key_id, calls.c.user_id, calls.c.tier, sa.literal_column("today"))
    )


def _accounts(key: str, user: str, tier: str) -> tuple[str, str, str, str]:
    return f"key:{key}", f"user:{user}", f"tier:{tier}", "all"


def _opened(connection: sa.Connection, at_ns: int, catalog: Catalog, tier_of: TierOf) -> tuple[OpenAttempt, ...]:
    at = periods(at_ns)
    # A literal, as the index of open calls has it.
    still_open = (calls.c.state == sa.text("'open'"), attempts.c.state == sa.text("'open'"))
    statement = (
        sa.select(
            attempts.c.call_id,
            attempts.c.number,
            attempts.c.model,
            attempts.c.at_ns,
            attempts.c.input_tokens_estimate,
            attempts.c.max_tokens,
            calls.c.key_id,
            calls.c.user_id,
            calls.c.tier,
            calls.c.at_ns.label("came_ns"),
        )
        .join(calls, calls.c.call_id == attempts.c.call_id)
        .where(*still_open, calls.c.at_ns >= at.month_ns, calls.c.at_ns < at_ns)
    )
    found = []
    for row in connection.execute(statement):
        names = (at.day, at.month) if row.came_ns >= at.day_ns else (at.month,)
        accounts = _accounts(row.key_id, row.user_id, tier_of(row.tier))
        windows = tuple(window_id(period, account) for account in accounts for period in names)
        tokens = prompt_tokens_max_of(row.input_tokens_estimate)
        nanousd = min(upper_bound(tokens, row.max_tokens, row.model, row.at_ns, catalog), NANOUSD_MAX)
        found.append(OpenAttempt(ask_id(row.call_id, row.number), nanousd, windows))
    return tuple(found)


def _ended(connection: sa.Connection, ids: Collection[str]) -> dict[str, int]:
    wanted = set(ids)
    call_ids = sorted({one.rpartition(":")[0] for one in wanted})
    found: dict[str, int] = {}
    columns = (attempts.c.call_id, attempts.c.number, attempts.c.cost_nanousd)
    for start in range(0, len(call_ids), ATTEMPTS_PER_LOOKUP):
        some = call_ids[start : start + ATTEMPTS_PER_LOOKUP]
        statement = sa.select(*columns).where(attempts.c.call_id.in_(some), attempts.c.state != sa.text("'open'"))
        for call_id, number, nanousd in connection.execute(statement):
            one = ask_id(call_id, number)
            if one in wanted:
                found[one] = nanousd
    return found
