"""`headgate alerts`: what should be looked at, the newest first."""

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from headgate.cli import inputs, output, stores
from headgate.cli.family import AsJson, family
from headgate.storage import alerts as alert_table
from headgate.storage.alerts import alerts_json

app = family("Alerts.")


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate alerts …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.command()
def alerts(
    since: Annotated[str, typer.Option(metavar="7d", help="A span back from now, a date, or a time.")] = "7d",
    as_json: AsJson = False,
) -> None:
    """What should be looked at: runaway spending, budgets, prices and credentials that are missing."""
    since_ns = inputs.moment_ns(since, now_ns=time.time_ns())
    with stores.database() as engine, engine.connect() as connection:
        found = alert_table.listed(connection, since_ns=since_ns)
    if as_json:
        output.print_json(alerts_json(found))
        return
    if not found:
        print("No alert in this span.")
        return
    output.print_table(
        ("id>", "at", "kind", "subject", "ended", "message"),
        [
            (
                str(alert.id),
                output.timestamp(alert.at_ns),
                alert.kind,
                alert.subject,
                "open" if alert.ended_at_ns is None else f"{output.timestamp(alert.ended_at_ns)} by {alert.ended_by}",
                alert.message,
            )
            for alert in found
        ],
    )
