"""Answers as bytes: the SSE events of a stream, each with the wait before it, and the JSON of a whole message.

Pure and lazy: a stream of a thousand tokens holds one event at a time. Grammar and field order of docs "streaming".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from headgate.simulator.generate import Answer, Part, tokens_by_piece, tool_input
from headgate.simulator.jsonvalue import Json, JsonObject

Act = Literal["send", "raw", "end", "close", "reset"]
"""Write an event; write bytes outside the chunked framing; end the body; close without ending it; reset the
connection.
"""

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
THINKING_SPEED = 3.0
"""Thinking runs this many times faster than visible text."""
PROGRESS_S = 0.25
"""Silent thinking is counted in steps of this length, so that a client who leaves pays for what was thought."""
JITTER = tuple(0.8 + 0.4 * ((step * 37) % 64) / 63 for step in range(64))
"""Uneven spacing of events, mean 1."""


class Frame(NamedTuple):
    """One step of a stream."""

    data: bytes
    wait_s: float
    """Since the step before."""
    output_tokens: int
    """Produced so far, this step included."""
    act: Act = "send"


@dataclass(frozen=True, slots=True)
class Rate:
    """The pace of a stream."""

    otps: float
    """Output tokens a second; infinite sends everything at once."""
    ping_s: float
    """Silence before a ping."""


def event(name: str, value: JsonObject) -> bytes:
    """One SSE event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(value))


def error_event(body: bytes) -> bytes:
    """The event that ends a stream; `body` is an error envelope."""
    return b"event: error\ndata: %b\n\n" % body


def frames(answer: Answer, rate: Rate) -> Iterator[Frame]:
    """The stream of an answer, from `message_start` to `message_stop`."""
    yield Frame(message_start(answer), 0.0, 0)
    produced = 0
    for index, part in enumerate(answer.parts):
        yield Frame(_block_start(index, part), 0.0, produced)
        if index == 0:
            yield Frame(PING, 0.0, produced)
        if part.kind == "thinking":
            yield from _thinking(index, part, rate, produced)
        else:
            yield from _deltas(index, part, rate.otps, produced)
        produced += part.output_tokens
        yield Frame(
            b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n' % index, 0.0, produced
        )
    yield Frame(message_delta(answer), 0.0, answer.usage.output_tokens)
    yield Frame(MESSAGE_STOP, 0.0, answer.usage.output_tokens)


def duration_s(answer: Answer, rate: Rate) -> float:
    """How long the model takes from its first token to its last."""
    return (
        answer.usage.thinking_tokens / (rate.otps * THINKING_SPEED)
        + (answer.usage.output_tokens - answer.usage.thinking_tokens) / rate.otps
    )


def message_start(answer: Answer) -> bytes:
    """The first event."""
    message = _message(answer, [], None, None, answer.usage.at_start())
    message["stop_details"] = None
    return event("message_start", {"type": "message_start", "message": message})


def message_delta(answer: Answer) -> bytes:
    """The last event but one: stop reason and cumulative usage."""
    delta: JsonObject = {
        "stop_reason": answer.stop_reason,
        "stop_sequence": answer.stop_sequence,
        "stop_details": answer.stop_details,
    }
    return event("message_delta", {"type": "message_delta", "delta": delta, "usage": answer.usage.at_end()})


def message_json(answer: Answer) -> bytes:
    """The whole message, for answers that are not streamed and for batch results."""
    return msgspec.json.encode(message_value(answer))


def message_value(answer: Answer) -> JsonObject:
    """The whole message as a value."""
    content: list[Json] = [_block(part) for part in answer.parts]
    message = _message(answer, content, answer.stop_reason, answer.stop_sequence, answer.usage.whole())
    message["stop_details"] = answer.stop_details
    return message


def _message(
    answer: Answer, content: list[Json], stop_reason: str | None, stop_sequence: str | None, usage: JsonObject
) -> JsonObject:
    message: JsonObject = {
        "id": answer.message_id,
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": stop_sequence,
        "stop_details": None,
        "usage": usage,
    }
    if answer.diagnosed:
        message["diagnostics"] = answer.diagnostics
    return message


def _block(part: Part) -> JsonObject:
    match part.kind:
        case "thinking":
            return {"type": "thinking", "thinking": part.text, "signature": part.signature}
        case "text":
            return {"type": "text", "text": part.text}
        case "tool_use":
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": tool_input(part)}


def _block_start(index: int, part: Part) -> bytes:
    empty: JsonObject
    match part.kind:
        case "thinking":
            empty = {"type": "thinking", "thinking": "", "signature": ""}
        case "text":
            empty = {"type": "text", "text": ""}
        case "tool_use":
            empty = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    return event("content_block_start", {"type": "content_block_start", "index": index, "content_block": empty})


def _deltas(index: int, part: Part, otps: float, produced: int) -> Iterator[Frame]:
    kind, key = ("text_delta", "text") if part.kind == "text" else ("input_json_delta", "partial_json")
    if part.kind == "tool_use":
        yield Frame(_delta(index, kind, key, ""), 0.0, produced)
    before = 0
    for step, (piece, so_far) in enumerate(zip(part.pieces, tokens_by_piece(part), strict=True)):
        wait_s = (so_far - before) / otps * JITTER[step & 63]
        before = so_far
        yield Frame(_delta(index, kind, key, piece), wait_s, produced + so_far)


def _thinking(index: int, part: Part, rate: Rate, produced: int) -> Iterator[Frame]:
    otps = rate.otps * THINKING_SPEED
    if part.pieces:
        before = 0
        for piece, so_far in zip(part.pieces, tokens_by_piece(part), strict=True):
            yield Frame(_delta(index, "thinking_delta", "thinking", piece), (so_far - before) / otps, produced + so_far)
            before = so_far
    else:
        left_s = part.output_tokens / otps
        silent_s = 0.0
        while left_s > PROGRESS_S:
            left_s -= PROGRESS_S
            silent_s += PROGRESS_S
            ping = silent_s >= rate.ping_s
            silent_s = 0.0 if ping else silent_s
            so_far = part.output_tokens - int(left_s * otps)
            yield Frame(PING if ping else b"", PROGRESS_S, produced + so_far)
        yield Frame(b"", left_s, produced + part.output_tokens)
    yield Frame(_delta(index, "signature_delta", "signature", part.signature), 0.0, produced + part.output_tokens)


@lru_cache(maxsize=4_096)
def _delta(index: int, kind: str, key: str, text: str) -> bytes:
    # Cached because answers are made of a few hundred pieces: a paced event then costs no encoding at all.
    return (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}\n\n'
        % (index, kind.encode(), key.encode(), msgspec.json.encode(text))
    )
