"""The layer loop: one trace for all layers, the cache in every form, padding on the right without effect.

Rematerialisation is compared with torch in tests/models/test_decoder.py.
"""

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

TOKENS = jnp.asarray(specs.tokens()[:, :20])


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def model(request, tmp_path_factory):
    return run.load(tmp_path_factory.mktemp("stack"), request.param)


@partial(jax.jit, static_argnums=0)
def _cached(graphdef, weights, tokens, positions, cache, adapter):
    return nnx.merge(graphdef, weights).hidden_states(tokens, positions, cache=cache, adapter=adapter)


def test_cache_in_chunks_and_token_by_token_equals_one_pass(model):
    adapter, positions = run.view(run.seeded_adapter(model)), run.positions(TOKENS)
    whole, fresh = nnx.merge(model.graphdef, model.weights).hidden_states(
        TOKENS, positions, adapter=adapter, return_cache=True
    )
    cache = kv_cache.empty(model.config, 2, 32, jnp.float32, model.mesh)
    parts = []
    for start, stop in ((0, 8), (8, 16), (16, 17), (17, 18), (18, 19), (19, 20)):
        part, cache = _cached(
            model.graphdef, model.weights, TOKENS[:, start:stop], positions[:, start:stop], cache, adapter
        )
        parts.append(part)
    assert np.max(np.abs(jnp.concatenate(parts, axis=1) - whole)) <= 1e-4
    for kept, new in zip(cache.k + cache.v, fresh.k + fresh.v, strict=True):
        assert np.max(np.abs(kept[:, :20] - new)) <= 1e-4
        assert not np.any(kept[:, 20:])


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
