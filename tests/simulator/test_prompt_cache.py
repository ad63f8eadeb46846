"""The prompt cache against the rules of docs "prompt caching"."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.simulator.cache import LOOK_BACK, CacheUse, PromptCache, Scope
from headgate.simulator.models import load_catalogue
from headgate.simulator.prompt import Prompt, build_prompt

MODEL = load_catalogue().find("claude-sonnet-4-6")
assert MODEL is not None
HAIKU = load_catalogue().find("claude-haiku-4-5")
assert HAIKU is not None
HERE = Scope("org", "workspace")
LONG = "word " * 4_000


def text(value: str, ttl: str | None = None) -> dict[str, Any]:
    mark = {} if ttl is None else {"cache_control": {"type": "ephemeral", "ttl": ttl}}
    return {"type": "text", "text": value, **mark}


def prompt(body: dict[str, Any], model: Any = MODEL, **parameters: Any) -> Prompt:
    values: dict[str, Any] = {"thinking": "off", "effort": "high", "speed": "standard", "betas": frozenset()}
    return build_prompt({"messages": [{"role": "user", "content": "hi"}]} | body, model, **(values | parameters))


def send(cache: PromptCache, asked: Prompt, now_s: float, scope: Scope = HERE, *, begun: bool = True) -> CacheUse:
    use = cache.look(asked, scope, min_tokens=1_024, now_s=now_s)
    cache.begin(use, started_s=now_s)
    if begun:
        cache.store(use, model="m", started_s=now_s)
    return use


def test_a_marked_prefix_is_written_once_and_read_while_it_lives() -> None:
    cache, asked = PromptCache(), prompt({"system": [text(LONG, "5m")]})
    first, second = send(cache, asked, 0.0), send(cache, asked, 299.0)
    assert first.write_5m_tokens == second.read_tokens > 1_024
    assert (first.read_tokens, second.write_5m_tokens) == (0, 0)
    assert send(cache, asked, 299.0 + 299.0).read_tokens > 0, "a hit lives on from its own start"
    assert send(cache, asked, 598.0 + 300.0).read_tokens == 0


def test_an_entry_cannot_be_read_before_the_response_that_writes_it_has_begun() -> None:
    cache, asked = PromptCache(), prompt({"system": [text(LONG, "5m")]})
    first = send(cache, asked, 0.0, begun=False)
    assert send(cache, asked, 1.0, begun=False).write_5m_tokens == first.write_5m_tokens
    cache.store(first, model="m", started_s=0.0)
    assert send(cache, asked, 2.0).read_tokens == first.write_5m_tokens
    assert send(cache, asked, 301.9).read_tokens > 0
    assert sum(entry.cold_writes for _, entry in cache.entries()) == 1


def test_life_counts_from_the_start_of_the_request_and_not_from_its_first_byte() -> None:
    cache, asked = PromptCache(), prompt({"system": [text(LONG, "5m")]})
    use = cache.look(asked, HERE, min_tokens=1_024, now_s=0.0)
    cache.store(use, model="m", started_s=0.0)
    assert cache.look(asked, HERE, min_tokens=1_024, now_s=299.9).read_tokens > 0
    assert cache.look(asked, HERE, min_tokens=1_024, now_s=300.0).read_tokens == 0


def test_below_the_models_minimum_nothing_is_cached_and_nothing_fails() -> None:
    cache, asked = PromptCache(), prompt({"system": [text("word " * 700, "5m")]})
    for now_s in (0.0, 1.0):
        use = send(cache, asked, now_s)
        assert (use.read_tokens, use.write_5m_tokens, use.input_tokens) == (0, 0, asked.tokens)


def test_an_hour_before_five_minutes_splits_the_write_at_the_last_hour_mark() -> None:
    cache = PromptCache()
    asked = prompt({"system": [text(LONG, "1h")], "messages": [{"role": "user", "content": [text(LONG, "5m")]}]})
    use = send(cache, asked, 0.0)
    hour, last = asked.blocks[0].tokens, asked.blocks[1].tokens
    assert (use.write_1h_tokens, use.write_5m_tokens, use.input_tokens) == (hour, last - hour, asked.tokens - last)
    later = send(cache, asked, 1_000.0)
    assert (later.read_tokens, later.write_5m_tokens) == (hour, last - hour), "only the hour has survived"


@pytest.mark.parametrize(("behind", "hits"), [(LOOK_BACK - 1, True), (LOOK_BACK, False)])
def test_a_breakpoint_looks_back_over_twenty_positions_itself_included(behind: int, hits: bool) -> None:
    cache = PromptCache()
    send(cache, prompt({"system": [text(LONG, "5m")]}), 0.0)
    more = [text(f"{n} ") for n in range(behind - 1)] + [text("last", "5m")]
    use = send(cache, prompt({"system": [text(LONG), *more]}), 1.0)
    assert (use.read_tokens > 0) is hits


def test_an_earlier_breakpoint_finds_what_the_last_one_is_too_far_from() -> None:
    cache = PromptCache()
    send(cache, prompt({"system": [text(LONG, "5m")]}), 0.0)
    more = [text(f"{n} ") for n in range(40)] + [text("last", "5m")]
    assert send(cache, prompt({"system": [text(LONG, "5m"), *more]}), 1.0).read_tokens > 0


def test_automatic_caching_moves_forward_with_the_conversation() -> None:
    cache = PromptCache()
    turns = [{"role": "user", "content": LONG}]
    first = send(cache, prompt({"cache_control": {"type": "ephemeral"}, "messages": turns}), 0.0)
    longer = [*turns, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}]
    second = send(cache, prompt({"cache_control": {"type": "ephemeral"}, "messages": longer}), 1.0)
    assert second.read_tokens == first.write_5m_tokens > 0
    assert second.write_5m_tokens > 0


def test_automatic_caching_alone_shares_nothing_between_users() -> None:
    cache = PromptCache()
    for user in ("a", "b"):
        asked = prompt(
            {
                "system": LONG,
                "cache_control": {"type": "ephemeral"},
                "messages": [{"role": "user", "content": user}],
            }
        )
        assert send(cache, asked, 0.0).read_tokens == 0


@pytest.mark.parametrize(
    ("change", "survives"),
    [
        ({"tools": [{"name": "b", "input_schema": {"type": "object"}}]}, ()),
        ({"system": [text(LONG + "!", "5m")]}, ("tools",)),
        ({"tool_choice": {"type": "none"}}, ("tools", "system")),
        ({"messages": [{"role": "user", "content": [text(LONG + "!", "5m")]}]}, ("tools", "system")),
    ],
)
def test_a_change_invalidates_its_level_and_those_after_it(change: dict[str, Any], survives: tuple[str, ...]) -> None:
    cache = PromptCache()
    tool = {
        "name": "a",
        "description": LONG,
        "input_schema": {"type": "object"},
        "cache_control": {"type": "ephemeral"},
    }
    body = {
        "tools": [tool],
        "system": [text(LONG, "5m")],
        "messages": [{"role": "user", "content": [text(LONG, "5m")]}],
    }
    asked = prompt(body)
    send(cache, asked, 0.0)
    ends = {block.level: block.tokens for block in asked.blocks}
    expected = max((ends[level] for level in survives), default=0)  # type: ignore[index]
    assert send(cache, prompt(body | change), 1.0).read_tokens == expected


@pytest.mark.parametrize(
    "parameters",
    [{"thinking": "adaptive"}, {"effort": "low"}, {"betas": frozenset({"compact-2026-01-12"})}],
)
def test_thinking_effort_and_betas_keep_the_system_and_lose_the_messages(parameters: dict[str, Any]) -> None:
    cache = PromptCache()
    body = {"system": [text(LONG, "5m")], "messages": [{"role": "user", "content": [text(LONG, "5m")]}]}
    asked = prompt(body)
    send(cache, asked, 0.0)
    assert send(cache, prompt(body, **parameters), 1.0).read_tokens == asked.blocks[0].tokens


def test_models_organizations_and_workspaces_never_share() -> None:
    cache, body = PromptCache(), {"system": [text(LONG, "5m")]}
    send(cache, prompt(body), 0.0)
    assert send(cache, prompt(body, HAIKU), 1.0).read_tokens == 0
    assert send(cache, prompt(body), 1.0, Scope("org", "other")).read_tokens == 0
    assert send(cache, prompt(body), 1.0, Scope("other", "workspace")).read_tokens == 0


def test_a_string_is_one_text_block_and_marks_are_not_part_of_the_prefix() -> None:
    assert prompt({"system": LONG}).blocks[0].prefix == prompt({"system": [text(LONG, "1h")]}).blocks[0].prefix


def test_the_order_of_keys_in_a_tool_input_counts() -> None:
    def with_input(value: dict[str, Any]) -> bytes:
        call = {"type": "tool_use", "id": "t", "name": "n", "input": value}
        return prompt({"messages": [{"role": "assistant", "content": [call]}]}).blocks[-1].prefix

    assert with_input({"a": 1, "b": 2}) != with_input({"b": 2, "a": 1})


marks = st.lists(st.sampled_from([None, None, "5m"]), min_size=1, max_size=30)


@given(st.lists(st.tuples(marks, st.integers(0, 5), st.floats(0, 400)), min_size=1, max_size=6))
def test_read_written_and_fresh_tokens_always_add_up_to_the_prompt(
    requests: list[tuple[list[str | None], int, float]],
) -> None:
    cache, now_s = PromptCache(), 0.0
    for ttls, variant, wait_s in requests:
        now_s += wait_s
        blocks = [text(f"{min(n, variant)} " * 400, ttl) for n, ttl in enumerate(ttls)]
        asked = prompt({"messages": [{"role": "user", "content": blocks}]})
        use = send(cache, asked, now_s)
        parts = (use.read_tokens, use.write_5m_tokens, use.write_1h_tokens, use.input_tokens)
        assert min(parts) >= 0
        assert sum(parts) == asked.tokens
