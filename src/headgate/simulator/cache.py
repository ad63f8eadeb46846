"""The prompt cache: which prefixes are stored, what a request reads and writes, and when an entry lives.

Rules of docs "prompt caching": writes only at breakpoints, reads by a look back of 20 positions, an entry is usable
once the response that writes it has begun, lives from the start of the last request that used it, and never leaves
its organization and workspace.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from headgate.simulator.prompt import Block, Prompt, Ttl

LOOK_BACK = 20
TTL_S: dict[Ttl, float] = {"5m": 300.0, "1h": 3_600.0}
ENTRIES_MAX = 100_000
NO_HIT = -1


@dataclass(frozen=True, slots=True)
class Scope:
    """Caches of different scopes never meet."""

    organization: str
    workspace: str


@dataclass(frozen=True, slots=True)
class Key:
    """One prefix in one scope; the prefix hash holds the model."""

    scope: Scope
    prefix: bytes


@dataclass(slots=True)
class Entry:
    """What is known of a prefix; kept after it expires, so that cold writes can be counted."""

    model: str
    tokens: int
    ttl: Ttl
    expires_s: float
    cold_writes: int = 0
    reads: int = 0


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What one request reads and writes. `read + write_5m + write_1h + input` is the whole prompt."""

    read_tokens: int
    write_5m_tokens: int
    write_1h_tokens: int
    input_tokens: int
    hits: tuple[Key, ...]
    """Live entries found from each breakpoint, the longest last: the one that is read."""
    writes: tuple[tuple[Key, int, Ttl], ...]
    """Prefix, its tokens and its TTL: entries to store when the response begins."""


class PromptCache:
    """A map of prefixes with an expiry each. Time is an argument: seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Key, Entry] = OrderedDict()

    def look(self, prompt: Prompt, scope: Scope, *, min_tokens: int, now_s: float) -> CacheUse:
        """What the prompt would read and write. Changes nothing; `begin` and `store` do."""
        blocks = prompt.blocks
        marks = [position for position, block in enumerate(blocks) if block.ttl and block.tokens >= min_tokens]
        hits = {self._look_back(blocks, mark, scope, now_s) for mark in marks} - {NO_HIT}
        hit = max(hits, default=NO_HIT)
        read = blocks[hit].tokens if hits else 0
        fresh = [mark for mark in marks if mark > hit]
        hours = [mark for mark in fresh if blocks[mark].ttl == "1h"]
        # A, B and C of the docs: highest hit, last 1h breakpoint after it, last breakpoint.
        after_hour = blocks[hours[-1]].tokens if hours else read
        after_last = blocks[fresh[-1]].tokens if fresh else read
        return CacheUse(
            read_tokens=read,
            write_1h_tokens=after_hour - read,
            write_5m_tokens=after_last - after_hour,
            input_tokens=prompt.tokens - after_last,
            hits=tuple(Key(scope, blocks[position].prefix) for position in sorted(hits)),
            writes=tuple(
                (Key(scope, blocks[mark].prefix), blocks[mark].tokens, blocks[mark].ttl or "5m") for mark in fresh
            ),
        )

    def begin(self, use: CacheUse, *, started_s: float) -> None:
        """Refreshes what an admitted request hits: its entries live from this request's start."""
        for key in use.hits:
            entry = self._entries[key]
            entry.expires_s = max(entry.expires_s, started_s + TTL_S[entry.ttl])
        if use.hits:
            self._entries[use.hits[-1]].reads += 1

    def store(self, use: CacheUse, *, model: str, started_s: float) -> None:
        """Makes the entries of a request usable. Called when its response begins; they live from its start."""
        for key, tokens, ttl in use.writes:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = Entry(model, tokens, ttl, 0.0)
            entry.ttl = ttl
            entry.expires_s = max(entry.expires_s, started_s + TTL_S[ttl])
            entry.cold_writes += 1
            self._entries.move_to_end(key)
        while len(self._entries) > ENTRIES_MAX:
            self._entries.popitem(last=False)

    def entries(self) -> Iterator[tuple[Key, Entry]]:
        """Every prefix ever written and not yet forgotten, oldest write first."""
        return iter(self._entries.items())

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def _look_back(self, blocks: tuple[Block, ...], mark: int, scope: Scope, now_s: float) -> int:
        for position in range(mark, max(mark - LOOK_BACK, -1), -1):
            entry = self._entries.get(Key(scope, blocks[position].prefix))
            if entry is not None and now_s < entry.expires_s:
                return position
        return NO_HIT
