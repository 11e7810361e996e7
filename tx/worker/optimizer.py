"""AdamW on one adapter, as ``torch.optim.AdamW`` computes it, with ``torch.nn.utils.clip_grad_norm_`` before it.

Decoupled weight decay, bias correction, eps outside the square root. Hyperparameters are data: a client that changes
its learning rate at every step compiles nothing. Everything is float32 but the bias corrections, which the host takes
in double precision (``1 - 0.999**t`` loses three digits in float32).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tx.errors import InvalidInput
from tx.layers.lora import Adapter
from tx.types import AdamParams
from tx.worker.ahead import Call, Value, directly

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing, as torch does."""

LAYERS_AT_ONCE = 5
"""Layers in one program: few starts, and a program of SmolLM2's compiles in half a second."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepSizes:
    """One step's scalars, float32, derived from AdamParams and the step count."""

    decay: Any  # 1 - learning_rate * weight_decay
    step_size: Any  # learning_rate / (1 - beta1**step)
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    correction2: Any  # sqrt(1 - beta2**step)
    eps: Any
    clip_norm: Any  # 0 is off


def check(params: AdamParams) -> None:
    """Raises InvalidInput naming the field that torch's AdamW would refuse too."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(params, name)
        if not math.isfinite(value) or value < 0:
            raise InvalidInput(f"adam_params.{name}", value, "a finite number, at least 0")
    for name in ("beta1", "beta2"):
        value = getattr(params, name)
        if not 0 <= value < 1:
            raise InvalidInput(f"adam_params.{name}", value, "a number in [0, 1)")


def step_sizes(params: AdamParams, step: int) -> StepSizes:
    """The scalars of step number ``step``, counted from 1."""
    values = (
        1.0 - params.learning_rate * params.weight_decay,
        params.learning_rate / (1.0 - params.beta1**step),
        params.beta1,
        1.0 - params.beta1,
        params.beta2,
        1.0 - params.beta2,
        math.sqrt(1.0 - params.beta2**step),
        params.eps,
        params.grad_clip_norm,
    )
    return StepSizes(*(np.float32(value) for value in values))


def adamw(
    weights: Adapter, mu: Adapter, nu: Adapter, grads: Adapter, sizes: StepSizes, *, call: Call = directly
) -> tuple[Adapter, Adapter, Adapter, Float[Value, ""]]:
    """One step: (weights, mu, nu, norm of the gradients before clipping). Weights and moments given are consumed.

    A few layers at a time, so that layers of one kind share a program: as one program, SmolLM2's step compiles for 3 s.
    """
    tree = jax.tree.structure(weights)
    leaves = [jax.tree.leaves(state) for state in (weights, mu, nu, grads)]
    pieces = _pieces(weights)
    norm, factor = call(_clipping, [call(_sum_of_squares, leaves[3][piece]) for piece in pieces], sizes.clip_norm)
    stepped = [call(_step, *(arrays[piece] for arrays in leaves), sizes, factor) for piece in pieces]
    weights, mu, nu = (
        jax.tree.unflatten(tree, [leaf for arrays in stepped for leaf in arrays[which]]) for which in range(3)
    )
    return weights, mu, nu, norm


def _pieces(adapter: Adapter) -> list[slice]:
    """Which leaves go through a program together: those of ``LAYERS_AT_ONCE`` layers, and the unembedding's.

    As lists: a call with nested dataclasses takes twice as long to start, and starting is half of a step on a CPU.
    """
    layers = adapter.layers
    parts = [layers[at : at + LAYERS_AT_ONCE] for at in range(0, len(layers), LAYERS_AT_ONCE)]
    ends = list(itertools.accumulate(len(jax.tree.leaves(part)) for part in (*parts, adapter.unembed)))
    return [slice(begin, end) for begin, end in itertools.pairwise([0, *ends]) if end > begin]


@jax.jit
def _sum_of_squares(grads: list[jax.Array]) -> Float[Array, ""]:
    return sum((jnp.sum(jnp.square(g)) for g in grads), jnp.float32(0))


@jax.jit
def _clipping(squares: list[Float[Array, ""]], clip_norm: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The norm of all gradients, and what they are multiplied by."""
    norm = jnp.sqrt(jnp.stack(squares).sum())
    return norm, jnp.where(clip_norm > 0, jnp.minimum(1.0, clip_norm / (norm + CLIP_EPSILON)), 1.0)


@partial(jax.jit, donate_argnums=(0, 1, 2))
def _step(weights: Any, mu: Any, nu: Any, grads: Any, sizes: StepSizes, factor: Float[Array, ""]) -> tuple[Any, ...]:
    grads = jax.tree.map(lambda g: g * factor, grads)
    mu = jax.tree.map(lambda m, g: sizes.beta1 * m + sizes.one_minus_beta1 * g, mu, grads)
    nu = jax.tree.map(lambda v, g: sizes.beta2 * v + sizes.one_minus_beta2 * jnp.square(g), nu, grads)

    def update(w: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        denominator = jnp.sqrt(v) / sizes.correction2 + sizes.eps
        # 0/0 is possible where eps is 0 and no gradient ever came, padded columns above all: they stay 0.
        direction = jnp.where(denominator > 0, m / denominator, 0.0)
        return w * sizes.decay - sizes.step_size * direction

    return jax.tree.map(update, weights, mu, nu), mu, nu
