"""`headgate simulator`: `python -m headgate.simulator` under our own name, with the same options."""

from collections.abc import Sequence

from headgate.simulator.__main__ import settings_from
from headgate.simulator.server import run


def main(_: str, arguments: Sequence[str]) -> None:
    """Run `headgate simulator …` until it is stopped."""
    run(settings_from(list(arguments)))
