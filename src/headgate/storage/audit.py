"""The audit: who changed what, in rows of which each holds the digest of the one before.

What it is: how a row is added, in the transaction of what it tells, and how the chain is checked.
What it is not: what is worth a row. Whoever changes a key, a price or an alert by hand says so.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from headgate.storage.tables import audit

Action = Literal["create", "revoke", "rotate", "reprice", "reconcile", "release"]

_CONTENT = ("at_ns", "actor", "action", "key_id", "before", "after")


def add_audit(
    connection: sa.Connection,
    *,
    at_ns: int,
    actor: str,
    action: Action,
    key_id: str = "",
    before: bytes = b"",
    after: bytes = b"",
) -> None:
    """Add a row. `before` and `after` are JSON, empty where there was nothing; `key_id` is empty where no key changed.

    The connection must hold the write lock (`begin_write`): two rows that follow the same one would break the chain.
    """
    previous = connection.execute(sa.select(audit.c.digest).order_by(audit.c.id.desc()).limit(1)).scalar()
    content = (at_ns, actor, action, key_id, before.decode(), after.decode())
    values = dict(zip(_CONTENT, content, strict=True))
    connection.execute(sa.insert(audit).values(**values, digest=_digest(previous or b"", content)))


def broken_at(connection: sa.Connection) -> int | None:
    """The id of the first row that is not what was written, or whose predecessor is gone; None: all are whole."""
    previous = b""
    for row in connection.execute(sa.select(audit).order_by(audit.c.id)):
        content = (row.at_ns, row.actor, row.action, row.key_id, row.before, row.after)
        if row.digest != _digest(previous, content):
            return int(row.id)
        previous = row.digest
    return None


def _digest(previous: bytes, content: tuple[Any, ...]) -> bytes:  # Any: the values of a row
    return sha256(previous + msgspec.json.encode(content)).digest()
