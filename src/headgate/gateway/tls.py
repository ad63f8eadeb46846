"""TLS to Anthropic on `ssl.MemoryBIO`, between a raw transport and a protocol.

Why not asyncio's own: its TLS layer keeps 293 KB for each open stream, this one about 60 (performance.md §1.6).
"""

from __future__ import annotations

import asyncio
import ssl

_PLAIN_BYTES = 64 << 10


def client_context() -> ssl.SSLContext:
    """TLS 1.2 or later, certificates checked against the system's trust store (`SSL_CERT_FILE` is honoured)."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


class TlsPipe:
    """One TLS session over one transport. Bytes from the wire go into `receive`, plain bytes out of it."""

    __slots__ = ("_incoming", "_object", "_outgoing", "_transport", "established", "said_goodbye")

    def __init__(
        self, context: ssl.SSLContext, transport: asyncio.Transport, server_name: str, session: ssl.SSLSession | None
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name, session=session)
        self._transport = transport
        self.established = False
        self.said_goodbye = False
        """Whether the other side ended the session itself: without it, anybody on the way may have cut the end off."""

    def start(self) -> None:
        """Say hello. Raises ssl.SSLError."""
        self._handshake()

    def receive(self, data: memoryview) -> list[bytes]:
        """Plain pieces that `data` completes; none while the handshake goes on.

        Raises ssl.SSLError, among them SSLCertVerificationError when the other side is not who it should be.
        """
        self._incoming.write(data)
        if not self.established:
            self._handshake()
            if not self.established:
                return []
        pieces = []
        try:
            while piece := self._object.read(_PLAIN_BYTES):
                pieces.append(piece)
            self.said_goodbye = True
        except ssl.SSLZeroReturnError:
            self.said_goodbye = True
        except ssl.SSLWantReadError:
            pass
        self._flush()
        return pieces

    def send(self, data: bytes) -> None:
        """Encrypt and write."""
        self._object.write(data)
        self._flush()

    @property
    def session(self) -> ssl.SSLSession | None:
        """What to resume from next time; with TLS 1.3 it is there after the first bytes have been read."""
        return self._object.session

    def _handshake(self) -> None:
        try:
            self._object.do_handshake()
            self.established = True
        except ssl.SSLWantReadError:
            pass
        finally:
            self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())
