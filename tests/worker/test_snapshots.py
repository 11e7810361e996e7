"""``tx.worker.snapshots``: immutability, parking, and several adapters in one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worker.sampler import alone, check_logprobs, make, prompt_of, random_state, request_of, run
from tx.errors import InvalidInput, NotFound
from tx.layers.lora import Adapter, LoraWeights
from tx.models.loading import load_model
from tx.types import LoraConfig, ModelState
from tx.worker.mesh import make_mesh
from tx.worker.snapshots import LiveAdapters, SnapshotStore


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    return load_model(tiny_qwen3, make_mesh(), jnp.float32)


@pytest.fixture(scope="module")
def moe(tiny_qwen3_moe):
    return load_model(tiny_qwen3_moe, make_mesh(), jnp.float32)


@pytest.fixture
def store(model):
    return SnapshotStore(model, max_resident=2)


def training_adapter(model, seed=0, rank=4):
    """An adapter as training has it: float32 buffers of its own."""
    store = SnapshotStore(model, max_resident=1)
    store.load("source", random_state(model.config, rank, seed))
    return jax.tree.map(lambda x: jnp.array(x, copy=True), store.get("source").adapter)


def copy_of(snapshot):
    return jax.device_get(snapshot.adapter)


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def pointers(adapter):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(adapter)}


def test_c01_a_snapshot_shares_no_buffer_with_training(model, store):
    adapter = training_adapter(model)
    training = jax.device_get(adapter)
    store.take("s", adapter, LoraConfig(rank=4, seed=0))
    assert not pointers(adapter) & pointers(store.get("s").adapter)
    # Sampling leaves the training weights alone, bit for bit.
    alone(model, request_of(prompt_of(9), 2, max_tokens=8), store.get("s"))
    assert_same(adapter, training)
    # The optimizer takes the training buffers over; the snapshot stays.
    step = functools.partial(jax.jit, donate_argnums=0)(lambda tree: jax.tree.map(lambda x: x * -2.0 + 1.0, tree))
    step(adapter)
    assert_same(copy_of(store.get("s")), training)


def test_c02_a_snapshot_means_the_weights_of_its_moment(model, store):
    request = request_of(prompt_of(9), max_tokens=12, seed=1)
    adapter = training_adapter(model, seed=1)
    store.take("before", adapter, LoraConfig(rank=4, seed=0))
    first = alone(model, request, store.get("before"))
    store.take("after", training_adapter(model, seed=2), LoraConfig(rank=4, seed=0))
    again, other = alone(model, request, store.get("before")), alone(model, request, store.get("after"))
    assert again.sequences[0].tokens.tolist() == first.sequences[0].tokens.tolist()
    assert again.sequences[0].logprobs.tolist() == first.sequences[0].logprobs.tolist()
    assert other.sequences[0].tokens.tolist() != first.sequences[0].tokens.tolist()


def test_c02_rows_keep_the_snapshot_they_started_with(model, store):
    """Neither dropping nor replacing an id changes what is being sampled, nor does a prompt remembered under it."""
    request = request_of(prompt_of(9), max_tokens=30, seed=1, stop_on_eos=False)
    store.take("s", training_adapter(model, seed=1), LoraConfig(rank=4, seed=0))
    expected = alone(model, request, store.get("s"))
    generator = make(model)
    generator.submit(0, request, store.get("s"))
    generator.slice()
    generator.slice()
    store.take("s", training_adapter(model, seed=2), LoraConfig(rank=4, seed=0))
    results = run(generator, {1: (request, store.get("s"))})
    assert results[0].sequences[0].tokens.tolist() == expected.sequences[0].tokens.tolist()
    replaced = alone(model, request, store.get("s"))
    assert results[1].sequences[0].tokens.tolist() == replaced.sequences[0].tokens.tolist()
    assert results[1].prompt_cache_hit_tokens == 0


def test_loading_a_saved_model_equals_taking_it(model, store):
    state = random_state(model.config, 3, 5)
    store.load("loaded", state)
    loaded = store.get("loaded")
    assert (loaded.rank, loaded.scaling) == (4, 32 / 3)
    padded = jax.tree.map(jnp.asarray, copy_of(loaded))
    store.take("taken", padded, state.lora)
    assert_same(copy_of(loaded), copy_of(store.get("taken")))
    a = np.asarray(loaded.adapter.layers[1]["o_proj"].a)
    np.testing.assert_array_equal(a[:, :3], state.weights["layers.1.o_proj.lora_A"])
    assert not a[:, 3:].any()


def test_the_least_recently_used_is_parked_and_comes_back_whole(model, store):
    for index in range(2):
        store.load(f"s{index}", random_state(model.config, 4, index))
    kept = copy_of(store.get("s0"))
    store.load("s2", random_state(model.config, 4, 2))  # parks s1, used longest ago
    assert set(store._parked) == {"s1"}
    store.load("s3", random_state(model.config, 4, 3))
    assert set(store._parked) == {"s0", "s1"}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(store._parked["s0"][0].adapter))
    assert "s0" in store
    assert_same(copy_of(store.get("s0")), kept)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(store.get("s0").adapter))
    assert len(store._resident) == 2


def test_dropping(store, model):
    store.load("s", random_state(model.config, 4, 0))
    store.drop("s")
    store.drop("s")
    assert "s" not in store
    with pytest.raises(NotFound, match="model_path"):
        store.get("s")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(model, store, value):
    state = random_state(model.config, 4, 0)
    store.load("s", state)
    before = copy_of(store.get("s"))
    state.weights["layers.1.down_proj.lora_B"][2, 5] = value
    with pytest.raises(InvalidInput, match="finite"):
        store.load("s", state)
    assert_same(copy_of(store.get("s")), before)


def test_the_compute_dtype_is_the_models(tiny_qwen3):
    half = load_model(tiny_qwen3, make_mesh(), jnp.bfloat16)
    store = SnapshotStore(half, max_resident=1)
    store.load("s", random_state(half.config, 4, 0))
    assert {leaf.dtype for leaf in jax.tree.leaves(store.get("s").adapter)} == {jnp.dtype(jnp.bfloat16)}
    store.load("t", random_state(half.config, 4, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(store.get("s").adapter)} == {jnp.dtype(jnp.bfloat16)}


# ---- several at once --------------------------------------------------------------------------------------------


def some_sites(state, keep):
    return ModelState(state.lora, {name: array for name, array in state.weights.items() if keep in name})


def check_together(model, owners):
    request = request_of(prompt_of(11), max_tokens=10, seed=3, stop_on_eos=False)
    together = run(make(model), {job: (request, owner) for job, owner in enumerate(owners)})
    for job, owner in enumerate(owners):
        check_logprobs(model, request, owner, together[job].sequences[0])
    assert len({tuple(result.sequences[0].tokens) for result in together.values()}) == len(owners)


def test_snapshots_of_any_rank_and_sites_and_the_base_model_in_one_batch(model):
    store = SnapshotStore(model, max_resident=8)
    store.load("wide", random_state(model.config, 8, 0))
    store.load("odd", random_state(model.config, 3, 1))
    store.load("attention", some_sites(random_state(model.config, 2, 2), "o_proj"))
    store.load("head", some_sites(random_state(model.config, 4, 3), "unembed"))
    check_together(model, [*(store.get(name) for name in ("wide", "odd", "attention", "head")), None])


def test_snapshots_of_experts_in_one_batch(moe):
    store = SnapshotStore(moe, max_resident=8)
    store.load("wide", random_state(moe.config, 8, 0))
    store.load("narrow", random_state(moe.config, 2, 1))
    check_together(moe, [store.get("narrow"), store.get("wide"), None])


def test_live_adapters_stand_side_by_side(model, store):
    store.load("a", random_state(model.config, 4, 0))
    store.load("b", random_state(model.config, 2, 1))
    a, b = store.get("a"), store.get("b")
    live = LiveAdapters()
    assert live.view([None, None]) is None
    assert live.view([a, None]).adapter is a.adapter
    view = live.view([b, None, a, a])
    assert view.gate.shape == (4, 8)
    np.testing.assert_array_equal(view.gate != 0, [[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8, *[[0, 0, 1, 1, 1, 1, 0, 0]] * 2])
    assert (view.gate[0, 0], view.gate[2, 2]) == (16.0, 8.0)
    assert view.adapter.unembed.a.shape[-1] == 8
    assert live.view([a, b, None, None]).adapter is view.adapter  # the same set: nothing is built again
    assert isinstance(view.adapter, Adapter)
    assert isinstance(view.adapter.layers[0]["q_proj"], LoraWeights)
