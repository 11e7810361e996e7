from sqlmodel import select

from tx.tinker import audit
from tx.tinker.db import AuditEntry, now, open_database, reading, writing


def test_an_entry_is_stored_with_the_change_it_tells_of(database_url):
    db = open_database(database_url)
    before = now()
    entry = audit.entry("checkpoints", "checkpoint.publish", model_id="s:train:0", tinker_path="p", public=True)
    with writing(db) as session:
        session.add(entry)

    with reading(db) as session:
        (found,) = session.exec(select(AuditEntry)).all()
    db.dispose()
    assert before <= found.at <= now()
    assert (found.category, found.event, found.actor) == ("checkpoints", "checkpoint.publish", "local")
    assert (found.model_id, found.tinker_path, found.details) == ("s:train:0", "p", {"public": True})
