"""50,000 requests over a virtual day of rushes and faults, twice: no law broken, no nano-dollar astray, one digest.

The day is `virtual_day.py` beside this file, the laws are in `world.py`. It runs in two processes at once, whose hashes
are seeded differently: a digest that depended on the order of a set would show.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED = 20261124
REQUESTS = 50_000
ROOT = Path(__file__).resolve().parents[2]


def begin(folder: Path, *, hash_seed: str, requests: int, seed: int = SEED) -> subprocess.Popen:
    """A day in a process of its own, away from any `headgate.toml` and settings of the environment."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.simulation.virtual_day", "--seed", str(seed), "--requests", str(requests)],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> dict:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, f"seed {SEED}"
    return json.loads(output)


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> list[dict]:
    """The same day, lived twice."""
    folder = tmp_path_factory.mktemp("day")
    return [ended(day) for day in [begin(folder, hash_seed=seed, requests=REQUESTS) for seed in ("1", "2")]]


@pytest.fixture
def day(days) -> dict:
    return days[0]


def test_the_same_seed_lives_the_same_day(days):
    first, second = ({name: value for name, value in day.items() if name != "cpu_s"} for day in days)
    assert first == second
    assert len(first["digest"]) == 64


def test_another_seed_lives_another_day(tmp_path):
    one, other = (ended(begin(tmp_path, hash_seed="1", requests=200, seed=seed)) for seed in (1, 2))
    assert one["digest"] != other["digest"]


def test_no_law_is_broken(day):
    assert day["broken"] == {}, day["examples"]


def test_every_request_is_a_call_with_one_outcome(day):
    assert day["calls"] == sum(day["outcomes"].values()) == REQUESTS
    assert set(day["outcomes"]) == {"completed", "cut", "failed", "abandoned", "refused"}


def test_every_attempt_has_one_terminal_state(day):
    assert day["attempts"] == sum(day["states"].values())
    assert set(day["states"]) == {"settled", "estimated", "void"}


def test_the_ledger_adds_up_to_the_tokens_times_their_prices(day):
    assert day["cost_nanousd"] == day["own_sum_nanousd"] > 0


def test_attempts_stay_within_the_retry_budget(day):
    """Over the day; for every window it is a law of `world.py`."""
    assert set(day["attempts_per_call"]) <= {"0", "1", "2", "3"}
    sent = REQUESTS - day["attempts_per_call"]["0"]
    assert day["attempts"] <= 1.2 * sent + 10


def test_cut_answers_are_estimated_within_three_percent_of_what_they_cost(day):
    assert day["cut_true_nanousd"] > 0
    assert day["cut_nanousd"] == pytest.approx(day["cut_true_nanousd"], rel=0.03)


def test_faults_are_met_and_most_are_never_seen(day):
    """The day is a test of something: many are tried again, clients leave, 96 of 100 that are sent succeed."""
    sent = REQUESTS - day["attempts_per_call"]["0"]
    assert day["attempts"] > 1.06 * sent
    assert day["left"] > 1_000
    assert {"200", "400", "429", "499", "502", "504", "529"} <= set(day["statuses"])
    assert day["outcomes"]["failed"] + day["outcomes"]["cut"] < 0.04 * sent


def test_traffic_control_has_its_hands_full(day):
    """All that can be in the way is, at some time of the day."""
    assert day["queued"] > 5_000
    assert set(day["refused"]) >= {
        "queue_deadline",
        "user_queue_full",
        "user_rpm_exceeded",
        "upstream_spend_cap",
        "poison_prompt",
    }
    assert day["breaker_transitions"] > 20
    assert day["served_by_fallback"] > 200
