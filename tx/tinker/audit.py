"""The audit log's entries: who changed what. They are added in the transaction that makes the change."""

from __future__ import annotations

from typing import Any, Literal

from tx.tinker.db import LOCAL, AuditEntry, now

type Category = Literal["checkpoints", "projects", "teams", "organizations"]


def entry(
    category: Category,
    event: str,
    actor: str | None = None,
    *,
    model_id: str | None = None,
    tinker_path: str | None = None,
    **details: Any,
) -> AuditEntry:
    """One change, now: ``event`` names it (``checkpoint.publish``), ``details`` is what else a reader would ask.

    ``actor`` is the owner who made it; None: the local user, or the server by itself.
    """
    return AuditEntry(
        at=now(),
        category=category,
        event=event,
        actor=actor or LOCAL,
        model_id=model_id,
        tinker_path=tinker_path,
        details=details,
    )
