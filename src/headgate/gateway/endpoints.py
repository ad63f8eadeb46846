"""The public listener's routes, and who may use them: the `App` behind `server.py`.

Matched on the path before any header is looked at; the key is checked before the body is read. Routes are exact:
what is not listed here is 404, whatever it decodes to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Literal
from urllib.parse import parse_qsl

import msgspec
import structlog

from headgate.gateway import forwarding, refusals
from headgate.gateway.budgets import accounts_of, is_capped
from headgate.gateway.passthrough import Passthrough
from headgate.gateway.pipeline import ATTRIBUTE_CHARS_MAX, Pipeline
from headgate.gateway.server import BadEncoding, DecodedTooLarge, Exchange, decode_body
from headgate.gateway.settings import ServerSection
from headgate.gateway.settlement import Attribution
from headgate.policy.admission import admit
from headgate.policy.bad_key_throttle import AddressThrottle
from headgate.policy.records import ClientRequest, Principal, Refused, Scope
from headgate.storage.interfaces import KeyRefused, KeyRing, KeysUnavailable
from headgate.wire import errors
from headgate.wire.batches import request_params, rewrite_results_urls
from headgate.wire.message import InvalidBody, scan

log = structlog.get_logger()

HOP_HEADER = b"x-headgate-hop"
_DEADLINE_S_MAX = 600.0
_ID = rb"[A-Za-z0-9_.:-]{1,128}"

Kind = Literal["messages", "repeatable", "once", "queue", "alive", "ready"]


class Route(msgspec.Struct, frozen=True):
    """One path. `scope` None: open to everybody, and answered here."""

    label: str
    kind: Kind
    scope: Scope | None = None
    names_results: bool = False


_COUNT_TOKENS = Route("count_tokens", "repeatable", "messages")
_MODELS = Route("models", "repeatable", "messages")
_BATCHES = Route("batches", "repeatable", "batch", names_results=True)
_BATCH_CHANGES = Route("batches", "once", "batch", names_results=True)
_NEW_BATCH = Route("batches", "once", "batch", names_results=True)
_ALIVE = Route("alive", "alive")

_EXACT: dict[bytes, dict[bytes, Route]] = {
    b"/v1/messages": {b"POST": Route("messages", "messages", "messages")},
    b"/v1/messages/count_tokens": {b"POST": _COUNT_TOKENS},
    b"/v1/models": {b"GET": _MODELS},
    b"/v1/queue": {b"GET": Route("queue", "queue", "messages")},
    b"/v1/messages/batches": {b"GET": _BATCHES, b"POST": _NEW_BATCH},
    b"/": {b"HEAD": _ALIVE},
    b"/api/hello": {b"HEAD": _ALIVE, b"GET": _ALIVE},
    b"/livez": {b"GET": _ALIVE, b"HEAD": _ALIVE},
    b"/readyz": {b"GET": Route("ready", "ready"), b"HEAD": Route("ready", "ready")},
}
_PATTERNS: list[tuple[re.Pattern[bytes], dict[bytes, Route]]] = [
    (re.compile(rb"/v1/models/%b" % _ID), {b"GET": _MODELS}),
    (re.compile(rb"/v1/messages/batches/%b" % _ID), {b"GET": _BATCHES, b"DELETE": _BATCH_CHANGES}),
    (re.compile(rb"/v1/messages/batches/%b/cancel" % _ID), {b"POST": _BATCH_CHANGES}),
    (re.compile(rb"/v1/messages/batches/%b/results" % _ID), {b"GET": Route("batches", "repeatable", "batch")}),
]


def find_route(path: bytes) -> dict[bytes, Route] | None:
    """Method to route at this exact path, None when there is nothing."""
    found = _EXACT.get(path)
    if found is not None:
        return found
    for pattern, methods in _PATTERNS:
        # A dot segment that somebody behind us might resolve is no id.
        if pattern.fullmatch(path) and b"/.." not in path and b"/./" not in path and not path.endswith(b"/."):
            return methods
    return None


class QueuedCall(msgspec.Struct, frozen=True):
    """One request that waits. `position` counts from 1, times are seconds."""

    call_id: str
    user: str
    conversation: str
    model: str
    position: int
    expected_wait_s: float
    waited_s: float


class _Accepted(msgspec.Struct, frozen=True):
    """What the head of a request was found to be; kept on the exchange until its body is here."""

    route: Route
    principal: Principal | None


class Endpoints:
    """See `server.App`."""

    def __init__(
        self,
        pipeline: Pipeline,
        keys: KeyRing,
        *,
        new_call_id: Callable[[], str],
        hop: bytes,
        is_ready: Callable[[], bool],
        settings: ServerSection,
    ) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._new_call_id = new_call_id
        self._hop = hop
        self._is_ready = is_ready
        self._public_url = settings.public_url.rstrip("/")
        self._body_bytes_max = settings.body_bytes_max
        self._throttle = AddressThrottle(failures_per_min=settings.bad_keys_per_min)

    def head(self, exchange: Exchange) -> None:
        """Route, then key, then scope. Whatever is refused here costs no call upstream and no write."""
        methods = find_route(exchange.path)
        if methods is None:
            self._refuse(exchange, refusals.NO_SUCH_PATH)
            return
        route = methods.get(exchange.method)
        if route is None:
            allowed = ", ".join(method.decode() for method in methods)
            message = f"{exchange.method.decode()} is not allowed here; {allowed} is."
            refused = Refused(405, "invalid_request_error", "method_not_allowed", message)
            self._refuse(exchange, refused, lines=b"allow: %b\r\n" % allowed.encode())
            return
        if route.scope is None:
            exchange.route = _Accepted(route, None)
            return
        if exchange.header.get(HOP_HEADER) == self._hop:
            self._refuse(exchange, refusals.LOOP)
            return
        principal = self._authenticate(exchange)
        if isinstance(principal, Refused):
            self._refuse(exchange, principal)
            return
        if route.kind != "messages":
            admitted = admit(principal, scope=route.scope, model=None)
            if isinstance(admitted, Refused):
                self._refuse(exchange, admitted)
                return
        exchange.route = _Accepted(route, principal)

    def request(self, exchange: Exchange) -> None:
        """Serve a request whose head was accepted."""
        accepted = exchange.route
        assert isinstance(accepted, _Accepted)
        route, principal = accepted.route, accepted.principal
        if principal is None:
            ready = route.kind == "alive" or self._is_ready()
            body = b"" if exchange.method == b"HEAD" else (b"ok\n" if ready else b"draining\n")
            exchange.respond(200 if ready else 503, b"content-type: text/plain\r\n", body)
            return
        if route.kind == "queue":
            exchange.respond(200, b"content-type: application/json\r\n", self._queue(exchange.query, principal))
            return
        received_at = self._pipeline.clock()
        body = exchange.body()
        encoding = exchange.header.get(b"content-encoding")
        if encoding is not None:
            decoded = self._decoded(exchange, body, encoding)
            if isinstance(decoded, Refused):
                self._refuse(exchange, decoded)
                return
            body = decoded
        request = ClientRequest(
            call_id=self._new_call_id(),
            body=body,
            forwarded=forwarding.request_lines(exchange.headers),
            query=exchange.query,
            received_at=received_at,
            received_at_ns=self._pipeline.now_ns(),
        )
        whose = _attribution(exchange, principal, route.label)
        if route.kind == "messages":
            self._pipeline.start(exchange, request, principal, whose)
            return
        if route is _COUNT_TOKENS:
            request = self._resolved(request)
        if principal.models and route.label == "batches" and body:
            refused = _batch_refusal(body, principal)
            if refused is not None:
                self._refuse(exchange, refused)
                return
        if route is _NEW_BATCH:
            accounts = accounts_of(principal, whose.user, whose.tier, self._pipeline.policies.budgets)
            if any(is_capped(account) for account in accounts):
                self._refuse(exchange, refusals.BATCH_WITH_BUDGET)
                return
        rewrite = None
        if route.names_results:
            rewrite = functools.partial(rewrite_results_urls, base_url=self._base_url(exchange))
        passthrough = Passthrough(
            self._pipeline,
            exchange,
            request,
            principal,
            whose,
            repeatable=route.kind == "repeatable",
            counts=route is _COUNT_TOKENS,
            rewrite=rewrite,
        )
        self._pipeline.tasks.start(passthrough.run())

    def refusal(self, exchange: Exchange | None, status: int, code: str, message: str) -> tuple[bytes, bytes]:
        """What the HTTP layer found wrong, in Anthropic's envelope."""
        error_type = errors.TYPE_BY_STATUS.get(status, "invalid_request_error" if status < 500 else "api_error")
        retry_after_s = 1.0 if status in (408, 529) else None
        answer = refusals.answer(Refused(status, error_type, code, message, retry_after_s), call_id=self._new_call_id())
        del exchange
        return answer.header_lines, answer.body

    def _resolved(self, request: ClientRequest) -> ClientRequest:
        """A token count under the model that an alias stands for; what cannot be read is Anthropic's to refuse."""
        try:
            body = self._pipeline.policies.router.resolved_body(scan(request.body))
        except InvalidBody:
            return request
        return request if body is request.body else msgspec.structs.replace(request, body=body)

    def _queue(self, query: bytes, principal: Principal) -> bytes:
        """The requests that wait for a turn: of the key's person; of a key with scope `app`, all that it sent.

        `user=` and `conversation=` of the query narrow it.
        """
        wanted = dict(parse_qsl(query.decode("latin-1"), max_num_fields=10))
        waiting = [
            QueuedCall(
                call_id=one.want.call_id,
                user=one.want.user,
                conversation=one.want.conversation,
                model=one.want.model,
                position=position,
                expected_wait_s=round(expected_s, 1),
                waited_s=round(self._pipeline.clock() - one.enqueued_at, 1),
            )
            for one, position, expected_s in self._pipeline.traffic.waiting()
            if (one.want.key_id == principal.key_id if "app" in principal.scopes else one.want.user == principal.user)
            and wanted.get("user", one.want.user) == one.want.user
            and wanted.get("conversation", one.want.conversation) == one.want.conversation
        ]
        return msgspec.json.encode({"waiting": sorted(waiting, key=lambda one: one.position)})

    def _decoded(self, exchange: Exchange, body: bytes, encoding: bytes) -> bytes | Refused:
        """The body without its content-encoding, accounted for at its true size."""
        try:
            decoded = decode_body(body, encoding, bytes_max=self._body_bytes_max)
        except BadEncoding as error:
            return refusals.bad_request(str(error), code="request_body_encoding_unsupported")
        except DecodedTooLarge as error:
            return refusals.bad_request(str(error), status=413, code="request_body_too_large_after_decoding")
        return decoded if exchange.account(len(decoded) - len(body)) else refusals.BODIES_EXHAUSTED

    def _authenticate(self, exchange: Exchange) -> Principal | Refused:
        presented = _presented_key(exchange)
        try:
            return self._keys.authenticate(presented)
        except KeysUnavailable as error:
            log.error("keys_unavailable", reason=str(error))
            return refusals.KEYS_UNAVAILABLE
        except KeyRefused:
            wait_s = self._throttle.failed(_address(exchange.peer), now=self._pipeline.clock())
            if wait_s is None:
                return refusals.INVALID_KEY
            return msgspec.structs.replace(refusals.TOO_MANY_BAD_KEYS, retry_after_s=wait_s)

    def _refuse(self, exchange: Exchange, refused: Refused, *, lines: bytes = b"") -> None:
        answer = refusals.answer(refused, call_id=self._new_call_id())
        exchange.respond(answer.status, lines + answer.header_lines, answer.body)

    def _base_url(self, exchange: Exchange) -> str:
        if self._public_url:
            return self._public_url
        return "http://" + exchange.header.get(b"host", b"").decode("latin-1")


def _address(peer: str) -> str:
    """What bad keys are counted by: an IPv4 address, or the /64 that one IPv6 client has to itself."""
    return IPv6Address(peer.partition("%")[0]).packed[:8].hex() if ":" in peer else peer


def _presented_key(exchange: Exchange) -> bytes:
    """The virtual key, from `x-api-key` or `Authorization: Bearer`; with both, the one that looks like ours."""
    api_key = exchange.header.get(b"x-api-key")
    authorization = exchange.header.get(b"authorization")
    bearer = None
    if authorization is not None and authorization[:7].lower() == b"bearer ":
        bearer = authorization[7:].strip()
    if api_key is not None and (bearer is None or api_key.startswith(b"hg_") or not bearer.startswith(b"hg_")):
        return api_key
    return bearer or b""


def _attribution(exchange: Exchange, principal: Principal, label: str) -> Attribution:
    """On whose behalf: the `x-headgate-*` headers speak for a key with scope `app`, and for no other."""
    if "app" not in principal.scopes:
        return Attribution(user=principal.user, tier=principal.tier, endpoint=label)
    return Attribution(
        user=_named(exchange, b"x-headgate-user"),
        tier=_named(exchange, b"x-headgate-tier") or principal.tier,
        endpoint=_named(exchange, b"x-headgate-endpoint") or label,
        conversation=_named(exchange, b"x-headgate-conversation"),
        deadline_s=_deadline_s(exchange.header.get(b"x-headgate-deadline-s")),
    )


def _batch_refusal(body: bytes, principal: Principal) -> Refused | None:
    """Why a batch may not be created by a key that is limited to some models; what cannot be read is refused unseen."""
    try:
        models = [scan(params).model for params in request_params(body)]
    except InvalidBody as error:
        return refusals.bad_request(str(error))
    for model in models:
        admitted = admit(principal, scope="batch", model=model)
        if isinstance(admitted, Refused):
            return admitted
    return None


def _named(exchange: Exchange, header: bytes) -> str:
    value = exchange.header.get(header)
    return "" if value is None else value.decode("utf-8", "replace")[:ATTRIBUTE_CHARS_MAX]


def _deadline_s(value: bytes | None) -> float | None:
    """Seconds, at most ten minutes; what is no positive number counts as absent."""
    try:
        seconds = float(value or b"")
    except ValueError:
        return None
    return min(seconds, _DEADLINE_S_MAX) if seconds > 0 else None
