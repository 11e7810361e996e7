"""Losses on worked examples. (Gradients of every loss against torch autograd: test_trainer.)"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx import loss_specs
from tx.worker.losses import LOSS_IDS, LossBatch, row_losses

VALUE = jax.jit(row_losses)
GRADIENT = jax.jit(jax.grad(lambda lp, batch: row_losses(lp, batch).sum()))
LP = np.log(np.array([[0.5, 0.2, 0.9], [0.4, 0.1, 0.3]], np.float32))
Q = np.log(np.array([[0.25, 0.4, 0.9], [0.1, 0.1, 0.6]], np.float32))  # ratios 2, 0.5, 1 and 4, 1, 0.5
ADVANTAGES = np.array([[1.0, 1.0, -1.0], [-2.0, 1.0, 1.0]], np.float32)
VALID = np.array([[1, 1, 1], [1, 1, 0]], np.float32)


def batch(loss: str, **changes: object) -> LossBatch:
    ones = np.ones_like(LP)
    fields = {
        "loss_id": LOSS_IDS[loss],
        "valid": VALID,
        "weights": VALID[..., None] * 3,
        "recorded": Q,
        "advantages": ADVANTAGES,
        "mask": VALID,
        "clip_low": 0.8 * ones,
        "clip_high": 1.2 * ones,
        "beta": 0.5,
        "kl_coeff": 0.1,
        "ratio_cap": 2.0,
    }
    converted = {key: jnp.asarray(value) for key, value in (fields | changes).items()}
    return LossBatch(**converted)


def value(loss: str, lp: np.ndarray = LP, **changes: object) -> np.ndarray:
    return np.asarray(VALUE(jnp.asarray(lp[..., None]), batch(loss, **changes)))


def test_every_specified_loss_has_an_id():
    assert set(LOSS_IDS) == set(loss_specs.LOSSES)
    assert sorted(LOSS_IDS.values()) == list(range(len(LOSS_IDS)))


def test_cross_entropy_is_a_plain_weighted_sum():
    np.testing.assert_allclose(value("cross_entropy"), [-3 * LP[0].sum(), -3 * LP[1, :2].sum()], rtol=1e-6)


def test_importance_sampling():
    np.testing.assert_allclose(value("importance_sampling"), [-(2 + 0.5 - 1), -(-8 + 1)], rtol=1e-5)


def test_ppo_takes_the_pessimistic_branch():
    np.testing.assert_allclose(value("ppo"), [-(1.2 + 0.5 - 1), -(-8 + 1)], rtol=1e-5)


def test_cispo_weighs_the_logprob_by_the_clipped_ratio():
    wanted = [-(1.2 * LP[0, 0] + 0.8 * LP[0, 1] - LP[0, 2]), -(1.2 * -2 * LP[1, 0] + LP[1, 1])]
    np.testing.assert_allclose(value("cispo"), wanted, rtol=1e-5)


def test_dro_counts_no_padding():
    difference = (LP - Q).astype(np.float64)
    wanted = -((LP * ADVANTAGES - 0.25 * difference**2) * VALID).sum(1)
    np.testing.assert_allclose(value("dro"), wanted, rtol=1e-5)


def test_gspo_has_one_ratio_per_row():
    # Row 0: geometric mean of 2, 0.5 and 1 is 1. Row 1 over its two valid positions: sqrt(4 * 1) = 2, clipped to 1.2.
    np.testing.assert_allclose(value("gspo"), [-(1 + 1 - 1), -(-2 * 2 + 1.2)], rtol=1e-5)
    np.testing.assert_allclose(value("gspo", mask=0 * VALID), [-1.0, 1.0], rtol=1e-5)


def test_stable_reinforce_truncates_and_penalises_only_where_recorded():
    k3 = np.exp(Q - LP) - (Q - LP) - 1
    wanted = [
        -(2 * LP[0, 0] + 0.5 * LP[0, 1] - LP[0, 2]) + 0.1 * k3[0].sum(),
        -(2 * -2 * LP[1, 0] + LP[1, 1]) + 0.1 * k3[1, :2].sum(),
    ]
    np.testing.assert_allclose(value("stable_reinforce"), wanted, rtol=1e-5)
    plain = -(LP * ADVANTAGES * VALID).sum(1)
    np.testing.assert_allclose(value("stable_reinforce", mask=0 * VALID), plain, rtol=1e-5)


@pytest.mark.parametrize("loss", [name for name in LOSS_IDS if name != "cross_entropy"])
def test_a_huge_ratio_that_is_clipped_away_gives_finite_gradients(loss: str):
    """exp(200) is inf in float32, and inf times a zero cotangent is NaN."""
    arguments = batch(loss, recorded=np.full_like(Q, -200), advantages=np.abs(ADVANTAGES))
    gradient = GRADIENT(jnp.asarray(LP[..., None]), arguments)
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("loss", LOSS_IDS)
def test_padding_has_no_gradient(loss: str):
    gradient = GRADIENT(jnp.asarray(LP[..., None]), batch(loss))
    assert gradient[1, 2, 0] == 0
    assert np.asarray(gradient).ravel()[:5].any()
