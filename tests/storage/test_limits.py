"""The limits of one process: the limiter with a clock, answered at once."""

from headgate.policy.limiter import Ask, ClassLimits, Limiter, Subject, Verdict
from headgate.storage.interfaces import Limits
from headgate.storage.limits import LocalLimits
from headgate.wire.headers import RateLimit, RateLimits

CLASS = ClassLimits(rpm=60.0, itpm=6_000.0, burst_s=10.0)
AN = Subject("user:an", rpm=6.0, concurrency=2)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def admitted(limits: Limits, ask_id: str, **fields) -> Verdict:
    verdicts: list[Verdict] = []
    limits.admit(Ask(ask_id, "sonnet", CLASS, **fields), verdicts.append)
    (verdict,) = verdicts
    return verdict


def test_the_answer_comes_before_the_call_returns():
    limits = LocalLimits(Limiter(), Clock())
    assert admitted(limits, "a") == Verdict(True)


def test_all_that_happens_to_an_attempt_reaches_the_limiter():
    clock = Clock()
    limits = LocalLimits(Limiter(), clock)
    assert admitted(limits, "a", subjects=(AN,), input_tokens=900).admitted
    assert limits.snapshot("sonnet", CLASS).levels == (9, 100, None)
    assert limits.subject_level(AN) == 5.0
    limits.correct("a", input_tokens=500, output_tokens=3)
    assert limits.snapshot("sonnet", CLASS).levels == (9, 500, None)
    limits.observe("a", RateLimits(input_tokens=RateLimit(limit=3_000, remaining=200)))
    assert limits.effective("sonnet", CLASS).itpm == 3_000
    limits.throttled("sonnet", CLASS, retry_after_s=7.0, ramp=False)
    assert admitted(limits, "b") == Verdict(False, 7.0, "frozen")
    limits.settle("a", input_tokens=500, output_tokens=3)
    clock.now += 7.0
    assert admitted(limits, "b").admitted


def test_a_lost_attempt_gives_its_slot_back_when_its_lease_is_over_and_a_renewed_one_keeps_it():
    clock = Clock()
    limiter = Limiter()
    limits = LocalLimits(limiter, clock)
    for ask_id in ("lost", "long"):
        assert admitted(limits, ask_id, subjects=(AN,), lease_s=60.0).admitted
    assert admitted(limits, "third", subjects=(AN,)).reason == "user_concurrency"
    clock.now += 50.0
    limits.renew("long", lease_s=60.0)
    clock.now += 20.0
    limits.tick(clock.now)
    assert len(limiter) == 1
    assert admitted(limits, "third", subjects=(AN,)).admitted
    assert admitted(limits, "fourth", subjects=(AN,)).reason == "user_concurrency"


def test_alone_it_shares_with_nobody():
    limits = LocalLimits(Limiter(), Clock())
    assert (limits.shared, limits.replicas) == (False, 1)
