"""What the handlers read from a job; what they do is tested through the engine."""

from __future__ import annotations

import pytest

from tx.errors import InvalidInput, Unsupported
from tx.tinker.checkpoints import CheckpointFolders
from tx.tinker.db import Job, Model, open_database
from tx.tinker.uptime import Uptime
from tx.tinker.work import Work, lora_of, made_sampler
from tx.types import LoraConfig


def job(kind: str, payload: bytes) -> Job:
    return Job(request_id=1, kind=kind, base_model="b", model_id="s:train:0", seq_id=1, payload=payload, created_at=0.0)


@pytest.mark.parametrize(
    ("kind", "payload", "sampler_id"),
    [
        ("save_weights_for_sampler", b'{"sampling_session_seq_id": 3}', "s:sample:3"),
        ("save_weights_for_sampler", b'{"sampling_session_seq_id": 3, "path": "named"}', None),
        ("save_weights_for_sampler", b'{"path": "named"}', None),
        ("save_weights", b'{"sampling_session_seq_id": 3}', None),
    ],
)
def test_only_an_unnamed_save_makes_a_sampler(kind, payload, sampler_id):
    assert made_sampler(job(kind, payload)) == sampler_id


def test_a_payload_that_is_not_json_is_the_callers_mistake():
    with pytest.raises(InvalidInput, match="body"):
        made_sampler(job("save_weights_for_sampler", b"\xff"))


def test_every_lora_field_of_a_model_counts():
    model = Model(
        model_id="s:train:0", session_id="s", model_seq_id=0, base_model="b", served_name="b", rank=3, seed=-5,
        train_attn=False, train_mlp=True, train_unembed=False, created_at=0.0, last_request_at=0.0,
    )  # fmt: skip
    assert lora_of(model) == LoraConfig(rank=3, seed=-5, train_attn=False, train_mlp=True, train_unembed=False)


def test_an_unknown_kind_is_refused_by_name(tmp_path, sqlite_url):
    work = Work(open_database(sqlite_url), None, CheckpointFolders(tmp_path), "b", Uptime())
    with pytest.raises(Unsupported, match="grow_wings"):
        work.start(job("grow_wings", b"{}"))
