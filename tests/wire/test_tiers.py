"""Laws of the tables of tiers: the rows that were published, and an order that no slip of the pen breaks."""

from itertools import pairwise

import pytest

from headgate.wire.catalog import packaged
from headgate.wire.tiers import TIER_NAMES, TierLimits, count_tokens_rpm, tier_limits

LINES = sorted({model.line for model in packaged().models})
OLD, NEW = ("tier1", "tier2", "tier3", "tier4"), ("start", "build", "scale")


@pytest.mark.parametrize(
    ("tier", "line", "limits"),
    [
        ("tier1", "sonnet", (50, 30_000, 8_000)),
        ("tier2", "sonnet", (1_000, 450_000, 90_000)),  # the article's
        ("tier4", "opus", (4_000, 2_000_000, 400_000)),
        ("tier1", "haiku", (50, 50_000, 10_000)),
        ("tier4", "haiku", (4_000, 4_000_000, 800_000)),
        ("start", "haiku", (1_000, 2_000_000, 400_000)),
        ("scale", "sonnet", (10_000, 10_000_000, 2_000_000)),
        ("start", "fable", (1_000, 500_000, 100_000)),
        ("scale", "mythos", (4_000, 4_000_000, 800_000)),
        ("tier2", "fable", (1_000, 450_000, 90_000)),
    ],
)
def test_a_row_is_the_published_one(tier, line, limits):
    assert tier_limits(tier, line) == TierLimits(*limits)


def test_a_line_that_is_not_known_has_the_row_of_most():
    assert tier_limits("build", "nonesuch") == tier_limits("build", "sonnet")


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("ladder", [OLD, NEW])
def test_a_higher_tier_never_has_less(line, ladder):
    assert {*OLD, *NEW} == set(TIER_NAMES)
    for lower, higher in pairwise(ladder):
        one, other = tier_limits(lower, line), tier_limits(higher, line)
        assert (one.rpm, one.itpm, one.otpm) < (other.rpm, other.itpm, other.otpm)
        assert one.itpm < other.itpm
        assert one.otpm < other.otpm
        assert count_tokens_rpm(lower) <= count_tokens_rpm(higher)


def test_counting_tokens_has_a_limit_of_its_own():
    assert [count_tokens_rpm(tier) for tier in NEW] == [2_000, 4_000, 8_000]
