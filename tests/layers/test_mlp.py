"""The gated MLP by its formula, with and without adapters."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tx.layers.lora import LoraWeights
from tx.layers.mlp import GatedMlp, silu_product

EMBED, FFN = 6, 10


def test_formula():
    rng = np.random.default_rng(0)
    mlp = GatedMlp(EMBED, FFN, bias=True, mesh=None)
    kernels, biases = {}, {}
    for name, shape in (("gate_proj", (EMBED, FFN)), ("up_proj", (EMBED, FFN)), ("down_proj", (FFN, EMBED))):
        kernels[name], biases[name] = rng.normal(size=shape), rng.normal(size=shape[1])
        getattr(mlp, name).weight.set_value(jnp.asarray(kernels[name], jnp.float32))
        getattr(mlp, name).bias.set_value(jnp.asarray(biases[name], jnp.float32))
    x = rng.normal(size=(2, 3, EMBED))
    a, b = rng.normal(size=(FFN, 2)), rng.normal(size=(2, EMBED))

    def expected(delta):
        gated = x @ kernels["gate_proj"] + biases["gate_proj"]
        inner = gated / (1 + np.exp(-gated)) * (x @ kernels["up_proj"] + biases["up_proj"])
        return inner @ (kernels["down_proj"] + delta) + biases["down_proj"]

    x32 = jnp.asarray(x, jnp.float32)
    assert np.max(np.abs(mlp(x32, {}, None) - expected(0))) <= 1e-4
    lora = {"down_proj": LoraWeights(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))}
    assert np.max(np.abs(mlp(x32, lora, jnp.full((2, 2), 0.5)) - expected(0.5 * a @ b))) <= 1e-4


def test_silu_product_is_rounded_once():
    gated, up = jnp.asarray([[3.0]], jnp.bfloat16), jnp.asarray([[1.75]], jnp.bfloat16)
    exact = 3.0 / (1 + np.exp(-3.0)) * 1.75
    assert float(silu_product(gated, up)[0, 0]) == float(jnp.asarray(exact, jnp.bfloat16))
