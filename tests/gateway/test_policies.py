"""From settings to policies: every number arrives where it is used, and the nearest one wins."""

import pytest

from headgate.gateway.policies import COUNTING_CLASS, Policies, Tier, policies
from headgate.gateway.settings import BUILT_IN_TIERS, Settings
from headgate.policy.breaker import BreakerPolicy
from headgate.policy.experiments import Arm, Experiment
from headgate.policy.limiter import ClassLimits
from headgate.policy.request_queue import QueueBounds
from headgate.policy.retry import RetryPolicy
from headgate.wire.catalog import day_start_ns, packaged
from headgate.wire.message import scan
from headgate.wire.tiers import TIER_NAMES, tier_limits

CATALOG = packaged()
SONNET, HAIKU, OPUS = "claude-sonnet-4-6", "claude-haiku-4-5", "claude-opus-4-7"


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Policies of settings that differ from the defaults in these sections."""
    monkeypatch.chdir(tmp_path)

    def make(**sections) -> Policies:
        return policies(Settings(**sections), CATALOG)

    return make


def limits(of: Policies, class_id: str) -> tuple:
    found = of.class_limits(class_id)
    return found.rpm, found.itpm, found.otpm


# Anthropic's limits


def test_without_a_word_the_articles_tier_is_where_learning_begins(made):
    of = made()
    for class_id in ("sonnet-4", "haiku-4-5", "fable-5", "nonesuch"):
        assert of.class_limits(class_id) == ClassLimits(rpm=1_000, itpm=450_000, otpm=90_000, burst_s=10.0, learn=True)


@pytest.mark.parametrize("tier", TIER_NAMES)
def test_a_tier_is_its_table_and_a_ceiling(made, tier):
    of = made(pacing={"tier": tier, "burst_s": 5})
    for model in CATALOG.models:
        row = tier_limits(tier, model.line)
        assert of.class_limits(model.rate_class) == ClassLimits(
            rpm=row.rpm, itpm=row.itpm, otpm=row.otpm, burst_s=5.0, learn=False
        )


@pytest.mark.parametrize(
    ("pacing", "class_id", "expected", "learns"),
    [
        ({"rpm": 7}, "sonnet-4", (7, 450_000, 90_000), False),
        ({"rpm": 7, "tier": "start"}, "sonnet-4", (7, 2_000_000, 400_000), False),
        ({"itpm": 7, "classes": {"sonnet": {"itpm": 8}}}, "sonnet-4", (1_000, 8, 90_000), False),
        ({"itpm": 7, "classes": {"sonnet": {"itpm": 8}}}, "opus-4", (1_000, 7, 90_000), False),
        ({"classes": {"sonnet": {"itpm": 8, "rpm": 5}, "sonnet-4": {"itpm": 9}}}, "sonnet-4", (5, 9, 90_000), False),
        ({"classes": {"sonnet": {"itpm": 8, "rpm": 5}, "sonnet-4": {"itpm": 9}}}, "sonnet-5", (5, 8, 90_000), False),
        ({"classes": {"sonnet-4": {"otpm": 9}}}, "sonnet-5", (1_000, 450_000, 90_000), True),
        ({"classes": {"fable": {"otpm": 9}}, "tier": "start"}, "fable-5", (1_000, 500_000, 9), False),
        ({"rpm": 7}, "nonesuch", (7, 450_000, 90_000), False),
    ],
)
def test_a_class_wins_over_its_line_and_both_over_all_classes_and_all_over_the_tier(
    made, pacing, class_id, expected, learns
):
    of = made(pacing=pacing)
    assert limits(of, class_id) == expected
    assert of.class_limits(class_id).learn is learns


@pytest.mark.parametrize(
    ("pacing", "rpm", "learns"),
    [({}, 2_000, True), ({"tier": "scale"}, 8_000, False), ({"count_tokens_rpm": 9, "tier": "scale"}, 9, False)],
)
def test_counting_tokens_is_a_class_of_its_own_without_tokens(made, pacing, rpm, learns):
    assert made(pacing=pacing).class_limits(COUNTING_CLASS) == ClassLimits(rpm=rpm, burst_s=10.0, learn=learns)


# people


def test_tiers_are_those_of_the_settings_and_a_name_that_nobody_gave_is_free(made):
    of = made(tiers={"gold": {"rpm": 7, "weight": 9}, "free": {"rpm": 3}})
    assert of.tier("gold") == Tier("gold", 7, None, None, 9.0, 10, 60.0, 200, "", False)
    assert of.tier("nonesuch") == of.tier("") == of.tier("free")
    assert of.tier("free").rpm == 3
    assert (of.tier("premium").model, of.tier("batch").background, of.tier("paid").count_tokens_rpm) == (
        OPUS,
        True,
        1000,
    )


def test_the_built_in_tiers_are_the_articles(made):
    assert [(name, made().tier(name).rpm) for name in BUILT_IN_TIERS] == [
        ("free", 20),
        ("paid", 100),
        ("premium", 100),
        ("batch", 100),
    ]


# the rest


def test_numbers_arrive_where_they_are_used(made):
    of = made(
        queue={"deadline_s": 5, "waiting_max": 6, "bytes_max": 7_000},
        retry={"attempts_max": 2, "base_delay_s": 0.5},
        breaker={
            "failures": 4,
            "window_s": 5,
            "window_requests_min": 6,
            "failure_ratio": 0.7,
            "open_s": 8,
            "open_s_max": 9,
            "successes": 10,
        },
        upstream={"first_byte_timeout_s": 200},
    )
    assert of.deadline_s == 5
    assert of.queue == QueueBounds(waiting_max=6, bytes_max=7_000)
    assert of.retry == RetryPolicy(attempts_max=2, base_delay_s=0.5)
    assert of.breaker == BreakerPolicy(
        failures=4,
        window_s=5,
        window_requests_min=6,
        failure_ratio=0.7,
        open_s=8,
        open_s_max=9,
        successes=10,
        probe_s_max=230,
    )


def test_the_defaults_are_those_of_the_policies(made):
    of = made()
    assert of.breaker == BreakerPolicy()
    assert of.retry == RetryPolicy()


def test_the_router_knows_every_rule(made):
    of = made(
        CLAUDE_MODEL=HAIKU,
        routing={
            "fallback": "claude-haiku-5-5",
            "fallbacks": {SONNET: [HAIKU]},
            "aliases": {"fast": "claude-haiku-5-5"},
            "endpoints": {"deep": SONNET},
        },
        experiments=[
            {
                "name": "e",
                "model": SONNET,
                "endpoint": "deep",
                "salt": "s",
                "arms": [{"name": "a", "model": SONNET, "weight": 2}, {"name": "b", "model": SONNET}],
            }
        ],
    )
    assert of.experiments == (Experiment("e", SONNET, (Arm("a", SONNET, 2.0), Arm("b", SONNET)), "deep", "s"),)

    def models(asked: str, **who) -> tuple[str, ...]:
        who = {"tier": "free", "endpoint": "messages"} | who
        plan = of.router.route(
            scan(b'{"model":"%b","messages":[{"role":"user","content":"x"}]}' % asked.encode()),
            principal_models=(),
            conversation="c",
            user="an",
            received_at=0.0,
            at_ns=day_start_ns(CATALOG.as_of),
            deadline_s=of.deadline_s,
            **who,
        )
        return (*plan.models, plan.arm[:2])

    assert models("default") == (HAIKU, "claude-haiku-5-5", "")
    assert models("fast") == ("claude-haiku-5-5", "")
    assert models("default", tier="premium") == (OPUS, "claude-haiku-5-5", "")
    assert models(OPUS, endpoint="deep") == (SONNET, HAIKU, "e:")
