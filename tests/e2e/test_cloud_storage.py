"""Real processes and the real SDK with checkpoints in a bucket: save, resume, sample, restart, delete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.e2e.test_two_tenants import example
from tests.support.object_stores import S3Server
from tests.support.server import BASE_MODEL, Server

PROMPT = types.ModelInput.from_ints([5, 6, 7, 8])


@pytest.fixture(scope="module")
def bucket_server(s3_server: S3Server, tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    s3_server.make_bucket("e2e")
    flags = ("--checkpoints-base", "s3://e2e/team/tx")
    with Server(tiny_qwen3, tmp_path_factory.mktemp("bucket"), *flags, variables=s3_server.environment) as running:
        yield running


def step(training: tinker.TrainingClient) -> float:
    result = training.forward_backward([example(1, 9), example(2, 30)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    return result.result().metrics["loss:sum"]


def test_a_run_is_saved_to_a_bucket_and_resumed_from_it_after_a_restart(bucket_server, s3_server):
    with tinker.ServiceClient(base_url=bucket_server.url) as client:
        training = client.create_lora_training_client(BASE_MODEL, rank=4, seed=3).result()
        losses = [step(training)]
        path = training.save_state("ck").result().path
        losses += [step(training)]
        assert training.save_state("ck", overwrite=True).result().path == path
        losses += [step(training), step(training)]
        sampler_path = training.save_weights_for_sampler("s").result().path
        expected = client.create_sampling_client(model_path=sampler_path).result().compute_logprobs(PROMPT).result()
    run = path.split("/")[2]
    keys = s3_server.keys("e2e")
    assert sum(key.startswith(f"team/tx/{run}/weights/ck") for key in keys) == 4, "a card and three files, once"
    assert not (bucket_server.folder / "checkpoints").exists()

    bucket_server.stop()
    bucket_server.start()
    with tinker.ServiceClient(base_url=bucket_server.url) as client:
        resumed = client.create_training_client_from_state_with_optimizer(path).result()
        assert [step(resumed), step(resumed)] == losses[2:]
        sampler = client.create_sampling_client(model_path=sampler_path).result()
        assert sampler.compute_logprobs(PROMPT).result() == expected
        rest = tinker.RestClient(base_url=bucket_server.url)
        rest.delete_checkpoint_from_tinker_path(path).result()
        assert not [key for key in s3_server.keys("e2e") if "/weights/ck/" in key]
        with pytest.raises(tinker.RequestFailedError, match="weights/ck"):
            client.create_training_client_from_state_with_optimizer(path).result()
