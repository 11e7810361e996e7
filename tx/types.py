"""The nouns that cross layers: plain dataclasses over numpy, no JAX, no SQL, no HTTP.

Dimensions in comments: N = positions of one datum, K = targets per position, P = prompt length, S = sampled length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LORA_ALPHA = 32.0
"""LoRA scaling is ``alpha / rank`` with this fixed alpha ("LoRA Without Regret")."""


@dataclass(frozen=True)
class LoraConfig:
    """An adapter's shape: what a tenant asked for when it created a model (protocol §2.2), or an imported one's.

    Attributes:
        alpha, expert_rank, sites: no request names them, they come with imported weights. ``expert_rank`` is at most
            ``rank``; None is ``tx.layers.lora.expert_rank``. ``sites`` are the names of the only sites that have an
            adapter, each in one of the groups that are trained; None is every site of those groups.
    """

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float = LORA_ALPHA
    expert_rank: int | None = None
    sites: tuple[str, ...] | None = None

    @property
    def requested(self) -> dict[str, int | bool]:
        """What a request can say of an adapter's shape, by name: weights load only into a model that says the same."""
        names = ("rank", "train_attn", "train_mlp", "train_unembed")
        return {name: getattr(self, name) for name in names}

    @property
    def scaling(self) -> float:
        """Factor on ``x @ A @ B`` of dense sites; expert sites use their own rank (see ``tx.layers.lora``)."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class AdamParams:
    """One AdamW step, with torch's meaning of every field (protocol §2.3); ``grad_clip_norm`` 0 is off."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples.

    ``max_tokens`` None is "to the end of the context"; ``top_k`` -1 and ``top_p`` 1 are off.

    ``stop_on_eos`` is False only for an explicit empty ``stop`` list (protocol §3.7).
    """

    max_tokens: int | None = None
    seed: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    stop_on_eos: bool = True

    @property
    def seed_words(self) -> tuple[int, int]:
        """The seed, of either sign, as two 32-bit words, high first."""
        seed = self.seed % 2**64
        return seed >> 32, seed % 2**32


@dataclass(frozen=True)
class Span:
    """Provenance of ``length`` consecutive positions: part of a sampled sequence's prompt or of its sampled tokens."""

    sequence_id: str
    offset: int
    length: int
    sampled: bool


@dataclass(frozen=True)
class Datum:
    """One training example.

    tokens: int32 [N]. inputs: the loss's tensors by protocol name, dense; ``target_tokens`` int64 [N] or [N, K],
    the others float32 of the shape that ``tx.loss_specs`` says.
    """

    tokens: np.ndarray
    inputs: dict[str, np.ndarray]
    token_spans: tuple[Span, ...] = ()
    input_spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ForwardBackward:
    """A decoded ``forward_backward`` or ``forward`` request."""

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_fn: str
    loss_config: dict[str, float | str]
    forward_only: bool


@dataclass(frozen=True)
class ForwardBackwardResult:
    """``logprobs[i]``: float32, the shape of datum i's ``target_tokens``. Metric names are ``name:reduction``."""

    logprobs: list[np.ndarray]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Cells:
    """A matrix with one row per prompt token after the first, and the layout that it travels in.

    values: [P-1, K]. csr: (crow, col), both int64, of a sparse matrix; the answer to one has the same two. None: dense.
    """

    values: np.ndarray
    csr: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class SampleRequest:
    """A decoded ``asample`` request.

    Attributes:
        prompt: int32 [P].
        prompt_logprobs_last_n: how many of the prompt's last tokens ``prompt_logprobs`` and ``topk_prompt_logprobs``
            cover; 0 is all.
        target_prompt_logprobs: int64 ids to score, row i in place of prompt token i + 1; -1 asks for nothing.
        prompt_alt_tokens_k: tokens to draw, with replacement, in place of every prompt token after the first.
    """

    prompt: np.ndarray
    num_samples: int
    params: SamplingParams
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    record_stability_info: bool = False
    prompt_logprobs_last_n: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Cells | None = None
    prompt_alt_tokens_k: int = 0


@dataclass(frozen=True)
class TopkLogprobs:
    """The k most likely tokens per position (N = P or S), best first. token_ids int32 [N, k], logprobs float32 [N, k].

    A position without any, such as the first of a prompt, has ``ABSENT_LOGPROB`` throughout.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray


ABSENT_LOGPROB = -99999.0
"""The protocol's mark of a top-k cell without a value."""


@dataclass(frozen=True)
class SampledSequence:
    """tokens: int32 [S], logprobs: float32 [S] (of the tempered distribution); stop_reason: "stop" or "length".

    ``topk``: of the same distribution as ``logprobs``, so before top-k and top-p.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stop_reason: str
    topk: TopkLogprobs | None = None


@dataclass(frozen=True)
class PromptAltTokens:
    """Row i: draws in place of prompt token i + 1 at the request's temperature, and their logprobs at temperature 1.

    token_ids int64 [P-1, k], logprobs float32 [P-1, k].
    """

    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class SampleResult:
    """``prompt_logprobs``: float32 [P], NaN where not scored: at 0, which nothing precedes, and before the last n.

    ``target_prompt_logprobs``: float32, 0.0 where nothing was asked for. What concerns prompts is at temperature 1.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None
    prompt_cache_hit_tokens: int = 0
    target_prompt_logprobs: Cells | None = None
    prompt_alt_tokens: PromptAltTokens | None = None


@dataclass
class ModelState:
    """Everything of one model that must survive: numpy float32 by site name, plus counters.

    Keys of ``weights``/``mu``/``nu`` are ``"<site>.lora_A"`` [in, rank] (or [expert, in, rank]) and
    ``"<site>.lora_B"`` [rank, out] (or [expert, rank, out]), at the true rank, e.g. ``"layers.3.q_proj.lora_A"``.
    """

    lora: LoraConfig
    weights: dict[str, np.ndarray]
    mu: dict[str, np.ndarray] = field(default_factory=dict)
    nu: dict[str, np.ndarray] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class ModelCard:
    """What the service must know of a loaded base model."""

    base_model: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    num_params: int
    weight_bytes: int


@dataclass(frozen=True)
class Finished:
    """One job's outcome from the worker: a result, or the exception that failed it (and it alone)."""

    job_id: int
    result: ForwardBackwardResult | SampleResult | None = None
    error: Exception | None = None
