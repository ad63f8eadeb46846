"""A prefix outlives its TTL in the simulator's cache because the gateway reads it on the way, and the bill is lower.

The gateway's and the simulator's whole programs in this process, on clocks that the test moves on together.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import anthropic
import pytest
import sqlalchemy as sa
import structlog
from tests.system.conftest import get_json

from headgate.gateway import app
from headgate.gateway.app import Gateway
from headgate.gateway.keep_warm import ENDPOINT, USER, WarmKeeper
from headgate.gateway.settings import Settings
from headgate.simulator import server as simulator_server
from headgate.simulator.server import Simulator
from headgate.simulator.settings import SimulatorSettings
from headgate.storage import keys
from headgate.storage.database import open_database
from headgate.storage.keys import KeyStore
from headgate.storage.reports import calls_page
from headgate.storage.tables import alerts

BEGAN_NS = 1_795_500_000_000_000_000
MODEL = "claude-sonnet-4-6"
SYSTEM = "You answer letters about broken kettles, politely and in two sentences. " * 300
GAP_S = 500.0
"""Between two bursts of letters: 200 s longer than the prefix lives by itself."""
HOUR_S = 3600.0
BURST = 3
BURSTS = 9
LEARNED_AFTER = 3
"""Bursts: then eight gaps have been seen."""


class MovedTime:
    """What a program reads as `time`. Real, and moved on by the test."""

    def __init__(self) -> None:
        self.moved_s = 0.0
        self._began = time.monotonic()

    def monotonic(self) -> float:
        return time.monotonic() + self.moved_s

    def time_ns(self) -> int:
        return BEGAN_NS + round((self.monotonic() - self._began) * 1e9)

    def time(self) -> float:
        return self.time_ns() / 1e9


class QuickKeeper(WarmKeeper):
    """Looks often, and lets the test wait for a look that began after it moved the clock."""

    made: ClassVar[list[QuickKeeper]] = []

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named, every_s=0.02)
        self.looks = 0
        self.made.append(self)

    async def look(self) -> None:
        await super().look()
        self.looks += 1


class House:
    """Simulator, gateway and a client."""

    def __init__(self, simulator: Simulator, gateway: Gateway, clock: MovedTime, key: str, data_dir: Path) -> None:
        self.simulator = simulator
        self.gateway = gateway
        self.clock = clock
        self.key = key
        self.data_dir = data_dir
        self.keeper = QuickKeeper.made[-1]
        self.sdk = anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{gateway.port}", api_key=key, max_retries=0)

    async def move(self, seconds: float) -> None:
        """Time passes, and the keeper has looked since."""
        self.clock.moved_s += seconds
        looks = self.keeper.looks
        async with asyncio.timeout(10):
            while self.keeper.looks < looks + 2:  # noqa: ASYNC110  it tells nobody
                await asyncio.sleep(0.01)

    async def letter(self, number: int) -> anthropic.types.Usage:
        """One of a burst: what it read and wrote."""
        answer = await self.sdk.messages.create(
            model=MODEL,
            max_tokens=20,
            system=SYSTEM,
            messages=[{"role": "user", "content": f"Letter {number}: it does not boil."}],
        )
        return answer.usage

    async def bursts(self, count: int) -> list[anthropic.types.Usage]:
        """So many bursts; the usage of each one's first letter."""
        first = []
        for burst in range(count):
            usages = [await self.letter(burst * BURST + number) for number in range(BURST)]
            first.append(usages[0])
            await self.move(273.0)
            await self.move(GAP_S - 273.0)
        return first

    async def bill(self) -> int:
        """What the simulator bills, in nano-dollars."""
        return (await asyncio.to_thread(get_json, f"{self.simulator.url}/sim/bill"))["total"]["cost_nanousd"]


def live(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scene: Callable[[House], Any],
    *,
    keep_warm: bool,
    usd_day: float = 1.0,
) -> list[Any]:
    """Play a scene; every call that is in the ledger afterwards, oldest first."""
    clock = MovedTime()
    monkeypatch.setattr(app, "time", clock)
    monkeypatch.setattr(app, "WarmKeeper", QuickKeeper)
    monkeypatch.setattr(simulator_server, "time", clock)
    # They are read every half second of the real clock, which may be hours of this one.
    monkeypatch.setattr(keys, "UNREADABLE_S_MAX", HOUR_S)
    for name in [name for name in os.environ if name.startswith(("HEADGATE_", "ANTHROPIC_", "CLAUDE_"))]:
        monkeypatch.delenv(name)
    config = tmp_path / "headgate.toml"
    config.write_text(f'[cache]\nttl = "5m"\nkeep_warm = {str(keep_warm).lower()}\nkeep_warm_usd_day = {usd_day}\n')
    monkeypatch.setenv("HEADGATE_CONFIG", str(config))
    data_dir = tmp_path / f"data-{keep_warm}"

    async def play() -> None:
        async with (
            Simulator(SimulatorSettings(port=0, speed=0.0, idle_timeout_s=HOUR_S)) as simulator,
            asyncio.TaskGroup() as group,
        ):
            settings = Settings(
                anthropic_api_key="sk-ant-api03-x",
                data_dir=data_dir,
                upstream_url=simulator.url,
                listen="127.0.0.1:0",
                operator_listen="127.0.0.1:0",
                log={"calls": False},
                server={"idle_timeout_s": HOUR_S},
                upstream={"idle_timeout_s": HOUR_S},
            )
            engine = open_database(data_dir, now_ns=clock.time_ns)
            key = KeyStore(engine, now_ns=clock.time_ns).create(name="kettles").key
            engine.dispose()
            gateway = Gateway(settings)
            is_up = asyncio.Event()
            serving = group.create_task(gateway.serve(lambda _: is_up.set()))
            await asyncio.wait({serving, group.create_task(is_up.wait())}, return_when=asyncio.FIRST_COMPLETED)
            house = House(simulator, gateway, clock, key, data_dir)
            async with house.sdk:
                await scene(house)
            gateway.stop()

    threshold = gc.get_threshold()
    with structlog.testing.capture_logs():
        asyncio.run(play())
    gc.unfreeze()
    gc.set_threshold(*threshold)
    engine = open_database(data_dir, now_ns=clock.time_ns)
    with engine.connect() as connection:
        page = calls_page(connection, limit=1000)
    engine.dispose()
    return list(reversed(page.calls))


def test_a_prefix_outlives_its_ttl_and_the_bill_is_lower(tmp_path, monkeypatch):
    bills: dict[bool, int] = {}
    first: dict[bool, list[anthropic.types.Usage]] = {}
    ledger = {}
    for keep_warm in (False, True):

        async def scene(house: House, keep_warm: bool = keep_warm) -> None:
            first[keep_warm] = await house.bursts(BURSTS)
            bills[keep_warm] = await house.bill()

        ledger[keep_warm] = live(tmp_path, monkeypatch, scene, keep_warm=keep_warm)
    # Without it each burst writes the prefix again.
    assert all(usage.cache_creation_input_tokens and not usage.cache_read_input_tokens for usage in first[False])
    # With it those after the gaps have been seen read what was written 500 s before, 200 s beyond its TTL.
    late = first[True][LEARNED_AFTER:]
    assert all(usage.cache_read_input_tokens > 4000 and not usage.cache_creation_input_tokens for usage in late)
    assert len(late) == 6
    assert bills[True] < 0.75 * bills[False]

    warming = [call for call in ledger[True] if call.endpoint == ENDPOINT]
    assert not [call for call in ledger[False] if call.endpoint == ENDPOINT]
    # One for each gap from the third on, each a row of the key whose prefix it is, and a read.
    assert len(warming) == 7
    (key_id,) = {call.key_id for call in ledger[True]}
    for call in warming:
        assert (call.user, call.key_id, call.outcome, call.state) == (USER, key_id, "completed", "settled")
        assert call.usage.cache_read_tokens > 4000
        assert (call.usage.cache_write_5m_tokens, call.usage.output_tokens, len(call.attempts)) == (0, 0, 1)
    # The ledger and Anthropic agree to the nano-dollar.
    for keep_warm in (False, True):
        assert sum(call.cost_nanousd for call in ledger[keep_warm]) == bills[keep_warm]


def test_switched_off_by_sighup_it_stops_at_once_and_a_refusal_is_nobodys_trouble(tmp_path, monkeypatch):
    usages: dict[str, list[anthropic.types.Usage]] = {}

    async def scene(house: House) -> None:
        await house.bursts(LEARNED_AFTER)
        for number in range(BURST):
            await house.letter(number)
        warmed = house.keeper.snapshot().warmed
        fault = {"kind": "400", "count": 1}
        await asyncio.to_thread(get_json, f"{house.simulator.url}/sim/faults", data=fault)
        await house.move(273.0)
        view = house.keeper.snapshot()
        assert (view.warmed, view.failed, view.on) == (warmed, 1, True)
        # The family rests for an hour, and its app goes on as it did without.
        await house.move(GAP_S - 273.0)
        usages["rests"] = await house.bursts(8)
        usages["goes on"] = await house.bursts(2)
        before = house.keeper.snapshot()
        assert before.warmed > warmed
        (tmp_path / "headgate.toml").write_text('[cache]\nttl = "5m"\nkeep_warm = false\n')
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(10):
            while house.keeper.snapshot().on:  # noqa: ASYNC110  it tells nobody
                await asyncio.sleep(0.01)
        usages["off"] = await house.bursts(2)
        after = house.keeper.snapshot()
        assert (after.warmed, after.prompts, after.bytes) == (before.warmed, 0, 0)

    calls = live(tmp_path, monkeypatch, scene, keep_warm=True)
    assert all(usage.cache_creation_input_tokens > 4000 for usage in usages["rests"])
    assert all(usage.cache_read_input_tokens > 4000 for usage in usages["goes on"])
    assert usages["off"][1].cache_creation_input_tokens > 4000
    warming = [call for call in calls if call.endpoint == ENDPOINT]
    (failed,) = [call for call in warming if call.outcome != "completed"]
    assert (failed.outcome, failed.state, failed.status, failed.cost_nanousd) == ("failed", "void", 400, 0)
    assert {call.outcome for call in calls if call.endpoint != ENDPOINT} == {"completed"}
    engine = open_database(tmp_path / "data-True", now_ns=time.time_ns)
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(alerts)).scalar_one() == 0
    engine.dispose()
