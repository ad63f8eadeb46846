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
from headgate.gateway.policies import COUNTING_CLASS
from headgate.gateway.server import Exchange
from headgate.gateway.settlement import Attribution
from headgate.gateway.subjects import counting_subject
from headgate.gateway.traffic import Diverted, Turn, Waiting, Want
from headgate.gateway.upstream import Answer, UpstreamConnection
from headgate.gateway.waiting import Wait
from headgate.policy.call import Admit, Call, Finish, Send, Sleep
from headgate.policy.records import ClientRequest, Failure, Outcome, Plan, Principal, Refused
from headgate.policy.retry import Cause, RetryPolicy, cause
from headgate.telemetry.log_line import LogLine

log = structlog.get_logger()

_ONCE = RetryPolicy(attempts_max=1)
_COUNTS_WAITING_MAX = 100


class Passthrough:
    """One such request. `rewrite` changes the body of an answer that came whole (None: as it is).

    `counts` is a token count: it waits for its turn in a bucket of its own. The others are few, and wait for nothing.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        exchange: Exchange,
        request: ClientRequest,
        principal: Principal,
        whose: Attribution,
        *,
        repeatable: bool,
        counts: bool,
        rewrite: Callable[[bytes], bytes] | None,
    ) -> None:
        self._pipeline = pipeline
        self._exchange = exchange
        self._request = request
        self._principal = principal
        self._whose = whose
        self._rewrite = rewrite
        # A batch that is created twice is paid twice: only what changes nothing is tried again.
        self._policies = pipeline.policies
        self._policy = self._policies.retry if repeatable else _ONCE
        self._counts = counts
        self._waiting: Waiting | None = None
        self._turn: Turn | None = None
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
        finally:
            self._end_turn()

    async def _drive(self) -> None:
        pipeline, request = self._pipeline, self._request
        plan = Plan(
            models=("",),
            body=request.body,
            streamed=False,
            input_tokens_estimate=0,
            max_tokens=0,
            deadline=request.received_at + (self._whose.deadline_s or self._policies.deadline_s),
        )
        call = Call(plan, policy=self._policy, budget=pipeline.retry_budget, jitter=pipeline.jitter)
        answer: Answer | None = None
        while True:
            step = call.step
            if isinstance(step, Admit):
                await self._take_turn(call, plan, again=step.again)
            elif isinstance(step, Send):
                reply = await pipeline.upstream.send(self._head(), self._request.body, self._track)
                self._connection = None
                if self._gone:
                    call.abandoned()
                elif isinstance(reply, Failure):
                    answer = None
                    self._end_turn()
                    call.failed(reply, pipeline.clock())
                elif reply.status >= 300:
                    answer = reply
                    failure = failure_of_status(reply, pipeline.now_ns())
                    if self._turn is not None and cause(failure) is Cause.RATE_LIMIT:
                        pipeline.traffic.throttled(self._turn, retry_after_s=failure.retry_after_s, ramp=False)
                    self._end_turn()
                    call.failed(failure, pipeline.clock())
                else:
                    answer = reply
                    call.started()
            elif isinstance(step, Sleep):
                await self._wait.until(step.until)
                call.abandoned() if self._gone else call.woke()
            elif isinstance(step, Finish):
                self._finish(step.outcome, call, answer)
                return
            else:
                assert answer is not None
                call.commit()
                broken = await self._pass_back(answer)
                if self._gone:
                    call.abandoned()
                elif broken is not None:
                    call.failed(broken, pipeline.clock())
                else:
                    call.completed(answer.status)

    async def _take_turn(self, call: Call, plan: Plan, *, again: bool) -> None:
        """Wait for a place among the token counts; what is no token count has one."""
        if not self._counts:
            call.admitted()
            return
        pipeline, principal, whose = self._pipeline, self._principal, self._whose
        tier = self._policies.tier(whose.tier)
        subjects = counting_subject(principal, whose, tier)
        waiting = pipeline.traffic.join(
            Want(
                ask_id=f"{self._request.call_id}:{call.attempts + 1}",
                model=COUNTING_CLASS,
                class_id=COUNTING_CLASS,
                limits=self._policies.class_limits(COUNTING_CLASS),
                subjects=() if again else subjects,
                input_tokens=0,
                output_tokens=0,
                deadline=plan.deadline,
                user=whose.user or principal.user,
                weight=tier.weight,
                # Claude Code sends eighteen at once: a crowd of one person is no crowd here.
                waiting_max=_COUNTS_WAITING_MAX,
                again=again,
                bytes=len(self._request.body),
            )
        )
        self._waiting = waiting
        result = await waiting.wait()
        self._waiting = None
        if isinstance(result, Turn):
            self._turn = result
            call.admitted()
        elif isinstance(result, Refused):
            call.refused(result, pipeline.clock())
        else:
            assert not isinstance(result, Diverted), "there is no other place to count"
            call.abandoned()

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            self._pipeline.traffic.neutral(turn)
            self._pipeline.traffic.ended(turn, input_tokens=0, output_tokens=0)

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

    def _finish(self, outcome: Outcome, call: Call, answer: Answer | None) -> None:
        kind, failure = outcome.kind, outcome.failure
        status = answer.status if answer is not None else 0
        code = outcome.error_code
        if outcome.refused is not None:
            error = refusals.answer(outcome.refused, call_id=self._request.call_id)
            self._exchange.respond(error.status, error.header_lines, error.body)
            status = error.status
        elif kind == "failed":
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
        self._log(kind, status, code, call)

    def _client_left(self) -> None:
        self._gone = True
        if self._connection is not None:
            self._connection.abort()
        elif self._waiting is not None:
            self._pipeline.traffic.leave(self._waiting)
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

    def _log(self, kind: str, status: int, error_code: str, call: Call) -> None:
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
