"""Server-sent events between bytes and frames, incrementally, whatever the chunking.

What it is: where one event ends and the next begins, and what its `event` and `data` fields say.
What it is not: the meaning of an event (see `wire/stream.py`). Frames keep their original bytes, terminator included.
"""

from __future__ import annotations

import re

EVENT_BYTES_MAX = 1 << 20
BLOCK_BYTES_MAX = 32 << 20
"""A `content_block_start` may carry a whole base64 block (failure-model §2.1)."""

_BLOCK_START = b"event: content_block_start"
_LINE_END = re.compile(rb"[\r\n]")


class EventTooLarge(ValueError):
    """An event passed its limit before its end came."""


class SseReader:
    """Cuts a byte stream into frames. `feed` returns those that are complete; the rest waits in `pending`.

    An empty line ends a frame, unless it is the frame's first: a stray one belongs to the frame that follows.
    """

    __slots__ = ("_buffer", "_crlf", "_line_at", "_searched")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._line_at = 0
        self._searched = 0
        self._crlf = False

    @property
    def pending(self) -> int:
        """Bytes of an event that is not complete."""
        return len(self._buffer)

    def feed(self, chunk: bytes) -> list[bytes]:
        """Complete frames, in order, each ending with its blank line.

        Raises EventTooLarge; the reader is of no use afterwards.
        """
        if not self._crlf:
            if b"\r" not in chunk:
                return self._feed_lf(chunk)
            # From the first CR on, the slower splitter that knows all three line ends takes over for good.
            self._crlf = True
        self._buffer += chunk
        frames = []
        while (end := self._next_end()) is not None:
            frames.append(bytes(self._buffer[:end]))
            del self._buffer[:end]
            self._line_at = self._searched = 0
        self._check_size()
        return frames

    def close(self) -> list[bytes]:
        """The last frame, when the stream has ended on an empty line that a CR alone closed; else nothing.

        While bytes may still come, an LF that belongs to the CR may too, and the frame is not given out.
        """
        if not self._buffer.endswith((b"\r\r", b"\n\r")):
            return []
        frame = bytes(self._buffer)
        self._buffer.clear()
        return [frame]

    def _feed_lf(self, chunk: bytes) -> list[bytes]:
        if not self._buffer:
            if chunk.endswith(b"\n\n") and chunk.find(b"\n\n") == len(chunk) - 2:
                return [chunk]
            frames, rest = _split(chunk)
        else:
            search_from = max(len(self._buffer) - 1, 0)
            self._buffer += chunk
            if self._buffer.find(b"\n\n", search_from) < 0:
                self._check_size()
                return []
            frames, rest = _split(bytes(self._buffer))
        self._buffer = bytearray(rest)
        if rest:
            self._check_size()
        return frames

    def _next_end(self) -> int | None:
        """Where the first frame ends: after an empty line, with LF, CR or CRLF as line ends in any mixture."""
        buffer = self._buffer
        while (found := _LINE_END.search(buffer, self._searched)) is not None:
            end = after = found.end()
            if buffer[end - 1] == 0x0D:
                if end == len(buffer):
                    # Whether an LF belongs to this CR is not known yet.
                    self._searched = end - 1
                    return None
                after += buffer[end] == 0x0A
            line_at, self._line_at, self._searched = self._line_at, after, after
            if end - 1 == line_at > 0:
                return after
        self._searched = len(buffer)
        return None

    def _check_size(self) -> None:
        size = len(self._buffer)
        if size > EVENT_BYTES_MAX and (size > BLOCK_BYTES_MAX or not self._buffer.startswith(_BLOCK_START)):
            raise EventTooLarge(f"an event is larger than {EVENT_BYTES_MAX} bytes")


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    frames = []
    start = 0
    while (end := data.find(b"\n\n", start)) >= 0:
        frames.append(data[start : end + 2])
        start = end + 2
    return frames, data[start:]


def parse(frame: bytes) -> tuple[bytes, bytes]:
    """`(event, data)` of one frame: several `data` lines joined by LF, comments and other fields left out.

    Both are empty for a frame of comments only. Never raises.
    """
    event = b""
    data = []
    lines = (
        frame.split(b"\n") if b"\r" not in frame else frame.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    )
    for line in lines:
        field, _, value = line.partition(b":")
        if not field:
            continue
        if value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            data.append(value)
        elif field == b"event":
            event = value
    return event, b"\n".join(data)


def frame(event: bytes, data: bytes) -> bytes:
    """One frame as Anthropic writes it. `data` has no line breaks (it is JSON)."""
    return b"event: %b\ndata: %b\n\n" % (event, data)


PING = frame(b"ping", b'{"type": "ping"}')
