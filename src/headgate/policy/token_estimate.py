"""How many tokens a prompt or an unfinished answer has, before or without Anthropic's word.

No tokenizer of today's models is public: these are characters divided by a rate that depends on the script and on the
generation of the tokenizer (claude-api §9.1), later corrected by real usage. Estimates, and named so.
"""

from __future__ import annotations

import re
from typing import Literal

from headgate.wire.message import MessageRequest

Script = Literal["ascii", "mixed", "dense", "cjk"]
"""What the text is written in, as far as it matters: a token of English is 3.4 characters, of Vietnamese 1.5 to 2."""

_SAMPLE_BYTES = 512

_CHARS_PER_TOKEN: dict[Script, float] = {"ascii": 3.4, "mixed": 2.0, "dense": 1.5, "cjk": 1.0}
"""`mixed` is Vietnamese among English or code, `dense` is Vietnamese alone."""

DEFAULT_BYTES_PER_TOKEN = 3.4

_BASE64 = re.compile(rb'"data"\s*:\s*"([A-Za-z0-9+/=\\]{256,})"')
_FILE_TOKENS = 1600
"""Of an image or a page: Anthropic scales images to about 1,568 tokens (claude-api §9.1)."""
_BASE64_BYTES_PER_FILE = 130_000
"""A page of a PDF, roughly; longer data counts as several."""


def input_tokens(request: MessageRequest) -> int:
    """Tokens of the whole prompt, ≥ 1, cached or not: a guess within some tens of percent.

    Images and documents in base64 count by their number and size, not as text.
    """
    chars, extra_share = _measure(request)
    files, file_bytes = 0, 0
    # From the back: a third to a half of what `in` takes, in prose, JSON and base64 alike (measured on CPython 3.11).
    if request.body.rfind(b'"base64"') >= 0:
        for found in _BASE64.finditer(request.body):
            files += 1 + len(found[1]) // _BASE64_BYTES_PER_FILE
            file_bytes += len(found[1])
    text_tokens = int(max(chars - file_bytes, 0) / _CHARS_PER_TOKEN[_script(extra_share)])
    return max(1, text_tokens + files * _FILE_TOKENS)


def script(request: MessageRequest) -> Script:
    """What the prompt is written in."""
    return _script(_measure(request)[1])


def _measure(request: MessageRequest) -> tuple[int, float]:
    """Characters, and bytes beyond one a character as a share of them.

    Text written as `\\uXXXX` escapes is recognised by a sample of the body's end.
    """
    body = request.body
    chars = request.chars
    extra_share = (len(body) - chars) / (chars or 1)
    sample_from = max(len(body) - _SAMPLE_BYTES, 0)
    escapes = body.count(b"\\u", sample_from)
    if escapes:
        sample_chars = len(body) - sample_from - 5 * escapes
        extra_share = max(extra_share, escapes / max(sample_chars, 1))
        chars = int(chars * sample_chars / (len(body) - sample_from))
    return chars, extra_share


def _script(extra_share: float) -> Script:
    """By bytes beyond one a character: 0 is English or code, Vietnamese lies between, CJK has about 2."""
    if extra_share < 0.02:
        return "ascii"
    if extra_share < 0.15:
        return "mixed"
    if extra_share < 0.8:
        return "dense"
    return "cjk"


class OutputCalibration:
    """Bytes of delivered text a token, learned per model from answers that ended whole (failure-model §3.3).

    Bounded: at most `models_max` models are remembered, the oldest goes first.
    """

    __slots__ = ("_bytes_per_token", "_models_max", "_weight")

    def __init__(self, *, weight: float = 0.1, models_max: int = 256) -> None:
        self._weight = weight
        self._models_max = models_max
        self._bytes_per_token: dict[str, float] = {}

    def observe(self, model: str, *, output_bytes: int, output_tokens: int) -> None:
        """An answer ended: this many bytes of text were these many tokens (thinking that was not shown left out)."""
        if output_bytes <= 0 or output_tokens <= 0:
            return
        seen = output_bytes / output_tokens
        known = self._bytes_per_token.get(model)
        if known is None and len(self._bytes_per_token) >= self._models_max:
            del self._bytes_per_token[next(iter(self._bytes_per_token))]
        self._bytes_per_token[model] = seen if known is None else known + self._weight * (seen - known)

    def tokens(self, model: str, output_bytes: int) -> int:
        """Tokens of an answer of which this many bytes were seen; 0 for none, rounded up."""
        return -int(-output_bytes // self._bytes_per_token.get(model, DEFAULT_BYTES_PER_TOKEN))
