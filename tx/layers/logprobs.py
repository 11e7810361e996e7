"""The unembedding head: logprobs of given tokens, the most likely tokens, next-token logits. Always float32.

``[row, seq, vocab]`` never exists: positions go through in chunks of about ``chunk`` tokens. Chunks cut ``seq``, not
rows, so that rows stay where the mesh has put them. The kernel is frozen.

Training takes the gradient while a chunk's logits are there (``loss_and_gradient``): the loss is a function of each
position's logprobs alone, so its derivative is known at once, nothing is computed again and nothing is kept. This is
the idea of cut cross-entropy (Wijmans et al., 2024) for any such loss, and with an adapter on the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tx.layers.lora import LoraWeights, delta_and_low, delta_gradient, dot, lora_delta

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
    """Log-probability of each target at its position."""

    def one(part: Any) -> Float[Array, "row piece k"]:
        h, t = part
        logits = next_logits(h, kernel, lora, gate)
        return _pick(logits, t) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    return _over_chunks(one, (hidden, targets), chunk)


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Order:
    """Which positions the head looks at, and how far; made on the host.

    Attributes:
        first: int [row seq], each row's positions in the order in which they go through: those whose loss has a
            derivative, then the other real ones, then padding.
        num_weighted, num_valid: int [], the most of the first sort, and of the first two, that any row has.
    """

    first: Any
    num_weighted: Any
    num_valid: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadGradient:
    """Where a backward pass starts. hidden: [row seq embed], in its dtype; lora: like the head's adapter, or None."""

    hidden: Any
    lora: Any


def loss_and_gradient(
    hidden: Float[Array, "row seq embed"],
    kernel: Kernel,
    targets: Int[Array, "row seq k"],
    lora: LoraWeights | None,
    gate: Gate | None,
    order: Order,
    inputs: Any,
    losses: Callable[[Float[Array, "row piece k"], Any], Float[Array, "row piece"]],
    *,
    chunk: int,
) -> tuple[Float[Array, "row seq k"], Float[Array, "row seq"], HeadGradient]:
    """Logprobs of the targets, each position's loss, and the gradient of the sum of all losses.

    Chunks without a position that has a derivative stop after the logprobs, chunks of padding are not computed at all.

    Args:
        inputs: arrays [row seq …] that the loss reads.
        losses: from logprobs and inputs of some positions to their losses; position by position, so that the
            derivative with respect to a position's logprobs is known from that position alone.
    """
    rows, seq, _ = hidden.shape
    pieces, piece = _pieces(rows, seq, chunk)
    # Row by row, so that a mesh that cuts rows needs no other device's.
    in_order = jax.vmap(lambda x, order: x[order])
    back = jnp.argsort(order.first, axis=1)

    def cut(x: Array) -> Array:
        x = in_order(x, order.first)
        x = jnp.pad(x, [(0, 0), (0, pieces * piece - seq), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(rows, pieces, piece, *x.shape[2:]), 1, 0)

    parts = jax.tree.map(cut, (hidden, targets, inputs))
    kinds = jnp.where(jnp.arange(pieces) * piece < order.num_weighted, 2, 0)
    kinds = jnp.where((kinds == 0) & (jnp.arange(pieces) * piece < order.num_valid), 1, kinds)

    def nothing(grads: Any, part: Any) -> Any:
        h, t, _ = part
        empty = jnp.zeros(t.shape, jnp.float32)
        return grads, (empty, jnp.zeros_like(h))

    def scores(grads: Any, part: Any) -> Any:
        h, t, _ = part
        logits = next_logits(h, kernel, lora, gate)
        logprobs = _pick(logits, t) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return grads, (logprobs, jnp.zeros_like(h))

    def gradient(grads: Any, part: Any) -> Any:
        h, t, given = part
        logits, low = _logits(h, kernel, lora, gate)
        norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        logprobs = _pick(logits, t) - norm
        value, pull = jax.vjp(lambda lp: losses(lp, given), logprobs)
        (g,) = pull(jnp.ones_like(value))
        d = -jnp.sum(g, axis=-1, keepdims=True) * jnp.exp(logits - norm)
        vocab = jnp.arange(logits.shape[-1])
        for j in range(t.shape[-1]):  # a comparison, not a scatter: it stays on its shard of the vocabulary
            d = d + jnp.where(vocab == t[..., j, None], g[..., j, None], 0.0)
        d = d.astype(h.dtype)
        dh = dot(d, kernel.T)
        if lora is not None:
            more, grads = _lora_gradient(h, low, d, lora, gate, grads)
            dh = dh + more
        return grads, (logprobs, dh.astype(h.dtype))

    def step(grads: Any, part: Any) -> Any:
        return jax.lax.switch(part[0], (nothing, scores, gradient), grads, part[1])

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), lora)
    grads, found = jax.lax.scan(step, zeros, (kinds, parts))

    def put_back(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).reshape(rows, pieces * piece, *x.shape[3:])[:, :seq]
        return in_order(x, back)

    logprobs, dh = jax.tree.map(put_back, found)
    return logprobs, losses(logprobs, inputs), HeadGradient(dh, grads)


def _logits(hidden: Any, kernel: Any, lora: LoraWeights | None, gate: Any) -> tuple[Any, Any]:
    """Logits, and what stands between the adapter's two factors."""
    logits = dot(hidden, kernel)
    if lora is None:
        return logits, None
    delta, low = delta_and_low(hidden, lora, gate)
    return logits + delta, low


def _lora_gradient(h: Any, low: Any, d: Any, lora: LoraWeights, gate: Any, grads: LoraWeights) -> tuple[Any, Any]:
    dh, more = delta_gradient(h, low, d, lora, gate)
    return dh, jax.tree.map(jnp.add, grads, more)


def _pick(logits: Float[Array, "row piece vocab"], ids: Int[Array, "row piece k"]) -> Float[Array, "row piece k"]:
    return jnp.take_along_axis(logits, ids, axis=-1)


def _over_chunks(one: Callable[[Any], Any], arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """Map ``one`` over pieces of ``seq`` (axis 1) and put its results together again.

    Example: 4 rows of 100 positions with chunk 64 are 7 pieces of 4 x 15, the last padded with 5 positions.
    """
    rows, seq = arrays[0].shape[:2]
    pieces, piece = _pieces(rows, seq, chunk)
    if pieces == 1:
        return one(arrays)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * piece - seq), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(rows, pieces, piece, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, pieces * piece, *x.shape[3:])[:, :seq]

    return jax.tree.map(join, jax.lax.map(one, tuple(cut(x) for x in arrays)))


def _pieces(rows: int, seq: int, chunk: int) -> tuple[int, int]:
    """How many pieces ``seq`` is cut into and the positions of each: all alike, of ``chunk`` tokens or one position."""
    pieces = -(-seq // max(1, chunk // rows))
    return pieces, -(-seq // pieces)
