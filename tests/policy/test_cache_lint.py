"""Laws of the linter: the article's mistakes are named within three requests, losses are counted, memory is bounded."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.cache_lint import (
    COMPARES_BURST,
    DELTAS_MAX,
    FAMILIES_MAX,
    AnthropicDiagnosis,
    FamilyLinter,
    PromptParts,
    check,
    diagnosis,
    lost_nanousd,
    tokens_of,
    tokens_paid_again,
)
from headgate.policy.prompt_diff import compare
from headgate.wire import catalog

MODEL = "claude-sonnet-4-6"
AT_NS = 20_675 * 86_400 * 10**9  # 2026-08-10T00:00:00Z
PRICE = catalog.packaged().price_row(MODEL, AT_NS)
KNOWLEDGE = "The handbook says that everybody is served in the order in which they came. " * 400
MARK = {"type": "ephemeral"}
TURNS = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"}]
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("search", "order", "refund", "ask")]


def encode(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def prompt(system, tools=None, messages=None, user="", **rest) -> PromptParts:
    asked = messages or [{"role": "user", "content": "hi"}]
    raw = b"" if tools is None else encode(tools)
    return PromptParts(raw, encode(system), encode(asked), rest.pop("model", MODEL), user=user, **rest)


def watch(linter, prompts, *, every_s=1.0, **rest):
    """What is said of each prompt."""
    given_ = {"price": PRICE, "write": "5m", "min_tokens": 1_024} | rest
    return [
        linter.observe("f", each, at_ns=AT_NS + int(at * every_s * 10**9), now=1_000.0 + at * every_s, **given_)
        for at, each in enumerate(prompts)
    ]


def first_named(prompts):
    """The first finding, which must be there within three requests, and the system prompt or tools it is in."""
    linter = FamilyLinter()
    said = watch(linter, prompts[:3])
    at = next(at for at, one in enumerate(said) if one is not None)
    return said[at], prompts[at]


def test_a_timestamp_in_the_system_prompt():
    found, at = first_named([prompt(f"Now: 2026-11-24T10:15:0{n}.5Z. {KNOWLEDGE}") for n in range(3)])
    assert (found.cause, found.part) == ("timestamp", "system")
    assert at.system[found.value_at :].startswith(b"2026-11-24T10:15:01.5Z")
    assert at.system[found.byte : found.byte + 3] == b"1.5"


def test_a_user_id_in_the_system_prompt():
    users = ("u-lan", "u-lan", "u-minh")
    found, at = first_named([prompt(f"{KNOWLEDGE} You talk to {user}.", user=user) for user in users])
    assert (found.cause, found.part) == ("user_id", "system")
    assert at.system[found.byte : found.byte + 5] == b"minh."
    assert at.system[found.value_at :].startswith(b"u-minh")
    assert "minh" not in found.after


def test_tools_in_varying_order():
    dice = random.Random(4)
    orders = [TOOLS, dice.sample(TOOLS, 4), dice.sample(TOOLS, 4)]
    found, at = first_named([prompt(KNOWLEDGE, tools=order) for order in orders])
    one, other = encode(TOOLS), at.tools
    assert (found.cause, found.part) == ("tool_order", "tools")
    assert found.byte == next(n for n in range(len(one)) if one[n] != other[n])


def test_a_second_block_that_changes():
    def of(news):
        return prompt([{"type": "text", "text": KNOWLEDGE}, {"type": "text", "text": news, "cache_control": MARK}])

    found, at = first_named([of("Rain in Huế."), of("Sun in Huế."), of("Snow in Huế.")])
    assert (found.cause, found.part) == ("text_changed", "system")
    assert at.system[found.byte : found.byte + 3] == b"now"
    assert at.system[: found.byte].endswith(b'"S')


def test_of_two_templates_none_is_named_and_a_third_is_counted_with_the_second():
    linter = FamilyLinter()
    chat, sums, notes = (prompt(f"{name} {KNOWLEDGE}") for name in ("Chat about it.", "Sum it up.", "Take a note."))
    assert watch(linter, [chat, sums] * 10) == [None] * 20
    # They come back after their TTL, when somebody else used the family a moment ago.
    for at, each in enumerate((chat, sums)):
        now = 2_000.0 + at
        assert linter.observe("f", each, at_ns=AT_NS, now=now, price=PRICE, write="5m", min_tokens=1_024) is None
    assert linter.take_deltas().findings == ()
    found = linter.observe("f", notes, at_ns=AT_NS, now=2_002.0, price=PRICE, write="5m", min_tokens=1_024)
    assert found is not None
    assert found.cause == "text_changed"
    (row,) = linter.take_deltas().findings
    assert row.count == 2
    assert row.lost_nanousd == pytest.approx(2 * lost_nanousd(tokens_of(notes.system), PRICE, "5m"), rel=0.01)


def test_what_anthropic_counted_is_what_a_loss_is_told_in():
    def lost(body_bytes, prompt_tokens):
        linter = FamilyLinter()
        prompts = [prompt(f"Now: 2026-11-24T10:15:0{n}.5Z. {KNOWLEDGE}") for n in range(2)]
        watch(linter, prompts[:1])
        linter.counted("f", body_bytes=body_bytes, prompt_tokens=prompt_tokens)
        watch(linter, prompts[1:])
        return linter.take_deltas().findings[0].lost_nanousd

    size = len(prompt(KNOWLEDGE).system)
    assert lost(size, 5_000) == pytest.approx(lost_nanousd(5_000, PRICE, "5m"), rel=0.01)
    # Pictures have many bytes and few tokens; a body of none and a family that nobody knows say nothing.
    assert lost(size * 100, 5_000) == lost(0, 5_000) > 0
    FamilyLinter().counted("g", body_bytes=10, prompt_tokens=3)


def test_a_conversation_that_grows_is_never_named():
    said, messages = [], []
    for number in range(30):
        messages = [*messages, {"role": ("user", "assistant")[number % 2], "content": f"turn {number}"}]
        said.append(prompt(KNOWLEDGE, TOOLS, messages))
    assert watch(FamilyLinter(), said) == [None] * 30


def test_a_prompt_that_the_cache_still_holds_loses_nothing():
    linter = FamilyLinter()
    said = watch(linter, [prompt(f"{KNOWLEDGE[:n]} {KNOWLEDGE[n:]}") for n in (100, 200) * 10])
    assert [one is not None for one in said] == [False, True] + [False] * 18
    assert [row.count for row in linter.take_deltas().findings] == [1]
    # After its TTL a prompt is gone, and loses nothing either: it could not have been read.
    late = watch(linter, [prompt(f"{KNOWLEDGE[:n]} {KNOWLEDGE[n:]}") for n in (100, 300)], every_s=301.0)
    assert late[1] is not None
    assert sum(row.lost_nanousd for row in linter.take_deltas().findings) == 0


def test_what_was_paid_again_is_what_stands_behind_the_last_entry():
    one, other = prompt(f"Now 10:15:01. {KNOWLEDGE}"), prompt(f"Now 10:15:02. {KNOWLEDGE}")
    found = compare(one, other)
    tokens = tokens_paid_again(one, other, found, min_tokens=1_024)
    assert tokens_of(KNOWLEDGE.encode()) - 5 < tokens <= tokens_of(other.system + other.messages)
    assert tokens_paid_again(one, other, found, min_tokens=100_000) == 0


def paid_again(one, other, **rest):
    return tokens_paid_again(one, other, compare(one, other), **rest)


def test_a_time_at_the_end_costs_the_block_it_stands_in():
    whole = tokens_of(encode(KNOWLEDGE))
    strings = [prompt(f"{KNOWLEDGE} {clock}") for clock in ("10:15:01", "10:15:02")]
    assert whole < paid_again(*strings) < whole + 50
    # In a block of its own it costs little, where the block before it is long enough to be an entry.
    blocks = [prompt([block(KNOWLEDGE, None), block(clock, None)]) for clock in ("10:15:01", "10:15:02")]
    assert paid_again(*blocks, min_tokens=1_024) < 50
    assert paid_again(*blocks, min_tokens=whole - 10) < 50
    assert whole < paid_again(*blocks, min_tokens=whole + 30) < whole + 100
    # An entry ends where the caller marks: one mark at the end, and nothing is read.
    for first, tokens in ((None, whole), ("", 0)):
        marked = [prompt([block(KNOWLEDGE, first), block(clock)]) for clock in ("10:15:01", "10:15:02")]
        assert tokens <= paid_again(*marked, min_tokens=1_024) < tokens + 100
    # Tools are blocks, and so is what a message is made of.
    tools = [prompt("s", [TOOLS[0], {"name": "now", "description": clock}]) for clock in ("10:15:01", "10:15:02")]
    assert 0 < paid_again(*tools) < paid_again(*tools, min_tokens=40)
    asked = [
        [{"role": "user", "content": [block(KNOWLEDGE, None), block(f"{clock} {KNOWLEDGE}", None)]}, *TURNS]
        for clock in ("10:15:01", "10:15:02")
    ]
    said = [prompt("s", messages=each) for each in asked]
    assert whole < paid_again(*said, min_tokens=1_024) < whole + 100


@pytest.mark.parametrize(("write", "nanousd"), [("", 2_700), ("5m", 3_450), ("1h", 5_700)])
def test_a_token_that_is_paid_again_costs_the_write_and_not_the_read(write, nanousd):
    assert lost_nanousd(1_000, PRICE, write) == 1_000 * nanousd


def test_a_crowd_is_compared_a_few_times_a_second_and_counted_whole():
    linter = FamilyLinter()
    prompts = [prompt(f"Now: 2026-11-24T10:15:01.{n:04d}Z. {KNOWLEDGE}") for n in range(1_000, 1_500)]
    said = watch(linter, prompts, every_s=0.001)
    assert all(one is not None for one in said[1:])
    (row,) = linter.take_deltas().findings
    assert (row.cause, row.count) == ("timestamp", 499)
    assert len({id(one) for one in said[1:]}) <= COMPARES_BURST + 2
    assert row.lost_nanousd == 499 * (row.lost_nanousd // 499)


def test_sums_are_by_family_cause_and_day_and_taken_once():
    linter = FamilyLinter()
    day_ns = 86_400 * 10**9
    for day in range(2):
        for number in range(3):
            text = f"Now 1{day}:15:0{number} {KNOWLEDGE}"
            linter.observe("f", prompt(text), at_ns=AT_NS + day * day_ns + number, now=day * 86_400.0 + number)
    rows = linter.take_deltas().findings
    assert [(row.cause, row.count) for row in rows] == [("timestamp", 2), ("timestamp", 3)]
    assert [row.day for row in rows] == [20_675, 20_676]
    assert (rows[0].first_at_ns, rows[0].last_at_ns) == (AT_NS + 1, AT_NS + 2)
    assert json.loads(rows[0].detail)["part"] == "system"
    assert KNOWLEDGE[:20] not in rows[0].detail
    assert linter.take_deltas().findings == ()


def test_memory_is_bounded_in_bytes_families_and_sums():
    linter = FamilyLinter(bytes_max=100_000)
    for number in range(FAMILIES_MAX + 50):
        linter.observe(str(number), prompt("x" * 100), at_ns=AT_NS, now=1.0)
    assert linter.snapshot()["bytes"] <= 100_000
    linter.observe("long", prompt("x" * 200_000), at_ns=AT_NS, now=1.0)
    assert linter.snapshot()["skipped"] == 1
    for number in range(DELTAS_MAX + 7):
        linter.note(str(number), AnthropicDiagnosis("system_changed"), at_ns=AT_NS)
    assert linter.snapshot()["dropped"] == 7
    assert len(linter.take_deltas().findings) == DELTAS_MAX


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 400)), max_size=40))
def test_the_bytes_that_are_counted_are_those_that_are_held(asked):
    linter = FamilyLinter(bytes_max=1_000)
    for at, (family, kind, length) in enumerate(asked):
        linter.observe(
            str(family), prompt("x" * length, messages=[{"role": "user", "content": str(kind)}]), at_ns=at, now=at
        )
    held = [known.size for known in linter._families.values()]
    assert linter.snapshot()["bytes"] == sum(held) <= 1_000


def test_a_family_is_told_when_it_changed_or_a_minute_later():
    linter = FamilyLinter()
    facts = {"key_id": "key00001", "endpoint": "chat", "model": MODEL, "ttl": "5m", "ttl_reason": "used every 40 s"}
    linter.describe("f", at_ns=AT_NS, **facts)
    (row,) = linter.take_deltas().families
    assert json.loads(row.detail) == {"ttl": "5m", "ttl_reason": "used every 40 s"}
    linter.describe("f", at_ns=AT_NS + 10**9, **facts)
    assert linter.take_deltas().families == ()
    linter.describe("f", at_ns=AT_NS + 2 * 10**9, **{**facts, "ttl": "1h"})
    linter.describe("f", at_ns=AT_NS + 70 * 10**9, **{**facts, "ttl": "1h"})
    assert [each.updated_at_ns for each in linter.take_deltas().families] == [AT_NS + 70 * 10**9]


def test_anthropics_word_stands_beside_ours():
    linter = FamilyLinter()
    for _ in range(2):
        linter.note("f", AnthropicDiagnosis("system_changed", 4_500), at_ns=AT_NS)
    (row,) = linter.take_deltas().findings
    assert (row.cause, row.count, row.detail) == ("anthropic:system_changed", 2, '{"missed_tokens":4500}')


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, None),
        (b"", None),
        (b"null", None),
        (b'{"cache_miss_reason":null}', None),
        (b'{"cache_miss_reason":{"type":"unavailable"}}', AnthropicDiagnosis("unavailable")),
        (
            b'{"cache_miss_reason":{"type":"tools_changed","cache_missed_input_tokens":812,"new":1}}',
            AnthropicDiagnosis("tools_changed", 812),
        ),
        (b'{"cache_miss_reason":{"type":7}}', None),
        (b'{"cache_miss_reason":{"type":"x","cache_missed_input_tokens":"many"}}', None),
        (b"{", None),
        (b"[1]", None),
        (b'{"cache_miss_reason":{}}', None),
    ],
)
def test_diagnostics_of_an_answer_are_read_and_never_raise(raw, expected):
    assert diagnosis(raw) == expected


def block(text, ttl=""):
    mark = {"cache_control": MARK | ({"ttl": ttl} if ttl else {})} if ttl is not None else {}
    return {"type": "text", "text": text, **mark}


@pytest.mark.parametrize(
    ("system", "cause"),
    [
        ([block(KNOWLEDGE, "1h"), block("b", "5m")], None),
        ([block(KNOWLEDGE, "5m"), block("b", "1h")], "ttl_order"),
        ([block(KNOWLEDGE), block("b", "1h")], "ttl_order"),
        ([block(KNOWLEDGE), *(block("b") for _ in range(4))], "too_many_marks"),
        ([block(KNOWLEDGE, None), block(" ")], "empty_mark"),
        ([block("short")], "below_minimum"),
        ([block(KNOWLEDGE, None)], None),
        ("a string says cache_control", None),
    ],
)
def test_marks_that_cannot_work(system, cause):
    found = check(prompt(system), min_tokens=1_024)
    assert (found.cause if found else None) == cause
    if found is not None:
        assert encode(system)[found.byte : found.byte + 1] == b"{"
        assert watch(FamilyLinter(), [prompt(system)])[0] == found


def test_an_automatic_mark_counts_and_reaches_to_the_end():
    long = [{"role": "user", "content": KNOWLEDGE}]
    assert check(prompt("s", messages=long, automatic=True), min_tokens=1_024) is None
    assert check(prompt("s", automatic=True), min_tokens=1_024).cause == "below_minimum"
    four = [block(KNOWLEDGE), *(block("b") for _ in range(3))]
    assert check(prompt(four)) is None
    assert check(prompt(four, automatic=True)).cause == "too_many_marks"


@given(*[st.binary(max_size=30) | st.just(b'[{"cache_control":{"ttl":"1h"}}]') | st.just(b'[{"cache_control":[')] * 3)
def test_a_prompt_that_is_no_json_never_raises(tools, system, messages):
    linter = FamilyLinter()
    for at, parts in enumerate(
        [PromptParts(tools, system, messages, MODEL), PromptParts(messages, tools, system, MODEL)]
    ):
        linter.observe("f", parts, at_ns=AT_NS, now=float(at), price=PRICE, min_tokens=1)
    check(PromptParts(tools, system, messages, MODEL, automatic=True), min_tokens=10)
