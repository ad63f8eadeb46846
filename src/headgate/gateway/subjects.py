"""Whom a request counts against: the person, and the key of an app. Pure: principals and attributions into subjects.

One person with ten keys is one person, so a person's limits are found by name, whatever key is shown. A number that a
key carries takes the place of its owner's tier; on a key of an app, which speaks for many people, it bounds them all
together, beside the limits that each of them has by their own tier.
"""

from __future__ import annotations

from headgate.gateway.policies import Tier
from headgate.gateway.settlement import Attribution
from headgate.policy.limiter import Subject
from headgate.policy.records import Principal


def subjects_of(principal: Principal, whose: Attribution, tier: Tier, *, first: bool) -> tuple[Subject, ...]:
    """The person comes first. A retry (`first` False) costs its person no request: it was not their doing."""
    named = "app" in principal.scopes and whose.user != principal.user
    if named:
        rpm, otpm, concurrency = tier.rpm, tier.otpm, tier.concurrency
    else:
        rpm = tier.rpm if principal.rpm is None else principal.rpm
        otpm = tier.otpm if principal.otpm is None else principal.otpm
        concurrency = tier.concurrency if principal.concurrency is None else principal.concurrency
    person = Subject(f"user:{whose.user}", rpm if first else None, otpm, concurrency, tier.burst_s)
    if not named or (principal.rpm is None and principal.otpm is None and principal.concurrency is None):
        return (person,)
    key = Subject(
        f"key:{principal.key_id}",
        principal.rpm if first else None,
        principal.otpm,
        principal.concurrency,
    )
    return (person, key)


def counting_subject(principal: Principal, whose: Attribution, tier: Tier) -> tuple[Subject, ...]:
    """For `count_tokens`, which has a bucket of its own and costs no message."""
    return (Subject(f"count:{whose.user or principal.user}", tier.count_tokens_rpm, burst_s=tier.burst_s),)
