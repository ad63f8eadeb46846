"""Laws of the stream's fold, on the transcripts: whole, byte by byte, and cut at every offset."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.wire import sse
from headgate.wire.sse import SseReader
from headgate.wire.stream import Kind, MalformedStream, StreamFold
from headgate.wire.usage import IterationUsage, Usage

TRANSCRIPTS = sorted((Path(__file__).parent.parent / "transcripts").glob("*.sse"))
WHOLE = [path for path in TRANSCRIPTS if path.stem != "error_mid_stream"]


def folded(chunks) -> StreamFold:
    fold, reader = StreamFold(), SseReader()
    for chunk in chunks:
        for frame in reader.feed(chunk):
            fold.take(frame)
    return fold


def transcript(name: str) -> bytes:
    return (Path(__file__).parent.parent / "transcripts" / f"{name}.sse").read_bytes()


def state(fold: StreamFold) -> dict:
    return {name: getattr(fold, name) for name in StreamFold.__slots__}


def events(stream: bytes) -> list[dict]:
    """The `data` of every event, by splitting alone."""
    return [json.loads(line[6:]) for line in stream.decode().split("\n") if line.startswith("data: ")]


def text_bytes(stream: bytes) -> int:
    """What a reader sees of a stream: text, thinking and tool input, as UTF-8."""
    deltas = [event["delta"] for event in events(stream) if event["type"] == "content_block_delta"]
    shown = [delta.get("text") or delta.get("thinking") or delta.get("partial_json") or "" for delta in deltas]
    return len("".join(shown).encode())


def start(**message) -> bytes:
    message = {"id": "msg_1", "model": "m", "usage": {"input_tokens": 5, "output_tokens": 1}} | message
    return sse.frame(b"message_start", json.dumps({"type": "message_start", "message": message}).encode())


def delta(**fields) -> bytes:
    data = {"type": "content_block_delta", "index": 0, "delta": fields}
    return sse.frame(b"content_block_delta", json.dumps(data).encode())


STOP = sse.frame(b"message_stop", b'{"type":"message_stop"}')


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_transcript_folds_the_same_whole_and_byte_by_byte(path):
    stream = path.read_bytes()
    whole = folded([stream])
    assert state(folded(stream[at : at + 1] for at in range(len(stream)))) == state(whole)
    assert state(folded([stream.replace(b"\n", b"\r\n")])) == state(whole)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_transcript_cut_anywhere_is_complete_only_when_its_last_event_was_whole(path):
    stream = path.read_bytes()
    fold, reader = StreamFold(), SseReader()
    for at in range(len(stream)):
        assert not fold.complete, f"complete after {at} bytes of {len(stream)}"
        assert fold.output_bytes <= text_bytes(stream)
        for frame in reader.feed(stream[at : at + 1]):
            fold.take(frame)
    assert fold.complete == (path in WHOLE)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_output_bytes_are_those_of_the_text_and_of_nothing_else(path):
    stream = path.read_bytes()
    assert folded([stream]).output_bytes == text_bytes(stream) > 0


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_kind_of_each_frame_is_its_event(path):
    known = {kind.value: kind for kind in Kind}
    fold = StreamFold()
    for frame in SseReader().feed(path.read_bytes()):
        name = sse.parse(frame)[0].decode()
        assert fold.take(frame) is known.get(name, Kind.OTHER)


def test_hidden_thinking_tool_use_and_a_cache_hit():
    fold = folded([transcript("thinking_omitted_tool_use")])
    assert fold.usage == Usage(
        input_tokens=42, cache_read_tokens=8000, output_tokens=89, thinking_tokens=40, inference_geo="global"
    )
    assert (fold.message_id, fold.model, fold.stop_reason) == ("msg_01Sim", "claude-haiku-5-5", "tool_use")
    assert fold.usage_final


def test_shown_thinking_and_a_cache_write():
    fold = folded([transcript("thinking_summarized")])
    assert fold.usage == Usage(
        input_tokens=1210,
        cache_write_5m_tokens=2048,
        output_tokens=412,
        thinking_tokens=371,
        inference_geo="global",
    )
    assert fold.stop_reason == "end_turn"


def test_a_refusal_in_mid_stream_is_a_whole_answer():
    fold = folded([transcript("refusal_mid_stream")])
    assert (fold.complete, fold.stop_reason, fold.saw_content) == (True, "refusal", True)
    assert (fold.usage.input_tokens, fold.usage.output_tokens) == (310, 11)


def test_counts_of_the_last_delta_stand_and_are_never_added():
    fold = folded([transcript("server_tools_cumulative")])
    assert (fold.usage.input_tokens, fold.usage.output_tokens, fold.usage.web_search_requests) == (10682, 510, 2)


def test_a_fallback_at_anthropic_leaves_its_passes():
    fold = folded([transcript("fallback_iterations")])
    assert fold.usage.iterations == (
        IterationUsage(model="claude-opus-4-7", input_tokens=880),
        IterationUsage("fallback_message", "claude-haiku-4-5", input_tokens=900, output_tokens=17),
    )
    assert fold.model == "claude-haiku-4-5"


def test_an_error_in_mid_stream_is_no_end():
    fold = folded([transcript("error_mid_stream")])
    assert not fold.complete
    assert (fold.error_type, fold.error_code, fold.error_message) == ("overloaded_error", "", "Overloaded")
    assert json.loads(fold.error_data)["error"]["type"] == "overloaded_error"
    assert (fold.usage.input_tokens, fold.usage.cache_read_tokens, fold.usage_final) == (64, 512, False)


def test_an_error_names_its_code():
    data = b'{"type":"error","error":{"type":"rate_limit_error","message":"m","details":{"error_code":"x_limit"}}}'
    fold = StreamFold()
    assert fold.take(sse.frame(b"error", data)) is Kind.ERROR
    assert (fold.error_code, fold.error_data) == ("x_limit", data)


@given(st.lists(st.tuples(st.sampled_from(["text", "thinking", "partial_json"]), st.text(max_size=8)), max_size=8))
def test_text_is_counted_in_the_bytes_it_has_and_not_in_those_of_its_spelling(deltas):
    fold = folded([start(), *(delta(type="x", **{field: text}) for field, text in deltas)])
    assert fold.output_bytes == sum(len(text.encode()) for _, text in deltas)
    assert fold.saw_content == bool(deltas)


@pytest.mark.parametrize(
    "unknown", [{"type": "compaction_delta", "content": None}, {"type": "x_delta", "text": {"a": 1}}, {"text": None}]
)
def test_a_delta_of_an_unknown_kind_passes_and_counts_nothing(unknown):
    fold = folded([start()])
    assert fold.take(delta(**unknown)) is Kind.CONTENT
    assert fold.output_bytes == 0


def test_data_over_several_lines_is_one_value():
    fold = folded([start(), b'event: content_block_delta\ndata: {"delta":\ndata: {"text":"ab"}}\n\n'])
    assert fold.output_bytes == 2


def test_a_signature_is_no_output():
    fold = folded([start(), delta(type="text_delta", text="ab"), delta(type="signature_delta", signature="x" * 500)])
    assert fold.output_bytes == 2


@pytest.mark.parametrize(
    "frame", [STOP, start(), delta(text="x"), sse.frame(b"error", b"{}"), b": x\n\n", b"data: x\n\n"]
)
def test_nothing_counts_after_the_stop(frame):
    fold = folded([start(), delta(text="ab"), STOP])
    before = state(fold)
    assert fold.take(frame) is Kind.AFTER_STOP
    assert state(fold) == before


@pytest.mark.parametrize(
    "frame", [sse.PING, b": comment\n\n", b"id: 7\n\n", sse.frame(b"vendor_event", b'{"x":[1]}'), b"retry: 1\n\n"]
)
def test_pings_comments_and_unknown_events_may_come_before_the_start(frame):
    fold = StreamFold()
    assert fold.take(frame) in (Kind.PING, Kind.OTHER)
    assert fold.take(start()) is Kind.START


DEEP = b'{"delta":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BROKEN_STREAMS = {
    "a second start": [start(), start()],
    "content before the start": [delta(text="a")],
    "a block before the start": [sse.frame(b"content_block_start", b"{}")],
    "usage before the start": [sse.frame(b"message_delta", b"{}")],
    "a stop before the start": [STOP],
    "a start that is no JSON": [sse.frame(b"message_start", b'{"message":')],
    "a start without a message": [sse.frame(b"message_start", b"{}")],
    "a start whose message is text": [sse.frame(b"message_start", b'{"message":"x"}')],
    "a start with a negative count": [start(usage={"input_tokens": -1})],
    "a start with a count beyond reason": [start(usage={"input_tokens": 10**12})],
    "a start with half a token": [start(usage={"input_tokens": 1.5})],
    "a start that is deep": [sse.frame(b"message_start", DEEP)],
    "a delta that is no JSON": [start(), sse.frame(b"content_block_delta", b'{"delta":{"text":"a}')],
    "a later delta that is no JSON": [start(), delta(text="a"), sse.frame(b"content_block_delta", b'{"delta":{]}')],
    "a delta with bytes that are no text": [start(), sse.frame(b"content_block_delta", b'{"delta":{"text":"\xff"}}')],
    "bytes that are no text elsewhere": [start(), sse.frame(b"content_block_delta", b'{"x":"\xff","delta":{}}')],
    "a later delta with such bytes": [
        start(),
        delta(text="a"),
        sse.frame(b"content_block_delta", b'{"delta":{"a":"\xc3"}}'),
    ],
    "a delta that is deep": [start(), sse.frame(b"content_block_delta", DEEP)],
    "a delta without data": [start(), b"event: content_block_delta\n\n"],
    "a usage that is no JSON": [start(), sse.frame(b"message_delta", b"{")],
    "a usage with a negative count": [start(), sse.frame(b"message_delta", b'{"usage":{"output_tokens":-1}}')],
    "a usage that is deep": [start(), sse.frame(b"message_delta", DEEP)],
    "an error that is no JSON": [sse.frame(b"error", b"<html>")],
    "an error that is deep": [sse.frame(b"error", DEEP.replace(b"delta", b"error"))],
    "an unknown event that is no JSON": [sse.frame(b"vendor_event", b"{")],
    "an unknown event with such bytes": [sse.frame(b"vendor_event", b'{"a":"\xff"}')],
    "an unknown event that is deep": [sse.frame(b"vendor_event", DEEP)],
    "data without a name that is no JSON": [b"data: [DONE]\n\n"],
    "a block that is no JSON": [start(), sse.frame(b"content_block_start", b"x")],
}


@pytest.mark.parametrize("frames", BROKEN_STREAMS.values(), ids=BROKEN_STREAMS)
def test_a_stream_that_breaks_its_grammar_is_malformed(frames):
    fold = folded(frames[:-1])
    with pytest.raises(MalformedStream):
        fold.take(frames[-1])
    assert not fold.complete


@given(st.sampled_from(TRANSCRIPTS), st.data())
def test_a_damaged_transcript_raises_nothing_but_malformed_stream(path, data):
    stream = path.read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        at, junk = data.draw(st.integers(0, len(stream))), data.draw(st.binary(max_size=4))
        stream = stream[:at] + junk + stream[at + data.draw(st.integers(0, 8)) :]
    fold = StreamFold()
    for frame in SseReader().feed(stream):
        try:
            assert isinstance(fold.take(frame), Kind)
        except MalformedStream:
            pass
    assert fold.output_bytes >= 0


@given(st.binary(max_size=80), st.booleans())
def test_no_frame_raises_anything_but_malformed_stream(frame, started):
    fold = folded([start()] if started else [])
    try:
        assert isinstance(fold.take(frame), Kind)
    except MalformedStream:
        pass
