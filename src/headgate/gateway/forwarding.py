"""Which header lines cross the gateway, in either direction. Open lists by prefix; credentials and hops never.

Pure: lines in, lines out.
"""

from __future__ import annotations

from collections.abc import Iterable

Headers = Iterable[tuple[bytes, bytes]]

_FORWARDED = frozenset({b"content-type", b"accept", b"user-agent", b"x-app", b"traceparent", b"tracestate", b"baggage"})
_FORWARDED_PREFIXES = (b"anthropic-", b"x-stainless-", b"x-claude-code-")

_KEPT_BACK = frozenset(
    {
        # Framing and hop-by-hop: this hop has its own. Bodies are decoded before they go on.
        b"connection",
        b"content-encoding",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        # Of Anthropic's edge, meant for us and not for our clients.
        b"alt-svc",
        b"set-cookie",
        b"strict-transport-security",
        # Advice that the gateway gives in its own words where it gives up.
        b"retry-after",
        b"retry-after-ms",
        b"x-should-retry",
    }
)
_KEPT_BACK_PREFIXES = (b"anthropic-ratelimit-", b"anthropic-priority-", b"anthropic-fast-", b"x-headgate-")


def request_lines(headers: Headers) -> bytes:
    """The lines of a client's head that Anthropic gets, `name: value\\r\\n` each, names in lower case.

    `headers` have lower-case names. What `Connection` names is hop-by-hop by definition and stays behind.
    """
    lines = []
    hop: frozenset[bytes] = frozenset()
    for name, value in headers:
        if name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            hop |= {token.strip().lower() for token in value.split(b",")}
        elif name in _FORWARDED or name.startswith(_FORWARDED_PREFIXES):
            lines.append((name, value))
    return b"".join([b"%b: %b\r\n" % line for line in lines if line[0] not in hop])


def response_lines(headers: Headers) -> bytes:
    """The lines of Anthropic's head that the client gets, as they were; `headers` have names in any case."""
    return b"".join(
        [
            b"%b: %b\r\n" % (name, value)
            for name, value in headers
            if (lower := name.lower()) not in _KEPT_BACK and not lower.startswith(_KEPT_BACK_PREFIXES)
        ]
    )
