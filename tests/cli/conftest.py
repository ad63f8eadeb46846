"""The real command, as a process of its own, in a data directory of the test's own."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-P", "-m", "headgate"]


class Headgate:
    """Runs `headgate` as a user would, and nothing of the tester's own settings reaches it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HEADGATE_", "ANTHROPIC_", "CLAUDE_"))
        } | {"HEADGATE_DATA_DIR": str(self.data), "COLUMNS": "200", "NO_COLOR": "1"}

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def json(self, *arguments: str, **environment: str) -> Any:
        """Run with --json; it must succeed."""
        done = self(*arguments, "--json", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refusal(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run what must be refused: exit code and message. Never a traceback, and nothing on standard output."""
        done = self(*arguments, **environment)
        assert done.returncode != 0
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    def execute(self, statement: str) -> None:
        """Change the database behind the command's back."""
        with closing(sqlite3.connect(self.data / "headgate.db")) as database, database:
            database.execute(statement)

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start, for the test to stop."""
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def headgate(tmp_path: Path) -> Headgate:
    """The command, with a fresh data directory."""
    return Headgate(tmp_path)
