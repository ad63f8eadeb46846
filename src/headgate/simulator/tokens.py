"""How many tokens a text is: an estimate by kind of text, because Anthropic publishes no tokenizer for Claude 3 and
later.

The same estimate serves count_tokens, the bill and the rate limiter, so the simulated API always agrees with itself.
"""

import math
import re
from typing import Literal

from headgate.simulator.models import Tokenizer

Kind = Literal["prose", "code", "markup", "vietnamese_mixed", "vietnamese", "cjk"]

CHARS_PER_TOKEN: dict[Tokenizer, dict[Kind, float]] = {
    "old": {"prose": 4.3, "code": 3.6, "markup": 2.9, "vietnamese_mixed": 2.3, "vietnamese": 1.6, "cjk": 1.0},
    "new": {"prose": 3.4, "code": 3.0, "markup": 2.4, "vietnamese_mixed": 2.0, "vietnamese": 1.5, "cjk": 1.0},
}
"""Measured with the tokenizer of Claude 2 and, for the newer models, published count_tokens probes; the Vietnamese
values of current models are a guess between the two.
"""

MESSAGE_TOKENS = 4
REQUEST_TOKENS = 8
IMAGE_TOKENS: dict[Tokenizer, int] = {"old": 1_568, "new": 4_784}
"""The most one image costs after downscaling (docs: vision); the simulator does not decode images."""
DOCUMENT_TOKENS = 3_000
"""A page of PDF with its image (docs: PDF support says 1,500 to 3,000); the simulator does not count pages."""

MARKUP_SHARE = 0.12
CODE_SHARE = 0.05
CJK_SHARE = 0.3
VIETNAMESE_SHARE = 0.14
VIETNAMESE_MIXED_SHARE = 0.02

_MARKUP = '{}[]":<>'
_CODE = "();=_"
_CJK = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def kind_of(text: str) -> Kind:
    """The class of a text, by its share of telling characters."""
    if not text:
        return "prose"
    length = len(text)
    if not text.isascii():
        if sum(1 for _ in _CJK.finditer(text)) > CJK_SHARE * length:
            return "cjk"
        foreign = length - len(text.encode("ascii", "ignore"))
        if foreign > VIETNAMESE_SHARE * length:
            return "vietnamese"
        if foreign > VIETNAMESE_MIXED_SHARE * length:
            return "vietnamese_mixed"
    if sum(map(text.count, _MARKUP)) > MARKUP_SHARE * length:
        return "markup"
    if sum(map(text.count, _CODE)) > CODE_SHARE * length:
        return "code"
    return "prose"


def chars_per_token(text: str, tokenizer: Tokenizer) -> float:
    """The rate at which `text` turns into tokens, at least 1.0."""
    return CHARS_PER_TOKEN[tokenizer][kind_of(text)]


def count(text: str, tokenizer: Tokenizer) -> int:
    """Tokens of a text, 0 for an empty one."""
    return math.ceil(len(text) / chars_per_token(text, tokenizer))
