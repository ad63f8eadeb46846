"""Which answer may be given a second time: the key of a request, what may be kept, what may be given back.

What it is: exact-match reuse of complete answers, for endpoints whose owner asked for it. Two requests share an answer
only when everything that Anthropic would see of them is equal to the byte, and the same key (and, unless its owner says
otherwise, the same person) asks. What it is not: the store (`storage/answers.py`), or a judgement whether a second
sample would have been different: who samples on purpose does not switch reuse on, whatever `temperature` says. Nor is
it known here what stands behind an address: an image or a document that a body names by URL or file id is as old as
the answer, and the TTL is the owner's word on how old that may be.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from headgate.policy.records import Record
from headgate.wire import sse
from headgate.wire.catalog import Catalog
from headgate.wire.message import MessageRequest
from headgate.wire.stream import Kind, MalformedStream, StreamFold
from headgate.wire.usage import Usage

ANSWER_BYTES_MAX = 1 << 20
"""Of one answer as the client got it; 128,000 tokens of text in a stream are more, and are not asked for twice."""
REQUEST_BYTES_MAX = 1 << 20
"""Of a body that is looked for: its digest is made on the loop, 0.9 ms for this many."""
CLOCK_SKEW_S = 1.0
"""How far in the future an answer may have been kept: by another gateway, whose clock is not ours."""
STOP_REASONS = frozenset({"end_turn", "stop_sequence"})
"""Ends of an answer that says all it had to say (claude-api §3.1); any other, known or not, is not kept."""
BLOCKS = frozenset({"text", "thinking", "redacted_thinking"})
"""Content that has no effect and no source outside of the model. What is not here (tools of either side, fallbacks,
compactions, kinds that are not known yet) is not kept."""

_NS: Final = 1_000_000_000
_MAGIC = b"HGR\x01"
"""What a record begins with; the last byte is its version."""
_DIGEST_BYTES = 32
_PER_CALL_FIELDS = ("diagnostics", "fallback_credit_token", "mcp_servers")
"""Of a body: what is said about this one call, is good for one call, or asks servers of others."""
_CONTROL = frozenset(range(32)) | {127}


class ReuseRule(Record, frozen=True, gc=False):
    """What the owner of an endpoint allows."""

    ttl_s: float
    """How old an answer may be when it is given back. > 0."""
    shared_by_users: bool = False
    """Whether the users of one key share answers. An `app` key speaks for many people, whose equal questions may have
    had answers that were meant for one of them: not unless its owner says that nothing personal is in them."""


class KeptAnswer(Record, frozen=True, gc=False):
    """An answer as it was given to a client, and what it was."""

    streamed: bool
    content_type: bytes
    body: bytes
    """The bytes the client got: a whole SSE stream, or JSON."""
    model: str
    """The one that the attempt went to; the body may name it by another of its names."""
    stop_reason: str
    request_id: str
    """Anthropic's."""
    usage: Usage
    cost_nanousd: int
    """What the attempt that served was billed; the saving of each reuse."""
    at_ns: int
    """UTC nanoseconds: when it was whole."""


class _Block(msgspec.Struct, frozen=True):
    type: str = ""


class _BlockStart(msgspec.Struct, frozen=True):
    content_block: _Block = _Block()


class _Message(msgspec.Struct, frozen=True):
    type: str = ""
    model: str = ""
    stop_reason: str | None = None
    content: list[_Block] | None = None


_block_start = msgspec.json.Decoder(_BlockStart)
_message = msgspec.json.Decoder(_Message)
_kept = msgspec.msgpack.Decoder(KeptAnswer)
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


# The key


def answer_key(
    *, upstream: str, key_id: str, user: str | None, model: str, query: bytes, headers: bytes, body: bytes
) -> str:
    """SHA-256 (hex) of everything that makes a request what it is, each part with its length before it.

    `user` None: all users of the key share. `upstream` is the API's URL, so that an answer of a simulator is never
    taken for Claude's; `model` the one that would serve; `headers` as `anthropic_lines` gives them.
    """
    digest = hashlib.sha256(_MAGIC)
    whose = b"*" if user is None else b"=" + _encoded(user)
    for part in (_encoded(upstream), _encoded(key_id), whose, _encoded(model), query, headers, body):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def anthropic_lines(forwarded: bytes) -> bytes:
    """Of the header lines that go to Anthropic those which may change its answer: `anthropic-version`,
    `anthropic-beta` and whatever else it calls its own, in their order. Tracing and the SDKs' telemetry do not."""
    lines = forwarded.split(b"\r\n")
    return b"\r\n".join(line for line in lines if line[:10].lower() == b"anthropic-")


def unkeepable_request(request: MessageRequest, body: bytes) -> str:
    """Why this request is neither answered from the store nor its answer kept; empty when it may be.

    `body` is what would be sent.
    """
    if len(body) > REQUEST_BYTES_MAX:
        return "request_too_large"
    if request.uses_server_state:
        return "server_state"
    if any(request.raw(name) not in (None, b"null") for name in _PER_CALL_FIELDS):
        return "per_call_field"
    if request.max_tokens <= 0:
        # A cache pre-warm: it is sent for what it does, not for what it says (claude-api §7.6).
        return "max_tokens"
    return ""


# What may be kept


def unkeepable_end(*, stop_reason: str, asked: str, served: str, usage: Usage) -> str:
    """Why an answer is not kept, by what the call knows of it; empty when nothing speaks against it.

    `asked` is the model the key was made with, `served` the one that the attempt went to.
    """
    if stop_reason not in STOP_REASONS:
        return f"stop_reason:{stop_reason}" if stop_reason in _KNOWN_STOPS else "stop_reason:other"
    if asked != served:
        return "fallback"
    if usage.web_search_requests:
        return "server_tools"
    if any(iteration.kind != "message" for iteration in usage.iterations):
        return "iterations"
    return ""


_KNOWN_STOPS = frozenset(
    {"max_tokens", "tool_use", "pause_turn", "refusal", "model_context_window_exceeded", "compaction"}
)
"""The reasons that are counted by name; a name that is made up must not become a counter."""


def unkeepable_answer(answer: KeptAnswer, *, asked: str, catalog: Catalog) -> str:
    """Why an answer is not kept, by its own bytes: read again from the first to the last, since nobody will when it
    is given back. Empty when it may be. Takes some 3 µs an event: not for the loop.
    """
    if len(answer.body) > ANSWER_BYTES_MAX:
        return "answer_too_large"
    seen = _read_stream(answer.body) if answer.streamed else _read_message(answer.body)
    if seen is None:
        return "not_whole"
    model, stop_reason, blocks = seen
    if stop_reason not in STOP_REASONS or stop_reason != answer.stop_reason:
        return "stop_reason:other"
    if not blocks <= BLOCKS:
        return "content"
    if model != asked:
        # An alias is answered by the model's dated name; another model is Anthropic's own fallback (claude-api §3.3).
        known = catalog.resolve(asked)
        if known is None or catalog.resolve(model) is not known:
            return "fallback"
    return ""


def _read_message(body: bytes) -> tuple[str, str, set[str]] | None:
    try:
        body.decode()
        message = _message.decode(body)
    except _UNREADABLE:
        return None
    if message.type != "message" or message.content is None:
        return None
    return message.model, message.stop_reason or "", {block.type for block in message.content}


def _read_stream(body: bytes) -> tuple[str, str, set[str]] | None:
    """Model, stop reason and kinds of block of a stream; None unless it is whole by the grammar of claude-api §4.1."""
    reader, fold = sse.SseReader(), StreamFold()
    blocks: set[str] = set()
    open_blocks = 0
    try:
        for frame in (*reader.feed(body), *reader.close()):
            kind = fold.take(frame)
            if kind is Kind.BLOCK:
                blocks.add(_block_start.decode(sse.parse(frame)[1]).content_block.type)
                open_blocks += 1
            elif kind is Kind.OTHER:
                event, _ = sse.parse(frame)
                if event == b"content_block_stop":
                    open_blocks -= 1
                elif event:
                    return None
            elif kind in (Kind.ERROR, Kind.AFTER_STOP):
                return None
    except (*_UNREADABLE, MalformedStream, sse.EventTooLarge):
        return None
    if not fold.complete or not fold.usage_final or open_blocks or reader.pending:
        return None
    return fold.model, fold.stop_reason, blocks


# As it is stored


def pack(key: str, answer: KeptAnswer) -> bytes:
    """The record of an answer: its version, a digest over the key and all of it, and the answer."""
    payload = msgspec.msgpack.encode(answer)
    return _MAGIC + _digest(key, payload) + payload


def unpack(key: str, record: bytes) -> KeptAnswer | None:
    """The answer that was packed for this key. None for a record that is damaged, of another version, or another's.

    The digest holds the key, so that a store that hands out the wrong record hands out nothing. Never raises.
    """
    head = len(_MAGIC) + _DIGEST_BYTES
    payload = record[head:]
    if record[: len(_MAGIC)] != _MAGIC or record[len(_MAGIC) : head] != _digest(key, payload):
        return None
    try:
        answer = _kept.decode(payload)
    except _UNREADABLE:
        return None
    # They become header lines: a store that others can write to must not write a header.
    if not _CONTROL.isdisjoint(answer.content_type) or not (answer.request_id.isascii() and answer.model.isascii()):
        return None
    if not _CONTROL.isdisjoint(answer.request_id.encode()) or not _CONTROL.isdisjoint(answer.model.encode()):
        return None
    return answer


def age_s(answer: KeptAnswer, *, streamed: bool, ttl_s: float, now_ns: int) -> float | None:
    """Seconds since the answer was whole, ≥ 0; None when it may not be given back: too old, from a clock that has been
    set back since, or not in the form that is asked for."""
    age = (now_ns - answer.at_ns) / _NS
    if answer.streamed != streamed or not -CLOCK_SKEW_S <= age < ttl_s:
        return None
    return max(age, 0.0)


def head_lines(answer: KeptAnswer, *, age_s: float, call_id: str) -> bytes:
    """The response's header lines, `name: value\\r\\n` each. Of Anthropic's own only those that tell of the answer."""
    lines = b"content-type: %b\r\n" % answer.content_type
    if answer.request_id:
        lines += b"request-id: %b\r\n" % answer.request_id.encode()
    lines += (
        b"x-headgate-call: %b\r\nx-headgate-model: %b\r\nx-headgate-attempts: 0\r\nx-headgate-queue-ms: 0\r\n"
        b"x-headgate-reuse: age=%ds\r\nx-headgate-cost-usd: 0.000000000\r\n"
        % (call_id.encode(), answer.model.encode(), age_s)
    )
    # The same word against proxies that buffer as for any stream; and what a whole answer says of the cache.
    return lines + (b"x-accel-buffering: no\r\n" if answer.streamed else b"x-headgate-cache: none\r\n")


def pieces(body: bytes, size: int) -> list[bytes]:
    """The body in pieces of about `size` bytes. Those of a stream end where an event does, so that an `error` event may
    follow any of them."""
    found = []
    at = 0
    while len(body) - at > size:
        end = body.rfind(b"\n\n", at, at + size)
        if end < 0:
            end = body.find(b"\n\n", at + size - 1)
        if end < 0:
            break
        found.append(body[at : end + 2])
        at = end + 2
    if at < len(body):
        found.append(body[at:])
    return found


def _digest(key: str, payload: bytes) -> bytes:
    digest = hashlib.sha256(_MAGIC + key.encode())
    digest.update(payload)
    return digest.digest()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
