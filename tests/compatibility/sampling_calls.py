"""Calls of SamplingClient, of SamplingParams, and of what a sample's response holds."""

from __future__ import annotations

from typing import Any

import numpy as np
from tinker import types
from tinker.lib.api_future_impl import QueueState
from tinker.lib.retry_handler import RetryConfig

from tests.compatibility.lab import LIMIT_S, PROMPT, SHORT, Lab
from tests.compatibility.registry import call
from tests.compatibility.service_calls import sequences
from tests.compatibility.training_calls import PIXEL

NUM_TOKENS = PROMPT.length


def greedy(**params: Any) -> types.SamplingParams:
    return types.SamplingParams(**({"max_tokens": 4, "temperature": 0.0, "stop": []} | params))


# ---- sample and its options ----


@call("SamplingClient.sample")
@call("SamplingClient.sample", "prompt=EncodedTextChunk")
def sample(lab: Lab, do: Any) -> None:
    response = do(PROMPT, 2, SHORT)
    assert [len(row.tokens) for row in response.sequences] == [4, 4]
    assert all(len(row.logprobs) == 4 and row.sequence_id for row in response.sequences)


@call("SamplingClient.sample", "include_prompt_logprobs")
def prompt_logprobs(lab: Lab, do: Any) -> None:
    logprobs = do(PROMPT, 1, SHORT, include_prompt_logprobs=True).prompt_logprobs
    assert len(logprobs) == NUM_TOKENS
    assert logprobs[0] is None
    assert max(logprobs[1:]) < 0


@call("SamplingClient.sample", "topk_prompt_logprobs")
def topk_prompt_logprobs(lab: Lab, do: Any) -> None:
    rows = do(PROMPT, 1, SHORT, include_prompt_logprobs=True, topk_prompt_logprobs=3).topk_prompt_logprobs
    assert [len(row) for row in rows[1:]] == [3] * (NUM_TOKENS - 1)


@call("SamplingClient.sample", "topk_sample_logprobs")
def topk_sample_logprobs(lab: Lab, do: Any) -> None:
    row = do(PROMPT, 1, greedy(), topk_sample_logprobs=3).sequences[0]
    assert [entries[0][0] for entries in row.topk_logprobs] == list(row.tokens)  # the likeliest is the greedy one


@call("SamplingClient.sample", "target_prompt_logprobs")
def target_prompt_logprobs(lab: Lab, do: Any) -> None:
    ids = np.asarray(PROMPT.to_ints()[1:], np.int64)[:, None]
    target = types.TensorData.from_numpy(ids)
    response = do(PROMPT, 1, SHORT, include_prompt_logprobs=True, target_prompt_logprobs=target)
    np.testing.assert_allclose(
        np.asarray(response.target_prompt_logprobs.data), response.prompt_logprobs[1:], atol=1e-5
    )


@call("SamplingClient.sample", "prompt_alt_tokens_k")
def prompt_alt_tokens(lab: Lab, do: Any) -> None:
    drawn = do(PROMPT, 1, SHORT, prompt_alt_tokens_k=3).prompt_alt_tokens
    assert list(drawn.tokens.shape) == list(drawn.logprobs.shape) == [NUM_TOKENS - 1, 3]


@call("SamplingClient.sample", "prompt_logprobs_last_n")
def prompt_logprobs_last_n(lab: Lab, do: Any) -> None:
    logprobs = do(PROMPT, 1, SHORT, include_prompt_logprobs=True, prompt_logprobs_last_n=2).prompt_logprobs
    assert [value is None for value in logprobs] == [True] * (NUM_TOKENS - 2) + [False] * 2


def prompt_with(chunk: types.ModelInputChunk) -> types.ModelInput:
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[1, 2]), chunk])


@call("SamplingClient.sample", "prompt=ImageChunk", refused="image")
def image_in_prompt(lab: Lab, do: Any) -> None:
    do(prompt_with(types.ImageChunk(data=PIXEL, format="png", expected_tokens=1)), 1, SHORT)


@call("SamplingClient.sample", "prompt=ImageAssetPointerChunk", refused="image")
def pointer_in_prompt(lab: Lab, do: Any) -> None:
    chunk = types.ImageAssetPointerChunk(location="file:///a.png", format="png", expected_tokens=1)
    do(prompt_with(chunk), 1, SHORT)


@call("SamplingClient.sample", "prompt=DmelChunk", refused="dmel|audio")
def audio_in_prompt(lab: Lab, do: Any) -> None:
    do(prompt_with(types.DmelChunk(dmel=b"\0" * 8)), 1, SHORT)


# ---- sampling parameters ----


def tokens(lab: Lab, params: types.SamplingParams, num_samples: int = 1) -> list[list[int]]:
    return [list(row.tokens) for row in lab.sampler.sample(PROMPT, num_samples, params).result(LIMIT_S).sequences]


@call("SamplingParams", "max_tokens")
def max_tokens(lab: Lab, do: Any) -> None:
    assert [len(row) for row in tokens(lab, greedy(max_tokens=7))] == [7]
    assert [len(row) for row in tokens(lab, greedy(max_tokens=None))] == [512 - NUM_TOKENS]  # what the context holds


@call("SamplingParams", "seed")
def seed(lab: Lab, do: Any) -> None:
    one, two = (tokens(lab, types.SamplingParams(max_tokens=8, seed=-1, stop=[]), 2) for _ in range(2))
    assert one == two
    assert one[0] != one[1]


@call("SamplingParams", "stop")
def stop(lab: Lab, do: Any) -> None:
    usual = tokens(lab, greedy())[0]
    for stops in ([usual[1]], lab.training.get_tokenizer().decode(usual[:2])):
        row = lab.sampler.sample(PROMPT, 1, greedy(stop=stops)).result(LIMIT_S).sequences[0]
        assert row.stop_reason == "stop"
        assert list(row.tokens) == usual[: len(row.tokens)]


@call("SamplingParams", "temperature", "top_k", "top_p")
def filters(lab: Lab, do: Any) -> None:
    usual = tokens(lab, greedy())
    assert tokens(lab, types.SamplingParams(max_tokens=4, stop=[], temperature=0.7, top_k=1)) == usual
    assert tokens(lab, types.SamplingParams(max_tokens=4, stop=[], temperature=0.7, top_p=1e-6)) == usual


# ---- its other methods ----


@call("SamplingClient.compute_logprobs")
def compute_logprobs(lab: Lab, do: Any) -> None:
    assert len(do(PROMPT)) == NUM_TOKENS


@call("SamplingClient.compute_logprobs", "prompt_logprobs_last_n")
def compute_last_logprobs(lab: Lab, do: Any) -> None:
    assert sum(value is not None for value in do(PROMPT, prompt_logprobs_last_n=2)) == 2


@call("SamplingClient.get_base_model")
def get_base_model(lab: Lab, do: Any) -> None:
    assert do() == lab.base_model


@call("SamplingClient.get_sampler_handle")
def get_sampler_handle(lab: Lab, do: Any) -> None:
    assert do()


@call("SamplingClient.from_sampler_handle")
@call("SamplingClient.from_sampler_handle", "api_key")
def from_sampler_handle(lab: Lab, do: Any) -> None:
    clone = do(lab.sampler.get_sampler_handle(), api_key="tml-test")
    assert sequences(clone) == sequences(lab.sampler)


@call("SamplingClient.create")
@call("SamplingClient.create", "base_model", "retry_config")
def create(lab: Lab, do: Any) -> None:
    made = do(lab.service.holder, base_model=lab.base_model, retry_config=RetryConfig())
    assert len(sequences(made)[0]) == 4


@call("SamplingClient.create", "model_path", "record_stability_info")
def create_of_saved(lab: Lab, do: Any) -> None:
    made = do(lab.service.holder, model_path=lab.sampler_weights, record_stability_info=True)
    assert made.get_base_model() == lab.base_model


@call("SamplingClient.create", "sampling_session_id")
def create_of_known(lab: Lab, do: Any) -> None:
    other = lab.service.create_sampling_client(model_path=lab.sampler_weights).result(LIMIT_S)
    made = do(lab.service.holder, sampling_session_id=other._sampling_session_id)
    assert sequences(made) == sequences(lab.sampler)


@call("SamplingClient.on_queue_state_change")
def on_queue_state_change(lab: Lab, do: Any) -> None:
    do(QueueState.ACTIVE, None)


# ---- what a response holds ----


@call("SampleResponse.prompt_logprobs")
@call("SampleResponse.topk_prompt_logprobs")
def per_prompt_token(lab: Lab, do: Any) -> None:
    assert len(do()) == NUM_TOKENS


@call("SampledSequence.tokens")
@call("SampledSequence.logprobs")
@call("SampledSequence.topk_logprobs")
def per_sampled_token(lab: Lab, do: Any) -> None:
    assert len(do()) == SHORT.max_tokens
