"""`/admin/budgets`: every account with a cap, what it has spent and holds, and when that begins anew. Read-only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response

from headgate.gateway.budgets import COUNTED, EVERYBODY, BudgetRules, accounts_of, tier_of
from headgate.policy.budgets import Account, AccountUse, periods
from headgate.policy.records import Principal
from headgate.storage import tables
from headgate.storage.interfaces import Money

KEYS_MAX = 30
PEOPLE_MAX = 30
"""Accounts that are shown of either kind, those that spent most today first; of others one asks by name."""
FRESH_S = 1.2
"""Over Redis an account that nobody has used lately is known once the next look has come back."""
_NS = 10**9
_NOBODY = Principal(key_id="", user="")


class BudgetLine(msgspec.Struct, frozen=True):
    """One window of one account. Nano-dollars; `left` is what may still be reserved."""

    account: str
    window: str
    cap_nanousd: int | None
    """None: counted for the alert line, and without a cap."""
    spent_nanousd: int
    reserved_nanousd: int
    left_nanousd: int | None
    resets_at: str


class BudgetsView(msgspec.Struct, frozen=True):
    """The whole page. `shared`: all processes are counted (Redis); `uncertain`: the ledger is about to be read again,
    since something is booked at the most it can have cost."""

    shared: bool
    uncertain: bool
    alert_day_nanousd: int | None
    budgets: list[BudgetLine]


def budgets_router(
    engine: sa.Engine,
    money: Money,
    rules: Callable[[], BudgetRules],
    *,
    reader: Callable[..., Principal],
    now_ns: Callable[[], int],
) -> APIRouter:
    """The routes. `reader` is a dependency that lets in who has `admin:read`.

    Who has an account is asked of the database in a thread; the count is asked on the loop, whose it is.
    """
    router = APIRouter()

    @router.get("/admin/budgets", dependencies=[Depends(reader)])
    async def budgets(
        user: Annotated[str, Query(description="a person by name, beside those who spent today")] = "",
        tier: Annotated[str, Query(description="that person's, where they have not asked today")] = "",
    ) -> Response:
        """Caps of everybody, tiers, keys and people with what stands against them, today and this month (UTC).

        Keys and people: the 30 of each that spent most today.
        """
        in_force = rules()
        accounts = await asyncio.to_thread(_accounts, engine, in_force, user, tier, now_ns())
        uses = money.snapshot([account.id for account in accounts])
        if money.shared:
            await asyncio.sleep(FRESH_S)
            uses = money.snapshot([account.id for account in accounts])
        page = BudgetsView(
            shared=money.shared,
            uncertain=money.uncertain,
            alert_day_nanousd=in_force.alert_day_nanousd,
            budgets=_lines(accounts, uses, now_ns()),
        )
        return Response(msgspec.json.encode(page), media_type="application/json")

    return router


def _lines(accounts: Sequence[Account], uses: Sequence[AccountUse], at_ns: int) -> list[BudgetLine]:
    at = periods(at_ns)
    stands = {(use.account, use.window): use for use in uses}
    lines = []
    for account in accounts:
        day, month = stands[account.id, "day"], stands[account.id, "month"]
        for cap, use, resets_ns in (
            (account.day_nanousd, day, at.day_resets_ns),
            (account.month_nanousd, month, at.month_resets_ns),
        ):
            if cap is None:
                continue
            counted = account.id == EVERYBODY and cap == COUNTED
            left = max(cap - use.spent_nanousd - use.reserved_nanousd, 0)
            lines.append(
                BudgetLine(
                    account=account.id,
                    window=use.window,
                    cap_nanousd=None if counted else cap,
                    spent_nanousd=use.spent_nanousd,
                    reserved_nanousd=use.reserved_nanousd,
                    left_nanousd=None if counted else left,
                    resets_at=datetime.fromtimestamp(resets_ns // _NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                )
            )
    return lines


def _accounts(engine: sa.Engine, rules: BudgetRules, user: str, tier: str, at_ns: int) -> list[Account]:
    """Everybody, tiers, keys, people: those that have a cap."""
    found: dict[str, Account] = {}

    def add(of: Sequence[Account], *kinds: str) -> None:
        for account in of:
            if account.id.partition(":")[0] in kinds:
                found.setdefault(account.id, account)

    for name in rules.tiers:
        add(accounts_of(_NOBODY, "", name, rules), EVERYBODY, "tier")
    with engine.connect() as connection:
        spent = _spent_today(connection, at_ns)
        for row in connection.execute(_keys_statement(at_ns, spent)):
            key = Principal(
                key_id=row.id,
                user=row.owner,
                budget_day_nanousd=row.budget_day_nanousd,
                budget_month_nanousd=row.budget_month_nanousd,
            )
            add(accounts_of(key, row.owner, row.tier, rules), "key")
    name_of = tier_of(rules)
    people: dict[str, tuple[int, str]] = {}
    for (_, name, theirs), (nanousd, _) in spent.items():
        before, _ = people.get(name, (0, ""))
        people[name] = before + nanousd, name_of(theirs)
    most = sorted(people, key=lambda name: -people[name][0])[:PEOPLE_MAX]
    for name in [user, *most] if user else most:
        _, theirs = people.get(name, (0, name_of(tier)))
        add(accounts_of(_NOBODY, name, theirs, rules), "user")
    return list(found.values())


def _spent_today(connection: sa.Connection, at_ns: int) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Nano-dollars and the last call of each key, person and tier; in the order of the last calls."""
    calls = tables.calls
    groups = (calls.c.key_id, calls.c.user_id, calls.c.tier)
    last = sa.func.max(calls.c.at_ns)
    statement = (
        sa.select(*groups, sa.cast(sa.func.sum(calls.c.cost_nanousd), sa.BigInteger), last)
        .where(calls.c.at_ns >= periods(at_ns).day_ns)
        .group_by(*groups)
        .order_by(last)
    )
    return {(key, user, tier): (nanousd or 0, at) for key, user, tier, nanousd, at in connection.execute(statement)}


def _keys_statement(
    at_ns: int, spent: dict[tuple[str, str, str], tuple[int, int]]
) -> sa.Select[tuple[str, str, str, int | None, int | None]]:
    """Living keys with a budget: the 30 that spent most today, and the newest where there is room."""
    keys = tables.keys
    sums: dict[str, int] = {}
    for (key, _, _), (nanousd, _) in spent.items():
        sums[key] = sums.get(key, 0) + nanousd
    most = sorted(sums, key=lambda key: -sums[key])[: 10 * KEYS_MAX]
    rank = {key: at for at, key in enumerate(most)}
    order = [sa.case(rank, value=keys.c.id, else_=len(rank))] if rank else []
    return (
        sa.select(keys.c.id, keys.c.owner, keys.c.tier, keys.c.budget_day_nanousd, keys.c.budget_month_nanousd)
        .where(
            keys.c.revoked_at_ns.is_(None),
            sa.or_(keys.c.expires_at_ns.is_(None), keys.c.expires_at_ns > at_ns),
            sa.or_(keys.c.budget_day_nanousd.is_not(None), keys.c.budget_month_nanousd.is_not(None)),
        )
        .order_by(*order, keys.c.created_at_ns.desc())
        .limit(KEYS_MAX)
    )
