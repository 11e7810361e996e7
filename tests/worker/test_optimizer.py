"""AdamW against torch's published formula in double precision. (End to end against torch itself: test_trainer.)"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.errors import InvalidInput
from tx.layers.lora import Adapter, LoraWeights
from tx.types import AdamParams
from tx.worker.optimizer import adamw, check, step_sizes


def adapter(a: np.ndarray, b: np.ndarray) -> Adapter:
    return Adapter(({"q_proj": LoraWeights(jnp.array(a, jnp.float32), jnp.array(b, jnp.float32))},), None)


@pytest.mark.parametrize(
    "params",
    [
        AdamParams(),
        AdamParams(1e-2, 0.9, 0.999, 1e-8, 0.1, 0.0),
        AdamParams(1e-2, 0.8, 0.95, 1e-6, 0.3, 1.5),
        AdamParams(1e-2, 0.0, 0.0, 1e-3, 0.0, 100.0),
    ],
)
def test_thirty_steps_equal_the_formula(params: AdamParams):
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)]
    reference = [w.astype(np.float64) for w in weights]
    moments = [(np.zeros(w.shape), np.zeros(w.shape)) for w in weights]
    state = (adapter(*weights), adapter(*(0 * w for w in weights)), adapter(*(0 * w for w in weights)))
    for step in range(1, 31):
        grads = [rng.normal(size=w.shape).astype(np.float32) for w in weights]
        *state, norm = adamw(*state, adapter(*grads), step_sizes(params, step))
        total = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in grads))
        assert float(norm) == pytest.approx(total, rel=1e-6)
        clip = min(1.0, params.grad_clip_norm / (total + 1e-6)) if params.grad_clip_norm else 1.0
        for i, grad in enumerate(grads):
            g = grad.astype(np.float64) * clip
            m = params.beta1 * moments[i][0] + (1 - params.beta1) * g
            v = params.beta2 * moments[i][1] + (1 - params.beta2) * g * g
            moments[i] = (m, v)
            reference[i] *= 1 - params.learning_rate * params.weight_decay
            denominator = np.sqrt(v) / np.sqrt(1 - params.beta2**step) + params.eps
            reference[i] -= params.learning_rate / (1 - params.beta1**step) * m / denominator
    site = state[0].layers[0]["q_proj"]
    np.testing.assert_allclose(site.a, reference[0], atol=1e-5)
    np.testing.assert_allclose(site.b, reference[1], atol=1e-5)


def test_columns_without_gradient_stay_zero_even_with_eps_zero():
    zeros = (np.zeros((4, 2)), np.zeros((2, 5)))
    grads = (np.array([[1.0, 0.0]] * 4), np.array([[1.0] * 5, [0.0] * 5]))
    weights, *_ = adamw(
        adapter(*zeros), adapter(*zeros), adapter(*zeros), adapter(*grads), step_sizes(AdamParams(eps=0.0), 1)
    )
    site = weights.layers[0]["q_proj"]
    np.testing.assert_allclose(site.a[:, 0], -1e-4, rtol=1e-5)
    assert not np.asarray(site.a)[:, 1].any()
    assert not np.asarray(site.b)[1].any()


def test_the_gradients_survive_the_step_and_the_state_is_reused():
    zeros = (np.zeros((4, 2)), np.zeros((2, 5)))
    state, grads = [adapter(*zeros) for _ in range(3)], adapter(*(z + 1 for z in zeros))
    adamw(*state, grads, step_sizes(AdamParams(), 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1.0),
        ("weight_decay", float("inf")),
        ("grad_clip_norm", -1.0),
    ],
)
def test_what_torch_refuses_is_refused_by_name(field: str, value: float):
    check(AdamParams())
    with pytest.raises(InvalidInput, match=f"adam_params.{field}"):
        check(AdamParams(**{field: value}))
