"""Models, token estimates, pages, batches' clock and the ticker: the small pieces."""

import asyncio
import json
import random
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.simulator import tokens
from headgate.simulator.__main__ import settings_from
from headgate.simulator.batches import Batch, Batches, Outcome
from headgate.simulator.cache import Scope
from headgate.simulator.corpus import PIECE_CHARS_MAX, pieces
from headgate.simulator.errors import Rejected
from headgate.simulator.listing import list_models, model_info, page
from headgate.simulator.models import load_catalogue
from headgate.simulator.settings import SimulatorSettings
from headgate.simulator.ticker import Ticker

CATALOGUE = load_catalogue()
HERE = Scope("org", "workspace")


# ---- models


def test_no_two_models_share_a_name_and_every_name_is_found() -> None:
    names = [name for model in CATALOGUE.models for name in model.names]
    assert len(names) == len(set(names))
    assert all(CATALOGUE.find(name) is not None for name in names)


@pytest.mark.parametrize("model", CATALOGUE.models, ids=lambda model: model.id)
def test_the_price_rows_of_a_model_follow_one_another_without_gap_or_overlap(model: Any) -> None:
    for speed in ("standard", "fast"):
        rows = [row for row in model.prices if row.speed == speed and row.prompt_over_tokens == 0]
        for before, after in pairwise(sorted(rows, key=lambda row: row.valid_from)):
            assert before.valid_to == after.valid_from
    for row in model.prices:
        assert row.write_5m_picousd * 4 == row.input_picousd * 5
        assert row.write_1h_picousd == row.input_picousd * 2
        assert row.read_picousd * 40 in (row.input_picousd, row.input_picousd * 2, row.input_picousd * 4)


def test_a_model_is_shown_with_its_capabilities_and_dates() -> None:
    model = CATALOGUE.find("claude-sonnet-4-5")
    assert model is not None
    shown: Any = model_info(model)
    assert (shown["lifecycle"], shown["retires_at"]) == ("deprecated", "2026-11-30T00:00:00Z")
    assert shown["capabilities"]["thinking"]["types"]["adaptive"] == {"supported": False}
    assert shown["capabilities"]["effort"]["supported"] is False


def test_retired_models_are_listed_only_when_asked_for() -> None:
    def listed(**query: list[str]) -> set[str]:
        data: Any = list_models(CATALOGUE, {"limit": ["1000"], **query})["data"]
        return {model["lifecycle"] for model in data}

    assert listed() == {"active", "deprecated"}
    assert listed(**{"lifecycle[]": ["retired"]}) == {"retired"}


# ---- tokens


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The order was received and is being prepared.", "prose"),
        ("def f(x):\n    return g(x=x, y=h(x))\n\nself._a = f(1); b(2)", "code"),
        ('{"id":1,"tags":["a","b"],"ok":true}', "markup"),
        ("Đơn hàng của tôi đã bị trễ ba ngày rồi, giờ phải làm sao đây?", "vietnamese"),
        ("Gateway giữ key của Anthropic, app chỉ gọi gateway bằng virtual key thôi", "vietnamese_mixed"),
        ("注文はもう届きましたか。", "cjk"),
        ("", "prose"),
    ],
)
def test_a_text_is_known_by_its_letters(text: str, kind: str) -> None:
    assert tokens.kind_of(text) == kind


@given(st.text(), st.text())
def test_counts_are_never_negative_and_newer_models_never_count_less(one: str, other: str) -> None:
    assert 0 <= tokens.count(one, "old") <= tokens.count(one, "new")
    assert tokens.count(one + other, "old") >= 0


@given(st.text())
def test_pieces_join_to_the_text_and_are_short(text: str) -> None:
    found = pieces(text)
    assert "".join(found) == text
    assert all(len(piece.strip()) <= PIECE_CHARS_MAX for piece in found)


# ---- pages


def test_pages_walk_in_both_directions() -> None:
    items = {name: name for name in "abcde"}

    def names(**query: str) -> tuple[str, bool]:
        entries, more = page(items, {key: [value] for key, value in query.items()})
        return "".join(name for name, _ in entries), more

    assert names(limit="2") == ("ab", True)
    assert names(limit="2", after_id="b") == ("cd", True)
    assert names(limit="2", after_id="d") == ("e", False)
    assert names(limit="2", before_id="d") == ("bc", True)
    assert names(limit="2", before_id="b") == ("a", False)
    for wrong in ("0", "1001", "x", "-1"):
        with pytest.raises(Rejected):
            names(limit=wrong)


# ---- batches


def batches(clock_factor: float = 1.0) -> Batches:
    def answer(params: Any, batch: Batch) -> tuple[Outcome, dict[str, Any]]:
        return params["outcome"], {"type": params["outcome"]}

    return Batches(clock_factor=clock_factor, answer=answer)


def requests(count: int, outcome: str = "succeeded") -> dict[str, Any]:
    return {"requests": [{"custom_id": f"r{n}", "params": {"outcome": outcome}} for n in range(count)]}


def created(of: Batches, body: Any) -> Batch:
    return of.create("msgbatch_1", HERE, body, betas=None, version="2023-06-01", wall_s=1_000.0)


def worked(of: Batches, batch: Batch, wall_s: float) -> None:
    """Works until the batch waits for a later time."""
    done = -1
    while batch.done != done:
        done = batch.done
        of.work(batch, wall_s, random.Random(1))


def shown(batch: Batch) -> tuple[Any, dict[str, int]]:
    value: Any = batch.as_json("http://here/results")
    return value["processing_status"], value["request_counts"]


def test_counts_stay_with_processing_until_the_whole_batch_ends() -> None:
    of = batches()
    batch = created(of, requests(120))
    worked(of, batch, batch.due_s - 1.0)
    assert 0 < batch.done < 120
    assert shown(batch)[1] == {"processing": 120, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    assert batch.as_json("u")["results_url"] is None
    worked(of, batch, batch.due_s)
    assert shown(batch) == ("ended", {"processing": 0, "succeeded": 120, "errored": 0, "canceled": 0, "expired": 0})
    assert batch.as_json("u")["results_url"] == "u"


def test_results_come_shuffled_and_each_once() -> None:
    of = batches()
    batch = created(of, requests(120))
    worked(of, batch, batch.due_s)
    found = [json.loads(line)["custom_id"] for line in batch.lines]
    assert sorted(found) == sorted(f"r{n}" for n in range(120))
    assert found != [f"r{n}" for n in range(120)]


def test_a_slice_is_small_however_large_the_batch_is() -> None:
    of = batches()
    batch = created(of, requests(100_000))
    of.work(batch, batch.due_s, random.Random(1))
    assert batch.done == 50


def test_cancelling_keeps_what_is_done_and_ends_the_rest() -> None:
    of = batches()
    batch = created(of, requests(120))
    worked(of, batch, batch.due_s - 30.0)
    done = batch.done
    of.cancel(batch, 1_050.0)
    assert shown(batch)[0] == "canceling"
    worked(of, batch, 1_051.0)
    status, counts = shown(batch)
    assert (status, counts["succeeded"], counts["canceled"]) == ("ended", done, 120 - done)


def test_what_is_not_done_after_a_day_of_its_clock_expires() -> None:
    of = batches(clock_factor=60.0)
    batch = created(of, requests(100_000))
    assert batch.expires_s == 1_000.0 + 24 * 60.0
    worked(of, batch, batch.expires_s)
    assert shown(batch)[1]["expired"] == 100_000


def test_a_batch_is_deleted_only_after_its_end_and_seen_only_in_its_workspace() -> None:
    of = batches()
    batch = created(of, requests(1))
    with pytest.raises(Rejected):
        of.delete(batch)
    with pytest.raises(Rejected):
        of.find(batch.id, Scope("org", "other"))
    worked(of, batch, batch.due_s)
    of.delete(of.find(batch.id, HERE))
    assert of.of(HERE) == {}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"requests": []},
        {"requests": [{"custom_id": "a b", "params": {}}]},
        {"requests": [{"custom_id": "x" * 65, "params": {}}]},
        {"requests": [{"custom_id": "a", "params": {}}, {"custom_id": "a", "params": {}}]},
        {"requests": [{"custom_id": "a"}]},
        {"requests": [1]},
    ],
)
def test_a_wrong_list_is_refused_at_once(body: Any) -> None:
    with pytest.raises(Rejected):
        created(batches(), body)


# ---- ticker


def test_no_wait_ends_early_and_one_failure_stops_no_other() -> None:
    failures: list[Any] = []
    early: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        ticker = Ticker(loop, time.monotonic)
        done = asyncio.Event()
        left = 200

        def expect(due_s: float) -> None:
            def wake(now_s: float) -> None:
                nonlocal left
                left -= 1
                early.append(due_s - now_s)
                if left == 0:
                    done.set()

            ticker.at(due_s, wake)

        def fail(_: float) -> None:
            raise ZeroDivisionError

        start_s = time.monotonic()
        ticker.at(start_s + 0.02, fail)
        for n in range(200):
            expect(start_s + 0.05 - n * 0.0003)
        await asyncio.wait_for(done.wait(), 10.0)

    asyncio.run(main())
    assert [type(failure) for failure in failures] == [ZeroDivisionError]
    assert max(early) <= 0.0


def test_a_closed_ticker_wakes_nobody() -> None:
    async def main() -> bool:
        woken = asyncio.Event()
        ticker = Ticker(asyncio.get_running_loop(), time.monotonic)
        ticker.at(time.monotonic(), lambda _: woken.set())
        ticker.close()
        other = asyncio.Event()
        Ticker(asyncio.get_running_loop(), time.monotonic).at(time.monotonic() + 0.02, lambda _: other.set())
        await other.wait()
        return woken.is_set()

    assert not asyncio.run(main())


# ---- command line


def test_the_command_line_means_the_settings() -> None:
    assert settings_from([]) == SimulatorSettings()
    line = "--port=0 --tier=tier2 --api-key=a --api-key=b=o/w --speed=0 --upstream-tls c k"
    found = settings_from(line.split())
    assert (found.port, found.tier, found.api_keys, found.speed) == (0, "tier2", ("a", "b=o/w"), 0.0)
    assert (str(found.tls_certificate), str(found.tls_key)) == ("c", "k")
    with pytest.raises(SystemExit):
        settings_from(["--tier", "gold"])
