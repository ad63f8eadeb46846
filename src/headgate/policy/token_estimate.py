"""How many tokens a prompt or an unfinished answer has, before or without Anthropic's word.

No tokenizer of today's models is public: these are characters divided by a rate that depends on the script and on the
generation of the tokenizer (claude-api §9.1), later corrected by real usage. Estimates, and named so.
"""

from __future__ import annotations

from headgate.wire.message import MessageRequest

_SAMPLE_BYTES = 512

_ASCII_CHARS_PER_TOKEN = 3.4
_VIETNAMESE_MIXED_CHARS_PER_TOKEN = 2.0
_VIETNAMESE_DENSE_CHARS_PER_TOKEN = 1.5
_CJK_CHARS_PER_TOKEN = 1.0

DEFAULT_BYTES_PER_TOKEN = 3.4


def input_tokens(request: MessageRequest) -> int:
    """Tokens of the whole prompt, ≥ 1, cached or not: a guess within some tens of percent.

    The script is read off the share of bytes that are not ASCII; text written as `\\uXXXX` escapes is recognised by
    a sample of the body's end.
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
    return max(1, int(chars / _chars_per_token(extra_share)))


def _chars_per_token(extra_share: float) -> float:
    """By bytes beyond one a character: 0 is English or code, Vietnamese lies between, CJK has about 2."""
    if extra_share < 0.02:
        return _ASCII_CHARS_PER_TOKEN
    if extra_share < 0.15:
        return _VIETNAMESE_MIXED_CHARS_PER_TOKEN
    if extra_share < 0.8:
        return _VIETNAMESE_DENSE_CHARS_PER_TOKEN
    return _CJK_CHARS_PER_TOKEN


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
