"""Token buckets, the answers they give and the headers that tell them."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from headgate.simulator.cache import Scope
from headgate.simulator.limits import Bucket, RateLimiter, rfc3339
from headgate.simulator.models import load_catalogue
from headgate.simulator.settings import SimulatorSettings

CATALOGUE = load_catalogue()
HERE = Scope("org", "workspace")
WALL_S = 1_763_805_600.0  # 2025-11-22 10:00:00 UTC


def model(name: str) -> Any:
    found = CATALOGUE.find(name)
    assert found is not None
    return found


SONNET = model("claude-sonnet-4-6")


def limiter(**settings: Any) -> RateLimiter:
    return RateLimiter(SimulatorSettings(**settings))


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 20)), max_size=40))
def test_no_window_admits_more_than_burst_plus_rate(steps: list[tuple[float, int]]) -> None:
    bucket, now_s, taken = Bucket(60, burst_s=10.0, now_s=0.0), 0.0, 0
    for wait_s, need in steps:
        now_s += wait_s
        if bucket.wait_s(need, now_s) == 0.0:
            bucket.level -= min(need, bucket.capacity)
            taken += min(need, int(bucket.capacity))
        assert taken <= bucket.capacity + now_s + 1e-6


def test_a_clock_that_goes_back_adds_nothing() -> None:
    bucket = Bucket(60, now_s=100.0)
    bucket.level = 0.0
    assert bucket.refill(50.0) == 0.0
    assert bucket.refill(101.0) == 1.0


def test_the_request_after_the_last_waits_as_long_as_retry_after_says() -> None:
    rates = limiter(tier="tier1")
    for _ in range(50):
        assert rates.admit(HERE, SONNET, 10, 0.0) is None
    refused = rates.admit(HERE, SONNET, 10, 0.0)
    assert refused is not None
    assert (refused.status, refused.headers) == (429, (("retry-after", "2"),))
    assert rates.admit(HERE, SONNET, 10, 1.1) is not None
    assert rates.admit(HERE, SONNET, 10, 1.2) is None


def test_input_is_taken_at_the_start_and_output_as_it_is_produced() -> None:
    rates = limiter(tier="tier1")
    assert rates.admit(HERE, SONNET, 30_000, 0.0) is None
    assert rates.admit(HERE, SONNET, 1_000, 0.0) is not None
    assert rates.admit(HERE, SONNET, 1_000, 2.0) is None
    rates.output_meter(HERE, SONNET, 2.0)(9_000, 2.0)
    refused = rates.admit(HERE, SONNET, 1, 4.1)
    assert refused is not None
    assert "8,000 output tokens" in refused.message


def test_a_refused_request_takes_nothing() -> None:
    rates = limiter(rpm=10, itpm=1_000, otpm=1_000)
    for _ in range(5):
        assert rates.admit(HERE, SONNET, 5_000, 0.0) is not None
    assert rates.snapshot(0.0)["org/sonnet-4"] == {"requests": 10.0, "input": 1_000.0, "output": 1_000.0}


def test_models_of_one_class_share_buckets_and_others_do_not() -> None:
    rates = limiter(rpm=1)
    assert rates.admit(HERE, SONNET, 1, 0.0) is None
    assert rates.admit(HERE, model("claude-sonnet-4-5"), 1, 0.0) is not None
    assert rates.admit(HERE, model("claude-sonnet-5"), 1, 0.0) is None
    assert rates.admit(HERE, model("claude-opus-4-7"), 1, 0.0) is None
    assert rates.admit(HERE, model("claude-opus-4-8"), 1, 0.0) is not None
    assert rates.admit(Scope("other", "workspace"), SONNET, 1, 0.0) is None


def test_burst_mode_enforces_sixty_a_minute_as_one_a_second() -> None:
    rates = limiter(rpm=60, burst_s=1.0)
    assert rates.admit(HERE, SONNET, 1, 0.0) is None
    assert rates.admit(HERE, SONNET, 1, 0.5) is not None
    assert rates.admit(HERE, SONNET, 1, 1.0) is None


def test_a_ramp_is_refused_with_its_code_and_a_steady_load_is_not() -> None:
    rates = limiter(tier="none", ramp_factor=3.0, ramp_floor_tokens=1_000)
    for minute in range(6):
        assert rates.admit(HERE, SONNET, 1_000, minute * 61.0) is None
    assert rates.admit(HERE, SONNET, 1_000, 366.0) is None
    refused = rates.admit(HERE, SONNET, 5_000, 367.0)
    assert refused is not None
    assert refused.error_code == "ramp_limit_exceeded"
    assert dict(refused.headers)["retry-after"] == "10"


def test_headers_tell_limit_remaining_in_thousands_and_when_it_is_full() -> None:
    rates = limiter(tier="tier2")
    assert rates.admit(HERE, SONNET, 4_600, 0.0) is None
    headers = dict(rates.headers(HERE, SONNET, 0.0, WALL_S))
    assert headers["anthropic-ratelimit-requests-limit"] == "1000"
    assert headers["anthropic-ratelimit-requests-remaining"] == "999"
    assert headers["anthropic-ratelimit-input-tokens-limit"] == "450000"
    assert headers["anthropic-ratelimit-input-tokens-remaining"] == "445000"
    assert headers["anthropic-ratelimit-input-tokens-reset"] == "2025-11-22T10:00:00Z"
    assert headers["anthropic-ratelimit-output-tokens-remaining"] == "90000"
    assert headers["anthropic-ratelimit-tokens-limit"] == "540000"
    assert headers["anthropic-ratelimit-tokens-remaining"] == "535000"
    assert len(headers) == 12


def test_without_limits_there_are_no_limit_headers() -> None:
    assert limiter(tier="none").headers(HERE, SONNET, 0.0, WALL_S) == []


def test_count_tokens_has_a_limit_of_its_own() -> None:
    rates = limiter(tier="start", rpm=1)
    assert all(rates.admit_single(HERE, "count_tokens", 0.0) is None for _ in range(2_000))
    assert rates.admit_single(HERE, "count_tokens", 0.0) is not None
    assert rates.admit_single(HERE, "batches", 0.0) is None


def test_times_are_rfc_3339() -> None:
    assert rfc3339(WALL_S) == "2025-11-22T10:00:00Z"
