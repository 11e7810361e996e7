"""The chunked head against plain log-softmax, values and gradients, and that no [row, seq, vocab] array exists."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.jaxprs import shapes
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


@pytest.mark.parametrize("chunk", [1, 7, 1000])
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
    """Neither for scores nor for training: the largest array with a vocabulary is one chunk's, or the head's."""
    hidden, kernel, targets, lora, gate, weights = arrays
    lora, gate = (lora, gate) if adapted else (None, None)
    head = hidden, kernel, targets, lora, gate

    def score(*head):
        return logprobs.target_logprobs(*head, chunk=6)

    order = _order(weights)

    def train(*head):
        return logprobs.loss_and_gradient(*head, order, weights, _cross_entropy, chunk=6)

    for program in (score, train):
        with_vocabulary = {shape for shape in shapes(program, *head) if VOCAB in shape}
        assert (ROWS, 2, VOCAB) in with_vocabulary  # a chunk of 6 positions: the check sees what it is about
        assert max(int(np.prod(shape)) for shape in with_vocabulary) <= max(6, EMBED) * VOCAB


# ---- training's form: the gradient in the forward pass --------------------------------------------------------------


def _order(weights, valid=None):
    """As ``tx.worker.datums`` makes it, from [row, seq, k] weights and the positions that are real."""
    counts = np.asarray(weights != 0).any(-1)
    valid = np.ones(counts.shape, bool) if valid is None else valid
    first = np.argsort(np.where(counts, 0, np.where(valid, 1, 2)), axis=1, kind="stable")
    most = lambda which: jnp.int32(which.sum(1).max())
    return logprobs.Order(jnp.asarray(first), most(counts), most(valid))


def _cross_entropy(lp, weights):
    return -jnp.sum(weights * lp, axis=-1)


def _bent(lp, weights):
    """Not linear in the logprobs, and of all of a position's targets together."""
    return jnp.sin(jnp.sum(weights * lp, axis=-1)) + 0.1 * jnp.sum(weights * lp**2, axis=-1)


def _adapter(arrays, kind):
    """(adapter, gate) of the head: none, one for all rows or none of them, or one per row with its own scaling."""
    lora, gate = arrays[3], arrays[4]
    if kind == "none":
        return None, None
    if kind == "one":
        return lora, jnp.full((1, 4), 0.5)
    if kind == "gated":
        return lora, gate
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    lora = LoraWeights(tuple(draw(EMBED, 4) for _ in range(ROWS)), tuple(draw(4, VOCAB) for _ in range(ROWS)))
    return lora, jnp.asarray([[1.0] * 4, [2.0] * 4, [0.5] * 4])


@jax.jit
def _dense(hidden, kernel, targets, lora, gate):
    """All logits of all positions, each row through its own adapter."""
    logits = hidden @ kernel
    if lora is not None:
        wide = lambda x: jnp.stack(x) if isinstance(x, tuple) else jnp.broadcast_to(x, (ROWS, *x.shape[-2:]))
        low = jnp.einsum("rse,rei->rsi", hidden, wide(lora.a)) * jnp.broadcast_to(gate, (ROWS, 4))[:, None]
        logits = logits + jnp.einsum("rsi,riv->rsv", low, wide(lora.b))
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)


TRAIN = jax.jit(logprobs.loss_and_gradient, static_argnames=("losses", "chunk"))


@pytest.mark.parametrize(
    ("kind", "losses"),
    [("none", _bent), ("one", _cross_entropy), ("gated", _bent), ("one per row", _bent)],
)
def test_loss_and_gradient(arrays, kind, losses):
    """Against differentiating the dense formula, with weights on some positions only, fewer in some rows."""
    hidden, kernel, targets, _, _, weights = arrays
    lora, gate = _adapter(arrays, kind)
    mask = np.zeros((ROWS, SEQ, 1), np.float32)
    mask[0, [1, 4, 5, 9]], mask[1, 10] = 1, 1
    weights = weights * mask

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def dense(hidden, lora):
        lp = _dense(hidden, kernel, targets, lora, gate)
        value = losses(lp, weights)
        return jnp.sum(value), (lp, value)

    (_, (wanted_lp, wanted_value)), (dh, dlora) = dense(hidden, lora)
    assert float(jnp.max(jnp.abs(dh))) > 0.1
    for chunk in (1, 7, 1000):  # pieces of 1, 2 and all 11 positions
        lp, value, gradient = TRAIN(
            hidden, kernel, targets, lora, gate, _order(weights), weights, losses=losses, chunk=chunk
        )
        assert np.max(np.abs(lp - wanted_lp)) <= 2e-5
        assert np.max(np.abs(value - wanted_value)) <= 1e-4
        assert np.max(np.abs(gradient.hidden - dh)) <= 2e-5 * np.max(np.abs(dh))
        assert not gradient.hidden[2].any()  # no position of this row counts
        for mine, theirs in zip(jax.tree.leaves(gradient.lora), jax.tree.leaves(dlora), strict=True):
            assert mine.dtype == jnp.float32
            assert np.max(np.abs(mine - theirs)) <= 2e-5 * np.max(np.abs(theirs))


def test_padding_is_not_computed(arrays):
    """Chunks of padding alone give zeros; real positions without a weight give their logprobs, and no gradient."""
    hidden, kernel, targets, _, _, weights = arrays
    valid = np.zeros((ROWS, SEQ), bool)
    valid[0, :6], valid[1, :3] = True, True
    weights = weights * (np.arange(SEQ) < 2)[:, None]
    hidden = jnp.where(valid[..., None], hidden, jnp.nan)  # whoever computes it, shows it
    weights = jnp.where(valid[..., None], weights, 0)
    lp, value, gradient = TRAIN(
        hidden, kernel, targets, None, None, _order(weights, valid), weights, losses=_cross_entropy, chunk=ROWS
    )
    wanted = _dense(jnp.where(valid[..., None], hidden, 0.0), kernel, targets, None, None)
    assert np.max(np.abs(np.where(valid[..., None], lp - wanted, 0))) <= 2e-5
    assert not lp[:, 6:].any()
    assert not value[:, 6:].any()
    assert not gradient.hidden[:, 2:].any()
    assert gradient.hidden[:2, :2].all()


def test_bfloat16_training(arrays):
    """Logits and sums in float32, products of what is rounded to bfloat16: close to the dense float32 gradient."""
    hidden, kernel, targets, lora, gate, weights = arrays
    low = partial(jnp.asarray, dtype=jnp.bfloat16)
    lp, _, gradient = TRAIN(
        low(hidden), low(kernel), targets, lora, gate, _order(weights), weights, losses=_cross_entropy, chunk=9
    )
    assert lp.dtype == jnp.float32
    assert gradient.hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient.lora)} == {jnp.dtype(jnp.float32)}
    wide = lambda x: low(x).astype(jnp.float32)
    total = lambda hidden, lora: jnp.sum(-weights * _dense(hidden, wide(kernel), targets, lora, gate))
    wanted = jax.grad(total, (0, 1))(wide(hidden), jax.tree.map(wide, lora))
    for mine, theirs in zip(jax.tree.leaves((gradient.hidden, gradient.lora)), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(mine.astype(jnp.float32) - theirs) <= 0.01 * np.linalg.norm(theirs)


# ---- scores ---------------------------------------------------------------------------------------------------------


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
