"""Runs `headgate …` with clocks that can be put forward, so that a day of pauses takes minutes.

    python -m load.later FILE gateway

FILE holds nanoseconds as a signed integer of 8 bytes; `put_forward` adds to it, and every program that runs on the same
file is that much later at once, by its wall clock and by its monotonic one. Between two looks at a clock a machine that
sleeps behaves like that. The loop's own timers go on at their own pace: nothing is skipped that is under way, so the
clocks are put forward while nothing is.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from pathlib import Path

_OFFSET = struct.Struct("<q")


def new_clock(file: Path) -> Path:
    """A file that says: no later than it is."""
    file.write_bytes(_OFFSET.pack(0))
    return file


def put_forward(file: Path, seconds: float) -> None:
    """Every program on this file is so much later from now on."""
    with file.open("r+b") as opened:
        (before,) = _OFFSET.unpack(opened.read(_OFFSET.size))
        opened.seek(0)
        opened.write(_OFFSET.pack(before + round(seconds * 1e9)))


def _patch(file: Path) -> None:
    with file.open("rb") as opened:
        shared = mmap.mmap(opened.fileno(), _OFFSET.size, prot=mmap.PROT_READ)
    monotonic, wall, wall_ns = time.monotonic, time.time, time.time_ns

    def later_ns() -> int:
        offset: int = _OFFSET.unpack_from(shared)[0]
        return offset

    time.monotonic = lambda: monotonic() + later_ns() / 1e9
    time.time = lambda: wall() + later_ns() / 1e9
    time.time_ns = lambda: wall_ns() + later_ns()


def main() -> None:
    _patch(Path(sys.argv[1]))
    sys.argv = ["headgate", *sys.argv[2:]]
    runpy.run_module("headgate", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
