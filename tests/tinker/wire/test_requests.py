"""Request bodies as SDKs 0.3 to 0.38 send them, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx.errors import InvalidInput
from tx.tinker.wire import requests

MODEL = "sess-1:train:0"
OLD_LORA = {"rank": 8, "seed": None, "train_unembed": True, "train_mlp": True, "train_attn": True}
OLD_PARAMS = {"max_tokens": 3}
PARAMS = {"max_tokens": 3, "temperature": 1.0, "top_k": -1, "top_p": 1.0}
OLD_PROMPT = {"chunks": [{"tokens": [1, 2, 3]}]}
PROMPT = {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]}
ADAM = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 0.0}
SAMPLE = {"num_samples": 1, "sampling_session_id": "sess-9:sample:0", "seq_id": 0}
CREATE = {"session_id": "sess-1", "model_seq_id": 0, "base_model": "Qwen/Qwen3-8B"}

RECORDED = [
    ("0.3", requests.CreateSession, {"tags": [], "user_metadata": {}, "sdk_version": "0.3.0"}),
    (
        "0.38",
        requests.CreateSession,
        {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"},
    ),
    ("0.3", requests.CreateModel, CREATE | {"user_metadata": None, "lora_config": OLD_LORA}),
    ("0.30", requests.CreateModel, CREATE | {"optimizer_config": {"type": "adamw"}, "type": "create_model"}),
    ("0.3", requests.OptimStep, {"adam_params": {"learning_rate": 1e-4}, "model_id": MODEL, "seq_id": 4}),
    ("0.18", requests.OptimStep, {"adam_params": ADAM, "model_id": MODEL, "seq_id": 4, "type": "optim_step"}),
    ("0.3", requests.SaveWeights, {"model_id": MODEL, "path": "ck", "seq_id": 5}),
    ("0.14", requests.SaveWeights, {"model_id": MODEL, "path": "ck", "seq_id": 5, "ttl_seconds": None}),
    (
        "0.38",
        requests.SaveWeights,
        {
            "model_id": MODEL,
            "path": "ck1",
            "seq_id": 5,
            "ttl_seconds": 3600,
            "overwrite": False,
            "type": "save_weights",
        },
    ),
    (
        "0.14",
        requests.SaveWeightsForSampler,
        {"model_id": MODEL, "sampling_session_seq_id": 0, "seq_id": 7, "ttl_seconds": None},
    ),
    (
        "0.38",
        requests.SaveWeightsForSampler,
        {"model_id": MODEL, "path": "s1", "kind": "snapshot", "seq_id": 6, "type": "save_weights_for_sampler"},
    ),
    ("0.3", requests.LoadWeights, {"model_id": MODEL, "path": "tinker://x", "seq_id": 1}),
    ("0.7", requests.LoadWeights, {"model_id": MODEL, "path": "tinker://x", "optimizer": False, "seq_id": 1}),
    (
        "0.38",
        requests.LoadWeights,
        {"session_id": "sess-1", "model_seq_id": 1, "path": "tinker://x", "optimizer": False, "type": "load_weights"},
    ),
    (
        "0.38",
        requests.CreateSamplingSession,
        {"session_id": "s", "sampling_session_seq_id": 2, "base_model": "m", "type": "create_sampling_session"},
    ),
    (
        "0.3",
        requests.Sample,
        SAMPLE
        | {"prompt": OLD_PROMPT, "sampling_params": OLD_PARAMS, "prompt_logprobs": False, "topk_prompt_logprobs": 0},
    ),
    (
        "0.36",
        requests.Sample,
        SAMPLE
        | {
            "prompt": PROMPT,
            "sampling_params": PARAMS,
            "prompt_logprobs": False,
            "topk_prompt_logprobs": 0,
            "topk_sample_logprobs": 0,
            "prompt_alt_tokens_k": 0,
            "record_stability_info": False,
            "type": "sample",
        },
    ),
    ("0.3", requests.RetrieveFuture, {"request_id": "0"}),
    ("0.38", requests.RetrieveFuture, {"request_id": "0", "allow_metadata_only": True}),
    ("0.38", requests.FinishSession, {"reason": {"type": "success"}, "detail": "done"}),
]


@pytest.mark.parametrize(("version", "model", "body"), RECORDED, ids=lambda value: getattr(value, "__name__", None))
def test_what_real_clients_send_is_accepted_and_kept(version, model, body):
    parsed = requests.parse(model, json.dumps(body).encode())
    kept = parsed.model_dump(exclude_unset=True, exclude_none=True)
    for key, value in body.items():
        if value is not None and key in model.model_fields:
            expected = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
            assert kept[key] == expected


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b'"x"', b"\xff", b'{"path": "\\ud800"}', b"1e999"])
def test_other_bodies_are_refused(body):
    with pytest.raises(InvalidInput):
        requests.parse(requests.SaveWeights, body)


@given(st.binary(max_size=60))
def test_no_body_raises_anything_else(body):
    try:
        requests.parse(requests.SaveWeights, body)
    except InvalidInput:
        return


def test_the_message_names_field_value_and_what_is_accepted():
    with pytest.raises(InvalidInput) as error:
        requests.parse(requests.LoraConfig, b'{"rank": "four"}')
    assert str(error.value) == "rank: got 'four', accepted: a valid integer"
    with pytest.raises(InvalidInput, match="no such field"):
        requests.parse(requests.LoraConfig, b'{"dora": true}')
    with pytest.raises(InvalidInput, match="train_unembed"):
        requests.parse(requests.LoraConfig, b'{"train_unembed": false, "train_mlp": false, "train_attn": false}')


def test_prompt_tokens_are_counted():
    prompt = requests.Prompt(chunks=[{"tokens": [1, 2]}, {"type": "image"}, {"tokens": "x"}, {"tokens": [3]}])
    assert prompt.num_tokens == 3
