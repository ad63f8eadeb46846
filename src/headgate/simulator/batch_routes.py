"""/v1/messages/batches…: the HTTP side of `batches`, and how one request of a batch is answered and billed."""

from functools import partial

from headgate.simulator import faults
from headgate.simulator.batches import Answerer, Batch, Batches, Outcome
from headgate.simulator.cache import Scope
from headgate.simulator.directives import directive_of
from headgate.simulator.errors import ApiError, Rejected, default_error
from headgate.simulator.events import message_value
from headgate.simulator.http import BATCH_BODY_BYTES_MAX, BATCHES_PATH
from headgate.simulator.jsonvalue import Json, JsonObject
from headgate.simulator.listing import page, page_body, parameters
from headgate.simulator.messages import (
    Call,
    answer_for,
    decoded_body,
    fault_before_answer,
    prompt_of,
    scope_headers,
    send_error,
    send_json,
    send_lines,
)
from headgate.simulator.validate import check_context, check_version, read_ask, read_body
from headgate.simulator.world import World


class BatchRoutes:
    """The batches of one simulator."""

    def __init__(self, world: World) -> None:
        answer: Answerer = partial(_answer, world)
        self._world = world
        self.batches = Batches(clock_factor=world.settings.batch_clock, answer=answer)

    def serve(self, call: Call, rest: list[str]) -> None:
        """Answers one request; `rest` is the path after `/v1/messages/batches`, in parts."""
        world, request = self._world, call.request
        try:
            version = check_version(request.header("anthropic-version"))
            scope = world.keys.identify(request)
            limited = world.limiter.admit_single(scope, "batches", world.clock())
            if limited is not None:
                raise Rejected(limited)
            fault = world.faults.pick(request.path, (), world.dice.random())
            if fault is not None and fault_before_answer(call, fault, scope_headers(scope)):
                return
            match request.method, rest:
                case "POST", []:
                    send_json(call, self._create(call, scope, version), scope_headers(scope))
                case "GET", []:
                    entries, more = page(self.batches.of(scope), parameters(request.query))
                    shown: list[Json] = [self._shown(call, batch) for _, batch in entries]
                    send_json(call, page_body([name for name, _ in entries], shown, more), scope_headers(scope))
                case "GET", [name]:
                    send_json(call, self._shown(call, self.batches.find(name, scope)), scope_headers(scope))
                case "POST", [name, "cancel"]:
                    batch = self.batches.find(name, scope)
                    self.batches.cancel(batch, world.wall())
                    send_json(call, self._shown(call, batch), scope_headers(scope))
                case "DELETE", [name]:
                    self.batches.delete(self.batches.find(name, scope))
                    send_json(call, {"id": name, "type": "message_batch_deleted"}, scope_headers(scope))
                case "GET", [name, "results"]:
                    batch = self.batches.find(name, scope)
                    if batch.status != "ended":
                        raise Rejected(ApiError(404, "Results are not available: the batch has not ended."))
                    send_lines(call, b"".join(batch.lines), scope_headers(scope))
                case _, [] | [_] | [_, "cancel" | "results"]:
                    raise Rejected(ApiError(405, "Method Not Allowed"))
                case _:
                    raise Rejected(default_error(404))
        except Rejected as rejected:
            send_error(call, rejected.error)

    def _create(self, call: Call, scope: Scope, version: str) -> JsonObject:
        world, request = self._world, call.request
        batch = self.batches.create(
            world.ids.next("msgbatch_"),
            scope,
            read_body(decoded_body(request, BATCH_BODY_BYTES_MAX)),
            betas=request.header("anthropic-beta"),
            version=version,
            wall_s=world.wall(),
        )
        self._work(batch, world.clock())
        return self._shown(call, batch)

    def _work(self, batch: Batch, now_s: float) -> None:
        again_s = self.batches.work(batch, self._world.wall(), self._world.dice)
        if again_s is not None:
            self._world.ticker.at(now_s + again_s, partial(self._work, batch))

    def _shown(self, call: Call, batch: Batch) -> JsonObject:
        scheme = "http" if self._world.settings.tls_certificate is None else "https"
        host = call.request.header("host") or f"{self._world.settings.host}:{self._world.settings.port}"
        return batch.as_json(f"{scheme}://{host}{BATCHES_PATH}/{batch.id}/results")


def _answer(world: World, params: JsonObject, batch: Batch) -> tuple[Outcome, JsonObject]:
    """Answers and bills one request of a batch."""
    directive = directive_of(params, None)
    if directive.batch in ("expired", "canceled"):
        return ("expired" if directive.batch == "expired" else "canceled"), {"type": directive.batch}
    try:
        if directive.batch == "errored":
            raise Rejected(default_error(500))
        if directive.error is not None and directive.error in faults.STATUS_KINDS:
            raise Rejected(faults.error_of(faults.Fault(directive.error)))
        ask = read_ask(
            params,
            version=batch.version,
            betas=batch.betas,
            catalogue=world.catalogue,
            organization=batch.scope.organization,
            purpose="batch",
            lenient=world.settings.lenient,
        )
        prompt = prompt_of(ask)
        check_context(ask, prompt.tokens)
    except Rejected as rejected:
        return "errored", {"type": "errored", "error": rejected.error.envelope(world.ids.next("req_"))}
    now_s = world.clock()
    use = world.cache.look(prompt, batch.scope, min_tokens=ask.model.cache_min_tokens, now_s=now_s)
    world.cache.begin(use, started_s=now_s)
    world.cache.store(use, model=ask.model.id, started_s=now_s)
    answer = answer_for(world, ask, batch.scope, prompt, use, directive, "batch")
    if answer.billed:
        world.bill.charge(
            ask.model,
            answer.usage,
            request=0,
            message_id=answer.message_id,
            request_id=batch.id,
            organization=batch.scope.organization,
            workspace=batch.scope.workspace,
            wall_s=world.wall(),
            complete=True,
        )
    return "succeeded", {"type": "succeeded", "message": message_value(answer)}
