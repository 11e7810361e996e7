"""Causal attention of packed rows in plain XLA, block by block: memory grows with the row, not with its square.

A row may hold several datums, one behind the other; ``starts`` says where the datum of each position begins, and a
position attends from there up to itself. Two forms, both exact, with softmax and sums in float32:

- short rows (up to SHORT): blocks of queries, unrolled, each against all keys up to its end. The scores of a block are
  computed again in the backward pass.
- longer ones: blocks of queries against blocks of keys with a running softmax, in loops whose bounds follow the data:
  keys that no query of a block may see are not visited, so a row of many short datums costs what they cost. The
  backward pass is FlashAttention-2's (Dao, 2023, algorithm 2).

Either names what its backward pass needs and would take long to compute again (``tx.layers.lora.KEPT``).

On a 2-core CPU (9 heads of 64), forward and backward: 512 positions take 7.9 ms unrolled and 10.7 in loops of 64, where
one block over everything takes 23. In loops of 64, 128, 256 and 512, 8,192 positions take 3.6, 2.8, 2.4 and 2.9 s; in
loops of 64 to 256, 1,024 take 63, 50 and 44 ms, and 2,048 in datums of 170 take 56, 52 and 74 (and 189 unrolled).

Not here: fused kernels, and the choice between them and this (``tx.layers.attention``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from tx.layers.lora import KEPT

SHORT = 512
"""Longest row whose blocks are unrolled: four of them."""

QUERY_BLOCK = 128
LOOP_BLOCK = 128
LONG_LOOP_BLOCK = 256
LONG = 1024
"""From so many positions on most rows are one long datum, and blocks are larger."""

MASKED = float(jnp.finfo(jnp.float32).min)

Queries = Float[Array, "row seq heads head_dim"]
Keys = Float[Array, "row seq kv_heads head_dim"]
Starts = Int[Array, "row seq"]


def packed_attention(q: Queries, k: Keys, v: Keys, starts: Starts) -> Queries:
    """Position i of a row attends to its positions ``starts[row, i]`` … i."""
    if q.shape[1] <= SHORT:
        return _unrolled(q, k, v, starts)
    seq = q.shape[1]
    missing = -seq % _loop_block(seq)
    if not missing:
        return _looped(q, k, v, starts)
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    return _looped(q, k, v, jnp.pad(starts, ((0, 0), (0, missing)), constant_values=seq))[:, :seq]


# ---- short rows -----------------------------------------------------------------------------------------------------


def _unrolled(q: Queries, k: Keys, v: Keys, starts: Starts) -> Queries:
    rows, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # Heads in front of positions: both products are then plain batched ones.
    grouped = q.reshape(rows, seq, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    blocks = []
    for begin in range(0, seq, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, seq)
        seen = _seen(jnp.arange(begin, end), jnp.arange(end), starts[:, begin:end])
        blocks.append(_block(grouped[:, :, :, begin:end], keys[:, :, :end], values[:, :, :end], seen))
    out = jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(rows, seq, heads, head_dim)
    return checkpoint_name(out.astype(q.dtype), KEPT)


@jax.checkpoint
def _block(q: Any, k: Any, v: Any, seen: Any) -> Float[Array, "row kv_heads group queries head_dim"]:
    rows, kv_heads, group, queries, head_dim = q.shape
    lines = q.reshape(rows, kv_heads, group * queries, head_dim)
    scores = jnp.einsum("rkqd,rksd->rkqs", lines, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(jnp.tile(seen, (1, group, 1))[:, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkqs,rksd->rkqd", weights, v, preferred_element_type=jnp.float32).reshape(q.shape)


def _seen(queries: Any, keys: Any, starts: Any) -> Any:
    """Which keys each query sees, [row, query, key], from their positions in the row."""
    return (queries[:, None] >= keys) & (keys >= starts[:, :, None])


# ---- long rows ------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _looped(q: Queries, k: Keys, v: Keys, starts: Starts) -> Queries:
    return _looped_forward(q, k, v, starts)[0]


def _looped_forward(q: Any, k: Any, v: Any, starts: Any) -> tuple[Any, Any]:
    size = _loop_block(q.shape[1])
    queries, keys, values = _query_blocks(q, k.shape[2], size), _key_blocks(k, size), _key_blocks(v, size)
    lines = _start_blocks(starts, size)

    def one(block: Any) -> Any:
        line = queries[block]

        def add(other: Any, carry: Any) -> Any:
            peak, total, out = carry
            scores = jnp.where(_block_seen(block, other, lines, line), _scores(line, keys[other]), MASKED)
            higher = jnp.maximum(peak, scores.max(axis=-1))
            weights, scale = jnp.exp(scores - higher[..., None]), jnp.exp(peak - higher)
            more = jnp.einsum(
                "rkqs,rksd->rkqd", weights.astype(v.dtype), values[other], preferred_element_type=jnp.float32
            )
            return higher, total * scale + weights.sum(axis=-1), out * scale[..., None] + more

        nothing = jnp.zeros(line.shape, jnp.float32)
        begin = (jnp.full(line.shape[:-1], MASKED), nothing[..., 0], nothing)
        # From the diagonal down, so that the running maximum is a real score from the first block on.
        first = _first_block(lines, block)
        steps = lambda i, carry: add(block - i, carry)
        peak, total, out = lax.fori_loop(0, block + 1 - first, steps, begin)
        return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    out, log_total = checkpoint_name(lax.map(one, jnp.arange(queries.shape[0])), KEPT)
    return _unblock_queries(out, q.shape, size), (q, k, v, starts, out, log_total)


def _looped_backward(saved: Any, dy: Any) -> Any:
    q, k, v, starts, out, log_total = saved
    kv_heads, size = k.shape[2], _loop_block(q.shape[1])
    queries, keys, values = _query_blocks(q, kv_heads, size), _key_blocks(k, size), _key_blocks(v, size)
    lines, dy = _start_blocks(starts, size), _query_blocks(dy.astype(q.dtype), kv_heads, size)
    shared = jnp.sum(dy.astype(jnp.float32) * out, axis=-1)
    scale = q.shape[-1] ** -0.5

    def one(sums: Any, block: Any) -> Any:
        line, dline = queries[block], dy[block]

        def add(other: Any, carry: Any) -> Any:
            dq, dk, dv = carry
            seen = _block_seen(block, other, lines, line)
            weights = jnp.where(seen, jnp.exp(_scores(line, keys[other]) - log_total[block][..., None]), 0.0)
            product = partial(jnp.einsum, preferred_element_type=jnp.float32)
            dweights = product("rkqd,rksd->rkqs", dline, values[other])
            dscores = (weights * (dweights - shared[block][..., None]) * scale).astype(q.dtype)
            dv = dv.at[other].add(product("rkqs,rkqd->rksd", weights.astype(q.dtype), dline))
            dk = dk.at[other].add(product("rkqs,rkqd->rksd", dscores, line))
            return dq + product("rkqs,rksd->rkqd", dscores, keys[other]), dk, dv

        begin = (jnp.zeros(line.shape, jnp.float32), *sums)
        dq, *sums = lax.fori_loop(_first_block(lines, block), block + 1, add, begin)
        return tuple(sums), dq

    nothing = jnp.zeros(keys.shape, jnp.float32)
    (dk, dv), dq = lax.scan(one, (nothing, nothing), jnp.arange(queries.shape[0]))
    dk, dv = (_unblock_keys(x, k.shape).astype(k.dtype) for x in (dk, dv))
    return _unblock_queries(dq, q.shape, size).astype(q.dtype), dk, dv, None


_looped.defvjp(_looped_forward, _looped_backward)


def _scores(queries: Any, keys: Any) -> Any:
    scores = jnp.einsum("rkqd,rksd->rkqs", queries, keys, preferred_element_type=jnp.float32)
    return scores * queries.shape[-1] ** -0.5


def _block_seen(block: Any, other: Any, starts: Any, queries: Any) -> Any:
    size = starts.shape[-1]
    inside = jnp.arange(size)
    seen = _seen(block * size + inside, other * size + inside, starts[block])
    return jnp.tile(seen, (1, queries.shape[2] // size, 1))[:, None]


def _first_block(starts: Any, block: Any) -> Any:
    """The first block of keys that a query of this block sees, in any row; padding starts behind itself."""
    return jnp.minimum(jnp.min(starts[block]) // starts.shape[-1], block)


def _loop_block(seq: int) -> int:
    return LOOP_BLOCK if seq < LONG else LONG_LOOP_BLOCK


def _start_blocks(starts: Any, size: int) -> Any:
    """[row, seq] to [block, row, size]; a position sees itself at least, or its softmax would be empty."""
    rows, seq = starts.shape
    return jnp.minimum(starts, jnp.arange(seq)).reshape(rows, -1, size).transpose(1, 0, 2)


def _query_blocks(x: Any, kv_heads: int, size: int) -> Any:
    """[row, seq, heads, head_dim] to [block, row, kv_heads, group * size, head_dim]."""
    rows, seq, heads, head_dim = x.shape
    x = x.reshape(rows, -1, size, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(seq // size, rows, kv_heads, -1, head_dim)


def _unblock_queries(x: Any, shape: tuple[int, ...], size: int) -> Any:
    blocks, rows, kv_heads, _, head_dim = x.shape
    x = x.reshape(blocks, rows, kv_heads, -1, size, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(shape)


def _key_blocks(x: Any, size: int) -> Any:
    """[row, seq, kv_heads, head_dim] to [block, row, kv_heads, size, head_dim]."""
    rows, _, kv_heads, head_dim = x.shape
    return x.reshape(rows, -1, size, kv_heads, head_dim).transpose(1, 0, 3, 2, 4)


def _unblock_keys(x: Any, shape: tuple[int, ...]) -> Any:
    return x.transpose(1, 0, 3, 2, 4).reshape(shape)
