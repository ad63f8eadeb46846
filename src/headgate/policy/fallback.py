"""Makes a request that was written for one model fit another: the body for that other one, or why there is none.

What it is: one rule for each parameter that two models may not agree on, each read off the catalogue's facts of the
two and never off their names, and all of them applied as splices: every byte that no rule names stays as it came.
What it is not: a choice of model (`policy/routing.py`), nor a check of the request. What would be wrong for both models
passes, and Anthropic says so; of what the catalogue has no fact (images, tool types, beta headers) nothing is known
here. It serves fallback and every other change of model: a tier's better model, the arm of an experiment.

An answer may get plainer (no thinking, a lower effort, no sampling), but what a caller's program relies on is never
taken away in silence: a forced tool call, a prefill, where inference runs, a thought that is not finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import msgspec

from headgate.policy.records import Record
from headgate.wire.catalog import FOREVER_NS, Catalog, Effort, Model, Thinking, day_start_ns
from headgate.wire.message import (
    InvalidBody,
    MessageRequest,
    Span,
    Splice,
    elements,
    member_after,
    members,
    splice,
    without,
    without_elements,
)

Reason = Literal[
    "context",  # the prompt would not fit, with room for an answer
    "emptied_turn",  # a turn of thinking alone, which can be neither kept nor left out
    "forced_tool_choice",
    "inference_geo",  # the caller asked where inference runs, and the target cannot promise it
    "prefill",
    "retired_target",
    "server_state",
    "thinking_in_progress",  # a tool turn is under way, and its thoughts are bound to the model that had them
    "unknown_target",
    "unreadable",  # no request that any model would take
]

CONTEXT_SHARE = 0.9
"""Of the target's context that a prompt may fill: `input_tokens` is an estimate, and an answer needs room too."""

BUDGET_TOKENS_MIN = 1_024
"""The least `budget_tokens` that Anthropic takes (claude-api §2.1)."""

EFFORTS: tuple[Effort, ...] = get_args(Effort)
"""From the lowest to the highest."""

_PROMPT_TOKENS_MANY = 1 << 40
"""A prompt longer than any: its price is that of the highest band."""

_INSTEAD: Mapping[str, tuple[Thinking, ...]] = {
    "adaptive": ("adaptive", "disabled", "between_tools"),
    "enabled": ("enabled", "adaptive", "disabled", "between_tools"),
    "disabled": ("disabled", "between_tools"),
    "between_tools": ("between_tools", "disabled"),
}
"""What stands for a `thinking.type`, best first. A budget is never made up, so nothing becomes `enabled`."""

_THINKS = frozenset({"adaptive", "enabled"})
_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
_RESULTS = frozenset({"tool_result"})
_FORCED = frozenset({"any", "tool"})
_SAMPLING = ("temperature", "top_p", "top_k")
_CLEARS_THINKING = "clear_thinking"


class Unfit(Record, frozen=True, gc=False):
    """The request cannot go to that model; the caller gets what the first one said."""

    reason: Reason


class _Block(msgspec.Struct, frozen=True, gc=False):
    type: str


class _Turn(msgspec.Struct, frozen=True, gc=False):
    """A message, as far as it matters here."""

    role: str
    content: str | list[_Block]

    def places_of(self, types: frozenset[str]) -> set[int]:
        """Where in the content blocks of these types stand."""
        if isinstance(self.content, str):
            return set()
        return {at for at, block in enumerate(self.content) if block.type in types}


_turns = msgspec.json.Decoder(list[_Turn])
_blocks = msgspec.json.Decoder(list[_Block])
_string = msgspec.json.Decoder(str)


class _Case(Record, frozen=True, gc=False):
    """One request and the two models, as every rule reads them."""

    request: MessageRequest
    source: Model | None
    target: Model
    catalog: Catalog
    turns: list[_Turn]
    input_tokens: int
    at_ns: int
    continued: bool
    tool_choice: str
    """Its type, empty when none is given."""
    asked: str | None
    """The `thinking.type` of the request, None when it has none."""
    thinking: str | None
    """The one to be sent, None for none."""


_Change = dict[str, bytes | None]
"""Top-level fields with their new JSON; None takes a field out. Empty: nothing changes."""


def rewrite(
    request: MessageRequest,
    *,
    source: str,
    target: str,
    catalog: Catalog,
    input_tokens: int,
    at_ns: int,
    continued: bool = False,
) -> bytes | Unfit:
    """The body for `target` of a request that is valid for `source`, or why there is none. Never raises.

    Both are ids or aliases; `target` is written as it is given. Of a `source` that the catalogue does not know only
    what the target cannot take is replaced, for its defaults are not known. Where both are one model, its name is all
    that changes. `input_tokens` is the prompt's estimate, `at_ns` when the attempt starts (UTC nanoseconds).
    `continued` says that the conversation's last answer came from `target`, which then keeps the thoughts of the tool
    turn that is under way: they are its own.

    Rewriting the result again for the same target changes nothing.
    """
    to = catalog.resolve(target)
    if to is None:
        return Unfit("unknown_target")
    if at_ns >= (day_start_ns(to.retires_at) if to.retires_at else FOREVER_NS):
        return Unfit("retired_target")
    if request.uses_server_state:
        return Unfit("server_state")
    if not _given(request, "model"):
        return Unfit("unreadable")
    changes: _Change = {"model": msgspec.json.encode(target)}
    try:
        came = catalog.resolve(source)
        if came is not to:
            case = _case(request, came, to, catalog, input_tokens, at_ns, continued)
            for rule in _RULES:
                found = rule(case)
                if isinstance(found, Unfit):
                    return found
                changes |= found
        return _applied(request, changes)
    except (InvalidBody, msgspec.DecodeError):
        return Unfit("unreadable")


def is_dearer(source: str, target: str, catalog: Catalog, at_ns: int) -> bool:
    """Whether input or output of `target` has a higher standard price than of `source` at `at_ns` (UTC nanoseconds),
    for a short prompt or a long one.

    A target without a price that day is dearer than anything; a source without one is cheaper than nothing.
    """
    for prompt_tokens in (0, _PROMPT_TOKENS_MANY):
        of, than = (catalog.price_row(name, at_ns, prompt_tokens=prompt_tokens) for name in (target, source))
        if of.assumed:
            return True
        dearer = of.input_nanousd > than.input_nanousd or of.output_nanousd > than.output_nanousd
        if dearer and not than.assumed:
            return True
    return False


def _case(
    request: MessageRequest,
    source: Model | None,
    target: Model,
    catalog: Catalog,
    input_tokens: int,
    at_ns: int,
    continued: bool,
) -> _Case:
    asked = _text_of(request.raw("thinking"), "type")
    if asked is None and _given(request, "thinking"):
        raise InvalidBody("thinking.type: Field required")
    tool_choice = _text_of(request.raw("tool_choice"), "type") or ""
    return _Case(
        request=request,
        source=source,
        target=target,
        catalog=catalog,
        turns=_turns.decode(request.raw("messages") or b""),
        input_tokens=input_tokens,
        at_ns=at_ns,
        continued=continued,
        tool_choice=tool_choice,
        asked=asked,
        thinking=_thinking_to_send(asked, source, target, tool_choice),
    )


def _thinking_to_send(asked: str | None, source: Model | None, target: Model, tool_choice: str) -> str | None:
    if asked is None:
        if source is None or (source.thinking_default in _THINKS and tool_choice in _FORCED):
            # A model that is made to call a tool does not think first, and older ones refuse the two together.
            return None
        meant = _accepted(source.thinking_default, target)
        return None if meant == target.thinking_default else meant
    if asked == "enabled" and target.max_output_tokens <= BUDGET_TOKENS_MIN:
        return _accepted("disabled", target)  # no budget fits below it
    return _accepted(asked, target)


def _accepted(meant: str, target: Model) -> str | None:
    """The best of what the target takes for a type of thinking; None: its default must do. Of a type that nobody
    knows, the catalogue cannot say anything either."""
    return next((kind for kind in _INSTEAD.get(meant, ()) if kind in target.thinking), None)


# ---- the rules, one for each parameter -------------------------------------------------------------------------------


def _context(case: _Case) -> _Change | Unfit:
    """`max_tokens` is not counted: it is a bound and not a need, every model that can be called stops at the end of
    its context by itself (`model_context_window_exceeded`), and a bound lowered by an estimate would cut answers that
    fit. A context as large as the source's, in the same tokens, is not measured against an estimate either."""
    source, target = case.source, case.target
    if source and target.context_tokens >= source.context_tokens and target.tokenizer == source.tokenizer:
        return {}
    return Unfit("context") if case.input_tokens > CONTEXT_SHARE * target.context_tokens else {}


def _prefill(case: _Case) -> _Change | Unfit:
    ends_with_prefill = bool(case.turns) and case.turns[-1].role == "assistant"
    return Unfit("prefill") if ends_with_prefill and not case.target.prefill else {}


def _tool_choice(case: _Case) -> _Change | Unfit:
    return Unfit("forced_tool_choice") if case.tool_choice in _FORCED and not case.target.forced_tool_choice else {}


def _inference_geo(case: _Case) -> _Change | Unfit:
    """Models without the choice refuse the field; `global` is what they do, anything else is a promise."""
    if case.target.us_multiplier or not _given(case.request, "inference_geo"):
        return {}
    return {"inference_geo": None} if _text(case.request, "inference_geo") == "global" else Unfit("inference_geo")


def _history(case: _Case) -> _Change | Unfit:
    """Thoughts of finished turns are left out: another model's are not shown to the target, or refused, and no turn
    that is finished needs them. Those of a tool turn under way must go back as they came, to the model they came from.

    A turn of nothing but thoughts goes as a whole, for an empty one is refused; the messages around it are then of one
    role, and Anthropic reads them as one. A system message must not be left before a user's, though.
    """
    turns = case.turns
    thoughts = {at: turn.places_of(_THOUGHTS) for at, turn in enumerate(turns) if turn.role == "assistant"}
    thoughts = {at: places for at, places in thoughts.items() if places}
    under_way = _under_way(turns) if thoughts else 0
    if any(at >= under_way for at in thoughts):
        if not case.continued:
            return Unfit("thinking_in_progress")
        thoughts = {at: places for at, places in thoughts.items() if at < under_way}
    if not thoughts:
        return {}
    body, span = _whole(case.request, "messages")
    spans = elements(body, span)
    emptied = {at for at, places in thoughts.items() if len(places) == len(turns[at].content)}
    if any(at and turns[at - 1].role == "system" for at in emptied):
        return Unfit("emptied_turn")
    cuts = without_elements(body, span, emptied)
    for at, places in thoughts.items():
        if at not in emptied:
            cuts += without_elements(body, members(body, spans[at])["content"], places)
    return {"messages": splice(body, cuts)}


def _under_way(turns: list[_Turn]) -> int:
    """Where the turn begins that the next answer goes on with: its first assistant message, or the end of all.

    A user's messages continue a turn as long as they bring results of tools; several in a row are one.
    """
    begins = len(turns)
    continues: bool | None = None  # of the user's messages behind: whether one brings a result; None: there is none
    for at in range(len(turns) - 1, -1, -1):
        if turns[at].role == "user":
            continues = bool(continues) or bool(turns[at].places_of(_RESULTS))
        elif turns[at].role == "assistant":
            if continues is False:
                break
            begins, continues = at, None
    return begins


def _max_tokens(case: _Case) -> _Change | Unfit:
    maximum = case.target.max_output_tokens
    return {"max_tokens": b"%d" % maximum} if case.request.max_tokens > maximum else {}


def _thinking(case: _Case) -> _Change | Unfit:
    asked, chosen = case.asked, case.thinking
    if chosen == asked:
        return _budget(case) if chosen == "enabled" else {}
    if chosen is None:
        return {"thinking": None}
    if asked in _THINKS and chosen in _THINKS:
        # What else the object says (display, block_binding) holds for the other type as well.
        body, span = _whole(case.request, "thinking")
        kind = members(body, span)["type"]
        cuts = without(body, span, {"budget_tokens"})
        return {"thinking": splice(body, [Splice(kind.start, kind.end, msgspec.json.encode(chosen)), *cuts])}
    return {"thinking": msgspec.json.encode({"type": chosen})}


def _budget(case: _Case) -> _Change | Unfit:
    """Where `max_tokens` is lowered, half of it at most: a budget that leaves no room for the answer is worth none."""
    maximum = case.target.max_output_tokens
    if case.request.max_tokens <= maximum:
        return {}
    body, span = _whole(case.request, "thinking")
    budget = members(body, span).get("budget_tokens")
    if budget is None or not budget.of(body).isdigit() or int(budget.of(body)[:19]) <= maximum // 2:
        return {}
    lowered = max(maximum // 2, BUDGET_TOKENS_MIN)
    return {"thinking": splice(body, [Splice(budget.start, budget.end, b"%d" % lowered)])}


def _effort(case: _Case) -> _Change | Unfit:
    if not _given(case.request, "output_config"):
        return {}
    body, span = _whole(case.request, "output_config")
    value = members(body, span).get("effort")
    if value is None or value.of(body) == b"null":
        return {}
    target = case.target
    accepted = [effort for effort in EFFORTS if effort in target.efforts]
    if case.thinking == "disabled" and target.thinking_disabled_effort_max:
        accepted = [one for one in accepted if EFFORTS.index(one) <= EFFORTS.index(target.thinking_disabled_effort_max)]
    effort = _string.decode(value.of(body))
    if effort in accepted:
        return {}
    if effort not in EFFORTS or not accepted:
        rest = splice(body, without(body, span, {"effort"}))
        return {"output_config": rest if members(rest, Span(0, len(rest))) else None}
    lower = [one for one in accepted if EFFORTS.index(one) < EFFORTS.index(effort)]
    nearest = lower[-1] if lower else accepted[0]
    return {"output_config": splice(body, [Splice(value.start, value.end, msgspec.json.encode(nearest))])}


def _sampling(case: _Case) -> _Change | Unfit:
    """Thinking and sampling refuse one another, but not because of us: where a request asks to think, its sampling was
    accepted beside it, and where we ask on behalf of a source that thinks by default, that source takes none.

    `temperature` and `top_p` together are refused by models whose catalogue entry says `any`, too, so one of them goes
    whatever it says. `top_k` may stand beside either.
    """
    given = [name for name in _SAMPLING if name in case.request.fields]
    if case.target.sampling == "none":
        return dict.fromkeys(given)
    both = _given(case.request, "temperature") and _given(case.request, "top_p")
    return {"top_p": None} if both else {}


def _speed(case: _Case) -> _Change | Unfit:
    """Fast only where it was, and is, to be had: a model whose fast mode has ended runs it at the standard price, and
    the caller must not pay the fast one somewhere else."""
    if not _given(case.request, "speed") or _text(case.request, "speed") != "fast":
        return {}
    models = [case.target] if case.source is None else [case.source, case.target]
    is_fast = all(not case.catalog.price_row(model.id, case.at_ns, "fast").assumed for model in models)
    return {} if is_fast else {"speed": None}


def _context_management(case: _Case) -> _Change | Unfit:
    """The edit that clears thoughts is refused by a model that does not think."""
    thinks = (case.thinking or case.target.thinking_default) in _THINKS
    if thinks or not _given(case.request, "context_management"):
        return {}
    body, span = _whole(case.request, "context_management")
    edits = members(body, span).get("edits")
    if edits is None or edits.of(body) == b"null":
        return {}
    types = [edit.type for edit in _blocks.decode(edits.of(body))]
    clearing = {at for at, kind in enumerate(types) if kind.startswith(_CLEARS_THINKING)}
    if not clearing:
        return {}
    if len(clearing) < len(types):
        return {"context_management": splice(body, without_elements(body, edits, clearing))}
    rest = splice(body, without(body, span, {"edits"}))
    return {"context_management": rest if members(rest, Span(0, len(rest))) else None}


_RULES: tuple[Callable[[_Case], _Change | Unfit], ...] = (
    _context,
    _prefill,
    _tool_choice,
    _inference_geo,
    _history,
    _max_tokens,
    _thinking,
    _effort,
    _sampling,
    _speed,
    _context_management,
)


# ---- reading and writing ---------------------------------------------------------------------------------------------


def _applied(request: MessageRequest, changes: _Change) -> bytes:
    body, fields = request.body, request.fields
    gone = {name for name, value in changes.items() if value is None}
    edits = without(body, Span(body.index(b"{"), body.rindex(b"}") + 1), gone) if gone else []
    for name, value in changes.items():
        if value is None:
            continue
        if name in fields:
            edits.append(Splice(fields[name].start, fields[name].end, value))
        else:
            edits.append(member_after(fields["model"], name, value))
    return splice(body, edits)


def _given(request: MessageRequest, name: str) -> bool:
    """Whether a field is there and not null, which Anthropic reads as not there."""
    return request.raw(name) not in (None, b"null")


def _whole(request: MessageRequest, name: str) -> tuple[bytes, Span]:
    """A field's JSON by itself, and the span of all of it."""
    raw = request.raw(name) or b""
    return raw, Span(0, len(raw))


def _text(request: MessageRequest, name: str) -> str:
    """A field that must be a string; raises msgspec.DecodeError when it is none."""
    return _string.decode(request.raw(name) or b"")


def _text_of(raw: bytes | None, name: str) -> str | None:
    """A string inside of a field that is an object; None when either is not there."""
    if raw is None or raw == b"null":
        return None
    value = members(raw, Span(0, len(raw))).get(name)
    return None if value is None else _string.decode(value.of(raw))
