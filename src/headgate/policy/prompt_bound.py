"""How many tokens a prompt can have at most: what money is reserved for, where an estimate will not do.

What it is: arithmetic over a body's bytes and its estimate. What it is not: a proof. Of what lies elsewhere (a page
that a URL names, a conversation that Anthropic holds) nobody here knows the size; for those it counts what is common,
and the meter at `message_start`, where the input is exact, catches the rest.
"""

from __future__ import annotations

import re

from headgate.policy.pricing import CacheWrites

TOKENS_PER_ESTIMATED = 2
"""No prompt of text has been seen to have twice the estimated tokens; a token for each byte is the end of it."""
TOKENS_BESIDE_TEXT = 1_000
"""Of the prompt that a tool brings with it (claude-api §9: up to 804), and of the roles."""
IMAGE_TOKENS = 4_784
"""Of an image, which is scaled down to this at most (claude-api §9.1), however few bytes it has."""
BYTES_PER_PDF_TOKEN = 3
"""A page of 13 KB in base64 has some 3,000 tokens of text and its image."""
ELSEWHERE_TOKENS = 100_000
"""Of a document by URL or file, and of a conversation that Anthropic holds."""
WEB_SEARCHES = 10
"""That one answer makes, each billed: more than any has been seen to make on its own."""

_ELSEWHERE = re.compile(rb'"type"\s*:\s*"(?:url|file)"')
_SPELLED_OUT = re.compile(rb"\\u00[3-7]")
"""ASCII letters and digits as escapes: nobody writes so who has nothing to hide."""
_HELD = (b'"thread"', b'"previous_message_id"')


def prompt_tokens_max(body: bytes, estimate: int) -> int:
    """Tokens that the prompt of this request has at most. `estimate` is `token_estimate.input_tokens` of it."""
    tokens = min(len(body), estimate * TOKENS_PER_ESTIMATED) + TOKENS_BESIDE_TEXT
    # `rfind` takes half of what `in` does (measured on CPython 3.11, 17 KB).
    if body.rfind(b'"source"') >= 0:
        tokens += body.count(b'"image"') * IMAGE_TOKENS
        if b'"application/pdf"' in body:
            tokens += len(body) // BYTES_PER_PDF_TOKEN
        if b'"document"' in body:
            tokens += len(_ELSEWHERE.findall(body)) * ELSEWHERE_TOKENS
    if body.rfind(_HELD[0]) >= 0 or body.rfind(_HELD[1]) >= 0:
        tokens += ELSEWHERE_TOKENS
    return tokens


def prompt_tokens_max_of(estimate: int) -> int:
    """The same where only the estimate is left, as in the ledger."""
    return estimate * TOKENS_PER_ESTIMATED + TOKENS_BESIDE_TEXT


def cache_writes(body: bytes) -> CacheWrites:
    """The dearest write that this request can make, by its marks. Text that names one counts as one."""
    if b"\\u00" in body and _SPELLED_OUT.search(body):
        return "1h"
    if b'"cache_control"' not in body:
        return "none"
    return "1h" if b'"1h"' in body else "5m"


def web_searches_max(body: bytes) -> int:
    """Searches that are billed beside the tokens: 0 without the tool."""
    return WEB_SEARCHES if body.rfind(b'"web_search_2') >= 0 else 0
