"""The sampler's compiled programs: prefill, copying of blocks, decode slice.

They take the base model as (static graphdef, weights) and close over no array. What varies from request to request
is data; a program exists once per shape, and shapes come from the buckets of ``decode_slots``. Not here: which rows
run and when (``generator``), and what the host does with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from tx.layers import kv_cache
from tx.layers.kv_cache import Continuing, Decoding, KVBlocks, LayerBlocks
from tx.layers.logprobs import next_logits
from tx.layers.lora import AdapterView, LoraWeights
from tx.layers.stack import layer_lora
from tx.models.loading import LoadedModel
from tx.worker import sampling
from tx.worker.ahead import Call, directly
from tx.worker.scoring import AltDraws, PromptScores, score

NUM_STOP_IDS = 8
"""Stop tokens per row that the decode loop itself sees; with more, the host's word ends the row a slice later."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """What a slice must know of each row; a row that is only padding has ``remaining`` 0 and anything elsewhere.

    token: int [row], the last token so far, and position, where it stands: the slice reads it and draws position + 1.
    remaining: int [row], tokens that may still be drawn. temperature, top_p: float [row]; top_k: int [row].
    seed: uint32 [row, 2], high word first; sample: int [row], index in the request.
    stop_ids: int [row, NUM_STOP_IDS], filled up with -1.
    blocks: int [row, 2], the block that holds ``position`` and the one after it.
    owner, start: int [block], as in ``tx.layers.kv_cache.Decoding``.
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
    blocks: Any
    owner: Any
    start: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """A slice's tokens. tokens, logprobs: [row, step]; counts: [row], how many of them the row drew.

    topk_ids, topk_logprobs: [row, step, k], the most likely tokens of the same distribution, or None.
    """

    tokens: Any
    logprobs: Any
    counts: Any
    topk_ids: Any
    topk_logprobs: Any


class PrefillPrograms:
    """Prefill of one loaded model as a chain of programs: embedding, each layer, final norm.

    Layers of one kind share theirs, so that a new size compiles one layer: SmolLM2's thirty in one program take 3 s and
    80 MB of host memory each.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._graphdef, self._weights = model.graphdef, model.weights
        layers = (nnx.split(layer) for layer in nnx.merge(model.graphdef, model.weights).layers)
        self._layers = [(_prefill_layer(graphdef), weights) for graphdef, weights in layers]

    def run(
        self,
        tokens: Int[Array, "row seq"],
        earlier: KVBlocks | None,
        start: Int[Array, ""],
        view: AdapterView | None,
        *,
        keep_hidden: bool,
        call: Call = directly,
    ) -> tuple[KVBlocks, Any]:
        """Keys and values of a piece of each prompt, and its hidden states [row, seq, embed] for whoever scores them.

        The piece stands at ``start``, behind the positions in ``earlier`` (then there is one row). Padding on the right
        leaves rubbish past a prompt's end, which decoding overwrites before it looks.
        """
        x, rope, positions = call(_embed, self._graphdef, self._weights, tokens, start)
        place = None if earlier is None else Continuing(start)
        kept = []
        for index, (program, weights) in enumerate(self._layers):
            cache = None if earlier is None else earlier.layers[index]
            x, blocks = call(program, weights, x, rope, positions, layer_lora(view, index), cache, place)
            kept.append(blocks)
        return KVBlocks(tuple(kept)), call(_norm, self._graphdef, self._weights, x) if keep_hidden else None


@lru_cache(maxsize=64)
def _prefill_layer(graphdef: Any) -> Callable[..., Any]:
    """The program of one kind of layer. Not a static argument: hashing it takes as long as starting the program."""

    def prefill_layer(weights: Any, *inputs: Any) -> tuple[Any, LayerBlocks]:
        return nnx.merge(graphdef, weights)(*inputs)

    return jax.jit(prefill_layer)


@partial(jax.jit, static_argnums=0)
def _embed(graphdef: Any, weights: Any, tokens: Any, start: Any) -> tuple[Any, Any, Any]:
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    return *nnx.merge(graphdef, weights).embed(tokens, positions), positions


@partial(jax.jit, static_argnums=0)
def _norm(graphdef: Any, weights: Any, x: Any) -> Any:
    return nnx.merge(graphdef, weights).norm(x)


@partial(jax.jit, static_argnames=("graphdef", "num_topk"))
def score_piece(
    graphdef: Any,
    weights: Any,
    hidden: Float[Array, "1 seq embed"],
    start: Int[Array, ""],
    view: AdapterView | None,
    targets: Int[Array, "1 piece k"],
    draws: AltDraws | None,
    *,
    num_topk: int,
) -> PromptScores:
    """Scores of the hidden states from ``start``, as many as there are ``targets``.

    Apart from ``prefill``, or each of its lengths would exist for each kind of score.
    """
    model = nnx.merge(graphdef, weights)
    here = lax.dynamic_slice_in_dim(hidden, start, targets.shape[1], axis=1)
    return score(here, model.unembed_kernel(), *_head_lora(view), targets, draws, num_topk=num_topk)


def copy_blocks(
    pool: KVBlocks,
    source: KVBlocks,
    sources: Int[Array, "copy"],
    targets: Int[Array, "copy"],
    count: Int[Array, ""],
    *,
    call: Call = directly,
) -> KVBlocks:
    """``pool`` (donated) with block ``sources[i]`` of ``source`` at ``targets[i]``, for the first ``count`` copies."""
    return jax.tree.map(lambda to, of: call(_copy, to, of, sources, targets, count), pool, source)


@partial(jax.jit, donate_argnums=0)
def _copy(target: jax.Array, source: jax.Array, sources: Any, targets: Any, count: Any) -> jax.Array:
    """One array's part. How many is data, so one program serves a single row, a large group and a move of the pool.

    A program per array, and not one for all layers: that one would take seconds to compile, for every pair of sizes.
    """

    def one(i: Int[Array, ""], to: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(source, sources[i], 1, axis=0)
        return lax.dynamic_update_slice_in_dim(to, block, targets[i], axis=0)

    return lax.fori_loop(0, count, one, target)


def clear_blocks(pool: KVBlocks, blocks: Int[Array, "copy"]) -> KVBlocks:
    """``pool`` (donated) with zeros in these blocks; numbers past the end are dropped.

    What a row leaves behind is masked by the next one, but only finite values are: a weight of 0 times NaN is NaN.
    """
    return jax.tree.map(lambda x: _clear(x, blocks), pool)


@partial(jax.jit, donate_argnums=0)
def _clear(x: jax.Array, blocks: Int[Array, "copy"]) -> jax.Array:
    return x.at[blocks].set(0, mode="drop")


@partial(jax.jit, static_argnames=("graphdef", "most_steps", "num_topk"), donate_argnames="pool")
def decode_slice(
    graphdef: Any,
    weights: Any,
    pool: KVBlocks,
    rows: DecodeRows,
    view: AdapterView | None,
    steps: Int[Array, ""],
    *,
    most_steps: int,
    num_topk: int,
) -> tuple[KVBlocks, Drawn]:
    """Up to ``steps`` (at most ``most_steps``, a block's length) tokens per row, fewer when all rows end before.

    A row stops at its stop token or length; ``num_topk`` 0 leaves the most likely tokens out of the program.
    """
    model = nnx.merge(graphdef, weights)
    kernel, (lora, gate) = model.unembed_kernel(), _head_lora(view)
    keys = sampling.row_keys(rows.seed, rows.sample)
    num_rows, first_block = rows.token.shape[0], rows.position // kv_cache.BLOCK

    def unfinished(carry: Any) -> Any:
        step, _, _, _, remaining, _ = carry
        return (step < steps) & (remaining > 0).any()

    def one(carry: Any) -> Any:
        step, pool, token, position, remaining, drawn = carry
        active = remaining > 0
        block = jnp.take_along_axis(rows.blocks, (position // kv_cache.BLOCK - first_block)[:, None], axis=1)[:, 0]
        target = jnp.where(active, block, pool.num_blocks)  # a row that has ended writes nothing
        place = Decoding(rows.owner, rows.start, target)
        hidden, pool = model.hidden_states(token[:, None], position[:, None], adapter=view, cache=pool, place=place)
        logits = next_logits(hidden[:, 0], kernel, lora, gate)
        tokens, logprobs, normalized = sampling.sample(
            logits, keys, position + 1, rows.temperature, rows.top_k, rows.top_p
        )
        found = [tokens, logprobs]
        if num_topk:
            best, ids = lax.top_k(normalized, num_topk)
            found += [ids, best]
        drawn = [kept.at[:, step].set(new) for kept, new in zip(drawn, found, strict=True)]
        stopped = (rows.stop_ids == tokens[:, None]).any(axis=-1)
        left = jnp.where(stopped, 0, remaining - 1)
        # ``remaining`` of an ended row stays 0, and its position stays where its next token would be drawn.
        return step + 1, pool, jnp.where(active, tokens, token), position + active, jnp.where(active, left, 0), drawn

    shapes: list[tuple[tuple[int, ...], Any]] = [
        ((num_rows, most_steps), jnp.int32),
        ((num_rows, most_steps), jnp.float32),
    ]
    if num_topk:
        shapes += [((num_rows, most_steps, num_topk), dtype) for dtype in (jnp.int32, jnp.float32)]
    blank = [jnp.zeros(shape, dtype) for shape, dtype in shapes]
    start = (jnp.int32(0), pool, rows.token, rows.position, rows.remaining, blank)
    _, pool, _, position, _, drawn = lax.while_loop(unfinished, one, start)
    topk = drawn[2:] if num_topk else (None, None)
    return pool, Drawn(drawn[0], drawn[1], position - rows.position, *topk)


def _head_lora(view: AdapterView | None) -> tuple[LoraWeights | None, Any]:
    return (None, None) if view is None else (view.adapter.unembed, view.gate)
