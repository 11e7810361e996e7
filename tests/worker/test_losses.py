"""Every loss and its gradient against plain numpy in float64, alone and mixed; padding without a trace.

(Against torch autograd, through a whole model: test_trainer.)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx import loss_specs
from tx.worker.losses import LOSS_IDS, LossBatch, position_losses, with_sequence_ratios

ROWS, SEQ, K = 3, 12, 2
LOW, HIGH, BETA, KL, CAP = 0.8, 1.2, 0.4, 0.3, 1.5

# Where the datums of each row end; what is behind the last is padding.
ENDS = ([5, 12], [1, 4, 10], [7])


@jax.jit
def _run(lp, batch):
    """Losses, and the gradient of their sum, the way training takes it: gspo's ratios are known before."""
    full = with_sequence_ratios(jax.lax.stop_gradient(lp), batch)
    losses, pull = jax.vjp(lambda lp: position_losses(lp, full), lp)
    return losses, pull(jnp.ones_like(losses))[0]


def run(lp: np.ndarray, batch: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    losses, gradient = _run(jnp.asarray(lp, jnp.float32), jax.tree.map(jnp.asarray, batch))
    assert losses.dtype == gradient.dtype == jnp.float32
    return np.asarray(losses), np.asarray(gradient)


def layout() -> tuple[np.ndarray, np.ndarray]:
    """(number of each position's datum, which positions are real)."""
    datum, real = np.arange(ROWS * SEQ).reshape(ROWS, SEQ), np.zeros((ROWS, SEQ), bool)
    for row, ends in enumerate(ENDS):
        for begin, end in zip([0, *ends], ends, strict=False):
            datum[row, begin:end], real[row, begin:end] = datum[row, begin], True
    return datum.astype(np.int32), real


def case(names: list[str], seed: int = 0) -> tuple[np.ndarray, LossBatch]:
    """Random logprobs and a batch whose datums have these losses in turn, zeros where a datum doesn't use a field."""
    rng = np.random.default_rng(seed)
    datum, real = layout()
    lp = -rng.gamma(2.0, 1.0, (ROWS, SEQ, K))
    loss_id = np.full((ROWS, SEQ), -1, np.int32)
    for number, which in enumerate(np.unique(datum[real])):
        loss_id[(datum == which) & real] = LOSS_IDS[names[number % len(names)]]
    having = lambda *names: np.isin(loss_id, [LOSS_IDS[name] for name in names])
    rl = having(*LOSS_IDS) & ~having("cross_entropy")
    fill = lambda value, where: np.where(where, value, 0.0).astype(np.float32)
    mask = rng.random((ROWS, SEQ)) < 0.6
    mask[datum == datum[1, 1]] = False  # a datum without any position in its mask
    batch = LossBatch(
        loss_id=loss_id,
        datum=datum,
        weights=fill(rng.normal(size=lp.shape), having("cross_entropy")[..., None]),
        recorded=fill(lp[..., 0] + rng.normal(0.0, 0.4, (ROWS, SEQ)), rl),
        advantages=fill(rng.normal(size=(ROWS, SEQ)), rl),
        mask=fill(mask, having("gspo", "stable_reinforce")),
        clip_low=fill(LOW, having("ppo", "cispo", "gspo")),
        clip_high=fill(HIGH + 0.2 * rng.random((ROWS, SEQ)), having("ppo", "cispo", "gspo")),
        beta=fill(BETA, having("dro")),
        kl_coeff=fill(KL, having("stable_reinforce")),
        ratio_cap=fill(CAP, having("stable_reinforce")),
        sequence_log_ratio=np.zeros((ROWS, SEQ), np.float32),
    )
    return lp.astype(np.float32), batch


# ---- what the losses are defined to be, and their derivatives -------------------------------------------------------


def _min_of_clipped(ratio: np.ndarray, b: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    """min(r A, clip(r) A), and its derivative with respect to log r."""
    plain, clipped = ratio * b.advantages, np.clip(ratio, b.clip_low, b.clip_high) * b.advantages
    return np.minimum(plain, clipped), np.where(plain <= clipped, plain, 0.0)


def cross_entropy(lp: np.ndarray, b: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    return -(b.weights * lp).sum(-1), -b.weights


def importance_sampling(lp: np.ndarray, b: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    loss = -np.exp(lp[..., 0] - b.recorded) * b.advantages
    return loss, loss


def ppo(lp: np.ndarray, b: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    value, slope = _min_of_clipped(np.exp(lp[..., 0] - b.recorded), b)
    return -value, -slope


def cispo(lp: np.ndarray, b: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    slope = -np.clip(np.exp(lp[..., 0] - b.recorded), b.clip_low, b.clip_high) * b.advantages
    return slope * lp[..., 0], slope


def dro(lp: np.ndarray, b: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    difference = lp[..., 0] - b.recorded
    return -(lp[..., 0] * b.advantages - b.beta / 2 * difference**2), -(b.advantages - b.beta * difference)


def gspo(lp: np.ndarray, b: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    log_ratio = np.zeros(lp.shape[:2])
    for which in np.unique(b.datum):
        mine = b.datum == which
        chosen = mine & (b.mask > 0)
        if chosen.any():
            log_ratio[mine] = (lp[..., 0] - b.recorded)[chosen].mean()
    value, slope = _min_of_clipped(np.exp(log_ratio), b)
    return -value, -slope


def stable_reinforce(lp: np.ndarray, b: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    known, difference = b.mask > 0, lp[..., 0] - b.recorded
    weight = np.where(known, np.minimum(np.exp(difference), b.ratio_cap), 1.0)
    k3 = np.where(known, np.exp(-difference) + difference - 1, 0.0)
    slope = np.where(known, 1 - np.exp(-difference), 0.0)
    return -weight * b.advantages * lp[..., 0] + b.kl_coeff * k3, -weight * b.advantages + b.kl_coeff * slope


FORMULAS: dict[str, Callable] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
    "stable_reinforce": stable_reinforce,
}


def expected(lp: np.ndarray, batch: LossBatch) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient of every position in float64 by the formula of its own loss; zero on padding."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), batch)
    losses, gradient = np.zeros(lp.shape[:2]), np.zeros(lp.shape)
    for name, formula in FORMULAS.items():
        mine = batch.loss_id == LOSS_IDS[name]
        value, slope = formula(np.asarray(lp, np.float64), wide)
        losses[mine] = value[mine]
        if slope.ndim == 2:
            gradient[mine, 0] = slope[mine]
        else:
            gradient[mine] = slope[mine]
    return losses, gradient


def test_every_specified_loss_has_an_id_and_a_formula_here():
    assert set(LOSS_IDS) == set(loss_specs.LOSSES) == set(FORMULAS)
    assert sorted(LOSS_IDS.values()) == list(range(len(LOSS_IDS)))


@pytest.mark.parametrize("name", LOSS_IDS)
def test_a_loss_and_its_gradient(name: str):
    lp, batch = case([name])
    losses, gradient = run(lp, batch)
    wanted, slopes = expected(lp, batch)
    np.testing.assert_allclose(losses, wanted, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=2e-5, atol=2e-6)
    assert np.abs(slopes).max() > 0.1
    assert not losses[~layout()[1]].any()
    assert not gradient[~layout()[1]].any()


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "dro"])
def test_the_derivatives_above_are_those_of_the_formulas(name: str):
    """Central differences in float64, for the losses that stop no gradient."""
    lp, batch = case([name], seed=1)
    lp, step = lp.astype(np.float64), 1e-6
    _, slopes = expected(lp, batch)
    for at in np.ndindex(lp.shape):
        up, down = lp.copy(), lp.copy()
        up[at] += step
        down[at] -= step
        difference = (expected(up, batch)[0].sum() - expected(down, batch)[0].sum()) / (2 * step)
        assert abs(difference - slopes[at]) <= 1e-6


def test_losses_mixed_in_one_batch():
    """Each datum by its own loss, whatever its neighbours in the row have: every loss beside every other."""
    for shift in range(len(LOSS_IDS)):
        names = [list(LOSS_IDS)[(index + shift) % len(LOSS_IDS)] for index in range(len(LOSS_IDS))]
        lp, batch = case(names, seed=shift)
        losses, gradient = run(lp, batch)
        wanted, slopes = expected(lp, batch)
        np.testing.assert_allclose(losses, wanted, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(gradient, slopes, rtol=2e-5, atol=2e-6)


def test_ratios_of_gspo_are_those_of_each_datum():
    """Two datums in a row: ratios sqrt(4 * 1) = 2, clipped to 1.2, and 0.5 (its masked position has 8); alone, too."""
    ratios = np.array([[4.0, 1.0, 0.5, 8.0]])
    lp = np.log(np.array([[0.4, 0.1, 0.3, 0.2]]))
    _, batch = case(["gspo"])
    fields = {name: np.zeros((1, 4), np.float32) for name in ("clip_low", "clip_high", "beta", "kl_coeff", "ratio_cap")}
    batch = LossBatch(
        loss_id=np.full((1, 4), LOSS_IDS["gspo"], np.int32),
        datum=np.array([[0, 0, 2, 2]], np.int32),
        weights=np.zeros((1, 4, 1), np.float32),
        recorded=(lp - np.log(ratios)).astype(np.float32),
        advantages=np.array([[1.0, -2.0, 1.0, 3.0]], np.float32),
        mask=np.array([[1, 1, 1, 0]], np.float32),
        sequence_log_ratio=np.zeros((1, 4), np.float32),
        **fields | {"clip_low": np.full((1, 4), 0.8, np.float32), "clip_high": np.full((1, 4), 1.2, np.float32)},
    )
    losses, gradient = run(lp[..., None], batch)
    np.testing.assert_allclose(losses, [[-1.2, 4.0, -0.5, -1.5]], rtol=1e-5)
    np.testing.assert_allclose(gradient[..., 0], [[0.0, 4.0, -0.5, -1.5]], rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSS_IDS if name != "cross_entropy"])
def test_a_huge_ratio_that_is_clipped_away_gives_finite_gradients(name: str):
    """exp(200) is inf in float32, and inf times a zero cotangent is NaN."""
    lp, batch = case([name])
    batch.recorded[layout()[1]] = -200.0
    np.abs(batch.advantages, out=batch.advantages)
    losses, gradient = run(lp, batch)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSS_IDS)
def test_rubbish_on_padding_reaches_nobody(name: str):
    """Not even logprobs that are infinite: a head may give what it likes there."""
    lp, batch = case([name])
    clean = run(lp, batch)
    padding = ~layout()[1]
    lp[padding], batch.recorded[padding], batch.advantages[padding] = -np.inf, 1e30, 1e30
    dirty = run(lp, batch)
    assert np.array_equal(clean[0], dirty[0])
    assert np.array_equal(clean[1], dirty[1])


def test_an_overflow_of_one_loss_reaches_no_other():
    lp, batch = case(["importance_sampling", "dro"])
    clean, mine = run(lp, batch), batch.loss_id == LOSS_IDS["importance_sampling"]
    batch.advantages[mine] = 3e38
    losses, gradient = run(lp, batch)
    assert np.array_equal(losses[~mine], clean[0][~mine])
    assert np.array_equal(gradient[~mine], clean[1][~mine])
