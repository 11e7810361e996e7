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


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _greedy_step(graphdef, weights, tokens, positions, last, cache):
    """The most likely token after position ``last`` of ``tokens``; its one block is the cache."""
    model = nnx.merge(graphdef, weights)
    zero = jnp.zeros(1, jnp.int32)
    place = None if cache is None else kv_cache.Decoding(owner=zero, start=zero, target=zero)
    hidden, cache = model.hidden_states(tokens, positions, cache=cache, place=place, return_cache=True)
    scores = jax.nn.log_softmax(logprobs.next_logits(hidden[:, last], model.unembed_kernel(), None, None))
    return jnp.argmax(scores, axis=-1), jnp.max(scores, axis=-1), cache


@pytest.mark.slow
def test_smollm2_continues_as_in_transformers(demo_model):
    """Five prompts, 32 greedy tokens each: token for token, and their logprobs to float noise."""
    model = load_model(demo_model, make_mesh(), jnp.float32)
    assert MODELS[model.config.architecture] is Llama3ForCausalLM
    for case in json.loads(GOLDEN.read_text()):
        prompt = np.array([case["prompt"]])
        size = prompt.shape[1]
        assert size <= 32
        padded, positions, last, cache = np.pad(prompt, ((0, 0), (0, 32 - size))), np.arange(32)[None], size - 1, None
        tokens, scores = [], []
        for step in range(len(case["tokens"])):
            token, score, cache = _greedy_step(model.graphdef, model.weights, padded, positions, last, cache)
            tokens.append(int(token[0]))
            scores.append(float(score[0]))
            padded, positions, last = np.asarray(token)[:, None], np.array([[size + step]]), 0
        assert tokens == case["tokens"]
        assert np.max(np.abs(np.array(scores) - case["logprobs"])) <= 1e-4
