"""Qwen3's own: the norm of each head's query and key, and bfloat16 close to float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import tiny_specs as specs
from tests.support import golden_models as run
from tx.models.loading import load_model
from tx.worker.mesh import make_mesh

TOKENS = specs.tokens()[:, :24]


def test_head_norms_are_used(tmp_path):
    """Each of the four per-head norm weights changes the logits."""
    model = run.load(tmp_path, "qwen3")
    plain = run.logits(model.graphdef, model.weights, TOKENS, run.positions(TOKENS))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(model.weights) if "_norm" in str(path)]
    assert len(paths) == 4

    for chosen in paths:
        doubled = jax.tree_util.tree_map_with_path(lambda p, x, c=chosen: x * 2 if p == c else x, model.weights)
        assert np.max(np.abs(run.logits(model.graphdef, doubled, TOKENS, run.positions(TOKENS)) - plain)) > 1e-3


def test_bfloat16_keeps_norms_and_router_in_float32_and_is_close(tmp_path):
    folder = specs.write_model(tmp_path, "qwen3_moe")
    wide = load_model(folder, make_mesh(), jnp.float32)
    low = load_model(folder, make_mesh(), jnp.bfloat16)
    kept = {str(p) for p, x in jax.tree_util.tree_leaves_with_path(low.weights) if x.dtype == jnp.float32}
    assert kept
    assert all("norm" in path or "'gate'" in path for path in kept), kept
    logits = [run.logits(m.graphdef, m.weights, TOKENS, run.positions(TOKENS)) for m in (wide, low)]
    assert logits[1].dtype == jnp.float32
    assert float(jnp.mean(jnp.abs(logits[0] - logits[1]))) <= 0.03
