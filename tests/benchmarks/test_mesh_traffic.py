"""The traffic of a mesh: at least the gradients or the activations, and results that equal one device's."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_mesh_traffic():
    sizes = {"layers": 1, "hidden": 64, "vocab": 512, "rank": 4, "length": 16}
    command = [sys.executable, str(BENCHMARKS / "mesh_traffic.py")]
    command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    payload: Counter[str] = Counter()  # of all programs together: which of them sums the gradients is not said here
    for mesh, _, kind, _, kilobytes, *_ in (row for row in rows if len(row) == 7):
        if kind == "all":
            payload[mesh] += float(kilobytes)

    sites = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192) + (64 + 512)
    gradients_kb = 4 * 4 * sites / 1e3  # rank, bytes
    assert payload["data parallel 8"] >= round(gradients_kb, 1)
    activations_kb = 4 * 8 * 16 * 64 * 4 / 1e3  # two all-reduces forward and two backward, of rows x length x hidden
    assert payload["tensor parallel 8"] >= activations_kb

    compared = [line for line in done.stdout.splitlines() if "against one device" in line]
    assert len(compared) == 2
    for line in compared:
        differences = [float(found) for found in re.findall(r"by (\S+e[-+]\d+)", line)]
        assert len(differences) == 2
        assert all(0 <= one <= 1e-4 for one in differences), line
