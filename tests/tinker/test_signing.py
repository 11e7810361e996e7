"""Signed addresses: by any process of the database, for one thing, until they expire."""

from __future__ import annotations

import threading

import pytest

from tx.errors import Forbidden
from tx.tinker.db import now, open_database
from tx.tinker.signing import UrlSigner, shared_key


def test_every_process_draws_and_finds_the_same_key(database_url):
    databases = [open_database(database_url) for _ in range(4)]
    start = threading.Barrier(len(databases))
    keys: list[bytes] = []

    def ask(db) -> None:
        start.wait()
        keys.append(shared_key(db, "k"))

    threads = [threading.Thread(target=ask, args=(db,)) for db in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 4
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32
    assert shared_key(databases[0], "other") != keys[0]
    for db in databases:
        db.dispose()


def test_one_process_checks_what_another_signed(sqlite_url):
    here, there = UrlSigner(open_database(sqlite_url)), UrlSigner(open_database(sqlite_url))
    expires = int(now()) + 100
    here.check("m/weights/ck/a", str(expires), there.sign("m/weights/ck/a", expires))


def test_a_signature_is_of_one_thing_and_one_time(sqlite_url):
    signer = UrlSigner(open_database(sqlite_url))
    expires = int(now()) + 100
    signature = signer.sign("m/weights/ck/a", expires)
    wrong = [
        ("m/weights/ck/b", str(expires), signature),
        ("m/weights/ck", str(expires), signature),
        ("m/weights/ck/a", str(expires + 1), signature),
        ("m/weights/ck/a", f"0{expires}", signature),
        ("m/weights/ck/a", "", signature),
        ("m/weights/ck/a", str(expires), ""),
        ("m/weights/ck/a", str(expires), "ü"),
        ("m/weights/ck/a", str(expires), signature[:-1] + ("0" if signature[-1] != "0" else "1")),
    ]
    for resource, until, given in wrong:
        with pytest.raises(Forbidden, match="signature"):
            signer.check(resource, until, given)


def test_an_old_signature_says_when_it_was_good(sqlite_url):
    signer = UrlSigner(open_database(sqlite_url))
    with pytest.raises(Forbidden, match=r"until 1000 .*new one"):
        signer.check("m", "1000", signer.sign("m", 1000))


def test_another_database_has_another_key(tmp_path):
    one, two = (UrlSigner(open_database(f"sqlite:///{tmp_path / name}")) for name in ("one.db", "two.db"))
    expires = int(now()) + 100
    with pytest.raises(Forbidden):
        two.check("m", str(expires), one.sign("m", expires))
