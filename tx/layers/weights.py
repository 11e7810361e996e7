"""How a frozen base weight is declared: shape, logical axes, kept dtype and layout on disk, once and in one place.

Modules are only ever built abstractly (``nnx.eval_shape``): declaring a weight allocates nothing, ``tx.models.loading``
fills it from a checkpoint. The attribute path of a weight in the module tree is its name in the checkpoint.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from tx.layers.sharding import Axes


class Weight(nnx.Param):
    """A weight stored on disk as it is used: norms, biases, an untied embedding table.

    ``float32`` weights keep float32 whatever the model's dtype (norms, biases, the router); the others take it.
    """

    def __init__(self, shape: tuple[int, ...], axes: Axes, *, float32: bool = False) -> None:
        super().__init__(jnp.zeros(shape, jnp.float32), axes=tuple(axes), float32=float32)


class Kernel(Weight):
    """``[in, out]`` here, ``[out, in]`` on disk: the layout in which CPU products are fastest."""


class ExpertKernel(Weight):
    """``[expert, in, out]`` here, one ``[out, in]`` tensor per expert on disk."""
