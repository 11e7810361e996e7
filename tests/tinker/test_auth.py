"""Tokens are well-formed, signed with the database's own key, and the same key for every process."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading

import pytest
from sqlmodel import select

from tx.errors import Overloaded, StartupError, Unauthorized
from tx.tinker import keys
from tx.tinker.auth import ANYBODY, TOKEN_LIFETIME_S, Auth, KeyRing
from tx.tinker.db import Secret, now, open_database, reading


def decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def test_a_token_says_who_and_until_when_and_is_signed(db):
    header, claims, signature = Auth(None, db).new_token(ANYBODY).split(".")
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
        tokens.append(Auth(None, db).new_token(ANYBODY))

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


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys"


def caller(auth, key: str):
    return auth.caller({b"x-api-key": key.encode()})


def test_a_token_stands_for_its_key_until_it_expires_or_the_key_goes(db, file, monkeypatch):
    alice = keys.add(file, "alice", max_queued_samples=3)
    auth = Auth(file, db)
    token = auth.new_token(caller(auth, alice))
    assert json.loads(decode(token.split(".")[1]))["sub"] == "alice"
    came = caller(auth, token)
    assert (came.owner, came.share.max_sequences) == ("alice", 3)
    # A token that was asked for with a token lasts no longer.
    monkeypatch.setattr("tx.tinker.auth.now", lambda: now() + 1800)
    renewed = json.loads(decode(auth.new_token(came).split(".")[1]))
    assert renewed["exp"] == json.loads(decode(token.split(".")[1]))["exp"]
    monkeypatch.setattr("tx.tinker.auth.now", lambda: now() + TOKEN_LIFETIME_S + 1)
    with pytest.raises(Unauthorized, match="expired") as refused:
        caller(auth, token)
    assert refused.value.invalid_token
    monkeypatch.setattr("tx.tinker.auth.now", now)
    keys.revoke(file, "alice")
    keys.add(file, "alice")
    with pytest.raises(Unauthorized, match="revoked"):
        caller(Auth(file, db), token)


def test_a_token_that_we_have_not_signed_is_worth_nothing(db, file):
    key = keys.add(file, "alice")
    keys.add(file, "bob")
    auth = Auth(file, db)
    header, claims, signature = auth.new_token(caller(auth, key)).split(".")
    told = json.loads(decode(claims))

    def part(content: dict) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()

    bobs = part(told | {"sub": "bob"})
    for forged in (
        f"{header}.{bobs}.{signature}",
        f"{header}.{part(told | {'exp': told['exp'] + 1})}.{signature}",
        f"{part({'alg': 'none', 'typ': 'JWT'})}.{claims}.",
        f"{header}.{claims}.{signature[:-2]}",
        f"{header}.{claims}",
        "eyJ",
        "eyJ\u00e9.\u00e9.\u00e9",
        Auth(None, db).new_token(ANYBODY),  # of a server without keys: it names none
    ):
        with pytest.raises(Unauthorized) as refused:
            auth.caller({b"x-api-key": forged.encode("latin-1")})
        assert not refused.value.invalid_token


def test_the_file_is_read_again_when_it_changes_and_never_for_the_worse(file):
    clock = iter(range(1000))
    alice = keys.add(file, "alice")
    ring = KeyRing(file, clock=lambda: float(next(clock)))
    assert ring.of_key(alice).name == "alice"
    bob = keys.add(file, "bob")
    assert ring.of_key(bob).name == "bob"
    keys.revoke(file, "alice")
    assert ring.of_key(alice) is None
    for broken in ("{", None):
        file.unlink() if broken is None else file.write_text(broken)
        assert ring.of_key(bob).name == "bob"
        assert ring.of_key("tml-other") is None
    carl = keys.add(file, "carl")
    assert ring.of_key(carl).name == "carl"
    assert ring.of_key(bob) is None


@pytest.mark.parametrize("content", [None, "{"])
def test_a_server_does_not_start_without_its_keys(file, content):
    if content is not None:
        file.write_text(content)
    with pytest.raises(StartupError, match="--api-keys-file"):
        KeyRing(file)


def test_without_a_key_file_everybody_may_come(db):
    auth = Auth(None, db)
    assert [auth.caller(headers).owner for headers in ({}, {b"x-api-key": b"tml-x"})] == [None, None]


def test_a_key_may_come_as_a_bearer(db, file):
    alice = keys.add(file, "alice")
    assert Auth(file, db).caller({b"authorization": f"Bearer {alice}".encode()}).owner == "alice"


def test_a_rate_gives_a_seconds_worth_at_once_and_then_as_time_goes_by(db, file, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("tx.tinker.auth.time.monotonic", lambda: clock[0])
    key, other = keys.add(file, "alice", max_requests_per_s=2), keys.add(file, "bob")
    auth = Auth(file, db)
    alice = caller(auth, key)
    auth.count(alice)
    auth.count(alice)
    with pytest.raises(Overloaded, match="2 requests per second") as refused:
        auth.count(alice)
    assert refused.value.retry_after_s == 1
    [auth.count(caller(auth, other)) for _ in range(100)]
    clock[0] += 0.5
    auth.count(alice)
    with pytest.raises(Overloaded):
        auth.count(alice)
    clock[0] += 3600  # nothing is saved up for more than a second
    auth.count(alice)
    auth.count(alice)
    with pytest.raises(Overloaded):
        auth.count(alice)
