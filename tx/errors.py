"""The exception tree. Every message says which field, what was given, and what is accepted.

TxError
├── InvalidInput        the request is wrong; its author can fix it (HTTP 400, future category "user")
│   ├── NotFound        it names something that does not exist here (HTTP 404)
│   ├── TooLarge        a body or a decompressed body past its limit (HTTP 413)
│   └── Unsupported     a feature of the protocol that tx refuses by name (HTTP 400)
├── Unauthorized        no API key, or none that counts (HTTP 401)
├── TooSlow             a request that does not arrive in time (HTTP 408)
├── Forbidden           a signed address that is wrong or too old (HTTP 403)
├── Overloaded          come back later (HTTP 429)
├── StorageError        checkpoints can't be written or read at the moment, and why (future category "server")
├── ModelLost           device state is gone and could not be rebuilt (future category "server")
└── StartupError        the process can't start; one sentence for the terminal, exit code 2
"""

from __future__ import annotations


class TxError(Exception):
    """Root of everything tx raises on purpose."""


class InvalidInput(TxError):
    """The request is wrong. ``field`` names the offending field by its protocol name."""

    def __init__(self, field: str, got: object, accepted: str) -> None:
        self.field = field
        super().__init__(f"{field}: got {_short(got)}, accepted: {accepted}")


class NotFound(InvalidInput):
    """The request names something that does not exist here."""


class TooLarge(InvalidInput):
    """A body is past its size limit."""


class Unsupported(InvalidInput):
    """A feature of the protocol that tx refuses by name."""


class Forbidden(TxError):
    """What was shown to get in is wrong or too old."""


class Unauthorized(TxError):
    """The request has no API key, or one that does not count; ``invalid_token``: a token that can be renewed."""

    def __init__(self, message: str, *, invalid_token: bool = False) -> None:
        self.invalid_token = invalid_token
        super().__init__(message)


class TooSlow(TxError):
    """The rest of a request did not arrive in time."""


class Overloaded(TxError):
    """There is as much queued, or asked, as is accepted; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class ModelLost(TxError):
    """Device state is gone and could not be rebuilt."""


class StorageError(TxError):
    """The storage of checkpoints refuses or does not answer; the message says what could not be done, and why."""


class StartupError(TxError):
    """The process can't start; the message is one sentence for the terminal."""


def _short(value: object, limit: int = 200) -> str:
    text = value if isinstance(value, str) and " " in value else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
