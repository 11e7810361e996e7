"""One sampling request from its check to its result: the group of its ``num_samples`` rows. Host values only.

Not here: where the rows sit (``decode_slots``) and what runs on the device (``generator``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tx.errors import InvalidInput
from tx.types import SampledSequence, SampleRequest, SampleResult, SamplingParams, TopkLogprobs
from tx.worker import scoring
from tx.worker.snapshots import Snapshot
from tx.worker.stopping import Detokenize, RowStop

MAX_NUM_SAMPLES = 4096
"""A request's rows are host objects even while they wait; this bounds what one request can allocate."""

MAX_SAMPLE_TOPK = 1024
"""Of ``topk_sample_logprobs``: the decode loop keeps that many cells per row and step of a slice."""

MAX_SAMPLE_CELLS = 2**24
"""Top-k cells of all of a request's samples at their longest: bounds a reply to about 200 MB."""

Topk = tuple[np.ndarray, np.ndarray]
"""Of n tokens: int [n, k] ids and float [n, k] logprobs, best first."""


def check(request: SampleRequest, vocab_size: int, max_context: int) -> None:
    """Raise InvalidInput, naming the field by its protocol name, if the request can't be sampled."""
    prompt, params = request.prompt, request.params
    if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
        raise InvalidInput("prompt", f"{prompt.dtype} of shape {prompt.shape}", "token ids in one dimension")
    if not len(prompt):
        raise InvalidInput("prompt", "no tokens", "at least one token")
    if len(prompt) >= max_context:
        raise InvalidInput(
            "prompt", f"{len(prompt)} tokens", f"at most {max_context - 1}: the context is {max_context}"
        )
    outside = np.flatnonzero((prompt < 0) | (prompt >= vocab_size))
    if len(outside):
        at = int(outside[0])
        raise InvalidInput("prompt", f"token id {prompt[at]} at position {at}", f"0 to {vocab_size - 1}")
    if not 1 <= request.num_samples <= MAX_NUM_SAMPLES:
        raise InvalidInput("num_samples", request.num_samples, f"1 to {MAX_NUM_SAMPLES}")
    _check_params(params)
    scoring.check(request, vocab_size)
    num_tokens = request.num_samples * _limit(request, max_context)
    most = min(MAX_SAMPLE_TOPK, vocab_size, MAX_SAMPLE_CELLS // num_tokens)
    if not 0 <= request.topk_sample_logprobs <= most:
        raise InvalidInput(
            "topk_sample_logprobs", request.topk_sample_logprobs, f"0 to {most} for up to {num_tokens} sampled tokens"
        )


def _limit(request: SampleRequest, max_context: int) -> int:
    """Tokens that a row may have: max_tokens, cut to what the context leaves."""
    left = max_context - len(request.prompt)
    return min(request.params.max_tokens or left, left)


def _check_params(params: SamplingParams) -> None:
    prefix = "sampling_params."
    if params.max_tokens is not None and params.max_tokens < 1:
        raise InvalidInput(prefix + "max_tokens", params.max_tokens, "at least 1")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise InvalidInput(prefix + "temperature", params.temperature, "a finite number, at least 0")
    if not 0 < params.top_p <= 1:
        raise InvalidInput(prefix + "top_p", params.top_p, "more than 0, at most 1")
    if params.top_k != -1 and params.top_k < 1:
        raise InvalidInput(prefix + "top_k", params.top_k, "-1 (off) or at least 1")
    if not -(2**63) <= params.seed < 2**63:
        raise InvalidInput(prefix + "seed", params.seed, "a 64-bit signed integer")
    if any(token < 0 for token in params.stop_token_ids):
        raise InvalidInput(prefix + "stop", min(params.stop_token_ids), "token ids, at least 0")
    if "" in params.stop_strings:
        raise InvalidInput(prefix + "stop", "an empty string", "strings of at least one character")


class Group:
    """A request under way.

    Attributes:
        limit: tokens that a row may have.
        stops: each row's end, with its tokens so far.
        logprobs: each row's logprobs so far.
        topk: each row's top-k cells so far, a pair of arrays per ``push``; empty unless asked for.
        scoring: what the request wants to know of its prompt, None if nothing.
        cached_tokens: prompt tokens whose keys and values were found, and not computed for this request; None until
            that is known.
    """

    def __init__(
        self,
        job_id: int,
        request: SampleRequest,
        snapshot: Snapshot | None,
        *,
        max_context: int,
        eos_token_ids: Sequence[int],
        detokenize: Detokenize,
    ) -> None:
        params = request.params
        self.job_id = job_id
        self.request = request
        self.snapshot = snapshot
        self.prompt = np.asarray(request.prompt, np.int32)
        self.limit = _limit(request, max_context)
        self.stop_ids = (*params.stop_token_ids, *(eos_token_ids if params.stop_on_eos else ()))
        self.seed = params.seed_words
        self.cached_tokens: int | None = None
        self._detokenize = detokenize
        self.stops = [self._row() for _ in range(request.num_samples)]
        self.logprobs: list[list[float]] = [[] for _ in range(request.num_samples)]
        self.topk: list[list[Topk]] = [[] for _ in range(request.num_samples)]
        self.scoring = scoring.wanted(request)

    def _row(self) -> RowStop:
        return RowStop(self.stop_ids, self.request.params.stop_strings, self.limit, self._detokenize)

    def position(self, sample: int) -> int:
        """Where the row's last token stands: the decode loop reads it there."""
        return len(self.prompt) - 1 + len(self.stops[sample].tokens)

    def last_token(self, sample: int) -> int:
        """The row's last token so far, of the prompt at first."""
        tokens = self.stops[sample].tokens
        return tokens[-1] if tokens else int(self.prompt[-1])

    def push(self, sample: int, tokens: Sequence[int], logprobs: Sequence[float], topk: Topk | None = None) -> bool:
        """Take what a slice drew for a row; whether the row has ended.

        Args:
            topk: the best tokens beside each drawn one, at least as many as the request asks for; needed if it does.
        """
        kept, width = self.stops[sample].push(tokens), self.request.topk_sample_logprobs
        self.logprobs[sample] += logprobs[:kept]
        if width:
            if topk is None:
                raise ValueError("the request asks for the top-k of its tokens, and none have come")
            # A copy: a view would keep the whole slice's cells alive for as long as the request.
            self.topk[sample].append((topk[0][:kept, :width].copy(), topk[1][:kept, :width].copy()))
        return self.stops[sample].reason is not None

    def restart(self, sample: int) -> None:
        """Forget a row's tokens: it will be sampled again, and its seed gives the same ones."""
        self.stops[sample] = self._row()
        self.logprobs[sample] = []
        self.topk[sample] = []

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(stop.reason is not None for stop in self.stops)

    def result(self) -> SampleResult:
        """The finished request's answer."""
        sequences = [
            SampledSequence(
                np.asarray(stop.tokens, np.int32),
                np.asarray(logprobs, np.float32),
                stop.reason or "length",
                self._topk(topk),
            )
            for stop, logprobs, topk in zip(self.stops, self.logprobs, self.topk, strict=True)
        ]
        result = SampleResult(sequences, prompt_cache_hit_tokens=self.cached_tokens or 0)
        return result if self.scoring is None else self.scoring.add_to(result)

    def _topk(self, parts: Sequence[Topk]) -> TopkLogprobs | None:
        if not self.request.topk_sample_logprobs:
            return None
        return TopkLogprobs(
            np.concatenate([ids for ids, _ in parts]).astype(np.int32, copy=False),
            np.concatenate([logprobs for _, logprobs in parts]).astype(np.float32, copy=False),
        )
