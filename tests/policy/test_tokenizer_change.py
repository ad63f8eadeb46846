"""Laws of the change of tokenizers: it is undone by the way back, and the published figures come out."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.tokenizer_change import TEXTS, scaled, tokens_ratio
from headgate.wire.catalog import Model, packaged


def model(name: str) -> Model:
    found = packaged().resolve(name)
    assert found is not None
    return found


OLD, OTHER_OLD, NEW = (model(name) for name in ("claude-sonnet-4-6", "claude-haiku-4-5", "claude-sonnet-5-5"))


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back_is_nothing_and_the_newer_never_takes_fewer(text) -> None:
    assert tokens_ratio(text, OLD, NEW) * tokens_ratio(text, NEW, OLD) == 1
    assert 1 <= tokens_ratio(text, OLD, NEW) <= Fraction("1.3")
    assert tokens_ratio(text, OLD, OTHER_OLD) == 1


def test_english_takes_about_thirty_percent_more() -> None:
    assert scaled(8_000, tokens_ratio("english", OLD, NEW)) == 10_118
    assert scaled(8_000, tokens_ratio("cjk", OLD, NEW)) == 8_000


@given(st.integers(0, 10**9), st.sampled_from(TEXTS))
def test_rounding_is_to_the_nearest_and_something_stays_something(tokens, text) -> None:
    ratio = tokens_ratio(text, OLD, NEW)
    assert abs(scaled(tokens, ratio) - tokens * ratio) <= Fraction(1, 2)
    assert (scaled(tokens, 1 / ratio) > 0) == (tokens > 0)
