"""The measuring kit is a folder of scripts, not a package: found here as `python bench/run.py` finds it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
