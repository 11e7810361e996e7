"""Eight forced host devices give one device's results: loss, every adapter gradient, greedy tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tx.errors import StartupError
from tx.layers.sharding import MESH_AXES
from tx.worker.mesh import make_mesh

ROOT = Path(__file__).parents[2]

# 8 query heads and 2 KV heads: at tp=8 and tp=4 the KV heads are fewer than the devices.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1}
EXPERTS = HEADS | {"num_experts": 8, "num_experts_per_tok": 3, "mlp_only_layers": []}
CASES = {
    "tp8": ("llama3", {"tp": 8}, HEADS),
    "fsdp2_tp4": ("qwen3", {"fsdp": 2, "tp": 4}, HEADS),
    "ep4_tp2": ("qwen3_moe_mixed", {"ep": 4, "tp": 2}, EXPERTS),
    "data2_fsdp2_ep2": ("qwen3_moe_mixed", {"data": 2, "fsdp": 2, "ep": 2}, EXPERTS),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_gives_one_devices_results(case, tmp_path):
    name, sizes, overrides = CASES[case]
    command = [sys.executable, "-m", "tests.support.mesh_run", str(tmp_path), name]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    child = subprocess.run(
        [*command, json.dumps(sizes), json.dumps(overrides)],
        cwd=ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    result = json.loads(child.stdout.splitlines()[-1])
    assert result["sharded_weights"] > 0
    for quantity in ("logits", "logprobs", "loss", "gradients", "prefill"):
        assert result[quantity] <= 1e-4, result
    assert result["same_tokens"], result


def test_axes_and_their_order():
    mesh = make_mesh()
    assert mesh.axis_names == MESH_AXES
    assert mesh.size == 1


@pytest.mark.parametrize("sizes", [{"tp": 1000}, {"data": 1000}, {"tp": 0}])
def test_a_mesh_that_does_not_fit_is_one_sentence(sizes):
    with pytest.raises(StartupError, match=r"mesh needs 1000 devices \(.*=1000.*\), have \d+|must all be at least 1"):
        make_mesh(**sizes)
