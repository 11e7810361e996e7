"""Whose a session is. What there was before belongs to the local user."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("session", sa.Column("owner", sa.String(), nullable=False, server_default="local"))
    op.create_index("ix_session_owner", "session", ["owner"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_session_owner", "session")
    op.drop_column("session", "owner")
