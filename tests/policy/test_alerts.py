"""Laws of the book of alerts: one message for one cause, until it ends or a day is over."""

from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.alerts import OPEN_MAX, TOLD_AGAIN_AFTER_NS, Alert, AlertBook

SECOND_NS = 10**9


def alert(subject: str = "user:an", kind: str = "spend_velocity", at_ns: int = 0) -> Alert:
    return Alert(kind, subject, "what happened, and how to mend it", at_ns)


def test_ten_thousand_breaches_are_one_message():
    book = AlertBook()
    told = [book.raised(alert(at_ns=each * SECOND_NS)) for each in range(10_000)]
    assert [each is not None for each in told].count(True) == 1
    assert book.repeats("spend_velocity", "user:an") == 9_999


def test_each_kind_and_each_subject_is_a_cause_of_its_own():
    book = AlertBook()
    told = [alert(), alert("user:binh"), alert(kind="loop"), alert()]
    assert [book.raised(each) is not None for each in told] == [True, True, True, False]


def test_what_has_ended_is_told_again():
    book = AlertBook()
    book.raised(alert())
    assert book.is_open("spend_velocity", "user:an")
    assert book.ended("spend_velocity", "user:an")
    assert not book.ended("spend_velocity", "user:an")
    assert not book.is_open("spend_velocity", "user:an")
    assert book.raised(alert()) == alert()


def test_what_goes_on_is_told_again_after_a_day_with_how_often_it_was_met():
    book = AlertBook()
    book.raised(alert())
    for _ in range(3):
        assert book.raised(alert(at_ns=TOLD_AGAIN_AFTER_NS - 1)) is None
    again = book.raised(alert(at_ns=TOLD_AGAIN_AFTER_NS))
    assert again is not None
    assert again.repeats == 3
    assert book.raised(alert(at_ns=TOLD_AGAIN_AFTER_NS + 1)) is None


def test_memory_is_bounded_and_the_one_told_longest_ago_may_be_told_again():
    book = AlertBook()
    book.raised(alert("first"))
    for number in range(OPEN_MAX):
        book.raised(alert(f"user:{number}"))
        assert len(book) <= OPEN_MAX
    assert book.raised(alert("user:0")) is None
    assert book.raised(alert("first")) is not None


def test_what_was_told_again_was_told_last():
    book = AlertBook(open_max=2)
    for at_ns, subject in ((0, "a"), (1, "b"), (TOLD_AGAIN_AFTER_NS, "a"), (TOLD_AGAIN_AFTER_NS, "c")):
        assert book.raised(alert(subject, at_ns=at_ns)) is not None
    assert [book.is_open("spend_velocity", each) for each in "abc"] == [True, False, True]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["raise", "end"]), st.integers(0, 30)), max_size=60))
def test_between_two_messages_of_a_cause_lies_an_end_or_a_day(steps):
    book, now_ns = AlertBook(), 0
    told_ns: dict[str, int | None] = {"a": None, "b": None}
    for subject, what, hours in steps:
        now_ns += hours * 3600 * SECOND_NS
        before = told_ns[subject]
        if what == "end":
            assert book.ended("spend_velocity", subject) is (before is not None)
            told_ns[subject] = None
            continue
        is_due = before is None or now_ns - before >= TOLD_AGAIN_AFTER_NS
        assert (book.raised(alert(subject, at_ns=now_ns)) is not None) is is_due
        if is_due:
            told_ns[subject] = now_ns
