"""The losses of ``tx.loss_specs`` as pure functions: per-position arrays in, one loss per position out, all in float32.

Every loss is a plain sum over positions (protocol §3.6). Which loss a position has, and its config, are data, so that
one compiled program serves them all, and datums of several losses share a micro-batch. A position's loss depends on
its own logprobs alone; what gspo must know of its whole datum comes in as ``sequence_log_ratio``. Notation: ``lp`` is
the logprob under the present weights, ``q`` the one recorded when the token was sampled, ``r = exp(lp - q)``, ``A`` the
advantage and ``sg`` stops the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tx.loss_specs import LOSSES

MAX_LOG_RATIO = 60.0
"""exp(60) = 1e26 is beyond any use, and its products stay finite in float32: exp(89) would be inf, and the clipped-away
branch of a minimum would then give 0 * inf = NaN gradients."""

LOSS_IDS = {name: index for index, name in enumerate(LOSSES)}
"""What ``LossBatch.loss_id`` means."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossBatch:
    """What a micro-batch's losses read besides the logprobs: [row seq], but for ``weights``; zero where not used.

    Attributes:
        loss_id: int32, an entry of LOSS_IDS; -1 on padding, which has no loss.
        datum: int32, the same number for all positions of a datum: any of ``row * seq`` that is theirs alone.
        weights: [row seq k], of cross_entropy.
        recorded: q.
        advantages: A.
        mask: gspo's ``sequence_ratio_mask``; for stable_reinforce 1 where q is known.
        clip_low, clip_high: bounds of r, from the config or per-token tensors.
        beta, kl_coeff, ratio_cap: configs of dro and stable_reinforce.
        sequence_log_ratio: of gspo: the mean of ``lp - q`` over the datum's mask (``with_sequence_ratios``).
    """

    loss_id: Any
    datum: Any
    weights: Any
    recorded: Any
    advantages: Any
    mask: Any
    clip_low: Any
    clip_high: Any
    beta: Any
    kl_coeff: Any
    ratio_cap: Any
    sequence_log_ratio: Any


TargetLogprobs = Float[Array, "row seq k"]
Logprobs = Float[Array, "row seq"]
Losses = Float[Array, "row seq"]


def position_losses(lp: TargetLogprobs, batch: LossBatch) -> Losses:
    """Each position's loss; 0 on padding."""
    total = jnp.zeros(lp.shape[:2], jnp.float32)
    for name, loss_id in LOSS_IDS.items():
        mine = batch.loss_id == loss_id
        # Zeros go into the formulas of other losses: what overflows there would come back as 0 * inf in the gradient.
        advantages, recorded = (jnp.where(mine, x, 0.0) for x in (batch.advantages, batch.recorded))
        own = replace(batch, advantages=advantages, recorded=recorded)
        total = total + jnp.where(mine, _LOSSES[name](jnp.where(mine[..., None], lp, 0.0), own), 0.0)
    return total


def with_sequence_ratios(lp: TargetLogprobs, batch: LossBatch) -> LossBatch:
    """The batch with gspo's mean log ratio of each position's datum; an empty mask gives 0, a ratio of 1."""
    datum, size = batch.datum.reshape(-1), batch.datum.size
    sums = lambda values: jax.ops.segment_sum(values.reshape(-1), datum, size)[datum].reshape(batch.datum.shape)
    mean = sums(batch.mask * (lp[..., 0] - batch.recorded)) / jnp.maximum(sums(batch.mask), 1.0)
    return replace(batch, sequence_log_ratio=mean)


def cross_entropy(lp: TargetLogprobs, batch: LossBatch) -> Losses:
    """``-w * lp``, summed over the position's targets."""
    return -jnp.sum(batch.weights * lp, axis=-1)


def importance_sampling(lp: Logprobs, batch: LossBatch) -> Losses:
    """``-r * A``."""
    return -_ratio(lp - batch.recorded) * batch.advantages


def ppo(lp: Logprobs, batch: LossBatch) -> Losses:
    """``-min(r * A, clip(r) * A)``."""
    return -_clipped(_ratio(lp - batch.recorded), batch)


def cispo(lp: Logprobs, batch: LossBatch) -> Losses:
    """``-sg(clip(r)) * lp * A``: every token keeps its gradient, only its weight is clipped."""
    ratio = jnp.clip(_ratio(lp - batch.recorded), batch.clip_low, batch.clip_high)
    return -jax.lax.stop_gradient(ratio) * lp * batch.advantages


def dro(lp: Logprobs, batch: LossBatch) -> Losses:
    """``-(lp * A - beta / 2 * (lp - q)^2)``."""
    return -(lp * batch.advantages - 0.5 * batch.beta * jnp.square(lp - batch.recorded))


def gspo(lp: Logprobs, batch: LossBatch) -> Losses:
    """GSPO-token: ppo with one ratio per datum, ``exp(mean of lp - q over the mask)``; its gradient goes to each token.

    ``exp(lp - sg(lp))`` is 1 in value and has the token's gradient.
    """
    sequence_ratio = jax.lax.stop_gradient(_ratio(batch.sequence_log_ratio))
    return -_clipped(sequence_ratio * jnp.exp(lp - jax.lax.stop_gradient(lp)), batch)


def stable_reinforce(lp: Logprobs, batch: LossBatch) -> Losses:
    """``-sg(min(r, cap)) * A * lp + kl_coeff * k3`` with ``k3 = exp(q - lp) - (q - lp) - 1`` (tx's own definition).

    Where the server has recorded no q the weight is 1 and there is no k3.
    """
    difference = jnp.where(batch.mask > 0, lp - batch.recorded, 0.0)
    weight = jax.lax.stop_gradient(jnp.minimum(_ratio(difference), batch.ratio_cap))
    weight = jnp.where(batch.mask > 0, weight, 1.0)
    k3 = _ratio(-difference) + difference - 1.0
    return -weight * batch.advantages * lp + batch.kl_coeff * k3


def _ratio(log_ratio: Logprobs) -> Logprobs:
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def _clipped(ratio: Logprobs, batch: LossBatch) -> Logprobs:
    clipped = jnp.clip(ratio, batch.clip_low, batch.clip_high)
    return jnp.minimum(ratio * batch.advantages, clipped * batch.advantages)


def _single_target(loss: Callable[[Logprobs, LossBatch], Losses]) -> Callable[[TargetLogprobs, LossBatch], Losses]:
    return lambda lp, batch: loss(lp[..., 0], batch)


_LOSSES = {
    "cross_entropy": cross_entropy,
    "importance_sampling": _single_target(importance_sampling),
    "ppo": _single_target(ppo),
    "cispo": _single_target(cispo),
    "dro": _single_target(dro),
    "gspo": _single_target(gspo),
    "stable_reinforce": _single_target(stable_reinforce),
}
