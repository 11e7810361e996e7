"""Recovery points of models; how often a job was there when its engine died."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"))
    op.create_table(
        "recoverypoint",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("seq_id", sa.BigInteger(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("model_id", "seq_id"),
    )
    op.create_index("ix_recoverypoint_base_model", "recoverypoint", ["base_model"], unique=False)


def downgrade() -> None:
    op.drop_table("recoverypoint")
    op.drop_column("job", "attempts")
