"""RMSNorm, computed in float32 whatever the dtype of its input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tx.layers.weights import Weight


class RMSNorm(nnx.Module):
    """``x / rms(x) * weight`` over the last dimension; also the per-head norm of Qwen3's queries and keys."""

    def __init__(self, features: int, eps: float) -> None:
        self.weight = Weight((features,), (None,), float32=True)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Same dtype out as in."""
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.weight.get_value()).astype(x.dtype)
