"""A decoder written from the definition, to compare the sampler with: one row, no cache, no slots, no slices.

Every step is one full forward of the model (checked against Hugging Face elsewhere) over the prompt and the tokens so
far, with the row's own snapshot; the head, the sampling rules and the end of the row are numpy in float64, written from
the documentation of ``tx.worker.sampling`` and ``tx.worker.stopping`` and sharing nothing with the sampler's modules.

Two float32 programs round differently, and where a random number lies that close to the boundary between two tokens,
both tokens are right. ``row`` therefore takes the tokens under test as a *draft*: at such a tie it goes on with the
draft's token and counts the tie; anywhere else it goes on with its own, so that a wrong draft shows as a difference.
The draft saves time too: one forward serves all of its positions that are right, since attention is causal.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tx.layers.lora import single_view
from tx.models.loading import LoadedModel
from tx.types import SampleRequest, SamplingParams
from tx.worker.snapshots import Snapshot

BLOCK = 256
"""The draw's first random number chooses among blocks of this many consecutive ids."""

ALTERNATIVES = 2**20
"""Index of the first sample whose random numbers draw alternatives to prompt tokens."""

TOLERANCE = 1e-5
"""Of logits and of cumulative probabilities: what rounding may move. Observed differences are around 1e-6."""


@dataclass(frozen=True)
class Row:
    """What one row samples.

    scores: per token, float64 [vocab] logprobs of the tempered distribution that it was drawn from, before top-k and
        top-p. ties: steps at which the draft's token was as right as its own.
    """

    tokens: list[int]
    scores: list[np.ndarray]
    stop_reason: str
    ties: int

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens."""
        return [float(scores[token]) for token, scores in zip(self.tokens, self.scores, strict=True)]


class ReferenceDecoder:
    """Rows and prompt scores of one base model and its snapshots."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_context: int,
        eos_token_ids: Collection[int],
        detokenize: Callable[[Sequence[int]], str],
    ) -> None:
        self._model = model
        self._max_context = max_context
        self._eos = frozenset(eos_token_ids)
        self._detokenize = detokenize

    def row(self, request: SampleRequest, snapshot: Snapshot | None, sample: int = 0, draft: Sequence[int] = ()) -> Row:
        """Sample number ``sample`` of the request."""
        params, prompt = request.params, [int(token) for token in request.prompt]
        room = self._max_context - len(prompt)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        stop_ids = {*params.stop_token_ids, *(self._eos if params.stop_on_eos else ())}
        random = uniforms(params.seed, sample, self._max_context)
        tokens: list[int] = []
        scores: list[np.ndarray] = []
        ties = 0
        known = [*prompt, *(int(token) for token in draft)][: self._max_context - 1]
        logits = self.logits(known, snapshot)
        while True:
            text = [*prompt, *tokens]
            if known[: len(text)] != text:
                known = text
                logits = self.logits(known, snapshot)
            here, uniform = logits[len(text) - 1], random[len(text)]
            token = choose(here, uniform, params)
            if len(tokens) < len(draft) and int(draft[len(tokens)]) != token:
                drafted = int(draft[len(tokens)])
                if drafted in as_right(here, uniform, params):
                    token, ties = drafted, ties + 1
            tokens.append(token)
            scores.append(log_softmax(here, params.temperature))
            if token in stop_ids or self._has_stop_string(tokens, params.stop_strings):
                return Row(tokens, scores, "stop", ties)
            if len(tokens) == limit:
                return Row(tokens, scores, "length", ties)

    def prompt_logprobs(self, prompt: Sequence[int], snapshot: Snapshot | None) -> np.ndarray:
        """[P, vocab]: row i is the distribution of token i given those before it, at temperature 1; row 0 is NaN."""
        logits = self.logits([int(token) for token in prompt], snapshot)
        return np.concatenate([np.full_like(logits[:1], np.nan), log_softmax(logits[:-1], 1.0)])

    def alternatives(
        self, request: SampleRequest, snapshot: Snapshot | None, drafts: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """[P-1, k] ids drawn in place of each prompt token after the first, and the ties among them.

        Alternative j of a position is what sample 2**20 + j of the request would have drawn there, unfiltered.
        """
        prompt = [int(token) for token in request.prompt]
        logits, params = self.logits(prompt, snapshot), replace(request.params, top_k=-1, top_p=1.0)
        drawn, ties = np.array(drafts), 0
        for j in range(drawn.shape[1]):
            random = uniforms(params.seed, ALTERNATIVES + j, self._max_context)
            for at in range(len(prompt) - 1):
                token = choose(logits[at], random[at + 1], params)
                if token == drawn[at, j]:
                    continue
                if int(drawn[at, j]) in as_right(logits[at], random[at + 1], params):
                    ties += 1
                else:
                    drawn[at, j] = token
        return drawn, ties

    def logits(self, tokens: Sequence[int], snapshot: Snapshot | None) -> np.ndarray:
        """[token, vocab] in float64: what follows each of the tokens."""
        padded = np.zeros((1, 64 if len(tokens) <= 64 else self._max_context), np.int32)
        padded[0, : len(tokens)] = tokens
        view = None
        if snapshot is not None:
            scalings = snapshot.scaling, snapshot.expert_scaling
            view = single_view(snapshot.adapter, *scalings, max(1, snapshot.rank), max(1, snapshot.expert_rank))
        hidden, kernel = _forward(self._model.graphdef, self._model.weights, jnp.asarray(padded), view)
        hidden = np.asarray(hidden, np.float64)[0, : len(tokens)]
        logits = hidden @ np.asarray(kernel, np.float64)
        if snapshot is not None and snapshot.adapter.unembed is not None:
            pair = snapshot.adapter.unembed
            logits += snapshot.scaling * (hidden @ np.asarray(pair.a, np.float64)) @ np.asarray(pair.b, np.float64)
        return logits

    def _has_stop_string(self, tokens: Sequence[int], strings: Sequence[str]) -> bool:
        if not strings:
            return False
        text = self._detokenize(tokens)
        return any(string in text for string in strings)


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef: Any, weights: Any, tokens: jax.Array, view: Any) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, weights)
    hidden = model.hidden_states(tokens, jnp.arange(tokens.shape[1])[None], adapter=view)[0]
    return hidden, model.unembed_kernel()


# ---- randomness -----------------------------------------------------------------------------------------------------


def uniforms(seed: int, sample: int, length: int) -> np.ndarray:
    """[position, 2]: the two random numbers with which the token at each position is drawn."""
    words = divmod(seed % 2**64, 2**32)
    return np.asarray(_two_per_position(np.array(words, np.uint32), np.int32(sample), length=length), np.float64)


@functools.partial(jax.jit, static_argnames="length")
def _two_per_position(words: jax.Array, sample: jax.Array, *, length: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), sample)
    return jax.vmap(lambda position: jax.random.uniform(jax.random.fold_in(key, position), (2,)))(jnp.arange(length))


# ---- rules: numpy ---------------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Of the tempered distribution, before top-k and top-p; a greedy row reports those of temperature 1."""
    scaled = _scaled(logits, temperature or 1.0)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def choose(logits: np.ndarray, uniform: np.ndarray, params: SamplingParams) -> int:
    """The token that one row draws from [vocab] logits."""
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = _scaled(logits, params.temperature)
    return _draw(np.where(_kept(scaled, params), np.exp(scaled), 0.0), uniform)


def as_right(logits: np.ndarray, uniform: np.ndarray, params: SamplingParams) -> set[int]:
    """Every token that ``choose`` could give if logits and cumulative probabilities moved by ``TOLERANCE``."""
    if params.temperature == 0:
        return set(np.flatnonzero(logits >= logits.max() - TOLERANCE).tolist())
    scaled = _scaled(logits, params.temperature)
    # A logit's rounding grows with 1 / temperature, and the cumulative probabilities' with it.
    slack = TOLERANCE * max(1.0, 1.0 / params.temperature)
    moves = [np.array(move) for move in itertools.product((-slack, 0.0, slack), repeat=2)]
    found = set()
    for kept in _kept_within(scaled, params, slack):
        weights = np.where(kept, np.exp(scaled), 0.0)
        found |= {_draw(weights, np.clip(uniform + move, 0.0, 1.0)) for move in moves}
    return found


def _scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return (logits - logits.max(axis=-1, keepdims=True)) / max(temperature, 1e-30)


def _kept(scaled: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Top-k (with everything that ties with the k-th), then the smallest most likely set that reaches top-p of it."""
    return scaled >= _floor(scaled, params, params.top_p)


def _floor(scaled: np.ndarray, params: SamplingParams, top_p: float) -> float:
    """The value of the least likely token that is kept."""
    floor = -np.inf
    if 0 < params.top_k < len(scaled):
        floor = float(np.sort(scaled)[-params.top_k])
    if params.top_p < 1:
        most_likely = np.sort(scaled[scaled >= floor])[::-1]
        mass = np.exp(most_likely).cumsum()
        count = int((mass < top_p * mass[-1]).sum())
        floor = float(most_likely[min(count, len(most_likely) - 1)])
    return floor


def _kept_within(scaled: np.ndarray, params: SamplingParams, slack: float) -> list[np.ndarray]:
    """The sets that rounding could keep: larger, smaller, and with tokens near the threshold exchanged."""
    kept = _kept(scaled, params)
    if params.top_k == -1 and params.top_p == 1:
        return [kept]
    narrow = scaled > _floor(scaled, params, params.top_p - slack) + slack
    wide = scaled >= _floor(scaled, params, min(1.0, params.top_p + slack)) - slack
    exchanged = narrow | (wide & ~kept)
    return [some for some in (kept, wide, narrow, exchanged) if some.any()]


def _draw(weights: np.ndarray, uniform: np.ndarray) -> int:
    """The first number chooses a block of ids, the second one of its ids: inverse CDF both times."""
    blocks = [weights[start : start + BLOCK] for start in range(0, len(weights), BLOCK)]
    block = _invert(np.array([block.sum() for block in blocks]), uniform[0])
    return block * BLOCK + _invert(blocks[block], uniform[1])


def _invert(weights: np.ndarray, uniform: float) -> int:
    """The first choice whose cumulative weight passes the share; rounding at the very top takes the last possible."""
    cumulative = weights.cumsum()
    passed = (cumulative > uniform * cumulative[-1]) & (weights > 0)
    return int(passed.argmax()) if passed.any() else int(np.flatnonzero(weights)[-1])
