"""Keys carry limits on output tokens a minute and on calls at once."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("otpm", sa.Integer(), nullable=True))
    op.add_column("keys", sa.Column("concurrency", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("keys", "concurrency")
    op.drop_column("keys", "otpm")
