"""Throughput: FLOPs against a count by hand, metrics of a pass, what the log says and when."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.support.tiny_models import VOCAB
from tx.models.loading import LoadedModel, load_model
from tx.worker import throughput
from tx.worker.adapters import Ranks
from tx.worker.mesh import make_mesh
from tx.worker.throughput import LOG_EVERY_S, Meter, PassCost, flops_per_token

RANKS = Ranks(dense=4, expert=2, scaling=1.0, expert_scaling=1.0)

# The tiny models: embed 64, 4 heads and 2 KV heads of 16, two layers; all of a token's products, in weights.
ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64
NORMS = 2 * (64 + 64) + 64
ATTENTION_LORA = 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64))
HEAD, HEAD_LORA = 64 * VOCAB, 4 * (64 + VOCAB)


@pytest.fixture(scope="module")
def qwen3(tiny_qwen3: Path) -> LoadedModel:
    return load_model(tiny_qwen3, make_mesh(), jnp.float32)


def check(model: LoadedModel, weights: int, lora: int) -> None:
    assert flops_per_token(model, RANKS, forward_only=True) == 2 * weights + 2 * lora
    assert flops_per_token(model, RANKS, forward_only=False) == 4 * weights + 6 * lora


def test_flops_of_a_model_with_a_tied_head(qwen3: LoadedModel):
    """ffn 128; Qwen3 norms heads. The embedding counts once, as the head."""
    layers = 2 * (ATTENTION + 3 * 64 * 128 + 2 * 16)
    check(qwen3, layers + NORMS + HEAD, 2 * (ATTENTION_LORA + 3 * 4 * (64 + 128)) + HEAD_LORA)


def test_flops_of_a_model_with_its_own_head(tiny_llama3: Path):
    """The embedding is only looked up."""
    model = load_model(tiny_llama3, make_mesh(), jnp.float32)
    layers = 2 * (ATTENTION + 3 * 64 * 128)
    check(model, layers + NORMS + HEAD, 2 * (ATTENTION_LORA + 3 * 4 * (64 + 128)) + HEAD_LORA)


def test_flops_of_a_mixture(tiny_qwen3_moe: Path):
    """Two of four experts of ffn 32 meet a token, with adapters of rank 2; the router scores all four."""
    model = load_model(tiny_qwen3_moe, make_mesh(), jnp.float32)
    layers = 2 * (ATTENTION + 2 * 3 * 64 * 32 + 64 * 4 + 2 * 16)
    check(model, layers + NORMS + HEAD, 2 * (ATTENTION_LORA + 2 * 3 * 2 * (64 + 32)) + HEAD_LORA)


def test_costs_add_up():
    cost = PassCost()
    cost.add(num_tokens=100, num_computed=128, seconds=0.5, flops=10.0)
    cost.add(num_tokens=50, num_computed=64, seconds=0.25, flops=20.0)
    assert cost == PassCost(150, 192, 2, 0.75, 2000.0)
    assert cost.plus(PassCost(1, 2, 3, 4.0, 5.0)) == PassCost(151, 194, 5, 4.75, 2005.0)
    assert cost == PassCost(150, 192, 2, 0.75, 2000.0)


def test_metrics_of_a_pass(qwen3: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(throughput, "matmul_peak", lambda dtype: {jnp.float32: 1e6}[dtype])
    metrics = Meter(qwen3).finish(PassCost(150, 200, 2, 0.5, 1e5))
    assert metrics.pop("memory_peak_bytes:max") > 1e6
    assert metrics == {
        "tokens_per_s:mean": 300.0,
        "padding_fraction:mean": 0.25,
        "micro_batches:max": 2.0,
        "mfu:mean": pytest.approx(0.2),
    }


def test_a_pass_without_work_has_no_metric_that_isnt_a_number(qwen3: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(throughput, "matmul_peak", lambda dtype: 1e6)
    metrics = Meter(qwen3).finish(PassCost())
    assert metrics["tokens_per_s:mean"] == metrics["mfu:mean"] == 0


def test_the_log_says_now_and_then_what_there_was_since(
    qwen3: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(throughput, "matmul_peak", lambda dtype: 1e6)
    clock = [1000.0]
    meter = Meter(qwen3, clock=lambda: clock[0])
    caplog.set_level(logging.INFO, logger=throughput.__name__)
    cost = PassCost(100, 125, 1, 0.5, 1e5)
    said = []
    for now in (1000.0, 1000.0 + LOG_EVERY_S - 0.1, 1000.0 + LOG_EVERY_S, 1000.0 + 1.9 * LOG_EVERY_S, 2000.0):
        clock[0] = now
        caplog.clear()
        meter.finish(cost)
        said.append([record.getMessage() for record in caplog.records])
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 1]
    beginning = "trained 300 tokens in 3 micro-batches: 200 tokens/s, 20.0 % padding, 20 % of the matmul peak"
    assert said[2][0].startswith(beginning)
    assert said[4][0].startswith("trained 200 tokens in 2 micro-batches")


class Accelerator:
    """What JAX says of a device with memory of its own."""

    platform = "gpu"

    def __init__(self, stats: dict[str, int] | None) -> None:
        self.memory_stats = lambda: stats


def test_the_memory_peak():
    assert throughput.memory_peak(Accelerator({"peak_bytes_in_use": 123})) == 123
    process = throughput.memory_peak(jax.devices("cpu")[0])
    assert process > 10e6
    assert throughput.memory_peak(Accelerator(None)) >= process
