"""Causal self-attention with grouped heads: the module, and the choice of kernel.

Three forms: inside each row by index (training, prefill from nothing), one new token per row against a cache (decode),
several new tokens against a cache (prefill in chunks). On GPU in bfloat16 they run through cuDNN, elsewhere as plain
XLA with softmax in float32. Rows are independent and causal, so padding on the right never reaches a real position.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tx.layers import kv_cache
from tx.layers.kv_cache import LayerCache
from tx.layers.lora import LoraLinear, LoraWeights
from tx.layers.norm import RMSNorm
from tx.layers.rotary import rotate
from tx.layers.sharding import constrain

log = logging.getLogger(__name__)

QUERY_BLOCK = 512
"""Longer rows attend in blocks of this many queries, so that scores take O(seq * block), also in the backward pass."""

MASKED = float(jnp.finfo(jnp.float32).min)

Queries = Float[Array, "row seq heads head_dim"]
Keys = Float[Array, "row length kv_heads head_dim"]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention layer, and how its heads meet the mesh.

    ``heads_axis`` / ``kv_axis``: "heads" / "kv_heads", or None where the heads are replicated.
    """

    embed: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    head_norm_eps: float | None  # Qwen3 norms each head's query and key
    heads_axis: str | None
    kv_axis: str | None


class Attention(nnx.Module):
    """Projections, rotary positions, attention, output projection; each projection takes an adapter."""

    def __init__(self, shape: AttentionShape, mesh: Mesh | None) -> None:
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = LoraLinear(shape.embed, queries, ("embed", shape.heads_axis), bias=shape.bias, mesh=mesh)
        self.k_proj = LoraLinear(shape.embed, keys, ("embed", shape.kv_axis), bias=shape.bias, mesh=mesh)
        self.v_proj = LoraLinear(shape.embed, keys, ("embed", shape.kv_axis), bias=shape.bias, mesh=mesh)
        self.o_proj = LoraLinear(queries, shape.embed, (shape.heads_axis, "embed"), bias=shape.bias, mesh=mesh)
        eps = shape.head_norm_eps
        self.q_norm = RMSNorm(shape.head_dim, eps) if eps is not None else None
        self.k_norm = RMSNorm(shape.head_dim, eps) if eps is not None else None
        self.shape = shape
        self.mesh = mesh

    def __call__(
        self,
        x: Float[Array, "row seq embed"],
        cos: Float[Array, "row seq half"],
        sin: Float[Array, "row seq half"],
        positions: Int[Array, "row seq"],
        lora: dict[str, LoraWeights],
        gate: Float[Array, "gate_rows rank"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "row seq embed"], LayerCache]:
        """The layer's output and its keys and values: the updated cache, or the fresh ones if there was none."""
        rows, seq, _ = x.shape
        shape = self.shape

        def heads(linear: LoraLinear, key: str, axis: str | None) -> Queries:
            y = linear(x, lora.get(key), gate).reshape(rows, seq, -1, shape.head_dim)
            return constrain(y, ("row", "seq", axis, None), self.mesh)

        q = heads(self.q_proj, "q_proj", shape.heads_axis)
        k = heads(self.k_proj, "k_proj", shape.kv_axis)
        v = heads(self.v_proj, "v_proj", shape.kv_axis)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            y = causal_attention(q, *self._spread((k, v)), on_gpu=self._on_gpu)
        else:
            k, v = kv_cache.write(cache[0], k, positions), kv_cache.write(cache[1], v, positions)
            y = cached_attention(q, *self._spread((k, v)), positions, on_gpu=self._on_gpu)
        return self.o_proj(y.reshape(rows, seq, -1), lora.get("o_proj"), gate), (k, v)

    def _spread(self, kv: LayerCache) -> LayerCache:
        """Where heads are sharded and KV heads are too few for it, repeat them, so that each device has its own."""
        shape = self.shape
        if shape.heads_axis is None or shape.kv_axis is not None:
            return kv
        repeats = shape.num_heads // shape.num_kv_heads
        k, v = (
            constrain(jnp.repeat(x, repeats, axis=2), ("row", "length", shape.heads_axis, None), self.mesh) for x in kv
        )
        return k, v

    @property
    def _on_gpu(self) -> bool:
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return platform == "gpu"


def causal_attention(q: Queries, k: Keys, v: Keys, *, on_gpu: bool = False) -> Queries:
    """Position i of a row attends to positions 0 … i of that row."""
    fused = _cudnn(q, k, v, is_causal=True) if on_gpu else None
    if fused is not None:
        return fused
    seq = q.shape[1]

    def block(start: int, stop: int) -> Queries:
        mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        return _attend(q[:, start:stop], k[:, :stop], v[:, :stop], mask[None])

    if seq <= QUERY_BLOCK:
        return block(0, seq)
    bounds = [(start, min(start + QUERY_BLOCK, seq)) for start in range(0, seq, QUERY_BLOCK)]
    blocks = [jax.checkpoint(block, static_argnums=(0, 1))(start, stop) for start, stop in bounds]
    return jnp.concatenate(blocks, axis=1)


def cached_attention(
    q: Queries, k: Keys, v: Keys, positions: Int[Array, "row seq"], *, on_gpu: bool = False
) -> Queries:
    """A query at position p attends to cache positions 0 … p of its row."""
    length = k.shape[1]
    mask = jnp.arange(length)[None, None, :] <= positions[:, :, None]
    decoding = q.shape[1] == 1
    if on_gpu:
        lengths = jnp.minimum(positions[:, 0] + 1, length).astype(jnp.int32)
        which: dict[str, Array] = {"key_value_seq_lengths": lengths} if decoding else {"mask": mask[:, None]}
        fused = _cudnn(q, k, v, **which)
        if fused is not None:
            return fused
    return _attend_one(q, k, v, mask) if decoding else _attend(q, k, v, mask)


def _cudnn(q: Queries, k: Keys, v: Keys, **which: Any) -> Queries | None:
    """The fused kernel, or None where cuDNN has none for these types and shapes (it says so while tracing)."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return None
    try:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **which)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        log.warning("cuDNN attention refused %s against %s, using XLA: %s", q.shape, k.shape, error)
        return None


def _attend(q: Queries, k: Keys, v: Keys, mask: Array) -> Queries:
    """Masked attention, mask [row or 1, seq, length]; scores, softmax and sums in float32."""
    rows, seq, num_heads, head_dim = q.shape
    grouped = q.reshape(rows, seq, k.shape[2], -1, head_dim)
    scores = jnp.einsum("rqkgd,rskd->rkgqs", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("rkgqs,rskd->rqkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(rows, seq, num_heads, head_dim).astype(q.dtype)


def _attend_one(q: Queries, k: Keys, v: Keys, mask: Array) -> Queries:
    """``_attend`` for one query per row, as sums of products in the cache's own layout.

    Matrix products would first transpose the whole cache: 0.6 against 1.7 ms for 8 rows of 1024 on a 2-core CPU.
    """
    rows, _, num_heads, head_dim = q.shape
    grouped = q.reshape(rows, 1, k.shape[2], -1, head_dim).astype(jnp.float32)
    scores = jnp.sum(grouped * k[:, :, :, None].astype(jnp.float32), axis=-1) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, 0, :, None, None], scores, MASKED), axis=1)
    # Rounded as in _attend, so that decode and training round alike in bfloat16.
    weights = weights.astype(v.dtype).astype(jnp.float32)
    out = jnp.sum(weights[..., None] * v[:, :, :, None].astype(jnp.float32), axis=1)
    return out.reshape(rows, 1, num_heads, head_dim).astype(q.dtype)
