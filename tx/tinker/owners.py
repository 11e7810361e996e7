"""Whose a row is: the name of the API key under which its session was created, ``Session.owner``.

Models and samplers belong to whoever their session belongs to, checkpoints to whoever their model belongs to; jobs,
telemetry and audit entries likewise. An owner of None stands for a caller to whom everything belongs: the server has
no key file, or it is the server itself that asks.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, true
from sqlmodel import col, select

from tx.tinker.db import Model, Session


def session_of_owner(session_id: Any, owner: str | None) -> ColumnElement[bool]:
    """Condition: the session that this column names is the owner's."""
    if owner is None:
        return true()
    return col(session_id).in_(select(Session.session_id).where(Session.owner == owner))


def model_of_owner(model_id: Any, owner: str | None) -> ColumnElement[bool]:
    """Condition: the model that this column names is the owner's."""
    if owner is None:
        return true()
    return col(model_id).in_(select(Model.model_id).where(session_of_owner(Model.session_id, owner)))


def idempotency_key(owner: str | None, key: str | None) -> str | None:
    """The key of a request as it is stored: two owners may choose the same. No name of an owner has a slash."""
    return key if owner is None or key is None else f"{owner}/{key}"
