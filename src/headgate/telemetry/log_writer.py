"""Takes log lines off the event loop: a thread writes them in batches and counts them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from headgate.telemetry.log_line import LogLine, encode
from headgate.telemetry.shared_output import encode_whole, writes

INTERVAL_S = 0.1
LINES_MAX = 100_000
"""Waiting to be written; beyond it lines are dropped and counted: a full disk must not stop a call."""


class LogWriter:
    """`put` costs the loop an append; the rest happens in the thread. `fd` None: count only.

    `is_shared`: other processes write to `fd` too, and no line may be torn by theirs.
    """

    def __init__(self, fd: int | None, observe: Callable[[LogLine], None], *, is_shared: bool = False) -> None:
        self._fd = fd
        self._is_shared = is_shared
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
                if self._is_shared:
                    pieces = writes([encode_whole(line) for line in batch])
                else:
                    pieces = iter([b"".join(map(encode, batch))])
                for piece in pieces:
                    data = memoryview(piece)
                    while data:
                        data = data[os.write(self._fd, data) :]
        except Exception:  # the top of a thread: whatever one batch holds, the next must still be written
            self.dropped += len(batch)
