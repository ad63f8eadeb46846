"""What a start reads of the ledger: dollars by person, key and ten minutes, of a week."""

import sqlalchemy as sa

from headgate.policy.spend_velocity import HISTORY_WINDOWS, SpendVelocity
from headgate.storage.spend_history import spend_history
from headgate.storage.tables import calls

NOW_NS = 1_785_000_000 * 10**9
WINDOW_NS = 600 * 10**9
USD = 10**9


def add(engine: sa.Engine, ago_ns: int, cost: int, *, user: str = "an", key_id: str = "k1") -> None:
    with engine.begin() as connection:
        number = connection.execute(sa.select(sa.func.count()).select_from(calls)).scalar_one()
        row = {"call_id": f"call_{number}", "at_ns": NOW_NS - ago_ns, "user_id": user, "key_id": key_id}
        connection.execute(sa.insert(calls).values(**row, cost_nanousd=cost))


def history(engine: sa.Engine) -> dict[str, dict[int, int]]:
    with engine.connect() as connection:
        return spend_history(connection, now_ns=NOW_NS)


def test_cost_is_summed_by_subject_and_window(engine) -> None:
    add(engine, 0, 5)
    add(engine, WINDOW_NS - 1, 7)
    add(engine, WINDOW_NS, 11)
    add(engine, 3 * WINDOW_NS, 13, key_id="k2")
    add(engine, 3 * WINDOW_NS + 9, 17, user="binh", key_id="k2")
    assert history(engine) == {
        "user:an": {0: 12, 1: 11, 3: 13},
        "user:binh": {3: 17},
        "key:k1": {0: 12, 1: 11},
        "key:k2": {3: 30},
    }


def test_what_is_older_than_a_week_free_or_nobodys_is_left_out(engine) -> None:
    add(engine, HISTORY_WINDOWS * WINDOW_NS, 5)
    add(engine, 10, 0)
    add(engine, 10, 3, user="")
    add(engine, -10, 9)
    assert history(engine) == {"key:k1": {0: 3}}
    add(engine, HISTORY_WINDOWS * WINDOW_NS - 1, 5)
    assert history(engine)["user:an"] == {HISTORY_WINDOWS - 1: 5}


def test_the_guard_takes_it_as_it_is(engine) -> None:
    for window in range(1, 200):
        add(engine, window * WINDOW_NS, 5 * USD)
    velocity = SpendVelocity()
    velocity.seed(history(engine), 0.0)
    assert all(each.limit_from == "history" and each.limit_nanousd >= 25 * USD for each in velocity.snapshot(0.0))
