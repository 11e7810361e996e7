"""The benchmarks that drive a server, on the tiny one: every phase ends and its numbers fit together."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.compare import main as compare
from tests.support.server import BASE_MODEL, Server, environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


SMALL = ["--rounds", "2", "--max-tokens", "12", "--batch", "2", "--prompts", "3", "--group", "2"]


@pytest.mark.slow
def test_sampling_bench(server: Server, drive: Callable[..., dict[str, dict]]) -> None:
    small = ["--group-size", "3", "--group-prompt", "40", "--group-tokens", "4", "--requests", "2", "--others", "4"]
    phases = "memory,first,ragged,group,latency"
    more = [*small, "--pause", "0", "--phases", phases, "--engine-pid", str(server.process.pid)]
    results = drive("sampling_bench.py", *SMALL, *more)
    assert list(results) == ["memory", "first", "ragged", "group", "latency"]

    memory = results["memory"]
    assert memory["fresh_rss_mb"] > 200  # JAX alone is more: the engine is counted, not only the API's process
    assert memory["warm_rss_mb"] <= memory["peak_rss_mb"]
    assert memory["sequences"] == 6

    assert min(results["first"]["first_s"], results["first"]["again_s"]) > 0

    ragged = results["ragged"]
    assert len(ragged["round_s"]) == len(ragged["round_tokens"]) == 2
    assert all(6 <= tokens <= 6 * 12 for tokens in ragged["round_tokens"])
    assert ragged["reply_tokens_mean"] == pytest.approx(sum(ragged["round_tokens"]) / 12, abs=0.06)
    assert ragged["warm_tokens_per_s"] == pytest.approx(ragged["round_tokens"][1] / ragged["round_s"][1], rel=0.2)

    group = results["group"]
    assert all(3 <= tokens <= 12 for tokens in group["shared_tokens"] + group["single_tokens"])
    assert group["single_to_shared"] == pytest.approx(group["single_s"] / group["shared_s"], rel=0.1)

    latency = results["latency"]
    assert all(0 < latency[f"{kind}_p50_s"] <= latency[f"{kind}_p95_s"] for kind in ("alone", "busy", "training"))


def test_the_phase_memory_needs_a_process(gsm8k: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "sampling_bench.py"), "--data", str(gsm8k), "--phases", "memory"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--engine-pid" in done.stderr


@pytest.mark.slow
def test_tinker_bench(drive: Callable[..., dict[str, dict]]) -> None:
    results = drive("tinker_bench.py", *SMALL, "--phases", "create,sl,sample,rl", "--steps", "2")
    assert list(results) == ["create", "sl", "sample", "rl"]
    assert len(results["sl"]["loss_per_token"]) == 2
    assert max(results["rl"]["max_gap"]) < 1e-3


@pytest.mark.slow
def test_compare_takes_turns_and_keeps_what_it_saw(
    server: Server, gsm8k: Path, tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    kept = tmp_path / "kept.jsonl"
    servers = [part for name in "ab" for part in ("--server", name, server.url, BASE_MODEL, sys.executable)]
    script = ["--script", str(BENCHMARKS / "sampling_bench.py"), "--times", "2", "--keep", str(kept), "--"]
    small = ["--data", str(gsm8k), "--tokenizer", str(tiny_qwen3), *SMALL, "--phases", "ragged"]
    for key in set(os.environ) - set(environment()):
        monkeypatch.delenv(key)
    monkeypatch.setattr(sys, "argv", ["compare.py", *servers, *script, *small])
    compare()
    results = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [result["server"] for result in results] == ["a", "b", "a", "b"]
    said = capfd.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("ragged.warm_tokens_per_s"))
    first, second = (
        sorted(one["result"]["warm_tokens_per_s"] for one in results if one["server"] == name) for name in "ab"
    )
    assert float(line.split()[-1].rstrip("×")) == pytest.approx(sum(first) / sum(second), abs=0.01)
