"""The chunked head against plain log-softmax, values and gradients, and that no [row, seq, vocab] array exists."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.layers import logprobs
from tx.layers.lora import LoraWeights

ROWS, SEQ, EMBED, VOCAB, K = 3, 11, 8, 50, 2


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, SEQ, K)))
    lora = LoraWeights(draw(EMBED, 4), draw(4, VOCAB))
    gate = jnp.asarray([[1.0] * 4, [0.0] * 4, [0.5] * 4])
    return draw(ROWS, SEQ, EMBED), draw(EMBED, VOCAB), targets, lora, gate, draw(ROWS, SEQ, K)


def _reference(hidden, kernel, lora, gate):
    logits = hidden @ kernel
    if lora is not None:
        logits = logits + ((hidden @ lora.a) * gate[:, None]) @ lora.b
    return jax.nn.log_softmax(logits)


@pytest.mark.parametrize("chunk", [1, 7, 12, 1000])
@pytest.mark.parametrize("adapted", [False, True])
def test_values_and_gradients(arrays, chunk, adapted):
    hidden, kernel, targets, lora, gate, weights = arrays
    lora, gate = (lora, gate) if adapted else (None, None)

    def ours(hidden, lora):
        got = logprobs.target_logprobs(hidden, kernel, targets, lora, gate, chunk=chunk)
        return jnp.sum(got * weights), got

    def plain(hidden, lora):
        got = jnp.take_along_axis(_reference(hidden, kernel, lora, gate), targets, axis=-1)
        return jnp.sum(got * weights), got

    wrt = (0, 1) if adapted else (0,)
    (_, got), gradients = jax.value_and_grad(ours, wrt, has_aux=True)(hidden, lora)
    (_, expected), expected_gradients = jax.value_and_grad(plain, wrt, has_aux=True)(hidden, lora)
    assert np.max(np.abs(got - expected)) <= 1e-5
    for mine, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.max(np.abs(mine - theirs)) <= 1e-4


@pytest.mark.parametrize("adapted", [False, True])
def test_no_array_of_all_logits(arrays, adapted):
    """Not even in the backward pass: the largest array with a vocabulary is one chunk's."""
    hidden, kernel, targets, lora, gate, _ = arrays
    lora, gate = (lora, gate) if adapted else (None, None)
    total = lambda hidden: jnp.sum(logprobs.target_logprobs(hidden, kernel, targets, lora, gate, chunk=6))
    text = jax.jit(jax.grad(total)).lower(hidden).as_text()
    sizes = {int(np.prod([int(n) for n in shape.split("x")])) for shape in re.findall(r"tensor<([\dx]+)xf32>", text)}
    assert VOCAB * 6 in sizes
    assert not {size for size in sizes if size > VOCAB * max(6, EMBED)}


def test_bfloat16_head_is_float32_log_softmax(arrays):
    hidden, kernel, targets, *_ = arrays
    low = partial(jnp.asarray, dtype=jnp.bfloat16)
    got = logprobs.target_logprobs(low(hidden), low(kernel), targets, None, None, chunk=8)
    wide = _reference(low(hidden).astype(jnp.float32), low(kernel).astype(jnp.float32), None, None)
    assert got.dtype == jnp.float32
    assert np.max(np.abs(got - jnp.take_along_axis(wide, targets, axis=-1))) <= 1e-5


def test_topk_and_next_logits(arrays):
    hidden, kernel, _, lora, gate, _ = arrays
    expected = np.asarray(_reference(hidden, kernel, lora, gate))
    ids, values = logprobs.topk_logprobs(hidden, kernel, lora, gate, k=5, chunk=7)
    assert np.array_equal(ids, np.argsort(-expected, axis=-1)[..., :5])
    assert np.max(np.abs(values - np.take_along_axis(expected, np.asarray(ids), axis=-1))) <= 1e-5
    last = jax.nn.log_softmax(logprobs.next_logits(hidden[:, -1], kernel, lora, gate))
    assert np.max(np.abs(last - expected[:, -1])) <= 1e-5
