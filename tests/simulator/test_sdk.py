"""The official SDK against the simulator: what works there must work here, and fail in the same class."""

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest

MODEL = "claude-sonnet-4-6"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def client(simulator: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=simulator.url, api_key="any", max_retries=0) as found:
        yield found


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_message_has_text_usage_and_an_end(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model=MODEL, max_tokens=500, messages=HELLO)
    assert message.content[0].type == "text"
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0
    assert message._request_id is not None
    assert message._request_id.startswith("req_")


def test_a_stream_accumulates_to_the_message_that_is_not_streamed(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model=MODEL, max_tokens=500, messages=HELLO)
    with client.messages.stream(model=MODEL, max_tokens=500, messages=HELLO) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text == whole.content[0].text  # type: ignore[union-attr]
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert streamed.stop_reason == whole.stop_reason


def test_an_alias_answers_with_the_dated_id(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=HELLO)
    assert message.model == "claude-haiku-4-5-20251001"


def test_a_tool_round_trip_ends_in_words(client: anthropic.Anthropic) -> None:
    messages = said("use get_weather please")
    with client.messages.stream(model=MODEL, max_tokens=500, messages=messages, tools=[WEATHER]) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    call = next(block for block in first.content if block.type == "tool_use")
    assert call.name == "get_weather"
    assert isinstance(call.input["city"], str)
    result: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": "31 degrees"}]
    follow_up: Any = [*messages, {"role": "assistant", "content": first.content}, {"role": "user", "content": result}]
    second = client.messages.create(model=MODEL, max_tokens=500, messages=follow_up, tools=[WEATHER])
    assert second.stop_reason == "end_turn"
    assert {block.type for block in second.content} == {"text"}


@pytest.mark.parametrize(("model", "shown"), [("claude-opus-4-6", True), ("claude-sonnet-5-5", False)])
def test_thinking_comes_first_signed_and_omitted_by_default_on_new_models(
    client: anthropic.Anthropic, model: str, shown: bool
) -> None:
    with client.messages.stream(model=model, max_tokens=500, messages=HELLO, thinking={"type": "adaptive"}) as stream:
        message = stream.get_final_message()
    block = message.content[0]
    assert block.type == "thinking"
    assert block.signature
    assert bool(block.thinking) is shown
    assert message.usage.output_tokens_details is not None
    assert 0 < message.usage.output_tokens_details.thinking_tokens < message.usage.output_tokens


def test_a_thinking_block_comes_back_unless_the_history_before_it_changed(client: anthropic.Anthropic) -> None:
    model = "claude-opus-5-5"
    first = client.messages.create(model=model, max_tokens=500, messages=HELLO)
    turns: Any = [{"role": "assistant", "content": first.content}, {"role": "user", "content": "and then?"}]
    client.messages.create(model=model, max_tokens=500, messages=[*HELLO, *turns])
    with pytest.raises(anthropic.BadRequestError, match="bound to a different conversation"):
        client.messages.create(model=model, max_tokens=500, messages=[*said("Hallo"), *turns])


def test_a_refusal_before_output_has_no_content_and_costs_nothing(client: anthropic.Anthropic, simulator: Any) -> None:
    message = client.messages.create(
        model="claude-opus-5", max_tokens=500, messages=said("[[sim: stop=refusal category=cyber]]")
    )
    assert (message.content, message.stop_reason) == ([], "refusal")
    assert message.stop_details is not None
    assert message.stop_details.category == "cyber"
    assert simulator.get("/sim/bill")["total"]["cost_nanousd"] == 0


def test_a_refusal_in_mid_stream_is_billed_for_what_came(client: anthropic.Anthropic, simulator: Any) -> None:
    with client.messages.stream(
        model=MODEL, max_tokens=500, messages=said("[[sim: stop=refusal_mid tokens=100]]")
    ) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "refusal"
    assert message.usage.output_tokens == 50
    assert simulator.get("/sim/bill")["total"]["output_tokens"] == 50


def test_count_tokens_is_what_the_bill_will_say(client: anthropic.Anthropic) -> None:
    messages = said("Xin chào, đơn hàng của tôi đang ở đâu? " * 20)
    counted = client.messages.count_tokens(model=MODEL, messages=messages, system="Be short.", tools=[WEATHER])
    billed = client.messages.create(model=MODEL, max_tokens=10, messages=messages, system="Be short.", tools=[WEATHER])
    assert counted.input_tokens == billed.usage.input_tokens


def test_models_are_listed_in_pages_and_found_by_alias(client: anthropic.Anthropic) -> None:
    names = [model.id for model in client.models.list(limit=4)]
    assert names == [model.id for model in client.models.list(limit=1000)]
    assert "claude-sonnet-4-6" in names
    assert "claude-opus-4-1-20250805" not in names
    found = client.models.retrieve("claude-haiku-4-5")
    assert found.id == "claude-haiku-4-5-20251001"
    assert found.capabilities is not None
    assert found.capabilities.thinking.types.adaptive.supported is False
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("claude-nobody")


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("400", anthropic.BadRequestError),
        ("401", anthropic.AuthenticationError),
        ("402", anthropic.APIStatusError),
        ("403", anthropic.PermissionDeniedError),
        ("404", anthropic.NotFoundError),
        ("409", anthropic.ConflictError),
        ("413", anthropic.APIStatusError),
        ("422", anthropic.UnprocessableEntityError),
        ("429", anthropic.RateLimitError),
        ("500", anthropic.InternalServerError),
        ("502", anthropic.InternalServerError),
        ("503", anthropic.InternalServerError),
        ("504", anthropic.InternalServerError),
        ("529", anthropic.InternalServerError),
        ("reset", anthropic.APIConnectionError),
    ],
)
def test_each_error_raises_its_class(client: anthropic.Anthropic, kind: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        client.messages.create(model=MODEL, max_tokens=500, messages=said(f"[[sim: error={kind}]]"))
    if isinstance(raised.value, anthropic.APIStatusError):
        assert raised.value.status_code == int(kind)


def test_an_error_event_in_a_stream_raises_with_status_200(client: anthropic.Anthropic) -> None:
    with (
        pytest.raises(anthropic.APIStatusError) as raised,
        client.messages.stream(model=MODEL, max_tokens=500, messages=said("[[sim: error=error-mid]]")) as stream,
    ):
        stream.get_final_message()
    assert raised.value.status_code == 200


def test_a_given_text_is_answered_word_for_word(client: anthropic.Anthropic) -> None:
    text = '<img src=x onerror="alert(1)">\n```js\nalert("ờ")\n```'
    encoded = base64.b64encode(text.encode()).decode()
    with client.messages.stream(
        model=MODEL, max_tokens=500, messages=said(f"say it [[sim: text=base64:{encoded}]]")
    ) as stream:
        assert stream.get_final_text() == text


def test_structured_output_is_json_of_the_schema(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"verdict": {"enum": ["ham", "spam"]}, "score": {"type": "integer", "minimum": 3}},
        "required": ["verdict", "score"],
    }
    message = client.messages.create(
        model=MODEL, max_tokens=500, messages=HELLO, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    value = json.loads(message.content[0].text)  # type: ignore[union-attr]
    assert value["verdict"] in ("ham", "spam")
    assert value["score"] >= 3


def test_the_cache_is_written_once_and_then_read(client: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "rule " * 2_000, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    first = client.messages.create(model=MODEL, max_tokens=10, messages=HELLO, system=system).usage
    second = client.messages.create(model=MODEL, max_tokens=10, messages=said("Other"), system=system).usage
    assert first.cache_creation is not None
    assert first.cache_creation.ephemeral_1h_input_tokens == first.cache_creation_input_tokens > 2_000
    assert second.cache_read_input_tokens == first.cache_creation_input_tokens
    assert second.cache_creation_input_tokens == 0


def test_diagnostics_name_the_first_thing_that_changed(client: anthropic.Anthropic) -> None:
    def ask(system: str, text: str, previous: str | None, **more: Any) -> Any:
        return client.messages.create(
            max_tokens=10,
            system=system,
            messages=said(text),
            diagnostics={"previous_message_id": previous},
            **{"model": MODEL} | more,
        )

    first = ask("a", "hello", None)
    assert first.diagnostics is None
    assert ask("a", "hello", first.id).diagnostics is None
    assert (
        ask("a", "hello", first.id, thinking={"type": "adaptive"}).diagnostics.cache_miss_reason.type == "unavailable"
    )
    assert ask("a", "hello", first.id, model="claude-opus-4-7").diagnostics.cache_miss_reason.type == "model_changed"
    assert ask("b", "hello", first.id).diagnostics.cache_miss_reason.type == "system_changed"
    assert ask("a", "other", first.id).diagnostics.cache_miss_reason.type == "messages_changed"
    assert ask("a", "hello", "msg_unknown").diagnostics.cache_miss_reason.type == "previous_message_not_found"


def test_a_batch_ends_with_every_result_once_and_half_the_price(
    client: anthropic.Anthropic, start: Callable[..., Any]
) -> None:
    running = start(batch_clock=100_000.0)
    with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as batches:
        requests: list[Any] = [
            {"custom_id": f"r{n}", "params": {"model": MODEL, "max_tokens": 50, "messages": said(text)}}
            for n, text in enumerate(["Hello", "[[sim: batch=errored]]", "[[sim: batch=expired]]", "Hi"])
        ]
        requests.append({"custom_id": "bad", "params": {"model": MODEL, "messages": HELLO}})
        batch = batches.messages.batches.create(requests=requests)
        assert batch.processing_status == "in_progress"
        assert batch.request_counts.processing == 5
        running.until("/sim/bill", lambda bill: bill["total"]["requests"] == 2)
        for _ in range(1_000):
            batch = batches.messages.batches.retrieve(batch.id)
            if batch.processing_status == "ended":
                break
        counts = batch.request_counts
        assert (counts.processing, counts.succeeded, counts.errored, counts.expired) == (0, 2, 2, 1)
        results = {result.custom_id: result.result for result in batches.messages.batches.results(batch.id)}
        assert {name: result.type for name, result in results.items()} == {
            "r0": "succeeded",
            "r1": "errored",
            "r2": "expired",
            "r3": "succeeded",
            "bad": "errored",
        }
        assert results["r0"].message.usage.service_tier == "batch"  # type: ignore[union-attr]
        assert batches.messages.batches.delete(batch.id).type == "message_batch_deleted"
        with pytest.raises(anthropic.NotFoundError):
            batches.messages.batches.retrieve(batch.id)
    usage = results["r0"].message.usage  # type: ignore[union-attr]
    lines = running.get("/sim/bill")["requests"]
    assert lines[0]["cost_nanousd"] == (usage.input_tokens * 3_000 + usage.output_tokens * 15_000) // 2
