"""The tables, as SQLAlchemy Core describes them. What changes here needs a migration (a test compares the two).

Times are UTC nanoseconds, money integer nano-dollars. Nothing here holds a prompt, an answer or a key.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()


def _text(name: str, default: str = "") -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, server_default=default)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


calls = sa.Table(
    "calls",
    metadata,
    # Call ids begin with their time, so that rows are appended and not scattered: six times cheaper (decision 0003).
    sa.Column("call_id", sa.Text, primary_key=True),
    sa.Column("at_ns", sa.BigInteger, nullable=False),
    _text("writer"),  # the process in whose journal it is: it alone may leave the call open
    _text("key_id"),
    _text("user_id"),  # not `user`, which means something else in PostgreSQL
    _text("tier"),
    _text("endpoint"),
    _text("conversation"),
    _text("model_asked"),
    _text("model"),
    _text("arm"),
    _count("status"),
    _text("error_code"),
    sa.Column("outcome", sa.Text),  # null until the call is closed
    _text("state", "open"),
    _text("stop_reason"),
    _count("streamed"),
    _count("input_tokens"),
    _count("cache_read_tokens"),
    _count("cache_write_5m_tokens"),
    _count("cache_write_1h_tokens"),
    _count("output_tokens"),
    _count("cost_nanousd"),
    _count("saved_nanousd"),
    _count("queue_ms"),
    sa.Column("first_byte_ms", sa.BigInteger),
    _count("total_ms"),
    _text("family"),  # of prompts, as policy/prompt_families.py tells them apart
    _text("prefix"),  # digest of the longest prefix that the prompt cache can hold; hex
    _count("prefix_tokens"),  # an estimate
    _text("digest"),  # of the whole request; hex
    _count("reused"),  # 1: the answer of an earlier call
    sa.Index("calls_by_time", "at_ns", "call_id"),
    sa.Index("calls_open", "writer", sqlite_where=sa.text("state = 'open'")),
    sqlite_with_rowid=False,
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("call_id", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    _text("model"),
    _text("state", "open"),
    _count("at_ns"),
    _count("input_tokens_estimate"),
    _count("max_tokens"),
    _count("status"),
    _text("error_code"),
    _text("upstream_request_id"),
    _text("usage", "{}"),  # JSON of wire.usage.Usage: all that a price may ever depend on
    _text("price_id"),
    _count("cost_nanousd"),
    _count("saved_nanousd"),
    sa.Column("estimated_nanousd", sa.BigInteger),  # what an estimate said before a reconciliation corrected it
    sqlite_with_rowid=False,
)

journal_positions = sa.Table(
    "journal_positions",
    metadata,
    sa.Column("segment", sa.Text, primary_key=True),
    sa.Column("offset_bytes", sa.BigInteger, nullable=False),  # committed with the rows that came before it
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("secret_hash", sa.LargeBinary, nullable=False),
    sa.Column("previous_hash", sa.LargeBinary),  # of the secret before the last rotation
    sa.Column("previous_expires_at_ns", sa.BigInteger),
    _text("name"),
    _text("owner"),
    _text("scopes"),  # separated by spaces
    _text("tier"),
    sa.Column("rpm", sa.Integer),
    sa.Column("budget_day_nanousd", sa.BigInteger),
    sa.Column("budget_month_nanousd", sa.BigInteger),
    _text("models"),  # separated by spaces; empty: all
    sa.Column("created_at_ns", sa.BigInteger, nullable=False),
    sa.Column("expires_at_ns", sa.BigInteger),
    sa.Column("revoked_at_ns", sa.BigInteger),
    sa.Column("last_used_at_ns", sa.BigInteger),
    sa.Column("otpm", sa.Integer),
    sa.Column("concurrency", sa.Integer),
    sa.Column("plan_cache", sa.Integer, nullable=False, server_default="1"),
)

audit = sa.Table(
    "audit",
    metadata,
    # Its highest value is the version of the table of keys: who changes a key adds a row in the same transaction.
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at_ns", sa.BigInteger, nullable=False),
    _text("actor"),
    _text("action"),
    _text("key_id"),
    _text("before"),  # JSON of the key as it is shown, empty when it did not exist
    _text("after"),
    sa.Column("digest", sa.LargeBinary, nullable=False),  # SHA-256 of this row and the digest before it
)

cache_families = sa.Table(
    "cache_families",
    metadata,
    sa.Column("family", sa.Text, primary_key=True),
    _text("key_id"),
    _text("endpoint"),
    _text("model"),
    _text("detail", "{}"),  # JSON: what its prompts are like, and the TTL that pays
    sa.Column("updated_at_ns", sa.BigInteger, nullable=False),
)

cache_findings = sa.Table(
    "cache_findings",
    metadata,
    sa.Column("family", sa.Text, primary_key=True),
    sa.Column("cause", sa.Text, primary_key=True),
    sa.Column("day", sa.Integer, primary_key=True),  # UTC days since 1970
    _count("count"),
    _count("lost_nanousd"),
    sa.Column("first_at_ns", sa.BigInteger, nullable=False),
    sa.Column("last_at_ns", sa.BigInteger, nullable=False),
    _text("detail", "{}"),  # JSON: where the prompts parted, with redacted snippets
)

alerts = sa.Table(
    "alerts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at_ns", sa.BigInteger, nullable=False),
    _text("kind"),
    _text("subject"),
    _text("message"),
    _text("detail", "{}"),  # JSON
    sa.Column("ended_at_ns", sa.BigInteger),
    _text("ended_by"),
    sa.Index("alerts_by_time", "at_ns"),
)

reconciliations = sa.Table(
    "reconciliations",
    metadata,
    sa.Column("day", sa.Integer, primary_key=True),  # UTC days since 1970
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("workspace", sa.Text, primary_key=True),
    _count("ledger_nanousd"),
    _count("reported_nanousd"),
    _count("corrected_nanousd"),
    sa.Column("at_ns", sa.BigInteger, nullable=False),
    _text("detail", "{}"),  # JSON: tokens by kind on both sides, and what the gap comes from
)
