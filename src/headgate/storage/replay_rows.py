"""The ledger's rows as a replay takes them: attempts with what their calls say, in the order of their time.

What it is: a query that streams, and the record made of each row. What it is not: the replay (`policy/replay.py`).
Of a span as long as you like it holds `ROWS_AT_ONCE` rows in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from headgate.policy.replay import ReplayRow
from headgate.storage.fold import decode_usage
from headgate.storage.tables import attempts, calls
from headgate.wire.usage import NO_USAGE

ROWS_AT_ONCE = 2_000
_SLACK_NS = 3_600 * 10**9
"""A call comes before its attempts start, by its deadline at most: rows are looked up by the call's time, an hour
around."""


def replay_rows(connection: sa.Connection, *, since_ns: int, until_ns: int) -> Iterator[ReplayRow]:
    """Attempts that started in [since_ns, until_ns) and whose call has ended, and calls that were answered by the
    answer of another one; by their time."""
    result = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(
        rows_statement(since_ns=since_ns, until_ns=until_ns)
    )
    for (
        call_id, at_ns, priced_at_ns, key_id, endpoint, conversation, model, usage, cost_nanousd, family, prefix,
        prefix_tokens, max_tokens, digest, outcome, state, tier, streamed, first_byte_ms,
        total_ms, queue_ms, reused, saved_nanousd,
    ) in result:  # fmt: skip
        waited_ms = (at_ns - priced_at_ns) // 1_000_000
        yield ReplayRow(
            call_id,
            at_ns,
            priced_at_ns,
            key_id,
            endpoint,
            conversation,
            model,
            NO_USAGE if usage is None else decode_usage(usage),
            cost_nanousd,
            family,
            prefix,
            prefix_tokens,
            max_tokens,
            digest,
            outcome == "completed" and state == "settled",
            tier,
            bool(streamed),
            # Both times are told from when the call came; an attempt began after its wait.
            max((total_ms if first_byte_ms is None else first_byte_ms) - max(waited_ms, queue_ms), 0),
            max(total_ms - waited_ms, 0),
            bool(reused),
            saved_nanousd if reused else 0,
        )


def rows_statement(*, since_ns: int, until_ns: int) -> sa.CompoundSelect:  # type: ignore[type-arg]
    """The query, for the test that explains it."""
    made = (
        sa.select(
            calls.c.call_id,
            attempts.c.at_ns.label("started_ns"),
            calls.c.at_ns,
            calls.c.key_id,
            calls.c.endpoint,
            calls.c.conversation,
            attempts.c.model,
            attempts.c.usage,
            attempts.c.cost_nanousd,
            calls.c.family,
            calls.c.prefix,
            calls.c.prefix_tokens,
            attempts.c.max_tokens,
            calls.c.digest,
            calls.c.outcome,
            attempts.c.state,
            calls.c.tier,
            calls.c.streamed,
            calls.c.first_byte_ms,
            calls.c.total_ms,
            calls.c.queue_ms,
            calls.c.reused,
            calls.c.saved_nanousd,
        )
        .join_from(calls, attempts, attempts.c.call_id == calls.c.call_id)
        .where(
            calls.c.at_ns >= since_ns - _SLACK_NS,
            calls.c.at_ns < until_ns,
            attempts.c.at_ns >= since_ns,
            attempts.c.at_ns < until_ns,
            calls.c.state != "open",
        )
    )
    again = sa.select(
        calls.c.call_id,
        calls.c.at_ns.label("started_ns"),
        calls.c.at_ns,
        calls.c.key_id,
        calls.c.endpoint,
        calls.c.conversation,
        calls.c.model,
        sa.null(),
        calls.c.cost_nanousd,
        calls.c.family,
        calls.c.prefix,
        calls.c.prefix_tokens,
        sa.literal_column("0"),
        calls.c.digest,
        calls.c.outcome,
        calls.c.state,
        calls.c.tier,
        calls.c.streamed,
        calls.c.first_byte_ms,
        calls.c.total_ms,
        calls.c.queue_ms,
        calls.c.reused,
        calls.c.saved_nanousd,
    ).where(calls.c.at_ns >= since_ns, calls.c.at_ns < until_ns, calls.c.reused == 1)
    return sa.union_all(made, again).order_by("started_ns", calls.c.call_id)
