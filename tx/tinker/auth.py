"""Tokens for clients that want one. This server has no accounts: a token says who its one user is and opens nothing.

A token is a JSON Web Token (RFC 7519) signed with HMAC-SHA256 and a key that all API processes of a database share, so
that whoever checks tokens one day can tell ours.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

from sqlalchemy.engine import Engine as Database

from tx.tinker.audit import LOCAL
from tx.tinker.db import now
from tx.tinker.signing import shared_key

TOKEN_LIFETIME_S = 3600
"""Clients exchange it for a new one half-way (protocol §1.2)."""

_SECRET = "jwt"


def new_token(db: Database) -> str:
    """A token of the local user, from now."""
    issued_at = int(now())
    claims = {
        "iss": "tx",
        "sub": LOCAL,
        "org_id": LOCAL,
        "email": "",
        "iat": issued_at,
        "exp": issued_at + TOKEN_LIFETIME_S,
    }
    signed = f"{_encode({'alg': 'HS256', 'typ': 'JWT'})}.{_encode(claims)}"
    signature = hmac.new(shared_key(db, _SECRET), signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{_base64url(signature)}"


def _encode(part: dict[str, Any]) -> str:
    return _base64url(json.dumps(part, separators=(",", ":")).encode())


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
