"""The benchmark of training on the tiny server: every phase ends and its numbers fit together."""

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server import environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PHASES = ["first", "sft", "latency", "publish", "optim", "requests", "tenants", "long"]


@pytest.mark.slow
def test_training_bench(drive: Callable[..., dict[str, dict]]) -> None:
    small = ["--batch", "4", "--rank", "8", "--steps", "3", "--rounds", "1", "--requests", "3", "--repeats", "3"]
    lists = ["--tenants", "1,2", "--models", "1,2", "--ranks", "1,16", "--large", "1", "--tokens", "200"]
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

    assert results["tenants"]["short_tokens"] == 4 * 16
    assert results["requests"]["short_tokens"] == 2 * 16
    for phase, kinds in {"tenants": ["problems", "short"], "requests": ["large", "short"]}.items():
        for kind in kinds:
            check_shares(results[phase], kind)

    assert results["long"]["tokens"] == 200


def check_shares(report: dict, kind: str) -> None:
    """Rates are tokens over the median of the counted rounds, ratios are to one model's rate."""
    for count in (1, 2):
        rounds = report[f"{kind}_{count}_round_s"]
        assert len(rounds) == 2 + (4 if kind == "short" else 1)
        rate = report[f"{kind}_tokens"] / statistics.median(rounds[2:])
        assert report[f"{kind}_{count}_tokens_per_s"] == pytest.approx(rate, rel=0.05)
    ratio = report[f"{kind}_2_tokens_per_s"] / report[f"{kind}_1_tokens_per_s"]
    assert report[f"{kind}_2_to_1"] == pytest.approx(ratio, abs=0.01)


def test_more_tenants_than_data_are_refused(gsm8k: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "training_bench.py"), "--data", str(gsm8k), "--batch", "8"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--tenants 16 can't share out --batch 8 data" in done.stderr
