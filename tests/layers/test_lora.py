"""LoRA: equal to merged weights, adapters side by side independent, padding free, and gradients by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.support.jaxprs import shapes
from tx.layers import lora
from tx.layers.lora import Adapter, LoraWeights
from tx.models.lora_sites import lora_sites
from tx.worker.mesh import make_mesh

IN, OUT = 12, 10


def _pair(rank: int, seed: int, experts: int | None = None) -> LoraWeights:
    rng = np.random.default_rng(seed)
    lead = () if experts is None else (experts,)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32)
    return LoraWeights(draw(IN, rank), draw(rank, OUT))


def _inputs(rows: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).normal(size=(rows, 5, IN)), jnp.float32)


def _reference(x, pair, scaling):
    return np.asarray(x, np.float64) @ np.asarray(pair.a, np.float64) @ np.asarray(pair.b, np.float64) * scaling


def test_one_adapter_is_scaled_product():
    x, pair = _inputs(3), _pair(4, 0)
    got = lora.lora_delta(x, pair, jnp.full((1, 4), 0.5))
    assert np.max(np.abs(got - _reference(x, pair, 0.5))) <= 1e-5


def test_adapters_of_mixed_rank_side_by_side_equal_each_alone():
    pairs, ranks, scalings = [_pair(1, 1), _pair(4, 2)], [(1, 1), (4, 2)], [2.0, 0.25]
    x = _inputs(3)
    both = lora.concatenate([Adapter(({"q_proj": pair},), None) for pair in pairs], ranks)
    gate = jnp.asarray([[2.0] + [0.0] * 4, [0.0] + [0.25] * 4, [0.0] * 5])
    got = np.asarray(lora.lora_delta(x, both.layers[0]["q_proj"], gate))
    for row in range(2):
        assert np.max(np.abs(got[row] - _reference(x[row], pairs[row], scalings[row]))) <= 1e-5
    assert not got[2].any()  # the base model's row


def test_another_adapters_overflow_does_not_reach_a_row():
    sick = LoraWeights(jnp.full((IN, 2), 3e38), jnp.ones((2, OUT)))
    both = lora.concatenate([Adapter(({"q_proj": p},), None) for p in (_pair(3, 0), sick)], [(3, 1), (2, 1)])
    gate = jnp.asarray([[1.0] * 3 + [0.0] * 2, [0.0] * 3 + [1.0] * 2])
    got = np.asarray(lora.lora_delta(_inputs(2), both.layers[0]["q_proj"], gate))
    assert np.isfinite(got[0]).all()
    assert not np.isfinite(got[1]).all()


def test_concatenate_fills_missing_sites_with_zero_columns():
    first = Adapter(({"q_proj": _pair(2, 0), "experts.up_proj": _pair(1, 1, experts=3)},), None)
    second = Adapter(({},), _pair(4, 2))
    both = lora.concatenate([first, second], [(2, 1), (4, 2)])
    assert both.layers[0]["q_proj"].a.shape == (IN, 6)
    assert both.layers[0]["experts.up_proj"].b.shape == (3, 3, OUT)
    assert not np.any(both.layers[0]["q_proj"].a[:, 2:])
    assert both.unembed is not None
    assert not np.any(both.unembed.b[:2])
    assert np.array_equal(both.unembed.b[2:], second.unembed.b)
    assert lora.concatenate([first, first], [(2, 1), (2, 1)]).unembed is None


def test_padded_rank_changes_nothing_and_gets_no_gradient():
    adapter = _pair(3, 0)
    padded = LoraWeights(jnp.pad(adapter.a, ((0, 0), (0, 5))), jnp.pad(adapter.b, ((0, 5), (0, 0))))
    x = _inputs(2)

    def total(pair, rank):
        return jnp.sum(jnp.sin(lora.lora_delta(x, pair, jnp.full((1, rank), 1.5))))

    value, _ = jax.value_and_grad(total)(adapter, 3)
    padded_value, gradient = jax.value_and_grad(total)(padded, 8)
    assert abs(value - padded_value) <= 1e-4
    assert np.any(gradient.a[:, :3])
    assert not np.any(gradient.a[:, 3:])
    assert not np.any(gradient.b[3:])


# ---- gradients by hand ----------------------------------------------------------------------------------------------


def _plain(x, pair, gate):
    """The formula, for whatever differentiates it; of tuples, each array meets its own row."""
    rows = x.shape[0]
    wide = lambda w: jnp.stack(w if isinstance(w, tuple) else [w] * rows)
    low = jnp.einsum("rsi,rik->rsk", x, wide(pair.a)) * jnp.broadcast_to(gate, (rows, gate.shape[1]))[:, None]
    return jnp.einsum("rsk,rko->rso", low, wide(pair.b))


def _gradients(form, x, pair, gate):
    dy = jnp.asarray(np.random.default_rng(4).normal(size=(*x.shape[:2], OUT)), jnp.float32)
    return jax.jit(jax.grad(lambda x, pair: jnp.sum(form(x, pair, gate).astype(jnp.float32) * dy), (0, 1)))(x, pair)


GATES = {
    "one adapter": jnp.full((1, 4), 0.5),
    "side by side, and a base row": jnp.asarray([[2.0, 0, 0, 0], [0, 0.5, 0.5, 0.5], [0, 0, 0, 0]]),
}


@pytest.mark.parametrize("name", GATES)
def test_gradients_are_those_of_the_formula(name):
    x, pair = _inputs(3), _pair(4, 0)
    mine, theirs = (_gradients(form, x, pair, GATES[name]) for form in (lora.lora_delta, _plain))
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == jnp.float32
        assert np.max(np.abs(one - other)) <= 1e-5 * np.max(np.abs(other))


def test_an_adapter_per_row():
    """Values and gradients of each row are those of its own adapter alone, and of the formula."""
    x, pairs = _inputs(3), [_pair(4, seed) for seed in range(3)]
    gate = jnp.asarray([[0.5] * 4, [2.0] * 4, [1.0] * 4])
    each = jax.tree.map(lambda *arrays: arrays, *pairs)
    together = _gradients(lora.lora_delta, x, each, gate)
    for mine, theirs in zip(
        *(jax.tree.leaves(found) for found in (together, _gradients(_plain, x, each, gate))), strict=True
    ):
        assert np.max(np.abs(mine - theirs)) <= 1e-5 * np.max(np.abs(theirs))
    delta = lora.lora_delta(x, each, gate)
    for row, pair in enumerate(pairs):
        assert np.max(np.abs(delta[row] - _reference(x[row], pair, float(gate[row, 0])))) <= 2e-5


def test_gradients_in_bfloat16():
    """Products of what is rounded to bfloat16, sums in float32: an adapter's gradient is float32 and close."""
    x, pair, gate = _inputs(3), _pair(4, 0), GATES["one adapter"]
    low = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    dx, dpair = _gradients(lora.lora_delta, low(x), pair, gate)
    assert dx.dtype == jnp.bfloat16
    assert dpair.a.dtype == dpair.b.dtype == jnp.float32
    wanted = _gradients(_plain, wide(low(x)), wide(low(pair)), gate)
    for one, other in zip(jax.tree.leaves((dx, dpair)), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(one.astype(jnp.float32) - other) <= 0.01 * np.linalg.norm(other)


def test_a_frozen_weight_costs_no_product_backwards():
    """The gradient of x is the formula's; w's is none, and no array of its shape is made for it."""
    x, w = _inputs(2), jnp.asarray(np.random.default_rng(1).normal(size=(IN, OUT)), jnp.float32)
    total = lambda dot: lambda x, w: jnp.sum(jnp.sin(dot(x, w)))
    mine, theirs = (jax.grad(total(dot))(x, w) for dot in (lora.frozen_dot, lora.dot))
    assert np.max(np.abs(mine - theirs)) <= 1e-5
    assert not jax.grad(total(lora.frozen_dot), 1)(x, w).any()
    assert (IN, OUT) not in shapes(jax.grad(total(lora.frozen_dot)), x, w)
    low = jax.grad(total(lora.frozen_dot))(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert np.linalg.norm(low.astype(jnp.float32) - theirs) <= 0.05 * np.linalg.norm(theirs)


def test_linear_adds_delta_before_rounding():
    """In bfloat16 256 + 0.5 is 256: the bias and a delta of 0.5 + 0.5 must meet before the cast."""
    layer = lora.LoraLinear(IN, OUT, (None, None), bias=True)
    layer.weight.set_value(jnp.zeros((IN, OUT), jnp.bfloat16))
    layer.bias.set_value(jnp.full((OUT,), 257.0))
    pair = LoraWeights(jnp.ones((IN, 1)) / IN, jnp.ones((1, OUT)))
    got = layer(jnp.ones((1, 1, IN), jnp.bfloat16), pair, jnp.ones((1, 1)))
    assert got.dtype == jnp.bfloat16
    assert np.all(np.asarray(got, np.float32) == 258.0)  # 257 alone would have been rounded to 256


@pytest.mark.parametrize(("rank", "per_token", "expected"), [(32, 8, 4), (4, 8, 1), (8, 0, 8), (9, 4, 2)])
def test_expert_rank(rank, per_token, expected):
    assert lora.expert_rank(rank, per_token) == expected


def test_adapter_sharding_covers_every_site(tiny_qwen3_moe):
    from tx.models.loading import read_config

    mesh = make_mesh()
    for site in lora_sites(read_config(tiny_qwen3_moe)):
        assert lora.adapter_sharding(site, mesh) == LoraWeights(*[NamedSharding(mesh, PartitionSpec())] * 2)
