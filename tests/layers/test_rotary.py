"""Rotary embedding against its definition as complex rotation, and its scalings against hand-worked numbers."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from tx.layers.rotary import RopeConfig, inverse_frequencies, rotary_tables, rotate

HEAD_DIM = 8


def test_rotation_is_complex_multiplication():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, HEAD_DIM)).astype(np.float32)
    positions = rng.integers(0, 300, (2, 5))
    pairs = x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]
    angles = positions[..., None, None] * 100.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    expected = pairs * np.exp(1j * angles)
    cos, sin = rotary_tables(jnp.asarray(positions), RopeConfig(100.0), HEAD_DIM)
    got = np.asarray(rotate(jnp.asarray(x), cos, sin))
    assert np.max(np.abs(got - np.concatenate([expected.real, expected.imag], -1))) <= 1e-4


def test_linear_divides_every_frequency():
    plain = inverse_frequencies(RopeConfig(1e4), HEAD_DIM)
    assert np.allclose(inverse_frequencies(RopeConfig(1e4, "linear", 4.0), HEAD_DIM), plain / 4, rtol=1e-6)


def test_llama3_keeps_short_stretches_long_and_interpolates_between():
    rope = RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, original_max_position=1024)
    plain, scaled = inverse_frequencies(RopeConfig(1e4), 16), inverse_frequencies(rope, 16)
    wavelengths = 2 * math.pi / plain
    assert np.array_equal(scaled[wavelengths < 256], plain[wavelengths < 256])
    assert np.allclose(scaled[wavelengths > 1024], plain[wavelengths > 1024] / 8, rtol=1e-6)
    middle = (wavelengths >= 256) & (wavelengths <= 1024)
    assert middle.any()
    kept = (1024 / wavelengths[middle] - 1) / 3
    assert np.allclose(scaled[middle], plain[middle] * (kept + (1 - kept) / 8), rtol=1e-5)


def test_an_unknown_kind_raises():
    with pytest.raises(ValueError, match="yarn"):
        inverse_frequencies(RopeConfig(1e4, "yarn"), HEAD_DIM)
