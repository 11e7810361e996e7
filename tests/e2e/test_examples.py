"""The examples run as their readers run them, on the tiny model: as processes, with the real SDK."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import BASE_MODEL, Server, environment

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: Path, *flags: str) -> str:
    result = subprocess.run(
        [sys.executable, str(script), *flags], env=environment(), capture_output=True, text=True, timeout=240
    )
    # Once in some fifty runs the SDK's transport aborts while its interpreter shuts down, with all work done.
    assert result.returncode in (0, -signal.SIGABRT), result.stdout + result.stderr
    return result.stdout


def test_quickstart_teaches_its_sentence(server: Server, tmp_path: Path) -> None:
    source = (EXAMPLES / "quickstart.py").read_text()
    here = {"http://localhost:8000": server.url, "HuggingFaceTB/SmolLM2-135M-Instruct": BASE_MODEL}
    # Random weights know no language: the tiny model needs larger steps, and twice as many.
    here |= {"learning_rate=2e-3": "learning_rate=1e-2", "range(8)": "range(16)"}
    for old, new in here.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "quickstart.py").write_text(source)
    lines = run(tmp_path / "quickstart.py").splitlines()
    losses = [float(found.group(1)) for line in lines if (found := re.match(r"step \d+: loss per token (.*)", line))]
    assert len(losses) == 16
    assert losses[-1] < 0.1 < losses[0]
    assert lines[-1] == "I am tx. I train and sample on your own machine.<|im_end|>"


def test_sl_gsm8k(server: Server, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(40)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--train", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl"), "--steps", "6"]
    flags += ["--base-url", server.url, "--model", BASE_MODEL, "--max-length", "64", "--learning-rate", "5e-3"]
    said = run(EXAMPLES / "sl_gsm8k.py", *flags)
    before, after = (
        float(re.search(rf"held-out loss per token {when}: +(.*)", said).group(1)) for when in ("before", "after")
    )
    assert after < before - 0.5
    assert "tinker://" in said


@pytest.mark.parametrize("plot", [False, True])
def test_rl_short(server: Server, tmp_path: Path, plot: bool) -> None:
    if plot:
        pytest.importorskip("matplotlib")
    picture = tmp_path / "curve.png"
    flags = ["--base-url", server.url, "--model", BASE_MODEL, "--steps", "2", "--max-tokens", "8", "--group", "4"]
    said = run(EXAMPLES / "rl_short.py", *flags, "--questions", "2", "--plot", str(picture) if plot else "")
    assert re.search(r"step +1 +reward 0\.\d+", said)
    assert picture.is_file() == plot
