"""Usage from JSON: one object, a stream's start and deltas, and what is refused."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.wire.usage import NO_USAGE, TOKENS_MAX, IterationUsage, Usage, UsageError, decode_usage, join_usage

# The byte example of Anthropic's streaming documentation: thinking, text and a tool, on a cache hit.
START = (
    b'{"input_tokens":42,"cache_creation_input_tokens":0,"cache_read_input_tokens":8000,"cache_creation":'
    b'{"ephemeral_5m_input_tokens":0,"ephemeral_1h_input_tokens":0},"output_tokens":1,"service_tier":"standard",'
    b'"inference_geo":"global"}'
)
DELTA = (
    b'{"input_tokens":42,"cache_creation_input_tokens":0,"cache_read_input_tokens":8000,"output_tokens":89,'
    b'"output_tokens_details":{"thinking_tokens":40}}'
)

COUNTS = {
    "input_tokens": "input_tokens",
    "cache_read_input_tokens": "cache_read_tokens",
    "output_tokens": "output_tokens",
}
counts = st.integers(0, 300_000)


def encode(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_a_stream_of_the_docs_gives_the_usage_the_docs_state() -> None:
    start = decode_usage(START)
    assert start == Usage(input_tokens=42, cache_read_tokens=8000, output_tokens=1, inference_geo="global")
    assert join_usage(start, DELTA) == Usage(
        input_tokens=42, cache_read_tokens=8000, output_tokens=89, thinking_tokens=40, inference_geo="global"
    )


def test_every_field_that_is_billed_is_read() -> None:
    usage = decode_usage(
        encode(
            input_tokens=1,
            cache_read_input_tokens=2,
            cache_creation_input_tokens=7,
            cache_creation={"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 4},
            output_tokens=50,
            output_tokens_details={"thinking_tokens": 6},
            server_tool_use={"web_search_requests": 8, "web_fetch_requests": 9},
            service_tier="batch",
            speed="fast",
            inference_geo="us",
            iterations=[
                {"type": "compaction", "input_tokens": 10, "output_tokens": 11},
                {
                    "type": "fallback_message",
                    "model": "claude-opus-5",
                    "input_tokens": 12,
                    "cache_read_input_tokens": 13,
                    "cache_creation_input_tokens": 29,
                    "cache_creation": {"ephemeral_5m_input_tokens": 14, "ephemeral_1h_input_tokens": 15},
                    "output_tokens": 16,
                },
            ],
        )
    )
    assert usage == Usage(
        input_tokens=1,
        cache_read_tokens=2,
        cache_write_5m_tokens=3,
        cache_write_1h_tokens=4,
        output_tokens=50,
        thinking_tokens=6,
        web_search_requests=8,
        service_tier="batch",
        speed="fast",
        inference_geo="us",
        iterations=(
            IterationUsage("compaction", input_tokens=10, output_tokens=11),
            IterationUsage("fallback_message", "claude-opus-5", 12, 13, 14, 15, 16),
        ),
    )
    assert usage.prompt_tokens == 10
    assert usage.iterations[1].prompt_tokens == 54


def test_absent_and_null_fields_have_their_defaults_and_unknown_ones_are_passed_over() -> None:
    assert decode_usage(b"{}") == NO_USAGE
    nulls = dict.fromkeys(
        [
            "input_tokens",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
            "cache_creation",
            "output_tokens",
            "output_tokens_details",
            "server_tool_use",
            "service_tier",
            "speed",
            "inference_geo",
            "iterations",
        ]
    )
    assert decode_usage(encode(**nulls)) == NO_USAGE
    assert decode_usage(encode(**nulls, fallback_credit={"status": {"type": "redeemed"}}, tomorrow=[1.5])) == NO_USAGE
    assert decode_usage(encode(output_tokens_details={"thinking_tokens": None}, server_tool_use={})) == NO_USAGE
    assert decode_usage(encode(iterations=[{"type": None}])).iterations == (IterationUsage(),)


def test_bytes_kept_raw_by_an_outer_decoder_are_read_without_a_copy_of_our_own() -> None:
    assert decode_usage(msgspec.Raw(START)) == decode_usage(START)


@pytest.mark.parametrize(
    ("total", "split", "writes", "unknown"),
    [
        (None, None, (0, 0), False),
        (0, None, (0, 0), False),
        (500, None, (0, 500), True),
        (500, (500, 0), (500, 0), False),
        (500, (200, 300), (200, 300), False),
        (500, (200, None), (200, 300), True),
        (500, (200, 100), (200, 300), True),
        (500, (600, 0), (500, 0), True),
        (500, (200, 900), (200, 300), True),
        (None, (200, 300), (200, 300), False),
    ],
)
def test_cache_writes_sum_to_their_total_and_what_no_split_explains_is_dear(
    total: int | None, split: tuple[int | None, int | None] | None, writes: tuple[int, int], unknown: bool
) -> None:
    creation = None if split is None else {"ephemeral_5m_input_tokens": split[0], "ephemeral_1h_input_tokens": split[1]}
    report = {"cache_creation_input_tokens": total, "cache_creation": creation}
    usage = decode_usage(encode(**report))
    assert (usage.cache_write_5m_tokens, usage.cache_write_1h_tokens) == writes
    assert usage.split_unknown is unknown
    of_pass = decode_usage(encode(iterations=[report]))
    assert of_pass.iterations[0].cache_write_5m_tokens == writes[0]
    assert of_pass.iterations[0].cache_write_1h_tokens == writes[1]
    assert of_pass.split_unknown is unknown


def test_a_delta_that_raises_the_cache_writes_keeps_the_split_it_was_told_of() -> None:
    start = decode_usage(
        encode(
            cache_creation_input_tokens=100,
            cache_creation={"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 0},
        )
    )
    same = join_usage(start, encode(cache_creation_input_tokens=100))
    assert (same.cache_write_5m_tokens, same.cache_write_1h_tokens, same.split_unknown) == (100, 0, False)
    raised = join_usage(start, encode(cache_creation_input_tokens=250))
    assert (raised.cache_write_5m_tokens, raised.cache_write_1h_tokens, raised.split_unknown) == (100, 150, True)
    told = join_usage(
        raised,
        encode(
            cache_creation_input_tokens=250,
            cache_creation={"ephemeral_5m_input_tokens": 250, "ephemeral_1h_input_tokens": 0},
        ),
    )
    assert (told.cache_write_5m_tokens, told.cache_write_1h_tokens, told.split_unknown) == (250, 0, False)


def test_what_only_the_start_says_survives_every_delta() -> None:
    start = decode_usage(
        encode(service_tier="batch", speed="fast", inference_geo="us", iterations=[{"input_tokens": 1}])
    )
    assert join_usage(start, encode(output_tokens=9, service_tier=None)) == msgspec.structs.replace(
        start, output_tokens=9
    )


def test_a_zero_in_a_delta_is_a_value_and_not_an_absence() -> None:
    start = decode_usage(
        encode(
            input_tokens=1,
            cache_read_input_tokens=2,
            cache_creation_input_tokens=3,
            output_tokens=4,
            output_tokens_details={"thinking_tokens": 1},
            server_tool_use={"web_search_requests": 5},
            iterations=[{"input_tokens": 1}],
        )
    )
    zeros = encode(
        input_tokens=0,
        cache_read_input_tokens=0,
        cache_creation_input_tokens=0,
        output_tokens=0,
        output_tokens_details={"thinking_tokens": 0},
        server_tool_use={"web_search_requests": 0},
        iterations=[],
    )
    assert join_usage(start, zeros) == Usage(split_unknown=True)


def test_a_delta_without_a_start_is_a_usage_of_its_own() -> None:
    assert join_usage(NO_USAGE, DELTA) == decode_usage(DELTA)


@pytest.mark.parametrize("count", ["-1", "1.5", "1.0", '"1"', "true", str(TOKENS_MAX + 1), "1e400", "9" * 40, "[]"])
@pytest.mark.parametrize(
    "field",
    [
        '{"input_tokens":%s}',
        '{"cache_read_input_tokens":%s}',
        '{"cache_creation_input_tokens":%s}',
        '{"cache_creation":{"ephemeral_5m_input_tokens":%s}}',
        '{"cache_creation":{"ephemeral_1h_input_tokens":%s}}',
        '{"output_tokens":%s}',
        '{"output_tokens_details":{"thinking_tokens":%s}}',
        '{"server_tool_use":{"web_search_requests":%s}}',
        '{"iterations":[{"input_tokens":%s}]}',
        '{"iterations":[{"output_tokens":%s}]}',
    ],
)
def test_a_count_that_is_not_a_whole_number_of_tokens_is_refused(field: str, count: str) -> None:
    with pytest.raises(UsageError, match="usage: "):
        decode_usage((field % count).encode())


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b"{", b'{"input_tokens":1}}', b'{"speed":1}', b'{"speed":"\xff"}', b'{"iterations":{}}'],
)
def test_what_is_not_a_usage_object_is_refused(raw: bytes) -> None:
    with pytest.raises(UsageError, match="usage: "):
        join_usage(NO_USAGE, raw)


def test_nesting_deeper_than_the_stack_is_refused() -> None:
    with pytest.raises(UsageError, match="usage: "):
        decode_usage(b'{"later":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@given(st.binary(max_size=80) | st.integers(0, len(START)).map(lambda cut: START[:cut]))
def test_no_bytes_raise_anything_but_a_usage_error(raw: bytes) -> None:
    try:
        usage = decode_usage(raw)
    except UsageError:
        return
    assert usage.prompt_tokens >= 0


@given(counts, counts, counts, counts, counts)
def test_the_parts_of_a_prompt_are_the_prompt(plain: int, read: int, write_5m: int, write_1h: int, output: int) -> None:
    usage = decode_usage(
        encode(
            input_tokens=plain,
            cache_read_input_tokens=read,
            cache_creation_input_tokens=write_5m + write_1h,
            cache_creation={"ephemeral_5m_input_tokens": write_5m, "ephemeral_1h_input_tokens": write_1h},
            output_tokens=output,
        )
    )
    assert usage.prompt_tokens == plain + read + write_5m + write_1h
    assert usage.output_tokens == output


reports = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.none() | counts for name in COUNTS},
        "cache_creation_input_tokens": st.none() | counts,
        "output_tokens_details": st.none() | st.fixed_dictionaries({"thinking_tokens": st.none() | counts}),
        "server_tool_use": st.none() | st.fixed_dictionaries({"web_search_requests": st.none() | counts}),
        "iterations": st.none() | st.lists(st.fixed_dictionaries({"input_tokens": counts}), max_size=3),
    },
)


def last_value(history: list[dict[str, object]], *path: str) -> object:
    """The last value at `path` that is not null, over the reports in order; 0 when there is none."""
    last: object = 0
    for report in history:
        value: object = report
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            last = value
    return last


@given(st.lists(reports, min_size=1, max_size=8))
def test_after_any_number_of_deltas_each_field_is_the_last_value_it_was_given(history: list[dict[str, object]]) -> None:
    usage = NO_USAGE
    for report in history:
        usage = join_usage(usage, json.dumps(report).encode())
    for name, field in COUNTS.items():
        assert getattr(usage, field) == last_value(history, name)
    writes = last_value(history, "cache_creation_input_tokens")
    assert usage.cache_write_5m_tokens + usage.cache_write_1h_tokens == writes
    assert usage.thinking_tokens == last_value(history, "output_tokens_details", "thinking_tokens")
    assert usage.web_search_requests == last_value(history, "server_tool_use", "web_search_requests")
    passes = last_value(history, "iterations") or []
    assert [one.input_tokens for one in usage.iterations] == [one["input_tokens"] for one in passes]  # type: ignore[attr-defined]


@given(counts, counts, st.lists(counts, max_size=6))
def test_writes_that_grow_in_steps_end_as_they_would_in_one(write_5m: int, write_1h: int, steps: list[int]) -> None:
    start = decode_usage(
        encode(
            cache_creation={"ephemeral_5m_input_tokens": write_5m, "ephemeral_1h_input_tokens": write_1h},
        )
    )
    totals = sorted(write_5m + write_1h + step for step in steps)
    usage = start
    for total in totals:
        usage = join_usage(usage, encode(cache_creation_input_tokens=total))
    at_once = join_usage(start, encode(cache_creation_input_tokens=totals[-1])) if totals else start
    assert usage == at_once
