"""A model's state survives the trip through a checkpoint's files bit by bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tx.tinker.checkpoints import BrokenCheckpoint, CheckpointCard
from tx.tinker.model_files import OPTIMIZER_FILE, experts_per_tok, from_files, to_files
from tx.types import LoraConfig, ModelState


def state(rank: int, expert_rank: int | None = None) -> ModelState:
    rng = np.random.default_rng(0)
    shapes = {"layers.0.q_proj": ((8, rank), (rank, 6)), "unembed": ((8, rank), (rank, 10))}
    if expert_rank is not None:
        shapes["layers.0.experts.up_proj"] = ((3, 8, expert_rank), (3, expert_rank, 6))
    arrays = [
        {
            f"{site}.lora_{side}": rng.normal(size=shape).astype(np.float32)
            for site, pair in shapes.items()
            for side, shape in zip("AB", pair, strict=True)
        }
        for _ in range(3)
    ]
    return ModelState(LoraConfig(rank=rank, seed=5, train_mlp=expert_rank is not None), *arrays, step=9)


def card_of(saved: ModelState) -> CheckpointCard:
    return CheckpointCard("b", saved.lora, saved.step, 0.0, experts_per_tok(saved))


@pytest.mark.parametrize(("rank", "expert_rank"), [(4, None), (8, 4), (8, 1), (2, 1), (7, 3), (7, 2)])
def test_everything_comes_back(rank, expert_rank):
    saved = state(rank, expert_rank)
    card = card_of(saved)
    loaded = from_files(card, to_files(saved, "b", with_optimizer=True), card.num_experts_per_tok)
    assert (loaded.lora, loaded.step) == (saved.lora, 9)
    exact = expert_rank is None or rank % expert_rank == 0  # PEFT has one rank: others' B is scaled there and back
    for ours, theirs in ((saved.weights, loaded.weights), (saved.mu, loaded.mu), (saved.nu, loaded.nu)):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_allclose(theirs[name], array, rtol=0 if exact else 3e-7, atol=0)


def test_an_export_for_sampling_has_no_optimizer():
    files = to_files(state(4), "b", with_optimizer=False)
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(files["adapter_config.json"])["lora_alpha"] == 32
    loaded = from_files(card_of(state(4)), files, 0)
    assert (loaded.mu, loaded.nu, loaded.step) == ({}, {}, 0)


def test_an_optimizer_of_another_adapter_is_refused():
    saved = state(4)
    files = to_files(saved, "b", with_optimizer=True)
    del saved.mu["unembed.lora_A"]
    files[OPTIMIZER_FILE] = to_files(saved, "b", with_optimizer=True)[OPTIMIZER_FILE]
    with pytest.raises(BrokenCheckpoint, match="different tensors"):
        from_files(card_of(state(4)), files, 0)
