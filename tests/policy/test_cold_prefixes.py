"""One writer on a cold prefix: who goes ahead, who waits, and that nobody waits for ever."""

from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.cold_prefixes import FOREVER, ColdPrefixes

KEY = b"sonnet/prefix"


def test_the_first_goes_ahead_and_the_others_wait_for_its_answer() -> None:
    cold = ColdPrefixes(2.0)
    assert cold.join(KEY, "a", 0.0)
    assert not cold.join(KEY, "b", 0.1)
    assert not cold.join(KEY, "c", 0.2)
    assert cold.until(KEY, "b") == FOREVER
    assert cold.sent(KEY, "a", 5.0) == ["b", "c"]
    assert cold.until(KEY, "b") == 7.0
    assert cold.began(KEY) == ["b", "c"]
    assert cold.until(KEY, "b") is None
    assert len(cold) == 0


def test_who_comes_after_the_writer_was_sent_has_the_whole_wait() -> None:
    cold = ColdPrefixes(2.0)
    cold.join(KEY, "a", 0.0)
    cold.sent(KEY, "a", 0.0)
    cold.join(KEY, "b", 1.5)
    assert cold.until(KEY, "b") == 3.5


def test_a_writer_that_fails_is_followed_by_one_and_not_by_all() -> None:
    cold = ColdPrefixes(2.0)
    for ticket in "abc":
        cold.join(KEY, ticket, 0.0)
    cold.sent(KEY, "a", 0.0)
    assert cold.left(KEY, "a") == ["b"]
    assert cold.until(KEY, "b") is None
    assert cold.join(KEY, "b", 1.0), "it is the writer now"
    assert cold.until(KEY, "c") == FOREVER, "b has not been sent"
    assert cold.left(KEY, "b") == ["c"]
    assert cold.left(KEY, "c") == []
    assert len(cold) == 0


def test_who_leaves_the_wait_is_not_woken() -> None:
    cold = ColdPrefixes(2.0)
    for ticket in "abc":
        cold.join(KEY, ticket, 0.0)
    assert cold.left(KEY, "b") == []
    assert cold.left(KEY, "a") == ["c"]


def test_prefixes_do_not_wait_for_one_another() -> None:
    cold = ColdPrefixes(2.0)
    assert cold.join(b"one", "a", 0.0)
    assert cold.join(b"two", "b", 0.0)
    assert cold.began(b"none") == cold.left(b"none", "a") == cold.sent(b"one", "b", 0.0) == []


@given(st.lists(st.tuples(st.sampled_from(["join", "sent", "began", "left"]), st.integers(0, 4)), max_size=60))
def test_there_is_one_writer_and_everybody_gets_on(moves: list[tuple[str, int]]) -> None:
    """Whoever waits is woken by the writer's beginning or end, or becomes the writer; nothing is left behind."""
    cold = ColdPrefixes(2.0)
    waiting: list[str] = []
    writer = ""
    for move, number in moves:
        ticket = str(number)
        match move:
            case "join":
                ahead = cold.join(KEY, ticket, 0.0)
                assert ahead == (writer in ("", ticket))
                if ahead:
                    writer = ticket
                elif ticket not in waiting:
                    waiting.append(ticket)
            case "sent":
                assert cold.sent(KEY, ticket, 1.0) == (waiting if writer == ticket else [])
            case "began":
                assert cold.began(KEY) == waiting
                waiting, writer = [], ""
            case "left":
                heirs = cold.left(KEY, ticket)
                if ticket == writer:
                    assert heirs == waiting[:1]
                    writer = waiting.pop(0) if waiting else ""
                else:
                    assert heirs == []
                    waiting = [one for one in waiting if one != ticket]
        assert [one for one in map(str, range(5)) if cold.until(KEY, one) is not None] == sorted(waiting)
        assert len(cold) == (writer != "")
