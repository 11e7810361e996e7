"""Logical axes and the one table that maps them to mesh axes.

Every array of the model, of an adapter and of a KV cache is declared with logical axis names; nothing else in tx
names a mesh axis. A dimension is sharded over the mesh axes of its logical name, or replicated if that name has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tx.errors import StartupError

MESH_AXES = ("data", "fsdp", "ep", "tp")
"""data: replicas of the weights; fsdp: weights cut along embed; ep: experts; tp: heads, ffn and vocabulary."""

Axes = Sequence[str | None]

RULES: dict[str, tuple[str, ...]] = {
    "row": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "ffn": ("tp",),
    "vocab": ("tp",),
    "expert": ("ep",),
    "seq": (),
    "length": (),
    "head_dim": (),
    "rank": (),
}

MAY_REPLICATE = frozenset({"row", "kv_heads", "vocab"})
"""Names whose dimension is replicated when it doesn't divide: few rows, few KV heads, an odd vocabulary."""


def spec(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh, *, strict: bool = True) -> PartitionSpec:
    """Where each dimension of an array goes; two dimensions that want one mesh axis are an error.

    A dimension that doesn't divide is replicated if its name is in MAY_REPLICATE (or if not ``strict``), else refused.
    Replicated dimensions at the end are left out, as they are where a program gives an array back: one place under two
    spellings would have programs compiled twice.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for a shape {tuple(shape)}")
    used: set[str] = set()
    entries: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1) if name is not None else ()
        parts = 1
        for axis in mesh_axes:
            parts *= mesh.shape[axis]
        if size % parts:
            if strict and name not in MAY_REPLICATE:
                raise StartupError(
                    f"{name} of size {size} doesn't divide over {parts} devices ({', '.join(mesh_axes)})"
                )
            mesh_axes = ()
        if used & set(mesh_axes):
            raise ValueError(f"axes {tuple(axes)} use the mesh axis {sorted(used & set(mesh_axes))} twice")
        used |= set(mesh_axes)
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def sharding(axes: Axes, shape: Sequence[int], mesh: Mesh, *, strict: bool = True) -> NamedSharding:
    """``spec`` bound to its mesh."""
    return NamedSharding(mesh, spec(axes, shape, mesh, strict=strict))


def constrain(x: jax.Array, axes: Axes, mesh: Mesh | None = None) -> jax.Array:
    """Pin an intermediate value to its place; does nothing without a mesh or on one device."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(axes, x.shape, mesh))
