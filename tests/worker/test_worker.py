"""The Worker's surface: what the engine may rely on, on a tiny real model."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tx.errors import InvalidInput, NotFound, StartupError
from tx.layers import kv_cache
from tx.models.loading import read_config
from tx.types import AdamParams, Datum, Finished, ForwardBackward, LoraConfig, SampleRequest, SamplingParams
from tx.worker.worker import Worker

ADAM = AdamParams(learning_rate=1e-2, eps=1e-8)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, stop_on_eos=False)


@pytest.fixture(scope="module")
def worker(tiny_qwen3: Path) -> Worker:
    return Worker(tiny_qwen3, "tiny/qwen3", max_lora_adapters=2, max_lora_rank=8)


def cross_entropy(model_id: str, seed: int, lengths: tuple[int, ...] = (5, 9)) -> ForwardBackward:
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        ids = rng.integers(0, 2000, length + 1)
        inputs = {"target_tokens": ids[1:].astype(np.int64), "weights": np.ones(length, np.float32)}
        data.append(Datum(ids[:-1].astype(np.int32), inputs))
    return ForwardBackward(model_id, 0, tuple(data), "cross_entropy", {}, forward_only=False)


def drain(worker: Worker) -> dict[int, Finished]:
    done: list[Finished] = []
    while worker.training or worker.sampling:
        done += worker.train_slice() if worker.training else []
        done += worker.sample_slice() if worker.sampling else []
    return {finished.job_id: finished for finished in done}


def train(worker: Worker, model_id: str, seed: int, job_id: int = 1) -> float:
    worker.submit_forward_backward(job_id, cross_entropy(model_id, seed))
    loss = drain(worker)[job_id].result.metrics["loss:sum"]
    worker.optim_step(model_id, ADAM)
    return loss


def prompt(*tokens: int) -> SampleRequest:
    return SampleRequest(np.array(tokens, np.int32), 1, GREEDY)


def test_loss_falls_and_tenants_do_not_touch_each_other(worker: Worker) -> None:
    worker.create_model("alone", LoraConfig(rank=4, seed=1))
    alone = [train(worker, "alone", seed=7) for _ in range(4)]
    assert alone[-1] < 0.9 * alone[0]

    worker.create_model("together", LoraConfig(rank=4, seed=1))
    worker.create_model("other", LoraConfig(rank=8, seed=2, train_unembed=False))
    together = []
    for step in range(4):
        worker.submit_forward_backward(10, cross_entropy("together", 7))
        worker.submit_forward_backward(11, cross_entropy("other", step, (30, 3, 3)))
        together.append(drain(worker)[10].result.metrics["loss:sum"])
        worker.optim_step("other", ADAM)
        worker.optim_step("together", ADAM)
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_more_models_than_device_places_are_parked_whole(worker: Worker) -> None:
    for index in range(5):
        worker.create_model(f"parked-{index}", LoraConfig(rank=2, seed=3))
    losses = {index: [] for index in range(5)}
    for _ in range(3):
        for index in range(5):
            losses[index].append(train(worker, f"parked-{index}", seed=5))
    for index in range(1, 5):
        assert losses[index] == losses[0]


def run_interleaved(worker: Worker, num_tenants: int) -> dict[str, list[float]]:
    """Each tenant's forward_backwards and steps in its own order, the tenants' in a random one; losses by tenant."""
    steps = ("train", "train", "step", "train", "park", "step")
    for index in range(num_tenants):
        worker.create_model(f"t{index}", LoraConfig(rank=3 + index % 2, seed=index))
    turns = np.random.default_rng(0).permutation(np.repeat(np.arange(num_tenants), len(steps)))
    done = [0] * num_tenants
    losses: dict[str, list[float]] = {f"t{index}": [] for index in range(num_tenants)}
    for job_id, index in enumerate(turns.tolist()):
        model_id, what = f"t{index}", steps[done[index]]
        if what == "train":
            worker.submit_forward_backward(job_id, cross_entropy(model_id, 10 * index + done[index], (7,)))
            losses[model_id].append(drain(worker)[job_id].result.metrics["loss:sum"])
        elif what == "park":
            worker.park_model(model_id)
        else:
            worker.optim_step(model_id, ADAM)
        done[index] += 1
    return losses


def test_64_tenants_on_4_places_train_as_if_each_had_its_own(tiny_qwen3: Path, tmp_path: Path) -> None:
    """Host memory for about eight of them: most wait in files, gradients between their steps with them."""
    num_tenants = 64
    roomy = Worker(tiny_qwen3, "tiny", max_lora_adapters=num_tenants, max_lora_rank=8)
    tight = Worker(
        tiny_qwen3, "tiny", max_lora_adapters=4, max_lora_rank=8, parked_adapters_memory=500_000,
        parking_folder=tmp_path,
    )  # fmt: skip
    losses = run_interleaved(tight, num_tenants)
    num_files, num_resident = len(list(tmp_path.iterdir())), len(tight.resident_models)
    assert num_resident <= 4
    assert num_files >= 32
    assert num_files + num_resident < num_tenants, "none waits in host memory"
    assert losses == run_interleaved(roomy, num_tenants)
    for index in range(num_tenants):
        got, wanted = tight.export_model(f"t{index}"), roomy.export_model(f"t{index}")
        assert got.step == wanted.step == 2
        for part in ("weights", "mu", "nu"):
            for name, array in getattr(wanted, part).items():
                assert getattr(got, part)[name].tobytes() == array.tobytes(), (index, part, name)


def test_a_model_that_is_parked_on_demand_is_still_here(worker: Worker) -> None:
    worker.create_model("idle", LoraConfig(rank=2, seed=5))
    losses = [train(worker, "idle", 1)]
    assert "idle" in worker.resident_models
    worker.park_model("idle")
    assert "idle" not in worker.resident_models
    assert worker.has_model("idle")
    losses.append(train(worker, "idle", 1))
    worker.create_model("busy", LoraConfig(rank=2, seed=5))
    assert losses == [train(worker, "busy", 1) for _ in range(2)]


def test_export_and_restore_continue_exactly(worker: Worker) -> None:
    worker.create_model("saved", LoraConfig(rank=3, seed=9))
    train(worker, "saved", 1)
    state = worker.export_model("saved")
    assert state.weights["layers.0.q_proj.lora_A"].shape == (64, 3)
    continued = [train(worker, "saved", seed) for seed in (2, 3)]
    worker.restore_model("resumed", state, with_optimizer=True)
    assert [train(worker, "resumed", seed) for seed in (2, 3)] == continued
    worker.restore_model("weights-only", state, with_optimizer=False)
    fresh = [train(worker, "weights-only", seed) for seed in (2, 3)]
    assert fresh[0] == continued[0]
    assert fresh[1] != continued[1]


def test_base_model_and_snapshots_sample_in_one_batch(worker: Worker) -> None:
    worker.create_model("sampled", LoraConfig(rank=8, seed=4))
    worker.take_snapshot("sampled", "before")
    for seed in range(3):
        train(worker, "sampled", seed)
    worker.take_snapshot("sampled", "after")

    def tokens(snapshots: dict[int, str | None]) -> dict[int, list[int]]:
        for job, snapshot in snapshots.items():
            worker.submit_sample(job, prompt(1, 2, 3, 4), snapshot)
        return {job: list(done.result.sequences[0].tokens) for job, done in drain(worker).items()}

    alone = {job: tokens({job: name})[job] for job, name in {1: None, 2: "before", 3: "after"}.items()}
    assert tokens({1: None, 2: "before", 3: "after"}) == alone
    assert alone[1] == alone[2]  # B is zero before the first step
    assert alone[3] != alone[2]


def test_what_is_refused_names_its_field(worker: Worker) -> None:
    with pytest.raises(InvalidInput, match=r"lora_config\.rank: got 9, accepted: 1 to 8"):
        worker.create_model("too-wide", LoraConfig(rank=9, seed=0))
    with pytest.raises(InvalidInput, match="lora_config"):
        worker.create_model("idle", LoraConfig(1, 0, train_attn=False, train_mlp=False, train_unembed=False))
    with pytest.raises(NotFound, match="model_id"):
        worker.submit_forward_backward(1, cross_entropy("nobody", 0))
    with pytest.raises(NotFound, match="model_path"):
        worker.submit_sample(1, prompt(1), "no-such-snapshot")
    assert not worker.training
    assert not worker.sampling
    assert not worker.has_model("too-wide")


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"config\.json"):
        Worker(tmp_path, "nothing")


def test_memory_for_keys_and_values_bounds_the_context_and_the_slots(tiny_qwen3):
    """Four blocks of 64 tokens: a row can't be longer than that, and there are no more slots than short rows."""
    config = read_config(tiny_qwen3)
    memory = 4 * kv_cache.block_bytes(config, jnp.float32)
    assert config.max_position_embeddings > 4 * 64
    asked = Worker(tiny_qwen3, "tiny", kv_cache_memory=memory, sample_max_num_sequences=9)
    assert asked.decode_slots == 9
    worker = Worker(tiny_qwen3, "tiny", kv_cache_memory=memory)
    assert worker.decode_slots == 1
    fits = SampleRequest(np.ones(250, np.int32), 1, SamplingParams(max_tokens=2))
    worker.submit_sample(0, fits, None)
    with pytest.raises(InvalidInput, match=r"prompt.*at most 255"):
        worker.submit_sample(1, SampleRequest(np.ones(256, np.int32), 1, SamplingParams()), None)
    finished = []
    while worker.sampling:
        finished += worker.sample_slice()
    assert [done.job_id for done in finished] == [0]
    assert len(finished[0].result.sequences[0].tokens) in (1, 2)


def test_too_little_memory_for_keys_and_values_is_refused(tiny_qwen3):
    with pytest.raises(StartupError, match="--kv-cache-memory: 1000 bytes are too few"):
        Worker(tiny_qwen3, "tiny", kv_cache_memory=1000)
