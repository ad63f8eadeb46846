"""Whom a request counts against: the person, and a key with numbers of its own. Pure: principals into subjects.

One person with ten keys is one person: a person's limits are found by name, whatever key is shown. A key with numbers
of its own is one more subject: it bounds what comes through it, and of an app's key, which speaks for many people, all
of them together. A number above the tier's lifts the key's owner, once and not for each key: who gave it meant it.
"""

from __future__ import annotations

from headgate.gateway.policies import Tier
from headgate.gateway.settlement import Attribution
from headgate.policy.limiter import Subject
from headgate.policy.records import Principal


def subjects_of(principal: Principal, whose: Attribution, tier: Tier, *, first: bool) -> tuple[Subject, ...]:
    """The person comes first. A retry (`first` False) costs nobody a request: it was not their doing."""
    user = f"user:{whose.user}"
    if principal.rpm is None and principal.otpm is None and principal.concurrency is None:
        return (Subject(user, tier.rpm if first else None, tier.otpm, tier.concurrency, tier.burst_s),)
    key = Subject(f"key:{principal.key_id}", principal.rpm if first else None, principal.otpm, principal.concurrency)
    if "app" in principal.scopes and whose.user != principal.user:
        return (Subject(user, tier.rpm if first else None, tier.otpm, tier.concurrency, tier.burst_s), key)
    person = Subject(
        user,
        _lifted(tier.rpm, principal.rpm) if first else None,
        _lifted(tier.otpm, principal.otpm),
        _lifted(tier.concurrency, principal.concurrency),
        tier.burst_s,
    )
    return (person, key)


def _lifted(of_tier: int | None, of_key: int | None) -> int | None:
    return of_tier if of_tier is None or of_key is None else max(of_tier, of_key)


def counting_subject(principal: Principal, whose: Attribution, tier: Tier) -> tuple[Subject, ...]:
    """For `count_tokens`, which has a bucket of its own and costs no message."""
    return (Subject(f"count:{whose.user or principal.user}", tier.count_tokens_rpm, burst_s=tier.burst_s),)
