"""Laws of a start: an empty directory is filled, an old database migrated, and anything else refused and untouched."""

import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headgate.storage import database
from headgate.storage.database import DATABASE_NAME, DatabaseRefused, migrate, open_database

HEAD = database._scripts().get_current_head()
"""The revision of today."""


def files(directory: Path) -> dict[str, bytes]:
    """What is in the directory, but for the -shm and -wal files that reading a database makes."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix not in {".db-shm", ".db-wal"}}


def make(directory: Path, *statements: str, rows: int = 0) -> Path:
    """A closed database of today, with some calls, changed by the statements."""
    open_database(directory, now_ns=time.time_ns).dispose()
    path = directory / DATABASE_NAME
    connection = sqlite3.connect(path, isolation_level=None)
    for number in range(rows):
        connection.execute("INSERT INTO calls (call_id, at_ns) VALUES (?, ?)", (f"call_{number:024d}", number))
    for statement in statements:
        connection.execute(statement)
    connection.close()
    return path


def root_page(path: Path, name: str) -> int:
    """The page, counted from 1, where the tree of a table or an index begins."""
    connection = sqlite3.connect(path)
    (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    connection.close()
    return int(root)


def refused(directory: Path, *words: str) -> None:
    """The database is refused, twice, with these words, and not a byte is changed."""
    before = files(directory)
    for _ in range(2):
        with pytest.raises(DatabaseRefused) as refusal:
            open_database(directory, now_ns=time.time_ns)
        assert str(directory / DATABASE_NAME) in str(refusal.value)
        assert all(word in str(refusal.value) for word in words), str(refusal.value)
        assert refusal.value.mend
    assert files(directory) == before


def test_an_empty_directory_gets_a_database_and_the_next_start_changes_nothing(tmp_path):
    open_database(tmp_path / "new", now_ns=time.time_ns).dispose()
    before = files(tmp_path / "new")
    assert list(before) == [DATABASE_NAME]
    open_database(tmp_path / "new", now_ns=time.time_ns).dispose()
    assert files(tmp_path / "new") == before


def test_nobody_else_may_look_into_a_data_directory_that_was_made(tmp_path):
    open_database(tmp_path / "new", now_ns=time.time_ns).dispose()
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / DATABASE_NAME).write_bytes(b"not a database" * 1000)
    refused(tmp_path, "not an SQLite database", "Put back a copy")


def test_a_database_with_bytes_overwritten_is_refused(tmp_path):
    path = make(tmp_path, rows=2_000)
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 4096 * 3):
        content[page : page + 200] = b"\xff" * 200
    path.write_bytes(content)
    refused(tmp_path, "damaged")


def test_a_database_with_one_damaged_page_of_rows_is_refused(tmp_path):
    path = make(tmp_path, rows=2_000)
    content = bytearray(path.read_bytes())
    root = root_page(path, "calls")
    last_leaf = int.from_bytes(content[(root - 1) * 4096 + 8 : (root - 1) * 4096 + 12], "big")
    content[(last_leaf - 1) * 4096 : last_leaf * 4096] = b"\xff" * 4096
    path.write_bytes(content)
    refused(tmp_path, "damaged")


def test_a_database_that_was_cut_off_is_refused(tmp_path):
    path = make(tmp_path, rows=2_000)
    path.write_bytes(path.read_bytes()[: -4096 * 3])
    refused(tmp_path, "damaged")


@pytest.mark.parametrize("kept", [17, 100, 1_000, 4_095])
def test_a_database_cut_within_its_first_page_is_refused(tmp_path, kept):
    path = make(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, "damaged")


def test_a_big_database_is_probed_where_rows_are_added(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "QUICK_CHECK_BYTES_MAX", 0)
    path = make(tmp_path, rows=5_000)
    open_database(tmp_path, now_ns=time.time_ns).dispose()
    root = root_page(path, "calls_by_time")
    content = bytearray(path.read_bytes())
    content[(root - 1) * 4096 : root * 4096] = b"\xff" * 4096
    path.write_bytes(content)
    refused(tmp_path, "damaged")


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    make(tmp_path, "UPDATE alembic_version SET version_num = '9999'")
    refused(tmp_path, "9999", "newer")


def test_tables_without_a_revision_are_refused(tmp_path):
    make(tmp_path, "DELETE FROM alembic_version")
    refused(tmp_path, "0 revisions", "cut short")


def test_two_revisions_are_refused(tmp_path):
    make(tmp_path, "INSERT INTO alembic_version VALUES ('0000')")
    refused(tmp_path, "2 revisions", "cut short")


@pytest.mark.parametrize(
    ("statement", "lost"),
    [
        ("DROP TABLE attempts", "attempts"),
        ("ALTER TABLE calls DROP COLUMN arm", "calls.arm"),
        ("DROP INDEX calls_by_time", "calls_by_time"),
    ],
)
def test_a_database_that_lacks_a_part_of_its_revision_is_refused(tmp_path, statement, lost):
    make(tmp_path, statement)
    refused(tmp_path, lost, "cut short")


@pytest.fixture
def next_revision(tmp_path, monkeypatch):
    """Adds a revision to the migrations, as a later version of the product would."""
    scripts = tmp_path / "migrations"
    shutil.copytree(database._MIGRATIONS, scripts)

    def add(upgrade: str) -> None:
        (scripts / "versions" / "9000_next.py").write_text(
            f"from alembic import op\nrevision, down_revision = '9000', '{HEAD}'\n"
            f"def upgrade():\n    op.execute('CREATE TABLE extra (id INTEGER)')\n    {upgrade}\n"
        )
        monkeypatch.setattr(database, "_MIGRATIONS", scripts)

    return add


def test_an_older_database_is_migrated_and_a_copy_of_it_is_left(tmp_path, next_revision):
    data_dir = tmp_path / "data"
    path = make(data_dir, rows=10)
    next_revision("pass")
    migration = migrate(data_dir, now_ns=lambda: 1_785_000_000)
    assert (migration.before, migration.after) == (HEAD, "9000")
    assert migration.copy == data_dir / f"headgate.db.{HEAD}.1785000000.bak"
    for file, tables in ((path, 1), (migration.copy, 0)):
        with sqlite3.connect(file) as connection:
            assert connection.execute("SELECT count(*) FROM calls").fetchone() == (10,)
            assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'extra'").fetchone() == (tables,)
        connection.close()
    assert migrate(data_dir, now_ns=time.time_ns).copy is None


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path, next_revision):
    data_dir = tmp_path / "data"
    path = make(data_dir, rows=10)
    next_revision("raise RuntimeError('power cut')")
    with pytest.raises(RuntimeError, match="power cut"):
        migrate(data_dir, now_ns=time.time_ns)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(HEAD,)]
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'extra'").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM calls").fetchone() == (10,)
    connection.close()


def test_processes_that_start_at_once_in_an_empty_directory_all_get_the_database(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from headgate.storage.database import open_database\n"
        "engine = open_database(Path(sys.argv[1]), now_ns=time.time_ns)\n"
        "with engine.connect() as c: c.exec_driver_sql('SELECT * FROM calls')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, tmp_path / "new"]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
