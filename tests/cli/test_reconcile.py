"""`headgate reconcile`, run as a process, over a ledger and a real simulator that bills: the gap is named, estimates
are corrected, exact rows are not touched."""

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from headgate.policy.pricing import price
from headgate.simulator.models import load_catalogue
from headgate.simulator.server import Simulator
from headgate.simulator.settings import SimulatorSettings
from headgate.simulator.usage import Usage as Billed
from headgate.storage.database import open_database
from headgate.storage.tables import attempts, calls
from headgate.wire.catalog import packaged
from headgate.wire.usage import Usage

DAY_NS = 86_400 * 10**9
SONNET, HAIKU = "claude-sonnet-4-6", "claude-haiku-4-5"
ADMIN_KEY = "sk-ant-admin01-test"
CATALOGUE = load_catalogue()


class Anthropic:
    """A simulator in a thread, with a bill that can be written to."""

    def __init__(self) -> None:
        self.simulator = Simulator(SimulatorSettings(port=0, speed=0.0))
        self._ready = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self._main(),))
        self.thread.start()
        assert self._ready.wait(10)

    async def _main(self) -> None:
        async with self.simulator:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self._ready.set()
            await self._stop.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self.thread.join(10)

    def charge(self, model: str, usage: Billed, *, days_ago: int = 1, workspace: str = "wrkspc_01Simulated") -> None:
        """Bills an answer of some day, at noon."""
        found = CATALOGUE.find(model)
        assert found is not None
        self.simulator.world.bill.charge(
            found,
            usage,
            request=0,
            message_id="",
            request_id="",
            organization="0f2f0c5e-5d7c-4e6a-9b43-1c0f5a2d7e10",
            workspace=workspace,
            wall_s=noon_ns(days_ago) / 1e9,
            complete=True,
        )


class Books:
    """The ledger of the command's data directory."""

    def __init__(self, headgate: Any) -> None:
        self.engine = open_database(headgate.data, now_ns=time.time_ns)
        self.count = 0

    def add(self, model: str, usage: Usage, state: str = "settled", *, days_ago: int = 1) -> str:
        self.count += 1
        call_id, at_ns = f"call_{self.count}", noon_ns(days_ago)
        nanousd = price(usage, model, at_ns, packaged()).cost_nanousd
        with self.engine.begin() as connection:
            connection.execute(
                sa.insert(calls).values(
                    call_id=call_id, at_ns=at_ns, model=model, state=state, outcome="completed", cost_nanousd=nanousd
                )
            )
            connection.execute(
                sa.insert(attempts).values(
                    call_id=call_id,
                    number=1,
                    model=model,
                    state=state,
                    at_ns=at_ns,
                    usage=msgspec.json.encode(usage).decode(),
                    input_tokens_estimate=usage.prompt_tokens,
                    max_tokens=4_000,
                    cost_nanousd=nanousd,
                )
            )
        return call_id

    def costs(self) -> dict[str, int]:
        with self.engine.connect() as connection:
            return {row.call_id: row.cost_nanousd for row in connection.execute(sa.select(calls))}


def noon_ns(days_ago: int) -> int:
    return (time.time_ns() // DAY_NS - days_ago) * DAY_NS + DAY_NS // 2


@pytest.fixture
def anthropic() -> Iterator[Anthropic]:
    with closing(Anthropic()) as running:
        yield running


@pytest.fixture
def books(headgate: Any) -> Iterator[Books]:
    found = Books(headgate)
    yield found
    found.engine.dispose()


@pytest.fixture
def reconcile(headgate: Any, anthropic: Anthropic) -> Any:
    environment = {"HEADGATE_UPSTREAM_URL": anthropic.simulator.url, "ANTHROPIC_ADMIN_KEY": ADMIN_KEY}

    def run(*arguments: str, **more: str) -> Any:
        return headgate("reconcile", *arguments, **(environment | more))

    return run


def test_the_gap_is_named_and_put_to_the_estimates_alone(reconcile: Any, books: Books, anthropic: Anthropic) -> None:
    for _ in range(2):
        books.add(SONNET, Usage(input_tokens=1_000, output_tokens=200))
        anthropic.charge(SONNET, Billed(input_tokens=1_000, output_tokens=200))
    for output_tokens in (100, 300):  # cut streams, of which 20 % more had been produced
        books.add(SONNET, Usage(input_tokens=1_000, output_tokens=output_tokens), "estimated")
        anthropic.charge(SONNET, Billed(input_tokens=1_000, output_tokens=output_tokens * 6 // 5))
    books.add(HAIKU, Usage(input_tokens=50, output_tokens=5, web_search_requests=2), days_ago=2)
    anthropic.charge(HAIKU, Billed(input_tokens=50, output_tokens=5, web_searches=2), days_ago=2)
    books.add(SONNET, Usage(input_tokens=10**6), days_ago=0)  # today is not complete
    before = books.costs()

    dry = reconcile("--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "2 estimated attempts that day" in dry.stdout
    assert "2 estimated attempts would be corrected" in dry.stdout
    assert books.costs() == before

    done = reconcile("--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["agrees"], said["corrected_attempts"], said["workspace"]) == (True, 2, "default")
    haiku, sonnet = said["lines"]
    # The report and the ledger may call a model by its alias or its dated id.
    assert (haiku["model"], haiku["gap_nanousd"], haiku["cause"]) == ("claude-haiku-4-5-20251001", 0, "")
    assert (sonnet["gap_nanousd"], sonnet["left_nanousd"]) == (80 * 15_000, 0)
    assert sonnet["reported_tokens"]["output_tokens"] - sonnet["ledger_tokens"]["output_tokens"] == 80
    assert sonnet["cause"] == "2 estimated attempts that day"
    after = books.costs()
    exact = {call for call in before if call not in ("call_3", "call_4")}
    assert {call: after[call] for call in exact} == {call: before[call] for call in exact}
    assert sum(after.values()) == sum(before.values()) + 80 * 15_000

    again = json.loads(reconcile("--json").stdout)
    assert (again["corrected_attempts"], books.costs()) == (0, after)


def test_traffic_outside_of_the_gateway_is_named_and_nobodys_estimate(
    reconcile: Any, books: Books, anthropic: Anthropic
) -> None:
    books.add(SONNET, Usage(input_tokens=1_000, output_tokens=100), "estimated")
    anthropic.charge(SONNET, Billed(input_tokens=1_000, output_tokens=120))
    anthropic.charge(SONNET, Billed(input_tokens=10**6, output_tokens=10**5))
    before = books.costs()
    done = reconcile()
    assert done.returncode == 1
    assert "calls that did not go through this gateway" in done.stdout
    assert "+1,000,000" in done.stdout
    assert "1 of 1 lines are still apart" in done.stdout
    assert books.costs() == before


def test_with_several_workspaces_one_is_asked_for(reconcile: Any, books: Books, anthropic: Anthropic) -> None:
    books.add(SONNET, Usage(input_tokens=1_000))
    anthropic.charge(SONNET, Billed(input_tokens=1_000), workspace="wrkspc_gateway")
    anthropic.charge(SONNET, Billed(input_tokens=7_000))
    refused = reconcile()
    assert refused.returncode == 2
    assert "--workspace" in refused.stderr
    assert "wrkspc_gateway" in refused.stderr
    done = reconcile("--workspace", "wrkspc_gateway")
    assert done.returncode == 0, done.stderr
    assert "Not compared: workspace default, $0.02." in done.stdout


def test_a_span_above_a_page_of_days_is_read_whole(reconcile: Any, books: Books, anthropic: Anthropic) -> None:
    for days_ago in (1, 40, 79):
        books.add(SONNET, Usage(input_tokens=1_000), days_ago=days_ago)
        anthropic.charge(SONNET, Billed(input_tokens=1_000), days_ago=days_ago)
    done = reconcile("--since", "80d", "--json")
    assert done.returncode == 0, done.stderr
    assert [line["gap_nanousd"] for line in json.loads(done.stdout)["lines"]] == [0, 0, 0]


def test_messages_that_were_answered_just_now_are_there_when_today_is_asked_for(
    reconcile: Any, books: Books, anthropic: Anthropic
) -> None:
    body = {"model": SONNET, "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"x-api-key": "k", "anthropic-version": "2023-06-01", "content-type": "application/json"}
    request = urllib.request.Request(f"{anthropic.simulator.url}/v1/messages", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        usage = json.load(answer)["usage"]
    books.add(SONNET, Usage(input_tokens=usage["input_tokens"], output_tokens=usage["output_tokens"]), days_ago=0)
    tomorrow = datetime.fromtimestamp(time.time() + 86_400, tz=UTC).date().isoformat()
    done = reconcile("--until", tomorrow, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = json.loads(done.stdout)["lines"]
    assert line["ledger_nanousd"] == line["reported_nanousd"] > 0


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (
            (),
            {"ANTHROPIC_ADMIN_KEY": ""},
            ("ANTHROPIC_ADMIN_KEY is not set", "platform.claude.com/settings/admin-keys"),
        ),
        (("--since", "1d", "--until", "3d"), {}, ("no whole day",)),
        (("--since", "400d"), {}, ("366",)),
    ],
)
def test_what_cannot_be_compared_is_refused_with_how_to_mend_it(
    reconcile: Any, arguments: tuple[str, ...], environment: dict[str, str], words: tuple[str, ...]
) -> None:
    done = reconcile(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_on_either_side_is_no_gap(reconcile: Any) -> None:
    done = reconcile()
    assert done.returncode == 0, done.stderr
    assert "Neither the ledger nor the report" in done.stdout
