"""Logits to one token and its logprob per row; every sampling parameter is an array, so that none ever recompiles.

The meaning of a row's parameters:

- ``temperature`` 0 takes the most likely token and reports its logprob at temperature 1. Otherwise the reported logprob
  is the float32 log-softmax of ``logits / temperature`` over the whole vocabulary, before top-k and top-p.
- ``top_k`` keeps the k most likely tokens (and those that tie with the k-th); -1 is off.
- ``top_p`` then keeps the smallest set of the most likely tokens whose renormalised mass reaches p; 1 is off.
- the randomness is a function of the row's seed, its index in the request and the position of the drawn token, so it
  knows nothing of the other rows, of slots or of slices.

Not here: when a row ends (``stopping``) and what a batch is (``generator``).

Nothing is sorted. A threshold is found by building its 32 bits from the top (order-preserving integer keys), and the
draw is an inverse CDF in two levels, first a block of tokens and then one token inside it: on a 49k vocabulary both
together cost a few percent of a decode step where an argsort costs more than the step itself. Whether a batch has
filters at all is data too: the search is a branch of the program.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

_BLOCK = 256
"""Tokens per block of the two-level draw: near the square root of usual vocabularies, and a whole number of vectors."""

_SMALLEST_TEMPERATURE = 1e-30
"""Below float32's normal range a division gives 0/0; at this temperature the distribution is already one token."""


def row_keys(seeds: UInt32[Array, "row 2"], sample_index: Int[Array, "row"]) -> Key[Array, "row"]:
    """One key per row from its request's 64-bit seed (high word first) and its index among the request's samples."""
    # The generator is named, so that a global JAX setting can't change what a seed means.
    keys = jax.random.wrap_key_data(seeds, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, sample_index)


def sample(
    logits: Float[Array, "row vocab"],
    keys: Key[Array, "row"],
    positions: Int[Array, "row"],
    temperature: Float[Array, "row"],
    top_k: Int[Array, "row"],
    top_p: Float[Array, "row"],
) -> tuple[Int[Array, "row"], Float[Array, "row"], Float[Array, "row vocab"]]:
    """Draw the token that stands at ``positions``.

    Returns:
        the tokens, their logprobs, and the logprobs of the whole vocabulary that these are of.
    """
    greedy = temperature <= 0
    divisor = jnp.where(greedy, 1.0, jnp.maximum(temperature, _SMALLEST_TEMPERATURE))
    # Subtracting the maximum first keeps tiny temperatures finite: the best token stays at 0, others go to -inf.
    scaled = (logits.astype(jnp.float32) - logits.max(axis=-1, keepdims=True)) / divisor[:, None]
    weights = jnp.exp(scaled)
    log_total = jnp.log(weights.sum(axis=-1))
    filters = ~greedy & ((top_k > 0) | (top_p < 1))
    everything = jnp.full(top_k.shape, -jnp.inf)
    # Only the threshold of each row crosses the branch: whole rows of weights would be copied there.
    floor = lax.cond(filters.any(), lambda: _floor(scaled, weights, top_k, top_p), lambda: everything)
    # The barrier keeps the comparison out of the draw's loops, which it makes 6 times as slow on a CPU.
    kept = lax.optimization_barrier(jnp.where(scaled >= floor[:, None], weights, 0.0))
    uniform = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at), (2,)))(keys, positions)
    tokens = jnp.where(greedy, _best(scaled), _draw(kept, uniform)).astype(jnp.int32)
    logprobs = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - log_total
    return tokens, logprobs, scaled - log_total[:, None]


def _in_blocks(x: Float[Array, "row vocab"], fill: float) -> Float[Array, "row block token"]:
    rows, vocab = x.shape
    num_blocks = -(-vocab // _BLOCK)
    padded = jnp.pad(x, ((0, 0), (0, num_blocks * _BLOCK - vocab)), constant_values=fill)
    return padded.reshape(rows, num_blocks, _BLOCK)


def _best(values: Float[Array, "row vocab"]) -> Int[Array, "row"]:
    """``argmax``, the first of equals, in two levels: over a whole row it takes a CPU 30 times as long as ``max``."""
    blocks = _in_blocks(values, -jnp.inf)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + jnp.argmax(inside, axis=-1)


def _draw(weights: Float[Array, "row vocab"], uniform: Float[Array, "row 2"]) -> Int[Array, "row"]:
    """Inverse CDF in two levels: the first number chooses a block of tokens, the second a token inside it.

    Two numbers rather than one, because float32 has 24 bits: a token of probability 1e-9 is still drawn in proportion.
    """
    blocks = _in_blocks(weights, 0.0)
    block = _invert(blocks.sum(axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _invert(inside, uniform[:, 1])


def _invert(weights: Float[Array, "row choice"], uniform: Float[Array, "row"]) -> Int[Array, "row"]:
    """The first choice whose cumulative weight passes ``uniform`` of the total, and never one of weight zero."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    passed = (cumulative > target) & (weights > 0)
    # Rounding can leave ``target`` at the very top (no choice passes): then the last choice of positive weight.
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, axis=-1), axis=-1)
    return jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last)


def _floor(
    scaled: Float[Array, "row vocab"],
    weights: Float[Array, "row vocab"],
    top_k: Int[Array, "row"],
    top_p: Float[Array, "row"],
) -> Float[Array, "row"]:
    """The least value that survives top-k and then top-p; each search runs only if some row asks for it."""
    order = _order(scaled)
    floor = jnp.zeros(top_k.shape, jnp.uint32)

    def kth_largest(_: UInt32[Array, "row"]) -> UInt32[Array, "row"]:
        threshold = _largest(lambda at: (order >= at[:, None]).sum(axis=-1) >= top_k, top_k.shape)
        return jnp.where(top_k > 0, threshold, 0)

    floor = lax.cond((top_k > 0).any(), kth_largest, lambda same: same, floor)

    def nucleus(floor: UInt32[Array, "row"]) -> UInt32[Array, "row"]:
        mass = jnp.where(order >= floor[:, None], weights, 0.0)
        wanted = top_p * mass.sum(axis=-1)
        threshold = _largest(lambda at: jnp.where(order >= at[:, None], mass, 0.0).sum(axis=-1) >= wanted, top_p.shape)
        return jnp.where(top_p < 1, jnp.maximum(threshold, floor), floor)

    floor = lax.cond((top_p < 1).any(), nucleus, lambda same: same, floor)
    bits = jnp.where(floor >> 31 == 1, floor & jnp.uint32(0x7FFFFFFF), ~floor)
    return jnp.where(floor == 0, -jnp.inf, lax.bitcast_convert_type(bits, jnp.float32))


def _largest(
    holds: Callable[[UInt32[Array, "row"]], Bool[Array, "row"]], shape: tuple[int, ...]
) -> UInt32[Array, "row"]:
    """The largest uint32 per row for which ``holds``; it must hold at 0 and, once false, stay false above."""

    def set_bit(step: Int[Array, ""], found: UInt32[Array, "row"]) -> UInt32[Array, "row"]:
        candidate = found | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return lax.fori_loop(0, 32, set_bit, jnp.zeros(shape, jnp.uint32))


def _order(values: Float[Array, "row vocab"]) -> UInt32[Array, "row vocab"]:
    """Unsigned integers that compare as the float32 values do.

    Worked example: 1.0 is 0x3f800000 → 0xbf800000; -1.0 is 0xbf800000 → 0x407fffff; -inf is the smallest, 0x007fffff.
    """
    # -0.0 equals 0.0 but its bits do not.
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))
