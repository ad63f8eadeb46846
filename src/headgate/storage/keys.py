"""Virtual keys: made, listed, revoked and rotated in the database; asked for from memory.

What it is: `KeyStore`, which changes keys (each change with its row of the audit, in one transaction), and
`LocalKeyRing`, the `KeyRing` of `interfaces.py`.
What it is not: limits or budgets. A key and its `Principal` only carry their numbers: requests and output tokens a
minute (`rpm`, `otpm`), calls at once (`concurrency`), and money.

A key is `hg_<id>_<secret>`: 8 characters of base62 and 32 random bytes as 43 of urlsafe base64. Only the SHA-256 of
the whole key is stored: a secret of 256 bits cannot be guessed from it, so a slow hash would cost each request and
protect nothing. A rotation keeps the id (its budget and its past go on) and gives it a second secret; the old one
works until the overlap ends, and at the next rotation at the latest.
"""

from __future__ import annotations

import base64
import hmac
import secrets
import string
import threading
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, get_args

import msgspec
import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from headgate.policy.records import Principal, Scope
from headgate.storage.audit import Action, add_audit, broken_at
from headgate.storage.database import begin_write
from headgate.storage.interfaces import KeyRefused, KeysUnavailable
from headgate.storage.tables import audit, keys

KEY_BYTES = len("hg_") + 8 + 1 + 43
LIMIT_MAX = 1_000_000_000
"""Of `rpm`, `otpm` and `concurrency`: what an INTEGER of every database holds."""
OVERLAP_S_MAX = 7 * 86_400
"""How long an old secret may work beside the new one (failure-model §5)."""
REFRESH_EVERY_S = 0.5
UNREADABLE_S_MAX = 60.0
"""How long keys that were read keep working when the store cannot be read (failure-model §2.5)."""
USED_EVERY_S = 30.0
"""How often `last_used_at` is written."""

_BASE62 = string.digits + string.ascii_letters
_NEVER_NS = 1 << 63
_NO_HASH = bytes(32)
_SCOPES = frozenset(get_args(Scope))

_log = structlog.get_logger(__name__)


class InvalidKeySpec(ValueError):
    """A key cannot be made like that; the text says why, for who asked."""


class KeyNotFound(LookupError):
    """There is no key of this id."""


class KeyRecord(msgspec.Struct, frozen=True):
    """A key as it may be shown: everything but its secret. Times are UTC nanoseconds."""

    id: str
    name: str
    owner: str
    scopes: tuple[str, ...]
    tier: str
    rpm: int | None
    otpm: int | None
    concurrency: int | None
    budget_day_nanousd: int | None
    budget_month_nanousd: int | None
    models: tuple[str, ...]
    created_at_ns: int
    expires_at_ns: int | None
    revoked_at_ns: int | None
    last_used_at_ns: int | None
    plan_cache: bool
    """Whether its prompts are marked for the cache."""
    previous_expires_at_ns: int | None
    """Until when the secret before the last rotation works."""


class IssuedKey(msgspec.Struct, frozen=True):
    """A key that was just made. `key` is shown this once and is nowhere else."""

    key: str
    record: KeyRecord

    def __repr__(self) -> str:
        return f"IssuedKey(key=***, record={self.record!r})"


class KeyStore:
    """Keys in the database. Every method is one transaction and may block; errors of the database pass through."""

    def __init__(self, engine: sa.Engine, *, now_ns: Callable[[], int]) -> None:
        self._engine = engine
        self._now_ns = now_ns

    def create(
        self,
        *,
        name: str,
        owner: str = "",
        scopes: Sequence[str] = ("messages",),
        tier: str = "free",
        rpm: int | None = None,
        otpm: int | None = None,
        concurrency: int | None = None,
        budget_day_nanousd: int | None = None,
        budget_month_nanousd: int | None = None,
        models: Sequence[str] = (),
        expires_at_ns: int | None = None,
        plan_cache: bool = True,
        actor: str = "cli",
    ) -> IssuedKey:
        """Make a key. Without an owner the name is the owner. Raises InvalidKeySpec."""
        now_ns = self._now_ns()
        if not name.strip():
            raise InvalidKeySpec("a key needs a name")
        unknown = sorted(set(scopes) - _SCOPES)
        if unknown or not scopes:
            raise InvalidKeySpec(f"unknown scope {unknown}; there are {', '.join(get_args(Scope))}")
        if any(not model or " " in model for model in models):
            raise InvalidKeySpec("a model is a model id, without spaces")
        limits = {"rpm": rpm, "otpm": otpm, "concurrency": concurrency}
        for label, limit in limits.items():
            if limit is not None and not 0 < limit <= LIMIT_MAX:
                raise InvalidKeySpec(f"{label} must be above 0 and at most {LIMIT_MAX}; leave it out for none")
        for label, budget in {"budget a day": budget_day_nanousd, "budget a month": budget_month_nanousd}.items():
            if budget is not None and budget <= 0:
                raise InvalidKeySpec(f"{label} must be above 0; leave it out for none")
        if expires_at_ns is not None and expires_at_ns <= now_ns:
            raise InvalidKeySpec("the key would have expired already")
        with begin_write(self._engine) as connection:
            key_id = _new_id(connection)
            key = _new_key(key_id)
            connection.execute(
                sa.insert(keys).values(
                    id=key_id,
                    secret_hash=sha256(key.encode()).digest(),
                    name=name,
                    owner=owner or name,
                    scopes=" ".join(dict.fromkeys(scopes)),
                    tier=tier,
                    rpm=rpm,
                    otpm=otpm,
                    concurrency=concurrency,
                    budget_day_nanousd=budget_day_nanousd,
                    budget_month_nanousd=budget_month_nanousd,
                    models=" ".join(dict.fromkeys(models)),
                    created_at_ns=now_ns,
                    expires_at_ns=expires_at_ns,
                    plan_cache=int(plan_cache),
                )
            )
            record = _get(connection, key_id)
            _audited(connection, at_ns=now_ns, actor=actor, action="create", before=None, after=record)
        return IssuedKey(key, record)

    def list(self) -> list[KeyRecord]:
        """All keys, the revoked too, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(keys).order_by(keys.c.created_at_ns, keys.c.id)).mappings()
            return [_record(row) for row in rows]

    def revoke(self, key_id: str, *, actor: str = "cli") -> KeyRecord:
        """Close a key for good, both secrets. One that is closed stays as it is. Raises KeyNotFound."""
        now_ns = self._now_ns()
        with begin_write(self._engine) as connection:
            before = _get(connection, key_id)
            if before.revoked_at_ns is not None:
                return before
            connection.execute(sa.update(keys).where(keys.c.id == key_id).values(revoked_at_ns=now_ns))
            after = _get(connection, key_id)
            _audited(connection, at_ns=now_ns, actor=actor, action="revoke", before=before, after=after)
        return after

    def rotate(self, key_id: str, *, overlap_s: float = 86_400.0, actor: str = "cli") -> IssuedKey:
        """Give a key a new secret; the one it had works for `overlap_s` more (0 to 7 days), an older one no longer.

        Raises KeyNotFound; InvalidKeySpec for a revoked key or an overlap out of range.
        """
        if not 0 <= overlap_s <= OVERLAP_S_MAX:
            raise InvalidKeySpec(f"the overlap is 0 to {OVERLAP_S_MAX} seconds")
        now_ns = self._now_ns()
        key = _new_key(key_id)
        with begin_write(self._engine) as connection:
            before = _get(connection, key_id)
            if before.revoked_at_ns is not None:
                raise InvalidKeySpec(f"{key_id} is revoked; make a new key")
            connection.execute(
                sa.update(keys)
                .where(keys.c.id == key_id)
                .values(
                    previous_hash=keys.c.secret_hash,
                    previous_expires_at_ns=now_ns + int(overlap_s * 1e9),
                    secret_hash=sha256(key.encode()).digest(),
                )
            )
            after = _get(connection, key_id)
            _audited(connection, at_ns=now_ns, actor=actor, action="rotate", before=before, after=after)
        return IssuedKey(key, after)

    def audit_broken_at(self) -> int | None:
        """The id of the first row of the audit that is not what was written, or whose predecessor is gone."""
        with self._engine.connect() as connection:
            return broken_at(connection)


class _Door(msgspec.Struct, frozen=True, gc=False):
    """What a presented key is compared with."""

    secret_hash: bytes
    previous_hash: bytes
    previous_expires_at_ns: int
    expires_at_ns: int
    principal: Principal | None
    """None: revoked, or nobody's."""


_NOBODY = _Door(_NO_HASH, _NO_HASH, 0, 0, None)


class LocalKeyRing:
    """All keys in memory; see `interfaces.KeyRing`. `start` keeps them fresh, `close` stops that.

    Weather: a store that cannot be read leaves the keys that were read for 60 s, then nobody is let in.
    """

    def __init__(self, engine: sa.Engine, *, now_ns: Callable[[], int], monotonic: Callable[[], float]) -> None:
        """Reads the keys. Raises what the database raises: a gateway does not start without its keys."""
        self._engine = engine
        self._now_ns = now_ns
        self._monotonic = monotonic
        self._doors: dict[bytes, _Door] = {}
        self._version = -1
        self._used_at_ns: dict[bytes, int] = {}
        self._used_written_at = monotonic()
        self._trouble = ""
        self._load()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="key-ring", daemon=True)

    def authenticate(self, presented: bytes) -> Principal:
        """See `KeyRing.authenticate`. A known and an unknown id take the same steps up to the refusal."""
        if self._monotonic() - self._read_at > UNREADABLE_S_MAX:
            raise KeysUnavailable(f"the keys could not be read for {UNREADABLE_S_MAX:.0f} s")
        if len(presented) != KEY_BYTES or presented[:3] != b"hg_" or presented[11:12] != b"_":
            raise KeyRefused("malformed")
        key_id = presented[3:11]
        door = self._doors.get(key_id, _NOBODY)
        digest = sha256(presented).digest()
        now_ns = self._now_ns()
        current = hmac.compare_digest(digest, door.secret_hash)
        previous = hmac.compare_digest(digest, door.previous_hash)
        if not current and not previous:
            raise KeyRefused("wrong_secret" if door is not _NOBODY else "unknown")
        if door.principal is None:
            raise KeyRefused("revoked")
        if now_ns >= door.expires_at_ns or (not current and now_ns >= door.previous_expires_at_ns):
            raise KeyRefused("expired")
        self._used_at_ns[key_id] = now_ns
        return door.principal

    def refresh(self) -> None:
        """Read what changed, and write when keys were used, if it is time. Blocks; never raises for the store."""
        try:
            self._load()
            if self._monotonic() - self._used_written_at >= USED_EVERY_S:
                self.write_used()
        except SQLAlchemyError as error:
            if not self._trouble:
                _log.error("keys_unreadable", trouble=str(error))
            self._trouble = str(error)
        else:
            self._trouble = ""

    def write_used(self) -> None:
        """Write `last_used_at` of the keys that were good since the last time. Raises database errors."""
        self._used_written_at = self._monotonic()
        used = list(self._used_at_ns.items())  # one step, while the loop may add to it
        self._used_at_ns = {}
        if used:
            # Another process may have seen it later than we, and written first.
            is_later = sa.func.coalesce(keys.c.last_used_at_ns, 0) < sa.bindparam("at")
            mark = sa.update(keys).where(keys.c.id == sa.bindparam("of"), is_later)
            mark = mark.values(last_used_at_ns=sa.bindparam("at"))
            with begin_write(self._engine) as connection:
                connection.execute(mark, [{"of": key_id.decode(), "at": at_ns} for key_id, at_ns in used])

    def start(self) -> None:
        """Refresh every half second, in a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Stop refreshing and write what is left to write."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self.write_used()
        except SQLAlchemyError as error:
            _log.error("keys_used_not_written", trouble=str(error))

    def _run(self) -> None:
        while not self._stop.wait(REFRESH_EVERY_S):
            self.refresh()

    def _load(self) -> None:
        began = self._monotonic()
        with self._engine.connect() as connection:
            version = connection.execute(sa.select(sa.func.coalesce(sa.func.max(audit.c.id), 0))).scalar_one()
            if version != self._version:
                rows = connection.execute(sa.select(keys)).mappings()
                self._doors = {row["id"].encode(): _door(row) for row in rows}
                self._version = version
        self._read_at = began


def _door(row: Any) -> _Door:  # Any: SQLAlchemy's RowMapping has no types for columns
    principal = Principal(
        key_id=row["id"],
        user=row["owner"],
        tier=row["tier"],
        scopes=frozenset(row["scopes"].split()),
        models=tuple(row["models"].split()),
        rpm=row["rpm"],
        otpm=row["otpm"],
        concurrency=row["concurrency"],
        budget_day_nanousd=row["budget_day_nanousd"],
        budget_month_nanousd=row["budget_month_nanousd"],
        plan_cache=bool(row["plan_cache"]),
    )
    return _Door(
        secret_hash=row["secret_hash"],
        previous_hash=row["previous_hash"] or _NO_HASH,
        previous_expires_at_ns=row["previous_expires_at_ns"] or 0,
        expires_at_ns=row["expires_at_ns"] or _NEVER_NS,
        principal=principal if row["revoked_at_ns"] is None else None,
    )


def _record(row: Any) -> KeyRecord:  # Any: as above
    values = {name: row[name] for name in KeyRecord.__struct_fields__}
    lists = {name: tuple(row[name].split()) for name in ("scopes", "models")}
    return KeyRecord(**{**values, **lists, "plan_cache": bool(row["plan_cache"])})


def _get(connection: sa.Connection, key_id: str) -> KeyRecord:
    row = connection.execute(sa.select(keys).where(keys.c.id == key_id)).mappings().one_or_none()
    if row is None:
        raise KeyNotFound(key_id)
    return _record(row)


def _new_id(connection: sa.Connection) -> str:
    while True:
        key_id = "".join(secrets.choice(_BASE62) for _ in range(8))
        if not connection.execute(sa.select(keys.c.id).where(keys.c.id == key_id)).first():
            return key_id


def _new_key(key_id: str) -> str:
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    return f"hg_{key_id}_{secret}"


def _audited(
    connection: sa.Connection,
    *,
    at_ns: int,
    actor: str,
    action: Action,
    before: KeyRecord | None,
    after: KeyRecord,
) -> None:
    add_audit(
        connection,
        at_ns=at_ns,
        actor=actor,
        action=action,
        key_id=after.id,
        before=b"" if before is None else msgspec.json.encode(before),
        after=msgspec.json.encode(after),
    )
