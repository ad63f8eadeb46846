"""How many tokens the same text is for another model: the two tokenizers, by kind of text.

What it is: one table and a rounding. What it is not: a count. No tokenizer is public; the rates are those of
claude-api §9.1 (characters a token, before 4.7 and since), which agree with Anthropic's "about 30 % more" for English.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, get_args

from headgate.wire.catalog import Model

Text = Literal["english", "code", "json", "mixed", "vietnamese", "cjk"]
"""What prompts and answers are written in; `mixed` is Vietnamese among English or code."""
TEXTS: tuple[Text, ...] = get_args(Text)

_CHARS_PER_TOKEN: dict[Text, tuple[Fraction, Fraction]] = {
    "english": (Fraction("4.3"), Fraction("3.4")),
    "code": (Fraction("3.6"), Fraction("3.0")),
    "json": (Fraction("2.9"), Fraction("2.4")),
    "mixed": (Fraction("2.3"), Fraction("2.0")),
    "vietnamese": (Fraction("1.6"), Fraction("1.5")),
    "cjk": (Fraction(1), Fraction(1)),
}
"""Of the tokenizers `pre-4.7` and `opus-4.7`."""


def tokens_ratio(text: Text, before: Model, after: Model) -> Fraction:
    """Tokens of a text for `after`, for each that it is for `before`. 1 where both have one tokenizer."""
    if before.tokenizer == after.tokenizer:
        return Fraction(1)
    old, new = _CHARS_PER_TOKEN[text]
    return old / new if after.tokenizer == "opus-4.7" else new / old


def scaled(tokens: int, ratio: Fraction) -> int:
    """That many tokens, by the ratio, rounded to the nearest; something never becomes nothing."""
    if ratio == 1 or not tokens:
        return tokens
    return max(1, (2 * tokens * ratio.numerator + ratio.denominator) // (2 * ratio.denominator))
