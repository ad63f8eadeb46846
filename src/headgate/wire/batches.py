"""Message Batches as they pass: where an answer names the URL of a batch's results.

The URL is absolute and Anthropic's, and an SDK follows it with the client's own credential (claude-api §8), so it has
to lead back to the gateway.
"""

from __future__ import annotations

import msgspec

from headgate.wire.message import InvalidBody, Splice, elements, members, scan, splice

REQUESTS_MAX = 10_000
"""Of a batch that is looked into, which happens on the loop; others may have all that Anthropic takes."""
_PATH = "/v1/messages/batches/"
_string = msgspec.json.Decoder(str)


def rewrite_results_urls(body: bytes, base_url: str) -> bytes:
    """The answer with every `results_url`, of one batch or of a list, moved to `base_url`; other bytes untouched.

    `base_url` is `scheme://host[:port]`. A body that is no batch is returned as it is.
    """
    try:
        answer = scan(body)
        batches = [answer.fields]
        data = answer.fields.get("data")
        if data is not None and body[data.start] == ord("["):
            batches += [members(body, one) for one in elements(body, data) if body[one.start] == ord("{")]
    except InvalidBody:
        return body
    splices = []
    for batch in batches:
        url = batch.get("results_url")
        if url is not None and (moved := _moved(url.of(body), base_url)) is not None:
            splices.append(Splice(url.start, url.end, moved))
    return splice(body, splices)


def request_params(body: bytes) -> list[bytes]:
    """The `params` of every request of a batch that is to be created. Raises InvalidBody when it is no such body."""
    requests = scan(body).fields.get("requests")
    if requests is None or body[requests.start] != ord("["):
        raise InvalidBody("requests: Input should be a valid list")
    found = []
    spans = elements(body, requests)
    if len(spans) > REQUESTS_MAX:
        raise InvalidBody(f"requests: at most {REQUESTS_MAX} in a batch of a key that is limited to some models")
    for request in spans:
        params = members(body, request).get("params")
        if params is None:
            raise InvalidBody("requests: params: Field required")
        found.append(params.of(body))
    return found


def _moved(raw: bytes, base_url: str) -> bytes | None:
    """The JSON string with its origin replaced; None when it is null or leads to something else."""
    if not raw.startswith(b'"'):
        return None
    url = _string.decode(raw)
    at = url.find(_PATH)
    return None if at < 0 else msgspec.json.encode(base_url + url[at:])
