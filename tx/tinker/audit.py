"""The audit log's entries: who changed what. They are added in the transaction that makes the change."""

from __future__ import annotations

from typing import Any, Literal

from tx.tinker.db import AuditEntry, now

type Category = Literal["checkpoints", "projects", "teams", "organizations"]

LOCAL = "local"
"""The one user of a server without accounts."""


def entry(
    category: Category, event: str, *, model_id: str | None = None, tinker_path: str | None = None, **details: Any
) -> AuditEntry:
    """One change, now: ``event`` names it (``checkpoint.publish``), ``details`` is what else a reader would ask."""
    return AuditEntry(
        at=now(),
        category=category,
        event=event,
        actor=LOCAL,
        model_id=model_id,
        tinker_path=tinker_path,
        details=details,
    )
