"""Budgets: no cap is passed by a reservation, nothing is paid twice or never, and the ledger has the last word."""

import itertools
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.policy.budgets import (
    LATELY_S,
    NANOUSD_MAX,
    Account,
    AlertLine,
    Budgets,
    Corrections,
    Cut,
    MoneyAsk,
    OpenAttempt,
    Spent,
    ask_id,
    corrections,
    periods,
    window_id,
)

NOON_NS = int(datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()) * 10**9
DAY_NS = 86_400 * 10**9
AT = periods(NOON_NS)
AN = Account("user:an", day_nanousd=100)
ALL = Account("all", day_nanousd=150, month_nanousd=1_000)


def ask(name: str, upper: int, *accounts: Account, at_ns: int = NOON_NS, lease_s: float = 30.0) -> MoneyAsk:
    return MoneyAsk(name, accounts or (AN, ALL), upper, at_ns, lease_s)


def use(budgets: Budgets, account: str, window: str = "day", at_ns: int = NOON_NS) -> tuple[int, int]:
    (one,) = (one for one in budgets.uses([account], at_ns) if one.window == window)
    return one.spent_nanousd, one.reserved_nanousd


def test_a_reservation_takes_from_every_window_or_from_none():
    budgets = Budgets()
    assert budgets.reserve(ask("a", 60), 0.0).admitted
    refused = budgets.reserve(ask("b", 60), 0.0)
    assert (refused.admitted, refused.account, refused.window) == (False, "user:an", "day")
    assert (refused.cap_nanousd, refused.spent_nanousd, refused.reserved_nanousd) == (100, 0, 60)
    assert refused.affordable_nanousd == 40
    assert refused.resets_at_ns == int(datetime(2026, 11, 25, tzinfo=UTC).timestamp()) * 10**9
    assert [use(budgets, "all", window) for window in ("day", "month")] == [(0, 60), (0, 60)]
    assert budgets.reserve(ask("b", 40), 0.0).affordable_nanousd == 0
    assert len(budgets) == 2


def test_of_two_windows_that_are_equally_near_the_longer_one_is_named():
    budgets = Budgets()
    refused = budgets.reserve(ask("a", 11, Account("key:1", 10, 10)), 0.0)
    assert (refused.window, refused.resets_at_ns) == ("month", AT.month_resets_ns)


def test_who_has_no_cap_costs_nothing():
    budgets = Budgets()
    verdict = budgets.reserve(ask("a", 10**9, Account("user:an")), 0.0)
    assert (verdict.admitted, verdict.account, verdict.affordable_nanousd) == (True, "", NANOUSD_MAX)
    assert (budgets.remembered, budgets.cut(NOON_NS)) == (0, Cut(NOON_NS, {}))
    assert budgets.spend("a", 10**10)
    budgets.settle("a", 10**10, 0.0)
    budgets.owe(ask("a", 1, Account("user:an")), 5, live=False, now=0.0)
    assert budgets.remembered == 0


def test_a_settlement_books_what_it_cost_also_beyond_its_reservation_and_twice_is_once():
    budgets = Budgets()
    budgets.reserve(ask("a", 60), 0.0)
    budgets.settle("a", 120, 1.0)
    budgets.settle("a", 1, 1.0)
    assert use(budgets, "user:an") == (120, 0)
    assert budgets.reserve(ask("b", 0), 1.0).affordable_nanousd == 0
    assert not budgets.reserve(ask("b", 0), 1.0).admitted


def test_a_stream_that_costs_more_than_its_bound_takes_what_there_is_and_then_is_cut():
    budgets = Budgets()
    budgets.reserve(ask("a", 60), 0.0)
    assert budgets.spend("a", 60)
    assert budgets.spend("a", 90)
    assert use(budgets, "user:an") == (0, 90)
    assert not budgets.spend("a", 101)
    assert use(budgets, "user:an") == (0, 90)
    budgets.settle("a", 101, 1.0)
    assert budgets.spend("a", 200), "it is over: nothing is to be cut"
    assert use(budgets, "user:an") == (101, 0)


def test_a_lost_attempt_is_booked_at_its_bound_until_the_ledger_says_what_it_cost():
    budgets = Budgets()
    budgets.reserve(ask("a", 60), 0.0)
    assert budgets.expire(29.0) == 0
    assert budgets.expire(30.0) == 1
    assert (use(budgets, "user:an"), len(budgets), budgets.uncertain) == ((60, 0), 0, 1)
    read(budgets, ended={"a": 25})
    assert (use(budgets, "user:an"), budgets.uncertain, budgets.remembered) == ((25, 0), 0, 0)


def test_a_lost_attempt_that_the_ledger_does_not_know_never_left():
    budgets = Budgets()
    budgets.reserve(ask("a", 60), 0.0)
    budgets.expire(30.0)
    read(budgets)
    assert (use(budgets, "user:an"), budgets.remembered) == ((0, 0), 0)


def test_a_lost_attempt_that_the_ledger_has_open_keeps_its_bound():
    budgets = Budgets()
    budgets.reserve(ask("a", 60), 0.0)
    budgets.expire(30.0)
    read(budgets, opened={"a": 30})
    assert (use(budgets, "user:an"), budgets.uncertain) == ((60, 0), 1)


def test_a_process_that_only_slept_takes_its_reservation_up_again_or_settles_it():
    budgets = Budgets()
    for name in ("slept", "ended"):
        budgets.reserve(ask(name, 40), 0.0)
    budgets.expire(40.0)
    budgets.renew("slept", lease_s=30.0, now=41.0)
    budgets.settle("ended", 10, 41.0)
    assert (use(budgets, "user:an"), budgets.uncertain) == ((10, 40), 0)
    assert budgets.expire(60.0) == 0
    budgets.settle("slept", 5, 62.0)
    assert use(budgets, "user:an") == (15, 0)


def test_what_was_settled_is_forgotten_when_the_ledger_has_it_for_long():
    budgets = Budgets()
    budgets.reserve(ask("a", 40), 0.0)
    budgets.settle("a", 10, 5.0)
    assert budgets.reserve(ask("a", 1), 5.0).admitted is False, "an id is for one attempt"
    budgets.expire(5.0 + LATELY_S)
    assert (budgets.remembered, use(budgets, "user:an")) == (0, (10, 0))


@pytest.mark.parametrize("amount", [-1, NANOUSD_MAX + 1, 1.0, True, 1 << 70])
def test_what_no_amount_can_be_is_refused(amount):
    budgets = Budgets()
    budgets.reserve(ask("a", 1), 0.0)
    for wrong in (
        lambda: budgets.reserve(ask("b", amount), 0.0),
        lambda: budgets.reserve(ask("b", 1, Account("all", amount)), 0.0),
        lambda: budgets.reserve(ask("b", 1, Account("all", None, amount)), 0.0),
        lambda: budgets.spend("a", amount),
        lambda: budgets.settle("a", amount, 0.0),
        lambda: budgets.owe(ask("c", 1), amount, live=True, now=0.0),
    ):
        with pytest.raises(ValueError, match="an amount is an integer of 0 to"):
            wrong()
    assert use(budgets, "user:an") == (0, 1)


# Days and months


def test_a_reservation_belongs_to_the_day_and_month_it_was_made_in():
    budgets = Budgets()
    late_ns = int(datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC).timestamp()) * 10**9
    early_ns = late_ns + 2 * 10**9
    budgets.reserve(ask("late", 90, at_ns=late_ns), 0.0)
    assert not budgets.reserve(ask("x", 20, at_ns=late_ns), 0.0).admitted
    assert budgets.reserve(ask("early", 90, at_ns=early_ns), 2.0).admitted
    budgets.settle("late", 80, 3.0)
    assert (use(budgets, "user:an", at_ns=late_ns), use(budgets, "user:an", at_ns=early_ns)) == ((80, 0), (0, 90))
    assert [use(budgets, "all", "month", at_ns) for at_ns in (late_ns, early_ns)] == [(80, 0), (0, 90)]


def test_past_days_and_months_are_forgotten_but_not_what_is_reserved_in_them():
    budgets = Budgets()
    budgets.reserve(ask("a", 10), 0.0)
    budgets.reserve(ask("b", 10, at_ns=NOON_NS + 70 * DAY_NS), 1.0)
    budgets.expire(1.0)
    assert use(budgets, "all", "month") == (0, 10)
    budgets.settle("a", 7, 1.0)
    budgets.expire(2.0)
    assert [use(budgets, "all", window) for window in ("day", "month")] == [(0, 0), (0, 0)]
    assert use(budgets, "all", at_ns=NOON_NS + 70 * DAY_NS) == (0, 10)


@pytest.mark.parametrize(
    ("moment", "month", "resets"),
    [
        ((2026, 12, 31, 23), "m2026-12", (2027, 1, 1)),
        ((2028, 2, 29), "m2028-02", (2028, 3, 1)),
        ((2026, 11, 1), "m2026-11", (2026, 12, 1)),
    ],
)
def test_months_are_those_of_the_calendar(moment, month, resets):
    found = periods(int(datetime(*moment, tzinfo=UTC).timestamp()) * 10**9)
    assert found.month == month
    assert found.month_resets_ns == int(datetime(*resets, tzinfo=UTC).timestamp()) * 10**9
    assert found.month_ns <= found.day_ns < found.day_resets_ns <= found.month_resets_ns


# The ledger


def read(budgets: Budgets, *, ended: dict[str, int] | None = None, opened: dict[str, int] | None = None) -> Corrections:
    """A reading of a ledger that knows these attempts, all of them from today."""
    ended, opened = ended or {}, opened or {}
    windows = tuple(window_id(p, a) for a in ("user:an", "all") for p in (AT.day, AT.month))
    sums = dict.fromkeys(windows, sum(ended.values())) if ended else {}
    cut = budgets.cut(NOON_NS)
    found = corrections(
        cut,
        Spent(
            NOON_NS,
            sums,
            tuple(OpenAttempt(name, amount, windows) for name, amount in opened.items()),
            {name: cost for name, cost in ended.items() if name in {one.id for one in cut.held}},
        ),
    )
    budgets.correct(found)
    return found


def test_after_a_restart_what_the_ledger_says_is_spent_is_spent_and_open_calls_count_at_their_bound():
    budgets = Budgets()
    read(budgets, ended={"x": 70}, opened={"y": 20})
    assert (use(budgets, "user:an"), use(budgets, "all", "month")) == ((90, 0), (90, 0))
    assert not budgets.reserve(ask("a", 11), 0.0).admitted
    read(budgets, ended={"x": 70, "y": 5})
    assert budgets.reserve(ask("a", 25), 0.0).admitted


def test_what_is_settled_and_not_folded_yet_counts_once_before_and_after_it_is():
    budgets = Budgets()
    budgets.reserve(ask("a", 40), 0.0)
    budgets.settle("a", 30, 1.0)
    for ledger in ({"opened": {"a": 35}}, {}, {"ended": {"a": 30}}):
        read(budgets, **ledger)
        assert use(budgets, "user:an") == (30, 0)


def test_what_is_reserved_and_ended_in_the_ledger_is_booked_by_its_settlement_alone():
    budgets = Budgets()
    budgets.reserve(ask("a", 40), 0.0)
    read(budgets, ended={"a": 30})
    assert use(budgets, "user:an") == (0, 40)
    budgets.settle("a", 30, 1.0)
    read(budgets, ended={"a": 30})
    assert use(budgets, "user:an") == (30, 0)


def test_a_corrected_row_is_believed_by_the_next_reading():
    budgets = Budgets()
    budgets.reserve(ask("a", 40), 0.0)
    budgets.settle("a", 30, 1.0)
    budgets.expire(60.0)
    read(budgets, ended={"a": 22})
    assert use(budgets, "user:an") == (22, 0)


def test_what_happens_while_the_ledger_is_read_is_not_undone():
    budgets = Budgets()
    for name in ("ends", "lost"):
        budgets.reserve(ask(name, 20), 0.0)
    cut = budgets.cut(NOON_NS)
    budgets.settle("ends", 15, 1.0)
    budgets.reserve(ask("new", 20), 1.0)
    budgets.settle("new", 12, 2.0)
    budgets.expire(30.0)
    windows = {window_id(p, a): 15 + 50 for a in ("user:an", "all") for p in (AT.day, AT.month)}
    budgets.correct(corrections(cut, Spent(NOON_NS, windows, (), {"ends": 15})))
    assert use(budgets, "user:an") == (50 + 15 + 12 + 20, 0)


def test_what_was_reserved_while_the_ledger_was_read_is_not_taken_for_a_lost_one():
    budgets = Budgets()
    cut = budgets.cut(NOON_NS)
    budgets.reserve(ask("a", 40), 0.0)
    window = window_id(AT.day, "user:an")
    budgets.correct(corrections(cut, Spent(NOON_NS, {}, (OpenAttempt("a", 40, (window,)),))))
    assert use(budgets, "user:an") == (0, 40)


def test_days_that_are_over_are_not_corrected():
    budgets = Budgets()
    budgets.reserve(ask("a", 40, at_ns=NOON_NS - DAY_NS), 0.0)
    budgets.settle("a", 30, 1.0)
    found = corrections(budgets.cut(NOON_NS), Spent(NOON_NS, {}))
    assert found.deltas == {}, "the month has it already, from the count"


def test_an_id_names_the_attempt_of_the_ledger():
    assert ask_id("call_1", 2) == "call_1:2"


# P7, P8, I5: any order of anything


names = st.sampled_from("abcde")
amounts = st.integers(0, 120)
moves = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), names, amounts, st.integers(0, 3), st.sampled_from([1.0, 30.0])),
        st.tuples(st.just("spend"), names, amounts),
        st.tuples(st.just("settle"), names, amounts),
        st.tuples(st.just("renew"), names),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 5.0, 40.0])),
        st.tuples(st.just("read")),
    ),
    max_size=40,
)
ACCOUNTS = (AN, Account("key:1", None, 80), ALL, Account("user:binh", 50, 90), Account("tier:free", 120, 120))


@settings(max_examples=300)
@given(moves)
def test_no_reservation_passes_a_cap_and_all_that_is_reserved_comes_back(history):
    budgets, now, held = Budgets(), 0.0, {}
    at_ns = periods(NOON_NS).day_resets_ns - 10 * 10**9
    generation = itertools.count()
    for move, *rest in history:
        if move == "reserve":
            name, upper, which, lease_s = rest
            of = (ACCOUNTS[which], ACCOUNTS[which + 1])
            one = ask(f"{name}{next(generation)}", upper, *of, at_ns=at_ns + int(now * 1e9), lease_s=lease_s)
            before = {(use.account, use.window): use for use in budgets.uses([a.id for a in of], one.at_ns)}
            verdict = budgets.reserve(one, now)
            if verdict.admitted:
                held[name] = one
                for account in of:
                    for window, cap in (("day", account.day_nanousd), ("month", account.month_nanousd)):
                        spent, reserved = use(budgets, account.id, window, one.at_ns)
                        assert cap is None or spent + reserved <= cap
            else:
                after = {(use.account, use.window): use for use in budgets.uses([a.id for a in of], one.at_ns)}
                assert after == before
                assert verdict.affordable_nanousd < upper or verdict.affordable_nanousd == 0
        elif move == "spend" and rest[0] in held:
            budgets.spend(held[rest[0]].id, rest[1])
        elif move == "settle" and rest[0] in held:
            one = held[rest[0]]
            budgets.settle(one.id, rest[1], now)
            first = budgets.cut(one.at_ns)
            budgets.settle(one.id, rest[1] + 1, now)
            assert budgets.cut(one.at_ns) == first
        elif move == "renew" and rest[0] in held:
            budgets.renew(held[rest[0]].id, lease_s=10.0, now=now)
        elif move == "wait":
            now += rest[0]
            budgets.expire(now)
        elif move == "read":
            cut = budgets.cut(at_ns)
            budgets.correct(corrections(cut, Spent(at_ns, dict(cut.settled))))
        for day in (at_ns, at_ns + int(now * 1e9)):
            for one in budgets.uses([a.id for a in ACCOUNTS], day):
                assert one.reserved_nanousd >= 0
                assert one.spent_nanousd >= 0
    budgets.expire(now + 1e6)
    assert len(budgets) == 0
    for day in (at_ns, at_ns + int(now * 1e9)):
        assert not any(one.reserved_nanousd for one in budgets.uses([a.id for a in ACCOUNTS], day))


# P9: every interleaving of replicas that share one count, some of which die


def explore(calls: list[tuple[int, int]], replicas: int, cap: int) -> tuple[int, int]:
    """Every order of the steps of these calls, (bound, cost) each, one after the other in each replica, with a crash
    of any one replica at any step, a lease that ends, a sweep and a reading of the
    ledger at any point. Returns (states, most billed).

    A state is what was done: position of each call, who is dead, whether leases ended and the ledger was swept and
    read. The count is made again for each path's prefix, by copying.
    """
    account = Account("all", cap)
    mine = [[call for call in range(len(calls)) if call % replicas == replica] for replica in range(replicas)]
    seen: set[object] = set()
    most = 0

    def ledger(state: dict) -> Spent:
        windows = (window_id(AT.day, "all"),)
        ended = {f"{c}": cost for c, cost in state["ended"].items()}
        opened = tuple(OpenAttempt(f"{c}", calls[c][0], windows) for c in state["open"])
        return Spent(NOON_NS, {windows[0]: sum(ended.values())}, opened, ended)

    def play(path: tuple) -> dict:
        """The history, from the beginning: cheap, and nothing can be shared by mistake."""
        budgets = Budgets()
        state = {"at": [0] * len(calls), "dead": set(), "open": set(), "ended": {}, "billed": {}, "now": 0.0}
        for what, which in path:
            if what == "step":
                at = state["at"][which]
                if at == 0:
                    admitted = budgets.reserve(MoneyAsk(f"{which}", (account,), calls[which][0], NOON_NS), state["now"])
                    state["at"][which] = 1 if admitted.admitted else 5
                    continue
                if at == 1:
                    state["open"].add(which)
                elif at == 2:
                    state["billed"][which] = calls[which][1]
                elif at == 3:
                    state["open"].discard(which)
                    state["ended"][which] = calls[which][1]
                elif at == 4:
                    budgets.settle(f"{which}", calls[which][1], state["now"])
                state["at"][which] += 1
            elif what == "crash":
                state["dead"].add(which)
            elif what == "lease":
                # Those alive have renewed.
                state["now"] += 30.0
                for call in range(len(calls)):
                    if call % replicas not in state["dead"] and 0 < state["at"][call] < 5:
                        budgets.renew(f"{call}", lease_s=30.0, now=state["now"] - 1.0)
                budgets.expire(state["now"])
            elif what == "sweep":
                for call in [call for call in state["open"] if call % replicas in state["dead"]]:
                    state["open"].discard(call)
                    state["ended"][call] = calls[call][1]
            elif what == "read":
                cut = budgets.cut(NOON_NS)
                spent = ledger(state)
                asked = {one.id for one in cut.held}
                spent = Spent(NOON_NS, spent.sums, spent.opened, {k: v for k, v in spent.ended.items() if k in asked})
                budgets.correct(corrections(cut, spent))
        state["budgets"] = budgets
        return state

    todo = [()]
    while todo:
        path = todo.pop()
        state = play(path)
        budgets = state["budgets"]
        cut = budgets.cut(NOON_NS)
        key = (
            tuple(state["at"]),
            frozenset(state["dead"]),
            frozenset(state["ended"]),
            tuple(sorted(cut.settled.items())),
            tuple(sorted((one.id, one.state, one.nanousd) for one in cut.held)),
        )
        if key in seen:
            continue
        seen.add(key)
        billed = sum(state["billed"].values())
        most = max(most, billed)
        assert billed <= cap, path
        (day, _) = budgets.uses(["all"], NOON_NS)
        assert day.reserved_nanousd >= 0
        assert day.spent_nanousd + day.reserved_nanousd <= cap, path
        for replica, own in enumerate(mine):
            if replica in state["dead"]:
                continue
            current = next((call for call in own if state["at"][call] < 5), None)
            if current is not None:
                todo.append((*path, ("step", current)))
                if not state["dead"]:
                    todo.append((*path, ("crash", replica)))
        if state["dead"]:
            todo += [(*path, ("lease", 0)), (*path, ("sweep", 0)), (*path, ("read", 0))]
        elif state["ended"]:
            todo.append((*path, ("read", 0)))
    return len(seen), most


@pytest.mark.parametrize("replicas", [2, 3])
def test_no_interleaving_of_replicas_that_may_die_bills_more_than_the_cap(replicas):
    states, most = explore([(40, 30), (35, 35), (40, 40)], replicas, cap=80)
    assert states > 300
    assert most > 65, "the cap is used, and not just never reached"


# The alert line


def test_the_alert_line_is_crossed_once_a_day():
    line = AlertLine()
    told = [line.crossed(spent, 20, NOON_NS) for spent in (0, 19, 20, 25, 10, 30)]
    assert told == [False, False, True, False, False, False]
    assert not line.crossed(19, 20, NOON_NS + DAY_NS)
    assert line.crossed(500, 20, NOON_NS + DAY_NS)
    assert not line.crossed(500, None, NOON_NS + 2 * DAY_NS)
    assert not line.crossed(500, 20, NOON_NS), "a clock that goes back tells nothing twice"
