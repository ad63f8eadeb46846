"""A streamed answer on its way from Anthropic to the client: held until the commit point, passed on, ended honestly.

What it is: bytes in, bytes out, and the fold of what went by. What it is not: retries (the driver decides, told by
`StreamEnd`) or the bill (the driver settles from the fold).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from headgate.gateway.server import Exchange
from headgate.gateway.upstream import Answer
from headgate.policy.records import Failure
from headgate.wire import sse
from headgate.wire.stream import Kind, MalformedStream, StreamFold

PROGRESS_INTERVAL_S = 2.0
HELD_BYTES_MAX = 256 << 10

_ENDS = frozenset({Kind.STOP, Kind.ERROR})


class ClientStream:
    """The client's side of a streamed answer; it outlives the attempts. Sends a `ping` of ours into a long silence."""

    __slots__ = ("_clock", "_copy", "_exchange", "_head", "_ping_after_s", "_sent_at", "started")

    def __init__(
        self,
        exchange: Exchange,
        head: Callable[[], bytes],
        *,
        ping_after_s: float,
        clock: Callable[[], float],
        copy: Callable[[bytes], None] | None = None,
    ) -> None:
        """`copy` is told every byte that the client gets."""
        self._copy = copy
        self._exchange = exchange
        self._head = head
        self._ping_after_s = ping_after_s
        self._clock = clock
        self._sent_at = clock()
        self.started = False

    def send(self, data: bytes) -> None:
        """Events for the client; the response's head goes before the first of them."""
        if not self.started:
            self.started = True
            self._exchange.start_stream(200, self._head())
        self._sent_at = self._clock()
        if self._copy is not None:
            self._copy(data)
        self._exchange.write(data)

    def end(self, data: bytes) -> None:
        """The last events, after which the stream is whole."""
        if not self.started:
            self.started = True
            self._exchange.start_stream(200, self._head())
        if self._copy is not None:
            self._copy(data)
        self._exchange.end(data)

    def tick(self, now: float, *, answering: bool) -> None:
        """Break a silence. Before Anthropic answers at all (`answering` False) the status is still open: no ping."""
        if (self.started or answering) and now - self._sent_at >= self._ping_after_s:
            self.send(sse.PING)


class Relay:
    """One attempt's answer. Await `done`: None when the stream came to its end or was abandoned, else the failure.

    `on_start` is called at `message_start` (usage is exact then), `on_commit` just before the first held event goes
    out, `on_progress` at most every 2 s.
    """

    __slots__ = (
        "_answer",
        "_client",
        "_clock",
        "_held",
        "_held_bytes",
        "_hold_s",
        "_hold_timer",
        "_on_commit",
        "_on_progress",
        "_on_start",
        "_progress_at",
        "_reader",
        "_reported_bytes",
        "committed",
        "done",
        "fold",
    )

    def __init__(
        self,
        answer: Answer,
        client: ClientStream,
        *,
        hold_s: float,
        clock: Callable[[], float],
        on_start: Callable[[], None],
        on_commit: Callable[[], None],
        on_progress: Callable[[], None],
    ) -> None:
        self._answer = answer
        self._client = client
        self._hold_s = hold_s
        self._clock = clock
        self._on_start = on_start
        self._on_commit = on_commit
        self._on_progress = on_progress
        self._reader = sse.SseReader()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._hold_timer: asyncio.TimerHandle | None = None
        self._progress_at = clock()
        self._reported_bytes = 0
        self.fold = StreamFold()
        self.committed = False
        self.done: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()

    # the answer's side (a Sink)

    def body(self, data: bytes) -> None:
        """Bytes of the stream, in any pieces."""
        try:
            frames = self._reader.feed(data)
        except sse.EventTooLarge as error:
            self._stop(Failure(kind="malformed", status=200, message=str(error)))
            return
        self._take(frames)

    def ended(self) -> None:
        """The HTTP body is whole; when `message_stop` has not come by now, it never will."""
        self._take(self._reader.close())
        if not self.done.done():
            self._stop(Failure(kind="truncated", status=200, message="Anthropic's stream ended before message_stop."))

    def broke(self, failure: Failure) -> None:
        """The connection broke or fell silent."""
        self._stop(failure)

    def _take(self, frames: list[bytes]) -> None:
        fold = self.fold
        ready: list[bytes] = []
        try:
            for frame in frames:
                kind = fold.take(frame)
                if kind is Kind.CONTENT:
                    if not self.committed:
                        self._commit()
                elif kind in _ENDS:
                    self._conclude(kind, ready, frame)
                    return
                elif kind is Kind.START:
                    self._begin()
                    if self.done.done():
                        return  # what the prompt took was too much: nothing of this is shown
                elif kind is Kind.PING and not fold.started:
                    # Before the answer begins there is nothing to keep it in order with; after, it is held with it.
                    self._client.send(frame)
                    continue
                if self.committed:
                    ready.append(frame)
                else:
                    self._hold(frame)
        except MalformedStream as error:
            self._pass_on(ready)
            self._stop(Failure(kind="malformed", status=200, message=str(error)))
            return
        self._pass_on(ready)

    # the driver's side

    def tick(self, now: float) -> None:
        """Report progress, now and then."""
        if now - self._progress_at >= PROGRESS_INTERVAL_S:
            self._progress_at = now
            if self.fold.output_bytes > self._reported_bytes:
                self._reported_bytes = self.fold.output_bytes
                self._on_progress()

    def abandon(self) -> None:
        """The client has left: close the upstream connection now."""
        self._answer.abort()
        self._finish(None)

    def pause(self, paused: bool) -> None:
        """The client reads too slowly, or has caught up."""
        self._answer.pause(paused)

    # inside

    def _hold(self, frame: bytes) -> None:
        """Keep an event for the commit point; beyond a bound the point has come, or the stream never begins."""
        self._held.append(frame)
        self._held_bytes += len(frame)
        if self._held_bytes > HELD_BYTES_MAX:
            if not self.fold.started:
                raise MalformedStream(f"no message_start in {HELD_BYTES_MAX} bytes")
            self._commit()

    def _pass_on(self, frames: list[bytes]) -> None:
        if frames:
            self._client.send(frames[0] if len(frames) == 1 else b"".join(frames))

    def _begin(self) -> None:
        self._on_start()
        if self.done.done():
            return
        if self._hold_s > 0:
            self._hold_timer = asyncio.get_running_loop().call_later(self._hold_s, self._hold_over)
        else:
            self._commit()

    def _conclude(self, kind: Kind, ready: list[bytes], frame: bytes) -> None:
        """`message_stop` or `error`: nothing comes after it."""
        if kind is Kind.STOP:
            if not self.committed:
                self._commit()
            ready.append(frame)
            self._client.end(b"".join(ready))
            self._answer.detach()
            self._finish(None)
            return
        if self.committed:
            # The event goes on as it came; the driver then ends the response after it.
            ready.append(frame)
            self._pass_on(ready)
        fold = self.fold
        self._stop(
            Failure(
                kind="stream_error",
                status=200,
                error_type=fold.error_type,
                error_code=fold.error_code,
                message=fold.error_message,
            )
        )

    def _hold_over(self) -> None:
        self._hold_timer = None
        if not self.committed and not self.done.done():
            self._commit()

    def _commit(self) -> None:
        """The commit point: what was held goes out, and from here on there is no second attempt."""
        self.committed = True
        self._cancel_hold()
        self._on_commit()
        held, self._held = self._held, []
        if held:
            self._client.send(b"".join(held))

    def _stop(self, failure: Failure) -> None:
        self._answer.abort()
        self._finish(failure)

    def _finish(self, failure: Failure | None) -> None:
        self._cancel_hold()
        if not self.done.done():
            self.done.set_result(failure)

    def _cancel_hold(self) -> None:
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._hold_timer = None
