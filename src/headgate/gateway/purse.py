"""What one call may spend: reserved before an attempt is queued for, metered while it streams, settled when it ends.

What it is: the driver between a call and `interfaces.Money`, and the watch on how fast its person spends. What it is
not: the count (`policy/budgets.py`), whose budget it is and what is said when it is empty (`budgets.py`), or who spends
too fast (`guards.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from headgate.gateway import budgets
from headgate.gateway.budgets import BudgetRules
from headgate.gateway.guards import SpendGuard, held_to_one
from headgate.policy.budgets import HEARTBEAT_S, LEASE_S, NANOUSD_MAX, Account, MoneyAsk, MoneyVerdict, ask_id
from headgate.policy.limiter import Subject
from headgate.policy.pricing import price, upper_bound
from headgate.policy.records import Plan, Principal, Refused
from headgate.storage.interfaces import Money
from headgate.wire.catalog import Catalog
from headgate.wire.message import InvalidBody, Splice, scan, splice
from headgate.wire.usage import Usage

_TOKENS_PER_ESTIMATED = 2.0
"""No prompt has been seen to have twice the tokens that were estimated; one of every byte a token is the end of it."""
_TOKENS_BESIDE_TEXT = 1_000
"""Of the prompt that a tool brings with it (claude-api §9: up to 804), and of the roles."""


class Purses:
    """What all calls of a process share."""

    __slots__ = ("catalog", "guard", "money")

    def __init__(self, money: Money, guard: SpendGuard, catalog: Catalog) -> None:
        self.money = money
        self.guard = guard
        self.catalog = catalog


class Purse:
    """One call's. Its attempts are made one after another, and so are their reservations."""

    __slots__ = (
        "_accounts",
        "_ask_id",
        "_at_ns",
        "_call_id",
        "_digest",
        "_key_id",
        "_purses",
        "_renewed_at",
        "_rules",
        "_user",
        "_watched",
        "cut",
    )

    def __init__(
        self,
        purses: Purses,
        rules: BudgetRules,
        principal: Principal,
        *,
        user: str,
        tier: str,
        call_id: str,
        at_ns: int,
    ) -> None:
        """`at_ns`: when the call came, UTC; that day and month pay for it."""
        self._purses = purses
        self._rules = rules
        self._accounts: tuple[Account, ...] = budgets.accounts_of(principal, user, tier, rules)
        self._call_id = call_id
        self._user = user
        self._key_id = principal.key_id
        self._at_ns = at_ns
        self._digest = ""
        self._ask_id = ""
        """Of the reservation that is held; empty: none is."""
        self._renewed_at = 0.0
        self._watched = False
        self.cut: Refused | None = None
        """Why its stream had to end: a budget is used up."""

    def watch(self, subjects: tuple[Subject, ...], digest: str, expected_nanousd: int) -> tuple[Subject, ...]:
        """The call is about to wait for its turn; the subjects, of which those that spend too fast go one at a time."""
        guard = self._purses.guard
        self._digest = digest
        if not self._watched:
            self._watched = True
            guard.began(
                self._user,
                self._key_id,
                self._call_id,
                expected_nanousd,
                user_cap_nanousd=self._cap("user:"),
                key_cap_nanousd=self._cap("key:"),
            )
        return held_to_one(subjects, guard.held(self._user, self._key_id))

    async def reserve(self, number: int, plan: Plan, body: bytes, now: float, *, speed: str) -> bytes | Refused:
        """Reserve for the attempt of this number; the body to send, whose `max_tokens` may have been lowered.

        `speed` is what the request asks for.

        What is reserved is enough for each of the plan's models, so that an attempt which is diverted keeps it.
        """
        if not self._accounts:
            return body
        identity = ask_id(self._call_id, number)
        if identity == self._ask_id:
            return body
        tokens = min(len(body), round(plan.input_tokens_estimate * _TOKENS_PER_ESTIMATED)) + _TOKENS_BESIDE_TEXT
        upper_nanousd = self._upper(plan, tokens, plan.max_tokens, speed)
        verdict = await self._ask(identity, upper_nanousd)
        if not verdict.admitted and self._rules.clamp:
            output_nanousd = self._upper(plan, tokens, 2, speed) - self._upper(plan, tokens, 1, speed)
            clamped = budgets.clamped_max_tokens(
                verdict, max_tokens=plan.max_tokens, upper_nanousd=upper_nanousd, output_nanousd=output_nanousd
            )
            if clamped is not None:
                verdict = await self._ask(identity, self._upper(plan, tokens, clamped, speed))
                body = _with_max_tokens(body, clamped)
        if not verdict.admitted:
            return budgets.refused(verdict, self._at_ns)
        self._ask_id, self._renewed_at = identity, now
        return body

    def tick(self, now: float) -> None:
        """Keep what is reserved."""
        if self._ask_id and now - self._renewed_at >= HEARTBEAT_S:
            self._renewed_at = now
            self._purses.money.renew(self._ask_id, lease_s=LEASE_S)

    def progressed(self, usage: Usage, model: str, on_cut: Callable[[], None]) -> None:
        """What the attempt has cost so far. `on_cut` is called when that is more than there is."""
        if not self._ask_id:
            return

        def over() -> None:
            if self.cut is None:
                self.cut = budgets.cut_error(self._accounts[0].id, 0)
                on_cut()

        cost = price(usage, model, self._at_ns, self._purses.catalog)
        self._purses.money.spend(self._ask_id, cost.cost_nanousd, over)

    def settle(self, nanousd: int) -> None:
        """The attempt is over, and cost this much; 0 for one that never left."""
        if self._ask_id:
            self._purses.money.settle(self._ask_id, min(nanousd, NANOUSD_MAX))
            self._ask_id = ""

    def close(self, nanousd: int) -> None:
        """The call is over, and cost this much with all of its attempts. Once, and for a call that was watched."""
        if not self._watched:
            return
        self._watched = False
        self._purses.guard.settled(
            self._user,
            self._key_id,
            nanousd,
            self._call_id,
            self._digest,
            user_cap_nanousd=self._cap("user:"),
            key_cap_nanousd=self._cap("key:"),
        )

    def _cap(self, kind: str) -> int | None:
        return next((one.day_nanousd for one in self._accounts if one.id.startswith(kind)), None)

    def _upper(self, plan: Plan, input_tokens: int, max_tokens: int, speed: str) -> int:
        """The most that the dearest of the plan's models may cost."""
        catalog, at_ns = self._purses.catalog, self._at_ns
        bounds = (upper_bound(input_tokens, max_tokens, one, at_ns, catalog, speed=speed) for one in plan.models)
        return min(max(bounds), NANOUSD_MAX)

    async def _ask(self, identity: str, upper_nanousd: int) -> MoneyVerdict:
        answers: list[MoneyVerdict] = []
        waiting: asyncio.Future[None] | None = None

        def answered(verdict: MoneyVerdict) -> None:
            answers.append(verdict)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)

        self._purses.money.reserve(MoneyAsk(identity, self._accounts, upper_nanousd, self._at_ns), answered)
        if not answers:
            waiting = asyncio.get_running_loop().create_future()
            await waiting
        return answers[0]


def _with_max_tokens(body: bytes, max_tokens: int) -> bytes:
    try:
        span = scan(body).fields["max_tokens"]
    except (InvalidBody, KeyError):  # a body without it is refused by Anthropic, in its own words
        return body
    return splice(body, [Splice(span.start, span.end, msgspec.json.encode(max_tokens))])
