"""GET /v1/organizations/usage_report/messages and /cost_report: the bill in the shape of the Admin API, for
reconciliation. Pure.

Docs "usage and cost API": usage by minute, hour or day, grouped by model or workspace; cost by day, in cents as a
decimal string.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal

from headgate.simulator.bill import Line
from headgate.simulator.errors import Rejected, invalid
from headgate.simulator.jsonvalue import Json, JsonObject
from headgate.simulator.limits import rfc3339

WIDTHS_S = {"1m": 60, "1h": 3_600, "1d": 86_400}
NANO_PER_CENT = 10**7


def usage_report(lines: Iterable[Line], query: Mapping[str, Sequence[str]], organization: str) -> JsonObject:
    """Tokens in buckets of `bucket_width` between `starting_at` and `ending_at`."""
    width_s = _width(query)
    groups = query.get("group_by[]", ())
    buckets: dict[int, dict[tuple[str | None, str | None, str | None], list[Line]]] = {}
    for line in _within(lines, query, organization):
        key = (
            line.model if "model" in groups else None,
            line.workspace if "workspace_id" in groups else None,
            line.usage.service_tier if "service_tier" in groups else None,
        )
        buckets.setdefault(int(line.wall_s) // width_s * width_s, {}).setdefault(key, []).append(line)
    return _pages(
        width_s,
        {
            start: [_usage(model, workspace, tier, found) for (model, workspace, tier), found in grouped.items()]
            for start, grouped in buckets.items()
        },
    )


def cost_report(lines: Iterable[Line], query: Mapping[str, Sequence[str]], organization: str) -> JsonObject:
    """Cost by day."""
    width_s = WIDTHS_S["1d"]
    days: dict[int, int] = {}
    for line in _within(lines, query, organization):
        start = int(line.wall_s) // width_s * width_s
        days[start] = days.get(start, 0) + line.cost_nanousd
    return _pages(
        width_s,
        {
            start: [{"currency": "USD", "amount": str(Decimal(cost) / NANO_PER_CENT), "description": None}]
            for start, cost in days.items()
        },
    )


def _usage(model: str | None, workspace: str | None, tier: str | None, lines: list[Line]) -> Json:
    usages = [line.usage for line in lines]
    return {
        "uncached_input_tokens": sum(usage.input_tokens for usage in usages),
        "cache_read_input_tokens": sum(usage.read_tokens for usage in usages),
        "cache_creation": {
            "ephemeral_5m_input_tokens": sum(usage.write_5m_tokens for usage in usages),
            "ephemeral_1h_input_tokens": sum(usage.write_1h_tokens for usage in usages),
        },
        "output_tokens": sum(usage.output_tokens for usage in usages),
        "server_tool_use": {"web_search_requests": sum(usage.web_searches for usage in usages)},
        "model": model,
        "workspace_id": workspace,
        "service_tier": tier,
        "api_key_id": None,
        "context_window": None,
    }


def _within(lines: Iterable[Line], query: Mapping[str, Sequence[str]], organization: str) -> Iterable[Line]:
    start_s = _time(query, "starting_at", 0.0)
    end_s = _time(query, "ending_at", float("inf"))
    return (line for line in lines if line.organization == organization and start_s <= line.wall_s < end_s)


def _width(query: Mapping[str, Sequence[str]]) -> int:
    name = query.get("bucket_width", ["1d"])[-1]
    if name not in WIDTHS_S:
        raise Rejected(invalid("bucket_width: Input should be '1m', '1h' or '1d'"))
    return WIDTHS_S[name]


def _time(query: Mapping[str, Sequence[str]], name: str, default: float) -> float:
    if name not in query:
        return default
    try:
        moment = datetime.fromisoformat(query[name][-1])
    except ValueError:
        raise Rejected(invalid(f"{name}: Input should be a valid datetime")) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _pages(width_s: int, buckets: dict[int, list[Json]]) -> JsonObject:
    data: list[Json] = [
        {"starting_at": rfc3339(start), "ending_at": rfc3339(start + width_s), "results": results}
        for start, results in sorted(buckets.items())
    ]
    return {"data": data, "has_more": False, "next_page": None}
