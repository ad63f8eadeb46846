"""Exit codes are part of the interface: the page for users and the code say the same."""

import re
from pathlib import Path

from headgate.cli.errors import Exit

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def test_the_page_lists_every_exit_code() -> None:
    listed = {int(code) for code in re.findall(r"^\| `(\d+)` \|", PAGE.read_text(), re.MULTILINE)}
    assert listed == {*Exit, 130}
