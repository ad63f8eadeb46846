"""One request for another model: by hand, and for every pair of models against a validator that shares no code with it.

The validator is the simulator's, with the models that Anthropic has retired called back to life, so that they are
pairs like any other. Bodies are written in many spellings, and taken apart again by the standard library alone.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from itertools import permutations
from time import perf_counter
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from headgate.policy.fallback import CONTEXT_SHARE, Unfit, is_dearer, rewrite
from headgate.simulator.binding import sign
from headgate.simulator.errors import Rejected
from headgate.simulator.models import Catalogue, load_catalogue
from headgate.simulator.prompt import conversation_hash
from headgate.simulator.validate import Ask, read_ask, read_body
from headgate.wire.catalog import Catalog, day_start_ns, load_catalog, packaged
from headgate.wire.message import InvalidBody, scan

CATALOG = packaged()
MODELS = [model.id for model in CATALOG.models]
SIMULATED = load_catalogue()
REVIVED = Catalogue(tuple(replace(model, lifecycle="active") for model in SIMULATED.models), SIMULATED.modifiers)
BETAS = "context-management-2025-06-27"
NOV = day_start_ns(date(2026, 11, 22))
EARLY = day_start_ns(date(2025, 12, 1))
"""Before any model of the catalogue was retired."""

ADAPTIVE_ONLY, NO_ADAPTIVE, BETWEEN = "claude-opus-5-5", "claude-haiku-4-5", "claude-sonnet-5-5"
OFF_BY_DEFAULT, DISABLED_TO_HIGH, OLD_AND_NEW = "claude-opus-4-8", "claude-opus-5", "claude-sonnet-4-6"
OTHER_ADAPTIVE_ONLY, FREE_TOOL_CHOICE, NO_THINKING = "claude-fable-5-2", "claude-fable-5", "claude-3-5-haiku-20241022"
EFFORTS_TO_HIGH, FAST = "claude-opus-4-5", "claude-fable-5-2"

HELLO = {"role": "user", "content": "Hello"}
TOOL = {"name": "look", "input_schema": {"type": "object"}}
THOUGHT: dict[str, Any] = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
REDACTED = {"type": "redacted_thinking", "data": "eA=="}
SAID = {"type": "text", "text": "Well."}
CALL = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "seen"}
CLEAR = {"type": "clear_thinking_20251015", "keep": "all"}
CLEAR_TOOLS = {"type": "clear_tool_uses_20250919"}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def body_of(source: str, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"model": source, "max_tokens": 4_096, "messages": [HELLO]}
    return {name: value for name, value in (base | fields).items() if value is not ...}


def rewritten(
    body: bytes | dict[str, Any],
    source: str,
    target: str,
    *,
    input_tokens: int = 1_000,
    at_ns: int = EARLY,
    continued: bool = False,
) -> bytes | Unfit:
    request = scan(body if isinstance(body, bytes) else json.dumps(body).encode())
    return rewrite(
        request,
        source=source,
        target=target,
        catalog=CATALOG,
        input_tokens=input_tokens,
        at_ns=at_ns,
        continued=continued,
    )


def outcome(source: str, target: str, fields: dict[str, Any], **facts: Any) -> dict[str, Any] | str:
    """The fields of the new body beside those of `body_of` that are as they were, or the reason why there is none."""
    made = rewritten(body_of(source, **fields), source, target, **facts)
    if isinstance(made, Unfit):
        return made.reason
    found = json.loads(made)
    assert found.pop("model") == target
    plain = body_of(source)
    return {name: value for name, value in found.items() if name not in plain or value != plain[name]}


# ---- by hand ---------------------------------------------------------------------------------------------------------

ENABLED = {"type": "enabled", "budget_tokens": 2_000}
ADAPTIVE = {"type": "adaptive"}
DISABLED = {"type": "disabled"}
BETWEEN_TOOLS = {"type": "between_tools"}

THINKING: list[tuple[str, str, Any, Any]] = [
    # source, target, thinking asked for (...: none), thinking sent
    (OLD_AND_NEW, NO_ADAPTIVE, ENABLED, ENABLED),
    (NO_ADAPTIVE, OLD_AND_NEW, ENABLED, ENABLED),
    (NO_ADAPTIVE, ADAPTIVE_ONLY, ENABLED, ADAPTIVE),
    (NO_ADAPTIVE, OFF_BY_DEFAULT, ENABLED | {"display": "omitted"}, ADAPTIVE | {"display": "omitted"}),
    (OLD_AND_NEW, NO_THINKING, ENABLED, DISABLED),
    (OLD_AND_NEW, OFF_BY_DEFAULT, ADAPTIVE, ADAPTIVE),
    (OLD_AND_NEW, NO_ADAPTIVE, ADAPTIVE | {"display": "summarized"}, DISABLED),
    (ADAPTIVE_ONLY, NO_THINKING, ADAPTIVE, DISABLED),
    (OFF_BY_DEFAULT, NO_ADAPTIVE, DISABLED, DISABLED),
    (OFF_BY_DEFAULT, ADAPTIVE_ONLY, DISABLED, ...),
    (OFF_BY_DEFAULT, BETWEEN, DISABLED, BETWEEN_TOOLS),
    (BETWEEN, OFF_BY_DEFAULT, BETWEEN_TOOLS, DISABLED),
    (BETWEEN, ADAPTIVE_ONLY, BETWEEN_TOOLS, ...),
    (NO_ADAPTIVE, OFF_BY_DEFAULT, ..., ...),
    (NO_ADAPTIVE, DISABLED_TO_HIGH, ..., DISABLED),
    (NO_ADAPTIVE, BETWEEN, ..., BETWEEN_TOOLS),
    (NO_ADAPTIVE, ADAPTIVE_ONLY, ..., ...),
    (ADAPTIVE_ONLY, DISABLED_TO_HIGH, ..., ...),
    (ADAPTIVE_ONLY, OFF_BY_DEFAULT, ..., ADAPTIVE),
    (ADAPTIVE_ONLY, NO_ADAPTIVE, ..., ...),
    (NO_ADAPTIVE, DISABLED_TO_HIGH, None, DISABLED),
    (ADAPTIVE_ONLY, NO_ADAPTIVE, None, None),
    ("claude-of-next-year", DISABLED_TO_HIGH, ..., ...),
    ("claude-of-next-year", NO_ADAPTIVE, ADAPTIVE, DISABLED),
    ("claude-of-next-year", DISABLED_TO_HIGH, {"type": "of_next_year"}, ...),
]


@pytest.mark.parametrize(("source", "target", "asked", "sent"), THINKING)
def test_thinking_keeps_its_meaning_as_far_as_the_target_has_it(
    source: str, target: str, asked: Any, sent: Any
) -> None:
    expected = {} if sent is ... else {"thinking": sent}
    assert outcome(source, target, {"thinking": asked}) == expected


EFFORT: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (OFF_BY_DEFAULT, ADAPTIVE_ONLY, {"effort": "max"}, {"output_config": {"effort": "max"}}),
    (OFF_BY_DEFAULT, OLD_AND_NEW, {"effort": "xhigh"}, {"output_config": {"effort": "high"}}),
    (OFF_BY_DEFAULT, EFFORTS_TO_HIGH, {"effort": "max"}, {"output_config": {"effort": "high"}}),
    (OFF_BY_DEFAULT, NO_ADAPTIVE, {"effort": "low"}, {}),
    (OFF_BY_DEFAULT, NO_ADAPTIVE, {"effort": "low", "format": 1}, {"output_config": {"format": 1}}),
    (OFF_BY_DEFAULT, NO_ADAPTIVE, {"effort": None}, {"output_config": {"effort": None}}),
    (OFF_BY_DEFAULT, OLD_AND_NEW, {"effort": "of_next_year"}, {}),
    (
        OFF_BY_DEFAULT,
        DISABLED_TO_HIGH,
        {"effort": "xhigh"},
        {"output_config": {"effort": "high"}, "thinking": DISABLED},
    ),
    (
        OFF_BY_DEFAULT,
        DISABLED_TO_HIGH,
        {"effort": "medium"},
        {"output_config": {"effort": "medium"}, "thinking": DISABLED},
    ),
]


@pytest.mark.parametrize(("source", "target", "config", "expected"), EFFORT)
def test_an_effort_that_the_target_lacks_is_the_next_lower_one(
    source: str, target: str, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert outcome(source, target, {"output_config": config}) == expected


PRICE = """{ effective_from = 2020-01-01, speed = "standard", prompt_over = %d, input = %s, cache_write_5m = 9.0, \
cache_write_1h = 9.0, cache_read = 0.1, output = %s, source = "s" }"""


def small_model(name: str, default: str, efforts: str, *prices: tuple[int, str, str]) -> str:
    return f"""
[[model]]
id = "{name}"
line = "opus"
rate_class = "r"
status = "active"
released = 2020-01-01
context_tokens = 1000
max_output_tokens = 1000
cache_min_tokens = 1
tokenizer = "opus-4.7"
us_multiplier = false
source = "s"
thinking = ["adaptive", "enabled", "disabled"]
thinking_default = "{default}"
thinking_disabled_effort_max = "high"
prefill = true
sampling = "one"
forced_tool_choice = true
efforts = {efforts}
effort_default = "high"
price = [{", ".join(PRICE % price for price in prices or [(0, "1.0", "1.0")])}]
"""


def catalog_of(*models: str) -> Catalog:
    head = """
as_of = 2026-01-01
modifiers = {batch = 0.5, us_inference = 1.1}
server_tools = {web_search_per_1000_usd = 10.0, source = "s"}
sources.s = {as_of = 2026-01-01, title = "t", url = "u", verified = true}
"""
    return load_catalog((head + "".join(models)).encode())


def test_an_effort_below_all_is_the_lowest_and_a_budget_above_all_is_no_thinking() -> None:
    catalog = catalog_of(
        small_model("all", "adaptive", '["low", "high"]'), small_model("high", "disabled", '["max", "high"]')
    )
    body = b'{"model":"all","max_tokens":2000,"messages":[],"thinking":{"type":"enabled","budget_tokens":1024},'
    body += b'"output_config":{"effort":"low"}}'
    made = rewrite(scan(body), source="all", target="high", catalog=catalog, input_tokens=1, at_ns=EARLY)
    assert made == (
        b'{"model":"high","max_tokens":1000,"messages":[],"thinking":{"type":"disabled"},"output_config":{"effort":"high"}}'
    )


LIMITS: list[tuple[int, dict[str, Any] | None, int, dict[str, Any] | None]] = [
    # max_tokens and thinking before, and after: a model of 128,000 output tokens to one of 64,000
    (64_000, None, 64_000, None),
    (64_001, None, 64_000, None),
    (128_000, None, 64_000, None),
    (0, None, 0, None),
    (128_000, ENABLED, 64_000, ENABLED),
    (128_000, ENABLED | {"budget_tokens": 32_000}, 64_000, ENABLED | {"budget_tokens": 32_000}),
    (128_000, ENABLED | {"budget_tokens": 63_999}, 64_000, ENABLED | {"budget_tokens": 32_000}),
    (128_000, ENABLED | {"budget_tokens": 127_999}, 64_000, ENABLED | {"budget_tokens": 32_000}),
    (64_000, ENABLED | {"budget_tokens": 63_999}, 64_000, ENABLED | {"budget_tokens": 63_999}),
]


@pytest.mark.parametrize(("before", "thinking_before", "after", "thinking_after"), LIMITS)
def test_max_tokens_is_lowered_to_what_the_target_can_and_a_budget_leaves_half_of_it(
    before: int, thinking_before: Any, after: int, thinking_after: Any
) -> None:
    made = rewritten(body_of(OLD_AND_NEW, max_tokens=before, thinking=thinking_before), OLD_AND_NEW, NO_ADAPTIVE)
    assert isinstance(made, bytes)
    assert json.loads(made)["max_tokens"] == after
    assert json.loads(made)["thinking"] == thinking_after


def test_a_count_has_no_max_tokens_and_gets_none() -> None:
    made = rewritten(body_of(OLD_AND_NEW, max_tokens=...), OLD_AND_NEW, NO_ADAPTIVE)
    assert isinstance(made, bytes)
    assert json.loads(made) == body_of(NO_ADAPTIVE, max_tokens=...)


@pytest.mark.parametrize(
    ("source", "target", "input_tokens", "fits"),
    [
        (OLD_AND_NEW, NO_ADAPTIVE, int(CONTEXT_SHARE * 200_000), True),
        (OLD_AND_NEW, NO_ADAPTIVE, int(CONTEXT_SHARE * 200_000) + 1, False),
        # As large a context in the same tokens: an estimate is no reason.
        (EFFORTS_TO_HIGH, NO_ADAPTIVE, 199_000, True),
        (ADAPTIVE_ONLY, OFF_BY_DEFAULT, 999_000, True),
        # As large, but the same text has more tokens there.
        (OLD_AND_NEW, OFF_BY_DEFAULT, 999_000, False),
        ("claude-of-next-year", OFF_BY_DEFAULT, 999_000, False),
    ],
)
def test_a_prompt_that_would_not_fit_with_room_for_an_answer_stays(
    source: str, target: str, input_tokens: int, fits: bool
) -> None:
    found = outcome(source, target, {"thinking": DISABLED}, input_tokens=input_tokens)
    assert (found != "context") is fits


OTHERS: list[tuple[str, str, dict[str, Any], Any]] = [
    # Sampling
    (OLD_AND_NEW, OFF_BY_DEFAULT, {"temperature": 0.2, "top_p": 0.9, "top_k": 5}, {}),
    (OLD_AND_NEW, OFF_BY_DEFAULT, {"temperature": None, "stop_sequences": ["x"]}, {"stop_sequences": ["x"]}),
    (OLD_AND_NEW, NO_ADAPTIVE, {"temperature": 0.2, "top_p": 0.9, "top_k": 5}, {"temperature": 0.2, "top_k": 5}),
    (OLD_AND_NEW, NO_ADAPTIVE, {"temperature": None, "top_p": 0.9}, {"temperature": None, "top_p": 0.9}),
    (OLD_AND_NEW, NO_ADAPTIVE, {"top_p": 0.9}, {"top_p": 0.9}),
    (OFF_BY_DEFAULT, OLD_AND_NEW, {"temperature": 1.0}, {"temperature": 1.0}),
    # Forced tools
    (OLD_AND_NEW, ADAPTIVE_ONLY, {"tools": [TOOL], "tool_choice": {"type": "any"}}, "forced_tool_choice"),
    (OLD_AND_NEW, ADAPTIVE_ONLY, {"tool_choice": {"type": "tool", "name": "look"}}, "forced_tool_choice"),
    (OLD_AND_NEW, ADAPTIVE_ONLY, {"tool_choice": {"type": "auto"}}, {"tool_choice": {"type": "auto"}}),
    (OLD_AND_NEW, ADAPTIVE_ONLY, {"tool_choice": None}, {"tool_choice": None}),
    (OLD_AND_NEW, FREE_TOOL_CHOICE, {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "any"}}),
    # No thinking before a forced call, though the source thinks by default
    (FREE_TOOL_CHOICE, OFF_BY_DEFAULT, {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "any"}}),
    # Where inference runs
    (OLD_AND_NEW, NO_ADAPTIVE, {"inference_geo": "us"}, "inference_geo"),
    (OLD_AND_NEW, NO_ADAPTIVE, {"inference_geo": "global"}, {}),
    (OLD_AND_NEW, NO_ADAPTIVE, {"inference_geo": None}, {"inference_geo": None}),
    (OLD_AND_NEW, OFF_BY_DEFAULT, {"inference_geo": "us"}, {"inference_geo": "us"}),
    # Server-held state
    (OLD_AND_NEW, NO_ADAPTIVE, {"container": "c"}, "server_state"),
    (OLD_AND_NEW, NO_ADAPTIVE, {"thread": {"id": "t"}}, "server_state"),
    # The edit that clears thoughts needs a model that thinks
    (
        OLD_AND_NEW,
        NO_ADAPTIVE,
        {"thinking": ADAPTIVE, "context_management": {"edits": [CLEAR]}},
        {"thinking": DISABLED},
    ),
    (
        OLD_AND_NEW,
        NO_ADAPTIVE,
        {"thinking": ADAPTIVE, "context_management": {"edits": [CLEAR, CLEAR_TOOLS], "x": 1}},
        {"thinking": DISABLED, "context_management": {"edits": [CLEAR_TOOLS], "x": 1}},
    ),
    (
        OLD_AND_NEW,
        NO_ADAPTIVE,
        {"thinking": ADAPTIVE, "context_management": {"edits": [CLEAR], "x": 1}},
        {"thinking": DISABLED, "context_management": {"x": 1}},
    ),
    (
        OLD_AND_NEW,
        NO_ADAPTIVE,
        {"thinking": ENABLED, "context_management": {"edits": [CLEAR]}},
        {"thinking": ENABLED, "context_management": {"edits": [CLEAR]}},
    ),
    (
        OLD_AND_NEW,
        NO_ADAPTIVE,
        {"thinking": DISABLED, "context_management": {"edits": None}},
        {"thinking": DISABLED, "context_management": {"edits": None}},
    ),
    (
        ADAPTIVE_ONLY,
        OTHER_ADAPTIVE_ONLY,
        {"context_management": {"edits": [CLEAR]}},
        {"context_management": {"edits": [CLEAR]}},
    ),
    # What nobody has heard of
    (OLD_AND_NEW, NO_ADAPTIVE, {"unheard_of": {"a": [1]}, "stream": True}, {"unheard_of": {"a": [1]}, "stream": True}),
    # Models
    (OLD_AND_NEW, "claude-of-next-year", {}, "unknown_target"),
]


@pytest.mark.parametrize(("source", "target", "fields", "expected"), OTHERS)
def test_each_parameter_is_made_to_fit_or_says_why_it_cannot(
    source: str, target: str, fields: dict[str, Any], expected: Any
) -> None:
    assert outcome(source, target, fields) == expected


@pytest.mark.parametrize(
    ("source", "target", "day", "speed", "kept"),
    [
        ("claude-opus-5", FAST, "2026-11-22", "fast", True),
        ("claude-opus-5", "claude-opus-4-8", "2026-11-29", "fast", True),
        ("claude-opus-5", "claude-opus-4-8", "2026-11-30", "fast", False),
        ("claude-opus-5", OLD_AND_NEW, "2026-11-22", "fast", False),
        ("claude-opus-5", OLD_AND_NEW, "2026-11-22", "standard", True),
        # Its own fast mode has ended and runs at the standard price, so there is no fast price to pay elsewhere.
        ("claude-opus-4-6", FAST, "2026-11-22", "fast", False),
        ("claude-of-next-year", FAST, "2026-11-22", "fast", True),
    ],
)
def test_fast_stays_where_it_is_to_be_had_on_that_day(
    source: str, target: str, day: str, speed: str, kept: bool
) -> None:
    found = outcome(source, target, {"speed": speed, "thinking": ADAPTIVE}, at_ns=day_start_ns(date.fromisoformat(day)))
    assert isinstance(found, dict)
    assert ("speed" in found) is kept


def test_a_model_that_is_gone_is_no_target_from_that_day_on() -> None:
    gone = day_start_ns(date(2026, 11, 30))
    assert rewritten(body_of(OLD_AND_NEW), OLD_AND_NEW, "claude-sonnet-4-5", at_ns=gone) == Unfit("retired_target")
    assert isinstance(rewritten(body_of(OLD_AND_NEW), OLD_AND_NEW, "claude-sonnet-4-5", at_ns=gone - 1), bytes)


NOW = {"role": "user", "content": "And now?"}
HISTORIES: list[tuple[str, list[Any], list[Any] | str]] = [
    ("none", [HELLO, assistant(SAID), NOW], [HELLO, assistant(SAID), NOW]),
    ("text for content", [HELLO, {"role": "assistant", "content": "thinking"}, NOW], [HELLO, ..., NOW]),
    ("first", [HELLO, assistant(THOUGHT, SAID), NOW], [HELLO, assistant(SAID), NOW]),
    ("last", [HELLO, assistant(SAID, REDACTED), NOW], [HELLO, assistant(SAID), NOW]),
    ("between", [HELLO, assistant(SAID, THOUGHT, REDACTED, SAID), NOW], [HELLO, assistant(SAID, SAID), NOW]),
    ("around", [HELLO, assistant(THOUGHT, SAID, THOUGHT), NOW], [HELLO, assistant(SAID), NOW]),
    ("alone", [HELLO, assistant(THOUGHT), NOW], [HELLO, NOW]),
    ("alone, twice", [HELLO, assistant(THOUGHT), NOW, assistant(THOUGHT, REDACTED), NOW], [HELLO, NOW, NOW]),
    (
        "alone, behind a system message",
        [HELLO, {"role": "system", "content": "s"}, assistant(THOUGHT), NOW],
        "emptied_turn",
    ),
    (
        "a finished tool turn",
        [HELLO, assistant(THOUGHT, CALL), user(RESULT), assistant(THOUGHT, SAID), NOW],
        [HELLO, assistant(CALL), user(RESULT), assistant(SAID), NOW],
    ),
    ("a tool turn under way", [HELLO, assistant(THOUGHT, CALL), user(RESULT)], "thinking_in_progress"),
    ("with words", [HELLO, assistant(REDACTED, CALL), user(RESULT, SAID)], "thinking_in_progress"),
    ("with a message of words", [HELLO, assistant(THOUGHT, CALL), user(RESULT), NOW], "thinking_in_progress"),
    (
        "with a system message",
        [HELLO, assistant(THOUGHT, CALL), user(RESULT), {"role": "system", "content": "s"}],
        "thinking_in_progress",
    ),
    (
        "a system message is no end of a turn",
        [HELLO, assistant(THOUGHT, SAID), {"role": "system", "content": "s"}],
        "thinking_in_progress",
    ),
    (
        "thoughts at its begin only",
        [HELLO, assistant(THOUGHT, CALL), user(RESULT), assistant(CALL), user(RESULT)],
        "thinking_in_progress",
    ),
    (
        "thoughts before it only",
        [HELLO, assistant(THOUGHT, SAID), NOW, assistant(CALL), user(RESULT)],
        [HELLO, assistant(SAID), NOW, assistant(CALL), user(RESULT)],
    ),
    ("a user's word for it", [user(THOUGHT), assistant(SAID), NOW], [user(THOUGHT), assistant(SAID), NOW]),
]


@pytest.mark.parametrize(("name", "before", "after"), HISTORIES, ids=[name for name, _, _ in HISTORIES])
def test_thoughts_of_finished_turns_are_left_out(name: str, before: list[Any], after: list[Any] | str) -> None:
    found = outcome(ADAPTIVE_ONLY, OTHER_ADAPTIVE_ONLY, {"messages": before})
    if isinstance(after, list):
        after = [old if new is ... else new for old, new in zip(before, after, strict=False)] if ... in after else after
        assert found == {"messages": after}
    else:
        assert found == after


def test_a_tool_turn_that_the_target_began_keeps_its_thoughts() -> None:
    before = [HELLO, assistant(THOUGHT, SAID), NOW, assistant(THOUGHT, CALL), user(RESULT)]
    after = [HELLO, assistant(SAID), NOW, assistant(THOUGHT, CALL), user(RESULT)]
    assert outcome(ADAPTIVE_ONLY, OTHER_ADAPTIVE_ONLY, {"messages": before}, continued=True) == {"messages": after}


def test_a_prefill_stays_with_models_that_take_one() -> None:
    prefill = [HELLO, {"role": "assistant", "content": "Once"}]
    assert outcome(NO_ADAPTIVE, OLD_AND_NEW, {"messages": prefill}) == "prefill"
    assert outcome(NO_ADAPTIVE, EFFORTS_TO_HIGH, {"messages": prefill}) == {"messages": prefill}
    thinking = [HELLO, assistant(THOUGHT)]
    assert outcome(NO_ADAPTIVE, EFFORTS_TO_HIGH, {"messages": thinking}) == "thinking_in_progress"


def test_of_one_model_by_two_names_the_name_is_all_that_changes() -> None:
    body = body_of(
        "claude-haiku-4-5", messages=[HELLO, assistant(THOUGHT, CALL), user(RESULT)], max_tokens=10**6, temperature=1
    )
    made = rewritten(body, "claude-haiku-4-5", "claude-haiku-4-5-20251001", input_tokens=10**9)
    assert isinstance(made, bytes)
    assert json.loads(made) == body | {"model": "claude-haiku-4-5-20251001"}


def test_every_byte_that_no_rule_names_stays() -> None:
    body = (
        b' {\r\n "top_p" : 0.5 ,"temperature":0.1, "x\\u0079z": [ 1.0,1e5 , {"b":1,"b":2} ] ,"\\u006dodel"  :\t'
        b'"claude-sonnet-4-6",\n"max_tokens": 128000 ,"messages":[ {"content":"\\u00e9 \xc3\xa9","role":"user","q":0} ,'
        b'{"\\u0072ole":"assistant" , "content": [ {"type":"th\\u0069nking","thinking":"t","signature":"s"} ,{ "text"'
        b':"a","type":"text","citations":null} ] } , {"role":"user","content":"hm"}] , "output_config":'
        b' { "effort" :"max"} , "thinking": { "budget_tokens":2000,"type" :"enabled" } , "z" : -0}\n'
    )
    assert rewritten(body, "claude-sonnet-4-6", "claude-opus-5-5") == (
        b' {\r\n "x\\u0079z": [ 1.0,1e5 , {"b":1,"b":2} ] ,"\\u006dodel"  :\t'
        b'"claude-opus-5-5",\n"max_tokens": 128000 ,"messages":[ {"content":"\\u00e9 \xc3\xa9","role":"user","q":0} ,'
        b'{"\\u0072ole":"assistant" , "content": [ { "text"'
        b':"a","type":"text","citations":null} ] } , {"role":"user","content":"hm"}] , "output_config":'
        b' { "effort" :"max"} , "thinking": { "type" :"adaptive" } , "z" : -0}\n'
    )


UNREADABLE = [
    b"{}",
    b'{"model":"m"}',
    b'{"messages":[]}',
    b'{"model":"m","messages":1}',
    b'{"model":"m","messages":[1]}',
    b'{"model":"m","messages":[{"role":"assistant"}]}',
    b'{"model":"m","messages":[{"role":1,"content":"x"}]}',
    b'{"model":"m","messages":[{"role":"user","content":[{"type":1}]}]}',
    b'{"model":"m","messages":[{"role":"user","content":[{}]}]}',
    b'{"model":"m","messages":[],"thinking":[]}',
    b'{"model":"m","messages":[],"thinking":{}}',
    b'{"model":"m","messages":[],"thinking":{"type":{}}}',
    b'{"model":"m","messages":[],"thinking":{"type":"enabled","type":"enabled"}}',
    b'{"model":"m","messages":[],"output_config":"x"}',
    b'{"model":"m","messages":[],"output_config":{"effort":1}}',
    b'{"model":"m","messages":[],"speed":1}',
    b'{"model":"m","messages":[],"tool_choice":"any"}',
    b'{"model":"m","messages":[],"inference_geo":{}}',
    b'{"model":"m","messages":[],"context_management":{"edits":{}}}',
]


@pytest.mark.parametrize("body", UNREADABLE)
def test_what_no_model_would_take_is_unreadable_and_raises_nothing(body: bytes) -> None:
    assert rewritten(body, OLD_AND_NEW, NO_ADAPTIVE) == Unfit("unreadable")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from(["adaptive", "enabled", "fast", "any", "low"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "effort", "edits"]), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ["messages", "thinking", "output_config", "tool_choice", "speed", "max_tokens", "top_p", "context_management"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from(MODELS), st.sampled_from(MODELS))
def test_any_json_is_rewritten_or_unfit_and_raises_nothing(fields: dict[str, Any], source: str, target: str) -> None:
    made = rewritten({"model": source, "messages": [HELLO]} | fields, source, target)
    assert isinstance(made, Unfit) or json.loads(made)["model"] == target


@pytest.mark.parametrize(
    "tail",
    [
        b'"thinking":' + b"[" * 150 + b"]" * 150,
        b'"messages":[{"role":"assistant","content":' + b"[" * 150 + b"]" * 150 + b"}]",
        b'"messages":[],"max_tokens":' + b"9" * 5_000,
        b'"messages":[],"max_tokens":100000,"thinking":{"type":"enabled","budget_tokens":' + b"9" * 5_000 + b"}",
        b'"messages":[],"thinking":{"type":"\\ud800"}',
        b'"messages":[],"thinking":{"type":"enabled","budget_tokens":NaN}',
    ],
)
def test_hostile_json_raises_nothing(tail: bytes) -> None:
    try:
        request = scan(b'{"model":"m",' + tail + b"}")
    except InvalidBody:
        return
    for target in MODELS:
        made = rewrite(request, source=OLD_AND_NEW, target=target, catalog=CATALOG, input_tokens=1, at_ns=EARLY)
        assert isinstance(made, bytes | Unfit)


@pytest.mark.alone
@pytest.mark.parametrize("text", [b"x" * 50_000, b"x" * 400])
def test_a_megabyte_of_history_takes_no_longer_than_a_glance(text: bytes) -> None:
    turn = b'{"role":"user","content":"%b"},{"role":"assistant","content":[%b,{"type":"text","text":"%b"}]},' % (
        text,
        json.dumps(THOUGHT).encode(),
        text,
    )
    turns = turn * (1_000_000 // len(turn))
    request = scan(
        b'{"model":"m","max_tokens":128000,"messages":[%b{"role":"user","content":"hm"}],"temperature":1}' % turns
    )
    best = float("inf")
    for _ in range(5):
        began = perf_counter()
        made = rewrite(request, source=OLD_AND_NEW, target=ADAPTIVE_ONLY, catalog=CATALOG, input_tokens=9, at_ns=NOV)
        best = min(best, perf_counter() - began)
    assert isinstance(made, bytes)
    assert b'"thinking"' not in made
    assert best < 0.05


# ---- every pair of models, before an independent witness -------------------------------------------------------------


def accepted(body: dict[str, Any]) -> Ask:
    """The validator's reading; raises Rejected. Fields that nobody has heard of pass, as they do upstream's betas."""
    return read_ask(
        body,
        version="2023-06-01",
        betas=BETAS,
        catalogue=REVIVED,
        organization="org",
        purpose="message",
        lenient=True,
    )


def signed(body: dict[str, Any], source: str) -> dict[str, Any]:
    """The body with its thinking blocks signed as if the source had just sent them."""
    model = REVIVED.find(source)
    assert model is not None
    body = body | {"messages": [dict(message) for message in body["messages"]]}
    for at, message in enumerate(body["messages"]):
        if isinstance(message["content"], list):
            message["content"] = [
                block | {"signature": sign(model, "org", conversation_hash(body, at), block["thinking"])}
                if block["type"] == "thinking"
                else block
                for block in message["content"]
            ]
    return body


def pieces(text: str, opening: str) -> Iterator[tuple[str, str]]:
    """Members of an object (key, and bytes from key to value) or elements of an array ("", bytes), by the standard
    library's decoder."""
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        while text[at] in " \t\r\n":
            at += 1
        return at

    at = skip(text.index(opening) + 1)
    while text[at] not in "]}":
        start, key = at, ""
        if opening == "{":
            key, at = decoder.raw_decode(text, at)
            at = skip(skip(at) + 1)
        _, at = decoder.raw_decode(text, at)
        yield key, text[start:at]
        at = skip(at)
        if text[at] == ",":
            at = skip(at + 1)


MAY_CHANGE = frozenset(
    [
        "model",
        "max_tokens",
        "thinking",
        "messages",
        "output_config",
        "temperature",
        "top_p",
        "top_k",
        "speed",
        "inference_geo",
        "context_management",
    ]
)


def check_untouched(before: str, after: str) -> None:
    """No member that may not change has, nor a message or block that stays; all keep their order."""
    old, new = dict(pieces(before, "{")), dict(pieces(after, "{"))
    assert [name for name in new if name in old] == [name for name in old if name in new]
    assert set(new) - set(old) <= {"thinking"}
    for name, piece in old.items():
        if name not in MAY_CHANGE:
            assert new[name] == piece
    blocks = [block for message in json.loads(before)["messages"] for block in blocks_of(message)]
    left = iter(raw_blocks(after))
    for raw, block in zip(raw_blocks(before), blocks, strict=True):
        if block["type"] not in ("thinking", "redacted_thinking"):
            assert next(left) == raw
    assert next(left, None) is None


def blocks_of(message: dict[str, Any]) -> list[Any]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def raw_blocks(text: str) -> Iterator[str]:
    messages = dict(pieces(text, "{"))["messages"]
    for _, message in pieces(messages, "["):
        content = dict(pieces(message, "{"))["content"]
        value = content[content.index(":") + 1 :].lstrip()
        if value.startswith("["):
            yield from (block for _, block in pieces(value, "["))
        else:
            yield value


def check_rewrite(text: str, source: str, target: str, at_ns: int) -> str | None:
    """Everything that must hold of a rewrite of a body that is valid for the source. Returns why there was none."""
    raw = text.encode()
    made = rewritten(raw, source, target, at_ns=at_ns)
    if isinstance(made, Unfit):
        return made.reason
    body = read_body(made)
    try:
        accepted(body)
    except Rejected as rejected:
        raise AssertionError(f"{source} to {target}: {rejected.error.message}\n{text}\n{made.decode()}") from None
    model = CATALOG.resolve(target)
    assert model is not None
    parsed = json.loads(made)
    assert parsed["model"] == target
    assert 0 <= parsed["max_tokens"] <= model.max_output_tokens
    kinds = [block["type"] for message in parsed["messages"] for block in blocks_of(message)]
    assert "thinking" not in kinds
    assert "redacted_thinking" not in kinds
    assert all(message["content"] for message in parsed["messages"][:-1])
    check_untouched(text, made.decode())
    assert rewritten(made, source, target, at_ns=at_ns) == made
    assert rewritten(made, target, target, at_ns=at_ns) == made
    return None


CORNERS: list[dict[str, Any]] = [
    {},
    *({"thinking": thinking} for thinking in (None, ADAPTIVE, ENABLED, DISABLED, BETWEEN_TOOLS)),
    {"thinking": ENABLED | {"budget_tokens": 31_999}, "max_tokens": 32_000},
    {"thinking": ENABLED | {"budget_tokens": 127_999}, "max_tokens": 128_000},
    {"max_tokens": 128_000},
    {"max_tokens": 64_000},
    {"max_tokens": 0},
    *({"output_config": {"effort": effort}} for effort in ("low", "medium", "high", "xhigh", "max")),
    {"output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {}}}, "thinking": DISABLED},
    {"output_config": {"effort": "max"}, "thinking": DISABLED},
    {"temperature": 0.5},
    {"temperature": 0.5, "top_p": 0.5, "top_k": 5},
    {"top_p": 0.5, "top_k": 5},
    {"temperature": 1.0, "top_p": None},
    {"tools": [TOOL], "tool_choice": {"type": "any"}},
    {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look"}},
    {"tools": [TOOL], "tool_choice": {"type": "auto"}, "thinking": ADAPTIVE},
    {"speed": "fast"},
    {"speed": "standard"},
    {"inference_geo": "us"},
    {"inference_geo": "global"},
    {"messages": [HELLO, {"role": "assistant", "content": "Once"}]},
    {"messages": [HELLO, assistant(THOUGHT, SAID), NOW]},
    {"messages": [HELLO, assistant(THOUGHT), NOW, assistant(REDACTED, SAID, THOUGHT), NOW]},
    {"messages": [HELLO, assistant(THOUGHT, CALL), user(RESULT)]},
    {"messages": [HELLO, assistant(CALL), user(RESULT)]},
    {"thinking": ADAPTIVE, "context_management": {"edits": [CLEAR]}, "system": [SAID], "stream": True},
]


@pytest.mark.parametrize("at_ns", [EARLY, NOV])
def test_every_corner_is_accepted_by_every_other_model_or_unfit_for_a_reason(at_ns: int) -> None:
    pairs = fits = 0
    unfit: set[str] = set()
    for source in MODELS:
        valid = []
        for corner in CORNERS:
            body = signed(body_of(source, **corner), source)
            try:
                accepted(body)
            except Rejected:
                continue
            valid.append(json.dumps(body))
        assert len(valid) > 10
        for target in MODELS:
            if target != source:
                pairs += 1
                for text in valid:
                    reason = check_rewrite(text, source, target, at_ns)
                    fits += reason is None
                    unfit |= {reason} if reason else set()
    assert pairs == len(list(permutations(MODELS, 2)))
    assert fits > 2 * pairs
    expected = {"prefill", "forced_tool_choice", "inference_geo", "thinking_in_progress"}
    assert unfit == expected | ({"retired_target"} if at_ns == NOV else set())


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A conversation that every model would take, but for its thoughts and its end."""
    messages: list[dict[str, Any]] = [HELLO]
    thought = st.sampled_from([THOUGHT, REDACTED])
    for _ in range(draw(st.integers(0, 3))):
        blocks = draw(st.lists(thought | st.just(SAID), min_size=1, max_size=4))
        if draw(st.booleans()):
            messages += [assistant(*blocks, CALL), user(RESULT, *draw(st.lists(st.just(SAID), max_size=1)))]
        else:
            messages += [assistant(*blocks), draw(st.sampled_from([NOW, user(SAID, SAID)]))]
    if draw(st.integers(0, 5)) == 0:
        messages.append({"role": "assistant", "content": draw(st.sampled_from(["Once", [SAID], []]))})
    return messages


@st.composite
def bodies(draw: st.DrawFn, source: str) -> str:
    """A body that the validator accepts for the source, in some spelling."""
    model = REVIVED.find(source)
    assert model is not None
    max_tokens = draw(st.sampled_from([1, 1_025, 8_192, 31_999, 32_001, 64_001, 128_000]))
    choices: dict[str, list[Any]] = {
        "thinking": [
            None,
            *({"type": kind} for kind in model.thinking if kind != "enabled"),
            *({"type": "enabled", "budget_tokens": n} for n in (1_024, 30_000, 127_999) if "enabled" in model.thinking),
        ],
        "output_config": [{"effort": one} for one in model.effort] + [{}, {"format": {"type": "json_schema"}}],
        "temperature": [0.3, 1.0, None],
        "top_p": [0.9, None],
        "top_k": [5, None],
        "tools": [[TOOL]],
        "tool_choice": [{"type": "auto"}, {"type": "any"}, {"type": "none"}, None],
        "speed": ["fast", "standard", None],
        "inference_geo": ["us", "global", None],
        "stream": [True, False],
        "system": ["s", [SAID]],
        "context_management": [{"edits": [CLEAR]}, {"edits": [CLEAR, CLEAR_TOOLS], "y": 1}, {"edits": []}, None],
        "unheard_of": [{"model": [1, {"max_tokens": None}], "ế": '{"messages":[]}'}],
        "": [-0.0],
    }
    body: dict[str, Any] = {"max_tokens": min(max_tokens, model.output_tokens_max), "messages": draw(histories())}
    for name in draw(st.lists(st.sampled_from(sorted(choices)), unique=True, max_size=9)):
        body[name] = draw(st.sampled_from(choices[name]))
    body["model"] = draw(st.sampled_from(model.names))
    body = signed(body, source)
    try:
        accepted(body)
    except Rejected:
        assume(False)
    ordered = {name: body[name] for name in draw(st.permutations(list(body)))}
    comma, colon = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", " : ")]))
    text = json.dumps(ordered, separators=(comma, colon), ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        # Keys and values in a spelling that reads the same.
        text = text.replace('"t', '"\\u0074').replace('"mo', '"\\u006do')
    return draw(st.sampled_from(["", " ", "\r\n"])) + text + draw(st.sampled_from(["", "\n"]))


@given(st.data(), st.sampled_from(MODELS), st.sampled_from([EARLY, NOV]))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_valid_body_is_accepted_by_every_other_model_or_unfit(data: st.DataObject, source: str, at_ns: int) -> None:
    text = data.draw(bodies(source))
    for target in MODELS:
        if target != source:
            check_rewrite(text, source, target, at_ns)


def test_between_models_of_equal_facts_the_name_is_all_that_changes() -> None:
    source, target = "claude-fable-5-2", "claude-mythos-5-2"
    for corner in CORNERS:
        text = json.dumps(body_of(source, **corner))
        try:
            accepted(json.loads(text))
        except Rejected:
            continue
        if "temperature" not in corner:  # of value 1.0, which is accepted, and worth nothing
            assert rewritten(text.encode(), source, target, at_ns=NOV) == text.replace(source, target).encode()


# ---- prices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "dearer"),
    [
        ("claude-sonnet-4-6", "claude-haiku-4-5", False),
        ("claude-haiku-4-5", "claude-sonnet-4-6", True),
        ("claude-sonnet-4-6", "claude-sonnet-4-6", False),
        ("claude-sonnet-4-5", "claude-sonnet-4-6", False),
        ("claude-haiku-5-5", "claude-haiku-4-5", True),
        # A long prompt costs five times as much there, and is still cheaper.
        ("claude-haiku-4-5", "claude-haiku-5-5", False),
        ("claude-of-next-year", "claude-opus-4-1", False),
        ("claude-opus-4-1", "claude-of-next-year", True),
        ("claude-of-next-year", "claude-of-next-year", True),
    ],
)
def test_a_model_is_dearer_by_the_standard_price_of_the_day(source: str, target: str, dearer: bool) -> None:
    assert is_dearer(source, target, CATALOG, NOV) is dearer


def test_a_model_without_a_price_yet_is_dearer_and_a_source_without_one_is_not_known() -> None:
    assert is_dearer("claude-sonnet-4-5", "claude-haiku-5-5", CATALOG, EARLY)
    assert not is_dearer("claude-haiku-5-5", "claude-sonnet-4-5", CATALOG, EARLY)


def test_a_model_that_is_dearer_for_a_long_prompt_alone_is_dearer() -> None:
    catalog = catalog_of(
        small_model("flat", "adaptive", '["high"]', (0, "1.0", "1.0")),
        small_model("steep", "adaptive", '["high"]', (0, "0.5", "0.5"), (100, "0.5", "2.0")),
    )
    assert is_dearer("flat", "steep", catalog, EARLY)
    assert is_dearer("steep", "flat", catalog, EARLY)
    assert not is_dearer("steep", "steep", catalog, EARLY)


@given(st.sampled_from(MODELS), st.sampled_from(MODELS), st.sampled_from([EARLY, NOV]))
def test_of_two_models_one_at_least_is_not_cheaper(one: str, other: str, at_ns: int) -> None:
    def rows(name: str) -> set[tuple[int, int]]:
        found = [CATALOG.price_row(name, at_ns, prompt_tokens=n) for n in (0, 10**9)]
        return {(row.input_nanousd, row.output_nanousd) for row in found if not row.assumed}

    if not is_dearer(one, other, CATALOG, at_ns) and not is_dearer(other, one, CATALOG, at_ns):
        assert rows(one) == rows(other)
