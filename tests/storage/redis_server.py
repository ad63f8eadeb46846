"""A real Redis for one test: on a socket in the test's folder, without a disk, stopped by its process id."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


class RedisServer:
    """A server that can be killed, frozen, flushed and started again at the same place."""

    def __init__(self, folder: Path) -> None:
        self._program = shutil.which("redis-server") or ""
        if not self._program:
            pytest.skip("redis-server is not installed; ./check installs it where it may")
        # Not in the folder: a path of more than 107 bytes is no address of a socket.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Returns when it answers."""
        self._process = subprocess.Popen(
            [
                self._program,
                *("--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"),
                *("--dir", str(self._folder), "--loglevel", "warning", *options),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while True:
            try:
                if self.say("PING").startswith(b"+PONG"):
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, "redis-server did not come up"
            time.sleep(0.01)

    def say(self, *words: str) -> bytes:
        """One command and the first 64 KiB of its answer, without the client that is under test."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            parts = b"".join(b"$%d\r\n%b\r\n" % (len(word.encode()), word.encode()) for word in words)
            connection.sendall(b"*%d\r\n%b" % (len(words), parts))
            return connection.recv(1 << 16)

    def freeze(self) -> None:
        """SIGSTOP: it accepts connections, as the kernel does that for it, and says nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """`kill -9`."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)
