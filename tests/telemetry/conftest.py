"""Log lines of made-up calls."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from headgate.telemetry.log_line import LogLine

_ZERO: dict[str, Any] = {"str": "", "bool": False, "int": 0, "int | None": None, "tuple[str, ...]": ()}


@pytest.fixture
def line() -> Callable[..., LogLine]:
    """A line with these fields; the others are empty."""
    empty = LogLine(
        **{field.name: _ZERO[str(LogLine.__annotations__[field.name])] for field in msgspec.structs.fields(LogLine)}
    )
    return lambda **fields: msgspec.structs.replace(empty, **fields)
