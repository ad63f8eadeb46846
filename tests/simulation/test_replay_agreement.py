"""A replay of recorded rows tells what the simulator bills for really running the same traffic under the policy."""

import pytest
from load.replay_agreement import BAR, POLICIES, compare


@pytest.mark.parametrize("requests", [400, pytest.param(20_000, marks=pytest.mark.drill)])
def test_six_policies_agree_with_the_simulators_bill(requests) -> None:
    found = compare(requests, seed=2)
    assert set(found) == set(POLICIES)
    assert {name: one["off"] for name, one in found.items() if abs(one["off"]) > BAR} == {}
