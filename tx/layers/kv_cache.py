"""The KV cache: one key and one value array per layer, written at explicit positions.

Arrays are separate per layer so that each is donated and updated in place: stacked ones cost a decode step 1.6 to 3
times as much. Which row belongs to whom is ``tx.worker.decode_slots``' business, not ours.

Example: rows of lengths 3 and 5 in a cache of length 8 take their next tokens with positions [[3], [5]]; a row without
a request passes position 8, which is past the end, so its write is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tx.layers.sharding import sharding

CACHE_AXES = ("row", "length", "kv_heads", "head_dim")

LayerCache = tuple[Float[Array, "row length kv_heads head_dim"], Float[Array, "row length kv_heads head_dim"]]


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
@dataclass
class KVCache:
    """Keys (rotated) and values, ``[row, length, kv_heads, head_dim]`` each, one per layer."""

    k: tuple[Any, ...]
    v: tuple[Any, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.k[0].shape[0]

    @property
    def length(self) -> int:
        """Positions per row."""
        return self.k[0].shape[1]


def empty(config: CacheShape, rows: int, length: int, dtype: Any, mesh: Mesh | None = None) -> KVCache:
    """A cache of zeros, sharded over its mesh."""
    shape = (rows, length, config.num_kv_heads, config.head_dim)
    place = None if mesh is None else sharding(CACHE_AXES, shape, mesh)
    zeros = [jnp.zeros(shape, dtype, device=place) for _ in range(2 * config.num_layers)]
    return KVCache(k=tuple(zeros[: config.num_layers]), v=tuple(zeros[config.num_layers :]))


def write(
    target: Float[Array, "row length kv_heads head_dim"],
    fresh: Float[Array, "row seq kv_heads head_dim"],
    positions: Int[Array, "row seq"],
) -> Float[Array, "row length kv_heads head_dim"]:
    """Put each row's fresh keys or values at its positions; positions past the end are dropped."""
    put = jax.vmap(lambda row, values, where: row.at[where].set(values, mode="drop", unique_indices=False))
    return put(target, fresh.astype(target.dtype), positions)
