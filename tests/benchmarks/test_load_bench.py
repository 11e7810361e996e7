"""The load benchmark, scaled down, as a test of correctness: every future is answered once, with its own answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import load_bench

SMALL = ["--clients", "12", "--samples", "240", "--waiting", "120", "--sending", "4", "--trainers", "3"]


def check(figures: dict) -> None:
    assert figures["samples"] == 240
    assert (figures["unanswered"], figures["answered_twice"], figures["errors"]) == (0, 0, [])
    assert figures["most_waiting"] >= 120
    assert figures["training_steps"] > 0
    assert figures["heartbeats"] > 0
    refused = {status for status in figures["statuses"] if status.split()[-1] not in ("200", "408", "connection")}
    assert refused == set()


@pytest.mark.parametrize(("database", "workers"), [("sqlite", 1), ("sqlite", 2), ("postgresql", 2)])
def test_all_futures_of_a_stub_engine_are_answered_once(request, tmp_path: Path, database: str, workers: int) -> None:
    flags = ["--data-dir", str(tmp_path), "--api-workers", str(workers), "--heartbeat-s", "0.5", "--backlog", "300"]
    if database == "postgresql":
        flags += ["--database-url", request.getfixturevalue("postgres_url")]
    check(load_bench.main([*SMALL, *flags, "--slice-s", "0.01"]))


@pytest.mark.slow
def test_all_futures_of_the_real_engine_are_answered_once(tiny_qwen3: Path, tmp_path: Path) -> None:
    flags = ["--start", str(tiny_qwen3), "--data-dir", str(tmp_path), "--prompt", "8", "--heartbeat-s", "0.5"]
    check(load_bench.main([*SMALL, *flags]))
