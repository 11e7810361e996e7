"""AdapterStore: initial weights, fitting checkpoints, parking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.errors import InvalidInput, ModelLost, NotFound
from tx.models.loading import LoadedModel, load_model
from tx.types import LoraConfig, ModelState
from tx.worker.adapters import AdapterStore
from tx.worker.mesh import make_mesh
from tx.worker.parking import Parking


@pytest.fixture(scope="module")
def dense(tiny_llama3: Path) -> LoadedModel:
    return load_model(tiny_llama3, make_mesh(), jnp.float32)


@pytest.fixture(scope="module")
def moe(tiny_qwen3_moe: Path) -> LoadedModel:
    return load_model(tiny_qwen3_moe, make_mesh(), jnp.float32)


def equal(one: ModelState, two: ModelState) -> bool:
    return all(
        getattr(one, part).keys() == getattr(two, part).keys()
        and all(a.tobytes() == getattr(two, part)[name].tobytes() for name, a in getattr(one, part).items())
        for part in ("weights", "mu", "nu")
    )


def scrambled(state: ModelState) -> ModelState:
    """The state with other numbers everywhere."""
    rng = np.random.default_rng(9)
    parts = ({n: rng.uniform(0.1, 1, a.shape).astype(np.float32) for n, a in state.weights.items()} for _ in range(3))
    return ModelState(state.lora, *parts, step=5)


def test_a_fresh_adapter_is_uniform_times_zero_by_seed(dense: LoadedModel):
    store = AdapterStore(dense, 8)
    for model_id, seed in (("a", 1), ("b", 1), ("c", 2), ("negative", -(2**63))):
        store.create(model_id, LoraConfig(6, seed))
    a, b, c = (store.export(model_id) for model_id in "abc")
    assert equal(a, b)
    for name, weights in a.weights.items():
        assert weights.dtype == np.float32
        if name.endswith("B"):
            assert not weights.any()
        else:
            bound = weights.shape[-2] ** -0.5
            assert 0.9 * bound < np.abs(weights).max() <= bound
            assert abs(weights.mean()) < 0.2 * bound
            assert not np.array_equal(weights, c.weights[name])
    assert not np.array_equal(a.weights["layers.0.q_proj.lora_A"], a.weights["layers.1.q_proj.lora_A"])


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "unembed"}),
        ({"train_mlp": False, "train_unembed": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"train_attn": False, "train_unembed": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"train_attn": False, "train_mlp": False}, {"unembed"}),
    ],
)
def test_the_train_flags_decide_which_sites_exist(dense: LoadedModel, flags: dict[str, bool], keys: set[str]):
    store = AdapterStore(dense, 1)
    store.create("m", LoraConfig(2, 3, **flags))
    exported = store.export("m").weights
    assert {name.split(".")[-2] for name in exported} == keys
    store.create("all", LoraConfig(2, 3))  # and what a site starts from doesn't depend on the others
    assert all(array.tobytes() == store.export("all").weights[name].tobytes() for name, array in exported.items())


def test_experts_have_their_own_rank(moe: LoadedModel):
    store = AdapterStore(moe, 1)
    store.create("m", LoraConfig(7, 0))
    exported = store.export("m").weights
    assert exported["layers.0.experts.gate_proj.lora_A"].shape == (4, 64, 3)
    assert exported["layers.0.q_proj.lora_A"].shape == (64, 7)
    ranks = store.ranks("m")
    assert ranks.padded == (8, 4)
    assert (ranks.scaling, ranks.expert_scaling) == (32 / 7, 32 / 3)
    assert store.state("m").weights.layers[0]["experts.gate_proj"].a.shape == (4, 64, 4)


def test_padding_is_zero_and_never_exported(dense: LoadedModel):
    store = AdapterStore(dense, 1)
    store.create("m", LoraConfig(5, 0))
    store.restore("m", scrambled(store.export("m")), with_optimizer=True)
    site = store.state("m").weights.layers[1]["down_proj"]
    assert site.a.shape == (128, 8)
    assert site.b.shape == (8, 64)
    assert not np.asarray(site.a)[:, 5:].any()
    assert not np.asarray(site.b)[5:].any()
    assert store.export("m").weights["layers.1.down_proj.lora_A"].shape == (128, 5)


@pytest.mark.parametrize("tier", ["memory", "files"])
def test_parked_states_come_back_whole(dense: LoadedModel, tmp_path: Path, tier: str):
    """Room for two; six models, each with weights, moments, gradients and a step of its own."""
    store = AdapterStore(dense, 2, Parking(2**30 if tier == "memory" else 0, tmp_path))
    wanted = {}
    for index in range(6):
        model_id = f"m{index}"
        store.create(model_id, LoraConfig(2, index))
        store.restore(model_id, scrambled(store.export(model_id)), with_optimizer=True)
        state = store.state(model_id)
        grads = jax.tree.map(lambda leaf, index=index: leaf * 0 + index, state.weights)
        store.replace(model_id, replace(state, grads=grads, step=index))
        wanted[model_id] = jax.device_get(store.state(model_id))
        wanted[model_id, "export"] = store.export(model_id)
        assert len(store.resident) <= 2
    for index in (3, 0, 5, 3, 1):
        model_id = f"m{index}"
        assert equal(store.export(model_id), wanted[model_id, "export"])  # whether parked or not
        state = store.state(model_id)
        assert len(store.resident) == 2
        assert len(list(tmp_path.iterdir())) == (0 if tier == "memory" else 4)
        assert state.step == index
        for part in ("weights", "mu", "nu", "grads"):
            pairs = zip(
                jax.tree.leaves(getattr(state, part)), jax.tree.leaves(getattr(wanted[model_id], part)), strict=True
            )
            assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    store.drop("m0")
    assert "m0" not in store
    with pytest.raises(NotFound, match="m0"):
        store.state("m0")


def test_park_moves_a_model_off_the_device_and_it_stays_what_it_was(dense: LoadedModel):
    store = AdapterStore(dense, 4)
    for model_id in ("a", "b"):
        store.create(model_id, LoraConfig(2, 0))
    before = store.export("a")
    assert store.state("a").is_base
    for _ in range(2):  # one that is parked already is fine
        store.park("a")
        assert store.resident == ("b",)
    store.park("nobody")
    assert "a" in store
    assert "nobody" not in store
    assert equal(store.export("a"), before)
    assert store.resident == ("b",), "an export leaves it where it is"
    assert store.state("a").is_base
    assert store.resident == ("b", "a")
    store.replace("a", replace(store.state("a"), is_base=False))
    store.park("a")
    assert not store.state("a").is_base


def test_a_parked_model_whose_file_is_gone_is_lost_until_it_is_made_anew(dense: LoadedModel, tmp_path: Path):
    store = AdapterStore(dense, 4, Parking(0, tmp_path))
    for model_id in ("a", "b", "other"):
        store.create(model_id, LoraConfig(2, 0))
    saved = scrambled(store.export("a"))
    for model_id in ("a", "b"):
        store.park(model_id)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ModelLost, match="a can't be read back"):
        store.state("a")
    with pytest.raises(ModelLost, match="b can't be read back"):
        store.export("b")
    for model_id in ("a", "b"):
        assert model_id not in store
        with pytest.raises(ModelLost, match=model_id):
            store.state(model_id)
    store.restore("a", saved, with_optimizer=True)
    store.create("b", LoraConfig(2, 0))
    assert equal(store.export("a"), saved)
    assert equal(store.export("b"), store.export("other"))


def test_restore_takes_everything_or_only_weights(dense: LoadedModel):
    store = AdapterStore(dense, 4)
    store.create("m", LoraConfig(3, 0))
    saved = scrambled(store.export("m"))
    store.restore("new", saved, with_optimizer=True)
    assert equal(store.export("new"), saved)
    assert store.export("new").step == 5
    store.restore("m", saved, with_optimizer=False)
    plain = store.export("m")
    assert all(plain.weights[name].tobytes() == array.tobytes() for name, array in saved.weights.items())
    assert plain.step == 0
    assert not any(array.any() for array in (*plain.mu.values(), *plain.nu.values()))


def _without(state: ModelState, name: str) -> ModelState:
    return replace(state, weights={key: array for key, array in state.weights.items() if key != name})


def _with(state: ModelState, name: str, array: np.ndarray) -> ModelState:
    return replace(state, weights=state.weights | {name: array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, lora=LoraConfig(4, 0)), "rank 4"),
        (lambda s: replace(s, lora=replace(s.lora, train_mlp=False)), "train_mlp False"),
        (lambda s: replace(s, mu={}, nu={}), "optimizer state"),
        (lambda s: _without(s, "layers.0.q_proj.lora_A"), r"layers.0.q_proj.lora_A of shape None"),
        (lambda s: _with(s, "layers.9.q_proj.lora_A", np.zeros((64, 3), np.float32)), "layers.9.q_proj"),
        (lambda s: _with(s, "unembed.lora_A", np.zeros((65, 3), np.float32)), r"\(65, 3\)"),
        (lambda s: _with(s, "unembed.lora_A", np.full((64, 3), np.nan, np.float32)), "non-finite unembed.lora_A"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(dense: LoadedModel, change, message: str):
    store = AdapterStore(dense, 4)
    store.create("m", LoraConfig(3, 0))
    before = store.export("m")
    with pytest.raises(InvalidInput, match=message):
        store.restore("m", change(scrambled(before)), with_optimizer=True)
    assert equal(store.export("m"), before)


def test_an_id_is_created_once(dense: LoadedModel):
    store = AdapterStore(dense, 1)
    store.create("m", LoraConfig(1, 0))
    with pytest.raises(InvalidInput, match="model_id"):
        store.create("m", LoraConfig(1, 0))
