"""Runs the tiny models of tests/golden/tiny_specs.py the way the worker does, for comparison with models.npz."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden import tiny_specs as specs
from tx.layers import logprobs
from tx.layers.lora import Adapter, AdapterView, LoraWeights, adapter_sharding, single_view
from tx.models.loading import LoadedModel, load_model
from tx.models.lora_sites import lora_sites
from tx.worker.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "models.npz"


def golden(name: str) -> dict[str, np.ndarray]:
    """The reference arrays of one model."""
    with np.load(GOLDEN) as arrays:
        return {key.split("/", 1)[1]: arrays[key] for key in arrays.files if key.split("/", 1)[0] == name}


def load(folder: Path, name: str, **mesh_sizes: int) -> LoadedModel:
    """Write and load one of the tiny models."""
    return load_model(specs.write_model(folder, name), make_mesh(**mesh_sizes), jnp.float32)


def seeded_adapter(model: LoadedModel) -> Adapter:
    """The adapter with which the golden file was made, on the model's mesh."""
    sites = lora_sites(model.config)
    weights = specs.adapter({site.name: (site.num_experts, site.in_features, site.out_features) for site in sites})
    layers: list[dict[str, LoraWeights]] = [{} for _ in range(model.config.num_layers)]
    unembed = None
    for site in sites:
        place = adapter_sharding(site, model.mesh)
        a, b = weights[site.name]
        pair = LoraWeights(jax.device_put(a, place.a), jax.device_put(b, place.b))
        if site.layer is None:
            unembed = pair
        else:
            layers[site.layer][site.key] = pair
    return Adapter(tuple(layers), unembed)


def view(adapter: Adapter) -> AdapterView:
    """The seeded adapter used by every row."""
    return single_view(adapter, specs.SCALING, specs.EXPERT_SCALING, specs.RANK, specs.EXPERT_RANK)


def positions(tokens: np.ndarray | jax.Array) -> jax.Array:
    """0, 1, 2, … in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


@partial(jax.jit, static_argnums=(0,))
def logits(graphdef, weights, tokens, positions, adapter=None):
    """[row, seq, vocab] float32; only tiny models can afford it."""
    model = nnx.merge(graphdef, weights)
    hidden, _ = model.hidden_states(tokens, positions, adapter=adapter)
    lora = None if adapter is None else adapter.adapter.unembed
    gate = None if adapter is None else adapter.gate
    return logprobs.next_logits(hidden, model.unembed_kernel(), lora, gate)


@partial(jax.jit, static_argnums=(0,), static_argnames=("chunk",))
def next_logprobs_and_gradients(graphdef, weights, adapter, tokens, positions, *, chunk=64):
    """Log-probability of each next token, and the gradient of their sum with respect to the adapter."""

    def total(adapter):
        model = nnx.merge(graphdef, weights)
        used = view(adapter)
        hidden, _ = model.hidden_states(tokens, positions, adapter=used)
        result = logprobs.target_logprobs(
            hidden[:, :-1], model.unembed_kernel(), tokens[:, 1:, None], adapter.unembed, used.gate, chunk=chunk
        )[..., 0]
        return jnp.sum(result), result

    (_, result), gradients = jax.value_and_grad(total, has_aux=True)(adapter)
    return result, gradients


def by_name(model: LoadedModel, adapter: Adapter) -> dict[str, np.ndarray]:
    """An adapter, or its gradients, as "<site>.a" and "<site>.b"."""
    found = {}
    for site in lora_sites(model.config):
        pair = adapter.unembed if site.layer is None else adapter.layers[site.layer][site.key]
        found |= {f"{site.name}.a": np.asarray(pair.a), f"{site.name}.b": np.asarray(pair.b)}
    return found


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value."""
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))
