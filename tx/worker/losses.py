"""The losses of ``tx.loss_specs`` as pure functions: per-position arrays in, one sum per row out, all in float32.

Every loss is a plain sum over positions (protocol §3.6). Which loss runs and its config are data, so that one compiled
program serves them all: ``row_losses`` switches on ``LossBatch.loss_id``. Notation: ``lp`` is the logprob under the
present weights, ``q`` the one recorded when the token was sampled, ``r = exp(lp - q)``, ``A`` the advantage and ``sg``
stops the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MAX_LOG_RATIO = 60.0
"""exp(60) = 1e26 is beyond any use, and its products stay finite in float32: exp(89) would be inf, and the clipped-away
branch of a minimum would then give 0 * inf = NaN gradients."""

LOSS_IDS = {
    name: index
    for index, name in enumerate(
        ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")
    )
}
"""Position of each loss in the switch."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossBatch:
    """What a micro-batch's loss reads besides the logprobs; losses that don't use a field get zeros.

    Attributes:
        loss_id: int32 scalar, an entry of LOSS_IDS.
        valid: [row seq], 1 on real positions and 0 on padding.
        weights: [row seq k], of cross_entropy.
        recorded: [row seq], q.
        advantages: [row seq].
        mask: [row seq], gspo's ``sequence_ratio_mask``; for stable_reinforce 1 where q is known.
        clip_low, clip_high: [row seq], bounds of r, from the config or per-token tensors.
        beta, kl_coeff, ratio_cap: scalars, configs of dro and stable_reinforce.
    """

    loss_id: Any
    valid: Any
    weights: Any
    recorded: Any
    advantages: Any
    mask: Any
    clip_low: Any
    clip_high: Any
    beta: Any
    kl_coeff: Any
    ratio_cap: Any


TargetLogprobs = Float[Array, "row seq k"]
Logprobs = Float[Array, "row seq"]
RowLoss = Float[Array, " row"]


def row_losses(lp: TargetLogprobs, batch: LossBatch) -> RowLoss:
    """Each row's loss, a sum over its positions."""
    return jax.lax.switch(batch.loss_id, _BRANCHES, lp, batch)


def cross_entropy(lp: TargetLogprobs, batch: LossBatch) -> RowLoss:
    """``-w * lp``; the weights of padding are 0."""
    return -jnp.sum(batch.weights * lp, axis=(1, 2))


def importance_sampling(lp: Logprobs, batch: LossBatch) -> RowLoss:
    """``-r * A``."""
    return _sum(-_ratio(lp - batch.recorded) * batch.advantages, batch)


def ppo(lp: Logprobs, batch: LossBatch) -> RowLoss:
    """``-min(r * A, clip(r) * A)``."""
    return _sum(-_clipped(_ratio(lp - batch.recorded), batch), batch)


def cispo(lp: Logprobs, batch: LossBatch) -> RowLoss:
    """``-sg(clip(r)) * lp * A``: every token keeps its gradient, only its weight is clipped."""
    ratio = jnp.clip(_ratio(lp - batch.recorded), batch.clip_low, batch.clip_high)
    return _sum(-jax.lax.stop_gradient(ratio) * lp * batch.advantages, batch)


def dro(lp: Logprobs, batch: LossBatch) -> RowLoss:
    """``-(lp * A - beta / 2 * (lp - q)^2)``."""
    return _sum(-(lp * batch.advantages - 0.5 * batch.beta * jnp.square(lp - batch.recorded)), batch)


def gspo(lp: Logprobs, batch: LossBatch) -> RowLoss:
    """GSPO-token: ppo with one ratio per row, ``exp(mean of lp - q over the mask)``, whose gradient goes to each token.

    ``exp(lp - sg(lp))`` is 1 in value and has the token's gradient. An empty mask is a ratio of 1.
    """
    log_ratio = jnp.sum(batch.mask * (lp - batch.recorded), axis=1, keepdims=True)
    mean = log_ratio / jnp.maximum(jnp.sum(batch.mask, axis=1, keepdims=True), 1.0)
    sequence_ratio = jax.lax.stop_gradient(_ratio(mean))
    return _sum(-_clipped(sequence_ratio * jnp.exp(lp - jax.lax.stop_gradient(lp)), batch), batch)


def stable_reinforce(lp: Logprobs, batch: LossBatch) -> RowLoss:
    """``-sg(min(r, cap)) * A * lp + kl_coeff * k3`` with ``k3 = exp(q - lp) - (q - lp) - 1`` (tx's own definition).

    Where the server has recorded no q the weight is 1 and there is no k3.
    """
    difference = jnp.where(batch.mask > 0, lp - batch.recorded, 0.0)
    weight = jax.lax.stop_gradient(jnp.minimum(_ratio(difference), batch.ratio_cap))
    weight = jnp.where(batch.mask > 0, weight, 1.0)
    k3 = _ratio(-difference) + difference - 1.0
    return _sum(-weight * batch.advantages * lp + batch.kl_coeff * k3, batch)


def _ratio(log_ratio: Float[Array, "row positions"]) -> Float[Array, "row positions"]:
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def _clipped(ratio: Logprobs, batch: LossBatch) -> Logprobs:
    clipped = jnp.clip(ratio, batch.clip_low, batch.clip_high)
    return jnp.minimum(ratio * batch.advantages, clipped * batch.advantages)


def _sum(per_position: Logprobs, batch: LossBatch) -> RowLoss:
    return jnp.sum(per_position * batch.valid, axis=1)


def _single_target(loss: Callable[[Logprobs, LossBatch], RowLoss]) -> Callable[[TargetLogprobs, LossBatch], RowLoss]:
    return lambda lp, batch: loss(lp[..., 0], batch)


_BRANCHES = (
    cross_entropy,
    *(_single_target(loss) for loss in (importance_sampling, ppo, cispo, dro, gspo, stable_reinforce)),
)
