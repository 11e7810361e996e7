"""Which SDK speaks, and what it can read, from the headers that real versions send."""

from __future__ import annotations

import pytest

from tx.tinker.wire import compat, requests


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


@pytest.mark.parametrize(
    ("version", "said", "path", "restores"),
    [
        ("0.5.1", {}, "tinker://s:train:0/weights/a", True),
        ("0.5.1", {}, "tinker://s:train:0/sampler_weights/a", False),
        ("0.6.0", {}, "tinker://s:train:0/weights/a", False),
        ("0.7.0", {"optimizer": False}, "tinker://s:train:0/weights/a", False),
        ("0.38.0", {"optimizer": True}, "tinker://s:train:0/weights/a", True),
        (None, {}, "tinker://s:train:0/weights/a", False),
    ],
)
def test_the_only_load_state_of_old_versions_restores_the_optimizer(version, said, path, restores):
    request = requests.LoadWeights(model_id="s:train:0", seq_id=1, path=path, **said)
    headers = {"x-stainless-package-version": version} if version else {}
    complete = compat.complete_load_weights(request, headers)
    assert complete.optimizer is restores
    # The job's payload holds only what is set.
    assert ("optimizer" in complete.model_dump(exclude_unset=True)) is (restores or bool(said))


@pytest.mark.parametrize("text", ["", "0", "latest", "v0.3"])
def test_versions_that_are_none(text):
    assert compat.parse_version(text) is None


def test_flags_for_the_versions_that_know_them():
    assert compat.client_flags((0, 24, 1)) == {
        "proto_write_fwdbwd": True,
        "fwd_via_fwdbwd": True,
        "create_model_via_load_weights": True,
    }
    assert compat.client_flags((0, 38, 0)) == compat.client_flags(None) == {}


def test_media_type():
    assert compat.media_type("Application/JSON; charset=utf-8") == "application/json"
    assert compat.media_type(None) == "application/json"


def test_chunks_go_in_parallel_where_the_first_comes_last():
    assert compat.sends_first_chunk_last(None)
    assert compat.sends_first_chunk_last((0, 20, 0))
    assert not compat.sends_first_chunk_last((0, 18, 2))
