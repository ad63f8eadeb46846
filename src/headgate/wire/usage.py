"""Token counts of one answer, by kind, as Anthropic bills them.

What it is: the shape of `usage` and how the two places where a stream reports it are joined.
What it is not: money (see `policy/pricing.py`).
"""

from __future__ import annotations

import msgspec


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
    """True when cache writes came without their 5m/1h split; they are then counted as 1h, the dearer one."""
    iterations: tuple[IterationUsage, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Input, cache reads and cache writes together: what a price band is chosen by."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens


NO_USAGE = Usage()
