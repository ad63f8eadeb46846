"""`headgate db migrate`: brings the database to the revision of this version. A start does the same by itself."""

import time
from collections.abc import Sequence

from headgate.cli import output, stores
from headgate.cli.family import AsJson, family
from headgate.storage.database import migrate as migrate_database

app = family("The database.")


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate db …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.callback()
def db() -> None:
    """Keep `migrate` a word of its own: a family of one would take it for granted."""


@app.command()
def migrate(as_json: AsJson = False) -> None:
    """Migrate the database, all or nothing, after a copy."""
    with stores.refusals() as settings:
        done = migrate_database(settings.data_dir, now_ns=time.time_ns)
    if as_json:
        output.print_json(
            {"before": done.before, "after": done.after, "copy": None if done.copy is None else str(done.copy)}
        )
    elif done.before == done.after:
        print(f"The database is at {done.after} already.")
    elif done.before is None:
        print(f"Made the database, at {done.after}.")
    else:
        print(f"Migrated from {done.before} to {done.after}. The database as it was: {done.copy}")
