"""The requests that are sent: an app's short question, and a long system prompt with a conversation.

The text is made here, the same on every machine. Its last message holds 12 zeros, which the load generator overwrites
with the number of the request, so that no two bodies are equal and no gateway answers from memory.
"""

import json
from pathlib import Path

from gateways import MODEL

SMALL_BYTES = 1024
LARGE_BYTES = 17_600
LARGE_SYSTEM_BYTES = 14_500

_RULES = (
    "You are the support assistant of an online shop for household goods. Answer in the customer's language, in at "
    "most three short paragraphs, and never promise a refund that the policy below does not grant. When a question "
    'needs a person, say so and give the ticket queue in quotes, e.g. "returns" or "billing".\n\n# Policy\n'
)
_ARTICLES = (
    "{n}. Orders above ${a} ship free within {d} working days; express costs ${b}. The carrier is told about the lift, "
    "the floor and the hours given at checkout, and a missed delivery is tried {t} times before it goes back.\n",
    "{n}. A product returned within {d} days, unused and in its box, is refunded in full to the card that paid. "
    '"Unused" means that the seals are intact; for goods above ${a} a photo of the serial number is asked for first.\n',
    "{n}. The warranty on motors is {t} years and on batteries {d} months. Spare parts are listed under the product's "
    "number; where a part costs more than ${b}, offer the exchange unit instead, and note it in the ticket.\n",
    "{n}. Invoices can be corrected within {d} days. Never read out a full address or card number; the last four "
    "digits and the postcode are enough, and after {t} failed checks the conversation goes to the security queue.\n",
)
_TURNS = (
    "Hello, I ordered the steam iron on the 3rd and the box arrived open. Is the seal part of the warranty?",
    "Thank you for telling us. An open box counts as a transport damage, so the seal does not matter here. Please send "
    'a photo of the label; I have opened a ticket in "returns", and the exchange unit leaves as soon as it is there.',
    "The photo is attached. Will the courier come to the third floor? Last time the parcel went back to the depot.",
    "It is noted: third floor, no lift, after 17:00. If nobody is at home, the carrier tries again the next day.",
)
_QUESTION = "And if I would rather have the money back, how long does that take? My reference is 000000000000."


def _policy(size: int) -> str:
    text, n = _RULES, 0
    while len(text) < size:
        n += 1
        article = _ARTICLES[n % len(_ARTICLES)]
        text += article.format(n=n, a=20 + n * 7 % 90, b=3 + n * 5 % 17, d=2 + n * 3 % 28, t=1 + n % 3)
    return text[:size]


def _body(system: str, turns: list[str], *, stream: bool, size: int) -> bytes:
    """Padded to the size by what a customer would write before the question."""
    padding = ""
    while True:
        texts = [*turns, f"{padding}\n\n{_QUESTION}"]
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
        request = {"model": MODEL, "max_tokens": 1024, "stream": stream, "system": system, "messages": messages}
        body = json.dumps(request, separators=(",", ":")).encode()
        if len(body) >= size:
            return body
        filler = "I have been a customer for years and never had such a long wait before. "
        padding += filler[: size - len(body)]


def make_body(name: str) -> bytes:
    if name == "large":
        return _body(_policy(LARGE_SYSTEM_BYTES), list(_TURNS), stream=False, size=LARGE_BYTES)
    return _body(_RULES, [], stream=name == "stream", size=SMALL_BYTES)


class Bodies:
    """The three requests for one gateway as files: small (1 KB), large (17.6 KB), stream (the small one, streamed)."""

    def __init__(self, folder: Path, *, port: int, key: str) -> None:
        self._folder = folder
        for name in ("small", "large", "stream"):
            body = make_body(name)
            head = (
                f"POST /v1/messages HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
                f"x-api-key: {key}\r\nanthropic-version: 2023-06-01\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            self.path(name).write_bytes(head.encode() + body)

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.http"
