"""Anthropic's usage and cost report: the two paths to ask, and their pages, read.

What it is: `GET /v1/organizations/usage_report/messages` (tokens) and `GET /v1/organizations/cost_report` (dollars) by
UTC day, as records. Source: platform.claude.com, manage-claude/usage-cost-api and api/admin/usage_report and
cost_report (read as of 2026-08-22).
What it is not: the asking (`cli/admin_api.py`), nor a comparison (`policy/reconciliation.py`).

Both want an admin key, lag some five minutes, and come by pages of at most 31 days. Priority Tier is in the usage
report and never in the cost report.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, TypeVar
from urllib.parse import urlencode

import msgspec

from headgate.wire.catalog import DAY_NS

ADMIN_KEY_PREFIX = "sk-ant-admin"
USAGE_PATH = "/v1/organizations/usage_report/messages"
COST_PATH = "/v1/organizations/cost_report"
DAYS_PER_PAGE = 31
"""The most that either answers at once for days."""
NANO_PER_CENT = 10**7
CENTS_MAX = 10**11
"""A billion dollars: a sum above it is an error, and sums fit 64 bits."""
TOKENS_MAX = 10**15

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_USAGE_GROUPS = ("model", "workspace_id", "service_tier", "inference_geo")
_COST_GROUPS = ("workspace_id", "description")


class ReportError(ValueError):
    """An answer that is not a page of the report. The text says where it is wrong."""


class ReportedUsage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one day, model, workspace, tier and place."""

    day: int
    """UTC days since 1970."""
    model: str
    workspace: str
    """Empty: the organization's default workspace, which has no id."""
    service_tier: str = "standard"
    """`standard`, `batch`, `priority`, `priority_on_demand`, `flex`, `flex_discount`, or one that is new."""
    inference_geo: str = ""
    """`us`, `global`, `not_available`; empty where the report does not tell."""
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    web_search_requests: int = 0


class ReportedCost(msgspec.Struct, frozen=True, gc=False):
    """Dollars of one day and workspace, for one thing."""

    day: int
    workspace: str
    nanousd: int
    """Half a nano-dollar may be lost to rounding, once an item."""
    cost_type: str = ""
    """`tokens`, `web_search`, `code_execution`, `session_usage`, or one that is new."""
    model: str = ""
    """Empty for what is not tokens."""
    token_type: str = ""
    """`uncached_input_tokens`, `cache_read_input_tokens`, `cache_creation.ephemeral_5m_input_tokens`, …_1h_…,
    `output_tokens`; empty for what is not tokens."""
    service_tier: str = ""
    description: str = ""


class UsagePage(msgspec.Struct, frozen=True):
    """A page of the usage report. `next_page` is what the next is asked with; empty: this is the last."""

    rows: tuple[ReportedUsage, ...]
    next_page: str


class CostPage(msgspec.Struct, frozen=True):
    """A page of the cost report, likewise."""

    rows: tuple[ReportedCost, ...]
    next_page: str


def usage_path(*, first_day: int, end_day: int, page: str = "") -> str:
    """Path and query for the tokens of the days [first_day, end_day)."""
    return f"{USAGE_PATH}?{_query(_USAGE_GROUPS, first_day=first_day, end_day=end_day, page=page)}"


def cost_path(*, first_day: int, end_day: int, page: str = "") -> str:
    """Path and query for the dollars of the days [first_day, end_day)."""
    return f"{COST_PATH}?{_query(_COST_GROUPS, first_day=first_day, end_day=end_day, page=page)}"


def decode_usage_page(raw: bytes) -> UsagePage:
    """A page of the usage report. Fields that are absent or null are 0 or empty. Raises ReportError."""
    page = _decode(raw, _usage_decoder)
    rows: list[ReportedUsage] = []
    for bucket in page.data:
        day = _day(bucket.starting_at, bucket.ending_at)
        for found in bucket.results:
            writes, tools = found.cache_creation or _CacheCreation(), found.server_tool_use or _ServerToolUse()
            rows.append(
                ReportedUsage(
                    day,
                    found.model or "",
                    found.workspace_id or "",
                    found.service_tier or "standard",
                    found.inference_geo or "",
                    found.uncached_input_tokens or 0,
                    found.cache_read_input_tokens or 0,
                    writes.ephemeral_5m_input_tokens or 0,
                    writes.ephemeral_1h_input_tokens or 0,
                    found.output_tokens or 0,
                    tools.web_search_requests or 0,
                )
            )
    return UsagePage(tuple(rows), _next(page.has_more, page.next_page))


def decode_cost_page(raw: bytes) -> CostPage:
    """A page of the cost report. Raises ReportError, also for another currency than dollars."""
    page = _decode(raw, _cost_decoder)
    rows: list[ReportedCost] = []
    for bucket in page.data:
        day = _day(bucket.starting_at, bucket.ending_at)
        for found in bucket.results:
            if found.currency != "USD":
                raise ReportError(f"a cost in {found.currency!r}, where there are only dollars")
            rows.append(
                ReportedCost(
                    day,
                    found.workspace_id or "",
                    _nanousd(found.amount),
                    found.cost_type or "",
                    found.model or "",
                    found.token_type or "",
                    found.service_tier or "",
                    found.description or "",
                )
            )
    return CostPage(tuple(rows), _next(page.has_more, page.next_page))


def date_text(day: int) -> str:
    """`2026-11-24` of UTC days since 1970."""
    return (_EPOCH + timedelta(days=day)).date().isoformat()


def day_of(at_ns: int) -> int:
    """UTC days since 1970 of a moment."""
    return at_ns // DAY_NS


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]


class _CacheCreation(msgspec.Struct, frozen=True):
    ephemeral_5m_input_tokens: _Tokens | None = None
    ephemeral_1h_input_tokens: _Tokens | None = None


class _ServerToolUse(msgspec.Struct, frozen=True):
    web_search_requests: _Tokens | None = None


class _UsageResult(msgspec.Struct, frozen=True):
    model: str | None = None
    workspace_id: str | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    uncached_input_tokens: _Tokens | None = None
    cache_read_input_tokens: _Tokens | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens: _Tokens | None = None
    server_tool_use: _ServerToolUse | None = None


class _UsageBucket(msgspec.Struct, frozen=True):
    starting_at: str
    ending_at: str
    results: tuple[_UsageResult, ...]


class _UsageReport(msgspec.Struct, frozen=True):
    data: tuple[_UsageBucket, ...]
    has_more: bool = False
    next_page: str | None = None


class _CostResult(msgspec.Struct, frozen=True):
    amount: str
    currency: str = "USD"
    workspace_id: str | None = None
    cost_type: str | None = None
    model: str | None = None
    token_type: str | None = None
    service_tier: str | None = None
    description: str | None = None


class _CostBucket(msgspec.Struct, frozen=True):
    starting_at: str
    ending_at: str
    results: tuple[_CostResult, ...]


class _CostReport(msgspec.Struct, frozen=True):
    data: tuple[_CostBucket, ...]
    has_more: bool = False
    next_page: str | None = None


Report = TypeVar("Report")

_usage_decoder = msgspec.json.Decoder(_UsageReport)
_cost_decoder = msgspec.json.Decoder(_CostReport)


def _query(groups: Sequence[str], *, first_day: int, end_day: int, page: str) -> str:
    fields = [
        ("starting_at", f"{date_text(first_day)}T00:00:00Z"),
        ("ending_at", f"{date_text(end_day)}T00:00:00Z"),
        ("bucket_width", "1d"),
        *(("group_by[]", name) for name in groups),
        ("limit", str(DAYS_PER_PAGE)),
    ]
    return urlencode([*fields, ("page", page)] if page else fields)


def _decode(raw: bytes, decoder: msgspec.json.Decoder[Report]) -> Report:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ReportError(f"this is no page of a report: {error}") from error


def _day(starting_at: str, ending_at: str) -> int:
    try:
        start, end = datetime.fromisoformat(starting_at), datetime.fromisoformat(ending_at)
        since, span = start - _EPOCH, end - start
    except (ValueError, TypeError, OverflowError) as error:
        raise ReportError(f"a bucket from {starting_at!r} to {ending_at!r}: {error}") from error
    if since < timedelta() or since % timedelta(days=1) or span != timedelta(days=1):
        raise ReportError(f"a bucket from {starting_at} to {ending_at}, where it must be a day of UTC")
    return since.days


def _nanousd(amount: str) -> int:
    try:
        cents = Decimal(amount)
    except InvalidOperation:
        raise ReportError(f"{amount!r} is no sum") from None
    # Credits may stand as negative sums.
    if not cents.is_finite() or abs(cents) > CENTS_MAX:
        raise ReportError(f"{amount!r} is no sum")
    return round(cents * NANO_PER_CENT)


def _next(has_more: bool, next_page: str | None) -> str:
    if has_more and not next_page:
        raise ReportError("the report has more pages and does not say where")
    return next_page or "" if has_more else ""
