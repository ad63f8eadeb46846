"""What the storage tests share: an empty database, a price that can be checked by head, and calls as events."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.storage.redis_server import RedisServer

from headgate.policy.records import (
    AttemptEnded,
    AttemptIntent,
    AttemptProgress,
    AttemptStarted,
    CallClosed,
    CallOpened,
    LedgerEvent,
)
from headgate.storage.database import open_database
from headgate.storage.ledger import LocalLedger
from headgate.wire.usage import Usage

MODEL = "claude-sonnet-4-6"


class Call:
    """The events of one call: `opening()` and `ending()` are what a gateway writes at once."""

    def __init__(self, number: int, *, user: str = "an", at_ns: int = 1_785_000_000_000_000_000) -> None:
        self.id = f"call_{number:024d}"
        self.at_ns = at_ns + number
        self.user = user

    def opening(self) -> tuple[LedgerEvent, ...]:
        return (
            CallOpened(self.id, self.at_ns, "key00001", self.user, "free", "chat", MODEL, streamed=True),
            self.intent(1),
        )

    def intent(self, number: int) -> AttemptIntent:
        return AttemptIntent(self.id, number, MODEL, self.at_ns, input_tokens_estimate=1_000, max_tokens=500)

    def started(self, number: int = 1, *, input_tokens: int = 700) -> AttemptStarted:
        return AttemptStarted(self.id, number, f"req_{number}", Usage(input_tokens=input_tokens, output_tokens=1))

    def progress(self, output_tokens: int, number: int = 1) -> AttemptProgress:
        return AttemptProgress(self.id, number, output_tokens)

    def ended(self, number: int = 1, *, output_tokens: int = 90) -> AttemptEnded:
        usage = Usage(input_tokens=700, cache_read_tokens=50, output_tokens=output_tokens)
        return AttemptEnded(self.id, number, "settled", 200, usage, "row-1", cost_nanousd=12_345, saved_nanousd=6)

    def failed(self, number: int = 1) -> AttemptEnded:
        return AttemptEnded(self.id, number, "void", 529, Usage(), "", 0, error_code="overloaded_error")

    def closed(self) -> CallClosed:
        return CallClosed(self.id, "completed", 200, MODEL, total_ms=1_500, queue_ms=2, first_byte_ms=300)

    def ending(self) -> tuple[LedgerEvent, ...]:
        return (self.ended(), self.closed())


def price_per_token(usage: Usage, model: str, at_ns: int) -> tuple[int, int, str]:
    """One nano-dollar an input token, ten an output token."""
    return usage.input_tokens + 10 * usage.output_tokens, 0, "test-row"


def wait_for(condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


@pytest.fixture
def call() -> type[Call]:
    return Call


@pytest.fixture
def price() -> Callable[[Usage, str, int], tuple[int, int, str]]:
    return price_per_token


@pytest.fixture
def eventually() -> Callable[..., None]:
    return wait_for


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = open_database(tmp_path, now_ns=time.time_ns)
    yield engine
    engine.dispose()


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Callable[..., LocalLedger]]:
    """Opens a ledger on a data directory (this test's own by default); whatever is open at the end is closed."""
    opened: list[tuple[LocalLedger, sa.Engine]] = []

    def open_one(data_dir: Path = tmp_path, **options: str) -> LocalLedger:
        engine = open_database(data_dir, now_ns=time.time_ns)
        ledger = LocalLedger(data_dir, engine, price=price_per_token, now_ns=time.time_ns, **options)
        opened.append((ledger, engine))
        return ledger

    yield open_one
    for ledger, engine in opened:
        ledger.close()
        engine.dispose()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of 2 MiB needs the right to mount one (root)")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def fill(small_disk: Path) -> Callable[[], Path]:
    """Takes every byte that is left on the small disk, and gives back the file that holds them."""

    def take() -> Path:
        ballast = small_disk / "ballast"
        with ballast.open("ab", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue
        return ballast

    return take


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for tests that leave it standing; each takes a tag or a prefix of its own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for one test, to be ill-treated."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()
