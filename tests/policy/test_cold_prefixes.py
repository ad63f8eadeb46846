"""One writer on a cold prefix: who goes ahead, who waits, and that nobody waits for ever."""

from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.cold_prefixes import ColdPrefixes

KEY = b"sonnet/prefix"


def test_the_first_goes_ahead_and_the_others_wait_for_its_answer() -> None:
    cold = ColdPrefixes(2.0)
    assert cold.join(KEY, "a", 0.0)
    assert not cold.join(KEY, "b", 0.1)
    assert not cold.join(KEY, "c", 0.2)
    assert cold.until(KEY, "b", 0.2) == 2.1
    assert cold.sent(KEY, "a", 1.5) == ["b", "c"]
    assert cold.until(KEY, "b", 1.5) == 3.5
    assert cold.began(KEY) == ["b", "c"]
    assert cold.until(KEY, "b", 1.6) is None
    assert len(cold) == 0


def test_who_comes_after_the_writer_was_sent_has_the_whole_wait() -> None:
    cold = ColdPrefixes(2.0)
    cold.join(KEY, "a", 0.0)
    cold.sent(KEY, "a", 0.0)
    cold.join(KEY, "b", 1.5)
    assert cold.until(KEY, "b", 1.5) == 3.5
    assert cold.until(KEY, "b", 3.5) is None, "it goes on, and the others still wait for a"
    assert not cold.join(KEY, "c", 3.6)


def test_a_writer_without_a_turn_is_replaced_by_one_after_another() -> None:
    """It may be held by a limit of its own person, and so may the next."""
    cold = ColdPrefixes(2.0)
    for ticket in "abcd":
        cold.join(KEY, ticket, 0.0)
    assert cold.until(KEY, "b", 1.9) == 2.0
    assert cold.until(KEY, "b", 2.0) is None, "b writes"
    assert cold.until(KEY, "c", 2.0) == cold.until(KEY, "d", 2.0) == 2.5
    assert cold.sent(KEY, "a", 2.1) == [], "a is one among others now"
    assert cold.left(KEY, "a", 2.1) == []
    assert cold.until(KEY, "d", 2.5) is None
    assert cold.until(KEY, "c", 2.5) == 3.0
    assert cold.sent(KEY, "d", 2.6) == ["c"]
    assert cold.until(KEY, "c", 2.6) == 4.6
    assert cold.began(KEY) == ["c"]
    assert len(cold) == 0


def test_a_writer_that_fails_is_followed_by_one_and_not_by_all() -> None:
    cold = ColdPrefixes(2.0)
    for ticket in "abc":
        cold.join(KEY, ticket, 0.0)
    cold.sent(KEY, "a", 0.0)
    assert cold.left(KEY, "a", 1.0) == ["b"]
    assert cold.until(KEY, "b", 1.0) is None
    assert cold.join(KEY, "b", 1.0), "it is the writer now"
    assert cold.left(KEY, "b", 1.0) == ["c"]
    assert cold.left(KEY, "c", 1.0) == []
    assert len(cold) == 0


def test_a_prefix_is_on_its_way_once_another_call_was_sent_to_write_it() -> None:
    cold = ColdPrefixes(2.0)
    cold.join(KEY, "a", 0.0)
    cold.join(KEY, "b", 0.0)
    assert not cold.on_its_way(KEY, "b")
    cold.sent(KEY, "a", 0.1)
    assert cold.on_its_way(KEY, "b")
    assert not cold.on_its_way(KEY, "a"), "it writes itself"
    cold.began(KEY)
    assert not cold.on_its_way(KEY, "b"), "what is in the cache is known otherwise"


def test_three_writers_that_fail_are_enough() -> None:
    """Two hundred bad requests behind one prompt would otherwise be refused one after another."""
    cold = ColdPrefixes(2.0)
    for ticket in "abcdef":
        cold.join(KEY, ticket, 0.0)
    assert cold.left(KEY, "a", 0.1) == ["b"], "it was never sent: its client left"
    cold.sent(KEY, "b", 0.2)
    assert cold.left(KEY, "b", 0.3) == ["c"]
    cold.sent(KEY, "c", 0.4)
    assert cold.left(KEY, "c", 0.5) == ["d"]
    cold.sent(KEY, "d", 0.6)
    assert cold.left(KEY, "d", 0.7) == ["e", "f"]
    assert cold.until(KEY, "f", 0.7) is None
    assert len(cold) == 0
    assert cold.join(KEY, "g", 0.8), "who comes now begins anew"


def test_who_leaves_the_wait_is_not_woken() -> None:
    cold = ColdPrefixes(2.0)
    for ticket in "abc":
        cold.join(KEY, ticket, 0.0)
    assert cold.left(KEY, "b", 0.0) == []
    assert cold.left(KEY, "a", 0.0) == ["c"]


def test_prefixes_do_not_wait_for_one_another() -> None:
    cold = ColdPrefixes(2.0)
    assert cold.join(b"one", "a", 0.0)
    assert cold.join(b"two", "b", 0.0)
    assert cold.began(b"none") == cold.left(b"none", "a", 0.0) == cold.sent(b"one", "b", 0.0) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(["join", "sent", "began", "left", "look"]), st.integers(0, 4), st.floats(0, 3)),
        max_size=60,
    )
)
def test_there_is_one_writer_and_everybody_gets_on(moves: list[tuple[str, int, float]]) -> None:
    """Whoever waits is woken by the writer's beginning or end, or becomes the writer; nothing is left behind."""
    cold = ColdPrefixes(2.0)
    waiting: dict[str, float] = {}
    writer, failed, now = "", 0, 0.0
    sent_at: float | None = None
    for move, number, passes in moves:
        ticket, now = str(number), now + passes
        match move:
            case "join":
                ahead = cold.join(KEY, ticket, now)
                assert ahead == (writer in ("", ticket))
                if ahead:
                    writer = ticket
                else:
                    waiting.setdefault(ticket, now)
            case "sent":
                assert cold.sent(KEY, ticket, now) == (list(waiting) if writer == ticket else [])
                sent_at = now if writer == ticket else sent_at
            case "began":
                assert cold.began(KEY) == list(waiting)
                waiting, writer, sent_at, failed = {}, "", None, 0
            case "left":
                heirs = cold.left(KEY, ticket, now)
                if ticket == writer:
                    failed += sent_at is not None
                    assert heirs == (list(waiting) if failed == 3 else list(waiting)[:1])
                    waiting = {} if failed == 3 else {one: at for one, at in waiting.items() if one not in heirs}
                    writer, sent_at = heirs[0] if heirs and failed < 3 else "", None
                    failed = failed if writer else 0
                else:
                    assert heirs == []
                    waiting.pop(ticket, None)
            case "look":
                until = cold.until(KEY, ticket, now)
                if ticket not in waiting:
                    assert until is None
                elif until is None:
                    assert now >= waiting.pop(ticket) + 2.0
                    if sent_at is None:
                        writer = ticket
                    else:
                        assert now >= sent_at + 2.0
                else:
                    # However long the others take, the end of this one's own wait is in sight.
                    assert now < until <= max(now, waiting[ticket]) + 2.0
        assert len(cold) == (writer != "")
    for ticket in (writer, *waiting):
        cold.left(KEY, ticket, now)
    for ticket in waiting:
        cold.left(KEY, ticket, now)
    assert len(cold) == 0
