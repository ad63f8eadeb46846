"""Which header lines cross the gateway: open lists by prefix, credentials and hops never."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.gateway.forwarding import request_lines, response_lines

TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(str.encode)
VALUE = st.text("abc 0123;=/,\t", max_size=12).map(str.encode)
NEVER_SENT = [
    b"authorization",
    b"connection",
    b"content-encoding",
    b"content-length",
    b"cookie",
    b"expect",
    b"forwarded",
    b"host",
    b"keep-alive",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"via",
    b"x-api-key",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-headgate-user",
    b"x-headgate-hop",
    b"x-real-ip",
]
NAMES = st.one_of(
    st.sampled_from(NEVER_SENT),
    st.sampled_from([b"anthropic-version", b"anthropic-beta", b"x-stainless-lang", b"user-agent", b"accept"]),
    TOKEN.map(lambda token: b"anthropic-" + token),
    TOKEN,
)


def names_of(lines: bytes) -> list[bytes]:
    return [line.partition(b":")[0] for line in lines.split(b"\r\n")[:-1]]


@pytest.mark.parametrize(
    "name",
    [
        b"anthropic-version",
        b"anthropic-beta",
        b"anthropic-something-of-next-year",
        b"content-type",
        b"accept",
        b"user-agent",
        b"x-app",
        b"x-stainless-retry-count",
        b"x-claude-code-session",
        b"traceparent",
        b"tracestate",
        b"baggage",
    ],
)
def test_what_anthropic_reads_is_forwarded_as_it_came(name):
    assert request_lines([(name, b" as;It  came ")]) == name + b":  as;It  came \r\n"


@pytest.mark.parametrize("name", NEVER_SENT)
def test_credentials_hops_and_addresses_stay_behind(name):
    assert request_lines([(name, b"hg_secret")]) == b""


def test_lines_keep_their_order_and_their_number():
    headers = [(b"anthropic-beta", b"a"), (b"accept", b"x"), (b"anthropic-beta", b"b")]
    assert request_lines(headers) == b"anthropic-beta: a\r\naccept: x\r\nanthropic-beta: b\r\n"


def test_what_connection_names_is_a_hop_wherever_it_stands():
    headers = [(b"x-app", b"cli"), (b"connection", b"close, X-App , anthropic-beta"), (b"anthropic-beta", b"a")]
    assert request_lines(headers) == b""
    assert request_lines([(b"connection", b"Keep-Alive"), (b"x-app", b"cli")]) == b"x-app: cli\r\n"


@given(st.lists(st.tuples(NAMES, VALUE), max_size=12))
def test_no_set_of_headers_lets_a_credential_or_a_hop_through(headers):
    assert not set(names_of(request_lines(headers))) & set(NEVER_SENT)


@given(st.lists(st.tuples(NAMES, VALUE), max_size=12))
def test_every_anthropic_header_is_forwarded_in_order(headers):
    headers = [header for header in headers if header[0] != b"connection"]
    forwarded = [name for name in names_of(request_lines(headers)) if name.startswith(b"anthropic-")]
    assert forwarded == [name for name, _ in headers if name.startswith(b"anthropic-")]


@pytest.mark.parametrize(
    "name",
    [
        b"Connection",
        b"Content-Length",
        b"Transfer-Encoding",
        b"Content-Encoding",
        b"Keep-Alive",
        b"Set-Cookie",
        b"Strict-Transport-Security",
        b"Alt-Svc",
        b"Retry-After",
        b"retry-after-ms",
        b"X-Should-Retry",
        b"anthropic-ratelimit-requests-remaining",
        b"Anthropic-Priority-Input-Tokens-Limit",
        b"anthropic-fast-output-tokens-limit",
        b"x-headgate-call",
    ],
)
def test_what_is_between_anthropic_and_us_does_not_reach_the_client(name):
    assert response_lines([(name, b"x")]) == b""


@pytest.mark.parametrize("name", [b"request-id", b"Content-Type", b"anthropic-organization-id", b"CF-Ray", b"X-New"])
def test_every_other_line_of_an_answer_is_passed_on_as_it_came(name):
    assert response_lines([(name, b"  As it Came")]) == name + b":   As it Came\r\n"
