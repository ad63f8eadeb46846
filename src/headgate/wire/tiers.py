"""Anthropic's usage tiers: requests, input and output tokens a minute that each gives an organization, by model line.

What it is: the published tables as data, with where and when they were read, and the look-up of a row. What it is not:
what holds for you. An organization's own limits are on its Console's limits page and in the `anthropic-ratelimit-*`
headers of every answer; those win wherever they are known.

Sources (claude-api §6.2): `start`, `build` and `scale` hold since 2026-06-26, docs "rate limits", read 2026-08-22.
`tier1` to `tier4` held from August 2025 to that day; their rows come from third parties' copies (hivebook.wiki), which
agree with excerpts of the docs of their time. Of Haiku only the first and last of the old tiers are published; the two
between are interpolated. The rows of models since Opus 5.5 are not published one by one, and assumed equal.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

TierName = Literal["tier1", "tier2", "tier3", "tier4", "start", "build", "scale"]
TIER_NAMES: tuple[TierName, ...] = get_args(TierName)


class TierLimits(msgspec.Struct, frozen=True, gc=False):
    """Of one model class, a minute. Cache reads do not count as input; `max_tokens` does not count as output."""

    rpm: int
    itpm: int
    otpm: int


_MOST_LINES: dict[TierName, TierLimits] = {
    "tier1": TierLimits(50, 30_000, 8_000),
    "tier2": TierLimits(1_000, 450_000, 90_000),
    "tier3": TierLimits(2_000, 800_000, 160_000),
    "tier4": TierLimits(4_000, 2_000_000, 400_000),
    "start": TierLimits(1_000, 2_000_000, 400_000),
    "build": TierLimits(5_000, 5_000_000, 1_000_000),
    "scale": TierLimits(10_000, 10_000_000, 2_000_000),
}
_HAIKU: dict[TierName, TierLimits] = {
    "tier1": TierLimits(50, 50_000, 10_000),
    "tier2": TierLimits(1_000, 450_000, 90_000),
    "tier3": TierLimits(2_000, 1_000_000, 200_000),
    "tier4": TierLimits(4_000, 4_000_000, 800_000),
}
_FABLE: dict[TierName, TierLimits] = {
    "start": TierLimits(1_000, 500_000, 100_000),
    "build": TierLimits(2_000, 1_500_000, 300_000),
    "scale": TierLimits(4_000, 4_000_000, 800_000),
}
_BY_LINE = {"haiku": _HAIKU, "fable": _FABLE, "mythos": _FABLE}

_COUNT_TOKENS_RPM: dict[TierName, int] = {"start": 2_000, "build": 4_000, "scale": 8_000}
_COUNT_TOKENS_RPM_OLD = 2_000
"""Of the old tiers none is known; the least that any known tier has."""


def tier_limits(tier: TierName, line: str) -> TierLimits:
    """The row of a tier for a model line (`Model.line`); a line without a row of its own has that of most lines."""
    return _BY_LINE.get(line, _MOST_LINES).get(tier) or _MOST_LINES[tier]


def count_tokens_rpm(tier: TierName) -> int:
    """Calls of `count_tokens` a minute, which are limited apart from messages."""
    return _COUNT_TOKENS_RPM.get(tier, _COUNT_TOKENS_RPM_OLD)
