"""The `headgate` command: finds the command that was asked for and runs it.

Each family of commands is a module with `main(arguments)`. What went wrong is said here, in one line, without a
traceback: every other exception is a fault of ours and keeps its own.
"""

import importlib
import sys

from headgate import __version__
from headgate.cli.errors import CommandError

COMMANDS = {
    "up": ("up", "start everything, and print what to paste to try it"),
    "gateway": ("gateway", "start the gateway"),
    "simulator": ("simulator", "start the stand-in for the Claude API"),
    "keys": ("keys", "create, list, revoke and rotate virtual keys"),
    "usage": ("reports", "requests, tokens, latency and cost, by user, key, model, …"),
    "calls": ("reports", "the latest calls, one by one"),
    "bill": ("reports", "this month so far, and where it is going"),
    "prices": ("prices", "what each model costs and would have cost you; price the ledger again"),
    "replay": ("replay", "what the ledger's calls would have cost under another policy"),
    "plan": ("plan", "what a workload costs a month, and which policy holds it under a target"),
    "alerts": ("alerts", "what should be looked at, such as runaway spending"),
    "reconcile": ("reconcile", "compare the ledger with Anthropic's report, and correct estimates"),
    "cache": ("cache", "what the prompt cache saved and lost and why, and a check of prompt files"),
    "config": ("config", "check and show the settings"),
    "db": ("db", "bring the database to this version"),
}
"""Command to its module here, and what the help says of it."""


def main() -> None:
    """Run the command line and exit."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0)
    if name in ("-V", "--version", "version"):
        print(f"headgate {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"headgate: no such command: {name}. `headgate --help` lists them.", file=sys.stderr)
        sys.exit(2)
    try:
        # By name and here only: typer and rich would cost the gateway 60 ms of its start, and the tables of a report
        # need no web framework.
        importlib.import_module(f"headgate.cli.{COMMANDS[name][0]}").main(name, arguments)
    except CommandError as error:
        print(f"headgate {name}: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _help() -> str:
    commands = "\n".join(f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"headgate {__version__}: the production stack for apps on the Claude API\n\n"
        f"usage: headgate COMMAND [options]\n\n{commands}\n\n"
        "`headgate COMMAND --help` tells the options. Settings: docs/settings.md."
    )
