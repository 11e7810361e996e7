"""Trainer on 8 devices: losses, logprobs, every LoRA gradient and a step equal one device's.

The devices are forced host devices, which have to be asked for before JAX starts: hence a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import write_tiny_model

MESHES = {  # name: (family, overrides of config.json, (data, fsdp, ep, tp))
    "tp8": ("qwen3", {"num_attention_heads": 8}, (1, 1, 1, 8)),  # 2 KV heads on 8 devices
    "fsdp2_tp4": ("llama3", {}, (1, 2, 1, 4)),
    "ep4_tp2": ("qwen3_moe", {}, (1, 1, 4, 2)),
}

SCRIPT = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from tx.models.loading import load_model
from tx.types import AdamParams, Datum, ForwardBackward, LoraConfig
from tx.worker.adapters import AdapterStore
from tx.worker.mesh import make_mesh
from tx.worker.trainer import Trainer

def train(folder, sizes):
    model = load_model(Path(folder), make_mesh(*sizes), jnp.float32)
    store = AdapterStore(model, 1)
    trainer = Trainer(model, store, micro_batch_tokens=64, max_context=64)
    store.create("m", LoraConfig(3, 0))
    start = store.export("m")
    rng = np.random.default_rng(1)
    for name in start.weights:  # B away from zero, so that A has a gradient
        start.weights[name] += rng.normal(0, 0.02, start.weights[name].shape).astype(np.float32)
    store.restore("m", start, False)
    data = tuple(
        Datum(rng.integers(0, 2048, n).astype(np.int32),
              {"target_tokens": rng.integers(0, 2048, n), "weights": rng.uniform(0, 1, n).astype(np.float32)})
        for n in (16, 9, 12, 5))
    trainer.submit(0, ForwardBackward("m", 0, data, "cross_entropy", {}, False))
    while trainer.has_work:
        finished = trainer.slice()
    if finished[0].error:
        raise finished[0].error
    grads = jax.device_get(store.state("m").grads)
    trainer.optim_step("m", AdamParams(learning_rate=1e-3, eps=1e-3))
    weights = store.export("m").weights
    return finished[0].result, jax.tree.leaves(grads), weights

folder, *sizes = json.loads(sys.argv[1])
one, many = train(folder, (1, 1, 1, 1)), train(folder, sizes)
error = lambda a, b: float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
print(json.dumps({
    "loss": abs(one[0].metrics["loss:sum"] - many[0].metrics["loss:sum"]) / one[0].metrics["loss:sum"],
    "logprobs": max(map(error, many[0].logprobs, one[0].logprobs)),
    "grads": max(map(error, many[1], one[1])),
    "weights": max(error(many[2][name], one[2][name]) for name in one[2]),
    "scale": float(min(np.abs(g).max() for g in one[1])),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_trains_as_one_device_does(name: str, tmp_path: Path):
    family, overrides, sizes = MESHES[name]
    folder = write_tiny_model(tmp_path / family, family, num_hidden_layers=1, **overrides)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, json.dumps([str(folder), *sizes])]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert errors.pop("scale") > 1e-3, "a gradient that is zero everywhere proves nothing"
    assert all(error <= 1e-4 for error in errors.values()), errors
