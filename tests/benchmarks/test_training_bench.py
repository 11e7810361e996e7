"""The benchmark of training on the tiny server: every phase ends and its numbers fit together."""

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server import environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PHASES = ["first", "sft", "latency", "publish", "optim", "tenants", "long"]


@pytest.mark.slow
def test_training_bench(drive: Callable[..., dict[str, dict]]) -> None:
    small = ["--batch", "4", "--rank", "8", "--steps", "3", "--rounds", "1", "--requests", "3", "--repeats", "3"]
    lists = ["--tenants", "1,2", "--models", "1,2", "--ranks", "1,16", "--tokens", "200"]
    results = drive("training_bench.py", *small, *lists)
    assert list(results) == PHASES

    first = results["first"]
    assert 0 < first["second_forward_backward_s"] <= first["first_forward_backward_s"]

    sft = results["sft"]
    assert len(sft["step_s"]) == len(sft["loss_per_token"]) == 3
    assert sft["cold_step_s"] == sft["step_s"][0]
    assert all(5 < loss < 12 for loss in sft["loss_per_token"])  # of random weights: ln 2048 is 7.6

    for phase, names in {"latency": ["forward", "forward_backward", "optim_step"], "publish": ["publish"]}.items():
        for name in names:
            assert 0 < results[phase][f"{name}_p50_ms"] <= results[phase][f"{name}_p95_ms"]
    assert results["publish"]["first_token_p50_ms"] > results["publish"]["publish_p50_ms"]

    optim = results["optim"]
    assert optim["models_before"] == 1
    assert all(optim[f"{name}_p50_ms"] > 0 for name in ("models_1", "models_2", "rank_1", "rank_16"))

    tenants = results["tenants"]
    assert tenants["short_tokens"] == 4 * 16
    for kind in ("problems", "short"):
        for count in (1, 2):
            rounds = tenants[f"{kind}_{count}_round_s"]
            assert len(rounds) == 2 + (4 if kind == "short" else 1)
            rate = tenants[f"{kind}_tokens"] / statistics.median(rounds[2:])
            assert tenants[f"{kind}_{count}_tokens_per_s"] == pytest.approx(rate, rel=0.05)
        assert tenants[f"{kind}_2_to_1"] == pytest.approx(
            tenants[f"{kind}_2_tokens_per_s"] / tenants[f"{kind}_1_tokens_per_s"], abs=0.01
        )

    assert results["long"]["tokens"] == 200


def test_more_tenants_than_data_are_refused(gsm8k: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "training_bench.py"), "--data", str(gsm8k), "--batch", "8"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--tenants 16 can't share out --batch 8 data" in done.stderr
