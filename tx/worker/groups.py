"""One sampling request from its check to its result: the group of its ``num_samples`` rows. Host values only.

Not here: where the rows sit (``decode_slots``) and what runs on the device (``generator``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tx.errors import InvalidInput
from tx.types import SampledSequence, SampleRequest, SampleResult, SamplingParams, TopkLogprobs
from tx.worker.snapshots import Snapshot
from tx.worker.stopping import Detokenize, RowStop

MAX_NUM_SAMPLES = 4096
"""A request's rows are host objects even while they wait; this bounds what one request can allocate."""

ABSENT_LOGPROB = -99999.0
"""The protocol's mark of a top-k cell without a value: nothing precedes the first prompt token."""


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
    if not 0 <= request.topk_prompt_logprobs <= vocab_size:
        raise InvalidInput("topk_prompt_logprobs", request.topk_prompt_logprobs, f"0 to {vocab_size}")
    _check_params(params)


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
        limit: tokens that a row may have: max_tokens, cut to what the context leaves.
        stops: each row's end, with its tokens so far.
        logprobs: each row's logprobs so far.
        prompt_logprobs: float32 [P], NaN until scored; None unless asked for. topk likewise.
        scored: prompt positions whose successors have been scored, from the left.
        computed: whether the prompt was prefilled on this request's behalf, and not found among the recent ones.
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
        params, size = request.params, len(request.prompt)
        self.job_id = job_id
        self.request = request
        self.snapshot = snapshot
        self.prompt = np.asarray(request.prompt, np.int32)
        self.limit = min(params.max_tokens or max_context, max_context - size)
        self.stop_ids = (*params.stop_token_ids, *(eos_token_ids if params.stop_on_eos else ()))
        self.filtered = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1)
        seed = params.seed % 2**64
        self.seed = (seed >> 32, seed % 2**32)
        self.computed = False
        self._detokenize = detokenize
        self.stops = [self._row() for _ in range(request.num_samples)]
        self.logprobs: list[list[float]] = [[] for _ in range(request.num_samples)]
        self.wants_scores = request.prompt_logprobs or request.topk_prompt_logprobs > 0
        self.scored = 0
        self.prompt_logprobs = np.full(size, np.nan, np.float32)
        num_topk = request.topk_prompt_logprobs
        self.topk_ids = np.zeros((size, num_topk), np.int32)
        self.topk_logprobs = np.full((size, num_topk), ABSENT_LOGPROB, np.float32)

    def _row(self) -> RowStop:
        return RowStop(self.stop_ids, self.request.params.stop_strings, self.limit, self._detokenize)

    def position(self, sample: int) -> int:
        """Where the row's last token stands: the decode loop reads it there."""
        return len(self.prompt) - 1 + len(self.stops[sample].tokens)

    def last_token(self, sample: int) -> int:
        """The row's last token so far, of the prompt at first."""
        tokens = self.stops[sample].tokens
        return tokens[-1] if tokens else int(self.prompt[-1])

    def push(self, sample: int, tokens: Sequence[int], logprobs: Sequence[float]) -> bool:
        """Take what a slice drew for a row; whether the row has ended."""
        kept = self.stops[sample].push(tokens)
        self.logprobs[sample] += logprobs[:kept]
        return self.stops[sample].reason is not None

    def restart(self, sample: int) -> None:
        """Forget a row's tokens: it will be sampled again, and its seed gives the same ones."""
        self.stops[sample] = self._row()
        self.logprobs[sample] = []

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(stop.reason is not None for stop in self.stops)

    def result(self) -> SampleResult:
        """The finished request's answer."""
        sequences = [
            SampledSequence(
                np.asarray(stop.tokens, np.int32), np.asarray(logprobs, np.float32), stop.reason or "length"
            )
            for stop, logprobs in zip(self.stops, self.logprobs, strict=True)
        ]
        topk = TopkLogprobs(self.topk_ids, self.topk_logprobs) if self.request.topk_prompt_logprobs else None
        return SampleResult(
            sequences,
            self.prompt_logprobs if self.request.prompt_logprobs else None,
            topk,
            prompt_cache_hit_tokens=0 if self.computed else len(self.prompt) - 1,
        )
