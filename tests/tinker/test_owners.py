"""Whose a row is: conditions that find the owner's, and only his, on both databases."""

from __future__ import annotations

import pytest
from sqlmodel import select

from tx.tinker import owners
from tx.tinker.db import Model, Session, open_database, reading, writing


@pytest.fixture
def db(database_url):
    database = open_database(database_url)
    with writing(database) as session:
        for name in ("ann", "ben"):
            session.add(Session(session_id=f"of-{name}", created_at=0, heartbeat_at=0, owner=name))
            session.add(
                Model(
                    model_id=f"of-{name}:train:0", session_id=f"of-{name}", model_seq_id=0, base_model="b",
                    served_name="b", rank=1, seed=0, created_at=0, last_request_at=0,
                )
            )  # fmt: skip
    yield database
    database.dispose()


@pytest.mark.parametrize(
    ("owner", "names"), [("ann", ["ann"]), ("ben", ["ben"]), ("carl", []), ("", []), (None, ["ann", "ben"])]
)
def test_conditions_find_what_is_the_owners(db, owner, names):
    models = select(Model.model_id).order_by(Model.model_id)
    with reading(db) as session:
        by_session = session.exec(models.where(owners.session_of_owner(Model.session_id, owner))).all()
        by_model = session.exec(models.where(owners.model_of_owner(Model.model_id, owner))).all()
    assert by_session == by_model == [f"of-{name}:train:0" for name in names]


def test_what_was_there_before_owners_is_the_local_users():
    assert Session(session_id="s", created_at=0, heartbeat_at=0).owner == "local"


def test_idempotency_keys_of_two_owners_differ():
    assert owners.idempotency_key("ann", "k") != owners.idempotency_key("ben", "k")
    assert owners.idempotency_key(None, "k") == "k"
    assert owners.idempotency_key("ann", None) is None
