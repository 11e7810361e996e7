"""Runs a tiny model on one device and on a mesh of 8 forced host devices, and prints the largest differences as JSON.

usage: XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.support.mesh_run FOLDER SPEC MESH OVERRIDES
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden import tiny_specs as specs
from tests.support import golden_models as run
from tx.layers import kv_cache, logprobs
from tx.models.loading import LoadedModel, load_model
from tx.worker.mesh import make_mesh
from tx.worker.programs import PrefillPrograms

ROWS, SEQ, NEW = 4, 24, 6


@partial(jax.jit, static_argnums=0)
def _step(graphdef, weights, tokens, positions, cache, adapter):
    model = nnx.merge(graphdef, weights)
    rows = jnp.arange(ROWS)
    place = None if cache is None else kv_cache.Decoding(rows, jnp.zeros(ROWS, jnp.int32), rows)  # a block per row
    hidden, cache = model.hidden_states(tokens, positions, cache=cache, place=place, adapter=adapter, return_cache=True)
    scores = logprobs.next_logits(hidden[:, -1], model.unembed_kernel(), adapter.adapter.unembed, adapter.gate)
    return jnp.argmax(scores, axis=-1), cache


def greedy(model: LoadedModel, tokens: np.ndarray) -> list[list[int]]:
    """NEW greedy tokens per row, prompt and decode steps through a KV cache."""
    adapter = run.view(run.seeded_adapter(model))
    assert kv_cache.num_blocks(SEQ + NEW) == 1
    token, cache = _step(model.graphdef, model.weights, tokens, run.positions(tokens), None, adapter)
    found = [np.asarray(token)]
    for step in range(NEW - 1):
        where = np.full((ROWS, 1), SEQ + step)
        token, cache = _step(model.graphdef, model.weights, found[-1][:, None], where, cache, adapter)
        found.append(np.asarray(token))
    return np.stack(found, axis=1).tolist()


def prefilled(model: LoadedModel, tokens: np.ndarray) -> list[np.ndarray]:
    """Hidden states and keys of two rows as the sampler prefills them, and of a third row behind the first one."""
    view, programs = run.view(run.seeded_adapter(model)), PrefillPrograms(model)
    fresh, hidden = programs.run(jnp.asarray(tokens[:2]), None, jnp.int32(0), view, keep_hidden=True)
    one = jax.tree.map(lambda blocks: blocks[:1], fresh)
    more, behind = programs.run(jnp.asarray(tokens[2:3]), one, jnp.int32(SEQ), view, keep_hidden=True)
    return [np.asarray(x) for x in (hidden, fresh.layers[-1].k, fresh.layers[-1].v, behind, more.layers[-1].k)]


def main(folder: Path, name: str, sizes: dict[str, int], overrides: dict[str, object]) -> dict[str, object]:
    """Largest relative error per quantity, and whether greedy tokens agree."""
    assert jax.device_count() == 8
    specs.write_model(folder, name, **overrides)
    tokens = np.random.default_rng(1).integers(3, specs.VOCAB, (ROWS, SEQ)).astype(np.int32)
    positions = run.positions(tokens)
    results = []
    for mesh in (make_mesh(), make_mesh(**sizes)):
        model = load_model(folder, mesh, jnp.float32)
        adapter = run.seeded_adapter(model)
        scores = run.logits(model.graphdef, model.weights, tokens, positions, run.view(adapter))
        found, gradients = run.next_logprobs_and_gradients(model.graphdef, model.weights, adapter, tokens, positions)
        named = run.by_name(model, gradients)
        results.append((np.asarray(scores), np.asarray(found), named, greedy(model, tokens), prefilled(model, tokens)))
    one, many = results
    spread = sum(len({str(s.index) for s in leaf.addressable_shards}) > 1 for leaf in jax.tree.leaves(model.weights))
    return {
        "logits": run.relative_error(many[0], one[0]),
        "logprobs": float(np.max(np.abs(many[1] - one[1]))),
        "loss": float(abs(many[1].sum() - one[1].sum()) / abs(one[1].sum())),
        "gradients": max(run.relative_error(many[2][key], one[2][key]) for key in one[2]),
        "prefill": max(run.relative_error(*pair) for pair in zip(many[4], one[4], strict=True)),
        "same_tokens": one[3] == many[3],
        "sharded_weights": spread,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]))))
