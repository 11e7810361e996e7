"""RMSNorm by its formula in float64; float32 inside even for bfloat16 inputs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tx.layers.norm import RMSNorm


def _norm(scale: np.ndarray, eps: float) -> RMSNorm:
    norm = RMSNorm(scale.size, eps)
    norm.weight.set_value(jnp.asarray(scale))
    return norm


def test_formula():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 16)).astype(np.float32), rng.uniform(0.5, 2, 16).astype(np.float32)
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-3) * scale
    assert np.max(np.abs(_norm(scale, 1e-3)(jnp.asarray(x)) - expected)) <= 1e-6


def test_bfloat16_input_is_squared_in_float32():
    """In bfloat16 the mean of 256 ones and one 16 would be off by a percent."""
    x = np.ones((1, 1, 256), np.float32)
    x[..., 0] = 16
    got = _norm(np.ones(256, np.float32), 1e-6)(jnp.asarray(x, jnp.bfloat16))
    expected = jnp.asarray(x / np.sqrt(np.mean(x**2)), jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))
