"""The journal: what happened, one line a write, in append-only files of the data directory.

What it is: the only store a request waits for (docs/decisions/0003). A line is written with one `write(2)`, so it
survives the death of the process; with `durability = "power"` `sync` makes it survive the death of the machine.
What it is not: something to query. `ledger.py` folds it into the database and then deletes it.

A segment is `<start_ns>-<pid>-<n>.jsonl`, a line `<crc32 of the rest, 8 hex digits> [<event>,…]`: the events of one
write stand or fall together. `<start_ns>-<pid>` names the writer. Its living process holds an flock on each of its
segments, so a segment that can be locked belongs to nobody and is adopted. One writer, one file: two processes in a
data directory never write to the same segment.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

import msgspec

from headgate.policy.records import AttemptIntent, CallOpened, LedgerEvent
from headgate.storage.interfaces import LedgerUnavailable

Durability = Literal["process", "power"]

SEGMENT_BYTES = 64 << 20
RESERVE_BYTES = 1 << 20
"""Freed when the disk is full: room for some 2,000 endings, more than the streams one process carries."""
RECENT_LINES_MAX = 20_000
"""Remembered beside the file: some 10 MB at most, when the fold is far behind."""
HELD_BYTES_MAX = 64 << 20
"""Endings kept in memory while no disk takes them. Calls that end are at most those that were open."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[LedgerEvent]).decode


class Written(NamedTuple):
    """A line that was written, and where."""

    start: int
    end: int
    events: tuple[LedgerEvent, ...]


class Segment:
    """One file of the journal, locked as long as this object is not closed. `size` is what may be read of it."""

    __slots__ = ("damaged", "fd", "folded", "name", "path", "recent", "size")

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.name = path.stem
        self.size = os.fstat(fd).st_size
        self.folded = 0
        """Offset up to which the reader has taken it."""
        self.damaged = 0
        """Lines that could not be read."""
        self.recent: deque[Written] = deque(maxlen=RECENT_LINES_MAX)
        """The last lines this process wrote, as they were before they became bytes: who reads them in time need not
        decode them again. What is missing here is in the file."""

    @property
    def writer(self) -> str:
        return self.name.rpartition("-")[0]

    def close(self) -> None:
        """Give up the lock; again is nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def remove(self) -> None:
        """Delete the file, or set it aside as `.damaged` when some of it could not be read: it may be evidence."""
        if self.damaged:
            self.path.rename(self.path.with_suffix(".damaged"))
        else:
            self.path.unlink()
        self.close()


class Batch(NamedTuple):
    """Some lines of a segment, decoded."""

    events: list[LedgerEvent]
    end: int
    """Offset after the last of them."""
    damaged: int
    """Lines among them that were torn or flipped, and are skipped."""


class Claim(NamedTuple):
    """What `Journal.adoption` found in the directory."""

    dead: list[Segment]
    """Segments of writers that are gone, oldest first, locked by us now."""
    living: set[str]
    """Writers that hold a lock elsewhere."""


def line_of(events: tuple[LedgerEvent, ...]) -> bytes:
    """The line that carries these events."""
    payload = _encode(events)
    return b"%08x %b\n" % (crc32(payload), payload)


def read(segment: Segment, *, batch_bytes: int) -> Iterator[Batch]:
    """The lines from `segment.folded` to `segment.size`, about `batch_bytes` at a time.

    A last line without its newline is not read: it is being written, or it was torn by a crash and never counted.
    """
    offset, want = segment.folded, batch_bytes
    while True:
        remembered = _remembered(segment, offset, batch_bytes)
        if remembered is not None:
            offset = remembered.end
            yield remembered
            continue
        block = os.pread(segment.fd, min(want, segment.size - offset), offset)
        if not block:
            return
        whole = block.rfind(b"\n") + 1
        if not whole:
            if len(block) < want:
                return
            want *= 2  # one line is longer than the batch
            continue
        want = batch_bytes
        offset += whole
        events: list[LedgerEvent] = []
        damaged = 0
        for line in block[: whole - 1].split(b"\n"):
            payload = line[9:]
            try:
                if int(line[:8], 16) != crc32(payload):
                    raise ValueError("checksum")
                events += _decode(payload)
            except ValueError:  # also msgspec's errors and a checksum that is not hex
                damaged += line != b""
        yield Batch(events, offset, damaged)


def _remembered(segment: Segment, offset: int, batch_bytes: int) -> Batch | None:
    """The lines at this offset from memory; None when they must be read."""
    recent = segment.recent
    events: list[LedgerEvent] = []
    end = offset
    while recent and recent[0].start <= end and end - offset < batch_bytes:
        line = recent.popleft()
        if line.start == end:
            events += line.events
            end = line.end
    return Batch(events, end, 0) if events else None


class Journal:
    """The segments of this process. `write` is for any thread; everything else is for the ledger's writer thread."""

    def __init__(
        self,
        directory: Path,
        *,
        now_ns: Callable[[], int],
        durability: Durability = "process",
        segment_bytes: int = SEGMENT_BYTES,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        """Raises LedgerUnavailable when the directory cannot be written, or has no room for the reserve."""
        self.writer = f"{now_ns()}-{os.getpid()}"
        self.trouble: OSError | None = None
        """Why the disk does not take lines at present."""
        self.written = 0
        """Bytes of lines over all segments; the clock that `sync` and the fold are measured on."""
        self.synced = 0
        self.segments: list[Segment] = []
        """Those of this process that are not folded yet; the last one is written to."""
        self._directory = directory
        self._durability = durability
        self._segment_bytes = segment_bytes
        self._reserve_path = directory / f"{self.writer}.reserve"
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._count = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._open_segment()
            self._make_reserve()
        except OSError as error:
            raise self._unavailable(error) from error

    @property
    def held(self) -> int:
        """Lines in memory that wait for the disk."""
        return len(self._held)

    def write(self, events: tuple[LedgerEvent, ...]) -> None:
        """Append one line. Raises LedgerUnavailable as `Ledger.write` says."""
        line = line_of(events)
        with self._lock:
            if self.trouble is None:
                try:
                    self._append(line, events)
                except OSError as error:
                    self._begin_trouble(error)
                else:
                    if self.segments[-1].size >= self._segment_bytes:
                        self._rotate()
                    return
            self._write_in_trouble(events)

    def sync(self) -> None:
        """Make everything written so far survive a power loss. Blocks for one fdatasync. Raises LedgerUnavailable."""
        with self._lock:
            written = self.written
            # The fold may close the segment while we are in the system call.
            fd = os.dup(self.segments[-1].fd)
        try:
            os.fdatasync(fd)
        except OSError as error:
            # The kernel forgets which pages it could not write, so a second fdatasync would lie: take a new file.
            with self._lock:
                self._begin_trouble(error)
                self._rotate()
            raise self._unavailable(error) from error
        finally:
            os.close(fd)
        self.synced = max(self.synced, written)

    def recover(self) -> bool:
        """Try to get out of trouble: write what is held, then take the reserve back. True when all is well."""
        if self.trouble is None:
            return True
        with self._lock:
            try:
                self._write_held()
            except OSError as error:
                self.trouble = error
                return False
        try:
            self._make_reserve()
        except OSError:
            self._reserve_path.unlink(missing_ok=True)
            return False
        with self._lock:
            if not self._held:
                self.trouble = None
        return self.trouble is None

    @contextmanager
    def adoption(self) -> Iterator[Claim | None]:
        """Hold what dead writers left for the body of a `with`; see Claim. None: another process is at it."""
        fd = os.open(self._directory / "adoption", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            yield None
            return
        claim = Claim([], {self.writer})
        try:
            self._fill(claim)
            yield claim
        finally:
            for segment in claim.dead:
                segment.close()
            os.close(fd)

    def has_writer(self, writer: str) -> bool:
        """Whether a segment of this writer exists."""
        return any(self._directory.glob(f"{writer}-*.jsonl"))

    def has(self, name: str) -> bool:
        """Whether a segment of this name exists."""
        return (self._directory / f"{name}.jsonl").exists()

    def close(self) -> None:
        """Give up the locks. The files stay for the next start, which deletes what is folded."""
        with self._lock:
            for segment in self.segments:
                segment.close()

    def _fill(self, claim: Claim) -> None:
        own = {segment.path for segment in self.segments}
        with _locked(self._directory / "lock"):
            for path in sorted(self._directory.glob("*.jsonl"), key=_age):
                if path in own:
                    continue
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # its writer, which lives, has folded and deleted it just now
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    claim.living.add(path.stem.rpartition("-")[0])
                    continue
                if path.exists():
                    claim.dead.append(Segment(path, fd))
                else:
                    os.close(fd)  # deleted since it was opened, and only therefore not locked
            for path in self._directory.glob("*.reserve"):
                if path.stem not in claim.living:
                    path.unlink(missing_ok=True)

    def _append(self, line: bytes, events: tuple[LedgerEvent, ...] | None = None) -> None:
        """Append the whole line, or raise and leave the file as it was."""
        segment = self.segments[-1]
        done = os.write(segment.fd, line)
        if done != len(line):
            try:
                while done < len(line):
                    done += os.write(segment.fd, line[done:])
            except OSError:
                # What follows a torn line would be lost with it.
                os.ftruncate(segment.fd, segment.size)
                raise
        start = segment.size
        segment.size += done
        self.written += done
        if events is not None:
            segment.recent.append(Written(start, segment.size, events))

    def _begin_trouble(self, error: OSError) -> None:
        if self.trouble is None:
            self._reserve_path.unlink(missing_ok=True)
        self.trouble = error

    def _write_in_trouble(self, events: tuple[LedgerEvent, ...]) -> None:
        """Keep what comes before the first event that opens something; refuse the rest."""
        openings = [at for at, event in enumerate(events) if isinstance(event, CallOpened | AttemptIntent)]
        kept = events[: openings[0]] if openings else events
        if kept:
            line = line_of(kept)
            self._held.append(line)
            self._held_bytes += len(line)
            try:
                self._write_held()
            except OSError as error:
                self.trouble = error
        if openings or self._held_bytes > HELD_BYTES_MAX:
            assert self.trouble is not None
            raise self._unavailable(self.trouble)

    def _write_held(self) -> None:
        segment = self.segments[-1]
        if self._held and os.fstat(segment.fd).st_size != segment.size:
            # A torn line could not be cut off: end it, and its checksum will tell.
            torn_size = os.fstat(segment.fd).st_size
            self.written += torn_size - segment.size
            segment.size = torn_size
            self._append(b"\n")
        while self._held:
            self._append(self._held[0])
            self._held_bytes -= len(self._held.pop(0))

    def _rotate(self) -> None:
        """Go on in a new segment; where none can be made, in the old one."""
        old = self.segments[-1]
        try:
            if self._durability == "power":
                os.fdatasync(old.fd)
            self._open_segment()
        except OSError as error:
            self._begin_trouble(error)

    def _open_segment(self) -> None:
        path = self._directory / f"{self.writer}-{self._count}.jsonl"
        # Under the lock nobody can take the new file for a dead one before it is locked.
        with _locked(self._directory / "lock"):
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._durability == "power":
            _sync_directory(self._directory)
        self._count += 1
        self.segments.append(Segment(path, fd))

    def _make_reserve(self) -> None:
        # Written, not only sized: a sparse file reserves nothing.
        self._reserve_path.write_bytes(bytes(self._reserve_bytes))

    def _unavailable(self, error: OSError) -> LedgerUnavailable:
        return LedgerUnavailable(f"{self._directory} cannot be written: {error.strerror or error}")


class _locked:
    """An flock held for the body of a `with`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _age(path: Path) -> list[int]:
    return [int(part) for part in path.stem.split("-")]


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
