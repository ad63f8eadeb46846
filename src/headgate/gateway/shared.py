"""What all calls of a process share: settings in force, limits, money, caches, the ledger and the way to Anthropic.

What it is: a place to hold them, made in `app.py`. What it is not: the path of a call (`pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headgate.gateway.answer_reuse import AnswerReuse
from headgate.gateway.policies import Policies
from headgate.gateway.prompt_caching import PromptCaching
from headgate.gateway.purse import Purses
from headgate.gateway.settings import Settings
from headgate.gateway.settlement import Accounts
from headgate.gateway.tasks import Tasks
from headgate.gateway.traffic import Traffic
from headgate.gateway.upstream import Upstream
from headgate.policy.forecast import Forecaster
from headgate.policy.retry import RetryBudget
from headgate.policy.stickiness import Stickiness
from headgate.storage.interfaces import Ledger
from headgate.telemetry.log_line import LogLine
from headgate.telemetry.timestamp import Timestamps
from headgate.wire.catalog import Catalog

_OTHER_CLASS = "other"
"""The class of all models that the catalogue does not know: a name that a client made up gets no limits of its own."""


class LiveCall(Protocol):
    """A call that is being worked on."""

    def tick(self, now: float) -> None:
        """Called a few times a second."""

    def interrupt(self) -> None:
        """The process ends before the answer does."""


class Shared:
    """`live` are the calls that are being worked on, by id.

    `policies` is swapped whole when the settings are read again: a call keeps those it began with.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        policies: Policies,
        traffic: Traffic,
        purses: Purses,
        caching: PromptCaching,
        reuse: AnswerReuse | None,
        upstream: Upstream,
        ledger: Ledger,
        catalog: Catalog,
        put_log_line: Callable[[LogLine], None],
        tasks: Tasks,
        clock: Callable[[], float],
        now_ns: Callable[[], int],
        jitter: Callable[[], float],
        upstream_head: bytes,
        fingerprint_key: bytes,
    ) -> None:
        self.settings = settings
        self.policies = policies
        self.traffic = traffic
        self.purses = purses
        self.caching = caching
        self.reuse = reuse
        """None where no endpoint wants answers again."""
        self.upstream = upstream
        self.ledger = ledger
        self.catalog = catalog
        self.accounts = Accounts(ledger, catalog)
        self.put_log_line = put_log_line
        self.tasks = tasks
        self.clock = clock
        self.now_ns = now_ns
        self.jitter = jitter
        self.upstream_head = upstream_head
        """The header lines that every request to Anthropic begins with, the key among them."""
        self.fingerprint_key = fingerprint_key
        """Makes a request's fingerprint one that only this process can tell."""
        self.retry_budget = RetryBudget()
        self.forecaster = Forecaster()
        self.stickiness = Stickiness()
        self.timestamps = Timestamps()
        self.live: dict[str, LiveCall] = {}
        self.in_background = 0

    def class_id(self, model: str) -> str:
        """The class whose limits at Anthropic a model shares."""
        known = self.catalog.resolve(model)
        return known.rate_class if known is not None else _OTHER_CLASS
