"""What the command line exits with, and how a command says that it cannot."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes; docs/cli.md explains them to users."""

    OK = 0
    FAILED = 1
    """It ran and failed: a service stopped by itself."""
    USAGE = 2
    """The command line makes no sense."""
    SETTINGS = 3
    """The settings make no sense."""
    NOT_FOUND = 4
    """What was named does not exist."""
    STORE = 5
    """The data directory or the database cannot be used."""
    ADDRESS = 6
    """An address to listen on is taken or not ours."""


class CommandError(Exception):
    """The user can mend this. The text says what is wrong and how."""

    def __init__(self, code: Exit, text: str) -> None:
        super().__init__(text)
        self.code = code
