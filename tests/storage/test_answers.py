"""The store of answers on one machine: its bounds, its end of time, other processes, damage, and who may read it."""

import asyncio
import functools
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.storage.answers import (
    FILE_NAME,
    OVERHEAD_BYTES,
    AnswersUnavailable,
    Held,
    SqliteAnswers,
    remove_file,
)

NS = 1_000_000_000


def on_a_loop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        asyncio.run(test(**fixtures))

    return run


class Clock:
    """UTC that passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1_785_000_000.0

    def __call__(self) -> int:
        return int(self.now_s * NS)


@asynccontextmanager
async def opened(folder: Path, clock: Clock | None = None, *, bytes_max: int = 1 << 20) -> AsyncIterator[SqliteAnswers]:
    answers = SqliteAnswers(folder / FILE_NAME, bytes_max=bytes_max, now_ns=clock or Clock())
    try:
        yield answers
    finally:
        await answers.close()


def sized(count: int, fill: bytes = b"a") -> bytes:
    """A record that counts as so many bytes."""
    return fill * (count - OVERHEAD_BYTES)


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def query(folder: Path, statement: str, *values: object) -> list[tuple]:
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


@on_a_loop
async def test_a_record_is_given_back_as_it_was_and_only_to_its_owner(tmp_path: Path) -> None:
    async with opened(tmp_path) as answers:
        assert await answers.get("k", owner="an") is None
        assert await answers.put("k", bytes(range(256)), owner="an", ttl_s=60)
        assert await answers.get("k", owner="an") == bytes(range(256))
        assert await answers.get("k", owner="binh") is None
        assert await answers.put("k", b"newer", owner="an", ttl_s=60)
        assert await answers.get("k", owner="an") == b"newer"
        assert await answers.held() == Held(1, 5 + OVERHEAD_BYTES)


@on_a_loop
async def test_a_record_ends_when_its_time_is_over_and_is_removed(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock) as answers:
        await answers.put("k", b"a", owner="an", ttl_s=60)
        await answers.put("longer", b"a", owner="an", ttl_s=61)
        clock.now_s += 59.9
        assert await answers.get("k", owner="an") == b"a"
        clock.now_s += 0.1
        assert await answers.get("k", owner="an") is None
        assert (await answers.held()).answers == 2
        await answers.expire()
        assert (await answers.held()).answers == 1
        clock.now_s += 1
        await answers.put("next", b"a", owner="an", ttl_s=60)
        assert await answers.held() == Held(1, 1 + OVERHEAD_BYTES), "keeping one clears away what is over"


@on_a_loop
async def test_what_would_end_soonest_makes_room(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock, bytes_max=3_000) as answers:
        for name in ("first", "second", "third"):
            assert await answers.put(name, sized(1_000), owner="an", ttl_s=60)
            clock.now_s += 1
        assert await answers.held() == Held(3, 3_000)
        assert await answers.put("fourth", sized(1_001), owner="an", ttl_s=60)
        there = [await answers.get(name, owner="an") is not None for name in ("first", "second", "third", "fourth")]
        assert there == [False, False, True, True]
        assert not await answers.put("too long", sized(3_001), owner="an", ttl_s=60)
        assert await answers.held() == Held(2, 2_001), "what can never fit drives nothing out"
        assert await answers.put("all of it", sized(3_000), owner="an", ttl_s=60)
        assert await answers.held() == Held(1, 3_000)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from("xy"), st.integers(300, 1_500), st.integers(1, 20)),
        max_size=25,
    )
)
def test_the_store_holds_what_a_plain_model_of_it_holds(
    tmp_path_factory, puts: list[tuple[str, str, int, int]]
) -> None:
    async def run() -> None:
        clock = Clock()
        model: dict[str, tuple[str, int, float]] = {}
        async with opened(tmp_path_factory.mktemp("answers"), clock, bytes_max=4_000) as answers:
            for key, owner, size, ttl_s in puts:
                clock.now_s += 1.7
                await answers.put(key, sized(size), owner=owner, ttl_s=ttl_s)
                model = {name: entry for name, entry in model.items() if entry[2] > clock.now_s and name != key}
                while sum(entry[1] for entry in model.values()) + size > 4_000:
                    del model[min(model, key=lambda name: model[name][2])]
                model[key] = (owner, size, clock.now_s + ttl_s)
                assert await answers.held() == Held(len(model), sum(entry[1] for entry in model.values()))
            for key in "abcdef":
                for owner in "xy":
                    there = key in model and model[key][0] == owner
                    assert (await answers.get(key, owner=owner) is not None) == there

    asyncio.run(run())


@on_a_loop
async def test_a_restart_keeps_what_is_there(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock) as answers:
        await answers.put("k", b"a", owner="an", ttl_s=60)
    async with opened(tmp_path, clock) as answers:
        assert await answers.get("k", owner="an") == b"a"
        assert await answers.held() == Held(1, 1 + OVERHEAD_BYTES)


@on_a_loop
async def test_a_purge_removes_one_owners_or_everybodys_also_from_the_files(tmp_path: Path) -> None:
    async with opened(tmp_path) as answers:
        for number in range(10):
            await answers.put(f"a{number}", b"secret of an" * 900, owner="an", ttl_s=60)
            await answers.put(f"b{number}", b"secret of binh" * 900, owner="binh", ttl_s=60)
        assert await answers.purge("nobody") == 0
        assert await answers.purge("an") == 10
        on_disk = b"".join(file.read_bytes() for file in files_in(tmp_path))
        assert b"secret of an" not in on_disk
        assert b"secret of binh" in on_disk
        assert (await answers.held()).answers == 10
        assert await answers.purge(None) == 10
        assert await answers.held() == Held(0, 0)


@on_a_loop
async def test_only_its_owner_can_read_the_files(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch(mode=0o666)
    async with opened(tmp_path) as answers:
        await answers.put("k", b"a", owner="an", ttl_s=60)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in files_in(tmp_path)}
    assert modes == {FILE_NAME: 0o600, f"{FILE_NAME}-wal": 0o600, f"{FILE_NAME}-shm": 0o600}


@on_a_loop
async def test_where_reuse_is_off_the_file_goes(tmp_path: Path) -> None:
    assert not remove_file(tmp_path)
    async with opened(tmp_path) as answers:
        await answers.put("k", b"a", owner="an", ttl_s=60)
        # As after a kill: with its -wal file.
        assert remove_file(tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("damage", ["no database", "pages", "another version", "no tables"])
@on_a_loop
async def test_a_file_that_is_of_no_use_is_made_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / FILE_NAME
    async with opened(tmp_path) as answers:
        for number in range(20):
            await answers.put(f"k{number}", b"a" * 4_000, owner="an", ttl_s=60)
    if damage == "no database":
        path.write_bytes(b"something else entirely" * 1_000)
    elif damage == "pages":
        path.write_bytes(path.read_bytes()[:4_096] + b"\xff" * 40_960)
    elif damage == "another version":
        query(tmp_path, "PRAGMA user_version = 99")
    else:
        query(tmp_path, "DROP TABLE answers")
    async with opened(tmp_path) as answers:
        assert await answers.get("k1", owner="an") is None
        assert await answers.put("k", b"a", owner="an", ttl_s=60)
        assert await answers.get("k", owner="an") == b"a"
    assert query(tmp_path, "PRAGMA quick_check") == [("ok",)]


@on_a_loop
async def test_a_value_of_another_kind_is_a_miss(tmp_path: Path) -> None:
    async with opened(tmp_path) as answers:
        await answers.put("k", b"a", owner="an", ttl_s=60)
        query(tmp_path, "UPDATE answers SET record = 'text'")
        assert await answers.get("k", owner="an") is None


@on_a_loop
async def test_a_place_that_cannot_be_written_is_told_as_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with opened(tmp_path / "file") as answers:
        for asked in (answers.get("k", owner="an"), answers.put("k", b"a", owner="an", ttl_s=1), answers.expire()):
            with pytest.raises(AnswersUnavailable, match="file"):
                await asked
    with pytest.raises(AnswersUnavailable, match="closed"):
        await answers.get("k", owner="an")


@on_a_loop
async def test_a_full_disk_is_told_as_unavailable_and_is_no_end(small_disk: Path, fill) -> None:
    async with opened(small_disk, bytes_max=1 << 30) as answers:
        await answers.put("k", b"a", owner="an", ttl_s=60)
        ballast = fill()
        with pytest.raises(AnswersUnavailable):
            await answers.put("k", b"a" * (1 << 20), owner="an", ttl_s=60)
        ballast.unlink()
        assert await answers.get("k", owner="an") == b"a", "what could not be replaced is still there"
        assert await answers.put("again", b"a", owner="an", ttl_s=60)
        assert await answers.get("again", owner="an") == b"a"


@on_a_loop
async def test_a_writer_of_another_process_keeps_no_reader_waiting(tmp_path: Path) -> None:
    async with opened(tmp_path) as answers:
        await answers.put("k", b"a", owner="an", ttl_s=60)
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            async with asyncio.timeout(0.5):
                assert await answers.get("k", owner="an") == b"a"
            with pytest.raises(AnswersUnavailable, match="locked"):
                await answers.put("k", b"b", owner="an", ttl_s=60)
        assert await answers.put("k", b"b", owner="an", ttl_s=60)


WRITER = """
import asyncio, sys
from pathlib import Path
from headgate.storage.answers import AnswersUnavailable, SqliteAnswers

async def main(path, who):
    answers = SqliteAnswers(Path(path), bytes_max=100_000, now_ns=lambda: 1_785_000_000_000_000_000)
    kept = 0
    for number in range(200):
        try:
            kept += await answers.put(f"{who}{number}", who.encode() * 1_000, owner=who, ttl_s=60 + number)
        except AnswersUnavailable as error:
            print(error, file=sys.stderr)
    await answers.close()
    print(kept)

asyncio.run(main(*sys.argv[1:]))
"""


def test_two_processes_share_one_file_and_its_bound(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / FILE_NAME), who], stdout=subprocess.PIPE, text=True
        )
        for who in "ab"
    ]
    kept = [int(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # The first words of both, on a file that is not there yet, may meet; those are lost and nothing else.
    assert min(kept) >= 195

    async def look() -> None:
        async with opened(tmp_path, bytes_max=100_000) as answers:
            held = await answers.held()
            assert 95_000 < held.bytes <= 100_000
            assert query(tmp_path, "SELECT count(*), sum(bytes) FROM answers") == [(held.answers, held.bytes)]
            last = {who: await answers.get(f"{who}199", owner=who) for who in "ab"}
            assert last == {who: who.encode() * 1_000 for who in "ab"}

    asyncio.run(look())
