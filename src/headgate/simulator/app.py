"""Routes: which path is answered by what. The top of every request: what fails here unforeseen becomes a 500 and a
traceback.
"""

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence

from headgate.simulator.batch_routes import BatchRoutes
from headgate.simulator.bill import Line
from headgate.simulator.control import Control
from headgate.simulator.errors import ApiError, Rejected, default_error
from headgate.simulator.http import Reply, Request
from headgate.simulator.jsonvalue import JsonObject
from headgate.simulator.listing import list_models, model_info, parameters
from headgate.simulator.messages import Call, count_tokens, create_message, scope_headers, send_error, send_json
from headgate.simulator.models import Catalogue
from headgate.simulator.reports import cost_report, usage_report
from headgate.simulator.validate import check_version
from headgate.simulator.world import World

CONTROL_PREFIX = "/sim/"
WARMERS = ("/", "/api/hello")
"""Paths that clients touch to warm a connection."""


class App:
    """The whole simulated API."""

    def __init__(self, world: World, refuse: Callable[[float], None]) -> None:
        self._world = world
        self._batches = BatchRoutes(world)
        self._control = Control(world, self._batches.batches.clear, refuse)

    def serve(self, request: Request, reply: Reply) -> None:
        """Answers one request, now or later."""
        if request.path.startswith(CONTROL_PREFIX):
            self._control.serve(request, reply)
            return
        world = self._world
        exchange = world.log.open(request, world.ids.next("req_"), world.wall())
        call = Call(world, request, reply, exchange)
        try:
            self._route(call)
        except Exception:
            # The top of a request: the client gets an honest 500, the terminal the traceback.
            traceback.print_exc(file=sys.stderr)
            exchange.end = "error"
            if not reply.done:
                send_error(call, default_error(500))

    def _route(self, call: Call) -> None:
        request = call.request
        path = request.path.rstrip("/") or "/"
        match request.method, path.split("/")[1:]:
            case "POST", ["v1", "messages"]:
                create_message(call)
            case "POST", ["v1", "messages", "count_tokens"]:
                count_tokens(call)
            case _, ["v1", "messages", "batches", *rest]:
                self._batches.serve(call, rest)
            case "GET", ["v1", "organizations", "usage_report", "messages"]:
                _report(call, usage_report)
            case "GET", ["v1", "organizations", "cost_report"]:
                _report(call, cost_report)
            case "GET", ["v1", "models"]:
                _models(call, None)
            case "GET", ["v1", "models", name]:
                _models(call, name)
            case "HEAD", _ if path in WARMERS:
                send_json(call, {}, [])
            case _, ["v1", "messages"] | ["v1", "messages", "count_tokens"] | ["v1", "models", *_]:
                send_error(call, ApiError(405, "Method Not Allowed"))
            case _:
                send_error(call, default_error(404))


Report = Callable[[Iterable[Line], Mapping[str, Sequence[str]], str, Catalogue, float], JsonObject]


def _report(call: Call, report: Report) -> None:
    world, request = call.world, call.request
    try:
        check_version(request.header("anthropic-version"))
        scope = world.keys.identify_admin(request)
        query = parameters(request.query)
        body = report(world.bill.lines, query, scope.organization, world.catalogue, world.wall())
    except Rejected as rejected:
        send_error(call, rejected.error)
        return
    send_json(call, body, scope_headers(scope))


def _models(call: Call, name: str | None) -> None:
    world, request = call.world, call.request
    try:
        check_version(request.header("anthropic-version"))
        scope = world.keys.identify(request)
        if name is None:
            body = list_models(world.catalogue, parameters(request.query))
        else:
            model = world.catalogue.find(name)
            if model is None:
                raise Rejected(ApiError(404, f"model: {name}"))
            body = model_info(model)
    except Rejected as rejected:
        send_error(call, rejected.error)
        return
    send_json(call, body, scope_headers(scope))
