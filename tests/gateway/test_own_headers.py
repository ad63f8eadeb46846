"""The header lines that are ours: what a caller reads of its call, its limits and its bill."""

from headgate.gateway.own_headers import attempt_lines, bill_lines, limit_lines
from headgate.policy.limiter import Ask, ClassLimits, Limiter, Subject
from headgate.storage.limits import LocalLimits

AUGUST_10_NS = 1_786_320_000 * 10**9


def test_an_attempt_says_which_model_and_how_long() -> None:
    lines = attempt_lines(model="claude-x", attempts=2, queue_ms=17, asked_first="claude-x", fallback_reason="")
    assert lines == b"x-headgate-model: claude-x\r\nx-headgate-attempts: 2\r\nx-headgate-queue-ms: 17\r\n"


def test_a_fallback_is_told_with_its_reason() -> None:
    lines = attempt_lines(model="b", attempts=1, queue_ms=0, asked_first="a", fallback_reason="breaker_open")
    assert lines.endswith(b"x-headgate-fallback: from=a; reason=breaker_open\r\n")


def test_a_name_cannot_add_a_header() -> None:
    lines = attempt_lines(model="a\r\nset-cookie: x\x7f", attempts=1, queue_ms=0, asked_first="", fallback_reason="")
    assert lines.startswith(b"x-headgate-model: aset-cookie: x\r\n")
    assert lines.count(b"\r\n") == 3


def test_the_nearest_limit_is_told() -> None:
    limits = LocalLimits(Limiter(), lambda: 0.0)
    person, key = Subject("user:an", rpm=20), Subject("key:k", rpm=6)
    limits.admit(Ask("a", "sonnet-4", ClassLimits(), (person, key), 1, 1, lease_s=60.0), lambda verdict: None)
    assert limit_lines(limits, (person, key), AUGUST_10_NS) == (
        b"anthropic-ratelimit-requests-limit: 6\r\nanthropic-ratelimit-requests-remaining: 5\r\n"
        b"anthropic-ratelimit-requests-reset: 2026-08-10T00:00:10Z\r\n"
    )
    assert limit_lines(limits, (), AUGUST_10_NS) == b""


def test_a_bill_is_told_to_the_nano_dollar() -> None:
    assert bill_lines(1_000_000_001, cache_read=1, cache_written=5) == (
        b"x-headgate-cost-usd: 1.000000001\r\nx-headgate-cache: read\r\n"
    )
    assert bill_lines(0, cache_read=0, cache_written=5).endswith(b"0.000000000\r\nx-headgate-cache: write\r\n")
    assert bill_lines(0, cache_read=0, cache_written=0).endswith(b"x-headgate-cache: none\r\n")
