"""Token counts of one answer, by kind, as Anthropic bills them.

What it is: the shape of `usage`, its reading from JSON, and how the two places where a stream reports it are joined.
What it is not: money (see `policy/pricing.py`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

TOKENS_MAX = 1_000_000_000
"""A thousand of the largest contexts: a count above it is an error, and money computed from it fits 64 bits."""


class UsageError(ValueError):
    """A usage object that is not JSON, or holds a count that is negative, not whole or above `TOKENS_MAX`."""


class IterationUsage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One entry of `usage.iterations`: a model pass that is billed at its own model's price.

    `kind` is Anthropic's `type`: `message`, `compaction`, `advisor_message` or `fallback_message`
    (claude-api §3.4). `model` is empty when the entry names none: then the answer's model applies.
    """

    kind: str = "message"
    model: str = ""
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Input, cache reads and cache writes together: what a price band is chosen by."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Tokens of one attempt. All counts are ≥ 0.

    `input_tokens` are those after the last cache breakpoint only; the prompt's length is `prompt_tokens`.
    `output_tokens` include `thinking_tokens`. When `iterations` is not empty every entry is priced on its own
    and the top level is not (claude-api §3.4).
    """

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    thinking_tokens: int = 0
    web_search_requests: int = 0
    service_tier: str = "standard"
    speed: str = "standard"
    inference_geo: str = ""
    split_unknown: bool = False
    """True when cache writes (of an iteration, too) came without their whole 5m/1h split; what the split does not
    explain is then counted as 1h, the dearer one."""
    iterations: tuple[IterationUsage, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Input, cache reads and cache writes together: what a price band is chosen by."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens


NO_USAGE = Usage()


Count = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]


class _CacheCreation(msgspec.Struct, frozen=True, gc=False):
    ephemeral_5m_input_tokens: Count | None = None
    ephemeral_1h_input_tokens: Count | None = None


class _OutputDetails(msgspec.Struct, frozen=True, gc=False):
    thinking_tokens: Count | None = None


class _ServerToolUse(msgspec.Struct, frozen=True, gc=False):
    web_search_requests: Count | None = None


class _Iteration(msgspec.Struct, frozen=True, gc=False):
    type: str | None = None
    model: str | None = None
    input_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens: Count | None = None


class _Report(msgspec.Struct, frozen=True, gc=False):
    """`usage` as Anthropic writes it (SDK 2.12.0 `types/usage.py`, `types/beta/beta_usage.py`).

    Every field may be absent or null, and fields that are not here are passed over.
    """

    input_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens: Count | None = None
    output_tokens_details: _OutputDetails | None = None
    server_tool_use: _ServerToolUse | None = None
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None
    iterations: tuple[_Iteration, ...] | None = None


_decoder = msgspec.json.Decoder(_Report)


def decode_usage(raw: bytes | msgspec.Raw) -> Usage:
    """The usage of a whole answer, or of a stream's `message_start`, from the JSON of its `usage` object.

    A field that is absent or null has the default of `Usage`. Raises `UsageError` and nothing else.
    """
    return join_usage(NO_USAGE, raw)


def join_usage(start: Usage, raw_delta: bytes | msgspec.Raw) -> Usage:
    """`start` brought up to date by the JSON of a `message_delta`'s `usage`. Raises `UsageError` and nothing else.

    Counts of a delta are cumulative: each overwrites its field and is never added (claude-api §4.3). A field that is
    absent or null keeps the value it had, `iterations` as a whole. A delta has no 5m/1h split: when it moves the sum of
    cache writes, the 5m part stays as far as it fits, the rest is counted as 1h, and `split_unknown` says so.
    """
    try:
        delta = _decoder.decode(raw_delta)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"usage: {error}") from error
    write_5m, write_1h, split_unknown = _cache_writes(
        delta.cache_creation_input_tokens,
        delta.cache_creation,
        (start.cache_write_5m_tokens, start.cache_write_1h_tokens, start.split_unknown),
    )
    iterations = start.iterations
    if delta.iterations is not None:
        read = [_iteration(entry) for entry in delta.iterations]
        iterations = tuple(iteration for iteration, _ in read)
        split_unknown = split_unknown or any(unknown for _, unknown in read)
    details, tools = delta.output_tokens_details, delta.server_tool_use
    return Usage(
        _later(delta.input_tokens, start.input_tokens),
        _later(delta.cache_read_input_tokens, start.cache_read_tokens),
        write_5m,
        write_1h,
        _later(delta.output_tokens, start.output_tokens),
        start.thinking_tokens if details is None else _later(details.thinking_tokens, start.thinking_tokens),
        start.web_search_requests if tools is None else _later(tools.web_search_requests, start.web_search_requests),
        delta.service_tier or start.service_tier,
        delta.speed or start.speed,
        delta.inference_geo or start.inference_geo,
        split_unknown,
        iterations,
    )


def _later(count: int | None, before: int) -> int:
    return before if count is None else count


def _cache_writes(
    total: int | None, split: _CacheCreation | None, before: tuple[int, int, bool]
) -> tuple[int, int, bool]:
    """Cache writes as (5m, 1h, split unknown). The total is what is billed; the split says at which price."""
    write_5m, write_1h, unknown = before
    if split is not None:
        write_5m, write_1h, unknown = split.ephemeral_5m_input_tokens or 0, split.ephemeral_1h_input_tokens or 0, False
    if total is None or total == write_5m + write_1h:
        return write_5m, write_1h, unknown
    write_5m = min(write_5m, total)
    return write_5m, total - write_5m, True


def _iteration(entry: _Iteration) -> tuple[IterationUsage, bool]:
    write_5m, write_1h, unknown = _cache_writes(entry.cache_creation_input_tokens, entry.cache_creation, (0, 0, False))
    iteration = IterationUsage(
        entry.type or "message",
        entry.model or "",
        entry.input_tokens or 0,
        entry.cache_read_input_tokens or 0,
        write_5m,
        write_1h,
        entry.output_tokens or 0,
    )
    return iteration, unknown
