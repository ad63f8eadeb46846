"""Answers and their bytes: determinism, directives, the grammar of a stream, and what a fault does to it."""

import json
import random
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.simulator import tokens
from headgate.simulator.binding import read, sign
from headgate.simulator.directives import Directive, directive_of
from headgate.simulator.events import Frame, Rate, duration_s, frames, message_value
from headgate.simulator.faults import KINDS, STREAM_KINDS, Fault, FaultPlan, Scripted, error_of, reshape, reshape_body
from headgate.simulator.generate import Answer, Ids, compose, sample, tool_to_call
from headgate.simulator.models import load_catalogue
from headgate.simulator.usage import Usage
from headgate.simulator.validate import read_ask

CATALOGUE = load_catalogue()
SLOW = Rate(otps=50.0, ping_s=15.0)
TOOL = {"name": "look_up", "input_schema": {"type": "object", "properties": {"id": {"type": "string"}}}}


def answer(text: str = "hello", model: str = "claude-sonnet-4-6", seed: int = 1, **body: Any) -> Answer:
    whole: Any = {"model": model, "max_tokens": 5_000, "messages": [{"role": "user", "content": text}]} | body
    ask = read_ask(whole, version="2026-10-21", betas=None, catalogue=CATALOGUE, organization="org", purpose="message")
    return compose(
        ask,
        directive_of(whole, None),
        Usage(input_tokens=7),
        ids=Ids(seed),
        seed=seed,
        prompt_hash=text.encode(),
        answer_tokens=100,
        organization="org",
    )


def parsed(stream: Iterator[Frame]) -> list[tuple[str, Any]]:
    """Events of a stream, by its grammar; fails on any byte out of place."""
    events = []
    text = b"".join(frame.data for frame in stream).decode()
    assert text.endswith("\n\n")
    for block in text[:-2].split("\n\n"):
        name, data = block.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        events.append((name[7:], json.loads(data[6:])))
        assert events[-1][1]["type"] == name[7:]
    return events


@pytest.mark.parametrize(
    "made",
    [
        answer(),
        answer("xin chào bạn, hôm nay thế nào?"),
        answer("[[sim: stop=empty]]"),
        answer("[[sim: stop=refusal]]"),
        answer("[[sim: stop=refusal_mid tokens=50]]"),
        answer("look_up this", tools=[TOOL]),
        answer(model="claude-opus-5-5"),
        answer(model="claude-opus-4-6", thinking={"type": "adaptive"}),
        answer("look_up", model="claude-fable-5-2", tools=[TOOL]),
        answer("[[sim: tokens=900]]", max_tokens=20),
        answer("[[sim: thinking=900]]", model="claude-opus-5", max_tokens=20),
    ],
)
def test_a_stream_follows_the_grammar_and_adds_up_to_the_whole_message(made: Answer) -> None:
    events = [(name, data) for name, data in parsed(frames(made, SLOW)) if name != "ping"]
    assert events[0][0] == "message_start"
    assert [name for name, _ in events[-2:]] == ["message_delta", "message_stop"]
    message = events[0][1]["message"]
    assert message["content"] == []
    assert message["stop_reason"] is None
    content: list[Any] = []
    partial: list[str] = []
    for name, data in events[1:-2]:
        if name == "content_block_start":
            assert data["index"] == len(content)
            content.append(dict(data["content_block"]))
            partial = []
        elif name == "content_block_delta":
            delta = data["delta"]
            assert data["index"] == len(content) - 1
            match delta["type"]:
                case "text_delta":
                    content[-1]["text"] += delta["text"]
                case "thinking_delta":
                    content[-1]["thinking"] += delta["thinking"]
                case "signature_delta":
                    content[-1]["signature"] = delta["signature"]
                case "input_json_delta":
                    partial.append(delta["partial_json"])
                case other:
                    raise AssertionError(other)
        elif partial:
            assert partial[0] == ""
            content[-1]["input"] = json.loads("".join(partial))
    delta, whole = events[-2][1], message_value(made)
    assert content == whole["content"]
    assert delta["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence", "stop_details")}
    assert message["usage"] | delta["usage"] == whole["usage"]


def test_produced_tokens_only_grow_and_end_at_the_billed_number() -> None:
    made = answer("look_up", model="claude-opus-5-5", tools=[TOOL])
    counts = [frame.output_tokens for frame in frames(made, SLOW)]
    assert all(before <= after for before, after in pairwise(counts))
    assert counts[-1] == made.usage.output_tokens


def test_a_stream_takes_as_long_as_the_message_that_is_not_streamed() -> None:
    made = answer("[[sim: tokens=600 thinking=200]]", model="claude-opus-5-5")
    assert sum(frame.wait_s for frame in frames(made, SLOW)) == pytest.approx(duration_s(made, SLOW), rel=0.03)


def test_a_refusal_before_output_has_no_block_and_is_not_billed() -> None:
    made = answer("[[sim: stop=refusal category=bio]]")
    assert (made.parts, made.billed, made.stop_reason) == ((), False, "refusal")
    assert made.stop_details is not None
    assert made.stop_details["category"] == "bio"


def test_the_same_request_and_seed_give_the_same_answer() -> None:
    assert answer() == answer()
    assert answer().parts != answer(seed=2).parts or answer().message_id != answer(seed=2).message_id
    assert answer("a").parts != answer("b").parts


def test_max_tokens_cuts_thinking_first_and_the_words_after_it() -> None:
    made = answer("[[sim: thinking=15 tokens=100]]", model="claude-opus-5", max_tokens=20)
    assert made.stop_reason == "max_tokens"
    assert (made.usage.thinking_tokens, made.usage.output_tokens) == (15, 20)
    swallowed = answer("[[sim: thinking=50]]", model="claude-opus-5", max_tokens=20)
    assert [part.kind for part in swallowed.parts] == ["thinking"]
    assert swallowed.stop_reason == "max_tokens"


def test_a_stop_sequence_ends_the_text_before_itself() -> None:
    made = answer('[[sim: text="one two END three"]]', stop_sequences=["END"])
    assert (made.parts[0].text, made.stop_reason, made.stop_sequence) == ("one two ", "stop_sequence", "END")


def test_a_warm_up_answers_nothing() -> None:
    made = answer(max_tokens=0)
    assert (made.parts, made.stop_reason, made.usage.output_tokens) == ((), "max_tokens", 0)


def test_the_length_asked_for_is_the_length_given() -> None:
    made = answer("[[sim: tokens=321]]")
    assert made.usage.output_tokens == 321
    assert tokens.count(made.parts[0].text, "old") == pytest.approx(321, rel=0.05)


def test_tools_are_called_when_named_forced_or_directed_and_not_after_their_results() -> None:
    def called(body: dict[str, Any], **directive: Any) -> Any:
        tool = tool_to_call({"tools": [TOOL]} | body, Directive(**directive), random.Random(1))
        return None if tool is None else tool["name"]

    def user(content: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}]}

    assert called(user("please look_up it")) == "look_up"
    assert called(user("hello")) is None
    assert called(user("hello"), tool="look_up") == "look_up"
    assert called(user("hello"), tool="other") is None
    assert called(user("hello") | {"tool_choice": {"type": "any"}}) == "look_up"
    assert called(user("look_up") | {"tool_choice": {"type": "none"}}) is None
    result = [{"type": "tool_result", "tool_use_id": "1"}, {"type": "text", "text": "look_up"}]
    assert called(user(result)) is None


def test_a_sample_has_what_its_schema_requires() -> None:
    schema: Any = {
        "type": "object",
        "required": ["a", "b", "c"],
        "properties": {
            "a": {"enum": ["x"]},
            "b": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 2},
            "c": {"anyOf": [{"const": None}, {"type": "string"}]},
            "d": {"type": "string"},
        },
        "$defs": {"n": {"type": "integer", "minimum": 4, "maximum": 4}},
    }
    assert sample(schema, random.Random(1), root=schema) == {"a": "x", "b": [4, 4], "c": None}


def test_a_schema_that_refers_to_itself_ends() -> None:
    schema: Any = {"type": "object", "properties": {"next": {"$ref": "#"}, "more": {"$ref": "#/properties/more"}}}
    assert isinstance(sample(schema, random.Random(1), root=schema), dict)


def test_later_sources_win_key_by_key() -> None:
    body: Any = {
        "metadata": {"user_id": "[[sim: tokens=1 stop=refusal]]"},
        "messages": [{"role": "user", "content": "x [[sim: tokens=2 ttft_ms=5]] y"}],
    }
    assert directive_of(body, None) == Directive(tokens=2, stop="refusal", ttft_ms=5.0)
    assert directive_of(body, "tokens=3 category=bio") == Directive(
        tokens=3, stop="refusal", ttft_ms=5.0, category="bio"
    )


@given(st.text())
def test_any_text_is_a_harmless_directive(text: str) -> None:
    for source in (text, f"[[sim: {text}]]"):
        directive_of({"messages": [{"role": "user", "content": source}]}, text)


def test_a_signature_says_what_it_was_given_and_a_forged_one_nothing() -> None:
    model = CATALOGUE.find("claude-opus-5-5")
    assert model is not None
    signature = sign(model, "org", b"\x01", "thought")
    found = read(signature)
    assert found is not None
    assert (found.model, found.organization, found.conversation) == ("claude-opus-5-5", "org", "01")
    for forged in ("", "x", "AAAA", signature[:-4], signature.swapcase()):
        assert read(forged) is None


# ---- faults


def bent(kind: str, text: str = "[[sim: tokens=100]]", **fault: Any) -> list[Frame]:
    return list(reshape(Fault(kind, **fault), frames(answer(text), SLOW)))


def data(stream: list[Frame]) -> bytes:
    return b"".join(frame.data for frame in stream)


PLAIN = data(list(frames(answer("[[sim: tokens=100]]"), SLOW)))


@pytest.mark.parametrize("kind", sorted(set(STREAM_KINDS) - {"wrong-content-type"}))
def test_every_stream_fault_changes_the_stream(kind: str) -> None:
    stream = bent(kind)
    assert data(stream) != PLAIN or stream != list(frames(answer("[[sim: tokens=100]]"), SLOW))


@given(st.integers(1, len(PLAIN)))
def test_a_cut_keeps_exactly_the_bytes_before_it(at: int) -> None:
    stream = bent("cut", at=at, how="reset")
    assert data(stream) == PLAIN[:at]
    assert stream[-1].act == "reset"


def test_a_truncated_stream_ends_cleanly_without_message_stop() -> None:
    stream = bent("truncate", at=4)
    assert len(parsed(iter(stream))) == 4
    assert b"message_stop" not in data(stream)
    assert stream[-1].act == "end"


def test_an_error_event_is_the_last_one() -> None:
    assert [name for name, _ in parsed(iter(bent("error-first")))] == ["error"]
    events = parsed(iter(bent("error-mid", at=5)))
    assert len(events) == 6
    assert events[-1][1] == {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


def test_a_stall_is_silence_and_then_the_rest() -> None:
    stream = bent("stall", at=3, for_s=99.0)
    assert data(stream) == PLAIN
    assert max(frame.wait_s for frame in stream) >= 99.0


def test_crlf_gzip_and_drip_keep_the_content() -> None:
    assert data(bent("crlf")).replace(b"\r\n", b"\n") == PLAIN
    assert zlib.decompressobj(wbits=31).decompress(data(bent("gzip"))) == PLAIN
    dripped = bent("slow-loris", for_s=0.5)
    assert data(dripped) == PLAIN
    assert {(len(frame.data), frame.wait_s) for frame in dripped} == {(1, 0.5)}


def test_a_body_that_is_not_streamed_breaks_too() -> None:
    body = b"0123456789"
    assert [frame.data for frame in reshape_body(Fault("truncate"), body)] == [b"01234", b""]
    assert [frame.act for frame in reshape_body(Fault("cut", at=3, how="reset"), body)] == ["send", "reset"]
    assert data(list(reshape_body(Fault("stall", for_s=1.0), body))) == body


def plan(*orders: Any) -> FaultPlan:
    found = FaultPlan()
    for order in orders:
        found.add(Scripted(**order))
    return found


def picked(found: FaultPlan, model: str = "m", die: float = 0.5, path: str = "/v1/messages") -> str | None:
    fault = found.pick(path, (model,), die)
    return None if fault is None else fault.kind


def test_a_script_is_used_up_in_order_and_only_by_its_model() -> None:
    found = plan({"kind": "529", "model": "a", "count": 2}, {"kind": "500"})
    assert [picked(found, "b"), picked(found, "a"), picked(found, "a"), picked(found, "a")] == [
        "500",
        "529",
        "529",
        None,
    ]


def test_an_outage_lasts_until_it_is_ended() -> None:
    found = plan({"outage": Scripted(kind="529", model="a")})
    assert [picked(found, "a") for _ in range(3)] == ["529"] * 3
    assert picked(found, "b") is None
    found.end_outages("a")
    assert picked(found, "a") is None


def test_rates_share_the_die() -> None:
    found = plan({"rate": {"529": 0.03, "500": 0.02}})
    assert [picked(found, die=die) for die in (0.0, 0.029, 0.031, 0.049, 0.051)] == ["529", "529", "500", "500", None]
    found.add(Scripted(rate={}))
    assert picked(found, die=0.0) is None


def test_faults_strike_messages_unless_another_path_is_named() -> None:
    found = plan({"kind": "500", "path": "/v1/messages/count_tokens"})
    assert picked(found) is None
    assert picked(found, path="/v1/messages/count_tokens") == "500"


@pytest.mark.parametrize(
    "order",
    [{"kind": "nonsense"}, {"rate": {"nonsense": 0.1}}, {"rate": {"529": 0.6, "500": 0.6}}, {"rate": {"529": -0.1}}],
)
def test_a_wrong_order_is_refused_whole(order: dict[str, Any]) -> None:
    found = FaultPlan()
    with pytest.raises(ValueError, match=r"unknown fault kind|rates"):
        found.add(Scripted(**({"script": [Scripted(kind="529")]} | order)))
    assert found.snapshot() == FaultPlan().snapshot()


def test_the_kinds_of_429_differ_in_header_and_code() -> None:
    assert dict(error_of(Fault("429", retry_after="NaN")).headers) == {"retry-after": "NaN"}
    assert error_of(Fault("429-no-retry-after")).headers == ()
    spend = error_of(Fault("429-spend"))
    assert (spend.headers, spend.error_code) == ((), "enforced_spend_limit_reached")
    assert error_of(Fault("429-ramp")).error_code == "ramp_limit_exceeded"
    assert "redirect" in KINDS
