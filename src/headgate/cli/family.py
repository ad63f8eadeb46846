"""What the families of commands have in common: how they parse, and how they are asked for JSON."""

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


def family(about: str) -> typer.Typer:
    """A family of commands. Exceptions pass through: `headgate.cli` says in a line what the user can mend."""
    return typer.Typer(help=about, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
