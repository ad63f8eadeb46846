"""What the ledger's rows would have cost under another policy: another model, TTL, caching, batches, answer reuse.

What it is: a simulation of Anthropic's prompt cache and bill over rows in the order of their time, by the rules of
claude-api §7.1 and §8. Rows go in one by one, so any span fits; it keeps at most `ENTRIES_MAX` prefixes,
conversations and answers each, the oldest goes first.
What it is not: a promise. Times, prompts and lengths of answers stay those that were; what a model would have
answered differently nobody knows. What cannot be known from a ledger is said in `Break`, or not at all.

The rules, in short:

- A call whose caching, model and answer stay as recorded keeps its recorded cost, to the nano-dollar.
- Else its prompt is read from the cache up to what an earlier call of the same model wrote and is still alive: its
  prefix (`prefix`, shared by everybody), or the whole prompt of the turn before in its conversation. The rest up to its
  last mark is written. An entry can be used from the first byte of its writer's answer, and lives for its TTL from the
  start of the last call that used it.
- The last mark is where the recorded one was. Of a call that recorded none it is the end of the prompt in a
  conversation that goes on, by what others of its key and endpoint did, and the end of the prefix otherwise. What is
  shorter than the model's minimum is not cached. What was not marked stays so, unless caching or a TTL is asked for.
- Of the calls that a batch can take (not streamed, or of an endpoint that was named; at standard speed) every n-th goes
  into one, evenly by their order, and costs half.
- A call that equals one of the same key, which was answered whole within the reuse TTL, costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from fractions import Fraction
from typing import Literal, TypeVar

import msgspec

from headgate.policy.pricing import price
from headgate.policy.records import Record
from headgate.policy.tokenizer_change import Text, scaled, tokens_ratio
from headgate.wire.catalog import Catalog, Model, day_start_ns
from headgate.wire.usage import NO_USAGE, IterationUsage, Usage

Ttl = Literal["5m", "1h"]
TTL_NS: dict[Ttl, int] = {"5m": 300 * 10**9, "1h": 3_600 * 10**9}
ENTRIES_MAX = 200_000
FIRST_TURNS_MIN = 8
"""Conversations of a key and endpoint that must have begun before their first turns are marked at the end."""
GOES_ON_SHARE = Fraction(28, 100)
"""A write costs a quarter more than input, and a read saves nine tenths: so many must be read for one to pay."""
READ_OF_PREFIX_MAX = Fraction(3, 2)
"""A read longer than this, of the prefix as it was estimated, reached beyond it."""
WARM_UP_NS = TTL_NS["1h"]
"""How far before the span its rows must begin, for the cache to be as warm as it was."""

BreakCode = Literal[
    "unknown_model",
    "retired_model",
    "retires_soon",
    "context_too_small",
    "output_too_long",
    "answer_cut",
    "dearer_band",
    "below_cache_minimum",
    "not_batchable",
    "fast_not_sold",
    "several_passes",
    "reused_unknown",
    "parameters_unknown",
]


class ReplayRow(Record, frozen=True, gc=False):
    """One attempt of the ledger, with what its call says of it; or a call that was reused and had none."""

    call_id: str
    at_ns: int
    """When the attempt started."""
    priced_at_ns: int
    """The moment it was priced at: when its call came."""
    key_id: str
    endpoint: str
    conversation: str
    model: str
    usage: Usage
    cost_nanousd: int
    family: str = ""
    prefix: str = ""
    prefix_tokens: int = 0
    """In tokens of the row's model: an estimate, or what Anthropic counted once it had."""
    max_tokens: int = 0
    digest: str = ""
    complete: bool = True
    """Answered whole: what reuse may keep, and whose cost is exact."""
    tier: str = ""
    streamed: bool = False
    first_byte_ms: int = 0
    """From the attempt's start."""
    total_ms: int = 0
    reused: bool = False
    reused_nanousd: int = 0
    """What the answer had cost that was given back."""


class Policy(Record, frozen=True):
    """What to change. None, and 0 for the batches: as it was."""

    model: str | None = None
    ttl: Ttl | None = None
    """Of shared prefixes; the ends of conversations are kept for 5 minutes, as the gateway marks them."""
    cache: bool | None = None
    batch_share: Fraction = Fraction(0)
    """0 to 1, of the calls that a batch can take."""
    batch_endpoints: frozenset[str] = frozenset()
    """Labels whose streamed calls could go into a batch too."""
    reuse: bool | None = None
    reuse_ttl_s: int = 3_600
    reuse_endpoints: frozenset[str] = frozenset()
    """Labels whose answers are reused; empty: all."""
    text: Text = "english"
    """What most of the prompts are written in: decides what another tokenizer makes of them."""
    wait_s: float = 0.0
    """How long a call may wait for another that writes its prefix (`cache.single_flight_wait_s`). It only counts for
    calls that were recorded without caching: the others already waited, or did not."""


AS_RECORDED = Policy()


class Tokens(Record, frozen=True):
    """Sums over calls, by kind."""

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0


class Side(Record, frozen=True):
    """One side of the comparison."""

    tokens: Tokens
    cost_nanousd: int


class ModelLine(Record, frozen=True):
    """The calls that one model answered, and what they would have been."""

    model: str
    requests: int
    recorded: Side
    projected: Side


class Break(Record, frozen=True):
    """What the policy would break, or what is not known of it."""

    code: BreakCode
    calls: int
    """How many; 0: a matter of the model, not of calls."""
    message: str


class Projection(Record, frozen=True):
    """The bill as it was and as it would be."""

    requests: int
    recorded: Side
    projected: Side
    by_model: tuple[ModelLine, ...]
    """The dearest as recorded first."""
    batched: int
    reused: int
    breaks: tuple[Break, ...]

    @property
    def saved_nanousd(self) -> int:
        """Below 0 when it would be dearer."""
        return self.recorded.cost_nanousd - self.projected.cost_nanousd


class _Entry(msgspec.Struct, gc=False):
    """What the cache holds of one prefix."""

    usable_ns: int
    expires_ns: int
    tokens: int
    ttl: Ttl


class _Answer(msgspec.Struct, frozen=True, gc=False):
    """An answer that may be given again."""

    usage: Usage
    model: str
    from_ns: int
    until_ns: int


class _TurnCounts(msgspec.Struct):
    """Of a key and endpoint: first and later turns of conversations, and how many of each another followed in time."""

    first: int = 0
    first_went_on: int = 0
    later: int = 0
    later_went_on: int = 0


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_NUMBERS = 6
"""Five kinds of tokens and the cost."""


class _Sums(msgspec.Struct):
    requests: int = 0
    recorded: list[int] = msgspec.field(default_factory=lambda: [0] * _NUMBERS)
    projected: list[int] = msgspec.field(default_factory=lambda: [0] * _NUMBERS)


class Replay:
    """One policy over rows that come in the order of their `at_ns`. `add` them all, then ask for the `projection`."""

    def __init__(self, policy: Policy, catalog: Catalog, *, since_ns: int, now_ns: int) -> None:
        """Rows before `since_ns` only warm the cache; `now_ns` decides which model can be called.

        Raises ValueError for a share that is not between 0 and 1.
        """
        if not 0 <= policy.batch_share <= 1:
            raise ValueError("a share is between 0 and 1")
        self._policy = policy
        self._catalog = catalog
        self._since_ns = since_ns
        self._now_ns = now_ns
        self._target = None if policy.model is None else catalog.resolve(policy.model)
        self._sums: dict[str, _Sums] = {}
        self._breaks: dict[BreakCode, int] = {}
        self._shared: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._turns: OrderedDict[tuple[str, str, str], _Entry] = OrderedDict()
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()
        self._ttl_seen: OrderedDict[str, tuple[Ttl, Ttl]] = OrderedDict()
        self._lengths: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._last_turn: OrderedDict[tuple[str, str], tuple[int, bool]] = OrderedDict()
        self._turns_of: OrderedDict[tuple[str, str], _TurnCounts] = OrderedDict()
        self._ratios: dict[str, Fraction] = {}
        self._eligible = self._batched = self._reused = 0
        self._last_ns = -(1 << 63)
        self._from_models: set[str] = set()

    def add(self, row: ReplayRow) -> None:
        """The next row. Raises ValueError when it is older than the one before."""
        if row.at_ns < self._last_ns:
            raise ValueError("rows come in the order of their time")
        self._last_ns = row.at_ns
        counts = row.at_ns >= self._since_ns
        model = self._asked(row)
        if row.reused or not row.usage.prompt_tokens:
            usage, cost_nanousd = self._without_answer(row, counts=counts)
        elif self._is_repeated(row):
            usage, cost_nanousd = NO_USAGE, 0
            self._reused += counts
        else:
            usage, cost_nanousd = self._answered(row, model, counts=counts)
            self._keep_answer(row)
        if counts:
            self._count(row, usage, cost_nanousd)

    def projection(self) -> Projection:
        """The bill of all rows so far."""
        lines = [
            ModelLine(name, sums.requests, _side(sums.recorded), _side(sums.projected))
            for name, sums in self._sums.items()
        ]
        lines.sort(key=lambda line: (-line.recorded.cost_nanousd, line.model))
        columns = [[0] * _NUMBERS, *(sums.recorded for sums in self._sums.values())]
        projected = [[0] * _NUMBERS, *(sums.projected for sums in self._sums.values())]
        return Projection(
            requests=sum(line.requests for line in lines),
            recorded=_side([sum(column) for column in zip(*columns, strict=True)]),
            projected=_side([sum(column) for column in zip(*projected, strict=True)]),
            by_model=tuple(lines),
            batched=self._batched,
            reused=self._reused,
            breaks=tuple(self._told()),
        )

    # one row

    def _asked(self, row: ReplayRow) -> str:
        """The model that is asked under the policy: an id of the catalogue, or what the row says where it has none."""
        if self._policy.model is not None:
            return self._policy.model if self._target is None else self._target.id
        known = self._catalog.resolve(row.model)
        return row.model if known is None else known.id

    def _without_answer(self, row: ReplayRow, *, counts: bool) -> tuple[Usage, int]:
        """A row that has no tokens: an attempt that cost nothing, or an answer that was given back."""
        if not row.reused:
            return row.usage, row.cost_nanousd
        if self._policy.reuse is not False:
            self._reused += counts
            return NO_USAGE, 0
        original = self._answers.get((row.key_id, row.digest))
        if original is None:
            self._break("reused_unknown", counts=counts)
            return NO_USAGE, row.reused_nanousd
        again = msgspec.structs.replace(row, usage=original.usage, model=original.model, reused=False, cost_nanousd=-1)
        return self._answered(again, self._asked(again), counts=counts)

    def _answered(self, row: ReplayRow, model: str, *, counts: bool) -> tuple[Usage, int]:
        """Usage and cost of a call that Anthropic answers."""
        known = self._catalog.resolve(row.model)
        changes_model = model != (row.model if known is None else known.id)
        if changes_model:
            self._from_models.add(row.model if known is None else known.id)
        policy, usage = self._policy, row.usage
        keeps_usage = not changes_model and policy.ttl is None and policy.cache is None and row.cost_nanousd >= 0
        if not keeps_usage:
            usage = self._usage(row, model, counts=counts)
        is_batched = self._goes_into_a_batch(row, counts=counts)
        if is_batched:
            usage = msgspec.structs.replace(usage, service_tier="batch")
        if row.cost_nanousd == 0 or (keeps_usage and not is_batched):
            return usage, row.cost_nanousd  # 0: a refusal, which would not be billed either
        if counts:
            self._judge(row, usage, model)
        return usage, price(usage, model, self._priced_at_ns(row, model), self._catalog).cost_nanousd

    def _priced_at_ns(self, row: ReplayRow, model: str) -> int:
        """A model that was not sold yet has the price it came with."""
        known = self._catalog.resolve(model)
        return row.priced_at_ns if known is None else max(row.priced_at_ns, day_start_ns(known.released))

    def _count(self, row: ReplayRow, usage: Usage, cost_nanousd: int) -> None:
        sums = self._sums.get(row.model)
        if sums is None:
            sums = self._sums[row.model] = _Sums()
        sums.requests += 1
        _add(sums.recorded, row.usage, row.cost_nanousd)
        _add(sums.projected, usage, cost_nanousd)

    # the cache

    def _usage(self, row: ReplayRow, model: str, *, counts: bool) -> Usage:
        """The tokens of a call, as this model counts them and the cache of this policy serves them."""
        ratio = self._ratio(row.model, model)
        recorded = row.usage
        output_tokens = scaled(recorded.output_tokens, ratio)
        if recorded.iterations:
            self._break("several_passes", counts=counts)
            passes = tuple(self._pass(one, model, ratio) for one in recorded.iterations)
            return msgspec.structs.replace(recorded, iterations=passes, output_tokens=output_tokens)
        prompt = scaled(recorded.prompt_tokens, ratio)
        read, write_5m, write_1h = self._through_the_cache(row, model, prompt, ratio, counts=counts)
        return Usage(
            input_tokens=prompt - read - write_5m - write_1h,
            cache_read_tokens=read,
            cache_write_5m_tokens=write_5m,
            cache_write_1h_tokens=write_1h,
            output_tokens=output_tokens,
            thinking_tokens=scaled(recorded.thinking_tokens, ratio),
            web_search_requests=recorded.web_search_requests,
            service_tier=recorded.service_tier,
            speed=recorded.speed,
            inference_geo=recorded.inference_geo,
        )

    def _pass(self, one: IterationUsage, model: str, ratio: Fraction) -> IterationUsage:
        """A pass of several: its tokens by the ratio, its caching as it was, unless there is to be none."""
        prompt = scaled(one.prompt_tokens, ratio)
        read, write_5m, write_1h = (
            (0, 0, 0)
            if self._policy.cache is False
            else self._as_it_was(
                prompt, ratio, one.cache_read_tokens, one.cache_write_5m_tokens, one.cache_write_1h_tokens
            )
        )
        return IterationUsage(
            kind=one.kind,
            model=model if self._policy.model is not None else one.model,
            input_tokens=prompt - read - write_5m - write_1h,
            cache_read_tokens=read,
            cache_write_5m_tokens=write_5m,
            cache_write_1h_tokens=write_1h,
            output_tokens=scaled(one.output_tokens, ratio),
        )

    def _as_it_was(self, prompt: int, ratio: Fraction, read: int, write_5m: int, write_1h: int) -> tuple[int, int, int]:
        """The caching that was recorded, in tokens of this model, and at the policy's TTL."""
        read = min(scaled(read, ratio), prompt)
        write_5m = min(scaled(write_5m, ratio), prompt - read)
        write_1h = min(scaled(write_1h, ratio), prompt - read - write_5m)
        if self._policy.ttl == "5m":
            return read, write_5m + write_1h, 0
        if self._policy.ttl == "1h":
            return read, 0, write_5m + write_1h
        return read, write_5m, write_1h

    def _through_the_cache(
        self, row: ReplayRow, model: str, prompt: int, ratio: Fraction, *, counts: bool
    ) -> tuple[int, int, int]:
        """Tokens that are read, and written for 5 minutes and for an hour; and what that leaves in the cache."""
        recorded, policy = row.usage, self._policy
        was_marked = recorded.prompt_tokens - recorded.input_tokens
        known = self._catalog.resolve(model)
        minimum = known.cache_min_tokens if known is not None else _CACHE_MIN_TOKENS_UNKNOWN
        if policy.cache is False:
            return 0, 0, 0
        if was_marked and not row.prefix:
            # A ledger from before prefixes were noted: how it was shared cannot be known, so it stays.
            if scaled(was_marked, ratio) < minimum:
                self._break("below_cache_minimum", counts=counts)
                return 0, 0, 0
            return self._as_it_was(
                prompt,
                ratio,
                recorded.cache_read_tokens,
                recorded.cache_write_5m_tokens,
                recorded.cache_write_1h_tokens,
            )
        shared = min(self._shared_tokens(row, was_marked, ratio), prompt)
        if not was_marked and not row.prefix:
            return 0, 0, 0
        # A prefix that did not pay to be marked may pay at another TTL.
        is_new = policy.cache is not None or policy.ttl is not None or self._was_below_minimum(row, shared, ratio)
        if not was_marked and not is_new:
            return 0, 0, 0
        marked = min(scaled(was_marked, ratio), prompt) if was_marked else prompt if self._goes_on(row) else shared
        shared = min(shared, marked)
        if marked < minimum:
            self._break("below_cache_minimum", counts=counts)
            return 0, 0, 0
        if shared < minimum:
            shared = 0
        return self._simulate(row, model, shared, marked, wait_ns=0 if was_marked else round(policy.wait_s * 1e9))

    def _simulate(self, row: ReplayRow, model: str, shared: int, marked: int, *, wait_ns: int) -> tuple[int, int, int]:
        shared_ttl, tail_ttl = self._ttls(row)
        prefix = self._shared.get((model, row.prefix))
        key = (model, row.prefix, f"{row.key_id}/{row.conversation}") if row.conversation else None
        turn = self._turns.get(key) if key is not None else None
        read = 0
        if shared and prefix is not None and _is_live(prefix, row.at_ns, wait_ns):
            read = shared
            _refresh(prefix, row.at_ns)
        if turn is not None and turn.tokens <= marked and _is_live(turn, row.at_ns, wait_ns):
            read = max(read, turn.tokens)
            _refresh(turn, row.at_ns)
        written = {"5m": 0, "1h": 0}
        usable_ns = row.at_ns + row.first_byte_ms * 1_000_000
        if shared > read:
            written[shared_ttl] += shared - read
            _write(self._shared, (model, row.prefix), row.at_ns, usable_ns, shared, shared_ttl)
        if marked > max(shared, read):
            written[tail_ttl] += marked - max(shared, read)
            if key is not None:
                _write(self._turns, key, row.at_ns, usable_ns, marked, tail_ttl)
        return read, written["5m"], written["1h"]

    def _shared_tokens(self, row: ReplayRow, was_marked: int, ratio: Fraction) -> int:
        """How long the shared prefix is, in tokens of the model that is asked: as was seen, or else by estimate."""
        if not row.prefix:
            return 0
        seen = row.usage.cache_read_tokens if row.conversation else was_marked
        if row.conversation and row.prefix_tokens and seen > READ_OF_PREFIX_MAX * row.prefix_tokens:
            seen = 0  # what was read is the turn before
        key = (row.model, row.prefix)
        known = self._lengths.get(key)
        if seen and (known is None or seen < known):
            # What was read reaches at least to the first mark and perhaps further: the least that was ever seen is it.
            known = seen
            _remember(self._lengths, key, seen)
        if known is not None:
            return scaled(known, ratio)
        return scaled(row.prefix_tokens, ratio)

    def _was_below_minimum(self, row: ReplayRow, shared: int, ratio: Fraction) -> bool:
        """Whether it could not be cached by the model that answered, so that another may."""
        known = self._catalog.resolve(row.model)
        return known is not None and 0 < shared / ratio < known.cache_min_tokens

    def _goes_on(self, row: ReplayRow) -> bool:
        """Whether a turn is marked at its end: when such turns were followed by another often enough to pay for it."""
        if not row.conversation:
            return False
        key = (row.key_id, row.conversation)
        last = self._last_turn.get(key)
        turns = self._turns_of.get((row.key_id, row.endpoint))
        if turns is None:
            turns = _TurnCounts()
            _remember(self._turns_of, (row.key_id, row.endpoint), turns)
        if last is not None and row.at_ns - last[0] < TTL_NS["5m"]:
            turns.later_went_on += last[1]
            turns.first_went_on += not last[1]
        turns.later += last is not None
        turns.first += last is None
        _remember(self._last_turn, key, (row.at_ns, last is not None))
        if last is None:
            return turns.first > FIRST_TURNS_MIN and turns.first_went_on >= GOES_ON_SHARE * turns.first
        return turns.later_went_on + 1 >= GOES_ON_SHARE * turns.later

    def _ttls(self, row: ReplayRow) -> tuple[Ttl, Ttl]:
        """Of the shared prefix and of what comes after it. Where the policy leaves them: as its calls were seen to
        write, 5 minutes until one was seen."""
        if self._policy.ttl is not None:
            return self._policy.ttl, "5m"
        used = row.usage
        known = self._ttl_seen.get(row.prefix, ("5m", "5m"))
        seen = known
        if used.cache_write_1h_tokens:
            seen = ("1h", "5m" if used.cache_write_5m_tokens else "1h")
        elif used.cache_write_5m_tokens:
            seen = (known[0] if used.cache_read_tokens else "5m", "5m")
        if seen != known:
            _remember(self._ttl_seen, row.prefix, seen)
        return seen

    # batches and answers

    def _goes_into_a_batch(self, row: ReplayRow, *, counts: bool) -> bool:
        share, used = self._policy.batch_share, row.usage
        if not share or used.service_tier == "batch":
            return False
        if row.streamed and row.endpoint not in self._policy.batch_endpoints:
            self._break("not_batchable", counts=counts)
            return False
        if used.speed != "standard":
            return False
        self._eligible += 1
        chosen = self._eligible * share // 1 > (self._eligible - 1) * share // 1
        self._batched += chosen and counts
        return chosen

    def _is_repeated(self, row: ReplayRow) -> bool:
        policy = self._policy
        if not policy.reuse or not row.digest:
            return False
        if policy.reuse_endpoints and row.endpoint not in policy.reuse_endpoints:
            return False
        answer = self._answers.get((row.key_id, row.digest))
        return answer is not None and answer.from_ns <= row.at_ns < answer.until_ns

    def _keep_answer(self, row: ReplayRow) -> None:
        if self._policy.reuse is None or not row.digest or not row.complete:
            return
        key, from_ns = (row.key_id, row.digest), row.at_ns + row.total_ms * 1_000_000
        kept = self._answers.get(key)
        if self._policy.reuse and kept is not None and row.at_ns < kept.until_ns:
            return
        until_ns = from_ns + self._policy.reuse_ttl_s * 10**9
        _remember(self._answers, key, _Answer(row.usage, row.model, from_ns, until_ns))

    # what breaks

    def _judge(self, row: ReplayRow, usage: Usage, model: str) -> None:
        """Count what a call would meet that is asked of a model it was not asked of, or priced anew."""
        known = self._catalog.resolve(model)
        if known is None or model == row.model:
            return
        prompt = usage.prompt_tokens
        self._break("context_too_small", counts=prompt > known.context_tokens)
        self._break("output_too_long", counts=row.max_tokens > known.max_output_tokens)
        self._break("answer_cut", counts=0 < row.max_tokens < usage.output_tokens)
        band = self._catalog.price_row(model, self._priced_at_ns(row, model), usage.speed, prompt)
        self._break("fast_not_sold", counts=band.assumed)
        self._break("dearer_band", counts=not band.id.endswith("/0"))

    def _break(self, code: BreakCode, *, counts: bool) -> None:
        if counts:
            self._breaks[code] = self._breaks.get(code, 0) + 1

    def _told(self) -> list[Break]:
        told: list[Break] = []
        if self._policy.model is not None:
            told += self._told_of_the_model(self._policy.model, self._target)
        name = "the model" if self._target is None else self._target.id
        for code, calls in self._breaks.items():
            text = _BREAKS[code].format(
                model=name, calls=f"{calls:,}", context=self._target.context_tokens if self._target else 0
            )
            told.append(Break(code, calls, text))
        return told

    def _told_of_the_model(self, asked: str, target: Model | None) -> list[Break]:
        if target is None:
            return [
                Break("unknown_model", 0, f"{asked} is not in the catalogue: priced as the dearest model of the day")
            ]
        told: list[Break] = []
        if target.retires_at is not None:
            is_gone = self._now_ns >= day_start_ns(target.retires_at)
            told.append(
                Break("retired_model", 0, f"{target.id} was retired on {target.retires_at}: it answers 404")
                if is_gone
                else Break("retires_soon", 0, f"{target.id} retires on {target.retires_at}")
            )
        came_from = [model for name in self._from_models if (model := self._catalog.resolve(name)) is not None]
        rejects = sorted({reject for model in came_from for reject in _rejects(model, target)})
        if rejects:
            told.append(
                Break(
                    "parameters_unknown",
                    0,
                    f"{target.id} rejects or rewrites what the models of before take ({', '.join(rejects)}); the "
                    "ledger does not know which calls send it",
                )
            )
        return told

    def _ratio(self, row_model: str, model: str) -> Fraction:
        """Both names the catalogue's or not; what it does not know has the tokenizer of the other."""
        ratio = self._ratios.get(row_model)
        if ratio is None:
            before, after = self._catalog.resolve(row_model), self._catalog.resolve(model)
            ratio = Fraction(1) if before is None or after is None else tokens_ratio(self._policy.text, before, after)
            self._ratios[row_model] = ratio
        return ratio


_CACHE_MIN_TOKENS_UNKNOWN = 4096
"""Of a model the catalogue does not know: the highest of those it does."""

_BREAKS: dict[BreakCode, str] = {
    "context_too_small": "{calls} prompts do not fit {model} ({context:,} tokens)",
    "output_too_long": "{calls} calls ask for more output (max_tokens) than {model} gives",
    "answer_cut": "{calls} answers would reach their max_tokens: the same text is more tokens for {model}",
    "dearer_band": "{calls} prompts are so long that {model} costs more for each token of them",
    "below_cache_minimum": "{calls} calls lose caching, or never had it: what is marked is below the model's minimum",
    "not_batchable": "{calls} calls are streamed and cannot go into a batch; name their endpoint if nobody waits",
    "fast_not_sold": "{calls} calls ask for a speed that {model} is not sold at; priced as the dearest of the day",
    "several_passes": "{calls} calls took several passes (compaction, advisor): their caching is kept as recorded",
    "reused_unknown": "{calls} reused answers are older than these rows: priced at what they had saved",
}


def _rejects(before: Model, after: Model) -> list[str]:
    """What a body for `before` may hold that `after` does not take (claude-api §2.4)."""
    order = ("none", "one", "any")
    found = []
    if order.index(after.sampling) < order.index(before.sampling):
        found.append("temperature, top_p, top_k")
    if set(before.thinking) - set(after.thinking):
        found.append("thinking: " + "|".join(sorted(set(before.thinking) - set(after.thinking))))
    if set(before.efforts) - set(after.efforts):
        found.append("effort: " + "|".join(sorted(set(before.efforts) - set(after.efforts))))
    if before.prefill and not after.prefill:
        found.append("a last message of the assistant")
    if before.forced_tool_choice and not after.forced_tool_choice:
        found.append("a forced tool_choice")
    return found


def _is_live(entry: _Entry, at_ns: int, wait_ns: int) -> bool:
    return entry.usable_ns <= at_ns + wait_ns and at_ns < entry.expires_ns


def _refresh(entry: _Entry, at_ns: int) -> None:
    entry.expires_ns = max(entry.expires_ns, at_ns + TTL_NS[entry.ttl])


def _write(entries: OrderedDict[_Key, _Entry], key: _Key, at_ns: int, usable_ns: int, tokens: int, ttl: Ttl) -> None:
    """An entry that lives from the start of its writer. Of several writers at once the first to answer makes it
    usable."""
    entry = entries.get(key)
    if entry is not None and at_ns < entry.expires_ns and entry.tokens == tokens:
        usable_ns = min(usable_ns, entry.usable_ns)
    _remember(entries, key, _Entry(usable_ns, at_ns + TTL_NS[ttl], tokens, ttl))


def _remember(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > ENTRIES_MAX:
        kept.popitem(last=False)


def _add(sums: list[int], usage: Usage, cost_nanousd: int) -> None:
    sums[0] += usage.input_tokens
    sums[1] += usage.cache_read_tokens
    sums[2] += usage.cache_write_5m_tokens
    sums[3] += usage.cache_write_1h_tokens
    sums[4] += usage.output_tokens
    sums[5] += cost_nanousd


def _side(sums: list[int]) -> Side:
    return Side(Tokens(*sums[:5]), sums[5])
