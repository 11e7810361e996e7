"""How alembic runs our revisions: on the connection that ``tx.tinker.db`` holds the migration lock with."""

from alembic import context
from sqlmodel import SQLModel

import tx.tinker.db  # noqa: F401 (fills the metadata)

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,  # SQLite can't alter columns in place
    transactional_ddl=False,  # the caller's transaction is the one transaction
)
context.run_migrations()
