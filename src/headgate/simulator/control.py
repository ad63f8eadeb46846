"""/sim/*: what a test reads and orders. No key, no record of its own: it is the backstage, on loopback."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

import msgspec

from headgate.simulator.errors import ApiError, Rejected, default_error
from headgate.simulator.faults import KINDS, Scripted
from headgate.simulator.http import Reply, Request
from headgate.simulator.listing import parameters
from headgate.simulator.world import World

Order = TypeVar("Order", Scripted, "ResetOrder")

LIMIT_DEFAULT = 100
REFUSE_S = 1.0


class ResetOrder(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /sim/reset."""

    seed: int | None = None


class Control:
    """The backstage of one simulator."""

    def __init__(self, world: World, clear_batches: Callable[[], None], refuse: Callable[[float], None]) -> None:
        """`refuse(seconds)` closes the listening port for a while."""
        self._world = world
        self._clear_batches = clear_batches
        self._refuse = refuse

    def serve(self, request: Request, reply: Reply) -> None:
        """Answers one request for a path under /sim/."""
        try:
            self._route(request, reply)
        except Rejected as rejected:
            reply.whole(rejected.error.status, [("content-type", "application/json")], rejected.error.body(None))

    def _route(self, request: Request, reply: Reply) -> None:
        world = self._world
        match request.method, request.path.split("/")[2:]:
            case "GET", ["requests"]:
                _json(reply, self._requests(request))
            case "GET", ["requests", number, "body"]:
                exchange = world.log.find(_number(number))
                if exchange is None or not exchange.body_kept:
                    raise Rejected(default_error(404))
                reply.whole(200, [("content-type", "application/octet-stream")], exchange.request.body)
            case "GET", ["requests", number]:
                exchange = world.log.find(_number(number))
                if exchange is None:
                    raise Rejected(default_error(404))
                _json(reply, exchange.as_dict(body=True))
            case "GET", ["bill"]:
                _json(reply, self._bill(request))
            case "GET", ["streams"]:
                _json(reply, self._streams())
            case "GET", ["cache"]:
                _json(reply, self._cache())
            case "GET", ["limits"]:
                _json(reply, world.limiter.snapshot(world.clock()))
            case "GET", ["faults"]:
                _json(reply, world.faults.snapshot() | {"kinds": KINDS})
            case "POST", ["faults"]:
                self._order_fault(request, reply)
            case "DELETE", ["faults"]:
                world.faults.clear()
                _json(reply, world.faults.snapshot())
            case "DELETE", ["faults", "outages"]:
                models = parameters(request.query).get("model")
                world.faults.end_outages(models[-1] if models else None)
                _json(reply, world.faults.snapshot())
            case "POST", ["reset"]:
                order = _decoded(request.body or b"{}", ResetOrder)
                world.reset(order.seed)
                self._clear_batches()
                _json(reply, {"seed": world.seed})
            case _:
                raise Rejected(default_error(404))

    def _requests(self, request: Request) -> object:
        query = parameters(request.query)
        since = _number(query.get("since", ["0"])[-1])
        limit = _number(query.get("limit", [str(LIMIT_DEFAULT)])[-1])
        bodies = query.get("body", ["1"])[-1] != "0"
        found = [exchange.as_dict(body=bodies) for exchange in self._world.log.since(since, limit)]
        return {"requests": found, "count": self._world.log.count, "now_s": self._world.clock()}

    def _bill(self, request: Request) -> object:
        bill = self._world.bill
        limit = _number(parameters(request.query).get("limit", ["10000"])[-1])
        lines = list(bill.lines)[-limit:] if limit else []
        return {
            "total": bill.total.as_dict(),
            "models": {model: total.as_dict() for model, total in bill.by_model.items()},
            "requests": [asdict(line) for line in lines],
        }

    def _streams(self) -> object:
        world = self._world
        return {
            "now_s": world.clock(),
            "count": len(world.open),
            "late_s_max": world.ticker.late_s_max,
            "streams": [
                {
                    "number": exchange.number,
                    "connection": exchange.request.connection,
                    "model": exchange.model,
                    "streamed": exchange.streamed,
                    "received_s": exchange.request.received_s,
                    "head_s": exchange.head_s,
                    "client_closed_s": exchange.client_closed_s,
                    "events_sent": exchange.events_sent,
                    "output_tokens": exchange.output_tokens,
                }
                for exchange in world.open.values()
            ],
        }

    def _cache(self) -> object:
        now_s = self._world.clock()
        entries = [
            {
                "organization": key.scope.organization,
                "workspace": key.scope.workspace,
                "prefix": key.prefix.hex(),
                "model": entry.model,
                "tokens": entry.tokens,
                "ttl": entry.ttl,
                "live": now_s < entry.expires_s,
                "expires_in_s": entry.expires_s - now_s,
                "cold_writes": entry.cold_writes,
                "reads": entry.reads,
            }
            for key, entry in self._world.cache.entries()
        ]
        return {"entries": entries, "cold_writes": sum(entry.cold_writes for _, entry in self._world.cache.entries())}

    def _order_fault(self, request: Request, reply: Reply) -> None:
        order = _decoded(request.body, Scripted)
        if order.kind == "refuse":
            _json(reply, self._world.faults.snapshot())
            self._refuse(REFUSE_S if order.for_s is None else order.for_s)
            return
        try:
            self._world.faults.add(order)
        except ValueError as error:
            raise Rejected(ApiError(400, str(error))) from None
        _json(reply, self._world.faults.snapshot())


def _decoded(body: bytes, kind: type[Order]) -> Order:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Rejected(ApiError(400, str(error))) from None


def _json(reply: Reply, value: object) -> None:
    reply.whole(200, [("content-type", "application/json")], msgspec.json.encode(value))


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise Rejected(ApiError(400, f"{text!r} is not a number"))
    return int(text)
