"""Llama 3's own: rope scaling honoured, and the real SmolLM2 continuing as in transformers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import tiny_specs as specs
from tests.support import golden_models as run
from tx.layers import kv_cache, logprobs
from tx.models.llama3 import Llama3ForCausalLM
from tx.models.loading import load_model
from tx.models.registry import MODELS
from tx.worker.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2.json"


def test_c13_rope_scaling_changes_the_logits_as_in_transformers(tmp_path):
    """With the scaling ignored the same checkpoint gives other logits: the golden file tells them apart."""
    expected = run.golden("llama3")["logits"]
    tokens = specs.tokens()
    errors = {}
    for name, overrides in (("scaled", {}), ("ignored", {"rope_scaling": None})):
        folder = specs.write_model(tmp_path / name, "llama3", **overrides)
        model = load_model(folder, make_mesh(), jnp.float32)
        got = run.logits(model.graphdef, model.weights, tokens, run.positions(tokens))[:, ::8]
        errors[name] = float(np.max(np.abs(got - expected)))
    assert errors["scaled"] <= 1e-4
    assert errors["ignored"] > 0.1


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _greedy_step(graphdef, weights, tokens, positions, cache):
    model = nnx.merge(graphdef, weights)
    hidden, cache = model.hidden_states(tokens, positions, cache=cache)
    scores = jax.nn.log_softmax(logprobs.next_logits(hidden[:, -1], model.unembed_kernel(), None, None))
    return jnp.argmax(scores, axis=-1), jnp.max(scores, axis=-1), cache


@pytest.mark.slow
def test_smollm2_continues_as_in_transformers(demo_model):
    """Five prompts, 32 greedy tokens each: token for token, and their logprobs to float noise."""
    model = load_model(demo_model, make_mesh(), jnp.float32)
    assert MODELS[model.config.architecture] is Llama3ForCausalLM
    for case in json.loads(GOLDEN.read_text()):
        cache = kv_cache.empty(model.config, 1, 64, jnp.float32, model.mesh)
        prompt = np.array([case["prompt"]])
        padded = np.pad(prompt, ((0, 0), (32 - prompt.shape[1], 0)), mode="edge")
        # Padding on the left writes past the end, so that it is dropped: one shape for every prompt.
        positions = np.arange(32)[None] - (32 - prompt.shape[1])
        positions = np.where(positions < 0, 64, positions)
        tokens, scores = [], []
        for step in range(len(case["tokens"])):
            token, score, cache = _greedy_step(model.graphdef, model.weights, padded, positions, cache)
            tokens.append(int(token[0]))
            scores.append(float(score[0]))
            padded, positions = np.asarray(token)[:, None], np.array([[prompt.shape[1] + step]])
        assert tokens == case["tokens"]
        assert np.max(np.abs(np.array(scores) - case["logprobs"])) <= 1e-4
