"""GET /v1/organizations/usage_report/messages and /cost_report: the bill in the shape of the Admin API, for
reconciliation. Pure.

Docs "usage and cost API" (platform.claude.com, manage-claude/usage-cost-api, and api/admin/usage_report and
cost_report): usage in buckets of a minute, an hour or a day, cost by day in cents as a decimal string; both by pages.
Buckets begin at whole minutes, hours and days of UTC, and one without calls is there too, empty. Made of the single
lines of the bill: the last 200,000. What happened a moment ago is in it, where Anthropic's lags some five minutes.
"""

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal

from headgate.simulator.auth import DEFAULT_WORKSPACE
from headgate.simulator.bill import Line, charges
from headgate.simulator.errors import Rejected, invalid
from headgate.simulator.jsonvalue import Json, JsonObject
from headgate.simulator.limits import rfc3339
from headgate.simulator.models import Catalogue

WIDTHS_S = {"1m": 60, "1h": 3_600, "1d": 86_400}
LIMITS = {"1m": (60, 1_440), "1h": (24, 168), "1d": (7, 31)}
"""Buckets of a page: when nothing is asked, and at most."""
USAGE_GROUPS = ("api_key_id", "workspace_id", "model", "service_tier", "context_window", "inference_geo", "speed")
COST_GROUPS = ("workspace_id", "description")
LONG_CONTEXT_TOKENS = 200_000
PICO_PER_CENT = 10**10
PAGE_PREFIX = "page_"
TIMES_S_MAX = 253_402_300_800.0
"""The end of the year 9999."""

Bucket = Callable[[list[Line]], list[Json]]


def usage_report(
    lines: Iterable[Line], query: Mapping[str, Sequence[str]], organization: str, catalogue: Catalogue, now_s: float
) -> JsonObject:
    """Tokens in buckets of `bucket_width`. Rejected for a query that the API would not take."""
    width = query.get("bucket_width", ["1d"])[-1]
    if width not in WIDTHS_S:
        raise Rejected(invalid("bucket_width: Input should be '1m', '1h' or '1d'"))
    groups = _groups(query, USAGE_GROUPS)
    wanted = _filters(query)

    def results(found: list[Line]) -> list[Json]:
        by_key: dict[tuple[str | None, ...], list[Line]] = {}
        for line in found:
            facts = _facts(line, catalogue)
            if all(facts[name] in values for name, values in wanted.items()):
                by_key.setdefault(tuple(facts[name] for name in groups), []).append(line)
        return [_usage(dict(zip(groups, key, strict=True)), of_key) for key, of_key in by_key.items()]

    return _report(lines, query, organization, width=width, now_s=now_s, results=results)


def cost_report(
    lines: Iterable[Line], query: Mapping[str, Sequence[str]], organization: str, catalogue: Catalogue, now_s: float
) -> JsonObject:
    """Cost by day. Rejected for a query that the API would not take."""
    if query.get("bucket_width", ["1d"])[-1] != "1d":
        raise Rejected(invalid("bucket_width: Input should be '1d'"))
    groups = _groups(query, COST_GROUPS)

    def results(found: list[Line]) -> list[Json]:
        items: dict[tuple[str | None, ...], Decimal] = {}
        for line in found:
            workspace = _workspace(line) if "workspace_id" in groups else None
            for item, picousd in _cost_items(line, catalogue, described="description" in groups):
                items[workspace, *item] = items.get((workspace, *item), Decimal(0)) + picousd
        return [_cost(item, picousd) for item, picousd in items.items()]

    return _report(lines, query, organization, width="1d", now_s=now_s, results=results)


def _facts(line: Line, catalogue: Catalogue) -> dict[str, str | None]:
    model = catalogue.find(line.model)
    return {
        "api_key_id": None,
        "workspace_id": _workspace(line),
        "model": line.model,
        "service_tier": line.usage.service_tier,
        "context_window": _context_window(line),
        "inference_geo": line.usage.inference_geo if model is not None and model.us else "not_available",
        "speed": line.usage.speed or "standard",
    }


def _workspace(line: Line) -> str | None:
    """The default workspace of an organization has no id."""
    return None if line.workspace == DEFAULT_WORKSPACE else line.workspace


def _context_window(line: Line) -> str:
    return "200k-1M" if line.usage.prompt_tokens > LONG_CONTEXT_TOKENS else "0-200k"


def _usage(group: Mapping[str, str | None], lines: list[Line]) -> Json:
    usages = [line.usage for line in lines]
    result: JsonObject = {
        "uncached_input_tokens": sum(usage.input_tokens for usage in usages),
        "cache_creation": {
            "ephemeral_1h_input_tokens": sum(usage.write_1h_tokens for usage in usages),
            "ephemeral_5m_input_tokens": sum(usage.write_5m_tokens for usage in usages),
        },
        "cache_read_input_tokens": sum(usage.read_tokens for usage in usages),
        "output_tokens": sum(usage.output_tokens for usage in usages),
        "server_tool_use": {"web_search_requests": sum(usage.web_searches for usage in usages)},
        "account_id": None,
        "service_account_id": None,
    }
    return result | {name: group.get(name) for name in USAGE_GROUPS if name != "speed" or name in group}


def _cost_items(
    line: Line, catalogue: Catalogue, *, described: bool
) -> Iterator[tuple[tuple[str | None, ...], Decimal]]:
    """What the line adds to which item: (cost_type, token_type, model, service_tier, context_window, inference_geo,
    description), and pico-dollars, not rounded."""
    model = catalogue.find(line.model)
    assert model is not None, line.model
    for charged, picousd in charges(catalogue, model, line.usage, line.day):
        if not described:
            yield (None,) * 7, picousd
        elif charged == "web_search":
            yield ("web_search", None, None, None, None, None, "Web Search Usage"), picousd
        else:
            kind = charged.rpartition(".")[2].replace("_", " ").title().replace("Uncached ", "")
            geo = line.usage.inference_geo if model.us else "not_available"
            batch = ", Batch" if line.usage.service_tier == "batch" else ""
            described_as = f"{model.display_name} Usage - {kind}{batch}"
            facts = (charged, model.id, line.usage.service_tier, _context_window(line), geo)
            yield ("tokens", *facts, described_as), picousd


def _cost(item: tuple[str | None, ...], picousd: Decimal) -> Json:
    workspace, cost_type, token_type, model, tier, window, geo, description = item
    return {
        "currency": "USD",
        "amount": f"{(picousd / PICO_PER_CENT).normalize():f}",
        "workspace_id": workspace,
        "description": description,
        "cost_type": cost_type,
        "token_type": token_type,
        "model": model,
        "service_tier": tier,
        "context_window": window,
        "inference_geo": geo,
    }


def _report(
    lines: Iterable[Line],
    query: Mapping[str, Sequence[str]],
    organization: str,
    *,
    width: str,
    now_s: float,
    results: Bucket,
) -> JsonObject:
    """One page: the buckets from `starting_at` (or where the last page ended) that end by `ending_at`."""
    width_s = WIDTHS_S[width]
    if "starting_at" not in query:
        raise Rejected(invalid("starting_at: Field required"))
    start_s = int(_time(query["starting_at"][-1], "starting_at")) // width_s * width_s
    if "ending_at" in query:
        end_s = int(_time(query["ending_at"][-1], "ending_at")) // width_s * width_s
        if end_s <= start_s:
            raise Rejected(invalid("ending_at: must be after starting_at"))
    else:
        end_s = (int(now_s) // width_s + 1) * width_s  # up to the bucket that is filling
    if "page" in query:
        start_s = max(start_s, int(_cursor(query["page"][-1])) // width_s * width_s)
    page_end_s = min(start_s + _limit(query, width) * width_s, end_s)
    found: dict[int, list[Line]] = {}
    for line in lines:
        if line.organization == organization and start_s <= line.wall_s < page_end_s:
            found.setdefault(int(line.wall_s) // width_s * width_s, []).append(line)
    data: list[Json] = [
        {"starting_at": rfc3339(at_s), "ending_at": rfc3339(at_s + width_s), "results": results(found.get(at_s, []))}
        for at_s in range(start_s, page_end_s, width_s)
    ]
    more = start_s < page_end_s < end_s
    token = PAGE_PREFIX + base64.b64encode(rfc3339(page_end_s).encode()).decode()
    return {"data": data, "has_more": more, "next_page": token if more else None}


def _groups(query: Mapping[str, Sequence[str]], known: Sequence[str]) -> tuple[str, ...]:
    asked = query.get("group_by[]", ())
    for name in asked:
        if name not in known:
            listed = ", ".join(f"'{one}'" for one in known)
            raise Rejected(invalid(f"group_by[]: Input should be one of {listed}"))
    return tuple(name for name in known if name in asked)


def _filters(query: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    names = {
        "models[]": "model",
        "workspace_ids[]": "workspace_id",
        "service_tiers[]": "service_tier",
        "context_window[]": "context_window",
        "inference_geos[]": "inference_geo",
    }
    return {fact: query[name] for name, fact in names.items() if name in query}


def _limit(query: Mapping[str, Sequence[str]], width: str) -> int:
    default, most = LIMITS[width]
    text = query.get("limit", [str(default)])[-1]
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= most:
        raise Rejected(invalid(f"limit: Input should be between 1 and {most} for a bucket_width of {width}"))
    return int(text)


def _time(text: str, name: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
        found = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise Rejected(invalid(f"{name}: Input should be a valid datetime")) from None
    return min(max(found, 0.0), TIMES_S_MAX)


def _cursor(text: str) -> float:
    try:
        moment = base64.b64decode(text.removeprefix(PAGE_PREFIX), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise Rejected(invalid("page: Input should be the next_page of an answer")) from None
    return _time(moment, "page")
