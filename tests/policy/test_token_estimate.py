"""Estimates of tokens: bounded, steady, and drawn to what Anthropic says."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.token_estimate import DEFAULT_BYTES_PER_TOKEN, OutputCalibration, input_tokens
from headgate.wire.message import scan


def estimate(text: str, *, ascii_only: bool = False) -> int:
    return input_tokens(scan(json.dumps({"messages": text}, ensure_ascii=ascii_only).encode()))


ENGLISH = "The gate at the top of a canal decides how much water goes in, and when. " * 40
VIETNAMESE = "Cánh cổng ở đầu kênh quyết định bao nhiêu nước chảy vào, và khi nào. " * 40
CHINESE = "运河顶端的闸门决定了多少水流入以及何时流入。" * 100


@pytest.mark.parametrize(
    ("text", "chars_per_token"), [(ENGLISH, 3.4), (VIETNAMESE, 1.5), (CHINESE, 1.0)], ids=["en", "vi", "zh"]
)
def test_a_script_has_its_own_rate(text, chars_per_token):
    assert estimate(text) == pytest.approx(len(text) / chars_per_token, rel=0.03)


@pytest.mark.parametrize("text", [VIETNAMESE, CHINESE], ids=["vi", "zh"])
def test_escapes_are_the_same_text(text):
    assert estimate(text, ascii_only=True) == pytest.approx(estimate(text), rel=0.35)


@given(st.text(max_size=300), st.booleans())
def test_an_estimate_is_at_least_one_and_at_most_a_token_a_byte(text, ascii_only):
    body = json.dumps({"a": text}, ensure_ascii=ascii_only).encode()
    assert 1 <= input_tokens(scan(body)) <= len(body)


def test_the_least_body_has_a_token():
    assert input_tokens(scan(b"{}")) == 1


@pytest.mark.parametrize("text", [ENGLISH, VIETNAMESE, CHINESE], ids=["en", "vi", "zh"])
def test_twice_the_text_is_about_twice_the_estimate(text):
    assert estimate(text * 2) == pytest.approx(2 * estimate(text), rel=0.05)


@pytest.mark.parametrize("rate", [1.2, 2.5, 6.0])
def test_a_calibration_converges_to_the_rate_of_real_answers(rate):
    calibration = OutputCalibration()
    for tokens in range(50, 150):
        calibration.observe("m", output_bytes=round(tokens * rate), output_tokens=tokens)
    assert calibration.tokens("m", 10_000) == pytest.approx(10_000 / rate, rel=0.02)


def test_one_odd_answer_moves_the_rate_by_a_tenth():
    calibration = OutputCalibration()
    calibration.observe("m", output_bytes=300, output_tokens=100)
    calibration.observe("m", output_bytes=1300, output_tokens=100)
    assert calibration.tokens("m", 4_000) == 1_000


def test_models_are_calibrated_apart_and_an_unknown_one_by_default():
    calibration = OutputCalibration()
    calibration.observe("a", output_bytes=100, output_tokens=100)
    assert calibration.tokens("a", 100) == 100
    assert calibration.tokens("b", 100) == -(-100 // DEFAULT_BYTES_PER_TOKEN) == 30


@pytest.mark.parametrize(("output_bytes", "output_tokens"), [(0, 5), (5, 0), (-1, 5), (5, -1)])
def test_an_answer_without_text_or_tokens_teaches_nothing(output_bytes, output_tokens):
    calibration = OutputCalibration()
    calibration.observe("m", output_bytes=output_bytes, output_tokens=output_tokens)
    assert calibration.tokens("m", 100) == 30


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**5)), max_size=30), st.integers(0, 10**7))
def test_an_estimate_lies_within_the_rates_that_were_seen_and_is_rounded_up(answers, output_bytes):
    calibration = OutputCalibration()
    for seen_bytes, seen_tokens in answers:
        calibration.observe("m", output_bytes=seen_bytes, output_tokens=seen_tokens)
    rates = [seen_bytes / seen_tokens for seen_bytes, seen_tokens in answers] or [DEFAULT_BYTES_PER_TOKEN]
    tokens = calibration.tokens("m", output_bytes)
    assert output_bytes / (max(rates) * 1.000001) <= tokens <= output_bytes / (min(rates) * 0.999999) + 1
    assert (tokens == 0) == (output_bytes == 0)


def test_no_more_models_are_remembered_than_allowed():
    calibration = OutputCalibration(models_max=2)
    for model in ("a", "b", "c"):
        calibration.observe(model, output_bytes=100, output_tokens=100)
    assert [calibration.tokens(model, 100) for model in ("a", "b", "c")] == [30, 100, 100]
