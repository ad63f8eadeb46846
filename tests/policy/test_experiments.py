"""Laws of the deal (sticky, by weight, moving no more than it must) and of what is said of the arms afterwards."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.experiments import (
    Arm,
    Deal,
    Estimate,
    Experiment,
    Unit,
    arm_label,
    cost_per_request,
    differs,
    error_rate,
)

UNITS = [f"conversation-{number}" for number in range(20_000)]


def deal(*, name: str = "e", salt: str = "", **weights: float) -> Deal:
    arms = tuple(Arm(arm, f"model-{arm}", weight) for arm, weight in weights.items())
    return Deal(Experiment(name=name, model="m", arms=arms, salt=salt))


def dealt(of: Deal) -> dict[str, str]:
    return {unit: of.arm_of(unit).name for unit in UNITS}


# the deal

weights = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(0.001, 1_000), min_size=2, max_size=5)


@given(weights, st.text(), st.text())
def test_a_unit_is_always_given_the_same_arm(of, salt, unit):
    assert deal(salt=salt, **of).arm_of(unit) == deal(salt=salt, **of).arm_of(unit)


@given(weights, st.randoms(use_true_random=False), st.text())
def test_the_order_of_the_arms_does_not_matter(of, dice, unit):
    shuffled = list(of.items())
    dice.shuffle(shuffled)
    assert deal(**of).arm_of(unit) == deal(**dict(shuffled)).arm_of(unit)


def test_a_deal_of_this_release_is_that_of_every_other():
    # Written down once: a change here would move the conversations of everybody who upgrades.
    arms = "".join(deal(name="haiku-for-chat", a=1, b=1, c=2).arm_of(unit).name for unit in UNITS[:24])
    assert arms == "abccbbacacabcaccacaccaac"


@pytest.mark.parametrize(
    "of", [{"a": 1, "b": 1}, {"a": 9, "b": 1}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 1000, "b": 1000, "c": 1}]
)
def test_arms_get_their_share(of):
    counted = Counter(dealt(deal(**of)).values())
    for arm, weight in of.items():
        share = weight / sum(of.values())
        deviation = math.sqrt(len(UNITS) * share * (1 - share))
        assert abs(counted[arm] - len(UNITS) * share) < 4 * deviation, counted


def test_an_arm_of_weight_0_gets_nothing():
    of = deal(a=0, b=1, c=0)
    assert set(dealt(of).values()) == {"b"}
    assert [arm.name for arm in of.arms] == ["b"]


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({"a": 9, "b": 1}, {"a": 9, "b": 3}, "b"),
        ({"a": 2, "b": 1, "c": 1}, {"a": 2, "b": 1, "c": 0.5}, "c"),
        ({"a": 1, "b": 1, "c": 0}, {"a": 1, "b": 1, "c": 1}, "c"),
        ({"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 1}, "c"),
    ],
)
def test_units_move_only_to_or_from_the_arm_whose_weight_changed_and_no_more_than_the_shares_say(
    before, after, changed
):
    was, now = dealt(deal(**before)), dealt(deal(**after))
    moved = [unit for unit in UNITS if was[unit] != now[unit]]
    grew = after[changed] / sum(after.values()) > before.get(changed, 0) / sum(before.values())
    assert all((now if grew else was)[unit] == changed for unit in moved)
    least = abs(Counter(now.values())[changed] - Counter(was.values())[changed])
    assert len(moved) == least > 0


@given(weights, st.floats(0.001, 1_000), st.data())
def test_no_unit_ever_moves_between_two_arms_that_did_not_change(of, weight, data):
    changed = data.draw(st.sampled_from(sorted(of)))
    unit = data.draw(st.text())
    was, now = deal(**of).arm_of(unit).name, deal(**of | {changed: weight}).arm_of(unit).name
    assert was == now or changed in (was, now)


def test_experiments_and_salts_deal_independently_of_one_another():
    base = dealt(deal(a=1, b=1))
    for other in (deal(name="f", a=1, b=1), deal(salt="2", a=1, b=1)):
        same = sum(base[unit] == arm for unit, arm in dealt(other).items())
        assert abs(same - len(UNITS) / 2) < 4 * math.sqrt(len(UNITS) / 4)


def test_an_arm_is_named_after_its_experiment():
    assert arm_label("haiku-for-chat", "b") == "haiku-for-chat:b"


# what is said of them


def singles(requests: int, errors: int, cost_nanousd: int = 0) -> list[Unit]:
    """Units of one request each."""
    return [Unit(1, int(number < errors), cost_nanousd) for number in range(requests)]


@pytest.mark.parametrize(
    ("errors", "requests", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # And by the formula, at the other end and for a single request.
        (20, 20, 0.8389, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_an_error_rate_has_wilsons_interval(errors, requests, low, high):
    rate = error_rate(singles(requests, errors))
    assert (rate.value, rate.low, rate.high) == pytest.approx((errors / requests, low, high), abs=5e-5)


def test_requests_that_fail_together_tell_less_than_as_many_that_fail_alone():
    alone = error_rate(singles(1_000, 100))
    together = error_rate([Unit(10, 10 * (number < 10), 0) for number in range(100)])
    assert together.value == alone.value == 0.1
    # One in ten of 100 independent units, not of 1,000.
    of_units = error_rate(singles(100, 10))
    assert (together.low, together.high) == pytest.approx((of_units.low, of_units.high), rel=0.02)


def test_of_nothing_nothing_is_said():
    assert error_rate([]) is None
    assert cost_per_request([]) is None
    assert differs(None, error_rate(singles(5, 1))) is None


def test_a_single_unit_has_a_cost_and_no_interval():
    assert cost_per_request([Unit(4, 0, 100)]) == Estimate(25.0)
    assert differs(cost_per_request([Unit(4, 0, 100)]), cost_per_request(singles(9, 0, 1))) is None


def test_a_cost_has_the_interval_of_a_mean_where_every_unit_is_one_request():
    costs = [10, 12, 9, 14, 11]
    found = cost_per_request([Unit(1, 0, cost) for cost in costs])
    # mean 11.2, standard error 0.86023, t of four degrees of freedom 2.77645
    assert (found.value, found.low, found.high) == pytest.approx((11.2, 8.8116, 13.5884), abs=0.01)


@pytest.mark.parametrize(
    ("units", "t"), [(2, 12.706), (3, 4.3027), (4, 3.1824), (6, 2.5706), (11, 2.2281), (31, 2.0423), (10_001, 1.9602)]
)
def test_few_units_have_a_wider_interval(units, t):
    of = [Unit(1, 0, 2 * (number % 2)) for number in range(units)]
    found = cost_per_request(of)
    mean = sum(unit.cost_nanousd for unit in of) / units
    error = math.sqrt(sum((unit.cost_nanousd - mean) ** 2 for unit in of) / (units - 1) / units)
    assert (found.high - found.value) / error == pytest.approx(t, rel=0.01)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # Newcombe 1998, table II: 56/70 and 48/80 differ by 0.0524 to 0.3339; 9/10 and 3/10 by 0.1705 to 0.8090.
        ((70, 56), (80, 48), True),
        ((10, 9), (10, 3), True),
        ((10, 5), (10, 3), False),
        ((10, 0), (10, 0), False),
        ((1_000, 10), (1_000, 30), True),
        ((1_000, 10), (1_000, 14), False),
    ],
)
def test_a_difference_is_one_when_its_interval_leaves_out_nothing(one, other, expected):
    assert differs(error_rate(singles(*one)), error_rate(singles(*other))) is expected
    assert differs(error_rate(singles(*other)), error_rate(singles(*one))) is expected


def test_equal_arms_look_different_about_one_time_in_twenty_also_where_conversations_are_alike():
    dice = random.Random(3)

    def arm() -> list[Unit]:
        units = []
        for _ in range(80):
            requests, prone, size = dice.randint(1, 12), dice.random() < 0.15, dice.lognormvariate(0, 1)
            errors = sum(dice.random() < (0.7 if prone else 0.02) for _ in range(requests))
            units.append(Unit(requests, errors, round(requests * size * 1e6)))
        return units

    rounds = 400
    pairs = [(arm(), arm()) for _ in range(rounds)]
    for estimate in (error_rate, cost_per_request):
        alarms = sum(differs(estimate(one), estimate(other)) for one, other in pairs)
        assert 0.01 * rounds < alarms < 0.09 * rounds, (estimate, alarms)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 10**12)), min_size=1, max_size=30))
def test_an_interval_holds_its_value(rows):
    units = [Unit(requests, min(errors, requests), cost) for requests, errors, cost in rows]
    rate, cost = error_rate(units), cost_per_request(units)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert cost.low is None or cost.low <= cost.value <= cost.high
