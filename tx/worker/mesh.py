"""Devices to mesh: the four axes of ``tx.layers.sharding``, in Auto mode (the compiler places what is not pinned)."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tx.errors import StartupError
from tx.layers.sharding import MESH_AXES


def make_mesh(data: int = 1, fsdp: int = 1, ep: int = 1, tp: int = 1) -> Mesh:
    """The first ``data * fsdp * ep * tp`` devices as a mesh; StartupError if there are fewer.

    tp is innermost, so that its devices, which talk most, are neighbours.
    """
    sizes = (data, fsdp, ep, tp)
    if min(sizes) < 1:
        raise StartupError(f"mesh sizes (data, fsdp, ep, tp) = {sizes} must all be at least 1")
    needed, devices = math.prod(sizes), jax.devices()
    if needed > len(devices):
        given = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise StartupError(f"mesh needs {needed} devices ({given}), have {len(devices)}")
    return Mesh(np.asarray(devices[:needed]).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
