"""Decides which models a request is sent to, in which order, and how long it may wait.

What it is: names resolved (alias, endpoint's model, tier's model, arm of an experiment), the models that may answer
instead, and the body for the first of them. What it is not: permission to ask at all (`admission.py`), what a body must
lose for another model (`fallback.py`), or whether a model is well (`breaker.py`).
"""

from __future__ import annotations

import msgspec

from headgate.policy.experiments import Deal, Experiment, arm_label
from headgate.policy.fallback import Unfit, is_dearer, rewrite
from headgate.policy.records import Plan, Record
from headgate.policy.token_estimate import input_tokens
from headgate.wire.catalog import Catalog, Model, day_start_ns
from headgate.wire.message import InvalidBody, MessageRequest, Splice, splice

DEFAULT_ALIAS = "default"
"""The alias that always exists: whatever `CLAUDE_MODEL` says."""
DEFAULT_TIER = "free"
"""Whose numbers and model hold for a tier that nobody has named in the settings."""
MODEL_CHARS_MAX = 256
"""Of a model's name: it goes into headers, rows and log lines."""


class RoutingRules(msgspec.Struct, frozen=True):
    """What the settings say about routing. They have been checked: models exist, aliases lead to models."""

    default_model: str
    fallback: str = ""
    """Answers for a model without a list of its own; empty: none."""
    fallbacks: dict[str, tuple[str, ...]] = {}
    aliases: dict[str, str] = {}
    endpoints: dict[str, str] = {}
    """By the label of a request, its model."""
    tier_models: dict[str, str] = {}
    """Of every tier, its model; empty: the default model."""
    experiments: tuple[Experiment, ...] = ()


class _Chain(Record, frozen=True, gc=False):
    """A model with those that may answer instead of it."""

    models: tuple[str, ...]
    """The model, then those that are never dearer, whatever the day."""
    candidates: tuple[str, ...] = ()
    """All that may answer, where one of them is dearer on some days and not on others; else none."""


class _Choice(Record, frozen=True, gc=False):
    """Where a request goes first."""

    model: str
    body: bytes
    arm: str = ""
    reasons: tuple[str, ...] = ()


class _Names:
    """Models by all of their names: an id and its aliases are one model."""

    __slots__ = ("_canonical", "catalog")

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._canonical = {name: model.id for model in catalog.models for name in (model.id, *model.aliases)}

    def one_of(self, model: str) -> str:
        """One name for all names of a model; a model that the catalogue does not know has only its own."""
        return self._canonical.get(model, model)

    def are_one(self, model: str, other: str) -> bool:
        """Whether both name the same model."""
        return model == other or self.one_of(model) == self.one_of(other)

    def may_use(self, principal_models: tuple[str, ...], model: str) -> bool:
        """Whether a key that is limited to these models (none: to nothing) may use this one."""
        if not principal_models or model in principal_models:
            return True
        return any(self.are_one(allowed, model) for allowed in principal_models)


class _Fitting:
    """One request on its way to a model other than it asked for: the bodies for those that were tried."""

    __slots__ = ("_at_ns", "_bodies", "_names", "_request", "_tokens", "body", "model", "principal_models")

    def __init__(
        self,
        names: _Names,
        request: MessageRequest,
        model: str,
        body: bytes,
        principal_models: tuple[str, ...],
        tokens: int,
        at_ns: int,
    ) -> None:
        self._names = names
        self._request = request
        self.model = model
        self.body = body
        self.principal_models = principal_models
        self._tokens = tokens
        self._at_ns = at_ns
        self._bodies: dict[str, bytes | Unfit] = {}

    def body_for(self, target: str) -> bytes | Unfit | None:
        """The request as this model takes it; None where the key may not use the model."""
        if not self._names.may_use(self.principal_models, target):
            return None
        if self._names.are_one(target, self.model):
            return self.body
        body = self._bodies.get(target)
        if body is None:
            body = self._bodies[target] = rewrite(
                self._request,
                source=self.model,
                target=target,
                catalog=self._names.catalog,
                input_tokens=self._tokens,
                at_ns=self._at_ns,
                # The same rule sent the turns before to the same model: a turn under way goes on with its own thoughts.
                continued=True,
            )
        return body

    def name_of(self, target: str) -> str:
        """What the body calls it: a model that was asked for by another of its names keeps that one."""
        return self.model if self._names.are_one(target, self.model) else target


class Router:
    """The rules, ready to be asked. Immutable: new rules make a new one."""

    __slots__ = (
        "_aliases",
        "_chains",
        "_deals",
        "_default",
        "_endpoints",
        "_names",
        "_tier_models",
        "_unnamed_tier_model",
    )

    def __init__(self, rules: RoutingRules, catalog: Catalog) -> None:
        names = self._names = _Names(catalog)
        self._aliases = rules.aliases | {DEFAULT_ALIAS: rules.default_model}
        self._default = names.one_of(rules.default_model)
        self._endpoints = dict(rules.endpoints)
        self._tier_models = dict(rules.tier_models)
        self._unnamed_tier_model = rules.tier_models.get(DEFAULT_TIER, "")
        self._deals = {(names.one_of(one.model), one.endpoint): Deal(one) for one in rules.experiments}
        fallbacks = {names.one_of(model): models for model, models in rules.fallbacks.items()}
        everywhere = (rules.fallback,) if rules.fallback else ()
        self._chains = {
            name: self._chain(name, model, fallbacks.get(model.id, everywhere))
            for model in catalog.models
            for name in (model.id, *model.aliases)
        }

    def resolve(self, model: str) -> str:
        """The model that a name stands for: what a key must be allowed to use. A name that is no alias is a model's."""
        return self._aliases.get(model, model)

    def resolved_body(self, request: MessageRequest) -> bytes:
        """The request with the model's name for an alias, and nothing else changed. Raises InvalidBody."""
        asked = request.model
        model = self._aliases.get(asked)
        return request.body if model is None else _renamed(request, model)

    def route(
        self,
        request: MessageRequest,
        *,
        principal_models: tuple[str, ...],
        tier: str,
        endpoint: str,
        conversation: str,
        user: str,
        received_at: float,
        at_ns: int,
        deadline_s: float,
    ) -> Plan:
        """What we mean to do with this request.

        `principal_models` are those the key may use, empty: all; `at_ns` is when it came (UTC nanoseconds), for prices
        change. `Plan.model_asked` is the name in the body; `models[0]` is what `Plan.body` is for, the others are what
        may answer instead, best first. Raises InvalidBody when it names no model or `stream` is no boolean.
        """
        models: tuple[str, ...]
        asked = request.model
        if len(asked) > MODEL_CHARS_MAX:
            raise InvalidBody(f"model: String should have at most {MODEL_CHARS_MAX} characters")
        model, body, arm = asked, request.body, ""
        reasons: tuple[str, ...] = ()
        if asked in self._aliases:
            model = self._aliases[asked]
            body, reasons = _renamed(request, model), (f"alias:{asked}",)
        tokens = input_tokens(request)
        chain = self._chains.get(model)
        if request.uses_server_state:
            # What it needs lies with Anthropic, under this model: nobody else can answer.
            models = (model,)
            reasons += ("server_state",)
        else:
            tier_model = self._tier_models.get(tier, self._unnamed_tier_model)
            if self._deals or tier_model or endpoint in self._endpoints:
                fitting = _Fitting(self._names, request, model, body, principal_models, tokens, at_ns)
                choice = self._choose(fitting, tier, tier_model, endpoint, conversation or user)
                model, body, arm = choice.model, choice.body, choice.arm
                reasons += choice.reasons
                chain = self._chains.get(model)
            if chain is None:
                models = (model,)  # nobody knows what it costs or takes
            elif principal_models or chain.candidates:
                models = self._for_key(chain, principal_models, at_ns)
            else:
                models = chain.models
        return Plan(
            models=models,
            body=body,
            streamed=request.stream,
            input_tokens_estimate=tokens,
            max_tokens=request.max_tokens,
            deadline=received_at + deadline_s,
            arm=arm,
            reasons=reasons,
            model_asked=asked,
        )

    def _choose(self, fitting: _Fitting, tier: str, tier_model: str, endpoint: str, unit: str) -> _Choice:
        """The endpoint's model, else the tier's; then the arm of an experiment on what was found."""
        choice = _Choice(fitting.model, fitting.body)
        label_model = self._endpoints.get(endpoint)
        if label_model is not None and self._names.may_use(fitting.principal_models, label_model):
            choice = self._moved(fitting, label_model, f"endpoint:{endpoint}")
        elif tier_model and self._names.one_of(fitting.model) == self._default:
            choice = self._moved(fitting, tier_model, f"tier:{tier}")
        if not self._deals or not unit:
            return choice
        same = self._names.one_of(choice.model)
        deal = self._deals.get((same, endpoint)) or self._deals.get((same, ""))
        return choice if deal is None else self._dealt(fitting, choice, deal, unit)

    def _moved(self, fitting: _Fitting, target: str, reason: str) -> _Choice:
        """The request at another model; where it started, when the key or the body forbids."""
        body = fitting.body_for(target)
        if body is None:
            return _Choice(fitting.model, fitting.body)
        if isinstance(body, Unfit):
            return _Choice(fitting.model, fitting.body, reasons=(f"unfit:{target}:{body.reason}",))
        return _Choice(fitting.name_of(target), body, reasons=(reason,))

    def _dealt(self, fitting: _Fitting, choice: _Choice, deal: Deal, unit: str) -> _Choice:
        """The unit's arm. A request that one of the arms could not take has none: the others would get the hard ones,
        and seem the worse for it."""
        bodies = {}
        for arm in deal.arms:
            body = fitting.body_for(arm.model)
            if body is None:
                return choice
            if isinstance(body, Unfit):
                reason = f"no_arm:{deal.experiment.name}:{arm.model}:{body.reason}"
                return msgspec.structs.replace(choice, reasons=(*choice.reasons, reason))
            bodies[arm.name] = body
        arm = deal.arm_of(unit)
        label = arm_label(deal.experiment.name, arm.name)
        return _Choice(fitting.name_of(arm.model), bodies[arm.name], label, (*choice.reasons, f"arm:{label}"))

    def _for_key(self, chain: _Chain, principal_models: tuple[str, ...], at_ns: int) -> tuple[str, ...]:
        """A model with those that may answer instead, for this key on this day."""
        model, *others = chain.models
        if chain.candidates:
            catalog = self._names.catalog
            others = [one for one in chain.candidates if not is_dearer(model, one, catalog, at_ns)]
        return (model, *(one for one in others if self._names.may_use(principal_models, one)))

    def _chain(self, name: str, model: Model, candidates: tuple[str, ...]) -> _Chain:
        others = tuple(one for one in candidates if not self._names.are_one(one, model.id))
        verdicts = {one: self._is_dearer_ever(model, one) for one in others}
        varying = {True, False} in verdicts.values()
        cheap = tuple(one for one in others if verdicts[one] == {False})
        return _Chain((name, *cheap), others if varying else ())

    def _is_dearer_ever(self, source: Model, target: str) -> set[bool]:
        """Every answer to whether `target` is the dearer one, over all days on which both can be asked."""
        other = self._names.catalog.resolve(target)
        assert other is not None, target
        both_from = max(source.released, other.released)
        days = {both_from}
        for row in (*source.prices, *other.prices):
            days |= {day for day in (row.effective_from, row.effective_to) if day is not None and day > both_from}
        return {is_dearer(source.id, other.id, self._names.catalog, day_start_ns(day)) for day in days}


def _renamed(request: MessageRequest, model: str) -> bytes:
    span = request.fields["model"]
    return splice(request.body, [Splice(span.start, span.end, msgspec.json.encode(model))])
