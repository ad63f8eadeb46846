"""What may be given a second time: keys that nothing confuses, every end of an answer, records that were damaged."""

import itertools
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.policy.answer_reuse import (
    ANSWER_BYTES_MAX,
    REQUEST_BYTES_MAX,
    KeptAnswer,
    age_s,
    answer_key,
    anthropic_lines,
    head_lines,
    pack,
    pieces,
    unkeepable_answer,
    unkeepable_end,
    unkeepable_request,
    unpack,
)
from headgate.wire import sse
from headgate.wire.catalog import packaged
from headgate.wire.message import scan
from headgate.wire.usage import NO_USAGE, IterationUsage, Usage

CATALOG = packaged()
MODEL = "claude-haiku-4-5"
KEY = "0" * 64
NS = 1_000_000_000


def stream(
    *,
    stop_reason: str = "end_turn",
    model: str = MODEL,
    blocks: tuple[str, ...] = ("text",),
    texts: tuple[str, ...] = ("Chào ", "bạn"),
) -> list[bytes]:
    """The frames of a whole stream."""

    def frame(event: str, **fields: object) -> bytes:
        return sse.frame(event.encode(), msgspec.json.encode({"type": event, **fields}))

    start = {"id": "msg_1", "type": "message", "model": model, "content": [], "usage": {"input_tokens": 9}}
    frames = [frame("message_start", message=start)]
    for index, kind in enumerate(blocks):
        frames.append(frame("content_block_start", index=index, content_block={"type": kind, "text": ""}))
        frames.append(sse.PING)
        for text in texts:
            frames.append(frame("content_block_delta", index=index, delta={"type": "text_delta", "text": text}))
        frames.append(frame("content_block_stop", index=index))
    frames.append(frame("message_delta", delta={"stop_reason": stop_reason}, usage={"output_tokens": 7}))
    frames.append(frame("message_stop"))
    return frames


def whole(*, stop_reason: str | None = "end_turn", model: str = MODEL, blocks: tuple[str, ...] = ("text",)) -> bytes:
    content = [{"type": kind, "text": "Chào bạn"} for kind in blocks]
    return msgspec.json.encode({"type": "message", "model": model, "stop_reason": stop_reason, "content": content})


def kept(body: bytes | None = None, *, streamed: bool = True, stop_reason: str = "end_turn", **fields) -> KeptAnswer:
    return KeptAnswer(
        streamed=streamed,
        content_type=fields.pop("content_type", b"text/event-stream; charset=utf-8"),
        body=b"".join(stream(stop_reason=stop_reason)) if body is None else body,
        model=fields.pop("model", MODEL),
        stop_reason=stop_reason,
        request_id=fields.pop("request_id", "req_011"),
        usage=Usage(input_tokens=9, output_tokens=7),
        cost_nanousd=44_000,
        at_ns=fields.pop("at_ns", 1_000 * NS),
    )


def judged(body: bytes, *, streamed: bool = True, stop_reason: str = "end_turn", asked: str = MODEL) -> str:
    return unkeepable_answer(kept(body, streamed=streamed, stop_reason=stop_reason), asked=asked, catalog=CATALOG)


# The key

requests = st.fixed_dictionaries(
    {
        "upstream": st.sampled_from(["", "a", "https://api.anthropic.com"]),
        "key_id": st.text(max_size=3),
        "user": st.none() | st.text(max_size=3),
        "model": st.text(max_size=3),
        "query": st.binary(max_size=3),
        "headers": st.binary(max_size=3),
        "body": st.binary(max_size=3),
    }
)


@settings(max_examples=300)
@given(requests, requests)
def test_two_requests_have_one_key_only_when_they_are_equal(one: dict, other: dict) -> None:
    assert (answer_key(**one) == answer_key(**other)) == (one == other)


@given(st.lists(st.binary(max_size=4), min_size=7, max_size=7), st.integers(0, 5), st.integers(0, 4))
def test_no_byte_can_move_over_the_boundary_of_two_parts(parts: list[bytes], which: int, count: int) -> None:
    def key(of: list[bytes]) -> str:
        text = [part.decode("latin-1") for part in of]
        upstream, key_id, user, model = text[:4]
        query, headers, body = of[4:]
        return answer_key(
            upstream=upstream, key_id=key_id, user=user, model=model, query=query, headers=headers, body=body
        )

    # The first three bytes of latin-1 text are as long in UTF-8.
    parts = [bytes(byte & 0x7F for byte in part) for part in parts]
    moved = list(parts)
    moved[which] = parts[which] + parts[which + 1][:count]
    moved[which + 1] = parts[which + 1][count:]
    assert (key(moved) == key(parts)) == (moved == parts)


def test_all_users_together_are_no_user_of_any_name() -> None:
    fields = {"upstream": "u", "key_id": "k", "model": "m", "query": b"", "headers": b"", "body": b"{}"}
    users = [None, "", "*", "=", "None", "an", "\udc80"]
    assert len({answer_key(user=user, **fields) for user in users}) == len(users)


def test_headers_of_anthropics_own_are_in_the_key_and_telemetry_is_not() -> None:
    lines = (
        b"content-type: application/json\r\nanthropic-version: 2023-06-01\r\nx-stainless-retry-count: 1\r\n"
        b"anthropic-beta: a\r\ntraceparent: 00-1\r\nanthropic-beta: b\r\nAnthropic-New: 1\r\n"
    )
    assert anthropic_lines(lines) == (
        b"anthropic-version: 2023-06-01\r\nanthropic-beta: a\r\nanthropic-beta: b\r\nAnthropic-New: 1"
    )
    assert anthropic_lines(b"user-agent: x\r\n") == b""


# Requests


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"model":"m","max_tokens":10,"messages":[]}', ""),
        (b'{"model":"m","max_tokens":10,"temperature":1,"stream":true,"diagnostics":null}', ""),
        (b'{"model":"m","max_tokens":0}', "max_tokens"),
        (b'{"model":"m"}', "max_tokens"),
        (b'{"model":"m","max_tokens":10,"thread":"t"}', "server_state"),
        (b'{"model":"m","max_tokens":10,"container":null}', "server_state"),
        (b'{"model":"m","max_tokens":10,"previous_message_id":"msg_1"}', "server_state"),
        (b'{"model":"m","max_tokens":10,"diagnostics":{"previous_message_id":"msg_1"}}', "per_call_field"),
        (b'{"model":"m","max_tokens":10,"fallback_credit_token":"t"}', "per_call_field"),
        (b'{"model":"m","max_tokens":10,"mcp_servers":[{}]}', "per_call_field"),
        (b'{"model":"m","max_tokens":10,"x":"%b"}' % (b"a" * REQUEST_BYTES_MAX), "request_too_large"),
    ],
)
def test_requests_that_are_about_more_than_their_bytes_are_left_alone(body: bytes, reason: str) -> None:
    assert unkeepable_request(scan(body), body) == reason


# Answers


@pytest.mark.parametrize(
    ("stop_reason", "reason"),
    [
        ("end_turn", ""),
        ("stop_sequence", ""),
        ("max_tokens", "stop_reason:max_tokens"),
        ("tool_use", "stop_reason:tool_use"),
        ("pause_turn", "stop_reason:pause_turn"),
        ("refusal", "stop_reason:refusal"),
        ("model_context_window_exceeded", "stop_reason:model_context_window_exceeded"),
        ("compaction", "stop_reason:compaction"),
        ("", "stop_reason:other"),
        ("of_tomorrow", "stop_reason:other"),
    ],
)
def test_only_an_answer_that_said_all_is_kept(stop_reason: str, reason: str) -> None:
    assert unkeepable_end(stop_reason=stop_reason, asked="m", served="m", usage=NO_USAGE) == reason
    # And by its bytes, whatever the call says of it.
    bodies = [(b"".join(stream(stop_reason=stop_reason)), True), (whole(stop_reason=stop_reason or None), False)]
    for body, streamed in bodies:
        assert bool(judged(body, streamed=streamed, stop_reason=stop_reason)) == bool(reason)
        assert judged(body, streamed=streamed, stop_reason="end_turn") == (
            "" if stop_reason == "end_turn" else "stop_reason:other"
        )


def test_an_answer_of_another_model_or_with_tools_of_the_server_is_not_kept() -> None:
    def end(served: str = "m", **usage) -> str:
        return unkeepable_end(stop_reason="end_turn", asked="m", served=served, usage=Usage(**usage))

    assert end("n") == "fallback"
    assert end(web_search_requests=1) == "server_tools"
    assert end(iterations=(IterationUsage("message"), IterationUsage("fallback_message"))) == "iterations"
    assert end(iterations=(IterationUsage("message"),)) == ""
    assert judged(b"".join(stream(model="claude-sonnet-4-6"))) == "fallback"
    assert judged(whole(model="claude-sonnet-4-6"), streamed=False) == "fallback"
    assert judged(b"".join(stream(model="claude-haiku-4-5-20251001"))) == ""
    assert judged(b"".join(stream(model="made-up")), asked="made-up") == ""
    assert judged(b"".join(stream(model="made-up")), asked="made-up-too") == "fallback"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", ""),
        ("thinking", ""),
        ("redacted_thinking", ""),
        ("tool_use", "content"),
        ("server_tool_use", "content"),
        ("web_search_tool_result", "content"),
        ("container_upload", "content"),
        ("fallback", "content"),
        ("mcp_tool_use", "content"),
        ("of_tomorrow", "content"),
        ("", "content"),
    ],
)
def test_content_that_does_or_fetches_something_is_not_kept(kind: str, reason: str) -> None:
    assert judged(b"".join(stream(blocks=("text", kind)))) == reason
    assert judged(whole(blocks=("text", kind)), streamed=False) == reason


def test_a_stream_with_any_frame_missing_or_twice_is_not_kept() -> None:
    frames = stream(blocks=("thinking", "text"))
    assert judged(b"".join(frames)) == ""
    harmless = ("event: ping", "event: content_block_delta")
    for number, frame in enumerate(frames):
        if not frame.decode().startswith(harmless):
            assert judged(b"".join(frames[:number] + frames[number + 1 :])) == "not_whole"
        if not frame.decode().startswith((*harmless, "event: message_delta")):
            assert judged(b"".join([*frames[:number], frame, *frames[number:]])) == "not_whole"


@given(st.data())
def test_a_stream_that_was_cut_anywhere_is_not_kept(data: st.DataObject) -> None:
    body = b"".join(stream())
    assert judged(body[: data.draw(st.integers(0, len(body) - 1))]) == "not_whole"


def test_a_stream_with_something_foreign_in_it_is_not_kept() -> None:
    frames = stream()
    for foreign in (b"event: error\ndata: {}\n\n", b"event: news\ndata: {}\n\n", b"event: ping", frames[0]):
        assert judged(b"".join([*frames[:-1], foreign, frames[-1]])) == "not_whole"
        assert judged(b"".join([*frames, foreign])) == "not_whole"
    assert judged(b": comment\n\n" + b"".join(frames)) == ""
    assert judged(b"".join(frames).replace(b"\n", b"\r\n")) == ""


@pytest.mark.parametrize(
    ("name", "model", "reason"),
    [
        ("short_stream", "claude-sonnet-4-6", ""),
        ("thinking_summarized", "claude-sonnet-4-6", ""),
        ("server_tools_cumulative", "claude-sonnet-4-6", "content"),
        ("thinking_omitted_tool_use", "claude-haiku-5-5", "stop_reason:other"),
        ("refusal_mid_stream", "claude-opus-4-7", "stop_reason:other"),
        ("error_mid_stream", "claude-sonnet-4-6", "not_whole"),
    ],
)
def test_transcripts_of_real_shape_are_judged_as_they_ended(name: str, model: str, reason: str) -> None:
    body = (Path(__file__).parents[1] / "transcripts" / f"{name}.sse").read_bytes()
    assert judged(body, asked=model) == reason


def test_what_is_no_message_is_not_kept() -> None:
    for body in (b"", b"{}", b"[]", b"{", whole()[:-1], whole().replace(b'"type":"message"', b'"type":"error"')):
        assert judged(body, streamed=False) == "not_whole"
    assert judged(b'{"type":"message","content":[]\xff}', streamed=False) == "not_whole"


def test_an_answer_longer_than_a_mebibyte_is_not_kept() -> None:
    assert judged(b"".join(stream(texts=("a" * ANSWER_BYTES_MAX,)))) == "answer_too_large"


# Records


@given(
    st.builds(
        KeptAnswer,
        streamed=st.booleans(),
        content_type=st.sampled_from([b"application/json", b"text/event-stream; charset=utf-8"]),
        body=st.binary(max_size=100),
        model=st.sampled_from([MODEL, ""]),
        stop_reason=st.text(max_size=10),
        request_id=st.sampled_from(["", "req_1"]),
        usage=st.builds(Usage, input_tokens=st.integers(0, 10**9), iterations=st.just((IterationUsage(),))),
        cost_nanousd=st.integers(0, 2**62),
        at_ns=st.integers(0, 2**62),
    )
)
def test_what_was_packed_is_unpacked(answer: KeptAnswer) -> None:
    assert unpack(KEY, pack(KEY, answer)) == answer


@settings(max_examples=300)
@given(st.data())
def test_a_record_with_any_damage_is_no_answer(data: st.DataObject) -> None:
    record = pack(KEY, kept())
    at = data.draw(st.integers(0, len(record) - 1))
    damage = data.draw(st.sampled_from(["flip", "cut", "insert", "double"]))
    damaged = {
        "flip": record[:at] + bytes([record[at] ^ (1 << data.draw(st.integers(0, 7)))]) + record[at + 1 :],
        "cut": record[:at],
        "insert": record[:at] + b"\0" + record[at:],
        "double": record + record[at:],
    }[damage]
    assert unpack(KEY, damaged) is None


def test_another_requests_record_is_no_answer() -> None:
    assert unpack("1" * 64, pack(KEY, kept())) is None


def test_a_record_of_another_version_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    record = pack(KEY, kept())
    assert record[:4] == b"HGR\x01"
    assert unpack(KEY, b"HGR\x02" + record[4:]) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"content_type": b"a\r\nset-cookie: x"},
        {"request_id": "a\r\nb: c"},
        {"request_id": "é"},
        {"model": "a\nb"},
        {"model": "\x7f"},
    ],
)
def test_a_record_that_would_write_a_header_is_no_answer(fields: dict) -> None:
    assert unpack(KEY, pack(KEY, kept(**fields))) is None


# Giving back


def test_an_answer_is_given_back_until_its_time_is_over_and_not_at_it() -> None:
    answer = kept()

    def age(seconds: float, *, streamed: bool = True, ttl_s: float = 60.0) -> float | None:
        return age_s(answer, streamed=streamed, ttl_s=ttl_s, now_ns=round((1_000 + seconds) * NS))

    assert age(0) == 0.0
    assert age(59.5) == 59.5
    assert age(60) is None
    assert age(10, ttl_s=10.0) is None, "the endpoint that asks has a shorter time"
    assert age(1, streamed=False) is None
    assert age(-0.5) == 0.0, "another gateway's clock may be ahead a little"
    assert age(-2) is None, "a clock that was set back must not make an answer live longer"


def test_the_head_tells_that_it_is_reused_and_costs_nothing() -> None:
    assert head_lines(kept(), age_s=12.9, call_id="call_1") == (
        b"content-type: text/event-stream; charset=utf-8\r\nrequest-id: req_011\r\nx-headgate-call: call_1\r\n"
        b"x-headgate-model: claude-haiku-4-5\r\nx-headgate-attempts: 0\r\nx-headgate-queue-ms: 0\r\n"
        b"x-headgate-reuse: age=12s\r\nx-headgate-cost-usd: 0.000000000\r\nx-accel-buffering: no\r\n"
    )
    lines = head_lines(kept(whole(), streamed=False, request_id=""), age_s=0.0, call_id="call_1")
    assert b"request-id: " not in lines
    assert lines.endswith(b"x-headgate-cost-usd: 0.000000000\r\nx-headgate-cache: none\r\n")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 64))
def test_pieces_of_a_stream_end_where_events_do(lengths: list[int], size: int) -> None:
    frames = [sse.frame(b"e", b"x" * length) for length in lengths]
    ends = set(itertools.accumulate(map(len, frames)))
    found = pieces(b"".join(frames), size)
    assert b"".join(found) == b"".join(frames)
    assert set(itertools.accumulate(map(len, found))) <= ends
    assert all(len(piece) <= max(size, max(map(len, frames)) + 1) for piece in found)


def test_a_body_without_such_ends_is_one_piece() -> None:
    assert pieces(b"a" * 100, 10) == [b"a" * 100]
    assert pieces(b"", 10) == []
