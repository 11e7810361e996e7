"""Causal self-attention with grouped heads: the module, and the choice of kernel.

Four forms: inside each row by index (prefill from nothing, training one datum per row), inside each datum of a packed
row (training), one new token per row against the pool of blocks (decode), several new tokens of one row behind what it
already has (prefill in pieces). The first runs through cuDNN on GPU in bfloat16; everything else is plain XLA with
softmax in float32. Rows are independent and causal, so padding on the right never reaches a real position.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tx.layers import kv_cache
from tx.layers.blockwise import MASKED, packed_attention
from tx.layers.kv_cache import BLOCK, Decoding, LayerBlocks
from tx.layers.lora import KEPT, LoraLinear, LoraWeights
from tx.layers.norm import RMSNorm
from tx.layers.rotary import rotate
from tx.layers.sharding import constrain

log = logging.getLogger(__name__)

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
"""JAX's name of cuDNN's forward kernel, as a policy of ``jax.checkpoint`` meets it."""

PRIOR_PIECE = 8
"""Blocks of earlier positions that a piece of a prompt attends to at a time."""

Queries = Float[Array, "row seq heads head_dim"]
Keys = Float[Array, "row length kv_heads head_dim"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """Rows of several datums each. starts: int [row seq], where in its row the datum of each position begins."""

    starts: Any


type Place = kv_cache.Place | Packed
"""What the rows of a call stand in: the pool of blocks, earlier blocks, or a packed micro-batch."""


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
        cache: LayerBlocks | None,
        place: Place | None,
    ) -> tuple[Float[Array, "row seq embed"], LayerBlocks]:
        """The layer's output and blocks: the updated pool when decoding, else the fresh keys and values."""
        rows, seq, _ = x.shape
        shape = self.shape

        def heads(linear: LoraLinear, key: str, axis: str | None) -> Queries:
            y = checkpoint_name(linear(x, lora.get(key), gate), KEPT).reshape(rows, seq, -1, shape.head_dim)
            return constrain(y, ("row", "seq", axis, None), self.mesh)

        q = heads(self.q_proj, "q_proj", shape.heads_axis)
        k = heads(self.k_proj, "k_proj", shape.kv_axis)
        v = heads(self.v_proj, "v_proj", shape.kv_axis)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if isinstance(place, Packed):
            y = packed_attention(q, self._spread(k, 2), self._spread(v, 2), place.starts)
            kept = kv_cache.in_blocks(k, v)
        elif cache is None:
            y = causal_attention(q, self._spread(k, 2), self._spread(v, 2), on_gpu=self._on_gpu)
            kept = kv_cache.in_blocks(k, v)
        elif isinstance(place, Decoding):
            kept = kv_cache.write(cache, k[:, 0], v[:, 0], place.target, positions[:, 0])
            y = decode_attention(q, self._spread_blocks(kept), place, positions, on_gpu=self._on_gpu)
        else:
            assert place is not None  # blocks come with what they mean
            blocks = self._spread_blocks(cache)
            y = continued_attention(q, self._spread(k, 2), self._spread(v, 2), blocks, place.length)
            kept = kv_cache.in_blocks(k, v)
        return self.o_proj(y.reshape(rows, seq, -1), lora.get("o_proj"), gate), kept

    def _spread(self, x: Array, axis: int) -> Array:
        """Where heads are sharded and KV heads are too few for it, repeat them, so that each device has its own."""
        shape = self.shape
        if shape.heads_axis is None or shape.kv_axis is not None:
            return x
        axes = [None] * x.ndim
        return constrain(
            jnp.repeat(x, shape.num_heads // shape.num_kv_heads, axis=axis),
            [*axes[:axis], shape.heads_axis, *axes[axis + 1 :]],
            self.mesh,
        )

    def _spread_blocks(self, blocks: LayerBlocks) -> LayerBlocks:
        return LayerBlocks(self._spread(blocks.k, 1), self._spread(blocks.v, 1))

    @property
    def _on_gpu(self) -> bool:
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return platform == "gpu"


def kernels(mesh: Mesh, dtype: Any, head_dim: int) -> str:
    """What runs where on this mesh's devices, for the log."""
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    fused = on_gpu and _cudnn_takes(jnp.dtype(dtype), head_dim)
    summed = "a product per row" if on_gpu else "segment sums"
    return f"{'cuDNN' if fused else 'XLA'} inside a prompt, XLA over blocks ({summed}) when decoding"


def keeps_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy of ``jax.checkpoint``: keep what cuDNN's forward kernel gives, output and softmax statistics.

    No name reaches inside its derivative rule, and computed again it would be a quarter of all attention.
    """
    return bool(primitive.name == CUDNN_FORWARD)


def _cudnn_takes(dtype: Any, head_dim: int) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 256


def causal_attention(q: Queries, k: Keys, v: Keys, *, on_gpu: bool = False) -> Queries:
    """Position i of a row attends to positions 0 … i of that row."""
    fused = _cudnn(q, k, v, is_causal=True) if on_gpu else None
    if fused is not None:
        return fused
    return packed_attention(q, k, v, jnp.zeros(q.shape[:2], jnp.int32))


def decode_attention(
    q: Queries, blocks: LayerBlocks, place: Decoding, positions: Int[Array, "row 1"], *, on_gpu: bool = False
) -> Queries:
    """The one query of each row, at its position, against its own blocks up to that position.

    Each block is met by the query of its owner and gives a partial softmax; partial ones are added up per row. A row
    without blocks gives zeros. What a row holds, finite or not, reaches no other row.
    """
    rows, _, num_heads, head_dim = q.shape
    kv_heads = blocks.k.shape[1]
    grouped = q.reshape(rows, kv_heads, num_heads // kv_heads, head_dim)
    owner = jnp.minimum(place.owner, rows - 1)  # a free block reads somebody's query; its sums go nowhere
    known = jnp.where(place.owner < rows, positions[owner, 0] + 1 - place.start, 0)
    scores = jnp.einsum("nkgd,nkdo->nkgo", grouped[owner], blocks.k, preferred_element_type=jnp.float32)
    scores = jnp.where((jnp.arange(BLOCK) < known[:, None])[:, None, None], scores * head_dim**-0.5, MASKED)
    peak = jax.ops.segment_max(scores.max(axis=-1), place.owner, rows)
    weights = jnp.exp(scores - peak[owner][..., None])
    values = jnp.einsum("nkgo,nkod->nkgd", weights.astype(blocks.v.dtype), blocks.v, preferred_element_type=jnp.float32)
    per_row = _sum_in_order if on_gpu else jax.ops.segment_sum
    total = per_row(weights.sum(axis=-1), place.owner, rows)
    out = per_row(values, place.owner, rows) / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(rows, 1, num_heads, head_dim).astype(q.dtype)


def _sum_in_order(x: Float[Array, "block *inner"], owner: Int[Array, "block"], rows: int) -> Float[Array, "row *inner"]:
    """``segment_sum`` as a product: a GPU's scattered additions come in any order, and a seed must mean one thing."""
    mine = owner == jnp.arange(rows)[:, None]
    flat = x.reshape(x.shape[0], -1)
    finite = jnp.isfinite(flat)
    # 0 * inf would carry one row's overflow to all others: take it out, and give it back to its row alone.
    out = jnp.dot(mine.astype(jnp.float32), jnp.where(finite, flat, 0.0), precision=lax.Precision.HIGHEST)
    broken = (mine & ~finite.all(axis=-1)).any(axis=-1)
    return jnp.where(broken[:, None], jnp.nan, out).reshape(rows, *x.shape[1:])


def continued_attention(
    q: Float[Array, "1 seq heads head_dim"],
    k: Float[Array, "1 seq kv_heads head_dim"],
    v: Float[Array, "1 seq kv_heads head_dim"],
    blocks: LayerBlocks,
    length: Int[Array, ""],
) -> Float[Array, "1 seq heads head_dim"]:
    """A piece of a prompt: causal inside it, and behind the first ``length`` positions of the blocks.

    Goes over the blocks a few at a time with a running softmax, so its memory doesn't grow with ``length``, and only
    as far as there are positions.
    """
    _, seq, num_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q[0].reshape(seq, kv_heads, -1, head_dim)

    def fold(carry: Any, scores: Array, values: Callable[[Array], Array]) -> Any:
        peak, total, out = carry
        higher = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - higher[..., None])
        scale = jnp.exp(peak - higher)
        return higher, total * scale + weights.sum(axis=-1), out * scale[..., None] + values(weights.astype(v.dtype))

    def earlier(piece: Array, carry: Any) -> Any:
        # The last piece may start early and meet blocks again: those are masked by their position.
        at = jnp.minimum(piece * width, blocks.k.shape[0] - width)
        keys = lax.dynamic_slice_in_dim(blocks.k, at, width)
        theirs = lax.dynamic_slice_in_dim(blocks.v, at, width)
        positions = (at + jnp.arange(width))[:, None] * BLOCK + jnp.arange(BLOCK)
        seen = (positions < length) & (positions >= piece * width * BLOCK)
        scores = jnp.einsum("qkgd,nkdo->kgqno", grouped, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
        scores = jnp.where(seen, scores, MASKED).reshape(*scores.shape[:3], -1)

        def values(weights: Array) -> Array:
            weights = weights.reshape(*weights.shape[:3], width, BLOCK)
            return jnp.einsum("kgqno,nkod->kgqd", weights, theirs, preferred_element_type=jnp.float32)

        return fold(carry, scores, values)

    width = min(PRIOR_PIECE, blocks.k.shape[0])
    mask = jnp.arange(seq)[:, None] >= jnp.arange(seq)[None, :]
    own = jnp.einsum("qkgd,skd->kgqs", grouped, k[0], preferred_element_type=jnp.float32) * head_dim**-0.5
    start = (
        jnp.full(own.shape[:3], MASKED),
        jnp.zeros(own.shape[:3], jnp.float32),
        jnp.zeros((*own.shape[:3], head_dim), jnp.float32),
    )
    carry = fold(
        start,
        jnp.where(mask, own, MASKED),
        lambda weights: jnp.einsum("kgqs,skd->kgqd", weights, v[0], preferred_element_type=jnp.float32),
    )
    _, total, out = lax.fori_loop(0, -(-length // (width * BLOCK)), earlier, carry)
    out = jnp.moveaxis(out / total[..., None], 2, 0)
    return out.reshape(1, seq, num_heads, head_dim).astype(q.dtype)


def _cudnn(q: Queries, k: Keys, v: Keys, **which: Any) -> Queries | None:
    """The fused kernel, or None where cuDNN has none for these types and shapes (it says so while tracing)."""
    if not _cudnn_takes(q.dtype, q.shape[-1]):
        return None
    try:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **which)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        log.warning("cuDNN attention refused %s against %s, using XLA: %s", q.shape, k.shape, error)
        return None
