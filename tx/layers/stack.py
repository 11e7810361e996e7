"""A decoder layer, and the loop over all of them, every layer through one jitted function.

All layers of one kind share a trace and a lowered function, so tracing costs one layer, not all. Weights stay one
array per layer: scanning over stacked ones costs decoding 2 to 3 times, which slices them at every step. Training
and prefill drive the layers themselves, one program each (``tx.worker.layerwise``, ``tx.worker.programs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tx.layers.attention import Attention, AttentionShape, Place
from tx.layers.kv_cache import KVBlocks, LayerBlocks
from tx.layers.lora import KEPT, AdapterView, LoraWeights
from tx.layers.mlp import GatedMlp
from tx.layers.moe import SparseMlp
from tx.layers.norm import RMSNorm
from tx.layers.sharding import constrain

RotaryTables = tuple[Float[Array, "row seq half"], Float[Array, "row seq half"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerLora:
    """One layer's part of an AdapterView. gate: [row or 1, rank], expert_gate: [row or 1, expert_rank]."""

    sites: dict[str, LoraWeights]
    gate: Any
    expert_gate: Any


def layer_lora(view: AdapterView | None, layer: int) -> LayerLora:
    """A layer's part of the view; of None, the base model's."""
    if view is None:
        return LayerLora({}, None, None)
    return LayerLora(view.adapter.layers[layer], view.gate, view.expert_gate)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, attention: AttentionShape, mlp: GatedMlp | SparseMlp, *, eps: float, mesh: Mesh | None) -> None:
        self.input_layernorm = RMSNorm(attention.embed, eps)
        self.self_attn = Attention(attention, mesh)
        self.post_attention_layernorm = RMSNorm(attention.embed, eps)
        self.mlp = mlp
        self.mesh = mesh

    def __call__(
        self,
        x: Float[Array, "row seq embed"],
        rope: RotaryTables,
        positions: Int[Array, "row seq"],
        lora: LayerLora,
        cache: LayerBlocks | None,
        place: Place | None,
    ) -> tuple[Float[Array, "row seq embed"], LayerBlocks]:
        """The residual stream after this layer, and the layer's keys and values."""
        attended, kv = self.self_attn(self.input_layernorm(x), *rope, positions, lora.sites, lora.gate, cache, place)
        x = checkpoint_name(constrain(x + attended, ("row", "seq", None), self.mesh), KEPT)
        mlp_gate = lora.expert_gate if isinstance(self.mlp, SparseMlp) else lora.gate
        x = x + self.mlp(self.post_attention_layernorm(x), lora.sites, mlp_gate)
        return constrain(x, ("row", "seq", None), self.mesh), kv


def run_layers(
    layers: Sequence[DecoderLayer],
    x: Float[Array, "row seq embed"],
    rope: RotaryTables,
    positions: Int[Array, "row seq"],
    *,
    adapter: AdapterView | None,
    cache: KVBlocks | None,
    place: Place | None,
    keep_kv: bool,
) -> tuple[Float[Array, "row seq embed"], KVBlocks | None]:
    """All layers in turn; the blocks that the layers return if ``keep_kv`` or a cache is given, or None."""
    keep_kv = keep_kv or cache is not None
    kept: list[LayerBlocks] = []
    for index, layer in enumerate(layers):
        graphdef, weights = nnx.split(layer)
        layer_cache = None if cache is None else cache.layers[index]
        lora = layer_lora(adapter, index)
        x, kv = _run_layer(graphdef, keep_kv, weights, x, rope, positions, lora, layer_cache, place)
        if kv is not None:
            kept.append(kv)
    return x, KVBlocks(tuple(kept)) if keep_kv else None


@partial(jax.jit, static_argnums=(0, 1))
def _run_layer(
    graphdef: Any,
    keep_kv: bool,
    weights: Any,
    x: Float[Array, "row seq embed"],
    rope: RotaryTables,
    positions: Int[Array, "row seq"],
    lora: LayerLora,
    cache: LayerBlocks | None,
    place: Place | None,
) -> tuple[Float[Array, "row seq embed"], LayerBlocks | None]:
    layer: DecoderLayer = nnx.merge(graphdef, weights)
    x, kv = layer(x, rope, positions, lora, cache, place)
    return x, kv if keep_kv else None
