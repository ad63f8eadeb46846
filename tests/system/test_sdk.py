"""The official SDK, unchanged, in its current major and in its last 0.x: one program, run with each of them."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import anthropic
import pytest
from tests.system.conftest import base_environment

PROGRAM = Path(__file__).with_name("sdk_program.py")
LAWS = [
    node.name
    for node in ast.parse(PROGRAM.read_text()).body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
]
SDK0_LOCK = Path(__file__).parents[2] / "requirements-sdk0.lock"
SDK0_FOLDER = "TEST_SDK0_VENV"
"""Names a folder for the environment of the 0.x SDK; pytest's cache is used when it is not set."""
SDK0_SKIP = "TEST_SDK0_SKIP"
"""Set to 1 where no package index can be reached and the 0.x SDK is not to be tested."""


@pytest.fixture(scope="module")
def place(shared_stack):
    """What the program is told: URL, key, a key for batches alone, and the simulator's URL."""
    simulator = shared_stack.simulator("--tier", "none", "--batch-clock", "200")
    gateway = shared_stack.gateway(simulator.url, QUEUE__DEADLINE_S="3", RETRY__BASE_DELAY_S="0.01")
    key = gateway.key("program", "--scope", "messages", "--scope", "batch")
    return [gateway.url, key, gateway.key("night", "--scope", "batch"), simulator.url]


@pytest.fixture(scope="module")
def sdk2(place):
    """Each law's trouble with the SDK that is installed beside the gateway."""
    return run_program(Path(sys.executable), place, version=anthropic.__version__)


@pytest.fixture(scope="module")
def sdk0(place, request):
    """Each law's trouble with the last 0.x."""
    if os.environ.get(SDK0_SKIP) == "1":
        pytest.skip(f"{SDK0_SKIP}=1")
    folder = os.environ.get(SDK0_FOLDER) or request.config.cache.mkdir("sdk0")
    (version,) = re.findall(r"^anthropic==(0\.\S+)", SDK0_LOCK.read_text(), re.MULTILINE)
    return run_program(sdk0_python(Path(folder)), place, version=version)


@pytest.mark.parametrize("law", LAWS)
def test_with_sdk_2_this_holds(sdk2, law):
    assert sdk2.get(law, "the program ended before it came to this") == "", sdk2[law]


@pytest.mark.parametrize("law", LAWS)
def test_with_sdk_0_this_holds(sdk0, law):
    assert sdk0.get(law, "the program ended before it came to this") == "", sdk0[law]


def run_program(python: Path, place: list[str], *, version: str) -> Mapping[str, str]:
    """Run it to its end: each law with its traceback, empty where it holds."""
    done = subprocess.run(
        [python, PROGRAM, *place], env=base_environment(), capture_output=True, text=True, timeout=120
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told, done.stderr
    assert told[0]["version"] == version
    assert done.returncode == 0, done.stderr
    return {one["law"]: one["trouble"] for one in told[1:]}


def sdk0_python(folder: Path) -> Path:
    """The Python of an environment that holds exactly what the lock says; made when it is not there yet."""
    python = folder / "bin" / "python"
    stamp = folder / "locked"
    wanted = hashlib.sha256(SDK0_LOCK.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    install = ["install", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    pip = subprocess.run(
        [python, "-m", "pip", *install, "-r", SDK0_LOCK],
        env=base_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if pip.returncode:
        pytest.fail(
            f"pip cannot install the 0.x SDK from {SDK0_LOCK.name}; without a package index, set {SDK0_FOLDER} to an "
            f"environment made elsewhere, or {SDK0_SKIP}=1 to leave it out. It said:\n{pip.stderr[-2000:]}",
            pytrace=False,
        )
    stamp.write_text(wanted)
    return python
