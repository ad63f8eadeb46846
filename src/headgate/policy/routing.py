"""Decides which models a request is sent to, in which order, and how long it may wait.

One model today: the one asked for. Aliases, experiments, tiers and the fallback chain belong here.
"""

from __future__ import annotations

from headgate.policy.records import Plan
from headgate.policy.token_estimate import input_tokens
from headgate.wire.message import MessageRequest


def plan(request: MessageRequest, *, received_at: float, deadline_s: float) -> Plan:
    """What we mean to do with this request. Raises InvalidBody when it names no model or `stream` is no boolean."""
    return Plan(
        models=(request.model,),
        body=request.body,
        streamed=request.stream,
        input_tokens_estimate=input_tokens(request),
        max_tokens=request.max_tokens,
        deadline=received_at + deadline_s,
    )
