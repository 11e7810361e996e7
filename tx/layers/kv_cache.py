"""The KV cache: blocks of 64 positions, each of one row, in one pool per layer.

Memory follows the tokens that are there: a row of 100 tokens has two blocks wherever they were free, a row of 5,000 has
79, and both are in the same pool. A decode step goes over the pool as it lies, block by block, each with the query of
the row that owns it (``tx.layers.attention``), so nothing is gathered and a step costs what all rows hold together,
whoever is the longest. Keys lie with positions last and values with ``head_dim`` last: both products of a step then
run along contiguous memory (0.8 against 2.7 ms per layer for 64 rows of 256 positions on a 2-core CPU).

Arrays are separate per layer so that each is donated and updated in place: stacked ones cost a decode step 1.6 to 3
times as much. Which block belongs to whom is ``tx.worker.block_table``'s business; here it comes as ``Decoding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tx.layers.sharding import sharding

BLOCK = 64
"""Positions per block. Smaller ones waste less at the end of each row, but 32 make a CPU step's attention 1.5 times
as slow."""

KEY_AXES = (None, "kv_heads", "head_dim", None)
VALUE_AXES = (None, "kv_heads", None, "head_dim")


@runtime_checkable
class CacheShape(Protocol):
    """What a model's config says about its cache."""

    @property
    def num_layers(self) -> int: ...  # noqa: D102
    @property
    def num_kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerBlocks:
    """One layer's blocks. k (rotated): [block, kv_heads, head_dim, BLOCK], v: [block, kv_heads, BLOCK, head_dim]."""

    k: Any
    v: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVBlocks:
    """Every layer's blocks; the same numbers mean the same positions in each."""

    layers: tuple[LayerBlocks, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, taken or free."""
        return self.layers[0].k.shape[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """How the rows of a decode step meet the pool; each row brings one new token.

    owner: int [block], the row that a block belongs to, or the number of rows for a free block.
    start: int [block], the position of the block's first token in its row.
    target: int [row], the block that the row's new token goes to, or the number of blocks to drop it.
    """

    owner: Any
    start: Any
    target: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Continuing:
    """One row of several new tokens behind the first ``length`` (int []) positions of the pool, which it only reads."""

    length: Any


Place = Decoding | Continuing


def block_bytes(config: CacheShape, dtype: Any) -> int:
    """Bytes of one block in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BLOCK * jnp.dtype(dtype).itemsize


def num_blocks(num_tokens: int) -> int:
    """Blocks that hold so many positions."""
    return -(-num_tokens // BLOCK)


def outline(config: CacheShape, blocks: int, dtype: Any, mesh: Mesh | None = None) -> KVBlocks:
    """Shapes and places of a pool, as ``jax.ShapeDtypeStruct``: KV heads are sharded over the mesh."""

    def like(axes: tuple[str | None, ...], *inner: int) -> jax.ShapeDtypeStruct:
        shape = (blocks, config.num_kv_heads, *inner)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=None if mesh is None else sharding(axes, shape, mesh))

    head_dim = config.head_dim
    layers = (
        LayerBlocks(like(KEY_AXES, head_dim, BLOCK), like(VALUE_AXES, BLOCK, head_dim))
        for _ in range(config.num_layers)
    )
    return KVBlocks(tuple(layers))


def empty(config: CacheShape, blocks: int, dtype: Any, mesh: Mesh | None = None) -> KVBlocks:
    """A pool of zeros."""
    return zeros_like(outline(config, blocks, dtype, mesh))


def zeros_like[Blocks: (KVBlocks, LayerBlocks)](like: Blocks) -> Blocks:
    """Zeros of these shapes in these places."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like)


def in_blocks(
    k: Float[Array, "row seq kv_heads head_dim"], v: Float[Array, "row seq kv_heads head_dim"]
) -> LayerBlocks:
    """Fresh keys and values as blocks: each row's are consecutive, its last one filled up with zeros."""

    def cut(x: jax.Array) -> jax.Array:
        rows, seq, kv_heads, head_dim = x.shape
        x = jnp.pad(x, ((0, 0), (0, -seq % BLOCK), (0, 0), (0, 0)))
        return x.reshape(rows * num_blocks(seq), BLOCK, kv_heads, head_dim)

    return LayerBlocks(jnp.transpose(cut(k), (0, 2, 3, 1)), jnp.transpose(cut(v), (0, 2, 1, 3)))


def write(
    blocks: LayerBlocks,
    k: Float[Array, "row kv_heads head_dim"],
    v: Float[Array, "row kv_heads head_dim"],
    target: Int[Array, "row"],
    positions: Int[Array, "row"],
) -> LayerBlocks:
    """Put each row's one fresh key and value at its position in its target block."""
    at = positions % BLOCK
    return LayerBlocks(
        blocks.k.at[target, :, :, at].set(k.astype(blocks.k.dtype), mode="drop"),
        blocks.v.at[target, :, at, :].set(v.astype(blocks.v.dtype), mode="drop"),
    )
