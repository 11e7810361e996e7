"""Calls of TrainingClient and of what it takes: losses, optimizers, kinds of input."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import tinker
from tinker import types
from tinker.lib.retry_handler import RetryConfig

from tests.compatibility import torch_stand_in
from tests.compatibility.lab import LIMIT_S, PROMPT, SHORT, Lab, datum, negative_sum, policy_datum, recorded_datum
from tests.compatibility.registry import call
from tests.compatibility.service_calls import loss_of, sequences

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63600000000200015f8c21bc0000000049454e44ae426082"
)
"""A PNG of one pixel."""

RECIPIENT = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"
"""A public key of age, from its documentation."""


# ---- passes ----


@call("TrainingClient.forward")
@call("TrainingClient.forward_backward")
def cross_entropy(lab: Lab, do: Any) -> None:
    output = do([datum(), datum(5, seed=2)], "cross_entropy")
    logprobs = [np.asarray(row["logprobs"].data) for row in output.loss_fn_outputs]
    assert [row.shape for row in logprobs] == [(8,), (5,)]
    np.testing.assert_allclose(output.metrics["loss:sum"], -sum(row.sum() for row in logprobs), rtol=1e-5)


@call("TrainingClient.forward", "loss_fn=cross_entropy")
@call("TrainingClient.forward_backward", "loss_fn=cross_entropy")
def several_targets(lab: Lab, do: Any) -> None:
    inputs = {"target_tokens": np.full((6, 3), 9, np.int64), "weights": np.full((6, 3), 0.5, np.float32)}
    output = do([types.Datum(model_input=PROMPT, loss_fn_inputs=inputs)], "cross_entropy")
    assert np.asarray(output.loss_fn_outputs[0]["logprobs"].to_numpy()).shape == (6, 3)


def policy(name: str, *extra: str, **config: float) -> Any:
    def run(lab: Lab, do: Any) -> None:
        reply = lab.sampler.sample(PROMPT, 1, SHORT).result(LIMIT_S).sequences[0]
        output = do([policy_datum(reply, *extra)], name, config or None)
        got = np.asarray(output.loss_fn_outputs[0]["logprobs"].data)[PROMPT.length - 1 :]
        np.testing.assert_allclose(got, reply.logprobs, atol=1e-3)
        assert np.isfinite(output.metrics["loss:sum"])

    return run


for method in ("TrainingClient.forward", "TrainingClient.forward_backward"):
    call(method, "loss_fn=importance_sampling")(policy("importance_sampling"))
    call(method, "loss_fn=ppo", "loss_fn_config")(policy("ppo", clip_low_threshold=0.9, clip_high_threshold=1.1))
    call(method, "loss_fn=cispo")(policy("cispo", clip_high_threshold=3.0))
    call(method, "loss_fn=dro")(policy("dro", beta=0.1))
    call(method, "loss_fn=gspo")(policy("gspo", "sequence_ratio_mask"))


@call("TrainingClient.forward", "loss_fn=stable_reinforce")
@call("TrainingClient.forward_backward", "loss_fn=stable_reinforce")
def stable_reinforce(lab: Lab, do: Any) -> None:
    reply = lab.recording_sampler.sample(PROMPT, 1, SHORT).result(LIMIT_S).sequences[0]
    output = do([recorded_datum(reply)], "stable_reinforce", {"kl_coeff": 0.1})
    assert np.isfinite(output.metrics["loss:sum"])


@call("TrainingClient.forward", "loss_fn=custom", refused="loss_fn")
@call("TrainingClient.forward_backward", "loss_fn=custom", refused="loss_fn")
def custom_on_the_server(lab: Lab, do: Any) -> None:
    do([datum()], "custom", {"loss_id": "loss-0"})


@call("TrainingClient.forward_backward_custom")
@call("TrainingClient.forward_backward_custom", "loss_type_input")
def custom(lab: Lab, do: Any) -> None:
    def loss(data: list[types.Datum], logprobs: list[Any]) -> Any:
        return negative_sum(logprobs[0])

    with torch_stand_in.installed():
        output = do([datum()], loss, loss_type_input="logprobs")
    plain = output.metrics["surrogate_loss:sum"]
    np.testing.assert_allclose([output.metrics["loss:sum"], output.metrics["custom/negative_sum:sum"].item()], plain)


@call("TrainingClient.forward_backward_custom", "loss_fn=LossHandle")
def custom_by_handle(lab: Lab, do: Any) -> None:
    handle = lab.new_loss()
    with torch_stand_in.installed():
        output = do([datum()], handle)
    np.testing.assert_allclose(output.metrics["loss:sum"], output.metrics["surrogate_loss:sum"])


@call("TrainingClient.forward_backward", "model_input=EncodedTextChunk")
def text_in_chunks(lab: Lab, do: Any) -> None:
    inputs = {"target_tokens": [2, 3, 4], "weights": [1.0] * 3}
    chunks = [types.EncodedTextChunk(tokens=[1, 2]), types.EncodedTextChunk(tokens=[3])]
    output = do([types.Datum(model_input=types.ModelInput(chunks=chunks), loss_fn_inputs=inputs)], "cross_entropy")
    assert len(output.loss_fn_outputs[0]["logprobs"].data) == 3


def with_chunk(chunk: types.ModelInputChunk) -> types.Datum:
    model_input = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[1, 2]), chunk])
    return types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0] * 3})


@call("TrainingClient.forward_backward", "model_input=ImageChunk", refused="image")
def train_on_image(lab: Lab, do: Any) -> None:
    do([with_chunk(types.ImageChunk(data=PIXEL, format="png", expected_tokens=1))], "cross_entropy")


@call("TrainingClient.forward_backward", "model_input=ImageAssetPointerChunk", refused="ImageAssetPointerChunk")
def train_on_pointer(lab: Lab, do: Any) -> None:
    chunk = types.ImageAssetPointerChunk(location="file:///a.png", format="png", expected_tokens=1)
    do([with_chunk(chunk)], "cross_entropy")


@call("TrainingClient.forward_backward", "model_input=DmelChunk", refused="dmel|audio")
def train_on_audio(lab: Lab, do: Any) -> None:
    do([with_chunk(types.DmelChunk(dmel=b"\0" * 8))], "cross_entropy")


# ---- steps ----


@call("TrainingClient.optim_step")
@call("TrainingClient.optim_step", "optim_params=AdamParams")
def optim_step(lab: Lab, do: Any) -> None:
    do(types.AdamParams(learning_rate=0.0))  # other calls want the weights as they are


@call("TrainingClient.optim_step", "adam_params")
def optim_step_by_its_old_name(lab: Lab, do: Any) -> None:
    do(adam_params=types.AdamParams(learning_rate=0.0))


@call("TrainingClient.optim_step", "optim_params=DimuonParams", refused="optimizer_params")
@call("DimuonParams", "learning_rate", "beta1", "grad_clip_norm", refused="optimizer_params")
def dimuon(lab: Lab, do: Any) -> None:
    params = types.DimuonParams(learning_rate=1e-2, beta1=0.9, grad_clip_norm=1.0)
    lab.training.optim_step(params).result(LIMIT_S)


@call("AdamParams", "learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
def adam_params(lab: Lab, do: Any) -> None:
    training = lab.new_training()
    before = loss_of(training)
    training.forward_backward([datum()], "cross_entropy").result(LIMIT_S)
    params = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.1, "grad_clip_norm": 0.5}
    metrics = training.optim_step(types.AdamParams(learning_rate=1e-2, **params)).result(LIMIT_S).metrics
    assert metrics["grad_norm:mean"] > 0
    assert loss_of(training) < before


# ---- what the model is ----


@call("TrainingClient.get_info")
def get_info(lab: Lab, do: Any) -> None:
    info = do()
    assert (info.model_data.model_name, info.is_lora, info.lora_rank) == (lab.base_model, True, 4)


@call("TrainingClient.get_tokenizer")
@call("SamplingClient.get_tokenizer")
def get_tokenizer(lab: Lab, do: Any) -> None:
    with contextlib.chdir(lab.folder):  # it lies there under the model's name, as it does on the Hub
        tokenizer = do()
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"


# ---- checkpoints ----


@call("TrainingClient.save_state")
def save_state(lab: Lab, do: Any) -> None:
    name = lab.name()
    path = do(name).path
    assert path.endswith(f"/weights/{name}")
    assert lab.checkpoint(path).checkpoint_type == "training"


@call("TrainingClient.save_state", "ttl_seconds", "user_metadata")
def save_state_with(lab: Lab, do: Any) -> None:
    saved = lab.checkpoint(do(lab.name(), ttl_seconds=3600, user_metadata={"step": "1"}).path)
    assert saved.expires_at is not None
    assert saved.user_metadata == {"step": "1"}


@call("TrainingClient.save_state", "overwrite")
def save_state_again(lab: Lab, do: Any) -> None:
    name = lab.name()
    assert do(name).path == do(name, overwrite=True).path


@call("TrainingClient.load_state")
@call("TrainingClient.load_state_with_optimizer")
def load_state(lab: Lab, do: Any) -> None:
    do(lab.weights)


@call("TrainingClient.load_state", "weights_access_token")
@call("TrainingClient.load_state_with_optimizer", "weights_access_token")
def load_state_of_others(lab: Lab, do: Any) -> None:
    do(lab.weights, weights_access_token="token")


@call("TrainingClient.save_weights_for_sampler")
def save_weights_for_sampler(lab: Lab, do: Any) -> None:
    name = lab.name()
    path = do(name).path
    assert path.endswith(f"/sampler_weights/{name}")
    sampler = lab.service.create_sampling_client(model_path=path).result(LIMIT_S)
    assert len(sequences(sampler)[0]) == 4


@call("TrainingClient.save_weights_for_sampler", "ttl_seconds", "user_metadata")
def save_weights_for_sampler_with(lab: Lab, do: Any) -> None:
    saved = lab.checkpoint(do(lab.name(), ttl_seconds=3600, user_metadata={"step": "1"}).path)
    assert saved.expires_at is not None
    assert saved.user_metadata == {"step": "1"}


@call("TrainingClient.save_weights_external")
def save_weights_external(lab: Lab, do: Any) -> None:
    name = lab.name()
    path = do(name).path
    assert path.endswith(f"/external_weights/{name}")
    assert lab.checkpoint(path).checkpoint_type == "external"


@call("TrainingClient.save_weights_external", "ttl_seconds")
def save_weights_external_for_a_while(lab: Lab, do: Any) -> None:
    assert lab.checkpoint(do(lab.name(), ttl_seconds=3600).path).expires_at is not None


@call("TrainingClient.save_weights_external", "age_encryption_recipients")
def save_weights_external_encrypted(lab: Lab, do: Any) -> None:
    path = do(lab.name(), age_encryption_recipients=[RECIPIENT]).path
    urls = lab.rest.get_external_weights_urls(path).result(LIMIT_S).urls
    assert all(name.endswith(".age") for name in urls)
    assert all(lab.download(url).startswith(b"age-encryption.org/v1") for url in urls.values())


# ---- sampling clients ----


@call("TrainingClient.save_weights_and_get_sampling_client")
@call("TrainingClient.save_weights_and_get_sampling_client", "kind=snapshot")
def snapshot(lab: Lab, do: Any) -> None:
    assert len(sequences(do(kind="snapshot"))[0]) == 4


@call("TrainingClient.save_weights_and_get_sampling_client", "kind=inflight")
def inflight(lab: Lab, do: Any) -> None:
    assert len(sequences(do(kind="inflight"))[0]) == 4


@call("TrainingClient.save_weights_and_get_sampling_client", "name", "retry_config", "record_stability_info")
def snapshot_with(lab: Lab, do: Any) -> None:
    sampler = do(name=lab.name(), retry_config=RetryConfig(), record_stability_info=True)
    assert sampler.sample(PROMPT, 1, SHORT).result(LIMIT_S).sequences[0].sequence_id


@call("TrainingClient.create_sampling_client")
@call("TrainingClient.create_sampling_client", "retry_config", "record_stability_info")
def create_sampling_client(lab: Lab, do: Any) -> None:
    sampler = do(lab.sampler_weights, retry_config=RetryConfig(), record_stability_info=True)
    assert isinstance(sampler, tinker.SamplingClient)
    assert len(sequences(sampler)[0]) == 4
