"""What comes back: families by likeness, records of use, and bounds."""

import random

import pytest

from headgate.policy.prompt_families import FAMILIES_MAX, PREFIXES_MAX, SCOPES_MAX, TAILS_MAX, Families, Uses, sign

WORDS = [f"word{chr(97 + a)}{chr(97 + b)}" for a in range(26) for b in range(26)]


def prompt(seed, sentences=120):
    dice = random.Random(seed)
    return (". ".join(" ".join(dice.choices(WORDS, k=6)) for _ in range(sentences))).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"Now: 2026-11-24T08:00:01Z. " + text,
        lambda text: text + b" The user is 4f1c9a30-77aa-4b02-9a31-0c7d12e0aa01.",
        lambda text: b". ".join(reversed(text.split(b". "))),
        lambda text: text.replace(b". ", b".\\n", 60),
    ],
    ids=["time", "uuid", "order", "lines"],
)
def test_a_prompt_with_something_changed_is_of_the_same_family(change):
    scope = Families().scope("k", "e")
    text = prompt(1)
    assert scope.family_of(sign(b"", text)) is scope.family_of(sign(b"", change(text)))


def test_other_prompts_are_other_families_and_the_oldest_goes():
    scope = Families().scope("k", "e")
    names = {scope.family_of(sign(b"", prompt(seed))).id for seed in range(20)}
    assert len(names) == 20
    assert len(scope.families) == FAMILIES_MAX


def test_a_name_is_that_of_key_endpoint_and_prompt():
    signature = sign(b"", prompt(1))
    names = [Families().scope(*who).family_of(signature).id for who in (("k", "e"), ("k", "e"), ("k", "f"), ("l", "e"))]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_reads_for_a_write_are_counted_by_the_ttl():
    uses = Uses()
    for gap_s in (float("inf"), 10, 10, 600, 600, 600, 9_000):
        uses.add(gap_s)
    assert uses.reads_per_write("5m", prior=0) == pytest.approx(2 / 5)
    assert uses.reads_per_write("1h", prior=0) == pytest.approx(5 / 2)
    for _ in range(1_000):
        uses.add(1)
    assert uses.total <= 65


def test_turns_that_go_on_are_known_by_what_they_begin_with():
    families = Families()
    scope = families.scope("k", "e")
    families.turn(scope, b"", b"a", 0)
    families.turn(scope, b"a", b"b", 10)
    families.turn(scope, b"b", b"c", 400)
    assert scope.first_turns.share(prior=0) == 1
    assert (scope.turns.count, scope.turns.went_on) == (2, 0), "six minutes later is not in time"


def test_memory_is_bounded():
    families = Families()
    for at in range(SCOPES_MAX + 10):
        families.scope(str(at), "e")
    scope = families.scope("k", "e")
    family = scope.family_of(frozenset())
    for at in range(max(PREFIXES_MAX, TAILS_MAX) + 10):
        families.touch(scope, "m", b"%d" % at, family)
        families.turn(scope, b"", b"%d" % at, 0)
    assert (len(families._scopes), len(families._prefixes)) == (SCOPES_MAX, PREFIXES_MAX)
    assert len(families._tails) == TAILS_MAX
