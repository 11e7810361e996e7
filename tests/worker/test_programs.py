"""``tx.worker.programs``: the cache's moves on random arrays, and the decode loop's ends on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.layers import kv_cache
from tx.layers.kv_cache import KVCache
from tx.models.loading import load_model
from tx.worker import programs
from tx.worker.mesh import make_mesh


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    return load_model(tiny_qwen3, make_mesh(), jnp.float32)


def random_cache(rows, length, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda: jnp.asarray(rng.normal(size=(rows, length, 2, 4)), jnp.float32)
    return KVCache(k=(make(), make()), v=(make(), make()))


def test_regroup_moves_rows_and_pads_with_zeros():
    cache = random_cache(4, 6)
    moved = programs.regroup(cache, jnp.array([2, 0, 4]), length=8, mesh=make_mesh())
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(moved), strict=True):
        assert after.shape == (3, 8, 2, 4)
        assert (after[:2, :6] == before[jnp.array([2, 0])]).all()
        assert not after[:, 6:].any()
        assert not after[2].any()


def test_regroup_cuts_length():
    cache = random_cache(2, 6)
    moved = programs.regroup(cache, jnp.array([1]), length=3, mesh=make_mesh())
    assert (moved.k[1] == cache.k[1][1:, :3]).all()


def test_insert_fills_the_first_slots_named_and_no_others():
    cache, prompt = random_cache(4, 6), random_cache(1, 3, seed=1)
    before = jax.device_get(cache)
    after = programs.insert(cache, prompt, jnp.array([3, 1, 0, 0]), jnp.int32(2))
    for old, new, source in zip(*map(jax.tree.leaves, (before, after, prompt)), strict=True):
        for slot in (1, 3):
            assert (new[slot, :3] == source[0]).all()
            assert (new[slot, 3:] == old[slot, 3:]).all()
        assert (new[0] == old[0]).all()
        assert (new[2] == old[2]).all()


def test_row_of_is_a_copy_of_one_row():
    cache = random_cache(3, 5)
    row = programs.row_of(cache, jnp.int32(2))
    assert (row.rows, row.length) == (1, 5)
    assert (row.v[1] == cache.v[1][2:]).all()


def decode(model, remaining, stop_ids=(), steps=8):
    size = len(remaining)
    rows = programs.DecodeRows(
        token=np.arange(5, 5 + size, dtype=np.int32),
        position=np.full(size, 3, np.int32),
        remaining=np.asarray(remaining, np.int32),
        temperature=np.zeros(size, np.float32),
        top_k=np.full(size, -1, np.int32),
        top_p=np.ones(size, np.float32),
        seed=np.zeros((size, 2), np.uint32),
        sample=np.zeros(size, np.int32),
        stop_ids=np.full((size, programs.NUM_STOP_IDS), -1, np.int32),
    )
    rows.stop_ids[:, : len(stop_ids)] = stop_ids
    cache = kv_cache.empty(model.config, size, 32, jnp.float32, model.mesh)
    rows = jax.tree.map(jnp.asarray, rows)
    cache, *drawn = programs.decode_slice(model.graphdef, model.weights, cache, rows, None, steps=steps, filtered=False)
    return cache, *jax.device_get(drawn)


def test_rows_draw_what_remains_and_empty_slots_nothing(model):
    cache, tokens, logprobs, counts = decode(model, [3, 0, 8])
    assert counts.tolist() == [3, 0, 8]
    assert (logprobs[2] < 0).all()
    keys = np.asarray(cache.k[0])
    assert keys[0, 3:6].any(axis=(1, 2)).all()
    assert not keys[0, 6:].any()  # a row that has ended writes nothing
    assert not keys[1].any()
    alone = decode(model, [0, 0, 8])
    assert (alone[1][2] == tokens[2]).all()


def test_the_loop_ends_with_the_last_row(model):
    _, _, logprobs, counts = decode(model, [2, 1])
    assert counts.tolist() == [2, 1]
    assert not logprobs[:, 2:].any()  # never computed


def test_a_stop_token_ends_a_row_in_the_loop(model):
    _, free, _, _ = decode(model, [8, 8])
    stop = int(free[0, 4])
    first = free[0].tolist().index(stop)
    _, tokens, _, counts = decode(model, [8, 8], stop_ids=(1, 2, stop))
    assert counts[0] == first + 1
    assert tokens[0, first] == stop
