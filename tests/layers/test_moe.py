"""The blocked experts against every-expert-for-every-token: values, gradients, chunks, placement, padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.layers import moe
from tx.layers.lora import LoraWeights

ROWS, SEQ, EMBED, FFN, EXPERTS, CHOSEN, RANK = 3, 7, 8, 6, 5, 2, 2
SIZES = {"gate_proj": (EMBED, FFN), "up_proj": (EMBED, FFN), "down_proj": (FFN, EMBED)}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)
    kernels = {name: draw(EXPERTS, *size) for name, size in SIZES.items()}
    sites = {
        name: LoraWeights(draw(EXPERTS, inner, RANK), draw(EXPERTS, RANK, outer))
        for name, (inner, outer) in SIZES.items()
    }
    gate = jnp.asarray([[0.5, 0.0], [0.0, 0.0], [0.0, 2.0]])  # two adapters and a base-model row
    return draw(ROWS, SEQ, EMBED) * 3, draw(EMBED, EXPERTS), kernels, sites, gate


def _shape(normalize: bool = True) -> moe.MoeShape:
    return moe.MoeShape(EMBED, FFN, EXPERTS, CHOSEN, normalize)


def _dense(x, weights, chosen, kernels, sites, gate):
    """All experts for all tokens, then the chosen ones' weighted sum."""

    def project(name, inner):
        equation = "rsi,eio->erso" if inner.ndim == 3 else "ersi,eio->erso"
        low = jnp.einsum(equation, inner, sites[name].a) * gate[None, :, None, :]
        return jnp.einsum(equation, inner, kernels[name]) + jnp.einsum("ersk,eko->erso", low, sites[name].b)

    y = project("down_proj", jax.nn.silu(project("gate_proj", x)) * project("up_proj", x))
    full = jnp.sum(jax.nn.one_hot(chosen, EXPERTS) * weights[..., None], axis=2)
    return jnp.einsum("erso,rse->rso", y, full)


@pytest.mark.parametrize("chunk", [2048, 5])
@pytest.mark.parametrize("block", [128, 2])
def test_equals_every_expert_for_every_token(arrays, monkeypatch, chunk, block):
    monkeypatch.setattr(moe, "MAX_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(moe, "MAX_BLOCK_TOKENS", block)
    x, router, kernels, sites, gate = arrays

    def run(experts, x, sites):
        weights, chosen = moe.route(x, router, _shape())
        return jnp.sum(jnp.sin(experts(x, weights, chosen, kernels, sites, gate)))

    blocked = lambda *args: moe._experts(*args, first_expert=0)
    got, got_gradients = jax.value_and_grad(lambda x, s: run(blocked, x, s), (0, 1))(x, sites)
    expected, expected_gradients = jax.value_and_grad(lambda x, s: run(_dense, x, s), (0, 1))(x, sites)
    assert abs(got - expected) <= 1e-4
    for mine, theirs in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.max(np.abs(mine - theirs)) <= 1e-4


def test_parts_of_the_experts_add_up(arrays):
    """What expert parallelism sums: each device computes only its own experts."""
    x, router, kernels, sites, gate = arrays
    weights, chosen = moe.route(x, router, _shape())
    parts = []
    for start, stop in ((0, 2), (2, EXPERTS)):
        own = lambda tree, start=start, stop=stop: jax.tree.map(lambda w: w[start:stop], tree)
        parts.append(moe._experts(x, weights, chosen, own(kernels), own(sites), gate, first_expert=start))
    whole = _dense(x, weights, chosen, kernels, sites, gate)
    assert np.max(np.abs(parts[0] + parts[1] - whole)) <= 1e-5
    assert np.max(np.abs(parts[0])) > 0.01


def test_router_weights():
    kernel = jnp.log(jnp.asarray([[0.5, 0.1, 0.3, 0.1]]))
    for normalize, expected in ((False, [0.5, 0.3]), (True, [0.625, 0.375])):
        shape = moe.MoeShape(1, FFN, 4, 2, normalize)
        weights, chosen = moe.route(jnp.ones((1, 1, 1), jnp.bfloat16), kernel, shape)
        assert weights.dtype == jnp.float32
        assert chosen.tolist() == [[[0, 2]]]
        assert np.allclose(weights[0, 0], expected, atol=1e-6)


def test_placement_example():
    slots, experts, used = moe._place(jnp.array([1, 0, 1, 1]), 2, 2)
    assert slots.tolist() == [2, 0, 3, 4]
    assert experts.tolist()[:3] == [0, 1, 1]
    assert int(used) == 3


def test_every_line_has_a_slot_of_its_own_in_a_block_of_its_expert():
    rng = np.random.default_rng(3)
    for block in (1, 4, 16):
        chosen = rng.integers(-2, 9, 40)  # of 7 experts here; the others live elsewhere
        slots, experts, used = (np.asarray(x) for x in moe._place(jnp.asarray(chosen), 7, block))
        here = (chosen >= 0) & (chosen < 7)
        assert np.all(slots[~here] == -1)
        assert len(set(slots[here])) == here.sum()
        assert np.array_equal(experts[slots[here] // block], chosen[here])
        assert slots.max() < used * block <= len(experts) * block
