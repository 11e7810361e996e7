"""Tokens are well-formed, signed with the database's own key, and the same key for every process."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading

from sqlmodel import select

from tx.tinker.auth import TOKEN_LIFETIME_S, new_token
from tx.tinker.db import Secret, now, open_database, reading


def decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def test_a_token_says_who_and_until_when_and_is_signed(db):
    header, claims, signature = new_token(db).split(".")
    assert json.loads(decode(header)) == {"alg": "HS256", "typ": "JWT"}
    said = json.loads(decode(claims))
    assert (said["sub"], said["org_id"]) == ("local", "local")
    assert said["exp"] - said["iat"] == TOKEN_LIFETIME_S
    assert now() - 60 < said["iat"] <= now()
    with reading(db) as session:
        (secret,) = session.exec(select(Secret)).all()
    assert len(secret.value) == 32
    assert hmac.new(secret.value, f"{header}.{claims}".encode(), hashlib.sha256).digest() == decode(signature)


def test_processes_that_start_together_share_one_key(database_url):
    databases = [open_database(database_url) for _ in range(4)]
    barrier, tokens = threading.Barrier(4), []

    def ask(db) -> None:
        barrier.wait()
        tokens.append(new_token(db))

    threads = [threading.Thread(target=ask, args=(db,)) for db in databases]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    with reading(databases[0]) as session:
        (secret,) = session.exec(select(Secret)).all()
    [db.dispose() for db in databases]
    assert len(tokens) == 4
    for token in tokens:
        signed, _, signature = token.rpartition(".")
        assert hmac.new(secret.value, signed.encode(), hashlib.sha256).digest() == decode(signature)
