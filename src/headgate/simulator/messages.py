"""POST /v1/messages and count_tokens: the path of one request from its bytes to its bill, in the order the API takes
it.

Headers, key, model, betas, parameters, rate limits, faults, answer. What each step means is in its own module.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import msgspec

from headgate.simulator import faults
from headgate.simulator.cache import CacheUse, Scope
from headgate.simulator.diagnostics import diagnose
from headgate.simulator.directives import Directive, directive_of
from headgate.simulator.errors import ApiError, Rejected, invalid
from headgate.simulator.events import Rate, duration_s, frames, message_json
from headgate.simulator.faults import Fault
from headgate.simulator.generate import Answer, compose
from headgate.simulator.http import BODY_BYTES_MAX, Reply, Request
from headgate.simulator.jsonvalue import object_in
from headgate.simulator.playback import Ending, Playback
from headgate.simulator.prompt import Prompt, build_prompt
from headgate.simulator.records import Exchange
from headgate.simulator.ticker import Wake
from headgate.simulator.usage import ServiceTier, Usage
from headgate.simulator.validate import Ask, check_context, check_version, read_ask, read_body
from headgate.simulator.world import Fingerprint, World

JSON_TYPE = ("content-type", "application/json")
HTML_TYPE = ("content-type", "text/html; charset=UTF-8")
HTML_502 = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n"
    b"<hr><center>cloudflare</center>\r\n</body>\r\n</html>\r\n"
)
HTML_413 = HTML_502.replace(b"502 Bad Gateway", b"413 Request Entity Too Large")
HANG_S = 400.0
SLOW_HEAD_S = 0.05
NANO_PER_USD = 10**9

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way, with all that is known of it so far."""

    world: World
    request: Request
    reply: Reply
    exchange: Exchange


@dataclass(frozen=True, slots=True)
class Job:
    """An admitted request: who, what, at what price in cache, and since when."""

    ask: Ask
    scope: Scope
    prompt: Prompt
    use: CacheUse
    directive: Directive
    fault: Fault | None
    started_s: float
    headers: tuple[tuple[str, str], ...]


def send_error(call: Call, error: ApiError, headers: Headers | None = None) -> None:
    """Answers with an error envelope (or the page of an edge) and closes the record."""
    exchange = call.exchange
    exchange.status = error.status
    exchange.head_s = exchange.ended_s = call.world.clock()
    exchange.end = "error" if exchange.fault is None else "fault"
    lines: Headers = [("request-id", exchange.request_id), *(headers or []), *error.headers]
    if error.status == 502:
        call.reply.whole(502, [HTML_TYPE, *lines], HTML_502)
    elif error.status == 413 and call.world.settings.edge_413:
        call.reply.whole(413, [HTML_TYPE, *lines], HTML_413)
    else:
        call.reply.whole(error.status, [JSON_TYPE, *lines], error.body(exchange.request_id))
    exchange.bytes_sent = call.reply.bytes_sent


def decoded_body(request: Request, limit: int) -> bytes:
    """The body without its content-encoding; Rejected for one that cannot be read or grows too large."""
    if request.oversize:
        raise Rejected(ApiError(413, "Request exceeds the maximum size"))
    encoding = (request.header("content-encoding") or "identity").strip().lower()
    if encoding == "identity":
        return request.body
    if encoding not in ("gzip", "deflate"):
        raise Rejected(invalid(f"Unsupported request body encoding: {encoding}", "request_body_encoding_unsupported"))
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, as the data says
    try:
        body = unpacker.decompress(request.body, limit + 1)
    except zlib.error:
        raise Rejected(invalid("The request body could not be decoded.", "request_body_encoding_invalid")) from None
    if len(body) > limit:
        raise Rejected(ApiError(413, "Request exceeds the maximum size", "request_body_too_large_after_decoding"))
    if not unpacker.eof:
        raise Rejected(invalid("The request body could not be decoded.", "request_body_encoding_invalid"))
    return body


def scope_headers(scope: Scope) -> Headers:
    """What every answer to a known key carries."""
    return [("anthropic-organization-id", scope.organization), ("anthropic-workspace-id", scope.workspace)]


def prompt_of(ask: Ask) -> Prompt:
    """The prompt of a request, with the parameters in force."""
    return build_prompt(
        ask.body,
        ask.model,
        thinking=ask.thinking if ask.budget_tokens is None else f"{ask.thinking}:{ask.budget_tokens}",
        effort=ask.effort,
        speed=ask.speed or "standard",
        betas=ask.betas,
    )


def count_tokens(call: Call) -> None:
    """POST /v1/messages/count_tokens."""
    world, request = call.world, call.request
    headers: Headers = []
    try:
        if request.oversize:
            raise Rejected(ApiError(413, "Request exceeds the maximum size"))
        version = check_version(request.header("anthropic-version"))
        scope = world.keys.identify(request)
        headers = scope_headers(scope)
        body = read_body(decoded_body(request, BODY_BYTES_MAX))
        ask = read_ask(
            body,
            version=version,
            betas=request.header("anthropic-beta"),
            catalogue=world.catalogue,
            organization=scope.organization,
            purpose="count",
            lenient=world.settings.lenient,
        )
        call.exchange.model = ask.model.id
        limited = world.limiter.admit_single(scope, "count_tokens", world.clock())
        if limited is not None:
            raise Rejected(limited)
        fault = world.faults.pick(request.path, ask.model.names, world.dice.random())
        if fault is not None and fault_before_answer(call, fault, headers):
            return
    except Rejected as rejected:
        send_error(call, rejected.error, headers)
        return
    tokens = round(prompt_of(ask).tokens * world.settings.count_bias)
    send_json(call, {"input_tokens": tokens}, headers)


def send_json(call: Call, value: object, headers: Headers, status: int = 200) -> None:
    """Answers with JSON and closes the record."""
    exchange = call.exchange
    exchange.status = status
    exchange.head_s = exchange.ended_s = call.world.clock()
    exchange.end = "complete"
    call.reply.whole(status, [JSON_TYPE, ("request-id", exchange.request_id), *headers], msgspec.json.encode(value))
    exchange.bytes_sent = call.reply.bytes_sent


def send_lines(call: Call, lines: bytes, headers: Headers) -> None:
    """Answers with JSON lines and closes the record."""
    exchange = call.exchange
    exchange.status = 200
    exchange.head_s = exchange.ended_s = call.world.clock()
    exchange.end = "complete"
    call.reply.whole(
        200, [("content-type", "application/x-jsonl"), ("request-id", exchange.request_id), *headers], lines
    )
    exchange.bytes_sent = call.reply.bytes_sent


def create_message(call: Call) -> None:
    """POST /v1/messages."""
    world, request, exchange = call.world, call.request, call.exchange
    now_s = world.clock()
    headers: Headers = []
    try:
        if request.oversize:
            raise Rejected(ApiError(413, "Request exceeds the maximum size"))
        version = check_version(request.header("anthropic-version"))
        scope = world.keys.identify(request)
        headers = scope_headers(scope)
        body = read_body(decoded_body(request, BODY_BYTES_MAX))
        ask = read_ask(
            body,
            version=version,
            betas=request.header("anthropic-beta"),
            catalogue=world.catalogue,
            organization=scope.organization,
            purpose="message",
            lenient=world.settings.lenient,
        )
        model = ask.model
        exchange.model, exchange.streamed = model.id, ask.stream
        prompt = prompt_of(ask)
        check_context(ask, prompt.tokens)
        use = world.cache.look(prompt, scope, min_tokens=model.cache_min_tokens, now_s=now_s)
        counted = prompt.tokens if model.reads_count else prompt.tokens - use.read_tokens
        limited = _spend_capped(world, scope) or world.limiter.admit(scope, model, counted, now_s)
        headers += world.limiter.headers(scope, model, now_s, world.wall())
        if limited is not None:
            raise Rejected(limited)
        directive = directive_of(body, request.header("x-sim"))
        fault = _directed_fault(directive) or world.faults.pick(request.path, model.names, world.dice.random())
        if fault is not None and fault_before_answer(call, fault, headers, streamed=ask.stream):
            world.limiter.refund_input(scope, model, counted, now_s)
            return
    except Rejected as rejected:
        send_error(call, rejected.error, headers)
        return
    world.cache.begin(use, started_s=now_s)
    _answer(call, Job(ask, scope, prompt, use, directive, fault, now_s, tuple(headers)))


def fault_before_answer(call: Call, fault: Fault, headers: Headers, *, streamed: bool = False) -> bool:
    """Carries out a fault that needs no answer; False for one that bends the answer, which is then still to come."""
    exchange = call.exchange
    exchange.fault = fault.kind
    if fault.kind in faults.STATUS_KINDS:
        respond = partial(send_error, call, faults.error_of(fault), headers)
        _after(call, fault.for_s or 0.0, respond)
        return True
    if fault.kind == "reset":
        _after(call, 0.0, partial(_reset, call))
        return True
    if fault.kind == "hang":
        _after(call, HANG_S if fault.for_s is None else fault.for_s, partial(_reset, call))
        return True
    if fault.kind in ("error-first", "error-mid") and not streamed:
        send_error(call, faults.error_of(Fault("529", message=fault.message, error_code=fault.error_code)), headers)
        return True
    return False


def answer_for(
    world: World, ask: Ask, scope: Scope, prompt: Prompt, use: CacheUse, directive: Directive, tier: ServiceTier
) -> Answer:
    """The answer to a valid request, its usage filled in, and its fingerprint kept for diagnostics."""
    usage = Usage(
        input_tokens=use.input_tokens,
        read_tokens=use.read_tokens,
        write_5m_tokens=use.write_5m_tokens,
        write_1h_tokens=use.write_1h_tokens,
        service_tier=tier,
        speed=ask.speed,
        inference_geo=ask.inference_geo,
    )
    answer = compose(
        ask,
        directive,
        usage,
        ids=world.ids,
        seed=world.seed,
        prompt_hash=prompt.blocks[-1].prefix,
        answer_tokens=world.settings.answer_tokens,
        organization=scope.organization,
    )
    fingerprint = Fingerprint(ask.model.id, ask.speed, prompt)
    asked = ask.body.get("diagnostics")
    if asked is not None:
        previous = object_in(asked).get("previous_message_id")
        earlier = world.fingerprints.get((scope, previous)) if isinstance(previous, str) else None
        found = None if previous is None else diagnose(earlier, fingerprint)
        answer = replace(answer, diagnosed=True, diagnostics=found)
    world.remember(scope, answer.message_id, fingerprint)
    return answer


def _answer(call: Call, job: Job) -> None:
    """Waits for the model's first token, then streams, or waits for its last and answers whole."""
    world, exchange = call.world, call.exchange
    ask, directive = job.ask, job.directive
    answer = answer_for(world, ask, job.scope, job.prompt, job.use, directive, "standard")
    exchange.message_id = answer.message_id
    exchange.status = 200
    rate = _rate(world, ask, directive)
    first_s = job.started_s + _scaled(world, _ttft_s(world, ask, job.use, directive))
    world.open[exchange.number] = exchange
    if ask.stream:
        call.reply.on_gone = partial(_left_before_first_byte, call, job, answer)
        _when(world, first_s, job.started_s, partial(_stream, call, job, answer, rate))
    else:
        call.reply.on_gone = partial(_note_client_left, call)
        _when(
            world,
            first_s,
            job.started_s,
            lambda _: world.cache.store(job.use, model=ask.model.id, started_s=job.started_s),
        )
        _when(world, first_s + duration_s(answer, rate), job.started_s, partial(_whole, call, job, answer))


def _when(world: World, due_s: float, now_s: float, wake: Wake) -> None:
    """Calls `wake` at its time: at once when that is now, because a slot of the ticker is an eternity at speed 0."""
    if due_s <= now_s:
        wake(now_s)
    else:
        world.ticker.at(due_s, wake)


def _stream(call: Call, job: Job, answer: Answer, rate: Rate, now_s: float) -> None:
    exchange, world = call.exchange, call.world
    if exchange.end != "open":
        return
    world.cache.store(job.use, model=answer.model, started_s=job.started_s)
    exchange.head_s = now_s
    played = frames(answer, rate)
    content_type, more = faults.content_headers(job.fault)
    if job.fault is not None:
        played = faults.reshape(job.fault, played)
    lines: Headers = [
        ("content-type", content_type),
        ("cache-control", "no-cache"),
        ("request-id", exchange.request_id),
        *job.headers,
        *more,
    ]
    head = call.reply.head(200, lines, length=None)
    if job.fault is not None and job.fault.kind == "slow-headers":
        slow = faults.drip(head, SLOW_HEAD_S if job.fault.for_s is None else job.fault.for_s)
        played = (frame for part in (slow, played) for frame in part)
    else:
        call.reply.raw(head)
    Playback(
        played,
        call.reply,
        exchange,
        world.ticker,
        start_s=now_s,
        on_tokens=world.limiter.output_meter(job.scope, job.ask.model, now_s),
        on_end=partial(_stream_over, call, job, answer),
    ).play(now_s)


def _stream_over(call: Call, job: Job, answer: Answer, ending: Ending) -> None:
    exchange = call.exchange
    exchange.end = "fault" if ending == "broken" else ending
    if ending == "client_left":
        exchange.client_closed_s = call.world.clock()
    complete = ending == "complete" and exchange.output_tokens >= answer.usage.output_tokens
    _settle(
        call,
        job,
        answer,
        output_tokens=answer.usage.output_tokens if complete else exchange.output_tokens,
        complete=complete,
    )


def _left_before_first_byte(call: Call, job: Job, answer: Answer) -> None:
    call.exchange.end = "client_left"
    call.exchange.client_closed_s = call.world.clock()
    _settle(call, job, answer, output_tokens=0, complete=False)


def _note_client_left(call: Call) -> None:
    # An answer that is not streamed is produced to its end, and billed in full, whether anyone waits or not.
    call.exchange.client_closed_s = call.world.clock()


def _whole(call: Call, job: Job, answer: Answer, now_s: float) -> None:
    world, exchange, reply = call.world, call.exchange, call.reply
    world.limiter.output_meter(job.scope, job.ask.model, now_s)(answer.usage.output_tokens, now_s)
    exchange.output_tokens = answer.usage.output_tokens
    exchange.head_s = now_s
    if exchange.client_closed_s is not None:
        exchange.end = "client_left"
        _settle(call, job, answer, output_tokens=answer.usage.output_tokens, complete=True)
        return
    body = message_json(answer)
    lines: Headers = [JSON_TYPE, ("request-id", exchange.request_id), *job.headers]
    fault = job.fault
    if fault is None:
        reply.whole(200, lines, body)
        exchange.bytes_sent = reply.bytes_sent
        exchange.end = "complete"
        _settle(call, job, answer, output_tokens=answer.usage.output_tokens, complete=True)
        return
    if fault.kind == "wrong-content-type":
        lines[0] = ("content-type", "text/plain; charset=utf-8")
    head = reply.head(200, lines, length=len(body))
    played = faults.reshape_body(fault, body)
    if fault.kind == "slow-headers":
        slow = faults.drip(head, SLOW_HEAD_S if fault.for_s is None else fault.for_s)
        played = (frame for part in (slow, played) for frame in part)
    else:
        reply.raw(head)
    Playback(
        played,
        reply,
        exchange,
        world.ticker,
        start_s=now_s,
        on_tokens=lambda _, __: None,
        on_end=partial(_stream_over, call, job, answer),
    ).play(now_s)


def _settle(call: Call, job: Job, answer: Answer, *, output_tokens: int, complete: bool) -> None:
    """Writes the bill: what was produced, or nothing for a refusal or an error before any output."""
    world, exchange = call.world, call.exchange
    world.open.pop(exchange.number, None)
    exchange.ended_s = world.clock()
    exchange.bytes_sent = call.reply.bytes_sent
    unpaid = exchange.fault in ("error-first", "reset-after-headers") and output_tokens == 0
    if not answer.billed or unpaid:
        return
    usage = replace(
        answer.usage,
        output_tokens=output_tokens,
        thinking_tokens=min(answer.usage.thinking_tokens, output_tokens),
    )
    exchange.billed(
        world.bill.charge(
            job.ask.model,
            usage,
            request=exchange.number,
            message_id=answer.message_id,
            request_id=exchange.request_id,
            organization=job.scope.organization,
            workspace=job.scope.workspace,
            wall_s=exchange.wall_s,
            complete=complete,
        )
    )


def _spend_capped(world: World, scope: Scope) -> ApiError | None:
    cap = world.settings.spend_cap_usd
    if cap is None or world.bill.month_nanousd(scope.organization, world.wall()) < cap * NANO_PER_USD:
        return None
    return ApiError(
        429,
        "You have reached your API usage limits: your organization's monthly spend limit is used up. "
        f"You will regain access on {_next_month(world.wall())} at 00:00 UTC.",
        "enforced_spend_limit_reached",
    )


def _directed_fault(directive: Directive) -> Fault | None:
    if directive.error is None or directive.error.replace("_", "-") not in faults.KINDS:
        return None
    return Fault(
        directive.error.replace("_", "-"),
        retry_after=directive.retry_after,
        at=directive.at,
        for_s=directive.for_s,
    )


def _rate(world: World, ask: Ask, directive: Directive) -> Rate:
    settings = world.settings
    otps = directive.otps or settings.otps or float(ask.model.output_tps)
    ping_s = settings.ping_s if directive.ping_ms is None else directive.ping_ms / 1_000
    return Rate(otps * settings.speed if settings.speed else float("inf"), ping_s)


def _ttft_s(world: World, ask: Ask, use: CacheUse, directive: Directive) -> float:
    if directive.ttft_ms is not None:
        return directive.ttft_ms / 1_000
    if world.settings.ttft_s is not None:
        return world.settings.ttft_s
    model = ask.model
    uncached = use.input_tokens + use.write_5m_tokens + use.write_1h_tokens
    return model.base_s + uncached / model.prefill_tps + use.read_tokens / model.cached_tps


def _scaled(world: World, seconds: float) -> float:
    return seconds / world.settings.speed if world.settings.speed else 0.0


def _after(call: Call, wait_s: float, respond: Callable[[], None]) -> None:
    """Carries out a fault, at once or after a wait that ends early when the client leaves."""
    call.reply.on_gone = partial(_left_during_fault, call)
    if wait_s <= 0.0:
        respond()
    else:
        call.world.ticker.at(call.world.clock() + wait_s, lambda _: respond() if call.exchange.end == "open" else None)


def _left_during_fault(call: Call) -> None:
    call.exchange.end = "client_left"
    call.exchange.client_closed_s = call.exchange.ended_s = call.world.clock()


def _reset(call: Call) -> None:
    call.exchange.end = "fault"
    call.exchange.ended_s = call.world.clock()
    call.reply.reset()


def _next_month(wall_s: float) -> str:
    today = datetime.fromtimestamp(wall_s, tz=UTC)
    return f"{today.year + today.month // 12}-{today.month % 12 + 1:02d}-01"
