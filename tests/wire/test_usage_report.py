"""Pages of Anthropic's usage and cost report: golden ones in the form of its documentation, and what is none."""

import json
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.wire.usage_report import (
    ReportedCost,
    ReportedUsage,
    ReportError,
    cost_path,
    date_text,
    day_of,
    decode_cost_page,
    decode_usage_page,
    usage_path,
)

# The forms of the examples on platform.claude.com (api/admin/usage_report, api/admin/cost_report; 2026-08-22).
USAGE = b"""{"data": [
  {"starting_at": "2025-08-01T00:00:00Z", "ending_at": "2025-08-02T00:00:00Z", "results": [
    {"uncached_input_tokens": 1500, "cache_creation": {"ephemeral_1h_input_tokens": 1000,
     "ephemeral_5m_input_tokens": 500}, "cache_read_input_tokens": 200, "output_tokens": 500,
     "server_tool_use": {"web_search_requests": 10}, "account_id": null, "api_key_id": null, "service_account_id": null,
     "workspace_id": "wrkspc_01JwQvzr7rXLA5AGx3HKfFUJ", "model": "claude-sonnet-4-20250514",
     "service_tier": "standard", "context_window": "0-200k", "inference_geo": "global"},
    {"uncached_input_tokens": 7, "cache_read_input_tokens": 0, "output_tokens": 3, "workspace_id": null,
     "model": "claude-haiku-4-5", "service_tier": "priority", "a_new_field": {"x": 1}}]},
  {"starting_at": "2025-08-02T00:00:00Z", "ending_at": "2025-08-03T00:00:00Z", "results": []}],
 "has_more": true, "next_page": "page_MjAyNS0wOC0wM1QwMDowMDowMFo="}"""
COST = b"""{"data": [{"starting_at": "2025-08-01T00:00:00Z", "ending_at": "2025-08-02T00:00:00Z", "results": [
    {"amount": "123.78912", "context_window": "0-200k", "cost_type": "tokens", "currency": "USD",
     "description": "Claude Sonnet 4 Usage - Input Tokens", "model": "claude-sonnet-4-20250514",
     "service_tier": "standard", "token_type": "uncached_input_tokens", "inference_geo": null,
     "workspace_id": "wrkspc_01JwQvzr7rXLA5AGx3HKfFUJ"},
    {"amount": "10", "cost_type": "web_search", "currency": "USD", "description": "Web Search Usage", "model": null,
     "service_tier": null, "token_type": null, "workspace_id": null}]}],
 "has_more": false, "next_page": null}"""
FIRST_OF_AUGUST = 20_301


def test_a_page_of_usage_is_read_with_every_kind_of_token() -> None:
    page = decode_usage_page(USAGE)
    assert page.next_page == "page_MjAyNS0wOC0wM1QwMDowMDowMFo="
    assert page.rows == (
        ReportedUsage(
            FIRST_OF_AUGUST,
            "claude-sonnet-4-20250514",
            "wrkspc_01JwQvzr7rXLA5AGx3HKfFUJ",
            "standard",
            "global",
            input_tokens=1_500,
            cache_read_tokens=200,
            cache_write_5m_tokens=500,
            cache_write_1h_tokens=1_000,
            output_tokens=500,
            web_search_requests=10,
        ),
        ReportedUsage(FIRST_OF_AUGUST, "claude-haiku-4-5", "", "priority", input_tokens=7, output_tokens=3),
    )


def test_a_page_of_cost_is_cents_made_nano_dollars() -> None:
    page = decode_cost_page(COST)
    assert page.next_page == ""
    tokens, searches = page.rows
    assert tokens == ReportedCost(
        FIRST_OF_AUGUST,
        "wrkspc_01JwQvzr7rXLA5AGx3HKfFUJ",
        1_237_891_200,
        "tokens",
        "claude-sonnet-4-20250514",
        "uncached_input_tokens",
        "standard",
        "Claude Sonnet 4 Usage - Input Tokens",
    )
    assert (searches.nanousd, searches.cost_type, searches.model, searches.workspace) == (
        100_000_000,
        "web_search",
        "",
        "",
    )


def changed(page: bytes, old: str, new: str) -> bytes:
    assert old.encode() in page
    return page.replace(old.encode(), new.encode(), 1)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('"123.78912"', '"much"', "no sum"),
        ('"123.78912"', '"NaN"', "no sum"),
        ('"123.78912"', '"1e30"', "no sum"),
        ('"USD"', '"EUR"', "EUR"),
        ("2025-08-02T00:00:00Z", "2025-08-01T01:00:00Z", "day of UTC"),
        ("2025-08-01T00:00:00Z", "2025-08-01T00:00:00", "bucket"),
        ("2025-08-01T00:00:00Z", "first of August", "bucket"),
        ('"has_more": false', '"has_more": true', "more pages"),
        ('"results": [', '"results": [7, ', "page of a report"),
    ],
)
def test_what_is_no_page_is_refused_with_what_is_wrong(old: str, new: str, word: str) -> None:
    with pytest.raises(ReportError, match=word):
        decode_cost_page(changed(COST, old, new))


def test_counts_below_zero_are_refused() -> None:
    with pytest.raises(ReportError, match="output_tokens"):
        decode_usage_page(changed(USAGE, '"output_tokens": 500', '"output_tokens": -1'))


@given(st.binary() | st.recursive(st.none() | st.integers() | st.text(), lambda of: st.lists(of)).map(json.dumps))
def test_whatever_comes_is_a_page_or_a_report_error(raw: bytes | str) -> None:
    for decode in (decode_usage_page, decode_cost_page):
        try:
            decode(raw if isinstance(raw, bytes) else raw.encode())
        except ReportError:
            pass


def test_the_questions_are_those_of_the_documentation() -> None:
    asked = urlsplit(usage_path(first_day=FIRST_OF_AUGUST, end_day=FIRST_OF_AUGUST + 2, page="page_x"))
    assert asked.path == "/v1/organizations/usage_report/messages"
    assert parse_qsl(asked.query) == [
        ("starting_at", "2025-08-01T00:00:00Z"),
        ("ending_at", "2025-08-03T00:00:00Z"),
        ("bucket_width", "1d"),
        *(("group_by[]", name) for name in ("model", "workspace_id", "service_tier", "inference_geo")),
        ("limit", "31"),
        ("page", "page_x"),
    ]
    asked = urlsplit(cost_path(first_day=FIRST_OF_AUGUST, end_day=FIRST_OF_AUGUST + 1))
    assert asked.path == "/v1/organizations/cost_report"
    assert ("group_by[]", "description") in parse_qsl(asked.query)
    assert "page" not in dict(parse_qsl(asked.query))


def test_days_are_those_of_utc() -> None:
    midnight_ns = FIRST_OF_AUGUST * 86_400 * 10**9
    assert [date_text(day_of(at_ns)) for at_ns in (midnight_ns - 1, midnight_ns)] == ["2025-07-31", "2025-08-01"]
