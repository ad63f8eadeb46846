"""Laws of the ledger: what is written is counted once, whatever dies and whatever is locked in between."""

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headgate.storage.database import DATABASE_NAME, open_database
from headgate.storage.fold import Fold
from headgate.storage.interfaces import LedgerUnavailable
from headgate.storage.journal import Journal
from headgate.storage.ledger import LocalLedger
from headgate.storage.ledger_tables import LedgerTables

WRITER = Path(__file__).with_name("crashing_writer.py")
Open = Callable[..., LocalLedger]


def rows(data_dir: Path, query: str) -> list[Any]:
    with sqlite3.connect(data_dir / DATABASE_NAME) as connection:
        found = connection.execute(query).fetchall()
    connection.close()
    return found


def states(data_dir: Path) -> dict[str, str]:
    return dict(rows(data_dir, "SELECT call_id, state FROM calls"))


def segments(data_dir: Path) -> list[Path]:
    return list((data_dir / "journal").glob("*.jsonl"))


Writer = subprocess.Popen[bytes]


def start_writer(data_dir: Path, seed: int) -> Writer:
    return subprocess.Popen([sys.executable, WRITER, data_dir, str(seed)], stderr=subprocess.PIPE)


def wait_until(condition: Callable[[], bool], running: list[Writer]) -> None:
    """Until the condition holds; all writers must live."""
    deadline = time.monotonic() + 30
    while not condition():
        for process in running:
            assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill(process: Writer) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def size_of_witness(data_dir: Path) -> int:
    witness = data_dir / "witness"
    return witness.stat().st_size if witness.exists() else 0


def killed_after(data_dir: Path, condition: Callable[[], bool], *, seed: int) -> None:
    """Run the crashing writer until the condition holds, then `kill -9` it."""
    process = start_writer(data_dir, seed)
    wait_until(condition, [process])
    kill(process)


def test_what_was_written_can_be_queried_after_a_flush(tmp_path, open_ledger, call):
    ledger = open_ledger()
    for number in range(10):
        ledger.write(*call(number).opening())
        ledger.write(*call(number).ending())
    ledger.flush()
    assert rows(tmp_path, "SELECT count(*), sum(cost_nanousd), min(state), max(state) FROM calls") == [
        (10, 123_450, "settled", "settled")
    ]
    assert ledger.snapshot().unfolded_bytes == 0


def test_the_position_in_the_journal_is_stored_with_what_it_stands_for(tmp_path, open_ledger, call):
    ledger = open_ledger()
    ledger.write(*call(1).opening())
    ledger.flush()
    (path,) = segments(tmp_path)
    assert rows(tmp_path, "SELECT segment, offset_bytes FROM journal_positions") == [(path.stem, path.stat().st_size)]


def test_what_was_written_can_be_queried_soon_without_a_flush(tmp_path, open_ledger, call, eventually):
    ledger = open_ledger()
    ledger.write(*call(1).opening())
    eventually(lambda: states(tmp_path) == {call(1).id: "open"}, within_s=2.0)


def test_what_a_dead_process_left_is_counted_once_however_often_we_start(tmp_path, open_ledger, call):
    journal = Journal(tmp_path / "journal", now_ns=time.time_ns)
    journal.write(call(1).opening())
    journal.write(call(1).ending())
    journal.close()
    for _ in range(3):
        ledger = open_ledger()
        assert rows(tmp_path, "SELECT count(*), sum(cost_nanousd) FROM calls") == [(1, 12_345)]
        ledger.close()


def test_what_a_dead_process_had_open_is_closed_as_estimated(tmp_path, open_ledger, call):
    journal = Journal(tmp_path / "journal", now_ns=time.time_ns)
    journal.write(call(1).opening())
    journal.write((call(1).started(), call(1).progress(40)))
    journal.write(call(2).opening())
    journal.close()
    open_ledger()
    assert states(tmp_path) == {call(1).id: "estimated", call(2).id: "estimated"}
    assert rows(tmp_path, "SELECT cost_nanousd, error_code, price_id FROM attempts ORDER BY call_id") == [
        (1_100, "process_lost", "test-row"),
        (1_000, "process_lost", "test-row"),
    ]
    assert rows(tmp_path, "SELECT outcome, cost_nanousd FROM calls ORDER BY call_id") == [
        ("cut", 1_100),
        ("failed", 1_000),
    ]


def test_what_a_process_had_open_when_it_closed_is_closed_by_the_next(tmp_path, open_ledger, call):
    ledger = open_ledger()
    ledger.write(*call(1).opening())
    ledger.close()
    assert states(tmp_path) == {call(1).id: "open"}
    open_ledger()
    assert states(tmp_path) == {call(1).id: "estimated"}


def test_segments_of_the_dead_are_deleted_once_folded(tmp_path, open_ledger, call):
    journal = Journal(tmp_path / "journal", now_ns=time.time_ns, segment_bytes=2_000)
    for number in range(20):
        journal.write(call(number).opening())
    journal.close()
    assert len(segments(tmp_path)) > 3
    open_ledger()
    assert len(segments(tmp_path)) == 1
    positions = rows(tmp_path, "SELECT segment FROM journal_positions")
    assert positions == [(segments(tmp_path)[0].stem,)]


def test_a_segment_with_a_damaged_line_is_kept_aside_and_the_rest_of_it_counted(tmp_path, open_ledger, call):
    journal = Journal(tmp_path / "journal", now_ns=time.time_ns)
    for number in range(3):
        journal.write((*call(number).opening(), *call(number).ending()))
    journal.close()
    (path,) = segments(tmp_path)
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(content[0] + content[1].replace(b"chat", b"chit") + content[2])
    ledger = open_ledger()
    assert states(tmp_path) == {call(0).id: "settled", call(2).id: "settled"}
    assert path.with_suffix(".damaged").exists()
    assert ledger.snapshot().damaged_lines == 1


def test_full_segments_of_a_living_process_are_folded_and_deleted(tmp_path, open_ledger, call, eventually, monkeypatch):
    monkeypatch.setattr("headgate.storage.journal.SEGMENT_BYTES", 2_000)
    ledger = open_ledger()
    for number in range(100):
        ledger.write(*call(number).opening())
        ledger.write(*call(number).ending())
    ledger.flush()
    eventually(lambda: len(segments(tmp_path)) == 1)
    assert rows(tmp_path, "SELECT count(*), sum(cost_nanousd) FROM calls") == [(100, 1_234_500)]


def test_a_call_nobody_works_on_is_swept_and_a_live_one_is_not(tmp_path, open_ledger, call, eventually):
    ledger = open_ledger()
    for number in (1, 2):
        ledger.write(*call(number).opening())
    ledger.flush()
    ledger.sweep({call(2).id})
    eventually(lambda: states(tmp_path) == {call(1).id: "estimated", call(2).id: "open"})
    ledger.write(*call(2).ending())
    ledger.flush()
    assert states(tmp_path)[call(2).id] == "settled"


def test_a_call_that_opens_after_the_live_ones_were_listed_is_not_swept(tmp_path, open_ledger, call, eventually):
    ledger = open_ledger()
    ledger.write(*call(1).opening())
    ledger.flush()
    ledger.sweep(set())
    ledger.write(*call(2).opening())
    eventually(lambda: states(tmp_path).get(call(1).id) == "estimated")
    ledger.flush()
    assert states(tmp_path)[call(2).id] == "open"


def test_an_ending_after_the_sweep_changes_nothing_and_is_counted(tmp_path, open_ledger, call, eventually):
    ledger = open_ledger()
    ledger.write(*call(1).opening())
    ledger.flush()
    ledger.sweep(set())
    eventually(lambda: states(tmp_path)[call(1).id] == "estimated")
    ledger.write(*call(1).ending())
    ledger.flush()
    assert rows(tmp_path, "SELECT state, cost_nanousd FROM calls") == [("estimated", 1_000)]
    assert ledger.snapshot().contradictions == 2


def test_the_sweep_of_a_living_process_adopts_what_another_left(tmp_path, open_ledger, call, eventually):
    survivor, other = open_ledger(), open_ledger()
    other.write(*call(1).opening())
    other.flush()
    survivor.sweep(set())
    survivor.flush()
    assert states(tmp_path) == {call(1).id: "open"}  # its process lives
    other.close()
    # As the gateway does, again and again: one sweep may find the database busy.
    eventually(lambda: survivor.sweep(set()) or states(tmp_path) == {call(1).id: "estimated"})


def test_two_processes_in_one_data_directory_do_not_harm_each_other(tmp_path, open_ledger):
    witness = tmp_path / "witness"
    processes = [subprocess.Popen([sys.executable, WRITER, tmp_path, str(seed)]) for seed in (1, 2)]
    deadline = time.monotonic() + 30
    while not witness.exists() or witness.stat().st_size < 300_000:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    ledger = open_ledger()
    assert_every_promise_is_kept(tmp_path)
    assert ledger.snapshot().contradictions == 0


def test_a_locked_database_delays_the_fold_and_loses_nothing(tmp_path, open_ledger, call, eventually, monkeypatch):
    monkeypatch.setattr("headgate.storage.database.BUSY_TIMEOUT_S", 0.05)
    ledger = open_ledger()
    ledger.write(*call(1).opening())
    ledger.flush()
    lock = sqlite3.connect(tmp_path / DATABASE_NAME, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    ledger.write(*call(1).ending())
    ledger.write(*call(2).opening())
    eventually(lambda: "locked" in ledger.snapshot().fold_trouble)
    with pytest.raises(TimeoutError, match="locked"):
        ledger.flush(timeout_s=0.1)
    lock.execute("ROLLBACK")
    lock.close()
    ledger.flush()
    assert states(tmp_path) == {call(1).id: "settled", call(2).id: "open"}
    assert rows(tmp_path, "SELECT sum(cost_nanousd) FROM calls") == [(12_345,)]
    eventually(lambda: ledger.snapshot().fold_trouble == "")
    assert ledger.snapshot().contradictions == 0


def test_on_a_full_disk_new_calls_are_refused_endings_are_kept_and_all_is_well_when_space_returns(
    small_disk, fill, open_ledger, call, eventually
):
    ledger = open_ledger(small_disk)
    for number in range(20):
        ledger.write(*call(number).opening())
    ledger.flush()
    ballast = fill()
    with pytest.raises(LedgerUnavailable, match="No space left"):
        ledger.write(*call(99).opening(), *[call(99).started()] * 100)
    fill()  # the reserve too
    for number in range(20):
        ledger.write(*call(number).ending())
    assert ledger.snapshot().held_lines > 0
    with pytest.raises(TimeoutError, match="No space left"):
        ledger.flush(timeout_s=0.5)
    ballast.unlink()
    eventually(lambda: ledger.snapshot().journal_trouble == "")
    ledger.flush()
    assert states(small_disk) == {call(number).id: "settled" for number in range(20)}
    ledger.write(*call(100).opening())
    ledger.close()


def test_a_start_does_not_wait_longer_than_it_may_and_the_rest_is_folded_beside_new_calls(
    tmp_path, open_ledger, call, monkeypatch, eventually
):
    journal = Journal(tmp_path / "journal", now_ns=time.time_ns)
    for number in range(2_000):
        journal.write(call(number).opening())
    journal.close()
    monkeypatch.setattr("headgate.storage.ledger.START_WAIT_S", 0.0)
    ledger = open_ledger()
    ledger.write(*call(9_999).opening())
    ledger.write(*call(9_999).ending())
    eventually(lambda: list(states(tmp_path).values()).count("estimated") == 2_000)
    ledger.flush()
    assert states(tmp_path)[call(9_999).id] == "settled"


def test_what_was_written_before_close_is_folded_by_it(tmp_path, open_ledger, call):
    ledger = open_ledger()
    for number in range(1_000):
        ledger.write(*call(number).opening())
        ledger.write(*call(number).ending())
    ledger.close()
    assert rows(tmp_path, "SELECT count(*) FROM calls WHERE state = 'settled'") == [(1_000,)]


def test_durable_returns_at_once_unless_power_may_fail(tmp_path, open_ledger, call):
    ledger = open_ledger()
    ledger.write(*call(1).opening())
    asyncio.run(ledger.durable())
    assert ledger._journal.synced == 0


def test_with_durability_power_those_who_wait_share_a_sync_and_all_is_on_the_disk(tmp_path, open_ledger, call):
    ledger = open_ledger(durability="power")

    async def one(number: int) -> None:
        ledger.write(*call(number).opening())
        written = ledger._journal.written
        await ledger.durable()
        assert ledger._journal.synced >= written

    async def many() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(one(number))

    asyncio.run(many())


def test_a_waiter_that_is_cancelled_does_not_cancel_the_sync_of_others(tmp_path, open_ledger, call):
    ledger = open_ledger(durability="power")

    async def run() -> None:
        ledger.write(*call(1).opening())
        async with asyncio.TaskGroup() as group:
            leaves = group.create_task(ledger.durable())
            stays = group.create_task(ledger.durable())
            await asyncio.sleep(0)
            leaves.cancel()
        assert stays.exception() is None

    asyncio.run(run())


def test_a_copy_of_the_data_directory_at_any_moment_opens_clean(tmp_path, open_ledger, call):
    """What a machine that lost power finds is such a copy, as long as the disk keeps the order of writes."""
    source, ledger = tmp_path / "source", None
    ledger = open_ledger(source)
    for moment in range(5):
        for number in range(moment * 100, moment * 100 + 100):
            ledger.write(*call(number).opening())
            ledger.write(*call(number).ending())
        copy = tmp_path / f"copy-{moment}"
        shutil.copytree(source / "journal", copy / "journal")
        for path in source.glob(f"{DATABASE_NAME}*"):
            shutil.copy(path, copy)
        written = (moment + 1) * 100
        open_ledger(copy)
        found = rows(copy, "SELECT count(*), sum(cost_nanousd) FROM calls WHERE state = 'settled'")
        assert found == [(written, written * 12_345)]


def assert_every_promise_is_kept(data_dir: Path, *, processes: int = 4) -> None:
    """What the witness saw written is in the tables, once, ended once, at the cost it was told."""
    promised: dict[tuple[str, int], str] = {}
    for line in (data_dir / "witness").read_text().splitlines():
        call_id, attempt, what = line.split()
        promised[call_id, int(attempt)] = what
    found = {
        (call_id, number): (state, cost)
        for call_id, number, state, cost in rows(data_dir, "SELECT call_id, number, state, cost_nanousd FROM attempts")
    }
    assert promised.keys() <= found.keys()
    assert all(state in {"settled", "estimated", "void"} for state, _ in found.values())
    for key, what in promised.items():
        state, cost_nanousd = found[key]
        if what.isdigit():
            assert found[key] == ("void" if what == "0" else "settled", int(what))
        elif state == "estimated":  # else it ended just before the kill, unseen by the witness
            assert cost_nanousd >= 910
    assert set(states(data_dir).values()) <= {"settled", "estimated", "void"}
    sums = rows(data_dir, "SELECT (SELECT sum(cost_nanousd) FROM calls), (SELECT sum(cost_nanousd) FROM attempts)")
    assert sums[0][0] == sums[0][1]
    assert len(found) - len(promised) <= processes * 21  # written, and killed before the witness heard of it


def test_a_process_that_begins_while_another_adopts_keeps_its_calls(tmp_path, open_ledger, call, eventually):
    survivor = open_ledger()
    read_open_calls = survivor._tables.open_calls
    late: list[Journal] = []

    def open_calls_after_another_began() -> list[Any]:
        if not late:
            journal = Journal(tmp_path / "journal", now_ns=time.time_ns)
            journal.write(call(1).opening())
            other = open_database(tmp_path, now_ns=time.time_ns)
            tables, fold = LedgerTables(other), Fold(lambda _: None)
            fold.apply(call(1).opening(), journal.writer)
            tables.commit(*fold.changed(), journal.segments[0].name, journal.segments[0].size)
            tables.close()
            other.dispose()
            late.append(journal)
        return read_open_calls()

    survivor._tables.open_calls = open_calls_after_another_began
    survivor.sweep(set())
    eventually(lambda: late and not survivor._adoption_due)
    survivor.flush()
    assert states(tmp_path) == {call(1).id: "open"}
    late[0].close()
    survivor.sweep(set())
    eventually(lambda: states(tmp_path) == {call(1).id: "estimated"})


def test_of_processes_beside_each_other_every_promise_is_kept_whoever_is_killed(tmp_path, open_ledger):
    """Four at once in one data directory; those killed are replaced, and a survivor's work is nobody else's."""
    dice = random.Random(4)
    running = [start_writer(tmp_path, seed) for seed in range(4)]
    for seed in range(10, 18):
        enough = size_of_witness(tmp_path) + dice.randrange(20_000, 200_000)
        wait_until(lambda enough=enough: size_of_witness(tmp_path) >= enough, running)
        kill(running.pop(dice.randrange(len(running))))
        running.append(start_writer(tmp_path, seed))
    for process in running:
        kill(process)
    ledger = open_ledger()
    assert_every_promise_is_kept(tmp_path, processes=12)
    snapshot = ledger.snapshot()
    assert (snapshot.damaged_lines, snapshot.contradictions, snapshot.open_calls) == (0, 0, 0)
    assert len(segments(tmp_path)) == 1


SEEDS = [*range(20), *(pytest.param(seed, marks=pytest.mark.drill) for seed in range(20, 200))]


@pytest.mark.parametrize("seed", SEEDS)
def test_after_a_kill_at_any_moment_every_attempt_has_exactly_one_ending(tmp_path, open_ledger, seed):
    dice = random.Random(seed)
    enough = int(10 ** dice.uniform(1.5, 5.5))
    killed_after(tmp_path, lambda: size_of_witness(tmp_path) >= enough, seed=seed)
    if seed % 2:  # and one that dies while it takes up what the first one left
        known = set(segments(tmp_path))
        killed_after(tmp_path, lambda: bool(set(segments(tmp_path)) - known), seed=seed + 1_000)
    ledger = open_ledger()
    assert_every_promise_is_kept(tmp_path)
    snapshot = ledger.snapshot()
    assert (snapshot.damaged_lines, snapshot.contradictions, snapshot.open_calls) == (0, 0, 0)
    assert len(segments(tmp_path)) == 1
