"""Old and new versions of the real SDK get the same numbers from one server; the table in docs/sdks.md is current."""

from __future__ import annotations

import os

import pytest

from tests.sdks import matrix
from tests.sdks.environments import VERSIONS, Unreachable, environment
from tests.support.server import Server

CHECKED = ("0.3.0", "0.14.0", "0.24.1", "0.30.0", "0.38.0")
"""The oldest, the last without client/config, the last that speaks JSON, a middle one, the newest."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_versions_agree(server: Server) -> None:
    try:
        for version in CHECKED:
            environment(version)
    except Unreachable as error:
        if os.environ.get("TX_REQUIRE_SDKS"):
            raise
        pytest.skip(f"THE MATRIX OF SDK VERSIONS DID NOT RUN: {error}")
    runs = [matrix.run(version, server.url) for version in CHECKED]
    assert matrix.complaints(runs) == []
    assert matrix.outdated(runs) == []


def run(version: str, log: tuple[str, ...] = (), **features: object) -> matrix.Run:
    """A run whose features are values, or None where they failed."""
    results = {
        label: {"status": "failed", "reason": "why"}
        if value is None
        else {"status": "ok", "values": value, "tolerance": 1e-6}
        for label, value in features.items()
    }
    return matrix.Run(version, results, list(log))


def test_what_is_complained_about() -> None:
    new = run("2", a=[1.0, {"b": [2]}], c=3)
    assert matrix.complaints([run("1", a=[1.0000001, {"b": [2]}], c=3), new]) == []
    (failed,) = matrix.complaints([run("1", a=None, c=3), new])
    assert failed == "1: a: why"
    (differs,) = matrix.complaints([run("1", a=[1.00001, {"b": [2]}], c=3), new])
    assert "1 values differ from 2's, first values[0]: 1.00001, not 1.0" in differs
    (logged,) = matrix.complaints([run("1", log=("WARNING x",), a=[1.0, {"b": [2]}], c=3), new])
    assert logged.endswith("WARNING x")


def test_every_known_version_is_documented() -> None:
    assert tuple(matrix.documented()[0][1:]) == VERSIONS
