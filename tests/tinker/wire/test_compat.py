"""Which SDK speaks, and what it can read, from the headers that real versions send."""

from __future__ import annotations

import pytest

from tx.tinker.wire import compat


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ({"x-stainless-package-version": "0.38.0", "user-agent": "AsyncTinker/Python 0.38.0"}, (0, 38, 0)),
        ({"user-agent": "AsyncTinker/Python 0.3.0"}, (0, 3, 0)),
        ({"x-stainless-package-version": "1.2"}, (1, 2, 0)),
        ({"user-agent": "curl/8.0"}, None),
        ({}, None),
    ],
)
def test_client_version(headers, version):
    assert compat.client_version(headers) == version


@pytest.mark.parametrize(
    ("accept", "protobuf"),
    [
        ("application/x-protobuf", True),
        ("application/x-protobuf, application/json", True),
        ("application/json", False),
        ("*/*", False),
        (None, False),
    ],
)
def test_accepts_protobuf(accept, protobuf):
    assert compat.accepts_protobuf({"accept": accept} if accept else {}) is protobuf


@pytest.mark.parametrize(
    ("version", "reads"),
    [("0.3.0", False), ("0.27.1", False), ("0.28.0", True), ("0.38.0", True), ("1.0", True), (None, True)],
)
def test_external_checkpoints_are_for_sdks_that_know_them(version, reads):
    assert compat.reads_external({"x-stainless-package-version": version} if version else {}) is reads


def test_media_type():
    assert compat.media_type("Application/JSON; charset=utf-8") == "application/json"
    assert compat.media_type(None) == "application/json"


def test_chunks_go_in_parallel_where_the_first_comes_last():
    assert compat.sends_first_chunk_last(None)
    assert compat.sends_first_chunk_last((0, 20, 0))
    assert not compat.sends_first_chunk_last((0, 18, 2))
