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
