"""What training achieves: tokens per second, padding, the share of the device's peak, memory; for results and the log.

The accounting, per token: forward 2 FLOPs for each weight that a token meets (N: all of them but an embedding table
that is only looked up; of a mixture's experts those that a token chooses). Backward 2N more: the weights are frozen, so
there is the product for the activations and none for the weights. LoRA factors, which are trained, take 2 + 4 each.
Attention's own products are left out, and so is what is computed twice to save memory: the figure says how much of the
device does useful work, not how busy it is.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from tx.models.loading import LoadedModel
from tx.models.lora_sites import lora_sites
from tx.worker.adapters import Ranks

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0

_PEAK_SIZE_CPU = 1024
_PEAK_SIZE_GPU = 8192


@dataclass
class PassCost:
    """What a pass has taken so far; ``seconds`` is the time of its own micro-batches, not of waiting for its turns."""

    num_tokens: int = 0
    num_computed: int = 0  # padding included
    num_micro_batches: int = 0
    seconds: float = 0.0
    flops: float = 0.0

    def add(self, num_tokens: int, num_computed: int, seconds: float, flops: float) -> None:
        """Count one micro-batch; ``flops`` is per token."""
        self.num_tokens += num_tokens
        self.num_computed += num_computed
        self.num_micro_batches += 1
        self.seconds += seconds
        self.flops += flops * num_tokens

    def plus(self, other: PassCost) -> PassCost:
        """Both together."""
        return PassCost(
            self.num_tokens + other.num_tokens,
            self.num_computed + other.num_computed,
            self.num_micro_batches + other.num_micro_batches,
            self.seconds + other.seconds,
            self.flops + other.flops,
        )


class Meter:
    """Turns costs into metrics, and says now and then in the log what training achieves."""

    def __init__(self, model: LoadedModel, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._clock = clock
        self._since = PassCost()
        self._next_log = clock() + LOG_EVERY_S

    def finish(self, cost: PassCost) -> dict[str, float]:
        """Metrics of a pass, named ``name:reduction`` as the SDK combines those of a batch's chunks."""
        self._since = self._since.plus(cost)
        if self._clock() >= self._next_log:
            self._next_log = self._clock() + LOG_EVERY_S
            self._say(self._since)
            self._since = PassCost()
        return self._metrics(cost)

    def _metrics(self, cost: PassCost) -> dict[str, float]:
        seconds = max(cost.seconds, 1e-9)
        devices = self._model.mesh.size
        return {
            "tokens_per_s:mean": cost.num_tokens / seconds,
            "padding_fraction:mean": 1.0 - cost.num_tokens / max(1, cost.num_computed),
            "micro_batches:max": float(cost.num_micro_batches),
            "mfu:mean": cost.flops / seconds / (matmul_peak(self._model.dtype) * devices),
            "memory_peak_bytes:max": float(memory_peak(self._model.mesh.devices.flat[0])),
        }

    def _say(self, cost: PassCost) -> None:
        metrics = self._metrics(cost)
        log.info(
            "trained %d tokens in %d micro-batches: %.0f tokens/s, %.1f %% padding, %.0f %% of the matmul peak, "
            "memory peak %.1f GB",
            cost.num_tokens, cost.num_micro_batches, metrics["tokens_per_s:mean"],
            100 * metrics["padding_fraction:mean"], 100 * metrics["mfu:mean"],
            metrics["memory_peak_bytes:max"] / 1e9,
        )  # fmt: skip


def flops_per_token(model: LoadedModel, ranks: Ranks, *, forward_only: bool) -> float:
    """By the module's accounting, with an adapter on every site."""
    return (2.0 if forward_only else 4.0) * _weights_met(model) + (2.0 if forward_only else 6.0) * _lora_met(
        model, ranks
    )


def _weights_met(model: LoadedModel) -> float:
    config = model.config
    met = float(model.num_params)
    if not config.tie_word_embeddings:
        met -= config.vocab_size * config.hidden_size
    if config.num_experts:
        layers = sum(config.is_moe(layer) for layer in range(config.num_layers))
        experts = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts * layers
        met -= experts * (1 - config.num_experts_per_tok / config.num_experts)
    return met


def _lora_met(model: LoadedModel, ranks: Ranks) -> float:
    met = 0
    for site in lora_sites(model.config):
        if site.num_experts is None:
            met += ranks.dense * (site.in_features + site.out_features)
        else:
            met += ranks.expert * (site.in_features + site.out_features) * model.config.num_experts_per_tok
    return float(met)


@lru_cache(maxsize=4)
def matmul_peak(dtype: Any) -> float:
    """FLOP/s of a large product on one device, measured once per process: the best of five."""
    on_cpu = jax.default_backend() == "cpu"
    size = _PEAK_SIZE_CPU if on_cpu else _PEAK_SIZE_GPU
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(x))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def memory_peak(device: Any) -> int:
    """The most bytes that were in use at once: of a ``jax.Device``, or of this process where that is its memory."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
