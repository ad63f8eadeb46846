"""Decides which models a request is sent to, in which order, and how long it may wait.

One model today: the one asked for. Aliases, experiments, tiers and the fallback chain belong here.
"""

from __future__ import annotations

from headgate.policy.records import Plan
from headgate.policy.token_estimate import input_tokens
from headgate.wire.message import InvalidBody, MessageRequest

MODEL_CHARS_MAX = 256
"""Of a model's name: it goes into headers, rows and log lines."""


def plan(request: MessageRequest, *, received_at: float, deadline_s: float) -> Plan:
    """What we mean to do with this request. Raises InvalidBody when it names no model or `stream` is no boolean."""
    model = request.model
    if len(model) > MODEL_CHARS_MAX:
        raise InvalidBody(f"model: String should have at most {MODEL_CHARS_MAX} characters")
    return Plan(
        models=(model,),
        body=request.body,
        streamed=request.stream,
        input_tokens_estimate=input_tokens(request),
        max_tokens=request.max_tokens,
        deadline=received_at + deadline_s,
    )
