"""Makes `.venv` hold exactly what a lock file says. Used by `./up` and `./check`; standard library only.

It is not a package manager: versions and hashes come from the lock files, and pip does the installing.
"""

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "headgate-locks"
"""Digests of the lock files that were installed last, one a line."""

RUNTIME_LOCK = ROOT / "requirements.lock"
DEV_LOCK = ROOT / "requirements-dev.lock"

# What pip says when it cannot reach an index; it then also claims that no version matches, which misleads.
NO_NETWORK = ("NewConnectionError", "name resolution", "Connection refused", "ConnectTimeoutError", "ProxyError")


class CannotPrepare(Exception):
    """The machine lacks something. The text says what, and how to mend it."""


def prepare(*locks: Path) -> None:
    """Leave a working `.venv` with everything in `locks` and the `headgate` command. Does nothing twice."""
    _make_venv()
    wanted = {hashlib.sha256(lock.read_bytes()).hexdigest() for lock in locks}
    if not wanted <= _installed():
        _install(locks)
        STAMP.write_text("".join(f"{digest}\n" for digest in sorted(wanted)))
    _link_package()


def _make_venv() -> None:
    if _answers("import pip"):
        return
    # Debian keeps ensurepip in a package of its own, and without it `venv` stops half way.
    if importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise CannotPrepare(
            f"this Python has no venv module; on Debian or Ubuntu: apt-get install python{version}-venv, then run again"
        )
    note(f"{'repairing' if VENV.exists() else 'making'} .venv (Python {sys.version.split()[0]})")
    try:
        venv.create(VENV, clear=True, with_pip=True, symlinks=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotPrepare(f"cannot make {VENV}: {error}") from error


def _answers(statement: str) -> bool:
    """Whether the virtual environment's Python is new enough and can run `statement`."""
    probe = f"import sys; assert sys.version_info >= (3, 11); {statement}"
    try:
        return subprocess.run([PYTHON, "-c", probe], capture_output=True).returncode == 0
    except OSError:
        return False


def _installed() -> set[str]:
    try:
        return set(STAMP.read_text().split())
    except FileNotFoundError:
        return set()


def _install(locks: Sequence[Path]) -> None:
    note(f"installing {' and '.join(lock.name for lock in locks)}, every file checked against its hash")
    STAMP.unlink(missing_ok=True)
    command = [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--progress-bar",
        "off",
    ]
    for lock in locks:
        command += ["-r", str(lock)]
    # A user's own pip settings may ask for --user or a custom target, which a virtual environment refuses.
    environment = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    started_at = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        output = []
        for line in pip.stdout:
            output.append(line)
            if line.startswith("Collecting ") and sys.stdout.isatty():
                print(f"\r\033[K    {line.split()[1].split('==')[0]}", end="", flush=True)
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    if pip.returncode:
        raise CannotPrepare(_why_pip_failed("".join(output)))
    note(f"installed in {time.monotonic() - started_at:.0f} s")


def _why_pip_failed(output: str) -> str:
    tail = "\n".join(output.strip().splitlines()[-12:])
    if any(sign in output for sign in NO_NETWORK):
        return f"{tail}\n\npip cannot reach its package index: check the network, the proxy or pip's configuration"
    if "DO NOT MATCH THE HASHES" in output:
        return f"{tail}\n\na downloaded file is not the one that was locked; nothing of it was installed"
    if "No matching distribution" in output:
        return f"{tail}\n\na package has no build for this Python or machine; try Python 3.11 to 3.13"
    return f"{tail}\n\npip failed, see above"


def _link_package() -> None:
    """Put `src` on the path and the command in `bin`: the clone itself runs, without a build and without network.

    Written each time, so that a clone that was moved still finds itself.
    """
    site_packages = next(VENV.glob("lib/python3*/site-packages"))
    (site_packages / "headgate.pth").write_text(f"{ROOT / 'src'}\n")
    command = VENV / "bin" / "headgate"
    # A shell line and not a shebang to Python: those break on a space in the path. -P: a folder named headgate where
    # the user happens to stand is not ours.
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(str(PYTHON))} -P -m headgate "$@"\n')
    command.chmod(0o755)


def note(text: str) -> None:
    """Say what is being done, at once even into a pipe."""
    print(f"  · {text}", flush=True)
