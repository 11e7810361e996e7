"""Signed addresses: a URL that anybody who has it may fetch, until it expires. Knows neither HTTP nor files.

The signature is HMAC-SHA256, under a key that every API process of this database shares, over what the URL names and
when it expires. So any process can check what another has signed, and a URL says nothing about any other.
"""

from __future__ import annotations

import hmac
import secrets
from functools import cached_property

from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import IntegrityError

from tx.errors import Forbidden
from tx.tinker.db import Secret, now, reading, writing

KEY_NAME = "signed-urls"
_KEY_BYTES = 32


def shared_key(db: Database, name: str) -> bytes:
    """The secret of that name, drawn when it is first asked for; the same in every process of this database."""
    with reading(db) as session:
        found = session.get(Secret, name)
    if found is None:
        try:
            with writing(db) as session:
                session.add(Secret(name=name, value=secrets.token_bytes(_KEY_BYTES)))
        except IntegrityError:  # another process was faster: its key is the one
            pass
        with reading(db) as session:
            found = session.get(Secret, name)
    assert found is not None  # nobody deletes secrets
    return found.value


class UrlSigner:
    """Signs and checks. Any thread may call it."""

    def __init__(self, db: Database) -> None:
        self._db = db

    @cached_property
    def _key(self) -> bytes:
        return shared_key(self._db, KEY_NAME)

    def sign(self, resource: str, expires: int) -> str:
        """The signature (64 hex digits) with which ``resource`` may be fetched until ``expires``, in UTC seconds."""
        return self._signature(resource, str(expires))

    def check(self, resource: str, expires: str, signature: str) -> None:
        """Raises Forbidden unless we signed exactly this, and it has not expired; ``expires`` is as in the URL."""
        if not hmac.compare_digest(self._signature(resource, expires).encode(), signature.encode()):
            raise Forbidden("signature: not the one of this URL. Use the address as the server gave it, unchanged.")
        if now() >= int(expires):  # we signed it, so it is a number
            raise Forbidden(f"expires: this URL was good until {expires} (UTC seconds). Ask for a new one.")

    def _signature(self, resource: str, expires: str) -> str:
        return hmac.new(self._key, f"{resource}\n{expires}".encode(), "sha256").hexdigest()
