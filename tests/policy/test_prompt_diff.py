"""Laws of the comparison: the right byte and cause for each way in which prompts part, and silence where none does."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headgate.policy.prompt_diff import (
    BLOCKS_MAX,
    CAUSES,
    MENDS,
    PromptParts,
    compare,
    compare_texts,
    first_byte,
    raw_offset,
)

MODEL = "claude-sonnet-4-6"
MARK = {"type": "ephemeral"}


def encode(value, *, ascii_only: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":")).encode()


def prompt(system="You help.", tools=None, messages=None, **rest) -> PromptParts:
    return PromptParts(
        b"" if tools is None else encode(tools),
        system if isinstance(system, bytes) else encode(system),
        encode([{"role": "user", "content": "hi"}] if messages is None else messages),
        rest.pop("model", MODEL),
        **rest,
    )


def turns(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def tool(name, **schema):
    return {"name": name, "input_schema": {"type": "object", **schema}}


ISO = st.datetimes().map(lambda at: at.replace(year=2000 + at.year % 30, microsecond=at.microsecond | 1).isoformat())
HEX = st.binary(min_size=8, max_size=8).map(lambda raw: "k7" + raw.hex() + "f3q9")
VALUES = {
    "timestamp": ISO,
    "date": st.dates().map(lambda day: day.replace(year=2000 + day.year % 30).isoformat()),
    "uuid": st.uuids(version=4).map(str),
    "user_id": st.integers(10_000, 99_999).map(lambda number: f"usr_{number}"),
    "counter": st.integers(1_000, 9_999).map(str),
    "random_token": HEX,
}
PROSE = st.lists(
    st.sampled_from(
        ["Be brief", 'say "no"', "tiếng Việt", "back\\slash", "line\nbreak", "漢字", "emoji 😀", "tab\t", "é"]
    ),
    max_size=6,
).map(" ".join)


@given(st.sampled_from(sorted(VALUES)), st.data(), PROSE, PROSE, st.booleans(), st.booleans())
def test_a_value_that_varies_is_named_with_its_byte(kind, data, before, after, ascii_only, in_block):
    one, other = data.draw(VALUES[kind]), data.draw(VALUES[kind])
    assume(one != other)
    texts = [f"{before} = {value} ; {after}" for value in (one, other)]
    systems = [
        [{"type": "text", "text": "fixed"}, {"type": "text", "text": text}] if in_block else text for text in texts
    ]
    raws = [encode(system, ascii_only=ascii_only) for system in systems]
    found = compare(prompt(raws[0]), prompt(raws[1]))
    assert found is not None
    assert (found.cause, found.part) == (kind, "system")
    assert found.byte == first_byte(*raws)
    assert raws[1][found.value_at :].startswith(other.encode())
    assert found.value_at <= found.byte


@pytest.mark.parametrize("ascii_only", [True, False])
def test_equal_texts_in_other_escapes_move_no_byte(ascii_only):
    one = encode("é 漢 😀 at 10:15:01", ascii_only=not ascii_only)
    other = encode("é 漢 😀 at 10:15:07", ascii_only=ascii_only)
    found = compare(prompt(one), prompt(other))
    assert (found.cause, other[found.byte : found.byte + 2], other[found.value_at :][:8]) == (
        "timestamp",
        b'7"',
        b"10:15:07",
    )
    assert compare(prompt(encode("é 漢 😀", ascii_only=True)), prompt(encode("é 漢 😀"))) is None


def test_within_a_character_of_several_bytes_the_first_that_differs_is_named():
    one, other = encode("a é"), encode("a è")
    assert compare(prompt(one), prompt(other)).byte == first_byte(one, other) == 4


@given(
    st.text(max_size=80) | st.text(alphabet='\\"\u00e9\u6f22\U0001f600ud8\n', max_size=300), st.booleans(), st.data()
)
def test_a_raw_offset_is_that_of_the_character(text, ascii_only, data):
    assume(not any("\ud800" <= sign <= "\udfff" for sign in text))
    raw = encode(text, ascii_only=ascii_only)
    index = data.draw(st.integers(0, len(text)))
    assert raw_offset(raw, index) == len(encode(text[:index], ascii_only=ascii_only)) - 1


def test_tools_in_another_order():
    one, other = [tool("a"), tool("b"), tool("c")], [tool("a"), tool("c"), tool("b")]
    found = compare(prompt(tools=one), prompt(tools=other))
    raw = encode(other)
    assert (found.cause, found.part) == ("tool_order", "tools")
    assert found.byte == first_byte(encode(one), raw) == raw.index(b'c"')
    assert found.value_at == raw.index(b'{"name":"c"')


@pytest.mark.parametrize(
    ("one", "other", "cause"),
    [
        ("ab", "abc", "tool_added"),
        ("ab", "cab", "tool_added"),
        ("abc", "ab", "tool_removed"),
        ("abc", "bc", "tool_removed"),
        ("", "a", "tool_added"),
        ("a", "", "tool_removed"),
        ("ab", "ac", "tools_changed"),
    ],
)
def test_tools_that_come_and_go(one, other, cause):
    before, after = ([tool(name) for name in names] or None for names in (one, other))
    found = compare(prompt(tools=before), prompt(tools=after))
    assert (found.cause, found.part) == (cause, "tools")


def test_a_description_that_changes_is_of_the_tools():
    one, other = [tool("a") | {"description": "old"}], [tool("a") | {"description": "new"}]
    found = compare(prompt(tools=one), prompt(tools=other))
    assert (found.cause, encode(other)[found.byte : found.byte + 3]) == ("tools_changed", b"new")


def test_keys_in_another_order():
    one, other = [tool("a", x=1, y=2)], [tool("a", y=2, x=1)]
    found = compare(prompt(tools=one), prompt(tools=other))
    assert (found.cause, found.byte) == ("key_order", first_byte(encode(one), encode(other)))
    assert (found.before, found.after) == ("type, x, y", "type, y, x")


def test_marks_and_the_white_space_of_json_are_no_difference():
    one = [{"type": "text", "text": "a", "cache_control": MARK}, {"type": "text", "text": "b"}]
    other = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": MARK}]
    assert compare(prompt(one), prompt(json.dumps(other, indent=2).encode())) is None
    assert compare(prompt("a"), prompt([{"type": "text", "text": "a", "cache_control": MARK}])) is None
    assert compare(prompt(tools=[tool("a") | {"cache_control": MARK}]), prompt(tools=[tool("a")])) is None


def test_a_second_block_that_changes():
    one = [{"type": "text", "text": "fixed"}, {"type": "text", "text": "Weather: rain"}]
    other = [{"type": "text", "text": "fixed"}, {"type": "text", "text": "Weather: snow"}]
    found = compare(prompt(one), prompt(other))
    assert (found.cause, found.part, found.byte) == ("text_changed", "system", first_byte(encode(one), encode(other)))


def test_a_block_that_comes():
    one = [{"type": "text", "text": "a"}]
    other = [*one, {"type": "text", "text": "b"}]
    found = compare(prompt(one), prompt(other))
    assert (found.cause, found.byte) == ("text_changed", encode(other).index(b'{"type":"text","text":"b"'))
    assert compare(prompt(other), prompt(one)).byte == len(encode(one)) - 1


def image(data):
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def test_an_image_in_front_of_what_is_shared():
    long = {"type": "text", "text": "the shared document " * 20}
    one, other = ([{"role": "user", "content": [image(data), long]}] for data in ("AAAA", "AAAB"))
    found = compare(prompt(messages=one), prompt(messages=other))
    assert (found.cause, found.part) == ("image", "messages")
    assert compare(prompt(messages=one), prompt(messages=one)) is None


def test_a_conversation_that_grows_and_another_one_are_no_difference():
    whole = turns("a", "b", "c", "d", "e")
    assert compare(prompt(messages=whole[:3]), prompt(messages=whole)) is None
    assert compare(prompt(messages=whole), prompt(messages=turns("x", "y", "z"))) is None
    assert compare(prompt(messages=whole[:1]), prompt(messages=turns("at 10:15:01, hello"))) is None


def test_an_edit_of_an_earlier_turn_is_one():
    one, other = turns("now 10:15:01", "b", "c"), turns("now 10:15:09", "b", "c", "d", "e")
    found = compare(prompt(messages=one), prompt(messages=other))
    assert (found.cause, found.part, found.byte) == ("timestamp", "messages", first_byte(encode(one), encode(other)))


def test_a_time_before_a_long_shared_text_of_a_message_is_one():
    rest = " is when this was asked. The handbook: " + "every rule of it " * 10
    found = compare(
        prompt(messages=turns("10:15:01" + rest + "why?")), prompt(messages=turns("10:15:09" + rest + "how?"))
    )
    assert (found.cause, found.part) == ("timestamp", "messages")


def test_turns_that_were_cut_off_are_one():
    whole = turns("a", "b", "c", "d", "e")
    found = compare(prompt(messages=whole), prompt(messages=[*whole[2:], {"role": "assistant", "content": "f"}]))
    assert found is not None
    assert "oldest turns" in found.message


@pytest.mark.parametrize(("blocks", "reaches"), [(19, True), (20, False)])
def test_marks_that_are_too_far_apart(blocks, reaches):
    def marked(*sizes):
        texts = [[{"type": "text", "text": f"{number} of {size}"} for number in range(size)] for size in sizes]
        texts[-1][-1] = texts[-1][-1] | {"cache_control": MARK}
        return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(texts)]

    found = compare(prompt(messages=marked(3)), prompt(messages=marked(3, blocks - 1, 1)))
    assert (found is None) is reaches
    if found is not None:
        assert (found.cause, found.part) == ("look_back", "messages")
    automatic = compare(
        prompt(messages=marked(3), automatic=True), prompt(messages=marked(3, blocks - 1, 1), automatic=True)
    )
    assert (automatic is None) is reaches


def test_the_model_and_the_arm_come_first():
    one = prompt("a", arm="e:a")
    assert compare(one, prompt("b", model="claude-haiku-4-5", arm="e:a")).cause == "model_changed"
    assert compare(one, prompt("b", model="claude-haiku-4-5", arm="e:b")).cause == "arm_changed"
    assert compare(one, prompt("a", arm="e:b")) is None


def test_tools_come_before_system_and_system_before_messages():
    one, other = prompt("a", [tool("x")]), prompt("b", [tool("y")])
    assert compare(one, other).part == "tools"


def test_each_user_named_in_the_prompt():
    found = compare(prompt("You serve Lan Anh.", user="Lan Anh"), prompt("You serve Minh.", user="Minh"))
    assert (found.cause, found.value_at) == ("user_id", len('"You serve '))


BYTES = st.binary(max_size=60) | st.text(alphabet='{}[]",:\\ua1 "', max_size=60).map(str.encode)


@given(BYTES, BYTES, BYTES, BYTES, BYTES, BYTES)
def test_what_is_no_json_never_raises(a, b, c, d, e, f):
    found = compare(PromptParts(a, b, c, MODEL), PromptParts(d, e, f, MODEL))
    if found is not None:
        assert 0 <= found.value_at <= found.byte
        assert max(len(found.before), len(found.after)) <= 40


@pytest.mark.parametrize("count", [10, BLOCKS_MAX + 1])
def test_a_part_of_very_many_pieces_has_the_same_byte(count):
    fixed = [{"type": "text", "text": "x"}] * count
    one, other = ([*fixed, {"type": "text", "text": f"at 10:15:0{number}"}] for number in (1, 2))
    found = compare(prompt(one), prompt(other))
    assert (found.cause, found.byte) == ("timestamp", first_byte(encode(one), encode(other)))
    many = {str(number): number for number in range(count)}
    tools = [[tool("a", **many, at=f"10:15:0{number}")] for number in (1, 2)]
    found = compare(prompt(tools=tools[0]), prompt(tools=tools[1]))
    assert (found.cause, found.byte) == ("timestamp", first_byte(encode(tools[0]), encode(tools[1])))


def test_texts_of_files_are_compared_by_their_bytes():
    assert compare_texts(b"at 10:15:01", b"at 10:15:02").byte == 10
    assert compare_texts(b"\xff", b"\xfe").cause == "text_changed"
    assert compare_texts(b"a", b"a") is None


def test_every_cause_has_its_mend():
    assert set(MENDS) == set(CAUSES)


def test_of_messages_no_name_of_a_key_is_shown():
    def asked(*keys):
        used = {"type": "tool_use", "id": "t", "name": "find", "input": dict.fromkeys(keys, 1)}
        return prompt(messages=[*turns("hi"), {"role": "assistant", "content": [used]}, *turns("and", "so", "on")])

    for one, other in ((("Lan", "Minh"), ("Minh", "Lan")), (("Lan",), ("Lan", "Minh")), (("Lan",), ("Minh",))):
        found = compare(asked(*one), asked(*other))
        assert found is not None
        assert found.part == "messages"
        assert not any(name in found.before + found.after for name in ("Lan", "Minh"))


def test_a_greeting_that_all_conversations_have_makes_no_edit_of_two_of_them():
    greeting = "Welcome to the shop! How can I help you today? " * 5
    one = turns("Hi", greeting, "Do you have bags?", "Yes.", "Which?")
    other = turns("Hello 17", greeting, "When do you open?")
    assert compare(prompt(messages=one), prompt(messages=other)) is None
    assert compare(prompt(messages=other), prompt(messages=one)) is None
    edited = compare(
        prompt(messages=one), prompt(messages=turns("Hello", greeting, *(t["content"] for t in one[2:]), "x"))
    )
    assert edited is not None
