"""One gateway in a world of its own: the real pipeline and all of traffic control on a loop whose clock jumps.

What it is: Anthropic and the clients as scripts, which keep books of their own, and the laws that the gateway is held
against while it works. What it is not: a load. `virtual_day.py` lives a day in it, `test_virtual_storms.py` storms.
Nothing here reads a real clock or rolls real dice, so one seed is one history, in any process.
"""

import asyncio
import json
import random
import selectors
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256

import msgspec
import structlog

from headgate.gateway.guards import AlertSink, SpendGuard
from headgate.gateway.pipeline import Pipeline
from headgate.gateway.policies import Policies, policies
from headgate.gateway.prompt_caching import PromptCaching
from headgate.gateway.purse import Purses
from headgate.gateway.settings import Settings
from headgate.gateway.settlement import Attribution
from headgate.gateway.tasks import Tasks
from headgate.gateway.traffic import Traffic
from headgate.gateway.upstream import Answer
from headgate.policy.budgets import Budgets, Spent
from headgate.policy.limiter import Limiter
from headgate.policy.records import (
    AttemptEnded,
    AttemptIntent,
    CallClosed,
    CallOpened,
    ClientRequest,
    Failure,
    LedgerEvent,
    Principal,
)
from headgate.policy.spend_velocity import VelocityPolicy
from headgate.storage.fold import Fold
from headgate.storage.limits import LocalLimits
from headgate.storage.money import LocalMoney
from headgate.telemetry.log_line import LogLine, encode
from headgate.wire import sse
from headgate.wire.catalog import packaged

TICK_S = 2.0
BEGAN_NS = 1_795_478_400_000_000_000
WRITER = f"{BEGAN_NS}-1"
USD_PER_MTOK = {
    "claude-sonnet-4-6": {"input": 3.0, "cache_read": 0.3, "write": 3.75, "output": 15.0},
    "claude-haiku-4-5": {"input": 1.0, "cache_read": 0.1, "write": 1.25, "output": 5.0},
    "claude-opus-4-7": {"input": 5.0, "cache_read": 0.5, "write": 6.25, "output": 25.0},
}
"""The bill is added up from these, written down here once more, and not from the catalogue."""
BYTES_PER_TOKEN = {"claude-sonnet-4-6": 3.1, "claude-haiku-4-5": 3.6, "claude-opus-4-7": 2.6}
ATTEMPTS_MAX = 3
RETRY_AFTER_S_MAX = 60
SPEND_CAP_PROBE_S = 900.0
_CALL_HEADER = b"x-call: "
_SLACK = 1e-6
_ERROR_STATUS = {"429": 429, "ramp": 429, "spend_cap": 429, "529": 529, "bad_request": 400}
_ERROR_CODE = {"spend_cap": "enforced_spend_limit_reached", "ramp": "ramp_limit_exceeded"}


class JumpingSelector(selectors.BaseSelector):
    """Never waits: time jumps to when the next timer is due. There are no sockets in this world."""

    def __init__(self) -> None:
        self.now = 0.0
        self._keys: dict[object, selectors.SelectorKey] = {}

    def register(self, fileobj, events, data=None):
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj):
        return self._keys.pop(fileobj)

    def get_map(self):
        return self._keys

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("everybody waits and nothing is due: a wake-up was lost")
        if timeout > 0:
            self.now += timeout
        return []


class JumpingLoop(asyncio.SelectorEventLoop):
    """asyncio on that selector."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class Laws:
    """What was broken, counted by name, with a first example."""

    def __init__(self) -> None:
        self.broken: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def hold(self, true: bool, law: str, example: object) -> None:
        if not true:
            self.broken[law] += 1
            self.examples.setdefault(law, repr(example)[:500])


class Witness:
    """A bucket of the law's own: no window of T seconds holds more than `burst + rate * T`."""

    def __init__(self, rate_s: float, burst: float) -> None:
        self.rate_s = rate_s
        self.burst = burst
        self.level = burst
        self.at = 0.0

    def takes(self, now: float) -> bool:
        """Take one; False when there was none."""
        self.level = min(self.level + (now - self.at) * self.rate_s, self.burst) - 1.0
        self.at = now
        return self.level >= -_SLACK


class Tables:
    """The ledger: events checked as they come, folded in batches, rows kept as a database would."""

    def __init__(self, laws: Laws) -> None:
        self.laws = laws
        self.fold = Fold(lambda call_id: None)
        self.calls: dict[str, tuple] = {}
        self.attempts: dict[tuple[str, int], tuple] = {}
        self.opened: set[str] = set()
        self.closed: Counter[str] = Counter()
        self.intents: Counter[tuple[str, int]] = Counter()
        self.ended: Counter[tuple[str, int]] = Counter()
        self._waiting: list[LedgerEvent] = []

    def write(self, *events: LedgerEvent) -> None:
        for event in events:
            self._check(event)
        self._waiting += events
        if len(self._waiting) > 200:
            self.flush()

    async def durable(self) -> None:
        """Nothing is more durable than this."""

    def flush(self) -> None:
        self.fold.apply(self._waiting, WRITER)
        self._waiting.clear()
        call_rows, attempt_rows = self.fold.changed()
        self.calls.update((row[0], row) for row in call_rows)
        self.attempts.update((row[:2], row) for row in attempt_rows)
        self.fold.committed()

    def _check(self, event: LedgerEvent) -> None:
        laws, call_id = self.laws, event.call_id
        laws.hold(not self.closed[call_id], "nothing is written after a call is closed", event)
        match event:
            case CallOpened():
                laws.hold(call_id not in self.opened, "a call is opened once", event)
                self.opened.add(call_id)
            case AttemptIntent(number=number):
                laws.hold(call_id in self.opened, "a call is opened before it is sent", event)
                laws.hold(not self.intents[call_id, number], "an attempt has one intent", event)
                before = all(self.ended[call_id, earlier] for earlier in range(1, number))
                laws.hold(before, "an attempt ends before the next begins", event)
                self.intents[call_id, number] += 1
            case AttemptEnded(number=number):
                laws.hold(self.intents[call_id, number] == 1, "what ends has begun", event)
                laws.hold(not self.ended[call_id, number], "an attempt ends once", event)
                self.ended[call_id, number] += 1
            case CallClosed():
                self.closed[call_id] += 1


class Books:
    """What upstream knows of one attempt."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.input = self.cache_read = self.write = 0
        self.produced = 0
        """Output tokens made so far: what Anthropic would bill if it ended now."""
        self.final = False
        """Whether the answer ended whole, so that the gateway knows its exact bill."""
        self.began = False
        self.free = False
        self.arrived_at = 0.0
        self.is_probe = False
        """Whether its model's breaker was not closed when it came."""
        self.ended_at: float | None = None

    @property
    def nanousd(self) -> int:
        return bill(self.model, self.input, self.cache_read, self.write, self.produced) if not self.free else 0


def bill(model: str, input_tokens: int, cache_read: int, write: int, output: int) -> int:
    usd = USD_PER_MTOK[model]
    parts = (input_tokens * usd["input"], cache_read * usd["cache_read"], write * usd["write"], output * usd["output"])
    return round(sum(parts) * 1000)


class ScriptedConnection:
    """One attempt's connection: a script of things that happen after one another, until somebody closes it."""

    def __init__(self, world: "World", books: Books) -> None:
        self.world = world
        self.books = books
        self.closed = False
        self.person = ""
        self.requests_left = 0
        self.answer: Answer | None = None
        self.waiting: asyncio.Future = world.loop.create_future()
        self._script: list[tuple[float, Callable[[], None]]] = []
        self._timer: asyncio.TimerHandle | None = None

    def play(self, script: list[tuple[float, Callable[[], None]]]) -> None:
        self._script = list(reversed(script))
        self._next()

    def abort(self) -> None:
        if not self.closed:
            self._close()
            self.world.loop.call_soon(self._lost)

    def settle(self) -> None:
        self.done()

    def pause(self, paused: bool) -> None:
        """Clients here read as fast as they can."""

    def done(self) -> None:
        if not self.closed:
            self._close()

    def _close(self) -> None:
        self.closed = True
        self.books.ended_at = self.world.clock()
        if self._timer is not None:
            self._timer.cancel()
        self.world.open.discard(self)
        self.world.flying[self.person] -= 1

    def respond(self, answer: Answer) -> None:
        if not self.waiting.done():
            self.waiting.set_result(answer)

    def fail(self, failure: Failure) -> None:
        self.done()
        if not self.waiting.done():
            self.waiting.set_result(failure)
        elif self.answer is not None:
            self.answer.fail(failure)

    def _lost(self) -> None:
        if not self.waiting.done():
            self.waiting.set_result(Failure(kind="reset", message="closed"))
        elif self.answer is not None and not self.answer._ended:
            self.answer.fail(Failure(kind="truncated", status=200, message="closed"))

    def _next(self) -> None:
        if self._script and not self.closed:
            delay_s, _ = self._script[-1]
            self._timer = self.world.loop.call_later(delay_s, self._act)

    def _act(self) -> None:
        _, action = self._script.pop()
        action()
        self._next()


class Asker(msgspec.Struct, frozen=True):
    """Who asks, with which key."""

    user: str
    tier: str = "free"
    key_id: str = "key00001"
    concurrency: int | None = None


class Exchange:
    """A client and its request: keeps what it is told, and holds it against the grammar when it ends."""

    method = b"POST"

    def __init__(
        self, world: "World", call_id: str, asker: Asker, model: str, deadline_s: float, streamed: bool
    ) -> None:
        self.world = world
        self.call_id = call_id
        self.asker = asker
        self.model = model
        self.streamed = streamed
        self.arrived_at = world.clock()
        self.deadline = self.arrived_at + deadline_s
        self.attempts = 0
        self.first_sent_at: float | None = None
        self.gone = False
        self.on_gone: Callable[[], None] | None = None
        self.on_paused: Callable[[bool], None] | None = None
        self.status = 0
        self.error_code = ""
        self.retry_after_s: int | None = None
        self.head_at = self.ended_at = 0.0
        self.heads = 0
        self.relayed = False
        """Whether a byte of an answer was seen that cannot be taken back."""
        self.finished = False
        self.pieces: list[bytes] = []

    def respond(self, status: int, header_lines: bytes, body: bytes) -> None:
        self._head(status)
        self.pieces.append(body)
        if status != 200:
            self._refused(header_lines, body)
        self._finish()

    def start_stream(self, status: int, header_lines: bytes) -> None:
        self._head(status)

    def write(self, data: bytes) -> None:
        self.world.laws.hold(self.heads == 1 and not self.finished, "bytes come between head and end", self.call_id)
        self.relayed = self.relayed or data != sse.PING
        self.pieces.append(data)

    def end(self, data: bytes = b"") -> None:
        self.pieces.append(data)
        self._finish()

    def leave(self) -> None:
        if not self.finished and not self.gone:
            self.gone = True
            self.world.left += 1
            on_gone, self.on_gone = self.on_gone, None
            if on_gone is not None:
                on_gone()

    def _head(self, status: int) -> None:
        self.heads += 1
        self.status = status
        self.head_at = self.world.clock()
        self.world.laws.hold(self.heads == 1, "a client sees one answer", self.call_id)

    def _refused(self, header_lines: bytes, body: bytes) -> None:
        laws, lines = self.world.laws, dict(line.split(b": ", 1) for line in header_lines.lower().splitlines())
        error = json.loads(body)["error"]
        self.error_code = (error.get("details") or {}).get("error_code") or error["type"]
        laws.hold(b"x-should-retry" in lines, "an error says whether to try again", (self.call_id, lines))
        if b"retry-after" in lines:
            self.retry_after_s = int(lines[b"retry-after"])
            laws.hold(0 < self.retry_after_s <= RETRY_AFTER_S_MAX, "nobody is sent away for over a minute", lines)
        if not self.attempts and not self.gone:
            laws.hold(self.retry_after_s is not None, "a refusal says when to come back", (self.call_id, body))
            late_s = self.head_at - self.deadline
            laws.hold(late_s <= _SLACK, "nobody waits past the deadline", (self.call_id, self.error_code, late_s))

    def _finish(self) -> None:
        self.world.laws.hold(not self.finished, "an answer ends once", self.call_id)
        self.finished = True
        self.ended_at = self.world.clock()
        self.on_gone = self.on_paused = None
        if not self.gone:
            self._check()
        self.pieces.clear()

    def _check(self) -> None:
        laws, body = self.world.laws, b"".join(self.pieces)
        if not self.streamed or self.status != 200:
            laws.hold(isinstance(json.loads(body), dict), "an answer is JSON", body)
            return
        starts = body.count(b"event: message_start\n")
        stops, errors = body.count(b"event: message_stop\n"), body.count(b"event: error\n")
        laws.hold(starts <= 1, "a client sees one message_start", body)
        laws.hold(stops + errors == 1, "a stream ends with message_stop or with an error", body)
        laws.hold(bool(starts) or bool(errors), "a whole stream has a start", body)
        last = body.rstrip().rpartition(b"\n\n")[2]
        laws.hold(last.startswith((b"event: message_stop", b"event: error")), "nothing follows the end", last)


class World:
    """One gateway, its clients and Anthropic, on one loop.

    `weather(model, now)` names the fault that an attempt meets, empty for none.
    """

    base_path = b""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seed: int, settings: Settings, weather: Callable[[str, float], str]
    ) -> None:
        self.loop = loop
        self.clock = loop.time
        self.weather = weather
        self.laws = Laws()
        self.dice = random.Random(seed)
        self.tables = Tables(self.laws)
        self.books: dict[tuple[str, int], Books] = {}
        self.open: set[ScriptedConnection] = set()
        self.flying: Counter[str] = Counter()
        """Attempts under way, by person."""
        self.lines: Counter[str] = Counter()
        self.lines_nanousd: Counter[str] = Counter()
        self.exchanges: dict[str, Exchange] = {}
        self.left = 0
        self.crashes: list[str] = []
        loop.set_exception_handler(lambda loop, context: self.crashes.append(repr(context.get("exception", context))))
        self.transitions: list[tuple[float, str, str]] = []
        """Of breakers: when, whose, into what."""
        self.breakers: dict[str, str] = {}
        structlog.configure(processors=[self._noted])
        self.log_digest = sha256()
        self.policies: Policies = policies(settings, packaged())
        self.limiter = Limiter()
        self.traffic = Traffic(
            LocalLimits(self.limiter, loop.time), self.policies, clock=loop.time, jitter=random.Random(seed + 2).random
        )
        self.pipeline = Pipeline(
            settings,
            policies=self.policies,
            traffic=self.traffic,
            purses=self._purses(settings),
            reuse=None,
            caching=PromptCaching(settings.cache, packaged(), clock=loop.time, now_ns=self.now_ns),
            upstream=self,
            ledger=self.tables,
            catalog=packaged(),
            put_log_line=self._logged,
            tasks=Tasks(lambda error: self.crashes.append(repr(error))),
            clock=loop.time,
            now_ns=self.now_ns,
            jitter=random.Random(seed + 1).random,
            upstream_head=b"host: api\r\n",
            fingerprint_key=b"a key of this world",
        )
        self._classes: dict[str, Witness] = {}
        self._people: dict[str, Witness] = {}
        self._capped_until = self._capped_at = -1.0

    def _purses(self, settings: Settings) -> Purses:
        async def nothing_spent(ids: Collection[str], at_ns: int) -> Spent:
            return Spent(at_ns, {})

        alerts = AlertSink(None, now_ns=self.now_ns)
        guard = SpendGuard(VelocityPolicy(), alerts, clock=self.loop.time, enabled=settings.velocity.enabled)
        money = LocalMoney(Budgets(), clock=self.loop.time, now_ns=self.now_ns, read=nothing_spent)
        return Purses(money, guard, packaged())

    def now_ns(self) -> int:
        return BEGAN_NS + round(self.loop.time() * 1e9)

    def _noted(self, logger: object, method: str, event: dict) -> dict:
        """What the gateway says beside its lines: here, only what must not happen is kept."""
        match event["event"]:
            case "breaker":
                self.transitions.append((self.clock(), event["model"], event["after"]))
                self.breakers[event["model"]] = event["after"]
            case "upstream_credential" | "unknown_price" | "spend_cap" | "spend_cap_over":
                pass
            case _:
                self.crashes.append(f"{event} {sys.exc_info()[1]!r}")
        raise structlog.DropEvent

    def _logged(self, line: LogLine) -> None:
        self.lines[line.call_id] += 1
        self.lines_nanousd[line.call_id] += line.cost_nanousd
        self.log_digest.update(encode(line))
        exchange = self.exchanges[line.call_id]
        waited_s = line.queue_ms / 1000 - (exchange.deadline - exchange.arrived_at)
        self.laws.hold(waited_s <= 0.001, "nobody waits past the deadline", (line.call_id, waited_s))

    # Anthropic

    async def send(self, head: bytes, body: bytes, track, *, first_byte_timeout_s=None):
        at = head.index(_CALL_HEADER) + len(_CALL_HEADER)
        exchange = self.exchanges[head[at : head.index(b"\r", at)].decode()]
        request = msgspec.json.decode(body)
        books = self._arrived(exchange, request["model"])
        connection = ScriptedConnection(self, books)
        connection.person = exchange.asker.user
        connection.requests_left = max(int(self._class_witness(books.model).level), 0)
        fault = "reset" if "poison" in request else self.weather(books.model, self.clock())
        self.flying[connection.person] += 1
        if fault or self.dice.random() < 0.1:
            await asyncio.sleep(0.2)
        if fault == "connect" or not track(connection):
            books.free = True
            connection.done()
            message = "refused" if fault == "connect" else "the client left"
            return Failure(kind="connect", message=message, sent=False)
        self.laws.hold(not exchange.gone, "nothing is sent for who has left", exchange.call_id)
        self.open.add(connection)
        connection.play(self._script(connection, request, fault))
        return await connection.waiting

    def _arrived(self, exchange: Exchange, model: str) -> Books:
        """An attempt comes: hold it against the laws of those that may."""
        laws, now, call_id = self.laws, self.clock(), exchange.call_id
        exchange.attempts += 1
        number = exchange.attempts
        books = self.books[call_id, number] = Books(model)
        books.arrived_at = now
        books.is_probe = self.breakers.get(model, "closed") != "closed"
        laws.hold(self.tables.intents[call_id, number] == 1, "the intent is written before any byte leaves", call_id)
        laws.hold(number <= ATTEMPTS_MAX, "a request is sent at most three times", call_id)
        laws.hold(not exchange.relayed, "nothing is sent after the first relayed byte", call_id)
        laws.hold(now <= exchange.deadline + _SLACK, "nothing is sent past its deadline", (call_id, number, now))
        dearer = USD_PER_MTOK[model]["input"] > USD_PER_MTOK[exchange.model]["input"]
        laws.hold(not dearer, "no model answers that is dearer", (call_id, exchange.model, model))
        laws.hold(self._class_witness(model).takes(now), "a class keeps its rate in every window", (model, now))
        if number == 1:
            exchange.first_sent_at = now
            laws.hold(self._person_witness(exchange.asker).takes(now), "a person keeps theirs", (exchange.asker, now))
        limit = exchange.asker.concurrency
        laws.hold(limit is None or self.flying[exchange.asker.user] < limit, "a key keeps its concurrency", call_id)
        laws.hold(
            not self._capped_at < now < self._capped_until, "an account without money is left alone", (call_id, number)
        )
        if self._capped_at < now and self._capped_until > 0:
            self._capped_until = now + SPEND_CAP_PROBE_S
        return books

    def _class_witness(self, model: str) -> Witness:
        known = self._classes.get(model)
        if known is None:
            limits = self.policies.class_limits(self.pipeline.class_id(model))
            known = self._classes[model] = Witness(limits.rpm / 60, max(limits.rpm / 60 * limits.burst_s, 1.0))
        return known

    def _person_witness(self, asker: Asker) -> Witness:
        known = self._people.get(asker.user)
        if known is None:
            tier = self.policies.tier(asker.tier)
            known = self._people[asker.user] = Witness(tier.rpm / 60, max(tier.rpm / 60 * tier.burst_s, 1.0))
        return known

    def _script(self, connection: ScriptedConnection, request: dict, fault: str) -> list:
        dice, books = self.dice, connection.books
        first_byte_s = request.get("first_byte_s") or dice.uniform(0.2, 1.5)
        if fault in (*_ERROR_STATUS, "5xx"):
            books.free = True
            return [(0.0 if fault == "529" else first_byte_s, lambda: self._error_answer(connection, fault))]
        if fault == "reset":
            books.input = request["prompt_tokens"]
            return [(first_byte_s, lambda: connection.fail(Failure(kind="reset", message="reset")))]
        if fault == "timeout":
            books.input = request["prompt_tokens"]
            return [(120.0, lambda: connection.fail(Failure(kind="timeout", message="no answer in time")))]
        books.input = request["prompt_tokens"] // 3
        books.cache_read = request["prompt_tokens"] // 2 if dice.random() < 0.6 else 0
        books.write = request["prompt_tokens"] - books.input - books.cache_read
        output = request.get("answer_tokens") or dice.randint(8, 800)
        if request.get("stream"):
            return self._stream(connection, request, fault, first_byte_s, output)
        return self._whole(connection, request, fault, first_byte_s, output)

    def _answer(self, connection: ScriptedConnection, status: int, content_type: bytes, **more: bytes) -> Answer:
        answer = connection.answer = Answer(connection)
        answer.status = status
        answer.headers = [(b"Content-Type", content_type), (b"request-id", b"req_%d" % len(self.books))]
        if status == 200:
            limit = round(self._class_witness(connection.books.model).rate_s * 60)
            answer.headers += [
                (b"anthropic-ratelimit-requests-limit", b"%d" % limit),
                (b"anthropic-ratelimit-requests-remaining", b"%d" % connection.requests_left),
            ]
        answer.headers += [(name.replace("_", "-").encode(), value) for name, value in more.items()]
        answer.header_map = {name.lower(): value for name, value in answer.headers}
        answer.streamed = content_type == b"text/event-stream"
        answer.head_at = self.clock()
        return answer

    def _error_answer(self, connection: ScriptedConnection, fault: str) -> None:
        status = _ERROR_STATUS.get(fault) or self.dice.choice([500, 502, 503, 504])
        more = {"retry_after": self.dice.choice([b"1", b"2.5", b"15", b"30", b"junk"])} if fault == "429" else {}
        if fault == "spend_cap" and self._capped_until <= 0:
            self._capped_at = self.clock()
            self._capped_until = self._capped_at + SPEND_CAP_PROBE_S
        answer = self._answer(connection, status, b"application/json", **more)
        details = {"error_code": _ERROR_CODE[fault]} if fault in _ERROR_CODE else None
        answer.take(json.dumps({"type": "error", "error": {"type": "x", "message": "m", "details": details}}).encode())
        connection.done()
        connection.respond(answer)
        answer.end()

    def _usage(self, books: Books, output: int) -> dict:
        return {
            "input_tokens": books.input,
            "cache_read_input_tokens": books.cache_read,
            "cache_creation_input_tokens": books.write,
            "cache_creation": {"ephemeral_5m_input_tokens": books.write, "ephemeral_1h_input_tokens": 0},
            "output_tokens": output,
        }

    def _whole(self, connection, request: dict, fault: str, first_byte_s: float, output: int) -> list:
        books = connection.books
        books.produced = output

        def answered() -> None:
            connection.done()
            if fault in ("truncated", "stall", "error_first", "error_later"):
                connection.fail(Failure(kind="truncated", status=200, message="cut"))
                return
            refused = fault == "refusal"
            books.began = books.final = fault != "malformed"
            self._money_again(books)
            books.free = refused
            body = {
                "type": "message",
                "model": request["model"],
                "content": [] if refused else [{"type": "text", "text": "x"}],
                "stop_reason": "refusal" if refused else "end_turn",
                "usage": self._usage(books, output),
            }
            answer = self._answer(connection, 200, b"application/json")
            answer.take(msgspec.json.encode(body)[: 40 if fault == "malformed" else None])
            connection.respond(answer)
            answer.end()

        return [(first_byte_s + output / 80, answered)]

    def _stream(self, connection, request: dict, fault: str, first_byte_s: float, output: int) -> list:
        dice, books, model = self.dice, connection.books, request["model"]
        message = {"id": "msg_1", "model": model, "usage": self._usage(books, 1)}
        start = _frame("message_start", message=message)

        def head() -> None:
            connection.respond(self._answer(connection, 200, b"text/event-stream"))

        def sent(data: bytes, tokens: int = 0, *, began: bool = False) -> Callable[[], None]:
            def act() -> None:
                books.began = books.began or began
                books.produced += tokens
                assert connection.answer is not None
                connection.answer.take(data)

            return act

        if fault == "error_first":
            books.free = True
            return [(first_byte_s, head), (0.01, sent(OVERLOADED))]
        if fault == "refusal":
            books.free = True
            end = _frame("message_delta", delta={"stop_reason": "refusal"}, usage={"output_tokens": 1})
            return [
                (first_byte_s, head),
                (0.0, sent(start, 1, began=True)),
                (0.2, self._finale(connection, end + STOP)),
            ]
        script = [(first_byte_s, head), (0.01, sent(start, 1, began=True))]
        if dice.random() < 0.1 and "first_byte_s" not in request:
            script.append((dice.uniform(0.5, 40.0), sent(sse.PING)))
        if dice.random() < 0.2:
            script.append((dice.uniform(0.05, 1.8), sent(_frame("content_block_start", index=0))))
        left, breaks_at = output - 1, dice.random() if fault else 2.0
        while left > 0:
            tokens = min(left, max(1, output // 3 + dice.randint(-2, 2)))
            left -= tokens
            if 1 - left / output > breaks_at:
                return [*script, self._break(connection, fault, sent)]
            text = "x" * round(tokens * BYTES_PER_TOKEN[model] * dice.uniform(0.9, 1.1))
            data = _frame("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
            if dice.random() < 0.2:
                half = dice.randint(1, len(data) - 1)
                script.append((tokens / 160, sent(data[:half])))
                data = data[half:]
            script.append((tokens / 80, sent(data, tokens)))
        end = _frame("content_block_stop", index=0)
        end += _frame("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": output})
        return [*script, (0.05, self._finale(connection, end + STOP))]

    def _finale(self, connection: ScriptedConnection, data: bytes) -> Callable[[], None]:
        def act() -> None:
            connection.books.final = True
            self._money_again(connection.books)
            answer = connection.answer
            assert answer is not None
            answer.take(data)
            connection.done()
            answer.end()

        return act

    def _break(self, connection: ScriptedConnection, fault: str, sent) -> tuple[float, Callable[[], None]]:
        match fault:
            case "stall":
                return 180.0, lambda: connection.fail(Failure(kind="stall", status=200, message="silence"))
            case "malformed":
                return 0.1, sent(b'event: content_block_delta\ndata: {"delta":\xff}\n\n')
            case "error_later":
                return 0.1, sent(OVERLOADED)
            case _:
                return 0.1, lambda: connection.fail(Failure(kind="truncated", status=200, message="cut"))

    def _money_again(self, books: Books) -> None:
        if self._capped_until > 0 and books.arrived_at >= self._capped_at + SPEND_CAP_PROBE_S:
            self._capped_until = -1.0

    # clients

    def arrive(
        self,
        body: Mapping[str, object],
        asker: Asker,
        *,
        deadline_s: float = 20.0,
        call_id: str = "",
        named_by_app: bool = False,
    ) -> Exchange:
        """A request of this person comes in now."""
        call_id = call_id or f"call_{len(self.exchanges):024d}"
        model = str(body["model"])
        exchange = Exchange(self, call_id, asker, model, deadline_s, bool(body.get("stream")))
        self.exchanges[call_id] = exchange
        forwarded = _CALL_HEADER + call_id.encode() + b"\r\n"
        request = ClientRequest(call_id, msgspec.json.encode(body), forwarded, b"", self.clock(), self.now_ns())
        scopes = frozenset({"app"} if named_by_app else {"messages"})
        principal = Principal(
            key_id=asker.key_id,
            user="the app's owner" if named_by_app else asker.user,
            tier=asker.tier,
            scopes=scopes,
            concurrency=None if named_by_app else asker.concurrency,
        )
        whose = Attribution(user=asker.user, tier=asker.tier, endpoint="chat", deadline_s=deadline_s)
        self.pipeline.start(exchange, request, principal, whose)
        return exchange

    async def tick(self) -> None:
        """The gateway's heartbeat; to be cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.pipeline.tick(self.loop.time())

    async def rest(self) -> None:
        """Until nobody is being served any more."""
        while self.pipeline.live:  # noqa: ASYNC110  the pipeline tells nobody that it is idle
            await asyncio.sleep(TICK_S)
        self.tables.flush()

    def settled(self) -> None:
        """When all is over nothing is held by anybody."""
        laws, traffic = self.laws, self.traffic
        laws.hold(not len(self.limiter), "every reservation is settled", len(self.limiter))
        laws.hold(not traffic._live, "no turn is out", len(traffic._live))
        laws.hold(not any(len(queue) for _, _, queue in traffic.lanes()), "nobody is left in a queue", "")
        totals = traffic._totals
        counted = (totals.waiting, totals.bytes, totals.by_user)
        laws.hold(counted == (0, 0, ({}, {})), "nobody is counted who has left", counted)
        people = {f"user:{exchange.asker.user}" for exchange in self.exchanges.values()}
        busy = [name for name in people if self.limiter._subjects.get(name) and self.limiter._subjects[name].busy]
        laws.hold(not busy, "no slot is held for nobody", busy[:3])
        laws.hold(not self.open, "no connection to Anthropic is left open", len(self.open))
        laws.hold(not +self.flying, "no connection to Anthropic is left open", +self.flying)
        laws.hold(self.pipeline.in_background == 0, "nobody is read on in the background", self.pipeline.in_background)
        laws.hold(not self.crashes, "no call crashes", self.crashes[:3])
        unanswered = [one.call_id for one in self.exchanges.values() if not one.finished and not one.gone]
        laws.hold(not unanswered, "every client that stays is answered", unanswered[:3])
        self._attempts_keep_the_budget()

    def _attempts_keep_the_budget(self) -> None:
        """I4, by what causes attempts: requests let go for the first time, and failures.

        Where nobody waits for a turn that is when attempts are made. Where there is a queue a retry is made later,
        beside those whose requests came long before the last minute, and none of the two is to blame for that. A retry
        is free after a probe: the breaker bounds those.
        """
        let_go = sorted(one.first_sent_at for one in self.exchanges.values() if one.first_sent_at is not None)
        failed: list[float] = []
        for call_id, number in self.books:
            if number > 1:
                before = self.books[call_id, number - 1]
                self.laws.hold(before.ended_at is not None, "an attempt ends before the next begins", call_id)
                if not before.is_probe:
                    failed.append(before.ended_at or 0.0)
        # A purse that every request puts a fifth into and every retry takes one out of: what it allows in any window is
        # 0.2 x requests + 10 retries, which with the first attempts are 1.2 x requests + 10 attempts.
        purse, paid = Witness(0.0, 10.0), 0
        for at in sorted(failed):
            while paid < len(let_go) and let_go[paid] <= at:
                purse.level = min(purse.level + 0.2, purse.burst)
                paid += 1
            self.laws.hold(purse.takes(0.0), "attempts keep the retry budget in every window", at)


def _frame(event: str, **data: object) -> bytes:
    return sse.frame(event.encode(), msgspec.json.encode({"type": event} | data))


STOP = _frame("message_stop")
OVERLOADED = _frame("error", error={"type": "overloaded_error", "message": "Overloaded"})
