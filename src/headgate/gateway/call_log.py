"""One call as its canonical log line: who, what was decided, how it ended and what it cost (docs/log-fields.md)."""

from __future__ import annotations

from headgate.gateway.settlement import Attribution, Ending, Settlement
from headgate.policy.prompt_cache import CachePlan
from headgate.policy.records import ClientRequest, Plan, Principal
from headgate.telemetry.log_line import LogLine


def call_line(
    request: ClientRequest,
    principal: Principal,
    whose: Attribution,
    plan: Plan | None,
    prompt: CachePlan | None,
    settlement: Settlement,
    ending: Ending,
    *,
    ts: str,
    queue_ms: int,
    upstream_request_id: str,
) -> LogLine:
    """The line of a call that has ended. `plan` None: it was refused before there was one."""
    usage = settlement.usage
    return LogLine(
        event="call",
        ts=ts,
        call_id=request.call_id,
        key_id=principal.key_id,
        user_id=whose.user,
        tier=whose.tier,
        endpoint=whose.endpoint,
        conversation=whose.conversation,
        model_asked=plan.model_asked if plan is not None else "",
        model=ending.model,
        arm=plan.arm if plan is not None else "",
        streamed=plan is not None and plan.streamed,
        status=ending.status,
        outcome=ending.outcome,
        error_code=ending.error_code,
        failure=ending.failure,
        reasons=(*ending.reasons, *prompt.reasons) if prompt is not None and prompt.marks else ending.reasons,
        attempts=ending.attempts,
        retry_count=max(ending.attempts - 1, 0),
        queue_ms=queue_ms,
        first_byte_ms=ending.first_byte_ms,
        total_ms=ending.total_ms,
        input_tokens_estimate=plan.input_tokens_estimate if plan is not None else 0,
        input_tokens=usage.input_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_5m_tokens=usage.cache_write_5m_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        output_tokens=usage.output_tokens,
        estimated=settlement.estimated,
        cost_nanousd=settlement.cost_nanousd,
        saved_nanousd=settlement.saved_nanousd,
        stop_reason=settlement.stop_reason,
        upstream_request_id=upstream_request_id,
        family="" if prompt is None else prompt.family,
        reused=ending.reused,
    )
