"""Lines that several processes write to one output, and none of which may be torn.

What it is: the bound that makes it so. POSIX promises that a write of at most `PIPE_BUF` bytes to a pipe is whole;
Linux keeps it for sockets, and for a file that was opened once and handed down. So who shares an output writes whole
lines, at most that many bytes of them at once, and shortens the rare line that is longer.
What it is not: a lock. A process that is stopped while it holds one would stop the others.
"""

from __future__ import annotations

import select
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import msgspec
import structlog

from headgate.telemetry.log_line import LogLine, encode

WRITE_BYTES_MAX = select.PIPE_BUF
"""4096 on Linux."""
_CUT_CHARS = (64, 16)
_REASONS_MAX = 8
_TEXT_CHARS = (3000, 1000, 200, 40)
_render = structlog.processors.JSONRenderer()


def encode_whole(line: LogLine) -> bytes:
    """The line within one write. Names that clients chose are cut where that is needed."""
    data = encode(line)
    for chars in _CUT_CHARS:
        if len(data) <= WRITE_BYTES_MAX:
            break
        cut = {
            name: value[:chars] for name in LogLine.__struct_fields__ if isinstance(value := getattr(line, name), str)
        }
        reasons = tuple(reason[:chars] for reason in line.reasons[:_REASONS_MAX])
        data = encode(msgspec.structs.replace(line, **cut, reasons=reasons))
    return data


def writes(lines: Sequence[bytes]) -> Iterator[bytes]:
    """The lines in as few pieces as may be, each whole lines within one write."""
    piece: list[bytes] = []
    size = 0
    for line in lines:
        if piece and size + len(line) > WRITE_BYTES_MAX:
            yield b"".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield b"".join(piece)


def render_whole(logger: Any, method: str, event: MutableMapping[str, Any]) -> str | bytes:  # Any: structlog's
    """A structlog renderer: JSON within one write. Cuts the middle out of long texts, tracebacks above all.

    What is told first says what failed, and what is told last where and why.
    """
    rendered = _render(logger, method, event)
    for chars in _TEXT_CHARS:
        if len(rendered) < WRITE_BYTES_MAX:  # and a line feed
            break
        rendered = _render(logger, method, {name: _without_middle(value, chars) for name, value in event.items()})
    return rendered


def _without_middle(value: Any, chars: int) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    head = chars // 4
    return text if len(text) <= chars else f"{text[:head]} … {text[len(text) - (chars - head) :]}"
