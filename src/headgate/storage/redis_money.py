"""The budgets of several processes, kept in Redis: one script, one round trip, the server's clock for leases.

What it is: `interfaces.Money` over `money.lua`, which repeats `policy/budgets.py`. Operations that come while a call is
under way go together in the next one. What it is not: the truth. That is the ledger, and who finds that Redis has
lost its count begins it anew from there; the first one does, for all.

While Redis is away, or begun anew, each process decides at once by a share of its own: of every window it may spend
what was left as last known × 0.8 / replicas. What was known is refreshed once a second for the accounts in use, so
that all of them together pass a cap by no more than what the others took in the second before Redis went, and what
they took of accounts that this process had not asked for. Where nothing is known, not even from the ledger: 2 % of
the cap, and fifty cents at most (failure-model §2.5). Nothing is let through because something failed.

Processes that share a Redis and not a ledger share the count for as long as Redis keeps it, and no reading corrects
it: what one ledger lacks may stand in another. When Redis loses it, it begins with what the first one's ledger has.

Nothing reserved is lost: reservations in Redis end by their lease into their whole bound, until they are settled; what
was decided here meanwhile is told to Redis when it is back; and a reading of the ledger sets right what was not.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import structlog

from headgate.policy.budgets import (
    WINDOWS,
    Account,
    AccountUse,
    Budgets,
    Corrections,
    Cut,
    Held,
    MoneyAsk,
    MoneyVerdict,
    Spent,
    State,
    caps,
    check_amount,
    check_ask,
    corrections,
    periods,
    verdict,
    window_id,
)
from headgate.storage.money import ReadSpent, tell_unread
from headgate.storage.redis_limits import (
    ANSWER_S,
    AWAY_S,
    BATCH_MAX,
    CALL_S_MIN,
    CONNECT_S,
    GATHER_S,
    HEARTBEAT_S,
    LINES_A_MINUTE,
    PING_S,
    PINGS,
    SECOND_LOOK_S,
    SHARE,
    START_S,
    TAG,
    TIMEOUT_S,
    RedisMissing,
)

try:
    import redis
    from redis import exceptions as redis_exceptions
    from redis.asyncio import ConnectionPool
    from redis.asyncio.connection import AbstractConnection
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ImportError:  # an extra; who configures Redis without it is told at start
    redis = None  # type: ignore[assignment]

SCRIPT = (Path(__file__).parent / "money.lua").read_text()

KNOWN_S = 60.0
"""For how long an account that nobody asks for is still looked at."""
KNOWN_MAX = 20_000
"""Windows of which the last known use is remembered; of others the last reading of the ledger tells."""
LOOKS_MAX = 200
"""Windows in one look, of those asked for last."""
LATE_MAX = 2_000
"""Ends of attempts that are kept for Redis' return. Others are found in the ledger."""
UNKNOWN_SHARE = 0.02
UNKNOWN_NANOUSD_MAX = 500_000_000
SEED_AGAIN_S = 5.0
"""Between two tries to begin anew, while the ledger cannot be read."""
CORRECT_S = 5.0
"""How long a count that is begun or corrected may take: some 100,000 sums in one call of the script."""

_RESERVE, _SETTLE, _RENEW, _SPEND, _OWE, _LOOK, _CUT, _CORRECT = range(1, 9)
_STATES: tuple[State, ...] = ("live", "settled", "expired")

Sent = tuple[object, ...]
"""An operation as the script takes it."""
_Window = tuple[str, str, Literal["day", "month"], int]

_log = structlog.get_logger(__name__)
_encode = msgspec.msgpack.Encoder().encode


class _Reply(msgspec.Struct, array_like=True):
    """What the script answers."""

    generation: str
    expired: int
    answers: list[msgspec.Raw]


_read_reply = msgspec.msgpack.Decoder(_Reply).decode
_read_numbers = msgspec.msgpack.Decoder(list[int]).decode
_read_number = msgspec.msgpack.Decoder(int).decode
_read_cut = msgspec.msgpack.Decoder(tuple[list[list[str]], list[tuple[str, int, int, list[str]]]]).decode


class _Operation:
    """One operation on its way: what is sent, and who waits for what of it."""

    __slots__ = ("answered", "ask", "at", "over", "sent", "windows")

    def __init__(
        self,
        sent: Sent,
        at: float,
        *,
        ask: MoneyAsk | None = None,
        windows: Sequence[_Window] = (),
        answered: Callable[[MoneyVerdict], None] | None = None,
        over: Callable[[], None] | None = None,
    ) -> None:
        self.sent = sent
        self.at = at
        self.ask = ask
        self.windows = windows
        self.answered = answered
        self.over = over


class _Lost(Exception):
    """Redis answers, and has lost what was counted."""


class RedisMoney:
    """See `interfaces.Money`. Make it in the loop's thread, `start` it before the first ask, `close` it at the end."""

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float],
        now_ns: Callable[[], int],
        read: ReadSpent,
        replicas: Callable[[], int],
        tag: str = TAG,
        ledger: str = "",
    ) -> None:
        """`clock` gives monotonic seconds, `now_ns` UTC nanoseconds; `replicas` counts the living processes, this one
        with them, as last known (`RedisLimits.replicas`).
        `ledger` names what `read` reads: only who reads the same may correct a count.

        Raises RedisMissing when the package is not installed or the URL cannot be meant.
        """
        if redis is None:
            raise RedisMissing(
                "HEADGATE_REDIS_URL is set, but the package `redis` is not installed.\n"
                "Install it with `pip install 'headgate[redis]'`, or unset HEADGATE_REDIS_URL to run one process."
            )
        try:
            self._pool = ConnectionPool.from_url(
                url, protocol=2, retry=Retry(NoBackoff(), 0), socket_connect_timeout=CONNECT_S, socket_timeout=None
            )
        except (ValueError, TypeError) as problem:
            raise RedisMissing(
                f"HEADGATE_REDIS_URL cannot be read: {problem}\nIt looks like redis://:password@host:6379/0, "
                "rediss://… for TLS, or unix:///path/to/socket."
            ) from problem
        self._clock = clock
        self._now_ns = now_ns
        self._read = read
        self._replicas = replicas
        self._tag = tag
        self._ledger = ledger
        self._mixed = ""
        """The generation that nobody can correct, since its processes have several ledgers."""
        self._sha = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
        self._shared = False
        self._generation = ""
        self._pending: list[_Operation] = []
        self._flight: list[_Operation] = []
        self._late: deque[_Operation] = deque(maxlen=LATE_MAX)
        self._mine: dict[str, tuple[MoneyAsk, int]] = {}
        """Attempts of this process that are under way, with what is reserved for them."""
        self._known = _Known()
        self._share = _Share(self._known)
        self._uncertain = False
        """What was told may be counted twice, or was not told."""
        self._expired = 0
        self._wake: asyncio.Future[None] | None = None
        self._urgent = False
        self._gather: asyncio.TimerHandle | None = None
        self._beat_at = -math.inf
        self._expire_at = -math.inf
        self._seed_at = -math.inf
        self._task: asyncio.Task[None] | None = None
        self._calling: asyncio.Task[_Reply] | None = None
        self._seeding: asyncio.Task[bool] | None = None
        self._closing = False
        self._reached = asyncio.Event()
        self._lines: deque[float] = deque(maxlen=LINES_A_MINUTE)

    @property
    def shared(self) -> bool:
        """See `Money.shared`."""
        return self._shared

    @property
    def uncertain(self) -> bool:
        """See `Money.uncertain`."""
        return (self._uncertain or self._expired > 0) and not (self._mixed and self._mixed == self._generation)

    async def start(self) -> None:
        """Returns when Redis answers and has a count, or after a second without; then this process has its share."""
        try:
            self._known.read(await self._read([], self._now_ns()))
        except Exception as error:
            tell_unread(error)
        self._task = asyncio.get_running_loop().create_task(self._run())
        try:
            async with asyncio.timeout(START_S):
                await self._reached.wait()
        except TimeoutError:
            self._tell("redis_budgets_away", reason="not reached at start")

    async def close(self) -> None:
        """Stop. Who still waits is answered."""
        self._closing = True
        self._go_local()
        if self._gather is not None:
            self._gather.cancel()
        for task in (self._task, self._seeding):
            if task is not None:
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    pass

    # The operations

    def reserve(self, ask: MoneyAsk, answered: Callable[[MoneyVerdict], None]) -> None:
        """See `Money.reserve`."""
        check_ask(ask)
        windows = caps(ask)
        if not windows:
            answered(MoneyVerdict(True))
            return
        now = self._clock()
        if not self._shared:
            answered(self._decide_here(ask, now))
            return
        self._known.asked(windows, now)
        self._pending.append(_Operation(reserving(ask), now, ask=ask, windows=windows, answered=answered))
        self._kick()

    def spend(self, ask_id: str, nanousd: int, over: Callable[[], None]) -> None:
        """See `Money.spend`."""
        check_amount(nanousd)
        mine = self._mine.get(ask_id)
        if mine is None or nanousd <= mine[1]:
            return
        if self._shared:
            self._pending.append(_Operation((_SPEND, ask_id, nanousd), self._clock(), ask=mine[0], over=over))
            self._kick()
        elif self._share.spend(ask_id, nanousd):
            self._mine[ask_id] = mine[0], nanousd
        else:
            over()

    def settle(self, ask_id: str, nanousd: int) -> None:
        """See `Money.settle`."""
        check_amount(nanousd)
        mine = self._mine.pop(ask_id, None)
        if mine is None:
            return
        if self._shared:
            self._add(_Operation((_SETTLE, ask_id, nanousd), self._clock(), ask=mine[0]))
        else:
            self._end_here(mine[0], nanousd)

    def renew(self, ask_id: str, *, lease_s: float) -> None:
        """See `Money.renew`."""
        if self._shared and ask_id in self._mine:
            self._add(_Operation((_RENEW, ask_id, lease_s), self._clock()))
        # Alone, an attempt of this process's own is under way for as long as it is among `_mine`.

    async def seed(self) -> bool:
        """See `Money.seed`."""
        if self._task is None or self._closing or (self._mixed and self._mixed == self._generation):
            return False
        if self._seeding is None or self._seeding.done():
            self._seeding = asyncio.get_running_loop().create_task(self._seed())
        return await asyncio.shield(self._seeding)

    def snapshot(self, account_ids: Collection[str]) -> tuple[AccountUse, ...]:
        """See `Money.snapshot`."""
        at, now = periods(self._now_ns()), self._clock()
        found = []
        for account in account_ids:
            for period, window in zip((at.day, at.month), WINDOWS, strict=True):
                self._known.asked([(period, account, window, 0)], now)
                settled, reserved = self._known.of(window_id(period, account)) or (0, 0)
                if not self._shared:
                    more_settled, more_reserved = self._share.used(account, window, self._now_ns())
                    settled, reserved = settled + more_settled, reserved + more_reserved
                found.append(AccountUse(account, window, settled, reserved))
        return tuple(found)

    def tick(self, now: float) -> None:
        """See `Money.tick`."""
        if self._shared and now >= self._beat_at:
            self._kick()

    # Alone

    def _decide_here(self, ask: MoneyAsk, now: float) -> MoneyVerdict:
        found = self._share.reserve(ask, SHARE / max(self._replicas(), 1), now)
        if found.admitted:
            self._mine[ask.id] = ask, ask.upper_nanousd
        return found

    def _end_here(self, ask: MoneyAsk, nanousd: int) -> None:
        self._share.settle(ask.id, nanousd, self._clock())
        if len(self._late) == LATE_MAX:
            self._uncertain = True
        self._late.append(_Operation(owing(ask, nanousd, live=False), self._clock()))

    # On the way to Redis

    def _add(self, operation: _Operation) -> None:
        """For operations without an answer: they go with the next ask, or after a moment."""
        self._pending.append(operation)
        if self._gather is None:
            self._gather = asyncio.get_running_loop().call_later(GATHER_S, self._kick)

    def _kick(self) -> None:
        self._stop_gathering()
        self._urgent = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _stop_gathering(self) -> None:
        if self._gather is not None:
            self._gather.cancel()
            self._gather = None

    async def _run(self) -> None:
        while True:
            connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await self._search(connection)
                await self._serve(connection)
            except Exception as error:
                # Whatever it was, it was while Redis was asked: an answer is owed to all who wait for one.
                self._lose(f"{type(error).__name__}: {error}"[:200])
            finally:
                await _drop(connection)
            await asyncio.sleep(AWAY_S)

    async def _search(self, connection: AbstractConnection) -> None:
        """Returns when Redis can be trusted, and has a count."""
        async with asyncio.timeout(CONNECT_S):
            await connection.connect()  # type: ignore[no-untyped-call]
        good = 0
        while good < (PINGS if self._reached.is_set() else 1):
            started_at = self._clock()
            async with asyncio.timeout(CONNECT_S):
                # A write, so that a replica that refuses to write is no use.
                reply = await self._call(connection, [(_RENEW, "", 0.0)])
            good = good + 1 if self._clock() - started_at <= TIMEOUT_S else 0
            if reply.generation == "":
                await self._begin_anew(connection)
                good = 0
            elif self._reached.is_set():
                await asyncio.sleep(PING_S)
            self._generation = reply.generation

    async def _begin_anew(self, connection: AbstractConnection) -> None:
        """Nothing is counted there: count what the ledger says. Raises when the ledger cannot be read."""
        wait_s = self._seed_at - self._clock()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        self._seed_at = self._clock() + SEED_AGAIN_S
        at_ns = self._now_ns()
        spent = await self._read([], at_ns)
        self._seed_at = -math.inf
        self._known.read(spent)
        found = corrections(Cut(at_ns, {}), spent)
        async with asyncio.timeout(CORRECT_S):
            reply = await self._call(connection, [correcting(found, secrets.token_hex(8), at_ns, self._ledger)])
        first = _read_number(reply.answers[0]) == 1
        self._tell("redis_budgets_counted_anew", first=first, windows=len(found.deltas), open_attempts=len(found.adopt))
        # What was spent here meanwhile may be in that reading, and is told again: the next reading takes it back.
        self._uncertain = True

    async def _seed(self) -> bool:
        """A cut, a reading, a correction."""
        if not self._shared:
            return False
        at_ns = self._now_ns()
        at = periods(at_ns)
        # A connection of its own: nobody who asks for a reservation waits behind this.
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(CORRECT_S):
                await connection.connect()  # type: ignore[no-untyped-call]
                reply = await self._call(connection, [(_CUT, (at.day, at.month))])
            if reply.generation == "":
                return False
            cut = cut_of(reply.answers[0], at_ns, reply.generation)
            spent = await self._read([one.id for one in cut.held], at_ns)
            self._known.read(spent)
            async with asyncio.timeout(CORRECT_S):
                reply = await self._call(connection, [correcting(corrections(cut, spent), "", at_ns, self._ledger)])
        except Exception as error:
            tell_unread(error)
            return False
        finally:
            await _drop(connection)
        answer = _read_number(reply.answers[0])
        if answer == 2:
            self._mixed = cut.generation
            _log.error(
                "budgets_of_several_ledgers",
                mend="gateways that share a Redis and not a data directory keep their budgets for as long as Redis "
                "does; let them share a database, or give each a Redis of its own",
            )
        if answer != 1:
            return False
        self._uncertain = False
        self._expired = reply.expired
        return True

    async def _serve(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        self._come_back()
        while True:
            if not self._urgent:
                self._wake = loop.create_future()
                await self._wake
                self._wake = None
            self._flight, self._pending = self._pending[:BATCH_MAX], self._pending[BATCH_MAX:]
            self._urgent = bool(self._pending)
            self._stop_gathering()
            now = self._clock()
            if now >= self._beat_at:
                self._beat_at = now + HEARTBEAT_S
                self._flight += self._looks(now)
            waiting_s = now - min((one.at for one in self._flight if one.answered is not None), default=now)
            limit_s = max(min(TIMEOUT_S, ANSWER_S - waiting_s), CALL_S_MIN)
            reply = await self._within(limit_s, self._call(connection, [one.sent for one in self._flight]))
            if reply.generation != self._generation:
                raise _Lost("Redis has lost what was counted")
            self._deliver(reply)

    async def _call(self, connection: AbstractConnection, operations: Sequence[Sent]) -> _Reply:
        arguments = (1, self._tag, _encode(operations))
        try:
            await connection.send_command("EVALSHA", self._sha, *arguments, check_health=False)
            answer = await connection.read_response()
        except redis_exceptions.NoScriptError:
            # A new server, or a proxy that knows no scripts by name.
            await connection.send_command("EVAL", SCRIPT, *arguments, check_health=False)
            answer = await connection.read_response()
        return _read_reply(answer)

    async def _within(self, limit_s: float, call: Coroutine[None, None, _Reply]) -> _Reply:
        """The call's reply. Raises TimeoutError. When the loop itself was late, an answer may lie in the socket: it
        is read before it counts as missing."""
        self._calling = asyncio.get_running_loop().create_task(call)
        try:
            for wait_s in (limit_s, SECOND_LOOK_S):
                await asyncio.wait({self._calling}, timeout=wait_s)
                if self._calling.done():
                    return self._calling.result()
            raise TimeoutError(f"no answer in {limit_s * 1000:.0f} ms")
        finally:
            self._calling.cancel()

    def _looks(self, now: float) -> list[_Operation]:
        windows = self._known.looked_at(now)
        return [_Operation((_LOOK, [(one[0], one[1]) for one in windows]), now, windows=windows)] if windows else []

    def _deliver(self, reply: _Reply) -> None:
        verdicts: list[tuple[Callable[[MoneyVerdict], None], MoneyVerdict]] = []
        cut: list[Callable[[], None]] = []
        for one, answer in zip(self._flight, reply.answers, strict=True):
            if one.ask is not None and one.answered is not None:
                found, uses = verdict_of(answer, one.ask, one.windows)
                self._known.note(one.windows, uses)
                if found.admitted:
                    self._mine[one.ask.id] = one.ask, one.ask.upper_nanousd
                verdicts.append((one.answered, found))
            elif one.over is not None and one.ask is not None:
                if _read_number(answer) == 0:
                    cut.append(one.over)
                elif one.ask.id in self._mine and isinstance(one.sent[2], int):
                    self._mine[one.ask.id] = one.ask, max(self._mine[one.ask.id][1], one.sent[2])
            elif one.sent[0] == _LOOK:
                numbers = _read_numbers(answer)
                self._known.note(one.windows, list(zip(numbers[::2], numbers[1::2], strict=True)))
        self._expired = reply.expired
        # From here on nothing fails: whoever is not answered below was answered by a failure.
        self._flight = []
        loop = asyncio.get_running_loop()
        for answered, found in verdicts:
            # Through the loop, so that one that raises takes none of the others with it.
            loop.call_soon(answered, found)
        for over in cut:
            loop.call_soon(over)

    # Away and back

    def _lose(self, reason: str) -> None:
        if self._shared:
            self._go_local()
            self._tell("redis_budgets_lost", reason=reason, share=SHARE / max(self._replicas(), 1))

    def _go_local(self) -> None:
        """Answer all who wait, from here."""
        now, loop = self._clock(), asyncio.get_running_loop()
        was_shared, self._shared = self._shared, False
        under_way, self._flight = self._flight, []
        queued, self._pending = self._pending, []
        if was_shared:
            self._share.begin()
        for number, one in enumerate([*under_way, *queued]):
            sent = number < len(under_way)
            if one.ask is not None and one.answered is not None:
                found = self._decide_here(one.ask, now)
                if sent and not found.admitted:
                    # It may hold a reservation there.
                    self._late.append(_Operation((_SETTLE, one.ask.id, 0), now))
                loop.call_soon(one.answered, found)
            elif one.over is not None:
                loop.call_soon(one.over)  # its bound was wrong, and nobody can be asked
            elif one.sent[0] == _SETTLE and one.ask is not None and isinstance(one.sent[2], int):
                self._late.append(_Operation(owing(one.ask, one.sent[2], live=False), one.at))
            elif one.sent[0] in (_SETTLE, _OWE):
                self._late.append(one)

    def _come_back(self) -> None:
        now = self._clock()
        owed = [_Operation(owing(ask, nanousd, live=True), now) for ask, nanousd in self._mine.values()]
        self._pending = [*owed, *self._late, *self._pending]
        self._late.clear()
        self._urgent = True
        self._shared = True
        self._beat_at = -math.inf
        self._reached.set()
        self._tell("redis_budgets_shared")

    def _tell(self, event: str, **fields: str | float) -> None:
        """One line for a transition, ten a minute."""
        now = self._clock()
        if len(self._lines) == LINES_A_MINUTE and now - self._lines[0] < 60.0:
            return
        self._lines.append(now)
        (_log.info if self._shared else _log.warning)(event, **fields)


class _Known:
    """What was last heard of the windows of accounts: settled and reserved."""

    def __init__(self) -> None:
        self._uses: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._sums: dict[str, int] = {}
        self._asked: OrderedDict[_Window, float] = OrderedDict()
        self._has_read = False

    def read(self, spent: Spent) -> None:
        """The ledger was read: what open attempts may cost counts as spent."""
        sums = dict(spent.sums)
        for one in spent.opened:
            for window in one.windows:
                sums[window] = sums.get(window, 0) + one.nanousd
        self._sums, self._has_read = sums, True

    def note(self, windows: Sequence[_Window], uses: Sequence[tuple[int, int]]) -> None:
        """Redis says how these stand."""
        for (period, account, _, _), use in zip(windows, uses, strict=True):
            name = window_id(period, account)
            self._uses[name] = use
            self._uses.move_to_end(name)
        while len(self._uses) > KNOWN_MAX:
            self._uses.popitem(last=False)

    def asked(self, windows: Sequence[_Window], now: float) -> None:
        """Somebody wants to know about these."""
        for period, account, window, _ in windows:
            one: _Window = (period, account, window, 0)
            self._asked[one] = now
            self._asked.move_to_end(one)
        while len(self._asked) > LOOKS_MAX:
            self._asked.popitem(last=False)

    def looked_at(self, now: float) -> list[_Window]:
        """Those that somebody wanted to know about lately."""
        while self._asked and next(iter(self._asked.values())) < now - KNOWN_S:
            self._asked.popitem(last=False)
        return list(self._asked)

    def of(self, window: str) -> tuple[int, int] | None:
        """What was settled and reserved, None where nobody knows."""
        known = self._uses.get(window)
        if known is None and self._has_read:
            return self._sums.get(window, 0), 0
        return known


class _Share:
    """The budgets of a process that is alone for now: of every window a part of what was left."""

    def __init__(self, known: _Known) -> None:
        self._known = known
        self._budgets = Budgets()
        self._parts: dict[str, int] = {}

    def begin(self) -> None:
        """From now on this process is alone; what was decided in the last time alone has been told."""
        self._budgets = Budgets()
        self._parts.clear()

    def reserve(self, ask: MoneyAsk, factor: float, now: float) -> MoneyVerdict:
        """By the parts; told are the caps as they are."""
        part = msgspec.structs.replace(
            ask, accounts=tuple(self._of(account, ask, factor) for account in ask.accounts), lease_s=math.inf
        )
        found = self._budgets.reserve(part, now)
        whole = next((cap for _, name, window, cap in caps(ask) if (name, window) == (found.account, found.window)), 0)
        return msgspec.structs.replace(found, cap_nanousd=whole)

    def spend(self, ask_id: str, nanousd: int) -> bool:
        """False for what Redis holds, too: nobody can be asked whether there is room."""
        return ask_id in self._budgets and self._budgets.spend(ask_id, nanousd)

    def settle(self, ask_id: str, nanousd: int, now: float) -> None:
        """See `Budgets.settle`."""
        self._budgets.settle(ask_id, nanousd, now)

    def used(self, account: str, window: str, at_ns: int) -> tuple[int, int]:
        """Settled and reserved here."""
        for one in self._budgets.uses([account], at_ns):
            if one.window == window:
                return one.spent_nanousd, one.reserved_nanousd
        return 0, 0

    def _of(self, account: Account, ask: MoneyAsk, factor: float) -> Account:
        at = periods(ask.at_ns)
        return Account(
            account.id,
            self._part(window_id(at.day, account.id), account.day_nanousd, factor),
            self._part(window_id(at.month, account.id), account.month_nanousd, factor),
        )

    def _part(self, window: str, cap: int | None, factor: float) -> int | None:
        if cap is None:
            return None
        part = self._parts.get(window)
        if part is None:
            known = self._known.of(window)
            if known is None:
                part = min(int(cap * UNKNOWN_SHARE), UNKNOWN_NANOUSD_MAX)
            else:
                part = int(max(cap - sum(known), 0) * factor)
            self._parts[window] = part
        return part


def reserving(ask: MoneyAsk) -> Sent:
    """An ask as the script takes it."""
    return _RESERVE, ask.id, _windows(ask), ask.upper_nanousd, ask.lease_s


def owing(ask: MoneyAsk, nanousd: int, *, live: bool) -> Sent:
    """What was decided elsewhere, as the script takes it."""
    return _OWE, ask.id, _windows(ask), nanousd, live, ask.lease_s


def correcting(found: Corrections, generation: str, at_ns: int, ledger: str = "") -> Sent:
    """Corrections as the script takes them; `generation` is the name of the count that may have to be begun, `ledger`
    of what was read."""
    at = periods(at_ns)
    deltas: list[str | int] = []
    for window, delta in found.deltas.items():
        period, _, account = window.partition(":")
        deltas += (period, account, delta)
    adopt = []
    for one in found.adopt:
        split = [window.partition(":") for window in one.windows]
        adopt.append((one.id, one.nanousd, [(period, account, -1) for period, _, account in split]))
    return _CORRECT, found.generation, generation, (at.day, at.month), deltas, found.forget, adopt, ledger


def verdict_of(
    answer: msgspec.Raw, ask: MoneyAsk, windows: Sequence[_Window]
) -> tuple[MoneyVerdict, list[tuple[int, int]]]:
    """What the script answered to an ask, and what is settled and reserved of each of its windows."""
    admitted, nearest, *numbers = _read_numbers(answer)
    uses = list(zip(numbers[::2], numbers[1::2], strict=True))
    _, account, window, cap = windows[nearest - 1]
    settled, reserved = uses[nearest - 1]
    return (
        verdict(
            ask.at_ns, account, window, cap, admitted=admitted == 1, spent_nanousd=settled, reserved_nanousd=reserved
        ),
        uses,
    )


def cut_of(answer: msgspec.Raw, at_ns: int, generation: str) -> Cut:
    """What the script says is counted."""
    at = periods(at_ns)
    sums, held = _read_cut(answer)
    settled = {
        window_id(period, field[2:]): int(value)
        for period, fields in zip((at.day, at.month), sums, strict=True)
        for field, value in zip(fields[::2], fields[1::2], strict=True)
        if field.startswith("s:")
    }
    attempts = tuple(Held(one, _STATES[state - 1], nanousd, tuple(windows)) for one, state, nanousd, windows in held)
    return Cut(at_ns, settled, attempts, generation)


def _windows(ask: MoneyAsk) -> list[tuple[str, str, int]]:
    return [(period, account, cap) for period, account, _, cap in caps(ask)]


async def _drop(connection: AbstractConnection) -> None:
    """Close without a goodbye: an answer that comes too late must never be taken for another's."""
    try:
        await connection.disconnect(nowait=True)
    except Exception as error:
        _log.debug("redis_budgets_close_failed", error=repr(error))
