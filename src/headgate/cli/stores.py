"""Opens for a command what the gateway would open: the settings, the database. Says in words why it cannot."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from headgate.cli.errors import CommandError, Exit
from headgate.gateway.settings import Settings, SettingsError, load_settings
from headgate.storage.database import DatabaseRefused, open_database


def settings() -> Settings:
    """What file and environment say. Raises CommandError."""
    try:
        return load_settings()
    except SettingsError as error:
        raise CommandError(Exit.SETTINGS, str(error)) from None


@contextmanager
def refusals() -> Iterator[Settings]:
    """The settings, for a block that works in their data directory: what it cannot do becomes a CommandError."""
    found = settings()
    try:
        yield found
    except DatabaseRefused as error:
        raise CommandError(Exit.STORE, str(error)) from None
    except SQLAlchemyError as error:
        raise CommandError(Exit.STORE, f"{found.data_dir}: the database does not answer: {error}") from None
    except OSError as error:
        if error.filename is None:
            raise  # not about a file: no matter of the data directory
        raise CommandError(
            Exit.STORE, f"cannot use the data directory {found.data_dir}: {error.strerror}. Set HEADGATE_DATA_DIR."
        ) from None


@contextmanager
def database() -> Iterator[sa.Engine]:
    """The database of the data directory, made or migrated where it must be. Raises CommandError."""
    with refusals() as found:
        engine = open_database(found.data_dir, now_ns=time.time_ns)
        try:
            yield engine
        finally:
            engine.dispose()
