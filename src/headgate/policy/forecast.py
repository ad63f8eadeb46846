"""What a call will take of Anthropic's limits, before Anthropic says so: uncached input and output tokens.

What it is: an estimate by characters, drawn to real usage for each model and script (Vietnamese takes twice the tokens
a character that English does), less what the prompt cache will serve, and the output that a model's answers usually
have. What it is not: a bound. Money is reserved by upper bounds (`pricing.py`), rates by what is likely, and corrected.

All memory is bounded; the oldest goes first.
"""

from __future__ import annotations

import zlib
from typing import TypeVar

from headgate.policy.records import Record
from headgate.policy.token_estimate import Script
from headgate.wire.message import MessageRequest
from headgate.wire.usage import Usage

CACHE_TTL_S = 300.0
CACHE_TTL_LONG_S = 3600.0
MARKS_MAX = 8
PREFIXES_MAX = 4096
MODELS_MAX = 256
_WEIGHT = 0.1
_OUTPUT_TOKENS_FIRST = 400.0
"""Until a model's answers have been seen: a chat's answer is some 300 tokens long (claude-api §6.2)."""
_OUTPUT_SHARE = 1.25
"""Of the usual answer that is reserved. What is reserved too much comes back when the answer ends."""
_RATIO_MIN, _RATIO_MAX = 0.1, 10.0

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_MARK = b'"cache_control"'
_CACHED_IN_ORDER = ("tools", "system", "messages")


class Forecast(Record, frozen=True, gc=False):
    """What one call is expected to take. Kept by the caller, to be compared with what it took."""

    input_tokens: int
    """Uncached, which is what Anthropic's ITPM counts."""
    output_tokens: int
    prompt_tokens: int
    """The whole prompt as it was estimated, before any calibration."""
    script: Script
    prefixes: tuple[int, ...]


NO_FORECAST = Forecast(1, 1, 1, "ascii", ())


def uncached(usage: Usage) -> int:
    """The part of a prompt that counts for ITPM: what was read from the cache is free (claude-api §6.1)."""
    return usage.input_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens


class Forecaster:
    """Learns from every answer of a process."""

    __slots__ = ("_outputs", "_prefixes", "_ratios")

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, Script], float] = {}
        self._outputs: dict[str, float] = {}
        self._prefixes: dict[tuple[str, int], tuple[int, float]] = {}

    def forecast(
        self,
        model: str,
        prompt_tokens: int,
        script: Script,
        prefixes: tuple[int, ...],
        max_tokens: int,
        now: float,
        *,
        to_be_read: int = 0,
    ) -> Forecast:
        """Tokens that a call will take; both ≥ 1. `to_be_read` of them another call is about to have cached."""
        whole = prompt_tokens * self._ratios.get((model, script), 1.0)
        cached = self._cached(model, prefixes, now) if prefixes else 0
        cached = max(cached, to_be_read)
        output = self._outputs.get(model, _OUTPUT_TOKENS_FIRST) * _OUTPUT_SHARE
        return Forecast(
            input_tokens=max(1, round(whole) - cached),
            output_tokens=max(1, round(min(output, max_tokens) if max_tokens else output)),
            prompt_tokens=prompt_tokens,
            script=script,
            prefixes=prefixes,
        )

    def began(self, model: str, forecast: Forecast, usage: Usage, now: float) -> None:
        """`message_start`: the prompt's tokens are exact from here on."""
        cached = usage.cache_read_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
        whole = usage.input_tokens + cached
        if whole > 0:
            key = (model, forecast.script)
            seen = min(max(whole / forecast.prompt_tokens, _RATIO_MIN), _RATIO_MAX)
            known = self._ratios.get(key)
            _remember(self._ratios, key, seen if known is None else known + _WEIGHT * (seen - known), MODELS_MAX)
        if cached and forecast.prefixes:
            expires_at = now + (CACHE_TTL_LONG_S if usage.cache_write_1h_tokens else CACHE_TTL_S)
            self._learn_prefixes(model, forecast.prefixes, usage.cache_read_tokens, cached, expires_at)

    def ended(self, model: str, output_tokens: int) -> None:
        """An answer came to its end with this many tokens."""
        known = self._outputs.get(model)
        seen = float(output_tokens)
        _remember(self._outputs, model, seen if known is None else known + _WEIGHT * (seen - known), MODELS_MAX)

    def _cached(self, model: str, prefixes: tuple[int, ...], now: float) -> int:
        """Tokens that the longest known prefix holds in Anthropic's cache."""
        for prefix in reversed(prefixes):
            known = self._prefixes.get((model, prefix))
            if known is not None and known[1] > now:
                return known[0]
        return 0

    def _learn_prefixes(self, model: str, prefixes: tuple[int, ...], read: int, cached: int, expires_at: float) -> None:
        for prefix in prefixes[:-1] if read else ():
            # What was read reaches at least to the first mark and perhaps further: the least that was ever seen is it.
            known = self._prefixes.get((model, prefix))
            _remember(
                self._prefixes, (model, prefix), (min(read, known[0]) if known else read, expires_at), PREFIXES_MAX
            )
        _remember(self._prefixes, (model, prefixes[-1]), (cached, expires_at), PREFIXES_MAX)


def prefixes(request: MessageRequest) -> tuple[int, ...]:
    """One number for what stands before each of the cache marks, in their order; empty without marks.

    The order is Anthropic's (tools, system, messages) and not that of the body, where an SDK may write the messages
    first. A checksum: two prefixes that collide make a wrong guess of a rate, and nothing else.
    """
    if _MARK not in request.body:
        return ()
    found: list[int] = []
    checksum = length = 0
    for name in _CACHED_IN_ORDER:
        field = request.raw(name)
        if field is None:
            continue
        start, at = 0, field.find(_MARK)
        while at >= 0 and len(found) < MARKS_MAX:
            checksum = zlib.crc32(field[start:at], checksum)
            found.append(checksum << 32 | length + at)
            start = at
            at = field.find(_MARK, at + len(_MARK))
        checksum = zlib.crc32(field[start:], checksum)
        length += len(field)
    return tuple(found)


def _remember(table: dict[_Key, _Value], key: _Key, value: _Value, entries_max: int) -> None:
    table.pop(key, None)
    if len(table) >= entries_max:
        del table[next(iter(table))]
    table[key] = value
