"""Laws of the fold: any batching and any replay make the same rows, and a call is closed once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.policy.records import (
    AttemptEnded,
    AttemptIntent,
    AttemptProgress,
    AttemptStarted,
    CallClosed,
    CallOpened,
    LedgerEvent,
)
from headgate.storage.fold import PROCESS_LOST, Fold, call_from_columns, ending_of_orphan
from headgate.storage.tables import attempts, calls
from headgate.wire.usage import Usage

WRITER = "1785000000000000000-7"
MODELS = st.sampled_from(["claude-sonnet-4-6", "claude-haiku-4-5"])
COUNTS = st.integers(0, 10_000)
USAGES = st.builds(Usage, input_tokens=st.integers(1, 9_999), cache_read_tokens=COUNTS, output_tokens=COUNTS)


class Database:
    """The two tables, as dictionaries that keep `LedgerTables`' rule for a row there is; a Fold in front of them."""

    def __init__(self):
        self.calls = {}
        self.attempts = {}
        self.writes = 0
        self.fold = Fold(self.find)

    def find(self, call_id):
        if call_id not in self.calls:
            return None
        return call_from_columns(self.call(call_id), [self.attempt(*key) for key in self.attempts if key[0] == call_id])

    def apply(self, events):
        self.fold.apply(events, WRITER)
        call_rows, attempt_rows = self.fold.changed()
        for row in call_rows:
            if row[0] not in self.calls or self.call(row[0])["state"] == "open":
                self.calls[row[0]] = row
        for row in attempt_rows:
            if row[:2] not in self.attempts or self.attempt(*row[:2])["state"] == "open":
                self.attempts[row[:2]] = row
        self.writes += len(call_rows) + len(attempt_rows)
        self.fold.committed()

    def call(self, call_id):
        return dict(zip(calls.columns.keys(), self.calls[call_id], strict=True))

    def attempt(self, call_id, number=1):
        return dict(zip(attempts.columns.keys(), self.attempts[call_id, number], strict=True))


def told(*events):
    database = Database()
    database.apply(events)
    return database


@st.composite
def histories(draw):
    """The events of one call, up to any point of it."""
    call_id = f"call_{draw(st.integers(0, 10**6)):024d}"
    events: list[LedgerEvent] = [
        CallOpened(call_id, draw(COUNTS), "key00001", "an", "free", "chat", draw(MODELS), draw(st.booleans()))
    ]
    for number in range(1, draw(st.integers(1, 3)) + 1):
        events.append(AttemptIntent(call_id, number, draw(MODELS), draw(COUNTS), 1_000, 500))
        if draw(st.booleans()):
            events.append(AttemptStarted(call_id, number, f"req_{number}", draw(USAGES)))
            events += [AttemptProgress(call_id, number, tokens) for tokens in draw(st.lists(COUNTS, max_size=3))]
        state = draw(st.sampled_from(["settled", "estimated", "void"]))
        events.append(AttemptEnded(call_id, number, state, 200, draw(USAGES), "row", draw(COUNTS), draw(COUNTS)))
    events.append(CallClosed(call_id, "completed", 200, "claude-sonnet-4-6", draw(COUNTS)))
    return events[: draw(st.integers(1, len(events)))]


@st.composite
def journals(draw):
    """Several calls, their events in any interleaving that keeps the order of each."""
    waiting = draw(st.lists(histories(), min_size=1, max_size=5, unique_by=lambda events: events[0].call_id))
    journal = []
    while any(waiting):
        history = draw(st.sampled_from([events for events in waiting if events]))
        journal.append(history.pop(0))
    return journal


@given(journals(), st.lists(st.integers(1, 7), min_size=1))
def test_any_batching_makes_the_same_rows(journal, sizes):
    whole, batched = told(*journal), Database()
    rest, turn = journal, 0
    while rest:
        size = sizes[turn % len(sizes)]
        batched.apply(rest[:size])
        rest, turn = rest[size:], turn + 1
    assert batched.calls == whole.calls
    assert batched.attempts == whole.attempts
    assert batched.fold.open.keys() == whole.fold.open.keys()


@given(journals(), st.data())
def test_a_replay_from_any_point_makes_the_same_rows(journal, data):
    database = told(*journal)
    once = dict(database.calls), dict(database.attempts)
    database.apply(journal[data.draw(st.integers(0, len(journal))) :])
    assert (database.calls, database.attempts) == once
    assert database.fold.contradictions == 0


@given(journals())
def test_cost_and_saving_of_a_call_are_the_sums_over_its_attempts(journal):
    database = told(*journal)
    ended = [event for event in journal if isinstance(event, AttemptEnded)]
    for call_id in database.calls:
        of_it = [event for event in ended if event.call_id == call_id]
        assert database.call(call_id)["cost_nanousd"] == sum(event.cost_nanousd for event in of_it)
        assert database.call(call_id)["saved_nanousd"] == sum(event.saved_nanousd for event in of_it)


@given(journals())
def test_a_call_is_open_until_it_and_all_its_attempts_have_ended(journal):
    database = told(*journal)
    for call_id in database.calls:
        events = [event for event in journal if event.call_id == call_id]
        begun = {event.number for event in events if isinstance(event, AttemptIntent)}
        ended = {event.number for event in events if isinstance(event, AttemptEnded)}
        complete = begun == ended and isinstance(events[-1], CallClosed)
        assert (database.call(call_id)["state"] != "open") is complete
        assert (call_id in database.fold.open) is not complete


@given(journals())
def test_an_orphan_is_closed_by_one_ending_for_each_open_attempt_and_one_for_the_call(journal):
    database = told(*journal)
    for call in list(database.fold.open.values()):
        database.apply(ending_of_orphan(call, lambda usage, model, at_ns: (usage.input_tokens, 0, "row")))
    assert not database.fold.open
    assert all(database.call(call_id)["state"] != "open" for call_id in database.calls)
    assert all(row[3] != "open" for row in database.attempts.values())
    assert database.fold.contradictions == 0


def test_a_call_that_opens_and_ends_in_one_batch_is_written_once(call):
    database = told(*call(1).opening(), call(1).started(), call(1).progress(5), *call(1).ending())
    assert database.writes == 2


def test_tokens_of_a_call_are_those_of_the_attempt_that_served(call):
    database = told(*call(1).opening(), call(1).failed(1), call(1).intent(2), call(1).ended(2), call(1).closed())
    row = database.call(call(1).id)
    assert (row["input_tokens"], row["cache_read_tokens"], row["output_tokens"]) == (700, 50, 90)
    assert (row["state"], row["outcome"], row["cost_nanousd"]) == ("settled", "completed", 12_345)
    assert database.attempt(call(1).id, 1)["state"] == "void"


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["void", "void"], "void"),
        (["void", "settled"], "settled"),
        (["settled", "void"], "settled"),
        (["settled", "estimated"], "estimated"),
        (["estimated", "settled"], "estimated"),
        (["estimated", "void"], "estimated"),
    ],
)
def test_a_call_is_estimated_when_any_part_of_its_bill_is(call, states, expected):
    endings = [AttemptEnded(call(1).id, at, state, 200, Usage(), "", 0) for at, state in enumerate(states, start=1)]
    database = told(*call(1).opening(), call(1).intent(2), *endings, call(1).closed())
    assert database.call(call(1).id)["state"] == expected


def test_a_second_ending_changes_nothing_and_is_counted(call):
    database = told(*call(1).opening(), *call(1).ending())
    database.apply((AttemptEnded(call(1).id, 1, "estimated", 0, Usage(), "row-9", 99),))
    database.apply((CallClosed(call(1).id, "failed", 500, "", 1),))
    assert database.call(call(1).id)["cost_nanousd"] == 12_345
    assert database.call(call(1).id)["outcome"] == "completed"
    assert database.fold.contradictions == 2


def test_the_answer_read_on_after_the_client_left_is_settled_after_the_call_closed(call):
    database = told(*call(1).opening(), call(1).closed())
    assert database.call(call(1).id)["state"] == "open"
    database.apply((call(1).ended(),))
    assert database.call(call(1).id)["state"] == "settled"
    assert database.call(call(1).id)["cost_nanousd"] == 12_345


def test_a_call_whose_opening_line_was_lost_still_costs_what_it_cost(call):
    database = told(*call(1).ending())
    row = database.call(call(1).id)
    assert (row["cost_nanousd"], row["user_id"], row["at_ns"]) == (12_345, "", 1_785_000_000_000_000_000)


def test_a_refused_call_has_no_attempt_and_costs_nothing(call):
    database = told(call(1).opening()[0], CallClosed(call(1).id, "refused", 429, "", 0, error_code="user_rpm_exceeded"))
    row = database.call(call(1).id)
    assert (row["state"], row["outcome"], row["cost_nanousd"], row["input_tokens"]) == ("void", "refused", 0, 0)
    assert not database.attempts


def test_an_orphan_that_had_not_started_is_billed_its_estimate(call, price):
    database = told(*call(1).opening())
    ended, closed = ending_of_orphan(database.fold.open[call(1).id], price)
    assert (ended.state, ended.cost_nanousd, ended.usage) == ("estimated", 1_000, Usage(input_tokens=1_000))
    assert (ended.error_code, closed.outcome, closed.error_code) == (PROCESS_LOST, "failed", PROCESS_LOST)


def test_an_orphan_that_had_started_is_billed_its_exact_input_and_the_output_seen(call, price):
    database = told(*call(1).opening(), call(1).started(input_tokens=700), call(1).progress(40), call(1).progress(30))
    ended, closed = ending_of_orphan(database.fold.open[call(1).id], price)
    assert (ended.state, ended.cost_nanousd, ended.price_id) == ("estimated", 700 + 400, "test-row")
    assert closed.outcome == "cut"


def test_an_orphan_whose_attempt_had_ended_keeps_that_ending(call, price):
    database = told(*call(1).opening(), call(1).ended())
    (closed,) = ending_of_orphan(database.fold.open[call(1).id], price)
    assert (closed.outcome, closed.status, closed.error_code) == ("completed", 200, "")
