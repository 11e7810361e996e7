"""``tx.worker.programs``: the decode loop's ends on a tiny model, what it writes where, and clearing of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.layers import kv_cache
from tx.layers.kv_cache import BLOCK, KVBlocks, LayerBlocks
from tx.models.loading import load_model
from tx.worker import programs
from tx.worker.mesh import make_mesh


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    return load_model(tiny_qwen3, make_mesh(), jnp.float32)


def decode(model, remaining, stop_ids=(), steps=8, position=3, num_topk=0):
    """Rows at one position each; row r has the blocks 2r + 1 and 2r, in this order."""
    size = len(remaining)
    rows = programs.DecodeRows(
        token=np.arange(5, 5 + size, dtype=np.int32),
        position=np.full(size, position, np.int32),
        remaining=np.asarray(remaining, np.int32),
        temperature=np.zeros(size, np.float32),
        top_k=np.full(size, -1, np.int32),
        top_p=np.ones(size, np.float32),
        seed=np.zeros((size, 2), np.uint32),
        sample=np.zeros(size, np.int32),
        stop_ids=np.full((size, programs.NUM_STOP_IDS), -1, np.int32),
        blocks=np.arange(2 * size, dtype=np.int32).reshape(size, 2)[:, ::-1],
        owner=np.repeat(np.arange(size, dtype=np.int32), 2),
        start=np.tile(np.array([BLOCK, 0], np.int32), size),
    )
    rows.stop_ids[:, : len(stop_ids)] = stop_ids
    pool = kv_cache.empty(model.config, 2 * size, jnp.float32, model.mesh)
    rows = jax.tree.map(jnp.asarray, rows)
    pool, drawn = programs.decode_slice(
        model.graphdef, model.weights, pool, rows, None, jnp.int32(steps), most_steps=8, num_topk=num_topk
    )
    return pool, jax.device_get(drawn)


def test_rows_draw_what_remains_and_padding_nothing(model):
    pool, drawn = decode(model, [3, 0, 8])
    assert drawn.counts.tolist() == [3, 0, 8]
    assert (drawn.logprobs[2] < 0).all()
    keys = np.asarray(pool.layers[0].k)
    assert keys[1, :, :, 3:6].any(axis=(0, 1)).all()
    assert not keys[1, :, :, 6:].any()  # a row that has ended writes nothing
    assert not keys[0].any()
    assert not keys[2:4].any()
    _, alone = decode(model, [0, 0, 8])
    assert (alone.tokens[2] == drawn.tokens[2]).all()


def test_a_slice_goes_on_in_the_next_block(model):
    pool, drawn = decode(model, [8, 8], position=BLOCK - 3)
    assert drawn.counts.tolist() == [8, 8]
    keys = np.asarray(pool.layers[1].k)
    for first, second in ((1, 0), (3, 2)):
        assert keys[first, :, :, BLOCK - 3 :].any(axis=(0, 1)).all()
        assert keys[second, :, :, :5].any(axis=(0, 1)).all()
        assert not keys[second, :, :, 5:].any()


def test_how_many_steps_is_data(model):
    _, all_of_them = decode(model, [8, 8])
    before = programs.decode_slice._cache_size()
    _, drawn = decode(model, [8, 8], steps=3)
    assert programs.decode_slice._cache_size() == before
    assert drawn.counts.tolist() == [3, 3]
    assert (drawn.tokens[:, :3] == all_of_them.tokens[:, :3]).all()


def test_most_likely_tokens_beside_the_drawn(model):
    """Greedy rows draw the best of them; the program without them draws the same."""
    _, plain = decode(model, [4])
    _, drawn = decode(model, [4], num_topk=8)
    assert plain.topk_ids is None
    assert (drawn.tokens == plain.tokens).all()
    assert drawn.topk_ids.shape == (1, 8, 8)
    assert (drawn.topk_ids[0, :4, 0] == drawn.tokens[0, :4]).all()
    assert (drawn.topk_logprobs[0, :4, 0] == drawn.logprobs[0, :4]).all()
    assert (np.diff(drawn.topk_logprobs[0, :4], axis=-1) <= 0).all()


def filled(blocks, start=1.0):
    """A pool of two layers whose every number is another."""
    layer = lambda at: LayerBlocks(
        *(at + x + jnp.arange(blocks * 3 * 2 * BLOCK).reshape(blocks, 3, 2, BLOCK) for x in (0.0, 0.5))
    )
    return KVBlocks((layer(start), layer(start + 10000)))


def test_copy_blocks_copies_the_first_ones_of_the_list():
    pool, source = filled(4), filled(3, start=1000.0)
    before = jax.device_get(pool)
    after = programs.copy_blocks(pool, source, jnp.array([2, 0, 1]), jnp.array([0, 3, 1]), jnp.int32(2))
    for old, new, of in zip(*map(jax.tree.leaves, (before, after, source)), strict=True):
        assert (new[0] == of[2]).all()
        assert (new[3] == of[0]).all()
        assert (new[1:3] == old[1:3]).all()


def test_clear_blocks(model):
    pool = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), kv_cache.empty(model.config, 4, jnp.float32, model.mesh))
    cleared = programs.clear_blocks(pool, jnp.array([2, 0, 4, 4]))  # 4 is past the end
    for x in jax.tree.leaves(cleared):
        assert not x[np.array([0, 2])].any()
        assert jnp.isnan(x[np.array([1, 3])]).all()


def test_the_loop_ends_with_the_last_row(model):
    _, drawn = decode(model, [2, 1])
    assert drawn.counts.tolist() == [2, 1]
    assert not drawn.logprobs[:, 2:].any()  # never computed


def test_a_stop_token_ends_a_row_in_the_loop(model):
    _, free = decode(model, [8, 8])
    stop = int(free.tokens[0, 4])
    first = free.tokens[0].tolist().index(stop)
    _, drawn = decode(model, [8, 8], stop_ids=(1, 2, stop))
    assert drawn.counts[0] == first + 1
    assert drawn.tokens[0, first] == stop
