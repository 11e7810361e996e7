"""After warm-up, requests of the usual shapes compile nothing; before it, each of them would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.compilations import compilations
from tests.worker.sampler import random_state
from tx.models.loading import read_config
from tx.types import AdamParams, Datum, Finished, ForwardBackward, LoraConfig, SampleRequest, SamplingParams
from tx.worker.ahead import compiling
from tx.worker.usual import usual_ranks
from tx.worker.worker import Worker

MAX_RANK = 8
ADAM = AdamParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def names() -> list[str]:
    return []


@pytest.fixture(scope="module")
def worker(tiny_qwen3: Path, names: list[str]) -> Worker:
    limits = {"train_micro_batch_tokens": 64, "sample_max_num_sequences": 16}
    worker = Worker(tiny_qwen3, "tiny/qwen3", max_lora_adapters=4, max_lora_rank=MAX_RANK, **limits)
    for step in worker.warm_up():
        names.append(step.name)
        step.run(compiling)
    return worker


def test_usual_ranks_are_one_per_padded_size() -> None:
    assert usual_ranks(32) == [8, 32]
    assert usual_ranks(24) == [8, 24]
    assert usual_ranks(64) == [8, 32, 64]
    assert usual_ranks(6) == [6]


def test_steps_have_names_of_their_own(worker: Worker, names: list[str]) -> None:
    assert len(names) == len(set(names))
    assert sum("rank 8" in name for name in names) > 10


def drain(worker: Worker) -> list[Finished]:
    done: list[Finished] = []
    while worker.training or worker.sampling:
        done += worker.train_slice() if worker.training else []
        done += worker.sample_slice() if worker.sampling else []
    assert all(finished.error is None for finished in done)
    return done


def submit(worker: Worker, rng: np.random.Generator, model_id: str, lengths: list[int], forward_only: bool) -> None:
    data = []
    for length in lengths:
        inputs = {"target_tokens": rng.integers(0, 2000, length), "logprobs": rng.normal(-1, 0.1, length)}
        inputs["advantages"] = rng.normal(0, 1, length)
        data.append(Datum(rng.integers(0, 2000, length).astype(np.int32), inputs))
    worker.submit_forward_backward(1, ForwardBackward(model_id, 0, tuple(data), "ppo", {}, forward_only))


@pytest.mark.parametrize("rank", [8, 6])
def test_training_of_usual_shapes_compiles_nothing(worker: Worker, rank: int) -> None:
    rng, model_id = np.random.default_rng(rank), f"model-{rank}"
    with compilations() as compiled:
        worker.create_model(model_id, LoraConfig(rank, seed=1))
        for lengths in ([16], [1], [3, 17, 30], [64, 64, 5], list(range(1, 50))):
            for forward_only in (True, False, False):
                submit(worker, rng, model_id, lengths, forward_only)
                drain(worker)
            worker.optim_step(model_id, ADAM)
        worker.restore_model(model_id, worker.export_model(model_id), with_optimizer=True)
        submit(worker, rng, model_id, [64, 64], forward_only=False)
        drain(worker)
        worker.park_model(model_id)  # with gradients
        submit(worker, rng, model_id, [64, 64], forward_only=False)
        drain(worker)
        worker.optim_step(model_id, ADAM)
        worker.optim_step(model_id, ADAM)  # without gradients
        worker.take_snapshot(model_id, f"of {model_id}")
    worker.drop_model(model_id)
    assert compiled == []


def sample(rng: np.random.Generator, length: int, num_samples: int, **params: object) -> SampleRequest:
    values = {"max_tokens": int(rng.integers(1, 257 - length)), "seed": 3, "stop_on_eos": False} | params
    return SampleRequest(rng.integers(0, 2000, length).astype(np.int32), num_samples, SamplingParams(**values))


@pytest.mark.parametrize("source", ["base", "taken", "stepped", "loaded"])
def test_sampling_of_usual_shapes_compiles_nothing(worker: Worker, tiny_qwen3: Path, source: str) -> None:
    rng, snapshot = np.random.default_rng(0), None if source == "base" else f"sampler-{source}"
    state = random_state(read_config(tiny_qwen3), 8, 1)
    with compilations() as compiled:
        if source == "loaded":
            worker.load_snapshot("sampler-loaded", state)
        elif snapshot is not None:
            worker.create_model(source, LoraConfig(8, seed=1))
            if source == "stepped":
                submit(worker, rng, source, [20], forward_only=False)
                drain(worker)
                worker.optim_step(source, ADAM)
            worker.take_snapshot(source, snapshot)
        for length in (1, 2, 31, 40, 64, 65, 100, 129, 200, 255):
            worker.submit_sample(2, sample(rng, length, int(rng.integers(1, 17)), top_p=0.9), snapshot)
            drain(worker)
        for request_id in range(16):  # they arrive one by one and end one by one: batch and pool grow and shrink
            worker.submit_sample(request_id, sample(rng, int(rng.integers(1, 200)), 1, temperature=0.5), snapshot)
            worker.sample_slice()
        drain(worker)
        begin = rng.integers(0, 2000, 250).astype(np.int32)
        for shared, length in ((64, 65), (70, 100), (130, 150), (64, 200), (200, 230), (250, 251)):
            request = sample(rng, length, 2)
            request.prompt[:shared] = begin[:shared]
            worker.submit_sample(3, request, snapshot)
            drain(worker)
        for request_id in range(8):  # together: their prompts share programs
            worker.submit_sample(request_id, sample(rng, 20 + request_id // 4, 2), snapshot)
        drain(worker)
    worker.drop_model(source)
    assert compiled == []
