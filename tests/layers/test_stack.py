"""The layer loop: one trace for all layers, the cache in every form, padding on the right without effect."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import tiny_specs as specs
from tests.support import golden_models as run
from tx.layers import kv_cache, stack
from tx.worker.programs import copy_blocks

TOKENS = jnp.asarray(specs.tokens()[:, :20])


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def model(request, tmp_path_factory):
    return run.load(tmp_path_factory.mktemp("stack"), request.param)


@partial(jax.jit, static_argnums=0)
def _cached(graphdef, weights, tokens, positions, cache, place, adapter):
    return nnx.merge(graphdef, weights).hidden_states(tokens, positions, cache=cache, place=place, adapter=adapter)


def _whole(model, adapter):
    return nnx.merge(model.graphdef, model.weights).hidden_states(
        TOKENS, run.positions(TOKENS), adapter=adapter, return_cache=True
    )


def test_token_by_token_equals_one_pass(model):
    """Two rows decode from their first token, their one block each in the other order."""
    adapter, positions = run.view(run.seeded_adapter(model)), run.positions(TOKENS)
    whole, fresh = _whole(model, adapter)
    pool, parts = kv_cache.empty(model.config, 3, jnp.float32, model.mesh), []
    for step in range(20):
        place = kv_cache.Decoding(jnp.array([1, 2, 0]), jnp.zeros(3, jnp.int32), jnp.array([2, 0]))
        now = slice(step, step + 1)
        part, pool = _cached(model.graphdef, model.weights, TOKENS[:, now], positions[:, now], pool, place, adapter)
        parts.append(part)
    assert np.max(np.abs(jnp.concatenate(parts, axis=1) - whole)) <= 1e-4
    for kept, new in zip(pool.layers, fresh.layers, strict=True):
        for mine, theirs in ((2, 0), (0, 1)):
            assert np.max(np.abs(kept.k[mine, ..., :20] - new.k[theirs, ..., :20])) <= 1e-4
            assert np.max(np.abs(kept.v[mine, :, :20] - new.v[theirs, :, :20])) <= 1e-4
        assert not np.any(kept.k[1])  # nobody's
        assert not np.any(kept.v[2, :, 20:])


def test_a_prompt_in_pieces_equals_one_pass(model):
    """64 + 64 + 22 positions, each piece behind the blocks of those before it."""
    adapter = run.view(run.seeded_adapter(model))
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, specs.VOCAB, (1, 150)))
    whole, fresh = nnx.merge(model.graphdef, model.weights).hidden_states(
        tokens, run.positions(tokens), adapter=adapter, return_cache=True
    )
    earlier, parts = kv_cache.empty(model.config, 4, jnp.float32, model.mesh), []
    for number, start in enumerate((0, 64, 128)):
        piece = tokens[:, start : start + 64]
        positions = start + run.positions(piece)
        part, blocks = _cached(
            model.graphdef, model.weights, piece, positions, earlier, kv_cache.Continuing(jnp.int32(start)), adapter
        )
        parts.append(part)
        zero, here = jnp.array([0]), jnp.array([number])
        earlier = copy_blocks(earlier, blocks, zero, here, jnp.int32(1))
    assert np.max(np.abs(jnp.concatenate(parts, axis=1) - whole)) <= 1e-4
    for kept, new in zip(earlier.layers, fresh.layers, strict=True):
        assert np.max(np.abs(kept.k[:3] - new.k)) <= 1e-4
        assert np.max(np.abs(kept.v[:3] - new.v)) <= 1e-4


def test_c13_right_padding_changes_nothing(model):
    """Prompts of different lengths in one batch: the shorter one's hidden states are those of running alone."""
    alone = run.logits(model.graphdef, model.weights, TOKENS[:1, :13], run.positions(TOKENS[:1, :13]))
    padded = TOKENS.at[0, 13:].set(0)
    together = run.logits(model.graphdef, model.weights, padded, run.positions(padded))
    assert np.max(np.abs(together[:1, :13] - alone)) <= 1e-5


def test_without_a_cache_nothing_is_kept(model):
    merged = nnx.merge(model.graphdef, model.weights)
    assert merged.hidden_states(TOKENS, run.positions(TOKENS))[1] is None


def test_all_layers_share_one_trace(model, monkeypatch):
    traces = []
    plain = stack.DecoderLayer.__call__
    monkeypatch.setattr(stack.DecoderLayer, "__call__", lambda *args: (traces.append(1), plain(*args))[1])
    tokens = TOKENS[:, :11]  # a shape that no other test has traced
    run.logits(model.graphdef, model.weights, tokens, run.positions(tokens))
    assert model.config.num_layers == 2
    assert len(traces) == 1
