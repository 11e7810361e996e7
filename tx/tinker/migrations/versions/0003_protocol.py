"""The rest of the protocol: copies, cached prompt tokens, clones, audit log, telemetry, shared keys."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sampler", sa.Column("num_clones", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("job", sa.Column("tokens_cached", sa.BigInteger(), nullable=False, server_default="0"))
    with op.batch_alter_table("checkpoint") as checkpoint:
        checkpoint.add_column(sa.Column("idempotency_key", sa.String(), nullable=True))
        checkpoint.create_unique_constraint("uq_checkpoint_idempotency_key", ["idempotency_key"])
    op.create_table(
        "auditentry",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("category", sa.String(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=True),
        sa.Column("tinker_path", sa.String(), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_auditentry_at", "auditentry", ["at"], unique=False)
    op.create_table(
        "telemetryevent",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("received_at", sa.Float(), nullable=False),
        sa.Column("severity", sa.String(), nullable=False),
        sa.Column("event", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_telemetryevent_session_id", "telemetryevent", ["session_id"], unique=False)
    op.create_table(
        "secret",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )


def downgrade() -> None:
    op.drop_table("secret")
    op.drop_table("telemetryevent")
    op.drop_table("auditentry")
    with op.batch_alter_table("checkpoint") as checkpoint:
        checkpoint.drop_constraint("uq_checkpoint_idempotency_key", type_="unique")
        checkpoint.drop_column("idempotency_key")
    op.drop_column("job", "tokens_cached")
    op.drop_column("sampler", "num_clones")
