"""The path of one `/v1/messages` request, top to bottom: every await of the hot path is in this file.

What it is: the driver of a `Call` (`policy/call.py`), which does what the machine says (send, sleep, relay, finish),
keeps the ledger, and settles the bill. What it is not: HTTP (`server.py`, `upstream.py`) or any decision (`policy/`).
"""

from __future__ import annotations

import asyncio
from hashlib import blake2b

import msgspec
import structlog

from headgate.gateway import forwarding, own_headers, refusals
from headgate.gateway.answer_reuse import Delivery, Recorder
from headgate.gateway.call_log import call_line
from headgate.gateway.failures import cut_error, failure_of_status, passed_on_lines, refusal_of, request_id
from headgate.gateway.purse import Purse
from headgate.gateway.relay import ClientStream, Relay
from headgate.gateway.server import Exchange
from headgate.gateway.settlement import Attribution, Ending, Settlement
from headgate.gateway.shared import Shared
from headgate.gateway.subjects import subjects_of
from headgate.gateway.traffic import LEASE_S, Diverted, Left, Turn, Waiting, Want
from headgate.gateway.upstream import Answer, UpstreamConnection
from headgate.gateway.waiting import Wait
from headgate.policy.admission import admit
from headgate.policy.call import Admit, Call, Finish, Send, Sleep, failure_code
from headgate.policy.call import Relay as RelayStep
from headgate.policy.fallback import Unfit, rewrite
from headgate.policy.forecast import NO_FORECAST, uncached
from headgate.policy.limiter import Ask, ClassLimits, Subject
from headgate.policy.prompt_cache import CachePlan
from headgate.policy.records import Attempt, ClientRequest, Failure, Outcome, OutcomeKind, Plan, Principal, Refused
from headgate.policy.retry import OUTAGE, Cause, cause
from headgate.policy.token_estimate import Script, script
from headgate.storage.interfaces import LedgerUnavailable
from headgate.wire import errors
from headgate.wire.errors import RAMP_CODE
from headgate.wire.message import InvalidBody, MessageRequest, scan
from headgate.wire.stream import StreamFold
from headgate.wire.usage import Usage, UsageError, decode_usage

log = structlog.get_logger()

ATTRIBUTE_CHARS_MAX = 256
"""Of a user, a conversation or a label that a client names."""
_CLIENT_CLOSED = 499
_LONG_ANSWER_TOKENS = 4096
"""The first-byte limit is for answers of this length when they come whole; longer ones get proportionally more."""
_LONG_ANSWER_FACTOR_MAX = 32.0
"""Reached at 131,072 tokens, the longest answer there is: a client's number must not make a call endless."""


class _WholeMessage(msgspec.Struct, frozen=True):
    """What is read of an answer that was not streamed."""

    usage: msgspec.Raw
    id: str = ""
    model: str = ""
    diagnostics: msgspec.Raw = msgspec.Raw()
    stop_reason: str | None = None
    content: list[msgspec.Raw] = []


_whole_message = msgspec.json.Decoder(_WholeMessage)


class Pipeline(Shared):
    """All calls to `/v1/messages`."""

    def start(self, exchange: Exchange, request: ClientRequest, principal: Principal, whose: Attribution) -> None:
        """Serve one complete request to `/v1/messages`."""
        call = MessageCall(self, exchange, request, principal, whose)
        self.live[request.call_id] = call
        # `live` owns the task until its last line; `run` lets no exception out.
        call.task = asyncio.get_running_loop().create_task(call.run())

    def tick(self, now: float) -> None:
        """Pings into silences, progress into the journal, heartbeats of the limits."""
        for call in list(self.live.values()):
            call.tick(now)
        self.traffic.tick(now)
        self.purses.money.tick(now)
        self.purses.guard.tick()
        if self.reuse is not None:
            self.reuse.tick(now)

    def interrupt_all(self) -> None:
        """The process must end now: every answer that is not whole is told so."""
        for call in list(self.live.values()):
            call.interrupt()


class MessageCall:
    """One request to its outcome."""

    __slots__ = (
        "_answer",
        "_background_until",
        "_body",
        "_cached",
        "_cached_for",
        "_call",
        "_client",
        "_connection",
        "_delivery",
        "_error_data",
        "_exchange",
        "_first_byte_at",
        "_forecast",
        "_gone",
        "_interrupted",
        "_last_answer",
        "_pipeline",
        "_plan",
        "_policies",
        "_principal",
        "_purse",
        "_queued_s",
        "_recorder",
        "_relay",
        "_request",
        "_scanned",
        "_script",
        "_settlement",
        "_speed",
        "_sticky",
        "_subjects",
        "_tier",
        "_turn",
        "_wait",
        "_waiting",
        "_whose",
        "task",
    )

    def __init__(
        self,
        pipeline: Pipeline,
        exchange: Exchange,
        request: ClientRequest,
        principal: Principal,
        whose: Attribution,
    ) -> None:
        self._pipeline = pipeline
        self._exchange = exchange
        self._request = request
        self._principal = principal
        self._whose = whose
        self.task: asyncio.Task[None] | None = None
        self._policies = pipeline.policies
        self._tier = self._policies.tier(whose.tier)
        self._plan: Plan | None = None
        self._scanned: MessageRequest | None = None
        self._body = b""
        """What the attempt of now sends."""
        self._cached: CachePlan | None = None
        """What is known of the prompt, and its body with our marks, for the model `_cached_for`."""
        self._cached_for = ""
        self._script: Script = "ascii"
        self._speed = "standard"
        self._forecast = NO_FORECAST
        self._waiting: Waiting | None = None
        self._turn: Turn | None = None
        self._queued_s = 0.0
        self._recorder: Recorder | None = None
        """Of an answer that may be given again."""
        self._delivery: Delivery | None = None
        """Of an answer that was given before."""
        self._purse: Purse | None = None
        self._subjects: tuple[Subject, ...] = ()
        """Whom it counts against."""
        self._sticky = ""
        """The fallback that the conversation went on with."""
        self._call: Call | None = None
        self._client: ClientStream | None = None
        self._connection: UpstreamConnection | None = None
        self._answer: Answer | None = None
        self._last_answer: Answer | None = None
        self._relay: Relay | None = None
        self._wait = Wait(pipeline.clock)
        self._settlement = Settlement(pipeline.accounts, request)
        self._gone = False
        self._background_until: float | None = None
        self._interrupted = False
        self._error_data = b""
        """The `error` event of the last attempt's stream: the body of the answer, should nothing better come."""
        self._first_byte_at: float | None = None

    # the path

    async def run(self) -> None:
        """From the request to its one outcome. The top of a request: what is ours to fail, fails here."""
        try:
            self._exchange.on_gone = self._client_left
            self._exchange.on_paused = self._client_paused
            plan = self._prepare()
            if plan is not None:
                await self._drive(plan)
        except LedgerUnavailable as error:
            log.error("ledger_unavailable", call_id=self._request.call_id, reason=str(error))
            self._refuse(refusals.LEDGER_UNAVAILABLE)
        except Exception:
            log.exception("call_failed", call_id=self._request.call_id)
            if self._connection is not None:
                self._connection.abort()
            self._refuse(refusals.INTERNAL)
        finally:
            self._pipeline.live.pop(self._request.call_id, None)
            if self._background_until is not None:
                self._pipeline.in_background -= 1
            if self._turn is not None:
                # Only where something above went wrong: the turn is given back, and says nothing about the model.
                self._pipeline.traffic.neutral(self._turn)
                self._end_turn(0, 0)
            if self._cached is not None:
                self._pipeline.caching.leave(self._cached, self._request.call_id)
            if self._recorder is not None:
                self._recorder.drop()
            if self._purse is not None:
                sent = self._call.attempts if self._call is not None else 0
                self._purse.close(self._settlement.cost_nanousd, sent=sent)

    def _prepare(self) -> Plan | None:
        """Scan, plan, admit; None when the request has been refused."""
        request, whose = self._request, self._whose
        try:
            scanned = scan(request.body)
            if not whose.user:
                user = scanned.metadata_user_id[:ATTRIBUTE_CHARS_MAX] or self._principal.user
                whose = self._whose = msgspec.structs.replace(whose, user=user)
            plan = self._policies.router.route(
                scanned,
                principal_models=self._principal.models,
                tier=whose.tier,
                endpoint=whose.endpoint,
                conversation=whose.conversation,
                user=whose.user,
                received_at=request.received_at,
                deadline_s=whose.deadline_s or self._policies.deadline_s,
                at_ns=request.received_at_ns,
            )
        except InvalidBody as error:
            self._refuse(refusals.bad_request(str(error)))
            return None
        self._plan, self._scanned, self._speed = plan, scanned, scanned.speed
        refused = self._refusal(plan)
        if refused is not None:
            self._settlement.close(
                "refused",
                status=refused.status,
                model="",
                error_code=refused.error_code,
                total_ms=self._ms_since_start(),
                opened=self._settlement.opened(plan, self._principal, whose),
            )
            self._refuse(refused)
            return None
        self._script = script(scanned)
        self._purse = Purse(
            self._pipeline.purses,
            self._policies.budgets,
            self._principal,
            user=whose.user,
            tier=whose.tier,
            call_id=request.call_id,
            at_ns=request.received_at_ns,
        )
        self._subjects = subjects_of(self._principal, whose, self._tier, first=True)
        return plan

    def _refusal(self, plan: Plan) -> Refused | None:
        """Why this request is not to be sent at all, whatever the limits say."""
        pipeline = self._pipeline
        admitted = admit(self._principal, scope="messages", model=self._policies.router.resolve(plan.model_asked))
        if isinstance(admitted, Refused):
            return admitted
        now = pipeline.clock()
        retry_at = pipeline.traffic.account.retry_at(now)
        if retry_at is not None:
            return refusals.spend_cap(pipeline.traffic.account.code, retry_at - now)
        if len(pipeline.traffic.poison):
            refused_for_s = pipeline.traffic.poison.refused_for_s(self._fingerprint(), now)
            if refused_for_s is not None:
                return refusals.poison_prompt(refused_for_s)
        return None

    async def _drive(self, plan: Plan) -> None:
        """Do what the call says until it says it is finished."""
        pipeline, whose = self._pipeline, self._whose
        if whose.conversation and len(pipeline.stickiness):
            self._sticky = pipeline.stickiness.model_of(whose.user, whose.conversation, pipeline.clock())
        if not self._sticky and await self._reused(plan):
            return
        call = self._call = Call(
            plan,
            policy=self._policies.retry,
            budget=pipeline.retry_budget,
            jitter=pipeline.jitter,
            admits=pipeline.traffic.breakers.admits,
            now=pipeline.clock(),
            sticky=self._sticky,
        )
        if plan.streamed:
            self._client = ClientStream(
                self._exchange,
                self._stream_head,
                ping_after_s=pipeline.settings.server.ping_after_s,
                clock=pipeline.clock,
                copy=None if self._recorder is None else self._recorder.write,
            )
        while True:
            step = call.step
            if isinstance(step, Admit):
                await self._take_turn(call, plan, step)
            elif isinstance(step, Send):
                await self._send(call, plan, step.attempt)
            elif isinstance(step, RelayStep):
                await self._relay_answer(call, plan)
            elif isinstance(step, Sleep):
                self._settlement.pause()
                await self._wait.until(step.until)
                if not self._ended_early(call):
                    call.woke()
            elif isinstance(step, Finish):
                self._finish(step.outcome, plan)
                return

    async def _reused(self, plan: Plan) -> bool:
        """Give the answer that an earlier call got to the very same request, where its endpoint wants that."""
        pipeline, whose, reuse = self._pipeline, self._whose, self._pipeline.reuse
        if reuse is None or self._scanned is None or not reuse.wanted(whose.endpoint):
            return False
        key = reuse.key(
            whose.endpoint, self._request, self._scanned, plan, key_id=self._principal.key_id, user=whose.user
        )
        if key is None:
            return False
        found = await reuse.find(key)
        if found is None or not await self._may_ask():
            self._recorder = reuse.recorder(key)
            return False
        lines = own_headers.limit_lines(pipeline.traffic.limits, self._subjects, pipeline.now_ns())
        self._first_byte_at = pipeline.clock()
        self._delivery = Delivery(self._exchange, found, call_id=self._request.call_id, more_lines=lines)
        whole = await self._delivery.run()
        kind: OutcomeKind = "completed" if whole else "cut" if self._interrupted else "abandoned"
        ending = Ending(
            outcome=kind,
            status=200 if whole or self._interrupted else _CLIENT_CLOSED,
            total_ms=self._ms_since_start(),
            model=found.answer.model,
            error_code="client_left" if kind == "abandoned" else "restarting" if kind == "cut" else "",
            first_byte_ms=self._ms_to(self._first_byte_at),
            reused=True,
        )
        self._settlement.reused(
            ending,
            self._settlement.opened(plan, self._principal, whose),
            found.answer.stop_reason,
            found.answer.cost_nanousd,
        )
        self._log(plan, ending)
        return True

    async def _may_ask(self) -> bool:
        """Whether the person's own limits let one more request pass; it goes to nobody, so no other limit is asked."""
        limits = self._pipeline.traffic.limits
        ask = Ask(f"{self._request.call_id}:0", "", ClassLimits(), self._subjects, 0, 0, lease_s=LEASE_S)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        limits.admit(ask, lambda verdict: answer.set_result(verdict.admitted))
        admitted = await answer
        if admitted:
            limits.settle(ask.id, input_tokens=0, output_tokens=0)
        return admitted

    async def _take_turn(self, call: Call, plan: Plan, step: Admit) -> None:
        """Make the body fit the model, and wait until the attempt may leave."""
        pipeline, request = self._pipeline, self._request
        now = pipeline.clock()
        model = step.model
        body = self._body_for(model, plan)
        if isinstance(body, Unfit):
            call.unfit(body.reason, now)
            return
        cached = self._plan_cache(model, plan, body)
        if not await self._go_ahead(call, plan, cached):
            return
        now = pipeline.clock()
        purse = self._own_purse()
        paid = await purse.reserve(call.attempts + 1, plan, cached.body, now, speed=self._speed)
        if self._ended_early(call):
            return
        if isinstance(paid, Refused):
            call.refused(paid, now)
            return
        self._body = paid
        self._forecast = forecast = pipeline.forecaster.forecast(
            model,
            plan.input_tokens_estimate,
            self._script,
            cached.prefixes,
            plan.max_tokens,
            now,
            to_be_read=pipeline.caching.to_be_read(cached, request.call_id),
        )
        class_id = pipeline.class_id(model)
        waiting = pipeline.traffic.join(
            Want(
                ask_id=f"{request.call_id}:{call.attempts + 1}",
                model=model,
                class_id=class_id,
                # As they are now: a call from before the settings were read again must not bring the old ones back.
                limits=pipeline.policies.class_limits(class_id),
                subjects=purse.watch(
                    self._subjects if not step.again else self._subjects_of_retry(), cached.digest, expected_nanousd=0
                ),
                input_tokens=forecast.input_tokens,
                output_tokens=forecast.output_tokens,
                deadline=plan.deadline,
                user=self._whose.user,
                weight=self._tier.weight,
                waiting_max=self._tier.waiting_max,
                background=self._tier.background,
                again=step.again,
                since=request.received_at,
                divertible=len(plan.models) > 1,
                better=() if step.again or self._sticky else plan.models[: plan.models.index(model)],
                bytes=len(request.body),
                call_id=request.call_id,
                key_id=self._principal.key_id,
                conversation=self._whose.conversation,
            )
        )
        result = waiting.result
        if result is None:
            self._settlement.pause()
            self._waiting = waiting
            result = await waiting.wait()
            self._waiting = None
            now = pipeline.clock()
            self._queued_s += now - waiting.enqueued_at
        if isinstance(result, Turn):
            self._turn = result
            call.admitted(probe=result.probe)
        elif isinstance(result, Diverted):
            call.diverted(now)
        elif isinstance(result, Refused):
            # The money stays held: another model may have a turn for the same attempt. Else it goes with the call.
            call.refused(result, now)
        else:
            assert isinstance(result, Left)
            self._ended_early(call)

    def _plan_cache(self, model: str, plan: Plan, body: bytes) -> CachePlan:
        """The prompt as this model's cache sees it. Once for a model: each look counts as a use of the prompt."""
        if self._cached is not None:
            if self._cached_for == model:
                return self._cached
            self._pipeline.caching.leave(self._cached, self._request.call_id)
        assert self._scanned is not None
        self._cached_for = model
        self._cached = self._pipeline.caching.plan(
            self._scanned if body is self._scanned.body else scan(body),
            self._principal,
            endpoint=self._whose.endpoint,
            user=self._whose.user,
            model=model,
            arm=plan.arm,
            at_ns=self._request.received_at_ns,
            header_lines=self._request.forwarded,
        )
        return self._cached

    async def _go_ahead(self, call: Call, plan: Plan, cached: CachePlan) -> bool:
        """Wait while another call writes the same prefix; False when the call ended meanwhile."""
        pipeline, call_id = self._pipeline, self._request.call_id
        if pipeline.caching.goes_ahead(cached, call_id, self._wait.wake):
            return True
        self._settlement.pause()
        began_at = now = pipeline.clock()
        while (until := pipeline.caching.wait_until(cached, call_id)) is not None and now < min(until, plan.deadline):
            await self._wait.until(min(until, plan.deadline))
            now = pipeline.clock()
            if self._gone or self._interrupted:
                break
        if until is not None:
            pipeline.caching.leave(cached, call_id)
        self._queued_s += now - began_at
        return not self._ended_early(call)

    def _ended_early(self, call: Call) -> bool:
        """Whether the client left or the process stops while the call waited; the call has been told."""
        if self._gone:
            call.abandoned()
        elif self._interrupted:
            call.stopped()
        return self._gone or self._interrupted

    def _body_for(self, model: str, plan: Plan) -> bytes | Unfit:
        """The request's bytes for this model: as they came, but for what the model does not take."""
        if model == plan.models[0]:
            return plan.body
        assert self._scanned is not None
        return rewrite(
            self._scanned,
            source=self._policies.router.resolve(plan.model_asked),
            target=model,
            catalog=self._pipeline.catalog,
            input_tokens=plan.input_tokens_estimate,
            at_ns=self._request.received_at_ns,
            continued=model == self._sticky,
        )

    async def _send(self, call: Call, plan: Plan, attempt: Attempt) -> None:
        """One attempt, from its intent to the head of its answer."""
        pipeline, request = self._pipeline, self._request
        first = attempt.number == 1
        opened = self._settlement.opened(plan, self._principal, self._whose, self._cached) if first else None
        self._settlement.intend(attempt, plan, pipeline.now_ns(), opened)
        if pipeline.settings.ledger.durability == "power":
            await pipeline.ledger.durable()
        if self._cached is not None:
            pipeline.caching.sent(self._cached, request.call_id)
        body = self._body
        head = b"POST %b/v1/messages%b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
            pipeline.upstream.base_path,
            b"?" + request.query if request.query else b"",
            pipeline.upstream_head,
            request.forwarded,
            len(body),
        )
        reply = await pipeline.upstream.send(
            head,
            body,
            self._track,
            first_byte_timeout_s=None if plan.streamed else self._whole_answer_timeout_s(plan),
        )
        self._connection = None
        if isinstance(reply, Answer):
            pipeline.traffic.told(self._its_turn(), reply.header_map)
            if reply.status == 200 and reply.streamed == plan.streamed:
                self._answer = reply
                self._first_byte_at = self._first_byte_at or reply.head_at
                call.started()
                return
            self._last_answer = reply
            reply_failure = self._failure_of(reply, plan)
        else:
            reply_failure = reply
        self._attempt_failed(call, plan, attempt, reply_failure)

    async def _relay_answer(self, call: Call, plan: Plan) -> None:
        answer, self._answer = self._answer, None
        assert answer is not None
        attempt = Attempt(call.attempts, call.model)
        if plan.streamed:
            await self._relay_stream(call, plan, attempt, answer)
        else:
            self._relay_whole(call, plan, attempt, answer)

    async def _relay_stream(self, call: Call, plan: Plan, attempt: Attempt, answer: Answer) -> None:
        pipeline, settlement = self._pipeline, self._settlement
        assert self._client is not None
        self._last_answer = answer
        relay = self._relay = Relay(
            answer,
            self._client,
            hold_s=pipeline.settings.upstream.hold_s,
            clock=pipeline.clock,
            on_start=lambda: self._began(attempt, answer, relay.fold),
            on_commit=lambda: self._commit(call),
            on_progress=lambda: self._progressed(attempt, plan, relay.fold),
        )
        if self._gone:
            relay.abandon()
        else:
            answer.attach(relay)
        failure = await relay.done
        self._relay = None
        if relay.fold.complete:
            # Whole, even when the client left during the last bytes.
            settlement.completed_stream(attempt, answer, relay.fold)
            self._keep(attempt, answer, relay.fold.stop_reason, relay.fold.usage)
            self._answered(attempt.model, relay.fold.usage)
            call.completed(200)
        elif self._gone:
            settlement.left(attempt, plan, answer, relay.fold, status=_CLIENT_CLOSED)
            self._own_purse().settle(settlement.attempt_nanousd)
            pipeline.traffic.neutral(self._its_turn())
            self._end_turn(uncached(settlement.usage), settlement.usage.output_tokens)
            call.abandoned()
        else:
            assert failure is not None
            self._attempt_failed(call, plan, attempt, failure, relay.fold)

    def _relay_whole(self, call: Call, plan: Plan, attempt: Attempt, answer: Answer) -> None:
        """An answer that is not streamed: it is here, whole, with its bill."""
        self._last_answer = answer
        body = answer.body()
        try:
            message = _whole_message.decode(body)
            usage = decode_usage(message.usage)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UsageError) as error:
            failure = Failure(kind="malformed", status=200, message=f"Anthropic's answer cannot be read: {error}")
            self._attempt_failed(call, plan, attempt, failure)
            return
        cost_nanousd = self._settlement.completed_whole(
            attempt,
            answer,
            usage,
            model=message.model,
            stop_reason=message.stop_reason or "",
            has_content=bool(message.content),
        )
        self._pipeline.forecaster.began(attempt.model, self._forecast, usage, self._pipeline.clock())
        self._learn_cache(attempt, usage, message.id, bytes(message.diagnostics))
        if self._recorder is not None:
            self._recorder.write(body)
            self._keep(attempt, answer, message.stop_reason or "", usage)
        self._answered(attempt.model, usage)
        if self._gone:
            call.abandoned()
            return
        call.commit()
        bill = own_headers.bill_lines(
            cost_nanousd,
            cache_read=usage.cache_read_tokens,
            cache_written=usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
        )
        lines = forwarding.response_lines(answer.headers) + self._own_lines() + bill
        call.completed(200)
        self._exchange.respond(200, lines, body)

    def _keep(self, attempt: Attempt, answer: Answer, stop_reason: str, usage: Usage) -> None:
        """The answer is whole: it may be given again."""
        if self._recorder is not None:
            self._recorder.keep(
                served=attempt.model,
                stop_reason=stop_reason,
                content_type=answer.header_map.get(b"content-type", b""),
                request_id=request_id(answer),
                usage=usage,
                cost_nanousd=self._settlement.attempt_nanousd,
            )

    def _finish(self, outcome: Outcome, plan: Plan) -> None:
        """The call's one outcome: told to the client, the ledger and the log."""
        status = outcome.status
        error_code = outcome.error_code
        opened = None
        if outcome.kind in ("failed", "cut"):
            assert outcome.failure is not None
            status = self._tell_failure(outcome, outcome.failure)
        elif outcome.refused is not None:
            error = refusals.answer(outcome.refused, call_id=self._request.call_id)
            self._exchange.respond(error.status, error.header_lines + self._attempt_lines(), error.body)
        elif outcome.kind == "abandoned":
            error_code = "client_left"
        if not outcome.attempts:
            # Nothing was sent, so nothing was written yet.
            opened = self._settlement.opened(plan, self._principal, self._whose, self._cached)
        model = outcome.model
        total_ms = self._ms_since_start()
        first_byte_ms = None if self._first_byte_at is None else self._ms_to(self._first_byte_at)
        self._settlement.close(
            outcome.kind,
            status=status,
            model=model,
            error_code=error_code,
            total_ms=total_ms,
            queue_ms=self._queue_ms(),
            first_byte_ms=first_byte_ms,
            opened=opened,
        )
        ending = Ending(
            outcome=outcome.kind,
            status=status,
            total_ms=total_ms,
            model=model,
            error_code=error_code,
            failure=outcome.failure.kind if outcome.failure else "",
            reasons=self._call.reasons if self._call is not None else (),
            attempts=outcome.attempts,
            first_byte_ms=first_byte_ms,
        )
        self._log(plan, ending)

    # the client

    def tick(self, now: float) -> None:
        """Called a few times a second."""
        if self._client is not None:
            self._client.tick(now, answering=self._relay is not None)
        if self._relay is not None:
            self._relay.tick(now)
        if self._purse is not None:
            self._purse.tick(now)
        if self._background_until is not None and now > self._background_until and self._connection is not None:
            self._connection.abort()

    def interrupt(self) -> None:
        """The process ends before this answer does: the client hears of it, and what was produced is settled."""
        self._interrupted = True
        if self._delivery is not None:
            error_type, code, message = cut_error(Failure(kind="reset"), interrupted=True)
            self._delivery.interrupt(errors.event(error_type, message, code=code, request_id=self._request.call_id))
        elif self._relay is not None:
            self._relay.broke(Failure(kind="reset", status=200, message="The gateway is restarting."))
        elif self._connection is not None:
            self._connection.abort()
        elif self._waiting is not None:
            self._pipeline.traffic.leave(self._waiting)
        else:
            self._wait.wake()

    def _client_left(self) -> None:
        """Design §5.4: in backoff nothing more is sent; streaming, upstream is closed; else it is read on."""
        self._gone = True
        pipeline = self._pipeline
        if self._relay is not None:
            self._relay.abandon()
        elif self._wait.waiting:
            self._wait.wake()
        elif self._waiting is not None:
            pipeline.traffic.leave(self._waiting)
        elif self._connection is not None:
            streamed = self._plan is not None and self._plan.streamed
            if streamed or pipeline.in_background >= pipeline.settings.upstream.background_max:
                self._connection.abort()
            else:
                # Nobody waits for this answer, but it is billed in full: let it come, to settle it exactly.
                pipeline.in_background += 1
                self._background_until = pipeline.clock() + pipeline.settings.upstream.background_timeout_s

    def _client_paused(self, paused: bool) -> None:
        if self._relay is not None:
            self._relay.pause(paused)

    def _tell_failure(self, outcome: Outcome, failure: Failure) -> int:
        """The client's last word on a failed call; returns the status it saw."""
        call_id = self._request.call_id
        if self._client is not None and self._client.started:
            if outcome.kind == "cut" and failure.kind == "stream_error":
                # Anthropic's own error event has been passed on already.
                self._exchange.end()
                return 200
            error_type, code, message = cut_error(failure, interrupted=self._interrupted)
            cut = self._own_purse().cut
            if cut is not None:
                error_type, code, message = cut.error_type, cut.error_code, cut.message
            self._client.end(errors.event(error_type, message, code=code, request_id=call_id))
            return 200
        if self._interrupted:
            error = refusals.answer(refusals.RESTARTING, call_id=call_id)
            self._exchange.respond(error.status, error.header_lines, error.body)
            return error.status
        cut = self._own_purse().cut
        if cut is not None:
            # Before its first byte was shown: it can still be a proper status.
            error = refusals.answer(cut, call_id=call_id)
            self._exchange.respond(error.status, error.header_lines + self._attempt_lines(), error.body)
            return error.status
        answer = self._last_answer
        if failure.kind == "stream_error" and self._error_data and answer is not None:
            # The error came as the stream's first event; nothing was shown, so it can still be a proper status.
            status = errors.STATUS_BY_TYPE.get(failure.error_type, 500)
            lines = forwarding.response_lines(h for h in answer.headers if h[0].lower() != b"content-type")
            lines += (
                b"content-type: application/json\r\n" + self._own_lines() + refusals.advice(None, should_retry=False)
            )
            self._exchange.respond(status, lines, self._error_data)
            return status
        if failure.kind == "status" and answer is not None:
            passed_on = passed_on_lines(answer, failure)
            if passed_on is not None:
                self._exchange.respond(answer.status, passed_on + self._own_lines(), answer.body())
                return answer.status
        error = refusals.answer(refusal_of(failure), call_id=call_id)
        self._exchange.respond(error.status, error.header_lines + self._attempt_lines(), error.body)
        return error.status

    def _refuse(self, refused: Refused) -> None:
        """Answer in our own words, before any attempt or instead of an outcome."""
        error = refusals.answer(refused, call_id=self._request.call_id)
        if self._client is not None and self._client.started:
            self._client.end(
                errors.event(
                    refused.error_type, refused.message, code=refused.error_code, request_id=self._request.call_id
                )
            )
        else:
            self._exchange.respond(error.status, error.header_lines, error.body)
        ending = Ending(
            outcome="refused" if self._call is None else "failed",
            status=error.status,
            total_ms=self._ms_since_start(),
            error_code=refused.error_code,
            attempts=0 if self._call is None else self._call.attempts,
        )
        self._log(self._plan, ending)

    def _stream_head(self) -> bytes:
        answer = self._last_answer
        lines = forwarding.response_lines(answer.headers) if answer is not None else b""
        # nginx and its kin buffer a stream unless they are told not to; it is the article's lost half day.
        return lines + self._own_lines() + b"x-accel-buffering: no\r\n"

    def _own_lines(self) -> bytes:
        return b"x-headgate-call: %b\r\n%b" % (self._request.call_id.encode(), self._attempt_lines())

    def _attempt_lines(self) -> bytes:
        call, plan = self._call, self._plan
        assert call is not None
        assert plan is not None
        lines = own_headers.attempt_lines(
            model=call.model,
            attempts=call.attempts,
            queue_ms=self._queue_ms(),
            asked_first=plan.models[0],
            fallback_reason=call.fallback_reason,
        )
        return lines + own_headers.limit_lines(self._pipeline.traffic.limits, self._subjects, self._pipeline.now_ns())

    # the turn and the money

    def _own_purse(self) -> Purse:
        assert self._purse is not None, "made before the first attempt"
        return self._purse

    def _cut(self) -> None:
        """A budget is used up in mid-answer: the stream ends here."""
        if self._relay is not None:
            self._relay.broke(
                Failure(
                    kind="reset",
                    status=200,
                    error_code="budget_exceeded",
                    message="A budget is used up.",
                    should_retry=False,
                )
            )

    def _its_turn(self) -> Turn:
        assert self._turn is not None, "an attempt is made in its turn"
        return self._turn

    def _end_turn(self, input_tokens: int, output_tokens: int) -> None:
        """The attempt is over; what it took of the limits is known as well as it will be."""
        turn, self._turn = self._its_turn(), None
        self._pipeline.traffic.ended(turn, input_tokens=input_tokens, output_tokens=output_tokens)

    def _began(self, attempt: Attempt, answer: Answer, fold: StreamFold) -> None:
        """`message_start`: the input side is exact."""
        pipeline = self._pipeline
        self._settlement.started(attempt, answer, fold)
        pipeline.forecaster.began(attempt.model, self._forecast, fold.usage, pipeline.clock())
        self._learn_cache(attempt, fold.usage, fold.message_id, fold.diagnostics)
        pipeline.traffic.began(self._its_turn(), input_tokens=uncached(fold.usage))
        self._own_purse().progressed(fold.usage, fold.model or attempt.model, self._cut)

    def _learn_cache(self, attempt: Attempt, usage: Usage, message_id: str, diagnostics: bytes) -> None:
        if self._cached is not None:
            self._pipeline.caching.began(
                self._cached, model=attempt.model, usage=usage, message_id=message_id, diagnostics=diagnostics
            )

    def _commit(self, call: Call) -> None:
        """The first byte goes to the client: no other model will be asked, so what a rewriting reads is let go."""
        call.commit()
        self._scanned = None

    def _progressed(self, attempt: Attempt, plan: Plan, fold: StreamFold) -> None:
        seen = self._settlement.progressed(attempt, plan, fold)
        self._pipeline.traffic.progressed(
            self._its_turn(), input_tokens=uncached(fold.usage), output_tokens=seen.output_tokens
        )
        self._own_purse().progressed(seen, fold.model or attempt.model, self._cut)

    def _answered(self, model: str, usage: Usage) -> None:
        """The model gave a whole answer."""
        self._own_purse().settle(self._settlement.attempt_nanousd)
        pipeline, plan, whose = self._pipeline, self._plan, self._whose
        pipeline.forecaster.ended(model, usage.output_tokens)
        if whose.conversation and plan is not None and model != plan.models[0]:
            pipeline.stickiness.served(whose.user, whose.conversation, model, pipeline.clock())
        self._pipeline.traffic.succeeded(self._its_turn())
        self._end_turn(uncached(usage), usage.output_tokens)
        if len(self._pipeline.traffic.poison):
            self._pipeline.traffic.poison.succeeded(self._fingerprint())

    def _broken(self, failure: Failure, fold: StreamFold | None) -> None:
        """The attempt failed: what that says about limits, money and the model."""
        pipeline, turn, now = self._pipeline, self._its_turn(), self._pipeline.clock()
        why = cause(failure)
        if why is Cause.RATE_LIMIT:
            ramp = failure.error_code == RAMP_CODE
            pipeline.traffic.throttled(turn, retry_after_s=failure.retry_after_s, ramp=ramp)
        elif why is Cause.SPEND_CAP:
            pipeline.traffic.spend_cap(failure_code(failure))
        counts = why in OUTAGE and self._own_purse().cut is None
        if why is Cause.AMBIGUOUS and counts:
            counts = pipeline.traffic.poison.failed(self._fingerprint(), now)
        pipeline.traffic.failed(turn) if counts else pipeline.traffic.neutral(turn)
        if fold is not None and fold.started:
            self._end_turn(uncached(fold.usage), self._settlement.usage.output_tokens)
        elif failure.sent and failure.kind not in ("status", "stream_error"):
            # It may have been worked on: what was reserved for its input stays taken.
            self._end_turn(self._forecast.input_tokens, 0)
        else:
            self._end_turn(0, 0)

    def _fingerprint(self) -> bytes:
        return blake2b(self._request.body, digest_size=16, key=self._pipeline.fingerprint_key).digest()

    def _subjects_of_retry(self) -> tuple[Subject, ...]:
        return subjects_of(self._principal, self._whose, self._tier, first=False)

    def _queue_ms(self) -> int:
        return round(self._queued_s * 1000)

    # upstream

    def _track(self, connection: UpstreamConnection) -> bool:
        if self._gone or self._interrupted:
            return False
        self._connection = connection
        return True

    def _whole_answer_timeout_s(self, plan: Plan) -> float:
        """Answers that come whole come late: as the SDK does, allow for their length (claude-api §4.5)."""
        limit_s = self._pipeline.settings.upstream.first_byte_timeout_s
        return limit_s * min(max(1.0, plan.max_tokens / _LONG_ANSWER_TOKENS), _LONG_ANSWER_FACTOR_MAX)

    def _attempt_failed(
        self, call: Call, plan: Plan, attempt: Attempt, failure: Failure, fold: StreamFold | None = None
    ) -> None:
        """Settle what the attempt may have cost, then ask the call what follows."""
        if self._interrupted:
            # The process ends: whatever broke, nothing is tried again.
            failure = msgspec.structs.replace(failure, should_retry=False)
        self._settlement.failed(attempt, plan, failure, self._last_answer, fold)
        self._own_purse().settle(self._settlement.attempt_nanousd)
        if self._cached is not None:
            self._pipeline.caching.leave(self._cached, self._request.call_id)
        self._broken(failure, fold)
        if cause(failure) is Cause.CREDENTIAL:
            log.error(
                "upstream_credential",
                call_id=self._request.call_id,
                status=failure.status,
                code=failure_code(failure),
                mend="check ANTHROPIC_API_KEY and the certificate of the upstream URL",
            )
        self._error_data = fold.error_data if fold is not None else b""
        if self._gone:
            call.abandoned()
        else:
            call.failed(failure, self._pipeline.clock())

    def _failure_of(self, answer: Answer, plan: Plan) -> Failure:
        """Why an answer with a head is no answer to this request."""
        if answer.status == 200:
            if answer.streamed:
                answer.abort()
            asked = "a stream" if plan.streamed else "a message"
            return Failure(kind="malformed", status=200, message=f"Anthropic did not answer with {asked}.")
        return failure_of_status(answer, self._pipeline.now_ns())

    # the log

    def _ms_since_start(self) -> int:
        return self._ms_to(self._pipeline.clock())

    def _ms_to(self, at: float) -> int:
        return round((at - self._request.received_at) * 1000)

    def _log(self, plan: Plan | None, ending: Ending) -> None:
        self._pipeline.put_log_line(
            call_line(
                self._request,
                self._principal,
                self._whose,
                plan,
                self._cached,
                self._settlement,
                ending,
                ts=self._pipeline.timestamps.text(self._request.received_at_ns),
                queue_ms=self._queue_ms(),
                upstream_request_id=request_id(self._last_answer),
            )
        )
