"""Cursor pages of the older endpoints (`after_id`, `before_id`, `limit`), and GET /v1/models. Pure."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import TypeVar
from urllib.parse import parse_qs

from headgate.simulator.errors import Rejected, invalid
from headgate.simulator.jsonvalue import Json, JsonObject
from headgate.simulator.models import Catalogue, Model
from headgate.simulator.validate import EFFORTS

PAGE_DEFAULT = 20
PAGE_MAX = 1_000
LIFECYCLES_SHOWN = ("active", "deprecated")

Item = TypeVar("Item")


def parameters(query: str) -> Mapping[str, Sequence[str]]:
    """Query parameters by name, all values of each."""
    return parse_qs(query)


def page(items: Mapping[str, Item], query: Mapping[str, Sequence[str]]) -> tuple[list[tuple[str, Item]], bool]:
    """One page of `items` (in their order), and whether there are more. Rejected for a limit out of 1…1000."""
    text = query.get("limit", [str(PAGE_DEFAULT)])[-1]
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= PAGE_MAX:
        raise Rejected(invalid(f"limit: Input should be between 1 and {PAGE_MAX}"))
    limit = int(text)
    entries = list(items.items())
    keys = list(items)
    if "before_id" in query:
        cursor = query["before_id"][-1]
        end = keys.index(cursor) if cursor in items else 0
        return entries[max(0, end - limit) : end], end > limit
    start = 0
    if "after_id" in query:
        cursor = query["after_id"][-1]
        start = keys.index(cursor) + 1 if cursor in items else len(keys)
    return entries[start : start + limit], start + limit < len(keys)


def page_body(ids: Sequence[str], data: list[Json], has_more: bool) -> JsonObject:
    """The envelope of a page."""
    return {
        "data": data,
        "has_more": has_more,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


def list_models(catalogue: Catalogue, query: Mapping[str, Sequence[str]]) -> JsonObject:
    """GET /v1/models: newest first; retired models only when `lifecycle[]` asks."""
    lifecycles = query.get("lifecycle[]") or query.get("lifecycle") or LIFECYCLES_SHOWN
    models = sorted(catalogue.models, key=lambda model: model.released, reverse=True)
    shown = {model.id: model for model in models if model.lifecycle in lifecycles}
    entries, more = page(shown, query)
    return page_body([name for name, _ in entries], [model_info(model) for _, model in entries], more)


def model_info(model: Model) -> JsonObject:
    """One model as the models endpoint shows it."""
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.display_name,
        "created_at": _time(model.released),
        "lifecycle": model.lifecycle,
        "deprecated_at": _time(model.deprecated_at),
        "retires_at": _time(model.retires_at),
        "line": model.line,
        "max_input_tokens": model.context_tokens,
        "max_tokens": model.output_tokens_max,
        "capabilities": _capabilities(model),
    }


def _capabilities(model: Model) -> JsonObject:
    efforts: JsonObject = {name: _supported(name in model.effort) for name in EFFORTS}
    kinds: JsonObject = {
        name: _supported(name in model.thinking) for name in ("adaptive", "between_tools", "disabled", "enabled")
    }
    recent = model.tokenizer == "new" or model.us
    return {
        "batch": _supported(True),
        "citations": _supported(True),
        "code_execution": _supported(recent),
        "context_management": {
            "supported": True,
            "clear_thinking_20251015": _supported(True),
            "clear_tool_uses_20250919": _supported(True),
            "compact_20260112": _supported(recent),
        },
        "effort": {"supported": bool(model.effort), **efforts},
        "image_input": _supported(True),
        "pdf_input": _supported(True),
        "server_tools": {"supported": True, "code_execution": _supported(True), "web_search": _supported(True)},
        "structured_outputs": _supported(True),
        "thinking": {"supported": set(model.thinking) != {"disabled"}, "types": kinds},
    }


def _supported(value: bool) -> JsonObject:
    return {"supported": value}


def _time(day: date | None) -> Json:
    return f"{day}T00:00:00Z" if day is not None else None
