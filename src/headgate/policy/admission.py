"""Decides whether a request may be sent at all: does its key allow it, and what is it told when no turn is left for it.

What it is: the refusals, in words, statuses and waits. What it is not: the limits (`limiter.py`) or the order in which
turns come (`request_queue.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from headgate.policy.limiter import MINUTE_S, Subject
from headgate.policy.records import Admitted, Principal, Refused, Scope
from headgate.policy.request_queue import HELD

_WHOSE = {"user": "You have", "key": "This key has", "count": "You have"}
_WHAT = {
    "rpm": "{limit:g} requests a minute",
    "otpm": "{limit:g} output tokens a minute",
    "concurrency": "{limit:g} requests at once",
}
_UNKNOWN_WAIT_S = 5.0
"""Offered where nobody can know: a slot is free when a call ends."""


def admit(principal: Principal, *, scope: Scope, model: str | None) -> Admitted | Refused:
    """Whether this principal may use this scope and model. `model` is None where the request is about none."""
    if scope not in principal.scopes and not (scope == "messages" and "app" in principal.scopes):
        return Refused(
            status=403,
            error_type="permission_error",
            error_code="scope_missing",
            message=f"This key does not have the scope '{scope}'.",
        )
    if model is not None and principal.models and model not in principal.models:
        return Refused(
            status=403,
            error_type="permission_error",
            error_code="model_not_allowed",
            message=f"This key may not use the model '{model}'. It may use: {', '.join(principal.models)}.",
        )
    return Admitted()


def no_turn(reason: str, wait_s: float, subjects: Sequence[Subject]) -> Refused:
    """Why there is no turn in time. `reason` is the limiter's or the queue's word; `wait_s` is the predicted wait.

    A person's own limit is theirs to mend: 429 with the limit. What all wait for together is ours: 529.
    """
    retry_after_s = wait_s if wait_s < float("inf") else _UNKNOWN_WAIT_S
    kind, _, what = reason.partition("_")
    if kind in _WHOSE and what in _WHAT:
        subject = next((one for one in subjects if one.id.startswith(f"{kind}:")), None)
        limit = getattr(subject, what, None) or 0
        return Refused(
            429,
            "rate_limit_error",
            f"{reason}_exceeded",
            f"{_WHOSE[kind]} reached the limit of {_WHAT[what].format(limit=limit)}. "
            f"Try again in {max(1, round(retry_after_s))} s.",
            retry_after_s=retry_after_s,
            limit=limit,
            window_s=None if what == "concurrency" else MINUTE_S,
        )
    if reason == "person_queue_full":
        return Refused(
            429,
            "rate_limit_error",
            "user_queue_full",
            "You have too many requests waiting already. Wait for one of them to be answered.",
            retry_after_s=retry_after_s,
        )
    code = {"queue_full": "queue_full", "queue_bytes": "queue_full", HELD: "upstream_unavailable"}
    return Refused(
        529,
        "overloaded_error",
        code.get(reason, "queue_deadline"),
        f"There is no turn for this request in time; about {max(1, round(retry_after_s))} s would be needed.",
        retry_after_s=retry_after_s,
    )
