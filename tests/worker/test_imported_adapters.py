"""Adapters that PEFT wrote train on as in torch, and what they don't have stays untouched."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.golden_lora import read_golden
from tests.support.trainer_lab import Lab, arrays
from tx.errors import InvalidInput
from tx.models.lora_sites import lora_sites
from tx.models.peft import CONFIG_FILE, WEIGHTS_FILE
from tx.models.peft_import import import_files
from tx.types import AdamParams, Datum, ForwardBackward, LoraConfig, ModelState
from tx.worker.snapshots import SnapshotStore

ADAM = AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(read_golden("peft_llama", tmp_path_factory.mktemp("peft") / "llama"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(read_golden("peft_moe", tmp_path_factory.mktemp("peft") / "moe"))


def imported(lab: Lab, case: str) -> ModelState:
    files = {name: lab.golden.arrays[f"in/{case}/{name}"].tobytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    config = lab.model.config
    return import_files(files, config.num_experts_per_tok, lora_sites(config))


def request(lab: Lab, model_id: str = "m") -> ForwardBackward:
    tokens = lab.golden.arrays["tokens"].astype(np.int32)
    inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(len(tokens) - 1, np.float32)}
    return lab.request(model_id=model_id, data=(Datum(tokens[:-1], inputs),))


def test_one_step_is_torchs_and_adds_no_module(llama: Lab):
    """Rank 3 with rslora on q_proj and o_proj: all numbers after one AdamW step, and no others."""
    store, trainer = llama.trainer()
    store.restore("m", imported(llama, "rslora"), with_optimizer=False)
    llama.run(trainer, request(llama))
    trainer.optim_step("m", ADAM)
    stepped, wanted = store.export("m"), llama.golden.group("in/rslora/stepped")
    assert stepped.weights.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(stepped.weights[name], array, atol=2e-6, err_msg=name)


def test_filled_up_ranks_stay_zero_in_training(llama: Lab):
    """q_proj of rank 2 in an adapter of rank 6."""
    store, trainer = llama.trainer()
    store.restore("m", imported(llama, "patterns"), with_optimizer=False)
    before = store.export("m").weights
    llama.run(trainer, request(llama))
    trainer.optim_step("m", ADAM)
    after = store.export("m").weights
    assert not after["layers.0.q_proj.lora_A"][:, 2:].any()
    assert not after["layers.0.q_proj.lora_B"][2:].any()
    assert (after["layers.0.q_proj.lora_A"][:, :2] != before["layers.0.q_proj.lora_A"][:, :2]).all()


def test_experts_of_their_own_rank_sample_and_train(moe: Lab):
    state = imported(moe, "stacked")
    store, trainer = moe.trainer()
    store.restore("m", state, with_optimizer=False)
    assert (store.ranks("m").expert, store.ranks("m").expert_scaling) == (2, 1.5)
    snapshots = SnapshotStore(moe.model, 2)
    snapshots.load("loaded", state)
    snapshots.take("taken", store.state("m").weights, store.lora("m"))
    for snapshot in (snapshots.get("loaded"), snapshots.get("taken")):
        assert (snapshot.rank, snapshot.expert_rank, snapshot.expert_scaling) == (2, 2, 1.5)
    moe.run(trainer, request(moe))
    assert all(np.any(array) for name, array in arrays(store.state("m").grads).items() if ".experts." in name)


def test_tiny_requests_of_different_sets_of_modules_keep_apart(llama: Lab):
    """They have the same flags and come together: each gets the gradients that it gets alone."""
    alone = {}
    for model_id, case in (("plain", "plain"), ("rslora", "rslora")):
        store, trainer = llama.trainer()
        store.restore(model_id, imported(llama, case), with_optimizer=False)
        llama.run(trainer, request(llama, model_id))
        alone[model_id] = arrays(store.state(model_id).grads)
    store, trainer = llama.trainer()
    for model_id in alone:
        store.restore(model_id, imported(llama, model_id), with_optimizer=False)
    llama.run(trainer, *(request(llama, model_id) for model_id in alone))
    for model_id, grads in alone.items():
        together = arrays(store.state(model_id).grads)
        assert together.keys() == grads.keys()
        for name, grad in grads.items():
            np.testing.assert_allclose(together[name], grad, atol=1e-5, err_msg=name)


def test_alpha_and_sites_come_with_the_weights_and_rank_and_groups_do_not(llama: Lab):
    """Clients that create a model before they load into it can only say what a request says."""
    store, _ = llama.trainer()
    store.create("m", LoraConfig(5, 7, train_mlp=False, train_unembed=False))
    state = imported(llama, "plain")
    store.restore("m", state, with_optimizer=False)
    assert (store.lora("m").alpha, store.lora("m").sites, store.lora("m").seed) == (10.0, state.lora.sites, 7)
    store.create("other", LoraConfig(5, 7))
    with pytest.raises(InvalidInput, match="train_mlp False"):
        store.restore("other", state, with_optimizer=False)


def test_a_checkpoint_with_a_site_too_many_is_refused(llama: Lab):
    store, _ = llama.trainer()
    state = imported(llama, "plain")
    weights = state.weights | {f"layers.0.k_proj.lora_{side}": np.zeros((1, 1), np.float32) for side in "AB"}
    with pytest.raises(InvalidInput, match="k_proj"):
        store.restore("m", ModelState(state.lora, weights), with_optimizer=False)
