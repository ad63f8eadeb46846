"""The HTTP client by itself: names, addresses and TLS, each with what goes wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.gateway.upstream_scenes import (
    LOOPS,
    OK,
    REQUEST,
    SECRET,
    SSE,
    Clock,
    Line,
    Run,
    run_on,
    scene,
    script_of,
    turns,
    until,
)

from headgate.gateway.settings import UpstreamSection
from headgate.gateway.upstream import Answer, Upstream, UpstreamConnection
from headgate.policy.records import Failure


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test's coroutine function, on asyncio's loop and on uvloop's."""
    return lambda test: run_on(request.param, test)


# connecting


def test_a_refused_connection_is_told_and_nothing_was_sent(run):
    async def test():
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            upstream = Upstream(f"http://127.0.0.1:{unused.getsockname()[1]}", UpstreamSection(), clock=Clock())
            failure = await upstream.send(REQUEST, b"", lambda _: True)
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.sent) == ("connect", False)

    run(test)


def test_a_connection_that_does_not_come_about_ends_at_its_limit(run):
    async def test():
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            loop = asyncio.get_running_loop()
            address = full.getsockname()
            fillers = []
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(address)
                fillers.append(filler)
            settings_ = UpstreamSection(connect_timeout_s=0.3)
            upstream = Upstream(f"http://127.0.0.1:{address[1]}", settings_, clock=Clock())
            began = loop.time()
            failure = await upstream.send(REQUEST, b"", lambda _: True)
            assert loop.time() - began < 2
            for filler in fillers:
                filler.close()
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.sent) == ("connect", False)
        assert upstream.snapshot() == {"open": 0, "idle": 0, "waiting": 0}

    run(test)


def test_a_name_that_does_not_resolve_is_told_and_nothing_was_sent(run):
    async def test():
        upstream = Upstream("http://no-such-name.invalid", UpstreamSection(connect_timeout_s=5), clock=Clock())
        failure = await upstream.send(REQUEST, b"", lambda _: True)
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.sent) == ("connect", False)

    run(test)


def test_the_environments_proxies_are_not_used(run, monkeypatch):
    async def test():
        async with scene(script_of(OK)) as proxy, scene(script_of(OK)) as it:
            url = "http://" + proxy.upstream.authority.decode()
            for name in ("http_proxy", "https_proxy", "all_proxy"):
                monkeypatch.setenv(name, url)
                monkeypatch.setenv(name.upper(), url)
            monkeypatch.delenv("no_proxy", raising=False)
            direct = Upstream("http://" + it.upstream.authority.decode(), UpstreamSection(), clock=Clock())
            assert isinstance(await direct.send(REQUEST, b"", lambda _: True), Answer)
            direct.close()
            assert (proxy.connections, it.connections) == (0, 1)

    run(test)


def test_an_ipv6_literal_is_reached_and_named_in_brackets(run):
    async def test():
        async with scene(script_of(OK), host="::1") as it:
            await it.answer()
            assert it.upstream.authority.startswith(b"[::1]:")

    run(test)


@pytest.mark.parametrize(
    ("url", "authority", "base_path"),
    [
        ("https://api.anthropic.com", b"api.anthropic.com", b""),
        ("https://api.anthropic.com:443/", b"api.anthropic.com", b""),
        ("http://proxy.example:80/claude/", b"proxy.example", b"/claude"),
        ("https://[2001:db8::1]:8443/a/b", b"[2001:db8::1]:8443", b"/a/b"),
        ("https://[2001:db8::1]", b"[2001:db8::1]", b""),
    ],
)
def test_the_host_header_and_the_path_come_from_the_url_alone(url, authority, base_path):
    upstream = Upstream(url, UpstreamSection(), clock=Clock())
    assert (upstream.authority, upstream.base_path) == (authority, base_path)


# TLS


@dataclass(frozen=True)
class Certificates:
    """A CA of the test, and what it signed."""

    directory: Path

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def server(self, name: str, *, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path(f"{name}.pem"), self.path(f"{name}.key"))
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """`right` is for localhost, `wrong` for another host, `expired` has ended, `stranger` signed itself."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test CA", "-days", "2")
    right = "DNS:localhost,IP:127.0.0.1,IP:::1"
    for name, names, days in (
        ("right", right, "2"),
        ("wrong", "DNS:elsewhere.example,IP:192.0.2.1", "2"),
        ("expired", right, "-1"),
    ):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (directory / f"{name}.ext").write_text(f"subjectAltName={names}\n")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", f"{name}.ext", "-days", days)
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    openssl(
        "req", "-x509", *key, "-keyout", "stranger.key", "-out", "stranger.pem", "-subj", "/CN=localhost",
        "-addext", f"subjectAltName={right}", "-days", "2",
    )  # fmt: skip
    return Certificates(directory)


@pytest.fixture
def trusted(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> Certificates:
    """The CA is the system's trust store."""
    monkeypatch.setenv("SSL_CERT_FILE", certificates.path("ca.pem"))
    return certificates


@pytest.mark.parametrize("name", ["localhost", None], ids=["name", "address"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_certificate_of_the_trust_store_is_accepted(run, trusted, version, name):
    async def test():
        async with scene(script_of(OK), tls=trusted.server("right", version=version), name=name) as it:
            for _ in range(3):
                assert (await it.answer()).body() == b"{}"
            assert it.connections == 1
            assert bytes(it.received).count(SECRET) == 3

    run(test)


@pytest.mark.parametrize("name", ["wrong", "expired", "stranger"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_who_is_not_who_it_should_be_hears_not_one_byte_of_the_key(run, trusted, name, version):
    async def test():
        async with scene(script_of(OK), tls=trusted.server(name, version=version), name="localhost") as it:
            failure = await it.failure()
            assert (failure.kind, failure.sent) == ("tls", False)
            assert SECRET.decode() not in failure.message
            await turns(100)
            assert bytes(it.received) == b""
            await until(lambda: it.upstream.snapshot()["open"] == 0)

    run(test)


def test_an_untrusted_ca_is_not_accepted(run, certificates, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificates.path("stranger.pem"))

    async def test():
        async with scene(script_of(OK), tls=certificates.server("right"), name="localhost") as it:
            failure = await it.failure()
            assert (failure.kind, failure.sent) == ("tls", False)
            assert bytes(it.received) == b""

    run(test)


def test_a_plain_server_where_tls_is_expected_gets_nothing_readable(run, trusted):
    async def test():
        heard = bytearray()

        async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.extend(await reader.read(65536))
            writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            heard.extend(await reader.read(65536))
            writer.close()

        server = await asyncio.start_server(plain, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(f"https://localhost:{port}", UpstreamSection(), clock=Clock())
        failure = await upstream.send(REQUEST, b"", lambda _: True)
        assert isinstance(failure, Failure)
        assert failure.kind in ("connect", "tls")
        assert not failure.sent
        assert SECRET not in heard
        await until(lambda: upstream.snapshot()["open"] == 0)
        server.close()
        await turns()

    run(test)


def test_an_old_tls_is_not_spoken(run, trusted):
    async def test():
        context = trusted.server("right")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        async with scene(script_of(OK), tls=context, name="localhost") as it:
            failure = await it.failure()
            assert failure.kind in ("connect", "tls")
            assert not failure.sent

    run(test)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed_on_the_next_connection(run, trusted, version):
    async def test():
        closing = OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        async with scene(script_of(closing), tls=trusted.server("right", version=version), name="localhost") as it:
            for number in range(4):
                await it.answer()
                await until(lambda: it.upstream.snapshot()["open"] == 0)
                await until(lambda number=number: len(it.sessions_reused) == number + 1)
            assert it.sessions_reused[0] is False
            assert it.sessions_reused[-1] is True

    run(test)


@pytest.mark.parametrize("heard", [0, 1])
def test_a_handshake_that_is_cut_is_told_and_nothing_was_sent(run, trusted, heard):
    async def test():
        async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if heard:
                await reader.read(65536)
                writer.write(b"\x16\x03\x03\x00\x7a\x02")
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(f"https://localhost:{port}", UpstreamSection(connect_timeout_s=2), clock=Clock())
        began = asyncio.get_running_loop().time()
        failure = await upstream.send(REQUEST, b"", lambda _: True)
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.sent) == ("connect", False)
        assert asyncio.get_running_loop().time() - began < 1, "a cut handshake was waited for"
        await until(lambda: upstream.snapshot() == {"open": 0, "idle": 0, "waiting": 0})
        server.close()
        await turns()

    run(test)


def test_a_handshake_that_never_ends_ends_at_the_connect_limit(run, trusted):
    async def test():
        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(65536):
                pass
            writer.close()

        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(f"https://localhost:{port}", UpstreamSection(connect_timeout_s=0.3), clock=Clock())
        failure = await upstream.send(REQUEST, b"", lambda _: True)
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.sent) == ("connect", False)
        await until(lambda: upstream.snapshot()["open"] == 0)
        server.close()
        await turns()

    run(test)


def test_a_large_request_and_a_large_answer_pass_tls_whole(run, trusted):
    async def test():
        size = 3_000_000
        big = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % size + b"z" * size
        async with scene(script_of(big), tls=trusted.server("right"), name="localhost") as it:
            answer = await it.answer()
            assert answer.body() == b"z" * size

    run(test)


@pytest.mark.parametrize("cut", [b"1\r\nx\r\n", b"1\r\nx\r\n5\r\nab"])
def test_a_stream_over_tls_that_is_cut_breaks(run, trusted, cut):
    async def test():
        async with scene(script_of(SSE, cut, then="reset"), tls=trusted.server("right"), name="localhost") as it:
            _, sink = await it.stream()
            await until(lambda: sink.end)
            assert sink.end == "broke"

    run(test)


def test_a_whole_body_that_ends_with_a_tls_connection_must_end_with_its_goodbye(run, trusted):
    """Without close_notify anybody on the way can shorten an answer (RFC 9112 9.8)."""

    async def test():
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
        async with scene(
            script_of(head, b'{"a":1}', then="close"), tls=trusted.server("right"), name="localhost"
        ) as it:
            assert (await it.answer()).body() == b'{"a":1}'

        async def cut(line: Line, number: int) -> None:
            await line.request()
            line.send(head, b'{"a":1}')
            await line.writer.drain()
            await turns(100)
            with socket.socket(fileno=os.dup(line.writer.get_extra_info("socket").fileno())) as raw:
                raw.shutdown(socket.SHUT_WR)
            await line.closed()

        async with scene(cut, tls=trusted.server("right"), name="localhost") as it:
            failure = await it.failure()
            assert failure.kind == "truncated"

    run(test)


def test_the_connection_is_known_before_a_byte_is_sent(run):
    async def test():
        async with scene(script_of(OK)) as it:
            tracked: list[tuple[UpstreamConnection, bytes]] = []

            def track(connection: UpstreamConnection) -> bool:
                tracked.append((connection, bytes(it.received)))
                return True

            await it.upstream.send(REQUEST, b"", track)
            await it.upstream.send(REQUEST, b"", track)
            assert tracked[0] == (tracked[0][0], b"")
            assert tracked[1] == (tracked[0][0], REQUEST)

    run(test)
