"""Everything that a version of the SDK can do, one function each, in the order in which they run.

A feature returns the numbers that it must have in common with every other version.
"""

from __future__ import annotations

import io
import os
import tarfile
import urllib.request
from collections.abc import Callable
from typing import Any

import tinker
from client import (
    PROMPT,
    SAMPLING,
    Absent,
    Client,
    adam,
    done,
    drawn,
    expect_equal,
    floats,
    logprobs_of,
    method,
    output,
    reinforced,
    samples,
    step,
    supervised,
    tensor,
)
from tinker import types

VERSION = tuple(int(part) for part in tinker.__version__.split("."))
NAMES_OPTIMIZER = (0, 6)
"""Before it, the SDK has one way to load a state, which is documented to restore the optimizer too."""

Feature = Callable[[Client], Any]
FEATURES: dict[str, tuple[Feature, float]] = {}
"""Label to what to do, in the order in which they run, and by how much floats may differ between versions. Each
returns the numbers that all versions must share."""


def feature(label: str, tolerance: float = 0.0) -> Callable[[Feature], Feature]:
    """Register a feature under the name that the table gives it."""

    def register(run: Feature) -> Feature:
        FEATURES[label] = run, tolerance
        return run

    return register


# ---- training ---------------------------------------------------------------------------------------------------


@feature("capabilities")
def _(client: Client) -> Any:
    names = [model.model_name for model in client.service.get_server_capabilities().supported_models]
    assert client.base_model in names, names
    return client.base_model


@feature("create a model")
def _(client: Client) -> Any:
    create = client.service.create_lora_training_client
    client.training = done(create(base_model=client.base_model, rank=4, seed=7, user_metadata={"purpose": "matrix"}))
    info = done(client.training.get_info())
    client.run_id = info.model_id
    return [info.model_data.model_name, info.is_lora]


@feature("tokenizer")
def _(client: Client) -> Any:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise Absent("SDK 0.3 doesn't bring transformers") from None
    return client.training.get_tokenizer().encode("Hello, world")


@feature("forward")
def _(client: Client) -> Any:
    return output(client.training.forward(supervised(), "cross_entropy").result())


@feature("forward_backward: cross_entropy")
def _(client: Client) -> Any:
    return output(client.training.forward_backward(supervised(), "cross_entropy").result())


@feature("forward_backward: importance_sampling")
def _(client: Client) -> Any:
    return output(client.training.forward_backward(reinforced(), "importance_sampling").result())


@feature("forward_backward: ppo with a config")
def _(client: Client) -> Any:
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    return output(client.training.forward_backward(reinforced(), "ppo", config).result())


@feature("optim_step")
def _(client: Client) -> Any:
    client.training.optim_step(adam()).result()
    return logprobs_of(client.training)


@feature("optim_step: decay, clipping")
def _(client: Client) -> Any:
    if "weight_decay" not in types.AdamParams.model_fields:
        raise Absent("weight_decay")
    other = client.another_model()
    params = types.AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=0.5)
    other.forward_backward(supervised(), "cross_entropy").result()
    other.optim_step(params).result()
    return logprobs_of(other)


@feature("training data as JSON or protobuf (`proto_write_fwdbwd`)")
def _(client: Client) -> Any:
    other = client.another_model()

    def passes() -> Any:
        forward = output(other.forward(supervised(), "cross_entropy").result())
        return [forward, output(other.forward_backward(reinforced(), "ppo").result())]

    return client.both_ways("proto_write_fwdbwd", passes)


@feature("pipelined steps")
def _(client: Client) -> Any:
    pending = []
    for _ in range(3):
        pending.append(client.training.forward_backward(supervised(), "cross_entropy"))
        client.training.optim_step(adam())
    return [output(each.result()) for each in pending]


@feature("chunked forward_backward")
def _(client: Client) -> Any:
    # 400 datums are four chunks before SDK 0.7 and one since: the sums are equal to rounding, not the same bits.
    result = output(client.training.forward(supervised() * 134, "cross_entropy").result())
    assert len(result["logprobs"]) == 402
    return {"loss": round(result["loss"], 1)}


@feature("custom loss")
def _(client: Client) -> Any:
    def squares(data: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        total = (logprobs[0] * logprobs[0]).sum()
        for each in logprobs[1:]:
            total = total + (each * each).sum()
        return total, {"squares": float(total.item())}

    result = client.training.forward_backward_custom(supervised(), squares).result()
    client.training.optim_step(adam()).result()
    return [float(result.metrics["squares"]), logprobs_of(client.training)]


# ---- state ------------------------------------------------------------------------------------------------------


@feature("save_state")
def _(client: Client) -> Any:
    client.state = client.training.save_state("state").result().path
    client.logprobs_at_state = logprobs_of(client.training)
    return client.state == f"tinker://{client.run_id}/weights/state"


@feature("save_weights_for_sampler")
def _(client: Client) -> Any:
    client.sampler_path = client.training.save_weights_for_sampler("sampler").result().path
    return client.sampler_path == f"tinker://{client.run_id}/sampler_weights/sampler"


@feature("resume")
def _(client: Client) -> Any:
    resumed = done(client.service.create_training_client_from_state(client.state))
    expect_equal(logprobs_of(resumed), client.logprobs_at_state)
    return client.logprobs_at_state


@feature("resume: in one request or several (`create_model_via_load_weights`)")
def _(client: Client) -> Any:
    create = client.service.create_training_client_from_state
    return client.both_ways("create_model_via_load_weights", lambda: logprobs_of(done(create(client.state))))


@feature("resume with the optimizer")
def _(client: Client) -> Any:
    service = client.service
    if VERSION < NAMES_OPTIMIZER:
        resumed = done(service.create_training_client_from_state(client.state))
    else:
        resumed = done(service.create_training_client_from_state_with_optimizer(client.state))
    step(resumed), step(client.training)
    expect_equal(logprobs_of(resumed), logprobs_of(client.training))
    return logprobs_of(resumed)


@feature("load_state")
def _(client: Client) -> Any:
    client.training.load_state(client.state).result()
    expect_equal(logprobs_of(client.training), client.logprobs_at_state)
    return client.logprobs_at_state


@feature("load_state with the optimizer")
def _(client: Client) -> Any:
    if VERSION < NAMES_OPTIMIZER:
        client.training.load_state(client.state).result()
    else:
        client.training.load_state_with_optimizer(client.state).result()
    step(client.training)
    return logprobs_of(client.training)


# ---- sampling ---------------------------------------------------------------------------------------------------


@feature("sample: a saved sampler", SAMPLING)
def _(client: Client) -> Any:
    return drawn(samples(done(client.service.create_sampling_client(model_path=client.sampler_path))))


@feature("sample: a snapshot", SAMPLING)
def _(client: Client) -> Any:
    return drawn(samples(done(client.training.save_weights_and_get_sampling_client())))


@feature("sample: the base model", SAMPLING)
def _(client: Client) -> Any:
    return drawn(samples(done(client.service.create_sampling_client(base_model=client.base_model))))


@feature("sample: stops", SAMPLING)
def _(client: Client) -> Any:
    sampler = done(client.service.create_sampling_client(model_path=client.sampler_path))
    ids = types.ModelInput.from_ints(PROMPT)
    free = sampler.sample(ids, 1, types.SamplingParams(max_tokens=6, temperature=0.0)).result().sequences[0]
    stopping = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[int(free.tokens[2])])
    stopped = sampler.sample(ids, 1, stopping).result()
    assert stopped.sequences[0].stop_reason == "stop"
    return drawn(stopped)


@feature("prompt logprobs", SAMPLING)
def _(client: Client) -> Any:
    sampler = done(client.service.create_sampling_client(model_path=client.sampler_path))
    response = samples(sampler, include_prompt_logprobs=True, topk_prompt_logprobs=3)
    top = [each and [[int(token), float(logprob)] for token, logprob in each] for each in response.topk_prompt_logprobs]
    return [drawn(response), floats(response.prompt_logprobs), top]


@feature("compute_logprobs", SAMPLING)
def _(client: Client) -> Any:
    sampler = done(client.service.create_sampling_client(model_path=client.sampler_path))
    computed = floats(sampler.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result())
    expect_equal(computed, floats(samples(sampler, include_prompt_logprobs=True).prompt_logprobs), SAMPLING)
    return computed


@feature("sample: answers alone or in batches (`sample_use_retrieve_futures`)", SAMPLING)
def _(client: Client) -> Any:
    create = client.service.create_sampling_client
    run = lambda: drawn(samples(done(create(model_path=client.sampler_path))))
    return client.both_ways("sample_use_retrieve_futures", run, SAMPLING)


@feature("sample: many at once", SAMPLING)
def _(client: Client) -> Any:
    sampler = done(client.service.create_sampling_client(model_path=client.sampler_path))
    pending = []
    for seed in range(24):
        params = types.SamplingParams(max_tokens=4, temperature=1.0, seed=seed)
        pending.append(sampler.sample(types.ModelInput.from_ints(PROMPT), 1, params))
    return [list(map(int, each.result().sequences[0].tokens)) for each in pending]


@feature("sample: cancel", SAMPLING)
def _(client: Client) -> Any:
    if VERSION < (0, 26):
        raise Absent("cancel_future")
    sampler = done(client.service.create_sampling_client(model_path=client.sampler_path))
    params = types.SamplingParams(max_tokens=400, temperature=1.0, seed=1, stop=[])
    sampler.sample(types.ModelInput.from_ints(PROMPT), 4, params).cancel()
    return drawn(samples(sampler))


# ---- runs and checkpoints ---------------------------------------------------------------------------------------


def listed(client: Client) -> list[list[str]]:
    """Ids and types of the run's checkpoints."""
    found = client.rest.list_checkpoints(client.run_id).result().checkpoints
    return sorted([each.checkpoint_id, each.checkpoint_type] for each in found)


@feature("training runs")
def _(client: Client) -> Any:
    run = client.rest.get_training_run(client.run_id).result()
    same = client.rest.get_training_run_by_tinker_path(client.state).result()
    newest = client.rest.list_training_runs(limit=50).result().training_runs
    assert client.run_id in [each.training_run_id for each in newest]
    assert same.training_run_id == client.run_id
    return [run.base_model, run.is_lora, run.lora_rank, run.corrupted, (run.user_metadata or {}).get("purpose")]


@feature("checkpoints of a run")
def _(client: Client) -> Any:
    return listed(client)


@feature("checkpoints of a user")
def _(client: Client) -> Any:
    found = method(client.rest, "list_user_checkpoints")(limit=50).result().checkpoints
    mine = [each.checkpoint_id for each in found if each.tinker_path.startswith(f"tinker://{client.run_id}/")]
    return sorted(mine)


@feature("weights_info")
def _(client: Client) -> Any:
    info = method(client.rest, "get_weights_info_by_tinker_path")(client.state).result()
    return [info.base_model, info.is_lora, info.lora_rank]


@feature("sessions and samplers")
def _(client: Client) -> Any:
    sampler = client.run_id.split(":")[0]
    session = method(client.rest, "get_session")(sampler).result()
    assert client.run_id in session.training_run_ids
    assert sampler in client.rest.list_sessions(limit=50).result().sessions
    found = client.rest.get_sampler(sorted(session.sampler_ids)[0]).result()
    return found.base_model


@feature("checkpoint time to live")
def _(client: Client) -> Any:
    set_ttl = method(client.rest, "set_checkpoint_ttl_from_tinker_path")
    expiries = []
    for ttl in (3600, None):
        set_ttl(client.sampler_path, ttl).result()
        found = client.rest.list_checkpoints(client.run_id).result().checkpoints
        (mine,) = [each for each in found if each.tinker_path == client.sampler_path]
        expiries.append(getattr(mine, "expires_at", None))
    assert expiries[1] is None, expiries
    return "expires_at" not in types.Checkpoint.model_fields or expiries[0] is not None


@feature("publish, unpublish")
def _(client: Client) -> Any:
    publish = method(client.rest, "publish_checkpoint_from_tinker_path")
    states = []
    for change in (publish, client.rest.unpublish_checkpoint_from_tinker_path):
        change(client.state).result()
        found = client.rest.list_checkpoints(client.run_id).result().checkpoints
        states += [each.public for each in found if each.tinker_path == client.state]
    return states


@feature("download an archive")
def _(client: Client) -> Any:
    url = method(client.rest, "get_checkpoint_archive_url_from_tinker_path")(client.sampler_path).result().url
    with urllib.request.urlopen(url, timeout=30) as reply, tarfile.open(fileobj=io.BytesIO(reply.read())) as archive:
        names = {name.rpartition("/")[2] for name in archive.getnames()}
    return sorted(names & {"adapter_config.json", "adapter_model.safetensors"})


@feature("external weights")
def _(client: Client) -> Any:
    path = method(client.training, "save_weights_external")("external").result().path
    urls = client.rest.get_external_weights_urls(path).result().urls
    client.rest.delete_checkpoint_from_tinker_path(path).result()
    return sorted(set(urls) & {"adapter_config.json", "adapter_model.safetensors"})


@feature("copy weights", SAMPLING)
def _(client: Client) -> Any:
    os.environ["TINKER_PROJECT_ID"] = "matrix"
    copied = method(client.service, "copy_weights")(client.sampler_path).result()
    path = getattr(copied, "tinker_path", copied)
    return drawn(samples(done(client.service.create_sampling_client(model_path=path))))


@feature("delete a checkpoint")
def _(client: Client) -> Any:
    client.rest.delete_checkpoint_from_tinker_path(client.sampler_path).result()
    assert ["sampler_weights/sampler", "sampler"] not in listed(client)
    try:
        done(client.service.create_sampling_client(model_path=client.sampler_path))
    except tinker.APIStatusError as error:
        return error.status_code
    raise AssertionError("a deleted checkpoint was sampled from")


# ---- the end ----------------------------------------------------------------------------------------------------


@feature("a bad request is refused")
def _(client: Client) -> Any:
    # Its future fails, it isn't retried, and the client goes on.
    bad = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": tensor([1, 999999], "int64"), "weights": tensor([1.0, 1.0], "float32")},
    )
    try:
        client.training.forward([bad], "cross_entropy").result()
        raise AssertionError("a token outside the vocabulary was accepted")
    except tinker.TinkerError as error:
        if "target_tokens" not in str(error):
            raise
    return len(logprobs_of(client.training))


@feature("unload_model")
def _(client: Client) -> Any:
    from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

    holder = client.service.holder

    async def unload() -> Any:
        with holder.aclient(ClientConnectionPoolType.TRAIN) as http:
            request = types.UnloadModelRequest(model_id=client.run_id)
            return (await method(http.models, "unload")(request=request)).request_id

    return bool(done(holder.run_coroutine_threadsafe(unload())))


@feature("finish the session")
def _(client: Client) -> Any:
    done(method(client.service, "close")("success"))
    return True
