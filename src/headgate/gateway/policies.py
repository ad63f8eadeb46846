"""The settings as what the policies work with: made whole when they are read, and swapped whole when read again.

What it is: sections and catalogue into records of `policy/`. What it is not: a check (`settings.py` has made them), or
anything that changes: a call keeps the policies it began with.
"""

from __future__ import annotations

import msgspec

from headgate.gateway.budgets import BudgetRules, Caps, TierCaps, nanousd
from headgate.gateway.settings import PacingClassSection, PacingSection, Settings, TierSection
from headgate.policy.breaker import BreakerPolicy
from headgate.policy.experiments import Arm, Experiment
from headgate.policy.limiter import ClassLimits
from headgate.policy.records import Record
from headgate.policy.request_queue import QueueBounds
from headgate.policy.retry import RetryPolicy
from headgate.policy.routing import DEFAULT_TIER, Router, RoutingRules
from headgate.wire.catalog import Catalog
from headgate.wire.tiers import TierName, count_tokens_rpm, tier_limits

COUNTING_CLASS = "count_tokens"
"""Class of `count_tokens`, which Anthropic limits apart from messages."""
START_TIER: TierName = "tier2"
"""The article's; where no tier is set, its limits hold until Anthropic's headers say others."""
MONEY = {"budget_usd_day", "budget_usd_month", "total_usd_day", "total_usd_month"}
_PROBE_GRACE_S = 30.0
"""A probe of a breaker is lost when it takes this much longer than any answer may take to begin."""


class Tier(Record, frozen=True, gc=False):
    """What a person of this tier may do, a minute; None is without limit."""

    name: str
    rpm: int
    otpm: int | None
    concurrency: int | None
    weight: float
    waiting_max: int
    burst_s: float
    count_tokens_rpm: int
    model: str
    """What those get who ask for the default model; empty: the default model."""
    background: bool


class Policies(msgspec.Struct, frozen=True):
    """All that the settings decide for a call."""

    router: Router
    experiments: tuple[Experiment, ...]
    tiers: dict[str, Tier]
    classes: dict[str, ClassLimits]
    """Anthropic's limits by `rate_class` of the catalogue, and those of `COUNTING_CLASS`."""
    other_class: ClassLimits
    """Of a class that is not among them, as that of a model which the catalogue does not know."""
    retry: RetryPolicy
    breaker: BreakerPolicy
    queue: QueueBounds
    poison_failures: int
    """Of one body without an answer, until it is refused."""
    spend_cap_probe_s: float
    deadline_s: float
    """Of a request that names none: for queue and retries together."""
    budgets: BudgetRules

    def tier(self, name: str) -> Tier:
        """The tier of this name; one that nobody has named in the settings is the free one."""
        return self.tiers.get(name) or self.tiers[DEFAULT_TIER]

    def class_limits(self, class_id: str) -> ClassLimits:
        """Anthropic's limits of this class."""
        return self.classes.get(class_id) or self.other_class


def policies(settings: Settings, catalog: Catalog) -> Policies:
    """What these settings mean. They must have been read by `load_settings`, which refuses what has no meaning."""
    pacing, breaker = settings.pacing, settings.breaker
    experiments = tuple(
        Experiment(
            name=one.name,
            model=one.model,
            arms=tuple(Arm(arm.name, arm.model, arm.weight) for arm in one.arms),
            endpoint=one.endpoint,
            salt=one.salt,
        )
        for one in settings.experiments
    )
    rules = RoutingRules(
        default_model=settings.default_model,
        fallback=settings.routing.fallback,
        fallbacks=settings.routing.fallbacks,
        aliases=settings.routing.aliases,
        endpoints=settings.routing.endpoints,
        tier_models={name: tier.model for name, tier in settings.tiers.items()},
        experiments=experiments,
    )
    classes = {
        model.rate_class: _class_limits(pacing, rate_class=model.rate_class, line=model.line)
        for model in catalog.models
    }
    return Policies(
        router=Router(rules, catalog),
        experiments=experiments,
        tiers={name: _tier(name, tier) for name, tier in settings.tiers.items()},
        classes=classes | {COUNTING_CLASS: _counting_limits(pacing)},
        other_class=_class_limits(pacing, rate_class="", line=""),
        retry=RetryPolicy(attempts_max=settings.retry.attempts_max, base_delay_s=settings.retry.base_delay_s),
        breaker=BreakerPolicy(
            failures=breaker.failures,
            window_s=breaker.window_s,
            window_requests_min=breaker.window_requests_min,
            failure_ratio=breaker.failure_ratio,
            open_s=breaker.open_s,
            open_s_max=breaker.open_s_max,
            successes=breaker.successes,
            probe_s_max=settings.upstream.first_byte_timeout_s + _PROBE_GRACE_S,
        ),
        queue=QueueBounds(waiting_max=settings.queue.waiting_max, bytes_max=settings.queue.bytes_max),
        poison_failures=breaker.poison_failures,
        spend_cap_probe_s=breaker.spend_cap_probe_s,
        deadline_s=settings.queue.deadline_s,
        budgets=_budgets(settings),
    )


def _tier(name: str, section: TierSection) -> Tier:
    # Money is told to the budgets (`budgets.py`); a tier is about rates.
    return Tier(name=name, **section.model_dump(exclude=MONEY))


def _budgets(settings: Settings) -> BudgetRules:
    everybody = settings.budgets
    return BudgetRules(
        everybody=Caps(nanousd(everybody.usd_day), nanousd(everybody.usd_month)),
        tiers={
            name: TierCaps(
                person=Caps(nanousd(tier.budget_usd_day), nanousd(tier.budget_usd_month)),
                total=Caps(nanousd(tier.total_usd_day), nanousd(tier.total_usd_month)),
            )
            for name, tier in settings.tiers.items()
        },
        alert_day_nanousd=nanousd(everybody.alert_usd_day),
        clamp=everybody.clamp,
    )


def _class_limits(pacing: PacingSection, *, rate_class: str, line: str) -> ClassLimits:
    """The class's own number, else its line's, else that of all classes, else its tier's."""
    nothing = PacingClassSection()
    own, of_line = pacing.classes.get(rate_class, nothing), pacing.classes.get(line, nothing)
    of_tier = tier_limits(pacing.tier or START_TIER, line)

    def given(name: str) -> int | None:
        numbers = (getattr(section, name) for section in (own, of_line, pacing))
        return next((number for number in numbers if number is not None), None)

    rpm, itpm, otpm = given("rpm"), given("itpm"), given("otpm")
    return ClassLimits(
        rpm=of_tier.rpm if rpm is None else rpm,
        itpm=of_tier.itpm if itpm is None else itpm,
        otpm=of_tier.otpm if otpm is None else otpm,
        burst_s=pacing.burst_s,
        learn=not pacing.tier and rpm is None and itpm is None and otpm is None,
    )


def _counting_limits(pacing: PacingSection) -> ClassLimits:
    rpm = pacing.count_tokens_rpm
    return ClassLimits(
        rpm=count_tokens_rpm(pacing.tier or START_TIER) if rpm is None else rpm,
        burst_s=pacing.burst_s,
        learn=not pacing.tier and rpm is None,
    )
