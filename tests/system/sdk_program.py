"""A program written for the official SDK, which knows of Headgate only its base URL and key. Runs on 0.x and on 2.x.

Each function without an underscore states a law and asserts it. `python sdk_program.py URL KEY BATCH_ONLY_KEY
SIMULATOR_URL` runs them all and prints one line of JSON for each; `test_sdk.py` reads those. Standard library and
`anthropic` only: it runs in environments that hold nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anthropic
from anthropic import Anthropic, AsyncAnthropic
from anthropic import _exceptions as exceptions

MODEL = "claude-sonnet-4-6"
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HUE = '{"city":"Huế"}'
BODY_BYTES_MAX = 32 << 20
TOO_LARGE = getattr(exceptions, "ContentTooLargeError", exceptions.RequestTooLargeError)
"""The class of 413: 2.x has a new name for it."""
SPEND_CAP = getattr(anthropic, "EnforcedSpendLimitReachedError", anthropic.RateLimitError)
"""2.x has classes for some of the stable codes."""


@dataclass
class Place:
    """Where the program runs against."""

    url: str
    key: str
    batch_only_key: str
    simulator_url: str

    def client(self, **options: Any) -> Anthropic:
        """The client as every program makes it; it retries, as it does unless it is told otherwise."""
        return Anthropic(base_url=self.url, api_key=self.key, **options)

    def control(self, path: str, data: Any = None) -> Any:
        """Ask the simulator's backstage."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.simulator_url + path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())

    def calls(self) -> int:
        """How many requests the simulator has had."""
        count: int = self.control("/sim/requests?limit=0")["count"]
        return count

    def last_call(self) -> dict[str, Any]:
        """The latest request at the simulator."""
        found: dict[str, Any] = self.control(f"/sim/requests?since={self.calls() - 1}")["requests"][0]
        return found


@contextmanager
def _calls_upstream(at: Place, expected: int) -> Iterator[None]:
    before = at.calls()
    yield
    made = at.calls() - before
    assert made == expected, f"{made} calls reached Anthropic, not {expected}"


def _ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 300, "messages": [{"role": "user", "content": text}], **more}


def _raised(kind: type[Exception], act: Callable[[], object]) -> Any:
    try:
        answer = act()
    except kind as error:
        if type(error) is kind:
            return error
        raise AssertionError(f"{type(error).__name__} was raised and not {kind.__name__}") from error
    raise AssertionError(f"no {kind.__name__} was raised; it answered {answer!r:.200}")


def _error_code(error: Any) -> str | None:
    code: str | None = (error.body["error"].get("details") or {}).get("error_code")
    return code


def _text(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# what comes back


def a_message_comes_back_whole_with_upstreams_request_id(at: Place) -> None:
    message = at.client().messages.create(**_ask('[[sim: text="Xin chào, thế giới ✓"]]'))
    assert _text(message) == "Xin chào, thế giới ✓"
    assert (message.type, message.role, message.stop_reason) == ("message", "assistant", "end_turn")
    call = at.last_call()
    assert message._request_id == call["request_id"]
    assert message.id == call["message_id"]
    assert message.usage.output_tokens == call["usage"]["output_tokens"]
    assert message.usage.input_tokens == call["usage"]["input_tokens"]


def the_answers_head_says_what_headgate_did(at: Place) -> None:
    response = at.client().messages.with_raw_response.create(**_ask("[[sim: tokens=20]]"))
    headers = response.headers
    assert headers["x-headgate-call"].startswith("call_")
    assert (headers["x-headgate-model"], headers["x-headgate-attempts"]) == (MODEL, "1")
    cost_nanousd = round(float(headers["x-headgate-cost-usd"]) * 1e9)
    assert cost_nanousd == at.last_call()["cost_nanousd"] > 0


def a_stream_gives_its_text_and_its_final_message(at: Place) -> None:
    with at.client().messages.stream(**_ask("[[sim: tokens=200]]")) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
        assert stream.response.headers["request-id"] == at.last_call()["request_id"]
    assert len(pieces) > 10
    assert "".join(pieces) == _text(final)
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == at.last_call()["usage"]["output_tokens"] == 200


def the_events_of_a_stream_come_in_the_order_of_the_grammar(at: Place) -> None:
    events = [event.type for event in at.client().messages.create(stream=True, **_ask("[[sim: tokens=30]]"))]
    assert events[:2] == ["message_start", "content_block_start"]
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(events[2:-3]) == {"content_block_delta"}


def twenty_calls_of_the_async_client_run_beside_each_other(at: Place) -> None:
    async def create(client: AsyncAnthropic, number: int) -> None:
        message = await client.messages.create(**_ask(f'[[sim: text="whole {number}"]]'))
        assert _text(message) == f"whole {number}"

    async def stream(client: AsyncAnthropic, number: int) -> None:
        async with client.messages.stream(**_ask(f'[[sim: text="streamed {number}"]]')) as events:
            assert "".join([piece async for piece in events.text_stream]) == f"streamed {number}"
            assert _text(await events.get_final_message()) == f"streamed {number}"

    async def all_of_them() -> None:
        async with AsyncAnthropic(base_url=at.url, api_key=at.key) as client:
            acts = [act(client, number) for number in range(10) for act in (create, stream)]
            await asyncio.gather(*acts)

    with _calls_upstream(at, 20):
        asyncio.run(all_of_them())


def a_tool_is_called_and_its_result_is_answered(at: Place) -> None:
    client = at.client()
    question = {"role": "user", "content": f"[[sim: tool=get_weather input={_base64(HUE)}]]"}
    asked = {"model": MODEL, "max_tokens": 300, "tools": [TOOL]}
    first = client.messages.create(messages=[question], **asked)
    assert first.stop_reason == "tool_use"
    (use,) = [block for block in first.content if block.type == "tool_use"]
    assert (use.name, use.input) == ("get_weather", {"city": "Huế"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "31 °C"}
    turns = [question, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(messages=turns, **asked)
    assert second.stop_reason == "end_turn"
    assert _text(second)
    with client.messages.stream(messages=[question], **asked) as stream:
        streamed = stream.get_final_message()
    assert [(block.type, getattr(block, "input", None)) for block in streamed.content][-1] == (
        "tool_use",
        {"city": "Huế"},
    )


def thinking_goes_back_to_the_byte_over_six_turns_of_tools(at: Place) -> None:
    client = at.client()
    asked = {
        "model": MODEL,
        "max_tokens": 3000,
        "tools": [TOOL],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    turns: list[Any] = [{"role": "user", "content": "[[sim: tool=get_weather thinking=40]] Nghĩ kỹ đã."}]
    shown: list[Any] = []
    for turn in range(6):
        if turn % 2:
            with client.messages.stream(messages=turns, **asked) as stream:
                message = stream.get_final_message()
        else:
            message = client.messages.create(messages=turns, **asked)
        sent = json.loads(base64.b64decode(at.last_call()["body_base64"]))
        returned = [block for one in sent["messages"] if one["role"] == "assistant" for block in one["content"]]
        assert [
            (block["thinking"], block["signature"]) for block in returned if block["type"] == "thinking"
        ] == shown, f"turn {turn}"
        (thought,) = [block for block in message.content if block.type == "thinking"]
        (use,) = [block for block in message.content if block.type == "tool_use"]
        assert thought.thinking
        assert len(thought.signature) > 40
        shown.append((thought.thinking, thought.signature))
        turns.append({"role": "assistant", "content": message.content})
        turns.append(
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": use.id, "content": f"{turn} °C"},
                    {"type": "text", "text": "[[sim: tool=get_weather thinking=40]]"},
                ],
            }
        )
    assert len(shown) == 6


def a_changed_signature_is_refused_in_anthropics_words(at: Place) -> None:
    thought = {"type": "thinking", "thinking": "so", "signature": "bm90IG91cnM="}
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "2"}]},
        {"role": "user", "content": "3"},
    ]
    asked = _ask("", max_tokens=3000, thinking={"type": "enabled", "budget_tokens": 1024}) | {"messages": turns}
    error = _raised(anthropic.BadRequestError, lambda: at.client().messages.create(**asked))
    assert "Invalid `signature` in `thinking` block" in str(error)


def tokens_are_counted_as_they_will_be_billed(at: Place) -> None:
    client = at.client()
    messages = [{"role": "user", "content": "Đếm giúp tôi nhé, " * 20}]
    counted = client.messages.count_tokens(model=MODEL, messages=messages, system="Ngắn gọn.", tools=[TOOL])
    message = client.messages.create(
        model=MODEL, messages=messages, system="Ngắn gọn.", tools=[TOOL], max_tokens=10, tool_choice={"type": "auto"}
    )
    assert counted.input_tokens == message.usage.input_tokens > 100


# models and batches


def models_are_listed_page_by_page_and_retrieved(at: Place) -> None:
    client = at.client()
    page = client.models.list(limit=2)
    assert len(page.data) == 2
    assert page.has_more
    known = [model.id for model in client.models.list(limit=2)]
    assert known[:2] == [model.id for model in page.data]
    assert MODEL in known
    assert len(known) == len(set(known)) > 4
    assert client.models.retrieve(MODEL).id == MODEL
    error = _raised(anthropic.NotFoundError, lambda: client.models.retrieve("claude-nonesuch"))
    assert error.body["error"]["type"] == "not_found_error"


def a_batch_is_made_read_listed_and_deleted_and_its_results_come_through_headgate(at: Place) -> None:
    client = at.client()
    requests = [
        {"custom_id": f"ticket-{number}", "params": _ask(f'[[sim: text="answer {number}"]]')} for number in range(3)
    ]
    made = client.messages.batches.create(requests=requests)
    assert (made.processing_status, made.request_counts.processing) == ("in_progress", 3)
    assert made.results_url is None
    batch = _ended(client, made.id)
    assert batch.request_counts.succeeded == 3
    assert batch.results_url == f"{at.url}/v1/messages/batches/{made.id}/results"
    with _calls_upstream(at, 2):  # the batch, then its results: both through Headgate, with Anthropic's key
        results = {entry.custom_id: entry.result for entry in client.messages.batches.results(made.id)}
    assert {name: _text(result.message) for name, result in results.items()} == {
        f"ticket-{number}": f"answer {number}" for number in range(3)
    }
    listed = {one.id: one for one in client.messages.batches.list(limit=1)}
    assert listed[made.id].results_url == batch.results_url
    assert client.messages.batches.delete(made.id).id == made.id
    _raised(anthropic.NotFoundError, lambda: client.messages.batches.retrieve(made.id))


def a_batch_is_cancelled(at: Place) -> None:
    client = at.client()
    made = client.messages.batches.create(
        requests=[{"custom_id": f"t-{number}", "params": _ask("hello")} for number in range(200)]
    )
    assert client.messages.batches.cancel(made.id).processing_status == "canceling"
    counts = _ended(client, made.id).request_counts
    assert counts.canceled > 0
    assert counts.canceled + counts.succeeded == 200
    assert {entry.result.type for entry in client.messages.batches.results(made.id)} >= {"canceled"}


def a_batch_in_progress_is_not_deleted_and_says_why(at: Place) -> None:
    client = at.client()
    made = client.messages.batches.create(
        requests=[{"custom_id": f"t-{number}", "params": _ask("hello")} for number in range(200)]
    )
    error = _raised(anthropic.BadRequestError, lambda: client.messages.batches.delete(made.id))
    assert "once they have ended" in str(error)
    client.messages.batches.cancel(made.id)


# what goes wrong


def a_bad_request_is_told_in_anthropics_words_after_one_call(at: Place) -> None:
    with _calls_upstream(at, 1):
        error = _raised(anthropic.BadRequestError, lambda: at.client().messages.create(**_ask("", messages=[])))
    assert error.body["error"]["message"] == "messages: at least one message is required"
    assert error.request_id == error.body["request_id"] == at.last_call()["request_id"]


def a_key_that_is_not_ours_is_an_authentication_error_without_a_call(at: Place) -> None:
    client = Anthropic(base_url=at.url, api_key="sk-ant-api03-not-one-of-headgates")
    with _calls_upstream(at, 0):
        error = _raised(anthropic.AuthenticationError, lambda: client.messages.create(**_ask("hello")))
    assert _error_code(error) == "invalid_key"
    assert error.response.headers["x-should-retry"] == "false"


def a_key_without_the_scope_is_a_permission_error_without_a_call(at: Place) -> None:
    client = Anthropic(base_url=at.url, api_key=at.batch_only_key)
    with _calls_upstream(at, 0):
        error = _raised(anthropic.PermissionDeniedError, lambda: client.messages.create(**_ask("hello")))
    assert _error_code(error) == "scope_missing"


def an_unknown_model_is_not_found(at: Place) -> None:
    with _calls_upstream(at, 1):
        asked = _ask("hello") | {"model": "claude-nonesuch"}
        error = _raised(anthropic.NotFoundError, lambda: at.client().messages.create(**asked))
    assert error.body["error"]["message"] == "model: claude-nonesuch"


def what_is_too_large_for_anthropic_is_told_as_413(at: Place) -> None:
    with _calls_upstream(at, 1):
        error = _raised(TOO_LARGE, lambda: at.client().messages.create(**_ask("[[sim: error=413]]")))
    assert error.body["error"]["type"] == "request_too_large"


def what_is_too_large_for_headgate_is_told_as_413_and_not_as_a_reset(at: Place) -> None:
    with _calls_upstream(at, 0):
        asked = _ask("x" * (BODY_BYTES_MAX + 1))
        error = _raised(TOO_LARGE, lambda: at.client().messages.create(**asked))
    assert error.body["error"]["type"] == "request_too_large"


def a_rate_limit_beyond_the_deadline_is_told_with_its_retry_after(at: Place) -> None:
    with _calls_upstream(at, 1):
        error = _raised(
            anthropic.RateLimitError, lambda: at.client().messages.create(**_ask("[[sim: error=429 retry_after=7]]"))
        )
    assert error.response.headers["retry-after"] == "7"
    assert error.response.headers["x-should-retry"] == "false"
    assert error.body["error"]["type"] == "rate_limit_error"


def a_spend_cap_is_told_after_one_call_although_the_sdk_would_retry_it(at: Place) -> None:
    with _calls_upstream(at, 1):
        error = _raised(SPEND_CAP, lambda: at.client().messages.create(**_ask("[[sim: error=429-spend]]")))
    assert isinstance(error, anthropic.RateLimitError)
    assert _error_code(error) == "enforced_spend_limit_reached"


def an_overload_that_lasts_is_told_after_three_calls_and_not_nine(at: Place) -> None:
    with _calls_upstream(at, 3):
        error = _raised(exceptions.OverloadedError, lambda: at.client().messages.create(**_ask("[[sim: error=529]]")))
    assert error.body["error"]["type"] == "overloaded_error"
    assert error.response.headers["x-should-retry"] == "false"


def a_server_error_that_lasts_is_told_after_three_calls_and_not_nine(at: Place) -> None:
    with _calls_upstream(at, 3):
        error = _raised(
            anthropic.InternalServerError, lambda: at.client().messages.create(**_ask("[[sim: error=500]]"))
        )
    assert (error.status_code, error.body["error"]["type"]) == (500, "api_error")


def headgates_own_trouble_with_its_key_is_a_502_after_one_call_and_shows_nothing_of_it(at: Place) -> None:
    for status in (401, 403):
        with _calls_upstream(at, 1):
            error = _raised(
                anthropic.InternalServerError,
                lambda kind=status: at.client().messages.create(**_ask(f"[[sim: error={kind}]]")),
            )
        assert (error.status_code, error.body["error"]["type"]) == (502, "api_error")
        assert "x-api-key" not in str(error.body)


def an_overload_that_passes_is_never_seen(at: Place) -> None:
    for streamed in (False, True):
        at.control("/sim/faults", {"kind": "529", "count": 2})
        with _calls_upstream(at, 3):
            if streamed:
                with at.client(max_retries=0).messages.stream(**_ask("[[sim: tokens=20]]")) as stream:
                    message = stream.get_final_message()
            else:
                message = at.client(max_retries=0).messages.create(**_ask("[[sim: tokens=20]]"))
        assert message.usage.output_tokens == 20


def an_error_before_the_first_word_of_a_stream_is_never_seen_when_it_passes(at: Place) -> None:
    at.control("/sim/faults", {"kind": "error-first"})
    with _calls_upstream(at, 2), at.client(max_retries=0).messages.stream(**_ask("[[sim: tokens=20]]")) as stream:
        assert stream.get_final_message().usage.output_tokens == 20


def an_error_before_the_first_word_that_lasts_has_the_class_of_its_status(at: Place) -> None:
    def act() -> None:
        with at.client().messages.stream(**_ask("[[sim: error=error-first]]")) as stream:
            stream.until_done()

    with _calls_upstream(at, 3):
        error = _raised(exceptions.OverloadedError, act)
    assert error.body["error"]["type"] == "overloaded_error"


def an_error_in_mid_stream_is_raised_after_the_text_before_it(at: Place) -> None:
    pieces: list[str] = []

    def act() -> None:
        with at.client().messages.stream(**_ask("[[sim: error=error-mid at=8 tokens=100]]")) as stream:
            pieces.extend(stream.text_stream)

    with _calls_upstream(at, 1):
        error = _raised(anthropic.APIStatusError, act)
    assert pieces
    assert error.body["error"]["type"] == "overloaded_error"


def a_stream_that_ends_early_raises_where_the_sdk_alone_would_be_silent(at: Place) -> None:
    for fault in ("truncate at=8", "cut at=1200", "garbage at=8"):
        for read in ("text", "events", "final"):

            def act(fault: str = fault, read: str = read) -> Any:
                if read == "events":
                    asked = _ask(f"[[sim: error={fault} tokens=100]]", stream=True)
                    return list(at.client().messages.create(**asked))
                with at.client().messages.stream(**_ask(f"[[sim: error={fault} tokens=100]]")) as stream:
                    return list(stream.text_stream) if read == "text" else stream.get_final_message()

            error = _raised(anthropic.APIStatusError, act)
            assert error.body["error"]["type"] == "api_error", (fault, read)
            assert _error_code(error), (fault, read)


# how it is asked


def a_key_is_taken_in_either_header(at: Place) -> None:
    clients = {
        "as the SDK sends it": at.client(),
        "x-api-key": at.client(default_headers={"x-api-key": at.key}),
        "bearer": Anthropic(base_url=at.url, auth_token=at.key, api_key=None),
        "custom bearer": at.client(default_headers={"authorization": f"Bearer {at.key}"}),
    }
    for form, client in clients.items():
        assert client.messages.create(**_ask("[[sim: tokens=5]]")).usage.output_tokens == 5, form
        names = [name.lower() for name, _ in at.last_call()["headers"]]
        assert names.count("x-api-key") == 1, form
        assert "authorization" not in names, form


def the_query_and_the_betas_reach_anthropic(at: Place) -> None:
    client = at.client()
    message = client.beta.messages.create(
        **_ask("[[sim: tokens=5]]"),
        betas=["interleaved-thinking-2025-05-14", "context-1m-2025-08-07"],
        extra_query={"beta": "true"},
    )
    assert message.usage.output_tokens == 5
    call = at.last_call()
    assert (call["path"], call["query"]) == ("/v1/messages", "beta=true")
    headers = {name.lower(): value for name, value in call["headers"]}
    assert headers["anthropic-beta"] == "interleaved-thinking-2025-05-14,context-1m-2025-08-07"
    assert headers["anthropic-version"] == ("2023-06-01" if _is_0() else "2026-10-21")
    assert headers["user-agent"].endswith(f"Anthropic/Python {anthropic.__version__}")


def a_base_url_with_a_slash_at_its_end_works_too(at: Place) -> None:
    client = Anthropic(base_url=f"{at.url}/", api_key=at.key)
    assert client.messages.create(**_ask("[[sim: tokens=5]]")).usage.output_tokens == 5


def _is_0() -> bool:
    return anthropic.__version__.startswith("0.")


def _base64(text: str) -> str:
    return "base64:" + base64.b64encode(text.encode()).decode()


def _ended(client: Anthropic, batch_id: str) -> Any:
    give_up_at = time.monotonic() + 10
    while time.monotonic() < give_up_at:
        batch = client.messages.batches.retrieve(batch_id)
        if batch.processing_status == "ended":
            return batch
    raise AssertionError(f"{batch_id} did not end")


LAWS = {
    name: act
    for name, act in list(globals().items())
    if inspect.isfunction(act) and act.__module__ == __name__ and not name.startswith("_")
}

if __name__ == "__main__":
    place = Place(*sys.argv[1:])
    sys.stdout.write(json.dumps({"version": anthropic.__version__}) + "\n")
    for name, law in LAWS.items():
        trouble = ""
        try:
            law(place)
        except Exception:
            trouble = traceback.format_exc()
        sys.stdout.write(json.dumps({"law": name, "trouble": trouble}) + "\n")
        sys.stdout.flush()
