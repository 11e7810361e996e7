"""Fixtures of the benchmarks' tests: problems, and the programs that drive the shared server.

The programs import what they share by its bare name, as their folder comes first when they are run.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server import BASE_MODEL, Server, environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty problems in GSM8K's form."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"question": f"{n} and {n * 7} apples make how many?", "answer": f"#### {n * 8}"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def drive(server: Server, gsm8k: Path, tiny_qwen3: Path) -> Callable[..., dict[str, dict]]:
    """``drive(script, *flags)``: the script's results on the shared server, by phase."""

    def run(script: str, *flags: str) -> dict[str, dict]:
        command = [sys.executable, str(BENCHMARKS / script), "--base-url", server.url, "--model", BASE_MODEL]
        command += ["--data", str(gsm8k), "--tokenizer", str(tiny_qwen3), *flags]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return {result["phase"]: result for result in map(json.loads, done.stdout.splitlines())}

    return run
