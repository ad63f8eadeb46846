"""Requests that are not inference: token counts, models, batches. Passed on and back, with retries where they are safe.

What it is: a second, smaller path beside `pipeline.py`. It costs no tokens, so it has no ledger row, only a log line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from headgate.gateway import forwarding, refusals
from headgate.gateway.failures import failure_of_status, passed_on_lines, refusal_of
from headgate.gateway.pipeline import Pipeline
from headgate.gateway.server import Exchange
from headgate.gateway.settlement import Attribution
from headgate.gateway.upstream import Answer, UpstreamConnection
from headgate.gateway.waiting import Wait
from headgate.policy.call import Call, Finish, Send, Sleep
from headgate.policy.records import ClientRequest, Failure, OutcomeKind, Plan, Principal
from headgate.policy.retry import RetryPolicy
from headgate.telemetry.log_line import LogLine

log = structlog.get_logger()

_ONCE = RetryPolicy(attempts_max=1)


class Passthrough:
    """One such request. `rewrite` changes the body of an answer that came whole (None: as it is)."""

    def __init__(
        self,
        pipeline: Pipeline,
        exchange: Exchange,
        request: ClientRequest,
        principal: Principal,
        whose: Attribution,
        *,
        repeatable: bool,
        rewrite: Callable[[bytes], bytes] | None,
    ) -> None:
        self._pipeline = pipeline
        self._exchange = exchange
        self._request = request
        self._principal = principal
        self._whose = whose
        self._rewrite = rewrite
        # A batch that is created twice is paid twice: only what changes nothing is tried again.
        self._policy = pipeline.retry_policy if repeatable else _ONCE
        self._connection: UpstreamConnection | None = None
        self._wait = Wait(pipeline.clock)
        self._gone = False

    async def run(self) -> None:
        """From the request to its answer."""
        self._exchange.on_gone = self._client_left
        try:
            await self._drive()
        except Exception:
            log.exception("passthrough_failed", call_id=self._request.call_id)
            if self._connection is not None:
                self._connection.abort()
            error = refusals.answer(refusals.INTERNAL, call_id=self._request.call_id)
            self._exchange.respond(error.status, error.header_lines, error.body)

    async def _drive(self) -> None:
        pipeline, request = self._pipeline, self._request
        plan = Plan(
            models=("",),
            body=request.body,
            streamed=False,
            input_tokens_estimate=0,
            max_tokens=0,
            deadline=request.received_at + (self._whose.deadline_s or pipeline.settings.queue.deadline_s),
        )
        call = Call(plan, policy=self._policy, budget=pipeline.retry_budget, jitter=pipeline.jitter)
        answer: Answer | None = None
        while True:
            step = call.step
            if isinstance(step, Send):
                reply = await pipeline.upstream.send(self._head(), self._request.body, self._track)
                self._connection = None
                if self._gone:
                    call.abandoned()
                elif isinstance(reply, Failure):
                    answer = None
                    call.failed(reply, pipeline.clock())
                elif reply.status >= 300:
                    answer = reply
                    call.failed(failure_of_status(reply, pipeline.now_ns()), pipeline.clock())
                else:
                    answer = reply
                    call.started()
            elif isinstance(step, Sleep):
                await self._wait.until(step.until)
                call.abandoned() if self._gone else call.woke()
            elif isinstance(step, Finish):
                self._finish(step.outcome.kind, call, step.outcome.failure, answer)
                return
            else:
                assert answer is not None
                call.commit()
                failure = await self._pass_back(answer)
                if self._gone:
                    call.abandoned()
                elif failure is not None:
                    call.failed(failure, pipeline.clock())
                else:
                    call.completed(answer.status)

    async def _pass_back(self, answer: Answer) -> Failure | None:
        lines = forwarding.response_lines(answer.headers) + self._own_lines()
        if not answer.streamed:
            body = answer.body()
            self._exchange.respond(answer.status, lines, self._rewrite(body) if self._rewrite else body)
            return None
        self._exchange.start_stream(answer.status, lines)
        pipe = _Pipe(self._exchange)
        self._exchange.on_paused = answer.pause
        self._exchange.on_gone = lambda: self._abandon(answer, pipe)
        answer.attach(pipe)
        failure = await pipe.done
        if failure is None:
            self._exchange.end()
        else:
            # There is no event for an error in here: a broken connection is the only honest end.
            self._exchange.abort()
        return failure

    def _finish(self, kind: OutcomeKind, call: Call, failure: Failure | None, answer: Answer | None) -> None:
        status = answer.status if answer is not None else 0
        code = ""
        if kind == "failed":
            assert failure is not None
            lines = passed_on_lines(answer, failure) if failure.kind == "status" and answer is not None else None
            if lines is not None and answer is not None:
                self._exchange.respond(answer.status, lines + self._own_lines(), answer.body())
            else:
                error = refusals.answer(refusal_of(failure), call_id=self._request.call_id)
                self._exchange.respond(error.status, error.header_lines, error.body)
                status = error.status
        elif kind == "abandoned":
            status, code = 499, "client_left"
        self._log(kind, status, code or (failure.error_code or failure.kind if failure else ""), call)

    def _client_left(self) -> None:
        self._gone = True
        if self._connection is not None:
            self._connection.abort()
        else:
            self._wait.wake()

    def _abandon(self, answer: Answer, pipe: _Pipe) -> None:
        self._gone = True
        answer.abort()
        pipe.ended()

    def _track(self, connection: UpstreamConnection) -> bool:
        self._connection = connection
        return not self._gone

    def _head(self) -> bytes:
        pipeline, request, exchange = self._pipeline, self._request, self._exchange
        return b"%b %b%b%b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
            exchange.method,
            pipeline.upstream.base_path,
            exchange.path,
            b"?" + request.query if request.query else b"",
            pipeline.upstream_head,
            request.forwarded,
            len(request.body),
        )

    def _own_lines(self) -> bytes:
        return b"x-headgate-call: %b\r\n" % self._request.call_id.encode()

    def _log(self, kind: OutcomeKind, status: int, error_code: str, call: Call) -> None:
        pipeline, request, whose = self._pipeline, self._request, self._whose
        pipeline.put_log_line(
            LogLine(
                event="call",
                ts=pipeline.timestamps.text(request.received_at_ns),
                call_id=request.call_id,
                key_id=self._principal.key_id,
                user_id=whose.user or self._principal.user,
                tier=whose.tier,
                endpoint=whose.endpoint,
                conversation=whose.conversation,
                status=status,
                outcome=kind,
                error_code=error_code,
                reasons=call.reasons,
                attempts=call.attempts,
                retry_count=max(call.attempts - 1, 0),
                total_ms=round((pipeline.clock() - request.received_at) * 1000),
            )
        )


class _Pipe:
    """Bytes from upstream to the client, as they come."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.done: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()

    def body(self, data: bytes) -> None:
        self._exchange.write(data)

    def ended(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def broke(self, failure: Failure) -> None:
        if not self.done.done():
            self.done.set_result(failure)
