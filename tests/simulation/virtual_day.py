"""A day of a gateway in seconds: the real pipeline, machine, fold and prices on a loop whose clock jumps.

    python tests/simulation/virtual_day.py [--seed N] [--requests N]

Upstream and clients are scripted here and keep books of their own; what the gateway wrote is held against them. Prints
one JSON object: the digest of all ledger rows, sums, counts, and every law that was broken. Nothing here reads a real
clock or rolls real dice, so one seed is one digest, in any process.
"""

import argparse
import asyncio
import json
import random
import selectors
import sys
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256

import msgspec
import structlog

from headgate.gateway.pipeline import Pipeline
from headgate.gateway.settings import load_settings
from headgate.gateway.settlement import Attribution
from headgate.gateway.tasks import Tasks
from headgate.gateway.upstream import Answer
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
from headgate.storage.fold import Fold
from headgate.storage.tables import attempts as attempt_table
from headgate.storage.tables import calls as call_table
from headgate.telemetry.log_line import LogLine, encode
from headgate.wire import sse
from headgate.wire.catalog import packaged

DAY_S = 86_400.0
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
FAULTS = {
    "429": 0.03,
    "5xx": 0.03,
    "529": 0.01,
    "connect": 0.005,
    "reset": 0.005,
    "timeout": 0.002,
    "truncated": 0.008,
    "stall": 0.004,
    "malformed": 0.003,
    "error_first": 0.004,
    "error_later": 0.004,
    "spend_cap": 0.001,
    "bad_request": 0.004,
    "refusal": 0.002,
}


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
        self.answer: Answer | None = None
        self.waiting: asyncio.Future = world.loop.create_future()
        self._script: list[tuple[float, Callable[[], None]]] = []
        self._timer: asyncio.TimerHandle | None = None

    def play(self, script: list[tuple[float, Callable[[], None]]]) -> None:
        self._script = list(reversed(script))
        self._next()

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            if self._timer is not None:
                self._timer.cancel()
            self.world.open.discard(self)
            self.world.loop.call_soon(self._lost)

    def settle(self) -> None:
        self.done()

    def pause(self, paused: bool) -> None:
        """Clients here read as fast as they can."""

    def done(self) -> None:
        self.closed = True
        self.world.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()

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


class Exchange:
    """A client: keeps what it is told, and holds it against the grammar when it ends."""

    method = b"POST"

    def __init__(self, world: "World", number: int, streamed: bool) -> None:
        self.world = world
        self.number = number
        self.streamed = streamed
        self.gone = False
        self.on_gone: Callable[[], None] | None = None
        self.on_paused: Callable[[bool], None] | None = None
        self.status = 0
        self.heads = 0
        self.finished = False
        self.pieces: list[bytes] = []

    def respond(self, status: int, header_lines: bytes, body: bytes) -> None:
        self._head(status)
        self.pieces.append(body)
        self._finish()

    def start_stream(self, status: int, header_lines: bytes) -> None:
        self._head(status)

    def write(self, data: bytes) -> None:
        self.world.laws.hold(self.heads == 1 and not self.finished, "bytes come between head and end", self.number)
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
        self.world.laws.hold(self.heads == 1, "a client sees one answer", self.number)

    def _finish(self) -> None:
        self.world.laws.hold(not self.finished, "an answer ends once", self.number)
        self.finished = True
        self.on_gone = self.on_paused = None
        if not self.gone:
            self._check()

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
    """One gateway, its clients and Anthropic, on one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seed: int) -> None:
        self.loop = loop
        self.clock = loop.time
        self.laws = Laws()
        self.dice = random.Random(seed)
        self.tables = Tables(self.laws)
        self.books: dict[tuple[str, int], Books] = {}
        self.open: set[ScriptedConnection] = set()
        self.lines: Counter[str] = Counter()
        self.lines_nanousd: Counter[str] = Counter()
        self.exchanges: list[Exchange] = []
        self.left = 0
        self.crashes: list[str] = []
        structlog.configure(processors=[self._noted])
        self.log_digest = sha256()
        self.pipeline = Pipeline(
            load_settings(),
            upstream=self,
            ledger=self.tables,
            catalog=packaged(),
            put_log_line=self._logged,
            tasks=Tasks(lambda error: self.crashes.append(repr(error))),
            clock=loop.time,
            now_ns=self.now_ns,
            jitter=random.Random(seed + 1).random,
            upstream_head=b"host: api\r\n",
        )

    def now_ns(self) -> int:
        return BEGAN_NS + round(self.loop.time() * 1e9)

    def _noted(self, logger: object, method: str, event: dict) -> dict:
        """What the gateway says beside its lines: here, only what must not happen is kept."""
        if event["event"] not in ("upstream_credential", "unknown_price"):
            self.crashes.append(f"{event} {sys.exc_info()[1]!r}")
        raise structlog.DropEvent

    def _logged(self, line: LogLine) -> None:
        self.lines[line.call_id] += 1
        self.lines_nanousd[line.call_id] += line.cost_nanousd
        self.log_digest.update(encode(line))

    # Anthropic

    base_path = b""

    async def send(self, head: bytes, body: bytes, track, *, first_byte_timeout_s=None):
        request = msgspec.json.decode(body)
        call_id = request["metadata"]["user_id"]
        number = sum(key in self.books for key in ((call_id, 1), (call_id, 2), (call_id, 3))) + 1
        self.laws.hold(self.tables.intents[call_id, number] == 1, "the intent is written before any byte leaves", head)
        books = self.books[call_id, number] = Books(request["model"])
        connection = ScriptedConnection(self, books)
        fault = self._fault()
        if fault or self.dice.random() < 0.1:
            await asyncio.sleep(0.2)
        if fault == "connect":
            books.free = True
            return Failure(kind="connect", message="refused", sent=False)
        if not track(connection):
            books.free = True
            return Failure(kind="connect", message="the client left", sent=False)
        self.open.add(connection)
        connection.play(self._script(connection, request, fault))
        return await connection.waiting

    def _fault(self) -> str:
        roll = self.dice.random()
        for fault, share in FAULTS.items():
            roll -= share
            if roll < 0:
                return fault
        return ""

    def _script(self, connection: ScriptedConnection, request: dict, fault: str) -> list:
        dice, books = self.dice, connection.books
        first_byte_s = dice.uniform(0.2, 1.5)
        if fault in ("429", "5xx", "529", "spend_cap", "bad_request"):
            books.free = True
            return [(first_byte_s, lambda: self._error_answer(connection, fault))]
        if fault == "reset":
            books.input = request["prompt_tokens"]
            return [(first_byte_s, lambda: connection.fail(Failure(kind="reset", message="reset")))]
        if fault == "timeout":
            books.input = request["prompt_tokens"]
            return [(120.0, lambda: connection.fail(Failure(kind="timeout", message="no answer in time")))]
        books.input = request["prompt_tokens"] // 3
        books.cache_read = request["prompt_tokens"] // 2 if dice.random() < 0.6 else 0
        books.write = request["prompt_tokens"] - books.input - books.cache_read
        output = dice.randint(8, 800)
        if request.get("stream"):
            return self._stream(connection, request, fault, first_byte_s, output)
        return self._whole(connection, request, fault, first_byte_s, output)

    def _answer(self, connection: ScriptedConnection, status: int, content_type: bytes, **more: bytes) -> Answer:
        answer = connection.answer = Answer(connection)
        answer.status = status
        answer.headers = [(b"Content-Type", content_type), (b"request-id", b"req_%d" % len(self.books))]
        answer.headers += [(name.replace("_", "-").encode(), value) for name, value in more.items()]
        answer.header_map = {name.lower(): value for name, value in answer.headers}
        answer.streamed = content_type == b"text/event-stream"
        answer.head_at = self.clock()
        return answer

    def _error_answer(self, connection: ScriptedConnection, fault: str) -> None:
        status = {"429": 429, "spend_cap": 429, "529": 529, "bad_request": 400}.get(fault)
        status = status or self.dice.choice([500, 502, 503, 504])
        more = {"retry_after": self.dice.choice([b"1", b"2.5", b"15", b"30", b"junk"])} if fault == "429" else {}
        answer = self._answer(connection, status, b"application/json", **more)
        details = {"error_code": "enforced_spend_limit_reached"} if fault == "spend_cap" else None
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
        if dice.random() < 0.1:
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

    # clients

    async def live(self, requests: int) -> None:
        """The whole day: requests at random times, some impatient."""
        arrivals = sorted(self.dice.uniform(0, DAY_S) for _ in range(requests))
        ticks = self.loop.create_task(self._tick())
        for number, at in enumerate(arrivals):
            await asyncio.sleep(max(at - self.loop.time(), 0.0))
            self._arrive(number)
        while self.pipeline.live:  # noqa: ASYNC110  the pipeline tells nobody that it is idle
            await asyncio.sleep(TICK_S)
        ticks.cancel()
        self.tables.flush()

    def _arrive(self, number: int) -> None:
        dice, call_id = self.dice, f"call_{number:024d}"
        streamed = dice.random() < 0.7
        body = {
            "model": dice.choices(list(USD_PER_MTOK), [6, 3, 1])[0],
            "max_tokens": 1024,
            "metadata": {"user_id": call_id},
            "messages": [{"role": "user", "content": "x" * dice.randint(10, 400)}],
            "prompt_tokens": dice.randint(50, 9_000),
        } | ({"stream": True} if streamed else {})
        exchange = Exchange(self, number, streamed)
        self.exchanges.append(exchange)
        request = ClientRequest(call_id, msgspec.json.encode(body), b"", b"", self.loop.time(), self.now_ns())
        user = f"user_{number % 200}"
        whose = Attribution(user=user, tier="free", endpoint="chat")
        self.pipeline.start(exchange, request, Principal(key_id="key00001", user=user), whose)
        if dice.random() < 0.04:
            self.loop.call_later(dice.uniform(0.0, 8.0), exchange.leave)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.pipeline.tick(self.loop.time())

    # the reckoning

    def report(self) -> dict:
        """Hold the ledger against the books, and sum up."""
        laws, tables = self.laws, self.tables
        calls = [dict(zip(call_table.columns.keys(), row, strict=True)) for row in tables.calls.values()]
        tried = [dict(zip(attempt_table.columns.keys(), row, strict=True)) for row in tables.attempts.values()]
        costs: Counter[str] = Counter()
        billed = estimated = estimated_true = 0
        for row in tried:
            key = row["call_id"], row["number"]
            books, usage = self.books.get(key, Books(row["model"])), json.loads(row["usage"])
            tokens = [usage.get(f"{kind}_tokens", 0) for kind in ("input", "cache_read", "cache_write_5m", "output")]
            own = bill(row["model"], *tokens)
            if row["state"] == "settled" and books.free:
                own = 0
            costs[row["call_id"]] += own
            laws.hold(row["cost_nanousd"] == own, "a cost is its tokens times their price", (row, own))
            laws.hold(row["state"] != "open", "every attempt has its one terminal state", row)
            laws.hold((row["state"] == "settled") <= books.final, "only a whole answer is settled", row)
            laws.hold(
                (row["state"] == "void") <= (books.free or not books.nanousd), "what was billed is never void", row
            )
            if row["state"] == "settled":
                billed += books.nanousd
                laws.hold(row["cost_nanousd"] == books.nanousd, "a settled attempt costs what Anthropic bills", row)
            elif row["state"] == "estimated":
                if books.began:
                    estimated += row["cost_nanousd"]
                    estimated_true += books.nanousd
                exact = [books.input, books.cache_read, books.write]
                laws.hold(not books.began or tokens[:3] == exact, "the input of a cut answer is exact", (row, exact))
        for call in calls:
            laws.hold(call["outcome"] is not None, "every call has an outcome", call)
            laws.hold(call["cost_nanousd"] == costs[call["call_id"]], "a call costs what its attempts cost", call)
            laws.hold(self.lines[call["call_id"]] == 1, "every call leaves one log line", call)
            told = self.lines_nanousd[call["call_id"]]
            laws.hold(told == call["cost_nanousd"], "a log line costs what its call costs", (call, told))
            exchange = self.exchanges[int(call["call_id"][5:])]
            left = exchange.gone and not exchange.streamed
            laws.hold(not left or call["outcome"] == "abandoned", "a call that nobody waited for is abandoned", call)
        laws.hold(set(tables.closed.values()) == {1}, "every call is closed once", tables.closed.most_common(3))
        laws.hold(tables.intents == tables.ended, "every intent ends once", len(tables.intents))
        laws.hold(set(self.books) == set(tables.intents), "the ledger has every attempt and no other", len(self.books))
        laws.hold(len(calls) == len(self.exchanges), "every request is a call", len(calls))
        laws.hold(tables.fold.contradictions == 0, "nobody contradicts an ending", tables.fold.contradictions)
        laws.hold(not tables.fold.open, "the fold lets go of what has ended", len(tables.fold.open))
        laws.hold(not self.open, "no connection to Anthropic is left open", len(self.open))
        laws.hold(self.pipeline.in_background == 0, "nobody is read on in the background", self.pipeline.in_background)
        laws.hold(not self.crashes, "no call crashes", self.crashes[:3])
        unanswered = [one.number for one in self.exchanges if not one.finished and not one.gone]
        laws.hold(not unanswered, "every client that stays is answered", unanswered[:3])
        rows = json.dumps([calls, tried], sort_keys=True).encode()
        return {
            "digest": sha256(rows).hexdigest(),
            "log_digest": self.log_digest.hexdigest(),
            "calls": len(calls),
            "attempts": len(tried),
            "left": self.left,
            "outcomes": dict(sorted(Counter(call["outcome"] for call in calls).items())),
            "states": dict(sorted(Counter(row["state"] for row in tried).items())),
            "statuses": dict(sorted(Counter(str(call["status"]) for call in calls).items())),
            "attempts_per_call": dict(sorted(Counter(str(max(1, n)) for n in self._tries()).items())),
            "cost_nanousd": sum(call["cost_nanousd"] for call in calls),
            "own_sum_nanousd": sum(costs.values()),
            "settled_nanousd": billed,
            "cut_nanousd": estimated,
            "cut_true_nanousd": estimated_true,
            "broken": dict(laws.broken),
            "examples": laws.examples,
        }

    def _tries(self) -> list[int]:
        tries = Counter(call_id for call_id, _ in self.books)
        return [tries[f"call_{number:024d}"] for number in range(len(self.exchanges))]


def _frame(event: str, **data: object) -> bytes:
    return sse.frame(event.encode(), msgspec.json.encode({"type": event} | data))


STOP = _frame("message_stop")
OVERLOADED = _frame("error", error={"type": "overloaded_error", "message": "Overloaded"})


def main() -> None:
    """Run one day and print its report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=50_000)
    options = parser.parse_args()
    began = time.process_time()
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        world = World(runner.get_loop(), options.seed)
        runner.run(world.live(options.requests))
        report = world.report()
    print(json.dumps(report | {"cpu_s": round(time.process_time() - began, 1)}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
