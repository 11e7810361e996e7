"""Who asks: API keys and the tokens that stand for them, checked in memory before anything of a request is read.

Without a key file there are no accounts: whatever key comes is accepted, and everything belongs to everybody. With
one, a request without a known key is refused, and its caller is bound to what is his own (``tx.tinker.owners``).

A token is a JSON Web Token (RFC 7519) signed with HMAC-SHA256 and a key that all API processes of a database share.
It is good for an hour, and no longer than the API key that it was given for.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine as Database

from tx.errors import InvalidInput, Overloaded, StartupError, Unauthorized
from tx.tinker.admission import Share
from tx.tinker.db import LOCAL, now
from tx.tinker.keys import Key, hash_of, read_keys
from tx.tinker.signing import shared_key

log = logging.getLogger(__name__)

TOKEN_LIFETIME_S = 3600
"""Clients exchange it for a new one half-way (protocol §1.2)."""

LOOK_EVERY_S = 1.0
"""How often the key file is looked at; a change counts from then on."""

_SECRET = "jwt"
_TOKEN_PREFIX = "eyJ"
_BEARER = "bearer "


@dataclass(frozen=True)
class Caller:
    """Who makes a request. ``owner`` None: somebody to whom everything belongs."""

    owner: str | None = None
    key: Key | None = None
    expires: int | None = None
    """Of the token that he came with, in UTC seconds."""

    @property
    def name(self) -> str:
        """What owns the sessions that he creates."""
        return self.owner or LOCAL

    @property
    def share(self) -> Share | None:
        """Of the queue, if his key bounds it."""
        if self.key is None or self.key.max_queued_samples is None:
            return None
        return Share(self.key.name, self.key.max_queued_samples)


ANYBODY = Caller()


class KeyRing:
    """The keys of a file, read again when it changes. Any thread may ask.

    Raises:
        StartupError: the file is missing or broken, when this is made; later the last good keys stay.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at = clock()
        self._version = _version(file)
        try:
            self._set(read_keys(file))
        except InvalidInput as error:
            raise StartupError(f"--api-keys-file: {error}.") from error

    def __len__(self) -> int:
        return len(self._by_name)

    def of_key(self, key: str) -> Key | None:
        """The entry of this very key."""
        self._look()
        return self._by_hash.get(hash_of(key))

    def of_name(self, name: str) -> Key | None:
        """The entry of that name."""
        self._look()
        return self._by_name.get(name)

    def _set(self, keys: dict[str, Key]) -> None:
        self._by_name = keys
        self._by_hash = {key.sha256: key for key in keys.values()}

    def _look(self) -> None:
        if self._clock() - self._looked_at < LOOK_EVERY_S:
            return
        with self._lock:
            self._looked_at = self._clock()
            version = _version(self._file)
            if version == self._version:
                return
            self._version = version
            try:
                self._set(read_keys(self._file))
            except InvalidInput as error:
                log.error("The API keys stay as they were: %s", error)
            else:
                log.info("Read %d API keys from %s", len(self), self._file)


class Auth:
    """Finds the caller of each request and keeps to the rate of his key.

    Args:
        file: of the keys; None: everybody is ANYBODY.
    """

    def __init__(self, file: Path | None, db: Database) -> None:
        self._db = db
        self.keys = KeyRing(file) if file is not None else None
        self._buckets: dict[Key, _Bucket] = {}  # of the keys that have a rate

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Who sent a request with these headers (their names in lower case).

        Raises:
            Unauthorized: a key is asked for, and this is none, or no longer.
        """
        if self.keys is None:
            return ANYBODY
        given = headers.get(b"x-api-key", b"").decode("latin-1").strip() or _bearer(headers)
        if not given:
            raise Unauthorized("X-API-Key: got nothing, accepted: an API key of this server.")
        caller = self._of_token(given) if given.startswith(_TOKEN_PREFIX) else self._of_key(given)
        if caller is None:
            raise Unauthorized("X-API-Key: this key is not one of this server's, or has been revoked.")
        return caller

    def count(self, caller: Caller) -> None:
        """Count a request against the rate of its caller's key; raises Overloaded if there were too many."""
        key = caller.key
        if key is None or key.max_requests_per_s is None:
            return
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(key.max_requests_per_s)
        wait_s = bucket.take()
        if wait_s > 0:
            raise Overloaded(
                f"This API key may make {key.max_requests_per_s:g} requests per second; try again in {wait_s:.1f} s.",
                retry_after_s=math.ceil(wait_s),
            )

    def new_token(self, caller: Caller) -> str:
        """A token that stands for the caller, from now; one that was asked for with a token ends with that one."""
        issued_at = int(now())
        expires = issued_at + TOKEN_LIFETIME_S
        claims: dict[str, Any] = {"iss": "tx", "sub": caller.name, "org_id": LOCAL, "email": "", "iat": issued_at}
        claims["exp"] = expires if caller.expires is None else min(expires, caller.expires)
        if caller.key is not None:
            claims["key"] = caller.key.sha256[:16]
        signed = f"{_encode({'alg': 'HS256', 'typ': 'JWT'})}.{_encode(claims)}"
        return f"{signed}.{_base64url(self._signature(signed))}"

    @cached_property
    def _secret(self) -> bytes:
        return shared_key(self._db, _SECRET)

    def _signature(self, signed: str) -> bytes:
        return hmac.new(self._secret, signed.encode("latin-1"), hashlib.sha256).digest()

    def _of_key(self, given: str) -> Caller | None:
        assert self.keys is not None
        key = self.keys.of_key(given)
        return Caller(key.name, key) if key is not None else None

    def _of_token(self, given: str) -> Caller | None:
        assert self.keys is not None
        # Signed first: nothing that we have not signed is looked into, so what it says needs no further checks.
        signed, _, signature = given.rpartition(".")
        if not hmac.compare_digest(_base64url(self._signature(signed)).encode(), signature.encode("latin-1")):
            return None
        claims = _decode(signed.partition(".")[2])
        key = self.keys.of_name(claims["sub"])
        if key is None or not key.sha256.startswith(claims.get("key", "-")):
            return None
        if claims["exp"] <= now():
            raise Unauthorized("X-API-Key: this token has expired.", invalid_token=True)
        return Caller(key.name, key, claims["exp"])


class _Bucket:
    """So many requests per second, and a second's worth at once. Used by one thread, the event loop's."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._room = max(1.0, per_s)
        self._left = self._room
        self._at = time.monotonic()

    def take(self) -> float:
        """0 if there was room for one more, else the seconds until there is."""
        at = time.monotonic()
        self._left = min(self._room, self._left + (at - self._at) * self._per_s)
        self._at = at
        if self._left < 1:
            return (1 - self._left) / self._per_s
        self._left -= 1
        return 0.0


def _version(file: Path) -> tuple[int, ...]:
    """Changes when the file does."""
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _bearer(headers: Mapping[bytes, bytes]) -> str:
    """What scrapers of metrics can send."""
    given = headers.get(b"authorization", b"").decode("latin-1").strip()
    return given[len(_BEARER) :].strip() if given.lower().startswith(_BEARER) else ""


def _encode(part: dict[str, Any]) -> str:
    return _base64url(json.dumps(part, separators=(",", ":")).encode())


def _decode(part: str) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return decoded


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
