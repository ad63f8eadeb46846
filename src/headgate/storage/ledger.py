"""The ledger of one process: journal in front, database behind, one thread between them.

What it is: `Ledger` of `interfaces.py`, the replay of what a dead process left, and the sweep of what a living one did.
What it is not: a store that a request waits for. Only the journal is; a database that is down, locked or full delays
what `headgate usage` shows and loses nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import sqlalchemy as sa
import structlog

from headgate.policy.records import LedgerEvent
from headgate.storage.fold import CallRow, Fold, Price, ending_of_orphan
from headgate.storage.journal import Durability, Journal, Segment, read
from headgate.storage.ledger_tables import LedgerTables

FOLD_EVERY_S = 0.2
FOLD_EVENTS = 4000
"""Events that wake the writer before its time."""
BATCH_BYTES = 256 << 10
"""About 1,000 events: what one transaction holds the GIL for is some milliseconds."""
START_WAIT_S = 5.0
"""How long a start waits for the replay of what dead processes left. Some 250,000 calls; more are folded beside the
new ones, so that a database that was away for a day does not keep the door shut (failure-model I14: ready in 10 s)."""

_log = structlog.get_logger(__name__)


class LedgerSnapshot(msgspec.Struct, frozen=True):
    """How the ledger is, for `/admin` and metrics. All but `unfolded_bytes` and `open_calls` are 0 or "" when well."""

    unfolded_bytes: int
    open_calls: int
    held_lines: int
    """Endings in memory that no disk takes."""
    journal_trouble: str
    fold_trouble: str
    damaged_lines: int
    contradictions: int


class LocalLedger:
    """See `interfaces.Ledger`. Make it once a process, from the composition root; `close` it last."""

    def __init__(
        self,
        data_dir: Path,
        engine: sa.Engine,
        *,
        price: Price,
        now_ns: Callable[[], int],
        durability: Durability = "process",
    ) -> None:
        """Returns when what dead processes left is folded and closed, or after 5 s. Raises LedgerUnavailable."""
        self._price = price
        self._durability = durability
        self._journal = Journal(data_dir / "journal", now_ns=now_ns, durability=durability)
        self._tables = LedgerTables(engine)
        self._fold = Fold(self._tables.find)
        self._unfolded_events = 0
        self._folded = 0
        self._retired_bytes = 0
        self._progress = threading.Condition()
        self._wake = threading.Event()
        self._suspects: set[str] = set()
        self._adoption_due = True
        self._stopping = False
        self._fold_trouble = ""
        self._damaged_lines = 0
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="ledger-sync")
        self._syncing: asyncio.Future[None] | None = None
        self._writer = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._writer.start()
        self._wake.set()
        with self._progress:
            self._progress.wait_for(lambda: not self._adoption_due, START_WAIT_S)

    def write(self, *events: LedgerEvent) -> None:
        """See `Ledger.write`. For any thread."""
        self._journal.write(events)
        self._unfolded_events += len(events)
        if self._unfolded_events >= FOLD_EVENTS:
            self._unfolded_events = 0
            self._wake.set()

    async def durable(self) -> None:
        """See `Ledger.durable`. Those who wait at the same time share one fdatasync. Raises LedgerUnavailable."""
        if self._durability == "process":
            return
        target = self._journal.written
        while self._journal.synced < target:
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.get_running_loop().run_in_executor(self._syncer, self._journal.sync)
            await asyncio.shield(self._syncing)

    def sweep(self, live_call_ids: Collection[str]) -> None:
        """Close the calls that nobody works on any more, and those of processes that died meanwhile.

        `live_call_ids` are the calls that this process works on now; an owner writes the ending before it drops its
        call. To be called every 30 s, so that an orphan is closed within 60 s (failure-model I1). Does not block.
        """
        # Copied now: a call that opens after this line cannot be meant.
        self._suspects = set(self._fold.open) - set(live_call_ids)
        self._adoption_due = True
        self._wake.set()

    def flush(self, *, timeout_s: float = 10.0) -> None:
        """Return when all that was written so far can be queried. Raises TimeoutError, with what is in the way."""
        target = self._journal.written
        self._wake.set()
        with self._progress:
            if not self._progress.wait_for(lambda: self._folded >= target, timeout_s):
                reason = self._fold_trouble or self._journal.trouble or "the fold is behind"
                raise TimeoutError(f"not folded after {timeout_s} s: {reason}")

    def snapshot(self) -> LedgerSnapshot:
        """For any thread."""
        return LedgerSnapshot(
            unfolded_bytes=self._journal.written - self._folded,
            open_calls=len(self._fold.open),
            held_lines=self._journal.held,
            journal_trouble=str(self._journal.trouble or ""),
            fold_trouble=self._fold_trouble,
            damaged_lines=self._damaged_lines,
            contradictions=self._fold.contradictions,
        )

    def close(self) -> None:
        """Fold what is left and stop. A call still open is closed by the next start."""
        self._stopping = True
        self._wake.set()
        self._writer.join()
        self._syncer.shutdown()
        self._journal.close()
        self._tables.close()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            self._wake.wait(FOLD_EVERY_S)
            self._wake.clear()
            stopping = self._stopping  # read before the cycle: what was written before `close` is folded by it
            try:
                self._cycle()
            except Exception as error:
                # The top of a thread: what it could not do is shown and tried again, from the last commit. The fold
                # is then told some events twice, which changes nothing.
                self._tell_trouble(repr(error))
            else:
                self._tell_trouble("")

    def _cycle(self) -> None:
        # While the disk is full the database gets none of the room that was freed for endings.
        if not self._journal.recover():
            return
        suspects, self._suspects = self._suspects, set()
        self._fold_own()
        self._end([self._fold.open[call_id] for call_id in suspects & self._fold.open.keys()])
        self._fold_own()
        if self._adoption_due:
            self._adopt()

    def _adopt(self) -> None:
        """Fold what dead processes left, close what they had open, delete their segments."""
        with self._journal.adoption() as claim:
            if claim is None:
                return
            dead = {segment.writer for segment in claim.dead}
            for call in self._tables.open_calls():
                if call.writer in claim.living:
                    continue
                if call.writer not in dead and self._journal.has_writer(call.writer):
                    continue  # it began after the claim
                self._fold.load(call)
            for segment in claim.dead:
                segment.folded = self._tables.position(segment.name)
                self._fold_segment(segment)
            self._end([call for call in self._fold.open.values() if call.writer not in claim.living])
            # Before their locks are given up: who takes them next must find nothing open.
            self._fold_own()
            for segment in claim.dead:
                self._retire(segment)
        for name in self._tables.segments():
            if not self._journal.has(name):
                self._tables.forget(name)
        with self._progress:
            self._adoption_due = False
            self._progress.notify_all()

    def _end(self, orphans: list[CallRow]) -> None:
        for call in orphans:
            self._journal.write(ending_of_orphan(call, self._price))
        if orphans:
            writers = sorted({call.writer for call in orphans})
            _log.warning("ledger_orphans_closed", calls=len(orphans), writers=writers)

    def _fold_own(self) -> None:
        try:
            for segment in tuple(self._journal.segments):
                rotated = segment is not self._journal.segments[-1]
                self._fold_segment(segment)
                if rotated and self._retire(segment):
                    self._journal.segments.remove(segment)
                    self._retired_bytes += segment.size
        finally:
            with self._progress:
                self._folded = self._retired_bytes + sum(segment.folded for segment in self._journal.segments)
                self._progress.notify_all()

    def _fold_segment(self, segment: Segment) -> None:
        for batch in read(segment, batch_bytes=BATCH_BYTES):
            self._fold.apply(batch.events, segment.writer)
            self._tables.commit(*self._fold.changed(), segment.name, batch.end)
            self._fold.committed()
            segment.folded = batch.end
            if batch.damaged:
                segment.damaged += batch.damaged
                self._damaged_lines += batch.damaged
                _log.error("ledger_lines_damaged", segment=segment.name, before_byte=batch.end, lines=batch.damaged)

    def _retire(self, segment: Segment) -> bool:
        """Delete a segment that is folded, once its rows are past a power loss. False: not yet."""
        if not self._tables.checkpoint():
            return False
        segment.remove()
        self._tables.forget(segment.name)
        return True

    def _tell_trouble(self, trouble: str) -> None:
        if trouble != self._fold_trouble:
            _log.error("ledger_fold_trouble", trouble=trouble) if trouble else _log.info("ledger_fold_well")
        self._fold_trouble = trouble
