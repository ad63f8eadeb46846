"""Takes log lines off the event loop: a thread writes them in batches and counts them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from headgate.telemetry.log_line import LogLine, encode

INTERVAL_S = 0.1
LINES_MAX = 100_000
"""Waiting to be written; beyond it lines are dropped and counted: a full disk must not stop a call."""


class LogWriter:
    """`put` costs the loop an append; the rest happens in the thread. `fd` None: count only."""

    def __init__(self, fd: int | None, observe: Callable[[LogLine], None]) -> None:
        self._fd = fd
        self._observe = observe
        self._lines: deque[LogLine] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self.dropped = 0
        """Lines that could not be written."""

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, line: LogLine) -> None:
        """Have it written soon. Never blocks, never raises."""
        if len(self._lines) >= LINES_MAX:
            self.dropped += 1
        else:
            self._lines.append(line)

    def close(self) -> None:
        """Write what waits and stop."""
        self._stopping.set()
        self._thread.join()
        self._drain()

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            self._drain()

    def _drain(self) -> None:
        lines = self._lines
        if not lines:
            return
        batch = [lines.popleft() for _ in range(len(lines))]
        try:
            for line in batch:
                self._observe(line)
            if self._fd is not None:
                data = memoryview(b"".join(map(encode, batch)))
                while data:
                    data = data[os.write(self._fd, data) :]
        except Exception:  # the top of a thread: whatever one batch holds, the next must still be written
            self.dropped += len(batch)
