"""`headgate gateway`: starts the gateway. One option: in how many processes. All else is a setting."""

import argparse
from collections.abc import Sequence

from headgate.cli import stores
from headgate.cli.errors import CommandError, Exit
from headgate.gateway.app import ListenError, run
from headgate.gateway.settings import SettingsError
from headgate.gateway.worker import WORKERS_MAX, NoSupervisor, Worker
from headgate.gateway.workers import WorkersFailed, run_workers
from headgate.storage.interfaces import LedgerUnavailable


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate gateway` until it is stopped."""
    parser = argparse.ArgumentParser(
        prog=f"headgate {name}",
        description="Start the gateway. It is configured by headgate.toml and the environment: docs/settings.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workers",
        type=_count,
        default=1,
        metavar="N",
        help="processes that share the port (1, and more with HEADGATE_REDIS_URL); one for each core is plenty",
    )
    # Ours to the processes we start: INDEX@PORT.
    parser.add_argument("--worker", type=_place, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with stores.refusals() as settings:
        try:
            if options.worker is not None:
                index, port = options.worker
                run(settings, Worker(index, options.workers, port=port))
            elif options.workers > 1:
                run_workers(settings, options.workers)
            else:
                run(settings)
        except NoSupervisor as error:
            raise CommandError(Exit.USAGE, f"{error}.") from None
        except SettingsError as error:
            raise CommandError(Exit.SETTINGS, str(error)) from None
        except ListenError as error:
            raise CommandError(Exit.ADDRESS, str(error)) from None
        except LedgerUnavailable as error:
            raise CommandError(Exit.STORE, str(error)) from None
        except WorkersFailed as error:
            raise CommandError(Exit(error.code) if error.code in set(Exit) else Exit.FAILED, str(error)) from None


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text) <= WORKERS_MAX:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of processes from 1 to {WORKERS_MAX}")


def _place(text: str) -> tuple[int, int]:
    index, _, port = text.partition("@")
    return int(index), int(port)
