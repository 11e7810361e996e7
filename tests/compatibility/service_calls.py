"""Calls of ServiceClient, of futures, and of tinker.auth."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import tinker
from tinker import types
from tinker.lib.retry_handler import RetryConfig

from tests.compatibility import torch_stand_in
from tests.compatibility.lab import LIMIT_S, PROMPT, SHORT, CommandRefused, Lab, datum, negative_sum
from tests.compatibility.registry import call


def session_of(lab: Lab, client: tinker.ServiceClient) -> types.GetSessionResponse:
    return lab.rest.get_session(client.holder.get_session_id()).result(LIMIT_S)


def sequences(sampler: tinker.SamplingClient) -> list[list[int]]:
    return [list(row.tokens) for row in sampler.sample(PROMPT, 1, SHORT).result(LIMIT_S).sequences]


def loss_of(training: tinker.TrainingClient) -> float:
    return training.forward([datum()], "cross_entropy").result(LIMIT_S).metrics["loss:sum"]


# ---- constructors ----


@call("ServiceClient()")
@call("ServiceClient()", "base_url")
def service_client(lab: Lab, do: Any) -> None:
    with do() as client:
        assert client.holder.get_session_id()


@call("ServiceClient()", "user_metadata", "display_name")
def service_client_described(lab: Lab, do: Any) -> None:
    with do(user_metadata={"colour": "red"}, display_name="A name") as client:
        session = session_of(lab, client)
    assert session.user_metadata == {"colour": "red"}
    assert session.display_name == "A name"


@call("ServiceClient()", "project_id")
def service_client_in_a_project(lab: Lab, do: Any) -> None:
    with do(project_id="project-of-its-own") as client:
        run = client.create_lora_training_client(lab.base_model, rank=4).result(LIMIT_S).get_info().model_id
    listed = lab.rest.list_training_runs(project_id="project-of-its-own").result(LIMIT_S).training_runs
    assert run in [row.training_run_id for row in listed]


@call("ServiceClient()", "api_key", "default_headers_overrides")
def service_client_with_a_key(lab: Lab, do: Any) -> None:
    with do(api_key="tml-another", default_headers_overrides={"X-Of-The-User": "1"}) as client:
        assert client.holder.get_session_id()


# ---- its methods ----


@call("ServiceClient.create_lora_training_client")
def create_lora(lab: Lab, do: Any) -> None:
    assert do(lab.base_model).get_info().lora_rank == 32


@call("ServiceClient.create_lora_training_client", "rank", "seed", "optimizer=AdamOptimizerConfig")
def create_lora_of(lab: Lab, do: Any) -> None:
    one, two = (do(lab.base_model, rank=2, seed=5, optimizer=types.AdamOptimizerConfig()) for _ in range(2))
    assert one.get_info().lora_rank == 2
    assert loss_of(one) == loss_of(two)


@call("ServiceClient.create_lora_training_client", "train_mlp", "train_attn", "train_unembed")
def create_lora_on(lab: Lab, do: Any) -> None:
    for choice in ("train_mlp", "train_attn", "train_unembed"):
        training = do(lab.base_model, rank=4, **{choice: False})
        path = training.save_state(lab.name()).result(LIMIT_S).path
        info = lab.rest.get_weights_info_by_tinker_path(path).result(LIMIT_S)
        assert {name: getattr(info, name) for name in ("train_mlp", "train_attn", "train_unembed")} == {
            name: name != choice for name in ("train_mlp", "train_attn", "train_unembed")
        }


@call("ServiceClient.create_lora_training_client", "user_metadata")
def create_lora_described(lab: Lab, do: Any) -> None:
    run = do(lab.base_model, rank=4, user_metadata={"colour": "green"}).get_info().model_id
    assert lab.rest.get_training_run(run).result(LIMIT_S).user_metadata == {"colour": "green"}


@call("ServiceClient.create_lora_training_client", "optimizer=DimuonOptimizerConfig", refused="adamw")
@call("DimuonOptimizerConfig", "version", refused="adamw")
def create_lora_dimuon(lab: Lab, do: Any) -> None:
    lab.new_training(optimizer=types.DimuonOptimizerConfig(version=1))


@call("ServiceClient.create_training_client_from_state")
@call("ServiceClient.create_training_client_from_state_with_optimizer")
def from_state(lab: Lab, do: Any) -> None:
    assert loss_of(do(lab.weights)) == loss_of(lab.training)


@call(
    "ServiceClient.create_training_client_from_state",
    "base_model",
    "user_metadata",
    "weights_access_token",
    "optimizer",
)
def from_state_with(lab: Lab, do: Any) -> None:
    given = {"base_model": lab.base_model, "user_metadata": {"colour": "blue"}, "weights_access_token": "token"}
    training = do(lab.weights, optimizer=types.AdamOptimizerConfig(), **given)
    run = lab.rest.get_training_run(training.get_info().model_id).result(LIMIT_S)
    assert run.user_metadata == {"colour": "blue"}
    assert run.base_model == lab.base_model


@call(
    "ServiceClient.create_training_client_from_state_with_optimizer",
    "base_model",
    "user_metadata",
    "weights_access_token",
)
def from_state_with_optimizer(lab: Lab, do: Any) -> None:
    given = {"base_model": lab.base_model, "user_metadata": {"colour": "blue"}, "weights_access_token": "token"}
    training = do(lab.weights, **given)
    assert lab.rest.get_training_run(training.get_info().model_id).result(LIMIT_S).user_metadata == {"colour": "blue"}


@call("ServiceClient.create_sampling_client")
@call("ServiceClient.create_sampling_client", "base_model", "retry_config")
def create_sampling(lab: Lab, do: Any) -> None:
    sampler = do(base_model=lab.base_model, retry_config=RetryConfig(retry_delay_base=0.1))
    assert sampler.get_base_model() == lab.base_model
    assert len(sequences(sampler)[0]) == 4


@call("ServiceClient.create_sampling_client", "model_path", "record_stability_info")
def create_sampling_of_saved(lab: Lab, do: Any) -> None:
    sampler = do(model_path=lab.sampler_weights, record_stability_info=True)
    assert sequences(sampler) == sequences(lab.sampler)


@call("ServiceClient.create_custom_loss")
def create_custom_loss(lab: Lab, do: Any) -> None:
    with torch_stand_in.installed():
        assert do(negative_sum, {"logprobs": 1}).name == "negative_sum"


@call("ServiceClient.create_custom_loss", "custom_loss_server_side", refused="no losses that the server computes")
def create_custom_loss_on_the_server(lab: Lab, do: Any) -> None:
    graph = {"format": 1, "nodes": [{"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": []}]}
    inputs = [{"name": "logprobs", "rank": 1}]
    body = {"session_id": lab.session_id, "custom_loss_seq_id": 0, "name": "mine", "inputs": inputs, "graph": graph}
    reply = lab.post_raw("create_custom_loss", body)
    if reply.status_code != 200:
        raise CommandRefused(reply.json()["detail"])


@call("ServiceClient.copy_weights")
@call("ServiceClient.copy_weights", "ttl_seconds", "weights_access_token")
def copy_weights(lab: Lab, do: Any) -> None:
    copied = do(lab.weights, ttl_seconds=3600, weights_access_token="token")
    assert copied != lab.weights
    assert lab.checkpoint(copied).expires_at is not None


@call("ServiceClient.create_rest_client")
def create_rest_client(lab: Lab, do: Any) -> None:
    assert do().get_session(lab.session_id).result(LIMIT_S).user_metadata == {"made": "lab"}


@call("ServiceClient.get_console_url")
@call("TrainingClient.get_console_url")
def console_url(lab: Lab, do: Any) -> None:
    assert do().startswith("https://")  # the hosted console; made by the client


@call("ServiceClient.get_server_capabilities")
@call("RestClient.get_server_capabilities")
def capabilities(lab: Lab, do: Any) -> None:
    models = {model.model_name: model for model in do().supported_models}
    assert models[lab.base_model].max_context_length == 512


@call("ServiceClient.get_telemetry")
@call("TrainingClient.get_telemetry")
@call("SamplingClient.get_telemetry")
@call("RestClient.get_telemetry")
@call("AdminClient.get_telemetry")
def telemetry(lab: Lab, do: Any) -> None:
    do()  # None where TINKER_TELEMETRY is off


@call("ServiceClient.holder")
def holder(lab: Lab, do: Any) -> None:
    assert do().get_session_id() == lab.session_id


@call("ServiceClient.close", "status=success")
@call("ServiceClient.close")
def close(lab: Lab, do: Any) -> None:
    _close(lab, do, "success")


@call("ServiceClient.close", "status=errored", "detail")
def close_errored(lab: Lab, do: Any) -> None:
    _close(lab, do, "errored", detail="it broke")


@call("ServiceClient.close", "status=interrupted")
def close_interrupted(lab: Lab, do: Any) -> None:
    _close(lab, do, "interrupted")


def _close(lab: Lab, do: Any, status: str, **options: str) -> None:
    """A finished session takes no more models."""
    client = tinker.ServiceClient(base_url=lab.url)
    session_id = client.holder.get_session_id()
    do.on(client)(status, **options)
    refused = lab.post_raw("create_sampling_session", {"session_id": session_id, "base_model": lab.base_model})
    assert refused.status_code == 400, refused.text


# ---- futures ----


@call("APIFuture.result")
@call("APIFuture.result", "timeout")
def result(lab: Lab, do: Any) -> None:
    assert do(LIMIT_S)


@call("APIFuture.coroutine")
def coroutine(lab: Lab, do: Any) -> None:
    assert do()


@call("APIFuture.future")
def future(lab: Lab, do: Any) -> None:
    made = do()
    assert isinstance(made, Future)
    assert made.result(LIMIT_S)


# ---- custom losses' handles ----


@call("LossHandle.input_names")
def input_names(lab: Lab, do: Any) -> None:
    assert do() == ()


@call("LossHandle.key")
def key(lab: Lab, do: Any) -> None:
    assert len(do()) == 64


# ---- tinker.auth ----


@call("auth.get_tinker_token")
def token(lab: Lab, do: Any) -> None:
    assert do() == "tml-test"


@call("auth.tinker_has_credentials")
def credentials(lab: Lab, do: Any) -> None:
    assert do() is True


@call("auth.raise_if_tinker_not_accessible")
def accessible(lab: Lab, do: Any) -> None:
    do()
