"""Blocks of a prompt as spans: what stands where, what can carry a mark, and what is none of it."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.wire.message import scan
from headgate.wire.prompt import (
    first_spans,
    has_assistant,
    has_marks,
    has_thoughts,
    last_turn,
    mark,
    measure,
    read_block,
    read_system,
    read_tools,
    system_marked,
)

MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def spelled(value, separators=(", ", " : ")):
    return json.dumps(value, separators=separators, ensure_ascii=False).encode()


@pytest.mark.parametrize("separators", [(",", ":"), (" ,\n", " :\t")])
def test_a_mark_goes_behind_the_last_member_of_a_block(separators):
    raw = spelled([{"type": "text", "text": "one"}, {"text": "two", "type": "text", "x": [1]}], separators)
    for at, block in enumerate(read_system(raw).blocks):
        value = json.loads(raw[: block.mark_at] + b',"cache_control":' + mark("1h") + raw[block.mark_at :])
        assert value[at].pop("cache_control") == MARK["cache_control"]
        assert value == json.loads(raw)


def test_digests_are_of_all_blocks_so_far():
    one, two, other = ({"type": "text", "text": text} for text in ("one", "two", "other"))
    first, second = read_system(spelled([one, two])), read_system(spelled([one, other]))
    assert first.blocks[0].digest == second.blocks[0].digest
    assert first.blocks[1].digest != second.blocks[1].digest
    assert first.digest != second.digest


@pytest.mark.parametrize(
    ("block", "markable"),
    [
        ({"type": "text", "text": "x"}, True),
        ({"type": "text", "text": " \n"}, False),
        ({"type": "text"}, False),
        ({"type": "thinking", "thinking": "x"}, False),
        ({"type": "redacted_thinking", "data": "x"}, False),
        ({"type": "image", "source": {}}, True),
        ({"type": "text", "text": "x", **MARK}, False),
        ({"type": "text", "text": "x", "cache_control": None}, False),
        ({}, False),
        (7, False),
    ],
)
def test_what_can_carry_a_mark(block, markable):
    assert (read_system(spelled([block])).blocks[0].mark_at >= 0) is markable


def test_a_callers_mark_has_its_ttl():
    assert [each.mark for each in read_system(spelled([{"type": "text", "text": "x", **MARK}, {}])).blocks] == [
        "1h",
        "",
    ]


def test_a_string_is_one_block_that_is_replaced_whole():
    raw = b'"a \\u00e9 \\" b"'
    part = read_system(raw)
    assert (part.is_string, len(part.blocks), part.has_marks) == (True, 1, False)
    assert json.loads(system_marked(raw, "5m")) == [
        {"type": "text", "text": json.loads(raw), "cache_control": {"type": "ephemeral"}}
    ]


@pytest.mark.parametrize("raw", [b"null", b"7", b"{}", b"[]", b'"" '])
def test_what_is_no_prompt_has_no_blocks_to_mark(raw):
    assert not any(block.mark_at >= 0 for block in read_system(raw.strip()).blocks)
    assert not any(block.mark_at >= 0 for block in read_tools(raw.strip()).blocks)


def test_a_key_that_stands_twice_keeps_a_block_unmarked():
    assert read_system(b'[{"type":"text","text":"x","text":"y"}]').blocks[0].mark_at == -1


def test_tools_beside_one_that_is_loaded_on_demand_are_not_marked():
    tools = [{"name": "a"}, {"name": "b", "defer_loading": True}]
    assert [block.mark_at >= 0 for block in read_tools(spelled(tools[:1])).blocks] == [True]
    assert [block.mark_at >= 0 for block in read_tools(spelled(tools)).blocks] == [False, False]


@pytest.mark.parametrize(
    ("raw", "has"),
    [
        (b'{"cache_control" : null}', True),
        (b'{"cache\\u005fcontrol":1}', True),
        (b'{"c\\u0061che_control" \n:1}', True),
        (b'["cache_control"]', False),
        (b'["\\"cache_control\\": 1"]', False),
        ('{"a":"\\u1ea1 é"}'.encode(), False),
    ],
)
def test_a_mark_is_seen_however_its_key_is_spelled(raw, has):
    assert has_marks(raw) is has


def test_the_first_messages_blocks_are_found_where_a_user_has_an_array():
    content = [{"type": "document", "source": {"type": "text", "data": "d" * 9}}, {"type": "text", "text": "?"}]
    raw = spelled([{"role": "user", "content": content}, {"role": "assistant", "content": "x"}])
    blocks = [read_block(span.of(raw)).blocks[0] for span in first_spans(raw)]
    assert [(block.kind, block.text.chars) for block in blocks] == [("document", 9), ("text", 1)]
    for none in ([], [7], [{"role": "user", "content": "x"}], [{"role": "assistant", "content": content}]):
        assert first_spans(spelled(none)) == []
    assert first_spans(b'"x"') == []
    assert read_block(b"7").blocks == ()


def test_a_conversation_that_goes_on_begins_with_the_one_before():
    turns = [{"role": "user", "content": "One {}?"}]
    before = spelled(turns)
    after = spelled([*turns, {"role": "assistant", "content": "Two }"}, {"role": "user", "content": "Three?"}])
    assert last_turn(before)[0] == 0
    assert after[: last_turn(after)[0]] == before[: last_turn(before)[1]]
    assert has_assistant(after)
    assert not has_assistant(before)
    assert not has_assistant(spelled([{"role": "user", "content": '"role":"assistant"'}]))
    assert has_thoughts(spelled([{"type": "thinking"}]))
    assert not has_thoughts(before)


def test_text_is_measured_by_script_and_without_its_spaces():
    assert measure("a  \n\n b").chars == 3
    assert measure("Được trả hàng").vietnamese >= 2
    assert measure("退货 ok").cjk == 2
    assert measure("naïve").foreign == 1


def test_a_scanned_body_gives_the_bytes_that_are_read():
    request = scan(b'{"system":"x","messages":[]}')
    assert read_system(request.raw("system")).raw == b'"x"'


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"])},
        optional={
            "content": st.sampled_from(
                ["hi", 'he said "role":"assistant"', [{"type": "tool_use", "input": {"who": "assistant"}}]]
            ),
            "name": st.just("assistant"),
        },
    ),
    max_size=5,
)


@given(MESSAGES, st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :  ")]), st.booleans())
def test_the_last_turn_is_the_one_before_the_last_role_of_an_assistant(turns, separators, roles_last):
    if roles_last:
        turns = [dict(reversed(turn.items())) for turn in turns]
    messages = json.dumps(turns, separators=separators).encode()
    roles = [found.start() for found in re.finditer(rb'"role"\s*:\s*"assistant"', messages)]
    others = [found.start() for found in re.finditer(b'"assistant"', messages)]
    # Where the last value of that name is no role, nothing is recognised.
    is_role = bool(roles) and others[-1] < roles[-1] + 64 and messages[: others[-1]].rstrip(b" :").endswith(b'"role"')
    before = messages.rfind(b"}", 0, roles[-1]) + 1 if is_role else 0
    if is_role or not roles:
        assert last_turn(messages) == (before, messages.rfind(b"}") + 1)
