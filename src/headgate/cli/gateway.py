"""`headgate gateway`: starts the gateway. No options: what differs between two gateways is a setting."""

import argparse
from collections.abc import Sequence

from headgate.cli import stores
from headgate.cli.errors import CommandError, Exit
from headgate.gateway.app import ListenError, run
from headgate.gateway.settings import SettingsError
from headgate.storage.interfaces import LedgerUnavailable


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate gateway` until it is stopped."""
    argparse.ArgumentParser(
        prog=f"headgate {name}",
        description="Start the gateway. It is configured by headgate.toml and the environment: docs/settings.md.",
    ).parse_args(arguments)
    with stores.refusals() as settings:
        try:
            run(settings)
        except SettingsError as error:
            raise CommandError(Exit.SETTINGS, str(error)) from None
        except ListenError as error:
            raise CommandError(Exit.ADDRESS, str(error)) from None
        except LedgerUnavailable as error:
            raise CommandError(Exit.STORE, str(error)) from None
