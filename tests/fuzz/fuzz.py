"""Fuzzes one target with atheris, which is no dependency of the project: see README.md beside this file.

python tests/fuzz/fuzz.py TARGET [libFuzzer's options and folders]
"""

import runpy
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["headgate", "email", "json"]):
    TARGETS = runpy.run_path(str(Path(__file__).parent / "targets.py"))["TARGETS"]


def main() -> None:
    """Hand the target to libFuzzer."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py {{{','.join(TARGETS)}}} [libFuzzer's options and folders]")
    target = atheris.instrument_func(TARGETS[sys.argv.pop(1)])
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
