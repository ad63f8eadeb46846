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
from headgate.policy.pricing import CacheWrites, price, upper_bound
from headgate.policy.prompt_bound import cache_writes, prompt_tokens_max, prompt_tokens_max_of, web_searches_max
from headgate.policy.records import Plan, Principal, Refused
from headgate.storage.interfaces import Money
from headgate.wire.catalog import Catalog
from headgate.wire.message import InvalidBody, Splice, scan, splice
from headgate.wire.usage import Usage

_OUTPUT_TOKENS_MAX, _CONTEXT_TOKENS_MAX = 128_000, 1_000_000
"""Of a model that the catalogue does not know: the most that any takes."""
_COUNTED_ONLY = (Account(budgets.EVERYBODY, budgets.COUNTED),)
_ANSWER_FLOOR = 256
"""Below it a lowered `max_tokens` is no answer, and the request is refused instead."""


class _Thinking(msgspec.Struct, frozen=True):
    """What is read of `thinking`."""

    budget_tokens: int = 0


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
        "_clamped",
        "_digest",
        "_key_cap_nanousd",
        "_key_id",
        "_number",
        "_purses",
        "_renewed_at",
        "_rules",
        "_user",
        "_user_cap_nanousd",
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
        day_caps = {one.id: one.day_nanousd for one in self._accounts}
        self._user_cap_nanousd = day_caps.get(f"user:{user}")
        self._key_cap_nanousd = principal.budget_day_nanousd
        self._call_id = call_id
        self._user = user
        self._key_id = principal.key_id
        self._at_ns = at_ns
        self._digest = ""
        self._ask_id = ""
        """Of the reservation that is held; empty: none is."""
        self._number = 0
        """Of the attempt that it is for."""
        self._clamped: int | None = None
        """What `max_tokens` was lowered to for it."""
        self._renewed_at = 0.0
        self._watched = False
        self.cut: Refused | None = None
        """Why its stream had to end: a budget is used up."""

    def watch(self, subjects: tuple[Subject, ...], digest: str, expected_nanousd: int) -> tuple[Subject, ...]:
        """The call is about to wait for its turn; the subjects, of which those that spend too fast go one at a time."""
        guard = self._purses.guard
        self._digest = digest
        if self._watched:
            held = guard.held(self._user, self._key_id)
        else:
            self._watched = True
            held = guard.began(
                self._user,
                self._key_id,
                self._call_id,
                expected_nanousd,
                user_cap_nanousd=self._user_cap_nanousd,
                key_cap_nanousd=self._key_cap_nanousd,
            )
        return held_to_one(subjects, held) if held else subjects

    async def reserve(self, number: int, plan: Plan, body: bytes, now: float, *, speed: str) -> bytes | Refused:
        """Reserve for the attempt of this number; the body to send, whose `max_tokens` may have been lowered.

        `speed` is what the request asks for.

        What is reserved is enough for each of the plan's models, so that an attempt which is diverted keeps it.
        """
        if not self._accounts:
            return body
        identity = ask_id(self._call_id, number)
        if identity == self._ask_id:
            return body if self._clamped is None else _with_max_tokens(body, self._clamped)
        self._clamped = None
        if self._accounts == _COUNTED_ONLY:
            verdict = await self._ask(identity, self._roughly(plan, speed))
            if not verdict.admitted:
                return self._refused(verdict)
            self._ask_id, self._number, self._renewed_at = identity, number, now
            return body
        bound = _Bound(
            self._purses.catalog,
            plan.models,
            self._at_ns,
            # Of the body as it came: what we ask Anthropic ourselves looks like a conversation that it holds.
            input_tokens=prompt_tokens_max(plan.body, plan.input_tokens_estimate),
            web_searches=web_searches_max(plan.body),
            writes=cache_writes(body),
            speed=speed,
        )
        max_tokens = bound.output_tokens(plan.max_tokens, body)
        upper_nanousd = bound.nanousd(max_tokens)
        verdict = await self._ask(identity, upper_nanousd)
        if not verdict.admitted and self._rules.clamp:
            clamped = budgets.clamped_max_tokens(
                verdict,
                max_tokens=max_tokens,
                upper_nanousd=upper_nanousd,
                output_nanousd=bound.nanousd(2) - bound.nanousd(1),
                floor=_answer_floor(body),
            )
            if clamped is not None:
                verdict = await self._ask(identity, bound.nanousd(clamped))
                if verdict.admitted:
                    self._clamped = clamped
                    body = _with_max_tokens(body, clamped)
        if not verdict.admitted:
            return self._refused(verdict)
        self._ask_id, self._number, self._renewed_at = identity, number, now
        return body

    def tick(self, now: float) -> None:
        """Keep what is reserved."""
        if self._ask_id and now - self._renewed_at >= HEARTBEAT_S:
            self._renewed_at = now
            self._purses.money.renew(self._ask_id, lease_s=LEASE_S)

    def progressed(self, usage: Usage, model: str, on_cut: Callable[[], None]) -> None:
        """What the attempt has cost so far. `on_cut` is called when that is more than there is."""
        identity = self._ask_id
        if not identity:
            return

        def over() -> None:
            # Over Redis the answer may come when the attempt is over, and another under way.
            if self.cut is None and identity == self._ask_id:
                self.cut = self._cut_error()
                on_cut()

        cost = price(usage, model, self._at_ns, self._purses.catalog)
        self._purses.money.spend(identity, min(cost.cost_nanousd, NANOUSD_MAX), over)

    def settle(self, nanousd: int) -> None:
        """The attempt is over, and cost this much; 0 for one that never left."""
        if self._ask_id:
            self._purses.money.settle(self._ask_id, min(nanousd, NANOUSD_MAX))
            self._ask_id = ""

    def close(self, nanousd: int, *, sent: int) -> None:
        """The call is over, and cost this much with all of its attempts, of which so many were sent. Once.

        What is held for an attempt that was not sent goes back: its client left while it waited. What is held for one
        that was, goes by its lease: something broke, and only the ledger can tell.
        """
        if self._ask_id and self._number > sent:
            self.settle(0)
        if not self._watched:
            return
        self._watched = False
        self._purses.guard.settled(
            self._user,
            self._key_id,
            nanousd,
            self._call_id,
            self._digest,
            user_cap_nanousd=self._user_cap_nanousd,
            key_cap_nanousd=self._key_cap_nanousd,
        )

    def _refused(self, verdict: MoneyVerdict) -> Refused:
        refused = budgets.refused(verdict, self._at_ns)
        if verdict.cap_nanousd != budgets.COUNTED:
            self._purses.guard.budget_exhausted(verdict.account, refused.message)
        return refused

    def _roughly(self, plan: Plan, speed: str) -> int:
        """What is held where nobody has a cap and all is counted for the alert line: nothing is refused for it, so the
        body, its files and tools are not looked through."""
        return upper_bound(
            min(prompt_tokens_max_of(plan.input_tokens_estimate), _CONTEXT_TOKENS_MAX),
            min(plan.max_tokens, _OUTPUT_TOKENS_MAX),
            plan.models[0],
            self._at_ns,
            self._purses.catalog,
            speed=speed,
        )

    def _cut_error(self) -> Refused:
        """Names the account that is nearest to its cap."""
        caps = {(one.id, "day"): one.day_nanousd for one in self._accounts}
        caps |= {(one.id, "month"): one.month_nanousd for one in self._accounts}
        uses = self._purses.money.snapshot([one.id for one in self._accounts])
        left = [
            (cap - use.spent_nanousd - use.reserved_nanousd, use.account, cap)
            for use in uses
            if (cap := caps[use.account, use.window]) is not None
        ]
        _, account, cap = min(left)
        return budgets.cut_error(account, cap)

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


class _Bound:
    """The most that the dearest of a plan's models may cost, so that an attempt which is diverted keeps its
    reservation. What a model would not take at all (more tokens than it has) is refused by Anthropic, and costs
    nothing: nobody's budget is held for it."""

    __slots__ = ("_at_ns", "_catalog", "_input_tokens", "_models", "_speed", "_web_searches", "_writes")

    def __init__(
        self,
        catalog: Catalog,
        models: tuple[str, ...],
        at_ns: int,
        *,
        input_tokens: int,
        web_searches: int,
        writes: CacheWrites,
        speed: str,
    ) -> None:
        self._catalog = catalog
        self._models = [(one, *self._limits(one)) for one in models]
        self._at_ns = at_ns
        self._input_tokens = input_tokens
        self._web_searches = web_searches
        self._writes: CacheWrites = writes
        self._speed = speed

    def nanousd(self, max_tokens: int) -> int:
        """With so many tokens of output."""
        most = 0
        for number, (model, output_tokens_max, context_tokens) in enumerate(self._models):
            nanousd = upper_bound(
                min(self._input_tokens, context_tokens),
                min(max_tokens, output_tokens_max),
                model,
                self._at_ns,
                self._catalog,
                # A fallback that is not sold at this speed is asked without it.
                speed=self._speed if number == 0 or self._sold_fast(model) else "standard",
                web_searches_max=self._web_searches,
                cache_writes=self._writes,
            )
            most = max(most, nanousd)
        return most

    def output_tokens(self, max_tokens: int, body: bytes) -> int:
        """What the request may put out. A `max_tokens` that is no plain number is taken for the most there is:
        Anthropic may read `32000.0` as it was meant."""
        most = max(output_tokens_max for _, output_tokens_max, _ in self._models)
        if max_tokens == 0 and not _asks_for_nothing(body):
            return most
        return min(max_tokens, most)

    def _limits(self, model: str) -> tuple[int, int]:
        known = self._catalog.resolve(model)
        return (
            (known.max_output_tokens, known.context_tokens)
            if known is not None
            else (_OUTPUT_TOKENS_MAX, _CONTEXT_TOKENS_MAX)
        )

    def _sold_fast(self, model: str) -> bool:
        return not self._catalog.price_row(model, self._at_ns, "fast", 0).assumed


def _asks_for_nothing(body: bytes) -> bool:
    try:
        return scan(body).raw("max_tokens") == b"0"
    except InvalidBody:
        return False


def _answer_floor(body: bytes) -> int:
    """The least `max_tokens` that is of use: Anthropic refuses one that its budget for thinking does not fit into."""
    try:
        thinking = msgspec.json.decode(scan(body).raw("thinking") or b"{}", type=_Thinking)
    except (InvalidBody, msgspec.DecodeError):
        return _ANSWER_FLOOR
    return _ANSWER_FLOOR + max(thinking.budget_tokens, 0)


def _with_max_tokens(body: bytes, max_tokens: int) -> bytes:
    try:
        span = scan(body).fields["max_tokens"]
    except (InvalidBody, KeyError):  # a body without it is refused by Anthropic, in its own words
        return body
    return splice(body, [Splice(span.start, span.end, msgspec.json.encode(max_tokens))])
