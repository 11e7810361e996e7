"""Block arithmetic: fresh keys cut into blocks, writes at positions, dropped writes, copies between pools."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from tx.layers import kv_cache
from tx.layers.kv_cache import BLOCK, KVBlocks, LayerBlocks
from tx.worker.mesh import make_mesh

CONFIG = SimpleNamespace(num_layers=2, num_kv_heads=3, head_dim=2)


def _filled(blocks: int, start: float = 1.0) -> KVBlocks:
    pool = kv_cache.empty(CONFIG, blocks, jnp.float32, make_mesh())
    return jax.tree.map(lambda x: start + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), pool)


def test_empty():
    pool = kv_cache.empty(CONFIG, 5, jnp.bfloat16, make_mesh())
    assert (pool.num_blocks, len(pool.layers)) == (5, 2)
    assert pool.layers[1].k.shape == (5, 3, 2, BLOCK)
    assert pool.layers[1].v.shape == (5, 3, BLOCK, 2)
    assert pool.layers[1].v.dtype == jnp.bfloat16
    assert not np.any(np.asarray(pool.layers[0].k, np.float32))
    assert sum(x.nbytes for x in jax.tree.leaves(pool)) == 5 * kv_cache.block_bytes(CONFIG, jnp.bfloat16)


def test_num_blocks():
    assert [kv_cache.num_blocks(tokens) for tokens in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_in_blocks_keeps_rows_together_and_fills_up_with_zeros():
    k = jnp.arange(1.0, 2 * 100 * 3 * 2 + 1).reshape(2, 100, 3, 2)
    blocks = kv_cache.in_blocks(k, -k)
    assert blocks.k.shape == (4, 3, 2, BLOCK)
    for row in range(2):
        for position in range(100):
            block, at = 2 * row + position // BLOCK, position % BLOCK
            assert (blocks.k[block, :, :, at] == k[row, position]).all()
            assert (blocks.v[block, :, at] == -k[row, position]).all()
    assert not blocks.k[1, :, :, 100 - BLOCK :].any()
    assert not blocks.v[3, :, 100 - BLOCK :].any()


def test_write_puts_each_row_at_its_position_in_its_block():
    pool = _filled(4).layers[0]
    k = jnp.arange(18.0).reshape(3, 3, 2)
    # Position 70 is the 7th of its block; the last row is dropped.
    after = kv_cache.write(pool, k, -k, jnp.array([3, 1, 4]), jnp.array([5, 70, 0]))
    expected = jax.tree.map(np.array, pool)
    expected.k[3, :, :, 5], expected.k[1, :, :, 6] = k[0], k[1]
    expected.v[3, :, 5], expected.v[1, :, 6] = -k[0], -k[1]
    assert isinstance(after, LayerBlocks)
    assert (after.k == expected.k).all()
    assert (after.v == expected.v).all()
