"""What a call is expected to take: drawn to real usage for each script, less what the cache will serve."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.forecast import NO_FORECAST, PREFIXES_MAX, Forecaster, prefixes, uncached
from headgate.wire.message import scan
from headgate.wire.usage import Usage

MODEL = "claude-sonnet-4-6"
MARK = {"cache_control": {"type": "ephemeral"}}


def forecast(forecaster, tokens=1000, script="ascii", marks=(), max_tokens=1024, now=0.0):
    return forecaster.forecast(MODEL, tokens, script, marks, max_tokens, now)


def body(system: str, question: str, *, marked: bool = True, tail: bool = False) -> bytes:
    text = {"type": "text", "text": system} | (MARK if marked else {})
    last = {"type": "text", "text": question} | (MARK if tail else {})
    return json.dumps({"system": [text], "messages": [{"role": "user", "content": [last]}]}).encode()


def marks(*arguments, **options):
    return prefixes(scan(body(*arguments, **options)))


def test_nothing_is_known_at_first():
    assert forecast(Forecaster()).input_tokens == 1000


def test_what_another_call_is_about_to_have_cached_is_not_counted():
    found = Forecaster().forecast(MODEL, 1000, "ascii", (7,), 1024, 0.0, to_be_read=900)
    assert found.input_tokens == 100
    assert Forecaster().forecast(MODEL, 1000, "ascii", (7,), 1024, 0.0, to_be_read=2000).input_tokens == 1


@pytest.mark.parametrize("ratio", [0.5, 1.3, 2.4])
def test_estimates_are_drawn_to_what_anthropic_counts(ratio):
    forecaster = Forecaster()
    for _ in range(60):
        forecaster.began(MODEL, forecast(forecaster), Usage(input_tokens=round(1000 * ratio)), 0.0)
    assert forecast(forecaster, tokens=2000).input_tokens == pytest.approx(2000 * ratio, rel=0.02)


def test_each_script_has_its_own_ratio():
    forecaster = Forecaster()
    forecaster.began(MODEL, forecast(forecaster, script="dense"), Usage(input_tokens=2000), 0.0)
    assert forecast(forecaster, script="dense").input_tokens == 2000
    assert forecast(forecaster, script="ascii").input_tokens == 1000


def test_a_prefix_that_was_written_is_expected_to_be_read():
    forecaster = Forecaster()
    prefix = marks("x" * 3400, "one")
    forecaster.began(
        MODEL, forecast(forecaster, marks=prefix), Usage(input_tokens=10, cache_write_5m_tokens=990), now=0.0
    )
    assert forecast(forecaster, marks=marks("x" * 3400, "two"), now=299.0).input_tokens == 10
    assert forecast(forecaster, marks=marks("x" * 3400, "two"), now=301.0).input_tokens == 1000
    assert forecast(forecaster, marks=marks("y" * 3400, "two"), now=1.0).input_tokens == 1000


def test_an_hours_prefix_lasts_an_hour():
    forecaster = Forecaster()
    prefix = marks("x" * 3400, "one")
    usage = Usage(input_tokens=10, cache_write_1h_tokens=990)
    forecaster.began(MODEL, forecast(forecaster, marks=prefix), usage, now=0.0)
    assert forecast(forecaster, marks=prefix, now=3599.0).input_tokens == 10


def test_of_two_marks_the_longest_known_counts():
    forecaster = Forecaster()
    first, second = (marks("x" * 3400, question, tail=True) for question in ("one", "two"))
    assert first[0] == second[0]
    assert first[1] != second[1]
    # The first time all is written; nothing tells yet how long the part before the first mark is.
    forecaster.began(MODEL, forecast(forecaster, marks=first), Usage(cache_write_5m_tokens=1000), 0.0)
    assert forecast(forecaster, marks=second).input_tokens == 1000
    usage = Usage(cache_read_tokens=900, cache_write_5m_tokens=100)
    forecaster.began(MODEL, forecast(forecaster, marks=second), usage, 0.0)
    assert forecast(forecaster, marks=marks("x" * 3400, "three", tail=True)).input_tokens == 100
    assert forecast(forecaster, marks=first).input_tokens == 1


def test_the_order_of_the_fields_is_anthropics_and_not_the_bodys():
    fields = json.loads(body("x" * 3400, "one"))
    backwards = {"messages": fields["messages"], "system": fields["system"]}
    assert prefixes(scan(json.dumps(backwards).encode())) == marks("x" * 3400, "one")
    assert prefixes(scan(json.dumps(backwards | {"messages": []}).encode())) == marks("x" * 3400, "two")


def test_answers_teach_how_long_answers_are():
    forecaster = Forecaster()
    for _ in range(60):
        forecaster.ended(MODEL, 100)
    assert forecast(forecaster).output_tokens == pytest.approx(125, abs=1)
    assert forecast(forecaster, max_tokens=20).output_tokens == 20, "never more than max_tokens allows"


def test_reads_from_the_cache_cost_no_rate():
    usage = Usage(input_tokens=1, cache_read_tokens=1000, cache_write_5m_tokens=10, cache_write_1h_tokens=100)
    assert uncached(usage) == 111


def test_no_marks_no_prefixes():
    assert marks("x", "y", marked=False) == ()
    assert NO_FORECAST.prefixes == ()


def test_memory_is_bounded():
    forecaster = Forecaster()
    for number in range(PREFIXES_MAX + 50):
        told = forecast(forecaster, marks=(number,))
        forecaster.began(f"model-{number}", told, Usage(cache_write_5m_tokens=9), 0.0)
    assert len(forecaster._prefixes) == PREFIXES_MAX
    assert len(forecaster._ratios) <= 256


@given(
    st.integers(1, 10**7),
    st.integers(0, 10**6),
    st.lists(st.builds(Usage, input_tokens=st.integers(0, 10**6), cache_read_tokens=st.integers(0, 10**6)), max_size=5),
)
def test_a_forecast_is_never_below_one(tokens, max_tokens, answers):
    forecaster = Forecaster()
    for usage in answers:
        told = forecast(forecaster, tokens=tokens, marks=(7,), max_tokens=max_tokens)
        forecaster.began(MODEL, told, usage, 0.0)
        forecaster.ended(MODEL, usage.input_tokens)
    told = forecast(forecaster, tokens=tokens, marks=(7,), max_tokens=max_tokens)
    assert told.input_tokens >= 1
    assert told.output_tokens >= 1
