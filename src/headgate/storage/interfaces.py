"""What the services ask of storage, as protocols. Adapters live beside this file, one topic each."""

from __future__ import annotations

from typing import Protocol

from headgate.policy.records import LedgerEvent, Principal


class LedgerUnavailable(Exception):
    """The data directory cannot be written: no new call may leave. Says which path and why."""


class KeyRefused(Exception):
    """A presented key does not open the door. `reason` is for the log, never for the client: it sees one text."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class KeysUnavailable(Exception):
    """The key store could not be read for longer than a minute: nobody can be let in (answer 503)."""


class Ledger(Protocol):
    """Two ledgers of one truth: an append-only journal, folded into a database by a writer thread."""

    def write(self, *events: LedgerEvent) -> None:
        """Append the events in one `write(2)`, in this order; they survive a `kill -9` when it returns.

        Raises LedgerUnavailable when an event that opens a call or an attempt cannot be written. Events that end one
        are kept in memory and written as soon as the disk takes them: what was paid is never forgotten.
        """

    async def durable(self) -> None:
        """Return once all that was written also survives a power loss; at once unless `ledger.durability = "power"`."""


class KeyRing(Protocol):
    """Virtual keys in memory, refreshed from the store."""

    def authenticate(self, presented: bytes) -> Principal:
        """Who owns this key. Constant time in the secret, the same path for an unknown id.

        Raises KeyRefused (unknown, wrong, revoked, expired) and KeysUnavailable.
        """
