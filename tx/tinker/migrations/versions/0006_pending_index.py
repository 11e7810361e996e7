"""An index of the queue in which the sessions that wait are found without reading all of it."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_job_status_base_model", table_name="job")
    columns = ["status", "base_model", "kind", "session_id", "request_id", "num_sequences"]
    op.create_index("ix_job_queue", "job", columns, unique=False)


def downgrade() -> None:
    op.drop_index("ix_job_queue", table_name="job")
    op.create_index("ix_job_status_base_model", "job", ["status", "base_model", "num_sequences"], unique=False)
