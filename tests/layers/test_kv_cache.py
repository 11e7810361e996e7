"""Cache arithmetic: writes at positions, dropped writes, insertion into slots, resizing."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from tx.layers import kv_cache
from tx.worker.mesh import make_mesh

CONFIG = SimpleNamespace(num_layers=2, num_kv_heads=1, head_dim=2)


def _filled(rows: int, length: int, start: float = 1.0) -> kv_cache.KVCache:
    cache = kv_cache.empty(CONFIG, rows, length, jnp.float32, make_mesh())
    return jax.tree.map(lambda x: start + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), cache)


def test_empty():
    cache = kv_cache.empty(CONFIG, 3, 5, jnp.bfloat16, make_mesh())
    assert (cache.rows, cache.length, len(cache.k), len(cache.v)) == (3, 5, 2, 2)
    assert cache.v[1].shape == (3, 5, 1, 2)
    assert cache.v[1].dtype == jnp.bfloat16
    assert not np.any(np.asarray(cache.k[0], np.float32))


def test_write_puts_each_row_at_its_positions_and_drops_past_the_end():
    target = jnp.zeros((3, 4, 1, 2))
    fresh = jnp.arange(1.0, 13).reshape(3, 2, 1, 2)
    got = np.asarray(kv_cache.write(target, fresh, jnp.array([[0, 1], [2, 3], [3, 4]])))
    expected = np.zeros((3, 4, 1, 2))
    expected[0, [0, 1]], expected[1, [2, 3]], expected[2, 3] = fresh[0], fresh[1], fresh[2, 0]
    assert np.array_equal(got, expected)


def test_insert_copies_rows_to_slots():
    cache, prefill = _filled(4, 6), _filled(2, 3, start=1000)
    got = kv_cache.insert(cache, prefill, jnp.array([1, 1, 0]), jnp.array([3, 0, 4]))  # slot 4 is out of range
    for before, after, source in zip(cache.k + cache.v, got.k + got.v, prefill.k + prefill.v, strict=True):
        expected = np.array(before)
        expected[3, :3], expected[0, :3] = source[1], source[1]
        assert np.array_equal(after, expected)


def test_resize_pads_and_cuts():
    cache = _filled(2, 3)
    grown = kv_cache.resize(cache, rows=4, length=5)
    assert (grown.rows, grown.length) == (4, 5)
    assert np.array_equal(grown.k[1][:2, :3], cache.k[1])
    assert not np.any(grown.k[1][2:])
    assert not np.any(grown.k[1][:, 3:])
    back = kv_cache.resize(grown, rows=2, length=3)
    assert np.array_equal(back.v[0], cache.v[0])
    assert kv_cache.resize(cache).k[0] is cache.k[0]
