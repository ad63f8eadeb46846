"""The one line of JSON each call leaves behind, written at its end whatever happened.

What it is: record 10 of a request; metrics and exports are views of it. It holds no prompt text and no key.
Every field is explained in docs/log-fields.md, and a test holds that page to this file.
"""

from __future__ import annotations

import re

import msgspec


class LogLine(msgspec.Struct, frozen=True, gc=False):
    """One call. Times in milliseconds, money in nano-dollars, tokens as billed."""

    event: str
    ts: str
    call_id: str
    key_id: str
    user_id: str
    tier: str
    endpoint: str
    conversation: str = ""
    model_asked: str = ""
    model: str = ""
    arm: str = ""
    streamed: bool = False
    status: int = 0
    outcome: str = ""
    error_code: str = ""
    failure: str = ""
    reasons: tuple[str, ...] = ()
    attempts: int = 0
    retry_count: int = 0
    queue_ms: int = 0
    first_byte_ms: int | None = None
    total_ms: int = 0
    input_tokens_estimate: int = 0
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False
    cost_nanousd: int = 0
    saved_nanousd: int = 0
    stop_reason: str = ""
    upstream_request_id: str = ""
    family: str = ""
    reused: bool = False


_encoder = msgspec.json.Encoder()
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\x8e\x8f\xa8-\xae]|\xe2\x81[\xa6-\xa9]")
"""What JSON does not ask to be escaped and readers of lines take for an end or a command: DEL, C1 with its line end and
its CSI, U+2028 and U+2029 (failure-model §2.3), and those that turn the reading direction round."""


def encode(line: LogLine) -> bytes:
    """The line as JSON with its line feed: one call is one line, and none speaks to a terminal."""
    data = _encoder.encode(line) + b"\n"
    if data.isascii() and b"\x7f" not in data:
        return data
    return _CONTROLS.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), data)
