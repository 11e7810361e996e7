"""What requests want to know of their prompts: the next tokens' logprobs, chosen or best ones, and drawn alternatives.

``score`` runs on the device, on hidden states that a prefill has anyway. ``PromptScoring`` is one request's side of it
on the host: which positions, which tokens, and the answers as they come. Everything is scored at temperature 1; only
the alternatives are drawn at the request's.

Indices: the hidden state at position p says what stands at p + 1. So a prompt of P tokens is scored from the states
at 0 to P - 2, and row i of targets and alternatives, which belongs to prompt token i + 1, from the state at i.

Example: prompt [7, 8, 9], targets [[5, -1], [-1, 6]]. ``targets(0, 4)`` is [[8, 5], [9, 6], [0, 0], [0, 0]]: the next
prompt token, then the row's ids, moved left, then padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from tx.errors import InvalidInput
from tx.layers.logprobs import Gate, Kernel, next_logits
from tx.layers.lora import LoraWeights
from tx.types import ABSENT_LOGPROB, Cells, PromptAltTokens, SampleRequest, SampleResult, TopkLogprobs
from tx.worker import sampling

HEAD_CHUNK = 256
"""Positions per piece of the scoring head: 256 x 49k logits are 50 MB."""

MAX_CELLS = 2**24
"""Prompt length times ids per position: bounds a reply to about 200 MB."""

MAX_TOPK = 4096
"""Of ``topk_prompt_logprobs``: past it, finding the best costs more than the head itself."""

MAX_TARGETS = 1024
"""Ids of one row of ``target_prompt_logprobs``; the columns may be more, as rows are packed."""

MAX_ALT_TOKENS = 256
"""Draws per position: each holds a block of the vocabulary per position of a piece."""

_FIRST_ALT_SAMPLE = 2**20
"""Alternative j is what the request's sample of this index + j would have drawn there; no request has as many."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AltDraws:
    """How to draw alternatives; as many as ``samples`` has indices.

    seed: uint32 [row, 2], high word first. samples: int [draw]. temperature: float [row].
    start: int [row], the position of the row's first hidden state.
    """

    seed: Any
    samples: Any
    temperature: Any
    start: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptScores:
    """What ``score`` finds at each position. The best and the drawn are None unless asked for."""

    logprobs: Any  # Float[row seq k], of the targets
    topk_ids: Any = None  # Int[row seq topk]
    topk_logprobs: Any = None  # Float[row seq topk]
    alt_ids: Any = None  # Int[row seq draw]
    alt_logprobs: Any = None  # Float[row seq draw]


def score(
    hidden: Float[Array, "row seq embed"],
    kernel: Kernel,
    lora: LoraWeights | None,
    gate: Gate | None,
    targets: Int[Array, "row seq k"],
    draws: AltDraws | None = None,
    *,
    num_topk: int,
) -> PromptScores:
    """Logprobs of targets, the ``num_topk`` best tokens and drawn ones, in one pass over the head.

    The pass goes through ``seq`` in pieces, so ``[row, seq, vocab]`` never exists.
    """
    rows, seq = targets.shape[:2]
    num_topk = min(num_topk, kernel.shape[-1])

    def one(at: Any) -> PromptScores:
        """One position of every row."""
        offset, state, ids = at
        logits = next_logits(state, kernel, lora, gate)
        norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        scores = PromptScores(jnp.take_along_axis(logits, ids, axis=-1) - norm)
        if num_topk:
            best, ids = lax.top_k(logits, num_topk)
            scores = replace(scores, topk_ids=ids, topk_logprobs=best - norm)
        if draws is not None:
            ids = _draw(logits, draws, offset)
            scores = replace(scores, alt_ids=ids, alt_logprobs=jnp.take_along_axis(logits, ids, axis=-1) - norm)
        return scores

    piece = max(1, min(seq, HEAD_CHUNK // rows))
    at = (jnp.arange(seq), jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), lax.map(one, at, batch_size=piece))


def _draw(logits: Float[Array, "row vocab"], draws: AltDraws, offset: Int[Array, ""]) -> Int[Array, "row draw"]:
    """Tokens for the positions after those ``offset`` past the rows' starts."""
    rows = logits.shape[0]

    def one(index: Int[Array, ""]) -> Int[Array, "row"]:
        tokens, _, _ = sampling.sample(
            logits,
            sampling.row_keys(draws.seed, jnp.full((rows,), index)),
            draws.start + offset + 1,
            draws.temperature,
            jnp.full((rows,), -1),
            jnp.ones((rows,)),
        )
        return tokens

    return jax.vmap(one, out_axes=1)(draws.samples)


def wanted(request: SampleRequest) -> PromptScoring | None:
    """The scoring that a request asks for, or None if it asks for none."""
    asked = request.prompt_logprobs or request.topk_prompt_logprobs or request.prompt_alt_tokens_k
    return PromptScoring(request) if asked or request.target_prompt_logprobs is not None else None


class PromptScoring:
    """One request's prompt scores: what to ask of the device, and what has come.

    Attributes:
        first: the first position whose hidden state is needed.
        num_topk: for ``score``; covers ``topk_prompt_logprobs`` in a bucket, so that few programs exist.
        num_targets: columns of ``targets``, in a bucket likewise.
        num_draws: alternatives per position, in a bucket likewise; 0 is none.
    """

    def __init__(self, request: SampleRequest) -> None:
        self._request = request
        self._prompt = np.asarray(request.prompt, np.int32)
        self._num_states = num_states = len(self._prompt) - 1
        self._packed = _pack(request.target_prompt_logprobs, num_states)
        # Where prompt_logprobs and topk_prompt_logprobs begin.
        last_n = request.prompt_logprobs_last_n
        self._scored_from = max(0, num_states - last_n) if last_n else 0
        self.first = min(num_states, self._needed_from())
        self._next = self.first
        self.num_topk = _bucket(request.topk_prompt_logprobs)
        self.num_targets = _bucket(1 + self._packed.shape[1]) if self._packed.shape[1] else 1
        self.num_draws = _bucket(request.prompt_alt_tokens_k)
        self._logprobs = np.full((num_states, 1 + self._packed.shape[1]), np.nan, np.float32)
        self._topk_ids = np.zeros((num_states, request.topk_prompt_logprobs), np.int32)
        self._topk_logprobs = np.zeros(self._topk_ids.shape, np.float32)
        self._alt_ids = np.zeros((num_states, request.prompt_alt_tokens_k), np.int64)
        self._alt_logprobs = np.zeros(self._alt_ids.shape, np.float32)

    def _needed_from(self) -> int:
        needed = [len(self._prompt)]
        if self._request.prompt_logprobs or self._request.topk_prompt_logprobs:
            needed.append(self._scored_from)
        if self._request.prompt_alt_tokens_k:
            needed.append(0)
        needed += np.flatnonzero((self._packed >= 0).any(axis=1))[:1].tolist()
        return min(needed)

    @property
    def done(self) -> bool:
        """Whether every position has been taken."""
        return self._next >= self._num_states

    def targets(self, start: int, size: int) -> np.ndarray:
        """int32 [1, size, num_targets]: tokens to score with the hidden states from ``start``; 0 where none is."""
        targets = np.zeros((1, size, self.num_targets), np.int32)
        count = max(0, min(size, self._num_states - start))
        here = slice(start, start + count)
        targets[0, :count, 0] = self._prompt[start + 1 : start + 1 + count]
        targets[0, :count, 1 : 1 + self._packed.shape[1]] = np.maximum(self._packed[here], 0)
        return targets

    def draws(self, start: int) -> AltDraws | None:
        """What ``score`` needs to draw the alternatives of hidden states from ``start``; None if none are wanted."""
        if not self.num_draws:
            return None
        params = self._request.params
        return AltDraws(
            seed=np.array([params.seed_words], np.uint32),
            samples=np.arange(_FIRST_ALT_SAMPLE, _FIRST_ALT_SAMPLE + self.num_draws, dtype=np.int32),
            temperature=np.array([min(params.temperature, float(np.finfo(np.float32).max))], np.float32),
            start=np.array([start], np.int32),
        )

    def take(self, start: int, scores: PromptScores) -> None:
        """Keep the scores (numpy, one row) of the hidden states from ``start``.

        Positions come from the left, without gaps; what is past the prompt or before ``first`` is dropped, and what
        comes again, after a restart, replaces what was there.
        """
        if start > self._next:
            raise ValueError(f"scores from position {start}, but those from {self._next} have not come")
        end = min(start + scores.logprobs.shape[1], self._num_states)
        begin = max(start, self.first)
        if begin >= end:
            return
        for kept, came in (
            (self._logprobs, scores.logprobs),
            (self._topk_ids, scores.topk_ids),
            (self._topk_logprobs, scores.topk_logprobs),
            (self._alt_ids, scores.alt_ids),
            (self._alt_logprobs, scores.alt_logprobs),
        ):
            width = kept.shape[1]  # without what fills the bucket
            if width:
                kept[begin:end] = came[0, begin - start : end - start, :width]
        self._next = max(self._next, end)

    def add_to(self, result: SampleResult) -> SampleResult:
        """The result with the prompt's scores."""
        return replace(
            result,
            prompt_logprobs=self.prompt_logprobs,
            topk_prompt_logprobs=self.topk_prompt_logprobs,
            target_prompt_logprobs=self.target_prompt_logprobs,
            prompt_alt_tokens=self.prompt_alt_tokens,
        )

    @property
    def prompt_logprobs(self) -> np.ndarray | None:
        """float32 [P], NaN where not scored; None unless asked for."""
        if not self._request.prompt_logprobs:
            return None
        return self._per_token(self._logprobs[:, 0], np.nan)

    @property
    def topk_prompt_logprobs(self) -> TopkLogprobs | None:
        """One row per prompt token, absent where not scored; None unless asked for."""
        if not self.num_topk:
            return None
        return TopkLogprobs(self._per_token(self._topk_ids, 0.0), self._per_token(self._topk_logprobs, ABSENT_LOGPROB))

    def _per_token(self, scored: np.ndarray, absent: float) -> np.ndarray:
        """What state p said in row p + 1, and ``absent`` in the rows of tokens that weren't to be scored."""
        rows = np.full((len(self._prompt), *scored.shape[1:]), absent, scored.dtype)
        rows[1 + self._scored_from :] = scored[self._scored_from :]
        return rows

    @property
    def target_prompt_logprobs(self) -> Cells | None:
        """Float32 in the shape and layout of the request, 0.0 where it asked for nothing; None unless asked for."""
        cells = self._request.target_prompt_logprobs
        if cells is None:
            return None
        logprobs = np.zeros(cells.values.shape, np.float32)
        # Both masks go through the rows, and each row's ids, in the same order.
        logprobs[cells.values >= 0] = self._logprobs[:, 1:][self._packed >= 0]
        return Cells(logprobs, cells.csr)

    @property
    def prompt_alt_tokens(self) -> PromptAltTokens | None:
        """The drawn alternatives; None unless asked for."""
        return PromptAltTokens(self._alt_ids, self._alt_logprobs) if self.num_draws else None


def check(request: SampleRequest, vocab_size: int) -> None:
    """Raise InvalidInput, naming the field by its protocol name, if the prompt can't be scored as asked."""
    size = len(request.prompt)
    _check_width("topk_prompt_logprobs", request.topk_prompt_logprobs, min(MAX_TOPK, vocab_size), size)
    _check_width("prompt_alt_tokens_k", request.prompt_alt_tokens_k, MAX_ALT_TOKENS, size)
    last_n = request.prompt_logprobs_last_n
    if last_n and not 1 <= last_n < size:
        raise InvalidInput("prompt_logprobs_last_n", last_n, f"1 to {size - 1}, one less than the prompt's tokens")
    if last_n and not request.prompt_logprobs:
        raise InvalidInput("prompt_logprobs_last_n", last_n, "absent, as prompt_logprobs is off")
    if request.target_prompt_logprobs is not None:
        _check_targets(request.target_prompt_logprobs.values, size, vocab_size)


def _check_width(field: str, width: int, most: int, size: int) -> None:
    most = min(most, MAX_CELLS // size)
    if not 0 <= width <= most:
        raise InvalidInput(field, width, f"0 to {most} for a prompt of {size} tokens")


def _check_targets(ids: np.ndarray, size: int, vocab_size: int) -> None:
    field = "target_prompt_logprobs"
    if ids.dtype != np.int64 or ids.ndim != 2 or len(ids) != size - 1:
        raise InvalidInput(
            field, f"{ids.dtype} of shape {list(ids.shape)}", f"int64 of shape [{size - 1}, K]: a row per token but one"
        )
    outside = np.argwhere((ids < -1) | (ids >= vocab_size))
    if len(outside):
        row, column = outside[0]
        raise InvalidInput(f"{field}[{row}][{column}]", int(ids[row, column]), f"-1 (unset) to {vocab_size - 1}")
    width = int((ids >= 0).sum(axis=1).max(initial=0))
    if not width:
        raise InvalidInput(field, "no token id", "at least one")
    most = min(MAX_TARGETS, MAX_CELLS // size)
    if width > most:
        raise InvalidInput(field, f"{width} ids in one row", f"at most {most} for a prompt of {size} tokens")


def _pack(cells: Cells | None, num_rows: int) -> np.ndarray:
    """The ids of each row moved to the left: int64 [P-1, the most ids of a row], -1 where there is none."""
    if cells is None:
        return np.zeros((num_rows, 0), np.int64)
    asked = cells.values >= 0
    counts = asked.sum(axis=1)
    packed = np.full((len(asked), int(counts.max(initial=0))), -1, np.int64)
    packed[np.arange(packed.shape[1]) < counts[:, None]] = cells.values[asked]
    return packed


def _bucket(count: int) -> int:
    """The smallest of 8, 64, 512, … that covers ``count``; 0 for none."""
    bucket = 8
    while bucket < count:
        bucket *= 8
    return bucket if count else 0
