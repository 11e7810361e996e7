"""The unembedding head: logprobs of given tokens, the most likely tokens, next-token logits. Always float32.

``[row, seq, vocab]`` never exists: positions go through in chunks of about ``chunk`` tokens. Chunks cut ``seq``, not
rows, so that rows stay where the mesh has put them. The kernel is frozen. Without an adapter on the head, a chunk's
derivative ``kernel[:, target] - p @ kernel.T`` is taken while its probabilities exist and nothing is recomputed; with
one, a chunk's logits are recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tx.layers.lora import LoraWeights, dot, lora_delta

Kernel = Float[Array, "embed vocab"]
Gate = Float[Array, "gate_rows rank"]


def next_logits(
    hidden: Float[Array, "row *seq embed"], kernel: Kernel, lora: LoraWeights | None, gate: Gate | None
) -> Float[Array, "row *seq vocab"]:
    """Logits of every position given; meant for one position per row."""
    logits = dot(hidden, kernel)
    return logits if lora is None or gate is None else logits + lora_delta(hidden, lora, gate)


def target_logprobs(
    hidden: Float[Array, "row seq embed"],
    kernel: Kernel,
    targets: Int[Array, "row seq k"],
    lora: LoraWeights | None,
    gate: Gate | None,
    *,
    chunk: int,
) -> Float[Array, "row seq k"]:
    """Log-probability of each target at its position; differentiable in ``hidden`` and ``lora``."""
    if lora is None or gate is None:
        return _frozen_logprobs(hidden, kernel, targets, chunk)

    def one(part: Any) -> Float[Array, "row piece k"]:
        h, t = part
        logits = next_logits(h, kernel, lora, gate)
        return _pick(logits, t) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    return _over_chunks(jax.checkpoint(one), (hidden, targets), chunk)


def topk_logprobs(
    hidden: Float[Array, "row seq embed"],
    kernel: Kernel,
    lora: LoraWeights | None,
    gate: Gate | None,
    *,
    k: int,
    chunk: int,
) -> tuple[Int[Array, "row seq k"], Float[Array, "row seq k"]]:
    """The k most likely tokens of each position, best first, with their log-probabilities."""

    def one(part: Any) -> tuple[Int[Array, "row piece k"], Float[Array, "row piece k"]]:
        logits = next_logits(part[0], kernel, lora, gate)
        best, ids = jax.lax.top_k(logits, k)
        return ids, best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    return _over_chunks(one, (hidden,), chunk)


def _pick(logits: Float[Array, "row piece vocab"], ids: Int[Array, "row piece k"]) -> Float[Array, "row piece k"]:
    return jnp.take_along_axis(logits, ids, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _frozen_logprobs(
    hidden: Float[Array, "row seq embed"], kernel: Kernel, targets: Int[Array, "row seq k"], chunk: int
) -> Float[Array, "row seq k"]:
    def one(part: Any) -> Float[Array, "row piece k"]:
        h, t = part
        logits = dot(h, kernel)
        return _pick(logits, t) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    return _over_chunks(one, (hidden, targets), chunk)


def _frozen_forward(hidden: Any, kernel: Any, targets: Any, chunk: int) -> tuple[Any, Any]:
    def one(part: Any) -> tuple[Any, Any]:
        h, t = part
        logits = dot(h, kernel)
        norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        probabilities = jnp.exp(logits - norm).astype(kernel.dtype)
        expected = jnp.einsum("rsv,ev->rse", probabilities, kernel, preferred_element_type=jnp.float32)
        return _pick(logits, t) - norm, expected

    logprobs, expected = _over_chunks(one, (hidden, targets), chunk)
    return logprobs, (expected, kernel, targets, jnp.zeros((), hidden.dtype))


def _frozen_backward(chunk: int, saved: Any, g: Any) -> tuple[Any, None, None]:
    expected, kernel, targets, like = saved
    hidden = -jnp.sum(g, axis=-1, keepdims=True) * expected
    for j in range(targets.shape[-1]):  # one target at a time: [row, seq, k, embed] would be k times as large
        column = jnp.take(kernel, targets[..., j], axis=1, mode="clip")
        hidden = hidden + g[..., j, None] * jnp.moveaxis(column, 0, -1)
    return hidden.astype(like.dtype), None, None


_frozen_logprobs.defvjp(_frozen_forward, _frozen_backward)


def _over_chunks(one: Callable[[Any], Any], arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """Map ``one`` over pieces of ``seq`` (axis 1) and put its results together again.

    Example: 4 rows of 100 positions with chunk 64 are 7 pieces of 4 x 16, the last padded with 12 positions.
    """
    rows, seq = arrays[0].shape[:2]
    piece = max(1, min(seq, chunk // rows))
    pieces = -(-seq // piece)
    if pieces == 1:
        return one(arrays)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * piece - seq), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(rows, pieces, piece, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, pieces * piece, *x.shape[3:])[:, :seq]

    return jax.tree.map(join, jax.lax.map(one, tuple(cut(x) for x in arrays)))
