"""What a prompt's cache saves and loses, alerts, reconciliations, and answers that were used again."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_CALLS = ("family", "prefix", "prefix_tokens", "digest", "reused")


def upgrade() -> None:
    for name in _CALLS:
        op.add_column("calls", _count(name) if name in ("prefix_tokens", "reused") else _text(name))
    op.add_column("attempts", sa.Column("estimated_nanousd", sa.BigInteger(), nullable=True))
    op.add_column("keys", sa.Column("plan_cache", sa.Integer(), nullable=False, server_default="1"))
    op.create_table(
        "cache_families",
        sa.Column("family", sa.Text(), primary_key=True),
        _text("key_id"),
        _text("endpoint"),
        _text("model"),
        _text("detail", "{}"),
        sa.Column("updated_at_ns", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "cache_findings",
        sa.Column("family", sa.Text(), primary_key=True),
        sa.Column("cause", sa.Text(), primary_key=True),
        sa.Column("day", sa.Integer(), primary_key=True),
        _count("count"),
        _count("lost_nanousd"),
        sa.Column("first_at_ns", sa.BigInteger(), nullable=False),
        sa.Column("last_at_ns", sa.BigInteger(), nullable=False),
        _text("detail", "{}"),
    )
    op.create_table(
        "alerts",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        _text("kind"),
        _text("subject"),
        _text("message"),
        _text("detail", "{}"),
        sa.Column("ended_at_ns", sa.BigInteger(), nullable=True),
        _text("ended_by"),
    )
    op.create_index("alerts_by_time", "alerts", ["at_ns"])
    op.create_table(
        "reconciliations",
        sa.Column("day", sa.Integer(), primary_key=True),
        sa.Column("model", sa.Text(), primary_key=True),
        sa.Column("workspace", sa.Text(), primary_key=True),
        _count("ledger_nanousd"),
        _count("reported_nanousd"),
        _count("corrected_nanousd"),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        _text("detail", "{}"),
    )


def downgrade() -> None:
    for table in ("reconciliations", "alerts", "cache_findings", "cache_families"):
        op.drop_table(table)
    op.drop_column("keys", "plan_cache")
    op.drop_column("attempts", "estimated_nanousd")
    for name in reversed(_CALLS):
        op.drop_column("calls", name)


def _text(name: str, default: str = "") -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=False, server_default=default)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")
