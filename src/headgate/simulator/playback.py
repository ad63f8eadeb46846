"""Plays a stream of frames to one client at their times, and stops when the client leaves. Decides nothing about
content or money.
"""

from collections.abc import Callable, Iterator
from typing import Literal

from headgate.simulator.events import Frame
from headgate.simulator.http import Reply
from headgate.simulator.records import Exchange
from headgate.simulator.ticker import Ticker

Ending = Literal["complete", "broken", "client_left"]
"""All frames sent; ended by a frame that breaks the stream; the client went away."""

BURST_BYTES = 64 * 2**10
"""How much is written before looking whether the client keeps up."""


class Playback:
    """One stream under way."""

    def __init__(
        self,
        frames: Iterator[Frame],
        reply: Reply,
        exchange: Exchange,
        ticker: Ticker,
        *,
        start_s: float,
        on_tokens: Callable[[int, float], None],
        on_end: Callable[[Ending], None],
    ) -> None:
        self._frames = frames
        self._reply = reply
        self._exchange = exchange
        self._at = ticker.at
        self._due_s = start_s
        self._frame = next(frames, None)
        self._on_tokens = on_tokens
        self._on_end = on_end
        self._over = False
        self._blocked = False
        reply.on_gone = self._leave
        reply.on_room = self._resume

    def play(self, now_s: float) -> None:
        """Sends every frame whose time has come, then waits for the next."""
        if self._over:
            return
        if self._reply.full:  # uvloop says so only after the write that filled the buffer
            self._blocked = True
            return
        exchange = self._exchange
        before = produced = exchange.output_tokens
        burst: list[bytes] = []
        size = 0
        frame = self._frame
        while frame is not None and (due_s := self._due_s + frame.wait_s) <= now_s:
            if size > BURST_BYTES:
                self._send(burst)
                burst, size = [], 0
                if self._reply.full:
                    break
            self._due_s = due_s
            if frame.output_tokens > produced:
                produced = frame.output_tokens
            if frame.act == "send":
                burst.append(frame.data)
                size += len(frame.data)
            else:
                self._send(burst)
                burst = []
                if frame.act != "raw":
                    self._break(frame)
                    break
                self._reply.raw(frame.data)
            frame = self._frame = next(self._frames, None)
        self._send(burst)
        if produced > before:
            exchange.output_tokens = produced
            self._on_tokens(produced - before, now_s)
        if self._over:
            self._on_end("broken")
        elif self._frame is None:
            self._over = True
            self._reply.end()
            self._on_end("complete")
        elif self._reply.full:
            self._blocked = True
        else:
            self._at(self._due_s + self._frame.wait_s, self.play)

    def _send(self, burst: list[bytes]) -> None:
        if burst:
            self._reply.data(burst[0] if len(burst) == 1 else b"".join(burst))
            self._exchange.bytes_sent = self._reply.bytes_sent
            self._exchange.events_sent += len(burst) - burst.count(b"")

    def _break(self, frame: Frame) -> None:
        self._over = True
        self._frame = None
        match frame.act:
            case "end":
                self._reply.end()
            case "close":
                self._reply.close()
            case _:
                self._reply.reset()

    def _leave(self) -> None:
        if not self._over:
            self._over = True
            self._on_end("client_left")

    def _resume(self) -> None:
        if self._blocked and not self._over:
            self._blocked = False
            self._at(self._due_s, self.play)
