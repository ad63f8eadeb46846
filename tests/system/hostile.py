"""What the hostile tests use: raw sockets in front of a gateway, and an upstream behind it that writes down every byte.

What it is not: a judge. `answers` reads strictly and raises `NotHttp` at the first byte that a strict client refuses.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MESSAGE = json.dumps(
    {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-6",
        "content": [{"type": "text", "text": "ok"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 1},
    }
).encode()
BODY = b'{"model":"claude-sonnet-4-6","max_tokens":5,"messages":[{"role":"user","content":"hi"}]}'


class NotHttp(AssertionError):
    """Bytes that are no sequence of whole responses."""


class Cut(NotHttp):
    """The last response is not whole (yet)."""


@dataclass
class Answer:
    """One whole response."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        return dict(self.headers).get(name, "")

    @property
    def code(self) -> str:
        """Our own word for an error."""
        return str(json.loads(self.body)["error"]["details"]["error_code"])


def answers(data: bytes) -> list[Answer]:
    """All final responses in `data`."""
    found = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            raise Cut(data[:300])
        status_line, *lines = head.split(b"\r\n")
        if not re.fullmatch(rb"HTTP/1\.1 [1-5]\d\d [ -~]*", status_line):
            raise NotHttp(data[:300])
        headers = []
        for line in lines:
            if not re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~\x80-\xff]*", line):
                raise NotHttp(line[:300])
            name, _, value = line.partition(b": ")
            headers.append((name.decode().lower(), value.decode("latin-1")))
        status = int(status_line[9:12])
        if status < 200:
            data = rest
            continue
        named = dict(headers)
        body = b""
        if "transfer-encoding" in named:
            pieces = []
            at, size = 0, -1
            while size:
                line_end = rest.find(b"\r\n", at)
                if line_end < 0:
                    raise Cut("no chunk")
                size = int(rest[at:line_end], 16)
                at = line_end + 2 + size + 2
                if len(rest) < at:
                    raise Cut("no end of a chunk")
                if rest[at - 2 : at] != b"\r\n":
                    raise NotHttp("a chunk without its end")
                pieces.append(rest[line_end + 2 : at - 2])
            body, rest = b"".join(pieces), rest[at:]
        else:
            size = int(named["content-length"])
            if len(rest) < size:
                raise Cut(f"{len(rest)} of {size} bytes")
            body, rest = rest[:size], rest[size:]
        found.append(Answer(status, headers, body))
        data = rest
    return found


def connect(url: str, *, timeout_s: float = 10.0) -> socket.socket:
    """A fresh connection."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    sock = socket.create_connection((parts.hostname, parts.port or 80), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read(sock: socket.socket, *, count: int | None = None, quiet_s: float = 0.3, within_s: float = 10.0) -> bytes:
    """Bytes until `count` final responses are whole, or the other side closes, or nothing comes for `quiet_s`.

    Quiet counts only once a whole response is here: a server that answers late is waited for.
    """
    data = b""
    give_up_at = time.monotonic() + within_s
    while time.monotonic() < give_up_at:
        sock.settimeout(quiet_s)
        try:
            piece = sock.recv(1 << 20)
        except TimeoutError:
            with contextlib.suppress(Cut):
                if data and answers(data):
                    break
            continue
        except ConnectionError:
            break
        if not piece:
            break
        data += piece
        if count is not None:
            with contextlib.suppress(Cut):
                if len(answers(data)) >= count:
                    break
    return data


def talk(url: str, *pieces: bytes, count: int | None = None, within_s: float = 10.0) -> list[Answer]:
    """Send bytes on a fresh connection and read all that comes back."""
    with connect(url) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
        except ConnectionError:
            pass  # it has heard enough; what it said is what counts
        return answers(read(sock, count=count, within_s=within_s))


def post(key: str, body: bytes = BODY, *lines: bytes, path: bytes = b"/v1/messages") -> bytes:
    """A well-formed request, with these lines beside its own."""
    extra = b"".join(line + b"\r\n" for line in lines)
    return b"POST %b HTTP/1.1\r\nhost: gateway\r\nx-api-key: %b\r\ncontent-type: application/json\r\n%b" % (
        path,
        key.encode(),
        extra,
    ) + b"content-length: %d\r\n\r\n%b" % (len(body), body)


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    """What a process holds now, or (`VmHWM`) held at most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def forget_peak(pid: int) -> None:
    """Begin `VmHWM` anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@dataclass
class Heard:
    """One request as it came."""

    head: bytes
    body: bytes

    def header(self, name: bytes) -> list[bytes]:
        """All values of this (lower case) name."""
        found = []
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.lower() == name:
                found.append(value.strip())
        return found


class Recorder:
    """An upstream that answers every request with `answer` and keeps every byte it was sent."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.bytes = bytearray()
        self.answer: Callable[[Heard], bytes] = lambda _: response(MESSAGE)
        self.connections = 0
        self.go_on = threading.Event()
        """While it is clear, requests are read and not answered."""
        self.go_on.set()
        recorder = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                recorder.connections += 1
                with contextlib.suppress(ConnectionError, OSError):
                    recorder._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            request_queue_size = 512

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = bytearray()
        while True:
            while b"\r\n\r\n" not in data:
                self._take(sock, data)
            head, _, rest = bytes(data).partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            size = int(length[1]) if length else 0
            data = bytearray(rest)
            while len(data) < size:
                self._take(sock, data)
            heard = Heard(head, bytes(data[:size]) if size < 1 << 20 else b"")
            del data[:size]
            self.heard.append(heard)
            self.go_on.wait()
            sock.sendall(self.answer(heard))

    def _take(self, sock: socket.socket, data: bytearray) -> None:
        piece = sock.recv(1 << 20)
        if not piece:
            raise ConnectionError
        data += piece
        if len(piece) < 1 << 18:
            self.bytes += piece

    def forget(self) -> None:
        """Begin anew."""
        self.heard.clear()
        self.bytes.clear()
        self.answer = lambda _: response(MESSAGE)
        self.go_on.set()

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def response(body: bytes, *lines: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    """What an upstream says."""
    extra = b"".join(line + b"\r\n" for line in lines)
    return b"HTTP/1.1 %b\r\ncontent-type: %b\r\nrequest-id: req_1\r\n%bcontent-length: %d\r\n\r\n%b" % (
        status,
        kind,
        extra,
        len(body),
        body,
    )


def tree_bytes(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def json_lines(text: bytes) -> list[dict[str, Any]]:
    """A log as its readers take it apart: at each line feed."""
    return [json.loads(line) for line in text.split(b"\n") if line.startswith(b"{")]
