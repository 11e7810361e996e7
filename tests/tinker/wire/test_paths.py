"""Names and paths that become folders: what is accepted, and that nothing can leave its folder."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx.errors import InvalidInput
from tx.tinker.wire import paths


def test_a_path_and_its_parts():
    path = paths.parse_path("tinker://sess-1:train:0/sampler_weights/s1")
    assert path == paths.TinkerPath("sess-1:train:0", "sampler_weights", "s1")
    assert str(path) == "tinker://sess-1:train:0/sampler_weights/s1"
    assert (path.checkpoint_id, path.folder) == ("sampler_weights/s1", "sess-1:train:0/sampler_weights/s1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tinker://",
        "/etc/passwd",
        "tinker://sess-1:train:0/weights",
        "tinker://sess-1:train:0/weights/a/b",
        "tinker://sess-1:train:0/external_weights/a",
        "tinker://../weights/a",
        "tinker:///weights/a",
        "tinker://sess-1:train:0/weights/..",
        "tinker://sess-1:train:0/weights/",
        "tinker://sess-1:train:x/weights/a",
        "tinker://sess-1:sample:0/weights/a",
        "TINKER://sess-1:train:0/weights/a",
    ],
)
def test_other_paths_are_refused_by_field(text):
    with pytest.raises(InvalidInput) as error:
        paths.parse_path(text, "model_path")
    assert error.value.field == "model_path"


@given(st.text(max_size=140))
def test_an_accepted_name_is_one_folder_below_its_parent(name):
    try:
        paths.check_name(name)
    except InvalidInput:
        return
    assert len(PurePosixPath(name).parts) == 1
    assert name not in (".", "..")
    assert len(name.encode()) <= 255


def test_identifiers_and_their_session():
    assert paths.model_id("s-1", 3) == "s-1:train:3"
    assert paths.sampler_id("s-1", 827701264000000000) == "s-1:sample:827701264000000000"
    assert paths.session_of("s-1:train:3") == paths.session_of("s-1:sample:4") == "s-1"
    assert paths.sample_sequence_id(12, 1) == "12-1"
    with pytest.raises(InvalidInput):
        paths.session_of("s-1:other:3")
