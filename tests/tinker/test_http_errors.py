"""Errors as HTTP: the status of each, and a body that says what is wrong."""

from __future__ import annotations

import pytest

from tx import errors
from tx.tinker.http_errors import STATUS, status_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidInput("f", 1, "2"), 400),
        (errors.Unsupported("f", 1, "2"), 400),
        (errors.NotFound("f", 1, "2"), 404),
        (errors.TooLarge("f", 1, "2"), 413),
        (errors.Overloaded("later"), 429),
        (errors.ModelLost("gone"), 500),
        (RuntimeError("bug"), 500),
    ],
)
def test_errors_to_http(error, status):
    assert status_of(error) == status


def test_409_is_never_answered():
    assert 409 not in STATUS.values()


def test_every_error_has_a_body_and_its_length(client):
    """A 400 without them is taken for a proxy's and retried (protocol §1.6)."""
    for reply in (client.get("nothing/here"), client.get("create_session"), client.post("optim_step", content=b"{")):
        assert reply.status_code in (400, 404, 405)
        assert reply.json()["detail"]
        assert int(reply.headers["content-length"]) == len(reply.content)
