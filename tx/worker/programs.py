"""The sampler's compiled programs: prefill, insert, regroup, decode slice.

Each takes the base model as (static graphdef, weights) and closes over no array. What varies from request to request
is data; a program exists once per shape, and shapes come from the buckets of ``decode_slots``. Not here: which rows
run and when (``generator``), and what the host does with the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tx.layers.kv_cache import CACHE_AXES, KVCache
from tx.layers.logprobs import next_logits, target_logprobs, topk_logprobs
from tx.layers.lora import AdapterView, LoraWeights
from tx.layers.sharding import constrain
from tx.worker import sampling

NUM_STOP_IDS = 8
"""Stop tokens per row that the decode loop itself sees; with more, the host's word ends the row a slice later."""

HEAD_CHUNK = 256
"""Positions per piece of the scoring head: 256 x 49k logits are 50 MB."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """What a slice must know of each slot; a slot where nobody sits has ``remaining`` 0 and anything elsewhere.

    token: int [row], the last token so far, and position, where it stands: the slice reads it and draws position + 1.
    remaining: int [row], tokens that may still be drawn. temperature, top_p: float [row]; top_k: int [row].
    seed: uint32 [row, 2], high word first; sample: int [row], index in the request.
    stop_ids: int [row, NUM_STOP_IDS], filled up with -1.
    """

    token: Any
    position: Any
    remaining: Any
    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    sample: Any
    stop_ids: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptScores:
    """Logprobs of the tokens that follow each position, and the most likely ones there (None unless asked for)."""

    logprobs: Any  # Float[row seq]
    topk_ids: Any  # Int[row seq k]
    topk_logprobs: Any  # Float[row seq k]


@partial(jax.jit, static_argnames=("graphdef", "num_topk"), donate_argnames="cache")
def prefill(
    graphdef: Any,
    weights: Any,
    tokens: Int[Array, "row seq"],
    start: Int[Array, ""],
    cache: KVCache | None,
    view: AdapterView | None,
    targets: Int[Array, "row seq"] | None,
    *,
    num_topk: int,
) -> tuple[KVCache, PromptScores | None]:
    """Keys and values of a piece of each prompt, and its scores if there are ``targets``.

    Without a cache the piece is the whole prompt and the result is as long as it; with one, the piece stands at
    ``start`` in it. Padding on the right leaves rubbish past a prompt's end, which decoding overwrites before it looks.
    """
    model = nnx.merge(graphdef, weights)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, kept = model.hidden_states(tokens, positions, adapter=view, cache=cache, return_cache=True)
    if targets is None:
        return kept, None
    head = (model.unembed_kernel(), *_head_lora(view))
    logprobs = target_logprobs(hidden, head[0], targets[..., None], *head[1:], chunk=HEAD_CHUNK)[..., 0]
    if not num_topk:
        return kept, PromptScores(logprobs, None, None)
    return kept, PromptScores(logprobs, *topk_logprobs(hidden, *head, k=num_topk, chunk=HEAD_CHUNK))


@jax.jit
def row_of(cache: KVCache, row: Int[Array, ""]) -> KVCache:
    """One row of a prefilled batch as a cache of its own, so that the rest of the batch can be freed without it."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, 1, axis=0), cache)


@partial(jax.jit, donate_argnames="cache")
def insert(cache: KVCache, prompt: KVCache, slots: Int[Array, "slot"], count: Int[Array, ""]) -> KVCache:
    """Copy a prefilled prompt (one row) to the start of the first ``count`` of ``slots``, in place.

    How many is data: a program exists per size of cache and of prompt, whether for one row or for a large group.
    """

    def put(at: Int[Array, ""], cache: KVCache) -> KVCache:
        return jax.tree.map(lambda x, new: lax.dynamic_update_slice(x, new, (slots[at], 0, 0, 0)), cache, prompt)

    return lax.fori_loop(0, count, put, cache)


@partial(jax.jit, static_argnames=("length", "mesh"))
def regroup(cache: KVCache, sources: Int[Array, "slot"], *, length: int, mesh: Mesh) -> KVCache:
    """A cache of another size: slot i takes over row ``sources[i]``, or zeros if there is no such row."""

    def move(x: jax.Array) -> jax.Array:
        x = jnp.take(x[:, :length], sources, axis=0, mode="fill", fill_value=0)
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
        return constrain(x, CACHE_AXES, mesh)

    return jax.tree.map(move, cache)


@partial(jax.jit, static_argnames=("graphdef", "steps", "filtered"), donate_argnames="cache")
def decode_slice(
    graphdef: Any,
    weights: Any,
    cache: KVCache,
    rows: DecodeRows,
    view: AdapterView | None,
    *,
    steps: int,
    filtered: bool,
) -> tuple[KVCache, Int[Array, "row steps"], Float[Array, "row steps"], Int[Array, "row"]]:
    """Up to ``steps`` tokens for every row, fewer when all rows end before.

    Returns:
        the cache, tokens, their logprobs, and how many of them each row drew: a row stops at its stop token or length.
    """
    model = nnx.merge(graphdef, weights)
    kernel, (lora, gate) = model.unembed_kernel(), _head_lora(view)
    keys = sampling.row_keys(rows.seed, rows.sample)
    num_rows = rows.token.shape[0]

    def unfinished(carry: Any) -> Any:
        step, _, _, _, remaining, _, _ = carry
        return (step < steps) & (remaining > 0).any()

    def one(carry: Any) -> Any:
        step, cache, token, position, remaining, tokens, logprobs = carry
        active = remaining > 0
        # A row that has ended writes past the end of the cache, where writes are dropped.
        at = jnp.where(active, position, cache.length)
        hidden, cache = model.hidden_states(token[:, None], at[:, None], adapter=view, cache=cache)
        drawn, logprob = sampling.sample(
            next_logits(hidden[:, 0], kernel, lora, gate),
            keys,
            position + 1,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            filtered=filtered,
        )
        tokens, logprobs = tokens.at[:, step].set(drawn), logprobs.at[:, step].set(logprob)
        stopped = (rows.stop_ids == drawn[:, None]).any(axis=-1)
        left = jnp.where(stopped, 0, remaining - 1)
        moved = position + active
        # ``remaining`` of an ended row stays 0, and its position stays where its next token would be drawn.
        return step + 1, cache, jnp.where(active, drawn, token), moved, jnp.where(active, left, 0), tokens, logprobs

    start = (
        jnp.int32(0),
        cache,
        rows.token,
        rows.position,
        rows.remaining,
        jnp.zeros((num_rows, steps), jnp.int32),
        jnp.zeros((num_rows, steps), jnp.float32),
    )
    _, cache, _, position, _, tokens, logprobs = lax.while_loop(unfinished, one, start)
    return cache, tokens, logprobs, position - rows.position


def _head_lora(view: AdapterView | None) -> tuple[LoraWeights | None, Any]:
    return (None, None) if view is None else (view.adapter.unembed, view.gate)
