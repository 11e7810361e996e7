"""Rotary position embedding and its scalings: default, linear, llama3. Others are refused when the config is read.

The convention is Hugging Face's: dimension i is rotated together with dimension i + head_dim / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """The base, and how low frequencies are stretched beyond the context that the model was first trained on.

    ``factor`` is the stretch of "linear" and "llama3"; the last three fields belong to "llama3" alone.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions: float32 [head_dim / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    raise ValueError(f"rope kind {rope.kind!r} is not one of {ROPE_KINDS}")


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_stretched = rope.original_max_position / rope.low_freq_factor
    kept = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - kept) * frequencies / rope.factor + kept * frequencies
    scaled = np.where(wavelengths > shortest_stretched, frequencies / rope.factor, between)
    return np.where(wavelengths < longest_kept, frequencies, scaled).astype(np.float32)


def rotary_tables(
    positions: Int[Array, "row seq"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "row seq half"], Float[Array, "row seq half"]]:
    """Cosine and sine of every position's angles, float32."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse_frequencies(rope, head_dim))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "row seq heads head_dim"],
    cos: Float[Array, "row seq half"],
    sin: Float[Array, "row seq half"],
) -> Float[Array, "row seq heads head_dim"]:
    """Turn each head's pairs by their position's angle, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
