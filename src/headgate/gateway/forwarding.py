"""Which header lines cross the gateway, in either direction. Open lists by prefix; credentials and hops never.

Pure: lines in, lines out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Headers = Iterable[tuple[bytes, bytes]]

_NAMES_MAX = 1024

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
        # Credentials: an edge or a debugging proxy that echoes what it was sent would hand our key on.
        b"authorization",
        b"proxy-authorization",
        b"x-api-key",
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


class _Verdicts(dict[bytes, bytes | None]):
    """Name to what its line begins with (`name: `), or None for one that stays behind.

    Clients and Anthropic send the same few names over and over; each is judged once. Bounded, since a name is chosen by
    whoever sends it: what does not fit is judged each time.
    """

    def __init__(self, passes: Callable[[bytes], bool]) -> None:
        super().__init__()
        self._passes = passes

    def __missing__(self, name: bytes) -> bytes | None:
        verdict = name + b": " if self._passes(name.lower()) else None
        if len(self) < _NAMES_MAX:
            self[name] = verdict
        return verdict


def _goes_upstream(name: bytes) -> bool:
    return name in _FORWARDED or name.startswith(_FORWARDED_PREFIXES)


def _goes_back(name: bytes) -> bool:
    return name not in _KEPT_BACK and not name.startswith(_KEPT_BACK_PREFIXES)


_upstream_verdicts = _Verdicts(_goes_upstream)
_back_verdicts = _Verdicts(_goes_back)


def request_lines(headers: Headers) -> bytes:
    """The lines of a client's head that Anthropic gets, `name: value\\r\\n` each; `headers` have lower-case names."""
    return _lines(headers, _upstream_verdicts)


def response_lines(headers: Headers) -> bytes:
    """The lines of Anthropic's head that the client gets, as they were; `headers` have names in any case."""
    return _lines(headers, _back_verdicts)


def _lines(headers: Headers, verdicts: _Verdicts) -> bytes:
    """The lines that pass. What `Connection` names is hop-by-hop by definition and stays behind."""
    hop: set[bytes] = set()
    lines = []
    for name, value in headers:
        begin = verdicts[name]
        if begin is not None:
            lines.append(begin + value + b"\r\n")
        elif name.lower() == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            hop.update(token.strip().lower() for token in value.split(b","))
    if hop:
        lines = [line for line in lines if line.partition(b":")[0].lower() not in hop]
    return b"".join(lines)
