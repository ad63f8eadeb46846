"""What the API refuses, and in which words, under both versions."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.simulator.directives import directive_of
from headgate.simulator.errors import Rejected
from headgate.simulator.generate import Ids, compose
from headgate.simulator.models import load_catalogue
from headgate.simulator.prompt import build_prompt
from headgate.simulator.usage import Usage
from headgate.simulator.validate import Ask, check_context, check_version, read_ask, read_betas, read_body

CATALOGUE = load_catalogue()
OLD, NEW = "2023-06-01", "2026-10-21"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TOOL: dict[str, Any] = {"name": "t", "input_schema": {"type": "object"}}


def ask(version: str = OLD, betas: str | None = None, purpose: Any = "message", **body: Any) -> Ask:
    base: dict[str, Any] = {"model": "claude-sonnet-4-6", "max_tokens": 100, "messages": HELLO}
    return read_ask(
        {key: value for key, value in (base | body).items() if value is not ...},
        version=version,
        betas=betas,
        catalogue=CATALOGUE,
        organization="org",
        purpose=purpose,
    )


def refusal(*arguments: Any, **body: Any) -> tuple[int, str]:
    with pytest.raises(Rejected) as raised:
        ask(*arguments, **body)
    return raised.value.error.status, raised.value.error.message


def marked(count: int, ttl: str = "5m") -> list[dict[str, Any]]:
    return [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": ttl}} for _ in range(count)]


def test_a_plain_request_is_read_with_its_defaults() -> None:
    found = ask()
    assert (found.thinking, found.effort, found.stream, found.inference_geo) == ("off", "high", False, "global")
    assert ask(model="claude-opus-5-5").thinking == "adaptive"
    assert ask(model="claude-opus-5-5").effort == "medium"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": ...}, "max_tokens: Field required"),
        ({"messages": ...}, "messages: Field required"),
        ({"messages": []}, "at least one message"),
        ({"max_tokens": "9"}, "valid integer"),
        ({"max_tokens": True}, "valid integer"),
        ({"max_tokens": -1}, "greater than or equal"),
        ({"max_tokens": 128_001}, "max_tokens: 128001 > 128000"),
        ({"stream": "yes"}, "valid boolean"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}, *HELLO]}, 'must use the "user" role'),
        ({"messages": [{"role": "user", "content": ""}]}, "non-empty content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, "must be non-empty"),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "'hologram'"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "content.0.type: Field required"),
        ({"messages": ["x"]}, "Input should be an object"),
        ({"messages": {}}, "valid list"),
        ({"system": 1}, "system: Input"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"temperature": 2}, "temperature"),
        ({"stop_sequences": [" "]}, "non-whitespace"),
        ({"stop_sequences": "x"}, "valid list"),
        ({"unheard_of": 1}, "unheard_of: Extra inputs are not permitted"),
        ({"fallbacks": "default"}, "fallbacks: Extra inputs are not permitted"),
        ({"tools": [{"input_schema": {"type": "object"}}]}, "name: Field required"),
        ({"tools": [TOOL | {"name": "bad name"}]}, "should match pattern"),
        ({"tools": [TOOL | {"name": "x" * 65}]}, "should match pattern"),
        ({"tools": [TOOL, TOOL]}, "must be unique"),
        ({"tools": [{"name": "t"}]}, "input_schema"),
        ({"tool_choice": {"type": "auto"}}, "while providing tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "u"}}, "not found in provided tools"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"speed": "fast"}, "fast mode is not supported"),
        ({"inference_geo": "mars"}, "inference_geo"),
        ({"thinking": {"type": "dreaming"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens: Field required"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1_000}}, "1024"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2_000}}, "greater than `thinking.budget_tokens`"),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "Well,"}]},
            "does not support assistant message prefill",
        ),
    ],
)
def test_a_wrong_parameter_is_a_400_that_names_it(body: dict[str, Any], words: str) -> None:
    status, message = refusal(**body)
    assert status == 400
    assert words in message


def test_a_tool_call_and_its_result_belong_together() -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "t", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "ok"}]}
    ask(messages=[*HELLO, call, result], tools=[TOOL])
    assert "without `tool_result` blocks" in refusal(messages=[*HELLO, call, *HELLO])[1]
    assert "unexpected `tool_use_id`" in refusal(messages=[*HELLO, result])[1]


@pytest.mark.parametrize("name", ["claude-nobody", "claude-opus-4-1", "claude-3-5-haiku-20241022"])
def test_unknown_and_retired_models_are_a_404(name: str) -> None:
    assert refusal(model=name) == (404, f"model: {name}")


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k"])
def test_sampling_is_gone_in_the_new_version_and_on_new_models(name: str) -> None:
    value = 5 if name == "top_k" else 0.5
    assert refusal(NEW, **{name: value})[0] == 400
    assert ask(OLD, **{name: value})
    assert refusal(OLD, model="claude-opus-4-7", **{name: value})[0] == 400


def test_a_default_temperature_is_harmless_on_a_new_model_under_the_old_version() -> None:
    assert ask(OLD, model="claude-opus-4-7", temperature=1.0)


def test_haiku_4_5_takes_one_of_temperature_and_top_p() -> None:
    assert ask(model="claude-haiku-4-5", temperature=0.5)
    assert "cannot both" in refusal(model="claude-haiku-4-5", temperature=0.5, top_p=0.5)[1]


def test_the_new_version_refuses_documents_from_the_assistant_and_citations_from_the_user() -> None:
    document = {"type": "document", "source": {"type": "text", "data": "x"}}
    told = [*HELLO, {"role": "assistant", "content": [document]}, *HELLO]
    assert ask(OLD, messages=told)
    assert refusal(NEW, messages=told)[0] == 400
    cited = [{"role": "user", "content": [{"type": "text", "text": "x", "citations": [{"a": 1}]}]}]
    assert ask(OLD, messages=cited)
    assert refusal(NEW, messages=cited)[0] == 400


@pytest.mark.parametrize(
    ("model", "kind", "accepted"),
    [
        ("claude-fable-5-2", "adaptive", True),
        ("claude-fable-5-2", "disabled", False),
        ("claude-opus-5-5", "enabled", False),
        ("claude-opus-5", "disabled", True),
        ("claude-opus-4-7", "enabled", False),
        ("claude-opus-4-7", "disabled", True),
        ("claude-sonnet-4-6", "enabled", True),
        ("claude-sonnet-5-5", "between_tools", True),
        ("claude-sonnet-5-5", "disabled", False),
        ("claude-sonnet-5", "between_tools", False),
        ("claude-haiku-4-5", "adaptive", False),
        ("claude-haiku-4-5", "enabled", True),
    ],
)
def test_each_model_accepts_its_own_kinds_of_thinking(model: str, kind: str, accepted: bool) -> None:
    body: dict[str, Any] = {"model": model, "max_tokens": 5_000, "thinking": {"type": kind}}
    if kind == "enabled":
        body["thinking"]["budget_tokens"] = 2_000
    if accepted:
        assert ask(**body)
    else:
        assert refusal(**body)[0] == 400


def test_the_known_words_of_refused_thinking() -> None:
    assert refusal(model="claude-haiku-4-5", thinking={"type": "adaptive"})[1] == (
        "adaptive thinking is not supported on this model"
    )
    assert refusal(model="claude-opus-5", thinking={"type": "enabled", "budget_tokens": 2_000})[1] == (
        '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" and '
        '"output_config.effort" to control thinking behavior.'
    )
    assert "between_tools" in refusal(model="claude-sonnet-5-5", thinking={"type": "disabled"})[1]


def test_opus_5_cannot_stop_thinking_at_the_highest_efforts() -> None:
    off = {"type": "disabled"}
    assert ask(model="claude-opus-5", thinking=off, output_config={"effort": "high"})
    assert refusal(model="claude-opus-5", thinking=off, output_config={"effort": "xhigh"})[0] == 400


def test_prefill_and_forced_tools_depend_on_the_model() -> None:
    prefilled = [*HELLO, {"role": "assistant", "content": "Well,"}]
    assert ask(model="claude-haiku-4-5", messages=prefilled)
    forced: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "any"}}
    assert ask(**forced)
    for name in ("claude-opus-5-5", "claude-sonnet-5-5", "claude-fable-5-1"):
        assert refusal(model=name, **forced)[0] == 400


def test_four_breakpoints_are_enough_and_the_automatic_one_counts() -> None:
    assert ask(system=marked(4))
    assert "maximum of 4" in refusal(system=marked(5))[1]
    assert "Found 5" in refusal(system=marked(4), cache_control={"type": "ephemeral"})[1]
    assert ask(messages=[{"role": "user", "content": marked(4)}], cache_control={"type": "ephemeral"})


def test_an_hour_mark_may_not_follow_a_five_minute_mark() -> None:
    assert ask(system=marked(1, "1h") + marked(1))
    assert "ttl='1h'" in refusal(system=marked(1) + marked(1, "1h"))[1]
    assert refusal(system=marked(1, "2h"))[0] == 400


def test_a_warm_up_cannot_stream_think_with_a_budget_force_tools_or_ask_for_json() -> None:
    assert ask(max_tokens=0)
    for body in (
        {"stream": True},
        {"thinking": {"type": "enabled", "budget_tokens": 2_000}},
        {"tools": [TOOL], "tool_choice": {"type": "any"}},
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
    ):
        assert "max_tokens: 0" in refusal(max_tokens=0, **body)[1]
    assert refusal(purpose="batch", max_tokens=0)[0] == 400


def test_a_batch_takes_no_stream_and_no_speed_but_300k_tokens_with_the_beta() -> None:
    assert refusal(purpose="batch", stream=True)[0] == 400
    assert refusal(purpose="batch", speed="standard")[0] == 400
    assert refusal(purpose="batch", max_tokens=300_000)[0] == 400
    assert ask(purpose="batch", max_tokens=300_000, betas="output-300k-2026-03-24")


def test_counting_needs_no_max_tokens() -> None:
    assert ask(purpose="count", max_tokens=...)


def test_a_beta_field_passes_with_its_beta() -> None:
    assert ask(betas="server-side-fallback-2026-07-01", fallbacks="default")


def test_unknown_betas_are_named() -> None:
    assert read_betas("compact-2026-01-12,files-api-2025-04-14") == {"compact-2026-01-12", "files-api-2025-04-14"}
    with pytest.raises(Rejected, match="`nonsense-2020`"):
        read_betas("compact-2026-01-12, nonsense-2020")


def test_the_version_is_required_and_known() -> None:
    assert check_version(NEW) == NEW
    for version in (None, "2020-01-01"):
        with pytest.raises(Rejected):
            check_version(version)


def test_a_prompt_beyond_the_context_is_too_long() -> None:
    check_context(ask(model="claude-haiku-4-5"), 200_000)
    with pytest.raises(Rejected, match="prompt is too long: 200001 tokens > 200000 maximum"):
        check_context(ask(model="claude-haiku-4-5"), 200_001)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000],
)
def test_a_body_that_is_not_an_object_is_a_400_and_never_a_crash(raw: bytes) -> None:
    with pytest.raises(Rejected) as raised:
        read_body(raw)
    assert raised.value.error.status == 400


RICH: dict[str, Any] = {
    "model": "claude-sonnet-4-6",
    "max_tokens": 100,
    "cache_control": {"type": "ephemeral", "ttl": "5m"},
    "metadata": {"user_id": "u [[sim: tokens=3]]"},
    "stop_sequences": ["END"],
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    "thinking": {"type": "adaptive", "display": "omitted"},
    "tools": [{"name": "t", "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}],
    "tool_choice": {"type": "auto"},
    "diagnostics": {"previous_message_id": None},
    "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": ""}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "t", "input": {}}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}],
        },
        {"role": "assistant", "content": "call t"},
        {
            "role": "user",
            "content": [{"type": "document", "source": {"type": "text", "data": "d"}}, {"type": "text", "text": "t"}],
        },
    ],
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "content"]), inner),
    max_leaves=5,
)


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(path for key, inner in entries for path in paths(inner, (*before, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@settings(max_examples=1_000)
@given(st.sampled_from(paths(RICH)[1:]), json_values, st.sampled_from(["message", "count", "batch"]))
def test_any_json_anywhere_is_answered_or_refused_and_never_a_crash(path: Any, value: Any, purpose: Any) -> None:
    body = replaced(RICH, path, value)
    try:
        found = ask(purpose=purpose, **body)
    except Rejected as rejected:
        refused = rejected.error
    else:
        prompt = build_prompt(body, found.model, thinking="off", effort="low", speed="standard", betas=frozenset())
        compose(
            found,
            directive_of(body, None),
            Usage(),
            ids=Ids(1),
            seed=1,
            prompt_hash=prompt.blocks[-1].prefix,
            answer_tokens=20,
            organization="org",
        )
        return
    assert refused.status in (400, 404)
    assert msgspec.json.decode(refused.body("req_1"))["request_id"] == "req_1"
