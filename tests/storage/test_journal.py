"""Laws of the journal: what a line is, what a torn one does, who holds a segment, and a disk that is full."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headgate.policy.records import LedgerEvent
from headgate.storage.interfaces import LedgerUnavailable
from headgate.storage.journal import Journal, Segment, line_of, read


def segment_of(path: Path, content: bytes) -> Segment:
    path.write_bytes(content)
    return Segment(path, os.open(path, os.O_RDWR))


def events_in(segment: Segment, *, batch_bytes: int = 1 << 20) -> list[LedgerEvent]:
    return [event for batch in read(segment, batch_bytes=batch_bytes) for event in batch.events]


def written_by(journal: Journal) -> list[LedgerEvent]:
    return [event for segment in journal.segments for event in events_in(segment)]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal", now_ns=time.time_ns)
    yield journal
    journal.close()


def open_until_refused(journal: Journal, call: Callable[..., Any], *, first: int) -> int:
    """Open calls until one is refused (what is left of the last page takes a few); how many were not."""
    for count in range(100):
        try:
            journal.write(call(first + count).opening())
        except LedgerUnavailable as error:
            assert "No space left" in str(error)  # noqa: PT017
            return count
    raise AssertionError("a full disk takes calls")


def test_what_is_written_is_read_back_in_its_order(journal, call):
    journal.write(call(1).opening())
    journal.write((call(1).started(), call(1).progress(7)))
    journal.write(call(1).ending())
    assert written_by(journal) == [*call(1).opening(), call(1).started(), call(1).progress(7), *call(1).ending()]


@pytest.mark.parametrize("batch_bytes", [1, 10, 500, 1 << 20])
def test_a_batch_of_any_size_reads_the_same(journal, call, batch_bytes):
    for number in range(20):
        journal.write(call(number).opening())
    expected = [event for number in range(20) for event in call(number).opening()]
    assert events_in(journal.segments[0], batch_bytes=batch_bytes) == expected


def test_a_journal_torn_at_any_byte_of_its_tail_keeps_every_line_before(tmp_path, call):
    lines = [line_of(call(number).opening()) for number in range(3)]
    whole = b"".join(lines)
    first = len(lines[0])
    for cut in range(first, len(whole)):
        segment = segment_of(tmp_path / "1-1-0.jsonl", whole[:cut])
        complete = 2 if cut >= first + len(lines[1]) else 1
        batches = list(read(segment, batch_bytes=1 << 20))
        assert [event for batch in batches for event in batch.events] == [
            event for number in range(complete) for event in call(number).opening()
        ]
        assert sum(batch.damaged for batch in batches) == 0
        segment.close()


def test_a_line_with_any_byte_flipped_is_found_and_costs_no_other_line(tmp_path, call):
    lines = [line_of(call(number).opening()) for number in range(3)]
    start, end = len(lines[0]), len(lines[0]) + len(lines[1]) - 1  # its newline apart: that joins two lines
    for at in range(start, end):
        for bit in (0x01, 0x20, 0x80):
            content = bytearray(b"".join(lines))
            content[at] ^= bit
            segment = segment_of(tmp_path / "1-1-0.jsonl", bytes(content))
            (batch,) = read(segment, batch_bytes=1 << 20)
            # A flip of the checksum's case changes no value, so the line still holds.
            if batch.damaged:
                assert batch.events == [*call(0).opening(), *call(2).opening()]
            else:
                assert at < start + 9
                assert batch.events == [event for number in range(3) for event in call(number).opening()]
            segment.close()


def test_a_full_segment_is_followed_by_another(tmp_path, call):
    journal = Journal(tmp_path, now_ns=time.time_ns, segment_bytes=2_000)
    for number in range(20):
        journal.write(call(number).opening())
    assert len(journal.segments) > 3
    assert all(segment.size < 3_000 for segment in journal.segments)
    assert written_by(journal) == [event for number in range(20) for event in call(number).opening()]
    journal.close()


def test_the_segments_of_a_living_writer_are_not_claimed_and_those_of_a_dead_one_are(tmp_path, journal, call):
    other = Journal(tmp_path / "journal", now_ns=time.time_ns)
    other.write(call(1).opening())
    with journal.adoption() as claim:
        assert claim.dead == []
        assert claim.living == {journal.writer, other.writer}
    other.close()
    with journal.adoption() as claim:
        assert [segment.writer for segment in claim.dead] == [other.writer]
        assert events_in(claim.dead[0]) == list(call(1).opening())


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_segment_that_its_living_writer_deletes_during_the_claim_is_nobodys(tmp_path, journal, call, moment):
    other = Journal(tmp_path / "journal", now_ns=time.time_ns, segment_bytes=2_000)
    for number in range(20):
        other.write(call(number).opening())
    rotated = other.segments[0]
    open_file = os.open

    def open_late(path, *arguments):
        if Path(path) != rotated.path or rotated.fd < 0:
            return open_file(path, *arguments)
        if moment == "before it is opened":
            rotated.remove()
        fd = open_file(path, *arguments)
        if moment == "before it is locked":
            rotated.remove()
        return fd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headgate.storage.journal.os.open", open_late)
        with journal.adoption() as claim:
            assert rotated.fd < 0, "the moment was met"
            assert claim.dead == []
            assert claim.living == {journal.writer, other.writer}
    with journal.adoption() as claim:
        assert claim is not None, "nothing is left locked"
    other.close()


def test_a_claim_that_fails_gives_its_locks_back(tmp_path, journal, call):
    other = Journal(tmp_path / "journal", now_ns=time.time_ns)
    other.write(call(1).opening())
    other.close()
    directory = tmp_path / "journal" / "0-0-0.jsonl"
    directory.mkdir()
    with pytest.raises(IsADirectoryError), journal.adoption():
        pass
    directory.rmdir()
    with journal.adoption() as claim:
        assert claim is not None
        assert [segment.writer for segment in claim.dead] == [other.writer]


def test_only_one_process_adopts_at_a_time(tmp_path, journal):
    other = Journal(tmp_path / "journal", now_ns=time.time_ns)
    with journal.adoption() as claim, other.adoption() as second:
        assert claim is not None
        assert second is None
    other.close()


def test_the_reserve_of_a_dead_writer_is_given_back(tmp_path, journal):
    other = Journal(tmp_path / "journal", now_ns=time.time_ns)
    other.close()
    with journal.adoption():
        pass
    assert [path.stem for path in (tmp_path / "journal").glob("*.reserve")] == [journal.writer]


def test_a_directory_that_cannot_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / "journal").write_text("a file where the directory should be")
    with pytest.raises(LedgerUnavailable, match="journal cannot be written"):
        Journal(tmp_path / "journal", now_ns=time.time_ns)


def test_on_a_full_disk_openings_are_refused_at_once_and_endings_still_fit(small_disk, fill, call):
    journal = Journal(small_disk, now_ns=time.time_ns)
    for number in range(50):
        journal.write(call(number).opening())
    fill()
    opened = 50 + open_until_refused(journal, call, first=50)
    for number in range(opened):
        journal.write(call(number).ending())
    assert journal.held == 0
    assert written_by(journal)[-2:] == list(call(opened - 1).ending())
    with pytest.raises(LedgerUnavailable):  # the reserve is not for new calls
        journal.write(call(999).opening())
    journal.close()


def test_endings_beyond_the_reserve_wait_in_memory_and_are_written_when_space_returns(small_disk, fill, call):
    journal = Journal(small_disk, now_ns=time.time_ns)
    for number in range(50):
        journal.write(call(number).opening())
    ballast = fill()
    open_until_refused(journal, call, first=900)
    before = len(written_by(journal))
    journal.write((call(0).started(),))  # releases nothing more: the reserve is released already
    fill()
    for number in range(50):
        journal.write(call(number).ending())
    assert journal.held > 0
    assert not journal.recover()
    ballast.unlink()
    assert journal.recover()
    assert journal.held == 0
    assert written_by(journal)[before:] == [
        call(0).started(),
        *(event for number in range(50) for event in call(number).ending()),
    ]
    journal.write(call(1_000).opening())
    assert written_by(journal)[-2:] == list(call(1_000).opening())
    journal.close()


def test_what_comes_before_a_refused_opening_is_kept(small_disk, fill, call):
    journal = Journal(small_disk, now_ns=time.time_ns)
    journal.write(call(1).opening())
    fill()
    open_until_refused(journal, call, first=900)
    with pytest.raises(LedgerUnavailable):
        journal.write((call(1).failed(1), call(1).intent(2), call(1).ended(2)))
    assert written_by(journal)[-1] == call(1).failed(1)
    journal.close()


def test_a_write_cut_short_leaves_no_torn_line(tmp_path, call):
    """A limit on the file's size makes the kernel take a part of a line and then refuse."""
    program = """
import resource, signal, sys, time
from pathlib import Path
import msgspec
from headgate.policy.records import LedgerEvent
from headgate.storage.interfaces import LedgerUnavailable
from headgate.storage.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
events = tuple(msgspec.json.decode(sys.argv[2], type=list[LedgerEvent]))
journal = Journal(Path(sys.argv[1]), now_ns=time.time_ns, reserve_bytes=100)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
accepted = 0
try:
    while True:
        journal.write(events)
        accepted += 1
except LedgerUnavailable:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert journal.recover()
journal.write(events)
print(accepted + 1)
"""
    line = line_of(call(1).opening())
    for limit in range(3 * len(line), 4 * len(line), 97):
        directory = tmp_path / str(limit)
        payload = line[9:].decode()
        arguments = [sys.executable, "-c", program, str(directory), payload, str(limit)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        (path,) = directory.glob("*.jsonl")
        assert path.read_bytes() == line * int(done.stdout)


def test_what_is_synced_is_all_that_was_written_before(tmp_path, call):
    journal = Journal(tmp_path, now_ns=time.time_ns, durability="power", segment_bytes=2_000)
    for number in range(20):
        journal.write(call(number).opening())
        journal.sync()
        assert journal.synced == journal.written
    journal.close()


def test_writes_from_several_threads_do_not_mix(journal, call):
    def work(first: int) -> None:
        for number in range(first, first + 200):
            journal.write(call(number).opening())

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1_000, 2_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = written_by(journal)
    assert len(events) == 1_200
    assert all(left.call_id == right.call_id for left, right in zip(events[::2], events[1::2], strict=True))
