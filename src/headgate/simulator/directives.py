"""What a request asks of the simulator itself: `[[sim: tokens=200 stop=refusal tool=get_weather error=529
text="…"]]`.

Read, in this order (later wins, key by key), from the start-up default, `metadata.user_id`, the last user message and
the header `x-sim` (there without the brackets). A value with spaces stands in double quotes; `base64:…` is decoded as
UTF-8. Never raises: what cannot be read is ignored, because the text is a prompt, and prompts are free to look like
this.
"""

import base64
import binascii
import re
from dataclasses import dataclass, replace
from typing import Literal

from headgate.simulator.jsonvalue import JsonObject, content_blocks, list_in, object_in, text_in

Stop = Literal[
    "end_turn",
    "max_tokens",
    "refusal",
    "refusal_mid",
    "pause_turn",
    "model_context_window_exceeded",
    "empty",
]
STOPS: frozenset[str] = frozenset(
    ("end_turn", "max_tokens", "refusal", "refusal_mid", "pause_turn", "model_context_window_exceeded", "empty")
)

TOKENS_MAX = 1_000_000

_MARK = re.compile(r"\[\[sim:(.*?)\]\]", re.DOTALL)
_PAIR = re.compile(r'([a-z_0-9]+)=(?:"([^"]*)"|(\S+))')


@dataclass(frozen=True, slots=True)
class Directive:
    """One request's wishes; None leaves the matter to the simulator."""

    tokens: int | None = None
    """Visible output tokens."""
    thinking: int | None = None
    """Thinking tokens, where thinking is in force."""
    stop: Stop | None = None
    category: str | None = None
    """`stop_details.category` of a refusal."""
    tool: str | None = None
    """Name of the tool to call; it must be among the request's tools."""
    input: str | None = None
    """JSON for the tool's input, sent as it is."""
    text: str | None = None
    """The answer, word for word."""
    error: str | None = None
    """A fault kind (`faults.KINDS`) for this request alone."""
    retry_after: str | None = None
    at: int | None = None
    """Byte or event at which the fault strikes, as its kind says."""
    for_s: float | None = None
    ttft_ms: float | None = None
    otps: float | None = None
    ping_ms: float | None = None
    searches: int | None = None
    """Web searches to put into `usage`, and on the bill."""
    batch: str | None = None
    """In a batch: `errored`, `expired` or `canceled`."""


def directive_of(body: JsonObject, header: str | None) -> Directive:
    """The directive of a request whose body is `body`."""
    found = Directive()
    user_id = text_in(object_in(body.get("metadata")).get("user_id"))
    for source in (*_marks(user_id), *_marks(last_user_text(body)), *([header] if header else [])):
        found = _merged(found, source)
    return found


def last_user_text(body: JsonObject) -> str:
    """All text of the last message, if the user wrote it; tool results excluded."""
    messages = list_in(body.get("messages"))
    if not messages or object_in(messages[-1]).get("role") != "user":
        return ""
    blocks = content_blocks(object_in(messages[-1]).get("content"))
    return "\n".join(text_in(block.get("text")) for block in blocks if block.get("type") == "text")


def _marks(text: str) -> list[str]:
    return _MARK.findall(text) if "[[sim:" in text else []


def _merged(directive: Directive, source: str) -> Directive:
    values: dict[str, str] = {}
    for key, quoted, plain in _PAIR.findall(source):
        values[key] = _decoded(quoted or plain)
    return replace(
        directive,
        tokens=_int(values.get("tokens"), directive.tokens),
        thinking=_int(values.get("thinking"), directive.thinking),
        stop=_stop(values.get("stop"), directive.stop),
        category=values.get("category", directive.category),
        tool=values.get("tool", directive.tool),
        input=values.get("input", directive.input),
        text=values.get("text", directive.text),
        error=values.get("error", directive.error),
        retry_after=values.get("retry_after", directive.retry_after),
        at=_int(values.get("at"), directive.at),
        for_s=_float(values.get("for"), directive.for_s),
        ttft_ms=_float(values.get("ttft_ms"), directive.ttft_ms),
        otps=_float(values.get("otps"), directive.otps),
        ping_ms=_float(values.get("ping_ms"), directive.ping_ms),
        searches=_int(values.get("searches"), directive.searches),
        batch=values.get("batch", directive.batch),
    )


def _decoded(value: str) -> str:
    if not value.startswith("base64:"):
        return value
    try:
        return base64.b64decode(value[len("base64:") :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return value


def _int(value: str | None, default: int | None) -> int | None:
    return min(int(value), TOKENS_MAX) if value is not None and value.isascii() and value.isdigit() else default


def _float(value: str | None, default: float | None) -> float | None:
    try:
        number = float(value) if value is not None else -1.0
    except ValueError:
        return default
    return number if 0.0 <= number < float("inf") else default


def _stop(value: str | None, default: Stop | None) -> Stop | None:
    return value if value in STOPS else default  # type: ignore[return-value]  # the set holds the Literal's members
