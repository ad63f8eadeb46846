"""Laws of virtual keys: who is let in, who is not and why, how soon a change is seen, and what is on record."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headgate.policy.records import Principal
from headgate.storage.database import DATABASE_NAME
from headgate.storage.interfaces import KeyRefused, KeysUnavailable
from headgate.storage.keys import (
    LIMIT_MAX,
    OVERLAP_S_MAX,
    InvalidKeySpec,
    KeyNotFound,
    KeyStore,
    LocalKeyRing,
)
from headgate.storage.tables import audit, keys

NOW_NS = 1_785_000_000_000_000_000
SECOND_NS = 10**9


class Clock:
    """Wall clock and monotonic clock of a test: they move when told to."""

    def __init__(self) -> None:
        self.at_ns = NOW_NS
        self.at = 1_000.0

    def now_ns(self) -> int:
        return self.at_ns

    def monotonic(self) -> float:
        return self.at

    def pass_s(self, seconds: float) -> None:
        self.at_ns += int(seconds * 1e9)
        self.at += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(engine: sa.Engine, clock: Clock) -> KeyStore:
    return KeyStore(engine, now_ns=clock.now_ns)


@pytest.fixture
def ring(engine: sa.Engine, clock: Clock) -> Iterator[LocalKeyRing]:
    return LocalKeyRing(engine, now_ns=clock.now_ns, monotonic=clock.monotonic)


def reason(ring: LocalKeyRing, presented: bytes | str) -> str:
    """Why this key is refused."""
    with pytest.raises(KeyRefused) as refusal:
        ring.authenticate(presented.encode() if isinstance(presented, str) else presented)
    return refusal.value.reason


def test_a_key_has_the_form_that_a_scanner_can_look_for(store):
    assert re.fullmatch(r"hg_[0-9A-Za-z]{8}_[0-9A-Za-z_-]{43}", store.create(name="app").key)


def test_a_key_lets_its_owner_in_with_all_its_limits(store, ring):
    issued = store.create(
        name="app",
        owner="an",
        scopes=["messages", "app"],
        tier="paid",
        rpm=100,
        otpm=8_000,
        concurrency=4,
        budget_day_nanousd=20 * 10**9,
        budget_month_nanousd=400 * 10**9,
        models=["claude-sonnet-4-6", "claude-haiku-4-5"],
    )
    ring.refresh()
    assert ring.authenticate(issued.key.encode()) == Principal(
        key_id=issued.record.id,
        user="an",
        tier="paid",
        scopes=frozenset({"messages", "app"}),
        models=("claude-sonnet-4-6", "claude-haiku-4-5"),
        rpm=100,
        otpm=8_000,
        concurrency=4,
        budget_day_nanousd=20 * 10**9,
        budget_month_nanousd=400 * 10**9,
    )


def test_without_an_owner_the_name_is_the_owner_and_the_scope_is_messages(store):
    record = store.create(name="laptop").record
    assert (record.owner, record.scopes, record.tier) == ("laptop", ("messages",), "free")


@pytest.mark.parametrize(
    "spec",
    [
        {"name": " "},
        {"name": "a", "scopes": ["message"]},
        {"name": "a", "scopes": []},
        {"name": "a", "rpm": 0},
        {"name": "a", "rpm": LIMIT_MAX + 1},
        {"name": "a", "otpm": 0},
        {"name": "a", "otpm": -1},
        {"name": "a", "concurrency": 0},
        {"name": "a", "concurrency": 1 << 70},
        {"name": "a", "budget_day_nanousd": -1},
        {"name": "a", "budget_month_nanousd": 0},
        {"name": "a", "models": ["claude sonnet"]},
        {"name": "a", "models": [""]},
        {"name": "a", "expires_at_ns": NOW_NS},
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(store, spec):
    with pytest.raises(InvalidKeySpec):
        store.create(**spec)
    assert store.list() == []


def test_no_key_is_stored_nor_shown_again(store, engine, tmp_path):
    issued = store.create(name="app")
    rotated = store.rotate(issued.record.id)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
    for secret in (issued.key[12:], rotated.key[12:]):
        assert secret not in repr(issued) + repr(rotated) + repr(store.list())
        for path in tmp_path.glob(f"{DATABASE_NAME}*"):
            assert secret.encode() not in path.read_bytes()


def test_a_wrong_secret_an_unknown_id_and_a_malformed_key_are_told_apart_only_in_the_reason(store, ring):
    key = store.create(name="app").key
    ring.refresh()
    other = "A" if key[-1] != "A" else "B"
    assert reason(ring, key[:-1] + other) == "wrong_secret"
    assert reason(ring, "hg_00000000_" + key[12:]) == "unknown"
    assert reason(ring, key[:-1]) == "malformed"
    assert reason(ring, b"") == "malformed"


def test_a_key_with_any_bit_flipped_is_refused(store, ring):
    key = store.create(name="app").key.encode()
    ring.refresh()
    for bit in range(len(key) * 8):
        presented = bytearray(key)
        presented[bit // 8] ^= 1 << bit % 8
        assert reason(ring, bytes(presented)) in {"malformed", "unknown", "wrong_secret"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=70), st.binary(min_size=52, max_size=52).map(lambda rest: b"hg_" + rest)))
@example(b"hg_" + bytes(8) + b"_" + bytes(43))
@example(b"hg_\xff\xff\xff\xff\xff\xff\xff\xff_" + b"\xff" * 43)
def test_whatever_bytes_are_presented_nothing_but_key_refused_comes_of_it(ring, presented):
    assert reason(ring, presented) in {"malformed", "unknown"}


def test_a_revoked_key_is_refused_and_revoking_it_again_changes_nothing(store, ring, clock):
    issued = store.create(name="app")
    first = store.revoke(issued.record.id)
    clock.pass_s(10)
    assert store.revoke(issued.record.id) == first
    assert first.revoked_at_ns == NOW_NS
    ring.refresh()
    assert reason(ring, issued.key) == "revoked"


def test_a_key_is_good_until_the_moment_it_expires(store, ring, clock):
    key = store.create(name="app", expires_at_ns=NOW_NS + 30 * SECOND_NS).key.encode()
    ring.refresh()
    clock.at_ns = NOW_NS + 30 * SECOND_NS - 1
    ring.authenticate(key)
    clock.at_ns += 1
    assert reason(ring, key) == "expired"


def test_after_a_rotation_both_secrets_work_until_the_overlap_ends(store, ring, clock):
    old = store.create(name="app")
    new = store.rotate(old.record.id, overlap_s=60)
    assert new.record.id == old.record.id
    ring.refresh()
    assert ring.authenticate(old.key.encode()) == ring.authenticate(new.key.encode())
    clock.pass_s(60)
    ring.refresh()
    assert reason(ring, old.key) == "expired"
    ring.authenticate(new.key.encode())


def test_a_second_rotation_ends_the_first_secret_at_once(store, ring):
    first = store.create(name="app")
    second = store.rotate(first.record.id)
    third = store.rotate(first.record.id)
    ring.refresh()
    assert reason(ring, first.key) == "wrong_secret"
    ring.authenticate(second.key.encode())
    ring.authenticate(third.key.encode())


def test_a_rotation_without_overlap_ends_the_old_secret_at_once(store, ring):
    old = store.create(name="app")
    store.rotate(old.record.id, overlap_s=0)
    ring.refresh()
    assert reason(ring, old.key) == "expired"


def test_revoking_closes_both_secrets(store, ring):
    old = store.create(name="app")
    new = store.rotate(old.record.id)
    store.revoke(old.record.id)
    ring.refresh()
    assert (reason(ring, old.key), reason(ring, new.key)) == ("revoked", "revoked")


def test_what_cannot_be_rotated_or_revoked_says_so(store):
    issued = store.create(name="app")
    for overlap_s in (-1, OVERLAP_S_MAX + 1):
        with pytest.raises(InvalidKeySpec):
            store.rotate(issued.record.id, overlap_s=overlap_s)
    store.revoke(issued.record.id)
    with pytest.raises(InvalidKeySpec):
        store.rotate(issued.record.id)
    for change in (store.rotate, store.revoke):
        with pytest.raises(KeyNotFound):
            change("nosuchid")


def test_known_and_unknown_ids_take_the_same_steps():
    """One hash and two constant-time comparisons before anything depends on who it is."""
    source = ast.parse(textwrap.dedent(inspect.getsource(LocalKeyRing.authenticate)))
    steps = [ast.unparse(step) for step in source.body[0].body]
    looked_up = next(at for at, step in enumerate(steps) if "self._doors.get" in step)
    decided = next(at for at, step in enumerate(steps) if step.startswith("if not current and (not previous)"))
    between = "\n".join(steps[looked_up:decided])
    assert not re.search(r"\b(if|and|or|for|while|return|raise)\b", between)
    assert between.count("compare_digest") == 2
    assert between.count("sha256") == 1


def test_a_change_by_another_process_is_seen_within_a_second(tmp_path, store, engine, eventually):
    issued = store.create(name="app")
    ring = LocalKeyRing(engine, now_ns=time.time_ns, monotonic=time.monotonic)
    ring.start()
    ring.authenticate(issued.key.encode())
    program = (
        "import sys, time; from pathlib import Path\n"
        "from headgate.storage.database import open_database\nfrom headgate.storage.keys import KeyStore\n"
        "store = KeyStore(open_database(Path(sys.argv[1]), now_ns=time.time_ns), now_ns=time.time_ns)\n"
        "store.revoke(sys.argv[2]); print(time.monotonic())"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path, issued.record.id], capture_output=True, check=True)

    def refused() -> bool:
        try:
            ring.authenticate(issued.key.encode())
        except KeyRefused:
            return True
        return False

    eventually(refused)
    assert time.monotonic() - float(run.stdout) < 1.0
    ring.close()


def test_nothing_is_read_again_as_long_as_no_key_has_changed(store, ring, engine):
    store.create(name="app")
    ring.refresh()
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    ring.refresh()
    begin, version = statements
    assert begin == "BEGIN"
    assert "max(audit.id)" in version


def test_a_store_that_cannot_be_read_leaves_the_keys_that_were_read_for_a_minute(store, ring, engine, clock, tmp_path):
    key = store.create(name="app").key.encode()
    ring.refresh()
    engine.dispose()
    path = tmp_path / DATABASE_NAME
    for name in (path, *tmp_path.glob(f"{DATABASE_NAME}-*")):
        name.rename(name.with_name(name.name + ".away"))
    path.mkdir()
    clock.pass_s(59)
    ring.refresh()
    ring.authenticate(key)
    clock.pass_s(2)
    ring.refresh()
    with pytest.raises(KeysUnavailable):
        ring.authenticate(key)
    path.rmdir()
    for name in tmp_path.glob(f"{DATABASE_NAME}*.away"):
        name.rename(name.with_suffix(""))
    ring.refresh()
    ring.authenticate(key)


def test_last_use_is_written_in_batches_and_only_for_keys_that_were_good(store, ring, clock):
    good, bad = store.create(name="good"), store.create(name="bad")
    ring.refresh()
    ring.authenticate(good.key.encode())
    assert reason(ring, bad.key[:-1] + ("A" if bad.key[-1] != "A" else "B")) == "wrong_secret"
    ring.refresh()
    assert [record.last_used_at_ns for record in store.list()] == [None, None]
    clock.pass_s(30)
    ring.refresh()
    used = {record.name: record.last_used_at_ns for record in store.list()}
    assert used == {"good": NOW_NS, "bad": None}


def test_refused_keys_write_nothing(store, ring, engine, clock):
    """Failure-model I13."""
    store.create(name="app")
    ring.refresh()
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    for number in range(100):
        reason(ring, f"hg_{number:08d}_{'x' * 43}")
    clock.pass_s(31)
    ring.refresh()
    ring.close()
    assert not [statement for statement in statements if not statement.startswith(("SELECT", "BEGIN"))]
    assert statements


def test_a_process_that_writes_late_does_not_turn_back_when_a_key_was_used(store, engine, clock):
    key = store.create(name="app").key.encode()
    early, late = (LocalKeyRing(engine, now_ns=clock.now_ns, monotonic=clock.monotonic) for _ in range(2))
    early.authenticate(key)
    clock.pass_s(5)
    late.authenticate(key)
    late.write_used()
    early.write_used()
    assert [record.last_used_at_ns for record in store.list()] == [NOW_NS + 5 * SECOND_NS]


def test_every_change_is_in_the_audit_with_who_before_and_after(store, engine):
    issued = store.create(name="app", actor="an")
    store.rotate(issued.record.id, actor="binh")
    store.revoke(issued.record.id, actor="chi")
    store.revoke(issued.record.id, actor="nobody: it changed nothing")
    with engine.connect() as connection:
        rows = connection.execute(sa.select(audit).order_by(audit.c.id)).all()
    assert [(row.actor, row.action, row.key_id) for row in rows] == [
        ("an", "create", issued.record.id),
        ("binh", "rotate", issued.record.id),
        ("chi", "revoke", issued.record.id),
    ]
    assert rows[0].before == ""
    assert [row.before for row in rows[1:]] == [row.after for row in rows[:-1]]


def test_a_change_and_its_audit_are_one_transaction(store, engine, ring):
    issued = store.create(name="app")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no room'); END"
        )
    for change in (
        lambda: store.revoke(issued.record.id),
        lambda: store.rotate(issued.record.id),
        lambda: store.create(name="other"),
    ):
        with pytest.raises(sa.exc.IntegrityError, match="no room"):
            change()
    assert store.list() == [issued.record]
    ring.refresh()
    ring.authenticate(issued.key.encode())


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit SET actor = 'someone else' WHERE id = 2",
        "UPDATE audit SET at_ns = at_ns + 1 WHERE id = 2",
        "UPDATE audit SET after = replace(after, '\"free\"', '\"paid\"') WHERE id = 2",
        "DELETE FROM audit WHERE id = 1",
    ],
)
def test_an_audit_that_was_changed_is_found_out(store, engine, tampering):
    issued = store.create(name="app")
    store.rotate(issued.record.id)
    store.revoke(issued.record.id)
    assert store.audit_broken_at() is None
    with engine.begin() as connection:
        assert connection.exec_driver_sql(tampering).rowcount == 1
    assert store.audit_broken_at() == 2


def test_only_the_hash_of_the_whole_key_is_stored(store, engine):
    issued = store.create(name="app")
    with engine.connect() as connection:
        row = connection.execute(sa.select(keys)).one()
    assert row.secret_hash == sha256(issued.key.encode()).digest()


def test_keys_are_listed_oldest_first_the_revoked_too(store, clock):
    names = ["first", "second", "third"]
    records = []
    for name in names:
        records.append(store.create(name=name).record)
        clock.pass_s(1)
    store.revoke(records[1].id)
    assert [record.name for record in store.list()] == names
    assert [record.revoked_at_ns is None for record in store.list()] == [True, False, True]


def test_a_ring_without_a_store_does_not_start(tmp_path):
    path = Path(tmp_path / "nowhere" / DATABASE_NAME)
    with pytest.raises(sa.exc.OperationalError):
        LocalKeyRing(sa.create_engine(f"sqlite:///{path}"), now_ns=time.time_ns, monotonic=time.monotonic)
