"""What ten minutes of each person and key cost in the last week, by the ledger: what a start tells `SpendVelocity`.

One query over the calls of seven days. It blocks (350,000 calls: 2 s, measured), so never on the loop: a start asks in
a thread, with `now_ns` of before the first call, and serves meanwhile.
"""

from __future__ import annotations

import sqlalchemy as sa

from headgate.policy.spend_velocity import HISTORY_WINDOWS, WINDOW_S
from headgate.storage.tables import calls

_WINDOW_NS = WINDOW_S * 10**9


def spend_history(connection: sa.Connection, *, now_ns: int) -> dict[str, dict[int, int]]:
    """Nano-dollars by subject (`user:NAME`, `key:ID`) and by how many windows ago; 0 are the ten minutes up to now.

    A call counts when it came, not when it ended: at this size of a window that is the same.
    """
    ago = (now_ns - calls.c.at_ns) // _WINDOW_NS
    cost = sa.func.sum(calls.c.cost_nanousd)
    query = (
        sa.select(calls.c.user_id, calls.c.key_id, ago, cost)
        .where(calls.c.at_ns > now_ns - HISTORY_WINDOWS * _WINDOW_NS, calls.c.at_ns <= now_ns, calls.c.cost_nanousd > 0)
        .group_by(calls.c.user_id, calls.c.key_id, ago)
    )
    history: dict[str, dict[int, int]] = {}
    for user, key_id, window, nanousd in connection.execute(query):
        for subject in ((f"user:{user}",) if user else ()) + ((f"key:{key_id}",) if key_id else ()):
            windows = history.setdefault(subject, {})
            windows[window] = windows.get(window, 0) + int(nanousd)
    return history
