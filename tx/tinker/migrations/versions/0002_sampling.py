"""Sampling under load: sequences per job, when a job started, order of completion, cancellations, decode slots."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("num_sequences", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("job", sa.Column("started_at", sa.Float(), nullable=True))
    op.add_column("job", sa.Column("finish_seq", sa.BigInteger(), nullable=True))
    op.add_column("engine", sa.Column("decode_slots", sa.Integer(), nullable=False, server_default="0"))
    op.drop_index("ix_job_status_base_model", table_name="job")
    op.create_index("ix_job_status_base_model", "job", ["status", "base_model", "num_sequences"], unique=False)
    op.create_index("ix_job_sampler_id_finish_seq", "job", ["sampler_id", "finish_seq"], unique=False)
    op.create_table(
        "cancellation",
        sa.Column("request_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
    )
    # Of jobs from before there was a count, every sample is one sequence: the queue must not look empty.
    op.execute("UPDATE job SET num_sequences = 1 WHERE kind = 'sample'")


def downgrade() -> None:
    op.drop_table("cancellation")
    op.drop_index("ix_job_sampler_id_finish_seq", table_name="job")
    op.drop_index("ix_job_status_base_model", table_name="job")
    op.create_index("ix_job_status_base_model", "job", ["status", "base_model"], unique=False)
    op.drop_column("engine", "decode_slots")
    op.drop_column("job", "finish_seq")
    op.drop_column("job", "started_at")
    op.drop_column("job", "num_sequences")
