"""Remembers which fallback a conversation went on with, so that it stays there for a while.

Thinking blocks and caches are bound to their model: a conversation that goes back and forth pays for both each time
(claude-api §2.5). It goes home after a pause as long as the cache lives, when there is nothing left to lose.

Pure, of bounded memory, for one process: several workers may remember differently, which costs a cache and no more.
"""

from __future__ import annotations

from collections import OrderedDict

STICKS_S = 300.0
CONVERSATIONS_MAX = 10_000


class Stickiness:
    """Conversations on a fallback. A conversation is named by whose it is and its own name."""

    __slots__ = ("_models",)

    def __init__(self) -> None:
        self._models: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._models)

    def model_of(self, user: str, conversation: str, now: float) -> str:
        """The model that the conversation went on with; empty when it may go to its own."""
        known = self._models.get((user, conversation))
        if known is None:
            return ""
        if known[1] <= now:
            del self._models[user, conversation]
            return ""
        return known[0]

    def served(self, user: str, conversation: str, model: str, now: float) -> None:
        """A fallback answered in this conversation."""
        key = (user, conversation)
        self._models.pop(key, None)
        if len(self._models) >= CONVERSATIONS_MAX:
            self._models.popitem(last=False)
        self._models[key] = (model, now + STICKS_S)
