"""Storms in virtual time and what they may do: the bars of the failure model's §2.7, on the whole gateway.

What each storm is, and figures to look at, are in `virtual_storms.py`. Nothing here waits for a real second.
"""

import pytest
from tests.simulation import virtual_storms as storms

ARRIVALS_PER_S = 50.0
STEADY_RATIO_MAX = 1.5


@pytest.fixture(autouse=True)
def away(monkeypatch, tmp_path):
    """From any `headgate.toml`."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("per_s", "seed"), [(2.0, 1), (10.0, 1), (10.0, 2), (10.0, 3), (30.0, 1)])
def test_a_model_that_flaps_is_left_alone_and_nobody_notices(per_s, seed):
    """5 s up, 5 s down for 5 minutes: at most 12 changes of state, and 99 of 100 are answered by the other model."""
    figures = storms.flapping(per_s, seed, everything=False)
    assert 2 <= figures["transitions"][storms.SONNET] <= 12
    assert storms.HAIKU not in figures["transitions"]
    assert figures["answered"] >= 0.99
    assert figures["first_byte_p95_s"] < 2.0


def test_models_that_flap_together_are_left_alone_too():
    """How many are answered then is no bar: both are mostly taken for down."""
    figures = storms.flapping(10.0, 1, everything=True)
    assert all(2 <= count <= 12 for count in figures["transitions"].values())
    assert set(figures["transitions"]) == {storms.SONNET, storms.HAIKU}
    assert figures["attempts_per_request"] <= 1.2


def test_429s_never_open_a_breaker():
    figures = storms.throttled(10.0, 1)
    assert figures["transitions"] == 0
    assert figures["attempts"] > 5


@pytest.fixture(scope="module", params=[("529", 2), ("5xx", 1), ("529", 3)], ids=str)
def outage(request, tmp_path_factory) -> dict:
    """A minute without any answer, at 50 requests a second."""
    fault, seed = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("outage"))
        return storms.outage(ARRIVALS_PER_S, seed, fault=fault)


def test_an_outage_of_everything_is_not_made_worse(outage):
    assert outage["attempts"] <= 1.2 * outage["requests"] + 10
    # The breaker does more than the budget asks: what is left are probes and those that met the first faults.
    assert outage["attempts"] <= 0.1 * outage["requests"]
    assert outage["attempts_max"] <= 3


def test_after_an_outage_everybody_is_answered_soon_and_not_all_at_once(outage):
    assert outage["busiest_second_after"] <= STEADY_RATIO_MAX * ARRIVALS_PER_S
    assert outage["p95_normal_after_s"] <= 30
    assert outage["answered_30_s_after"] == 1.0
    assert max(outage["closed_after_s"]) <= 15.0


@pytest.mark.parametrize("own_limits", [True, False])
def test_twenty_who_ask_now_and_then_do_not_feel_one_who_asks_a_thousand_times(own_limits):
    """With the article's limits, and where a person has none of their own and only the order protects the others."""
    figures = storms.crowding(1, own_limits=own_limits)
    assert figures["answered"] == 1.0
    assert figures["wait_p95_s"] <= 3.0
    assert figures["greedy_answered"] >= 20


def test_ten_keys_of_one_person_gain_nothing():
    one, ten = (storms.keys(1, count) for count in (1, 10))
    assert one["asked"] == ten["asked"]
    assert ten["answered"] == one["answered"] <= 3 * 20 + 20 + 10
