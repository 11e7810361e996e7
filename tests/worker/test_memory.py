"""``tx.worker.memory``: what is left, what of it is taken, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.errors import StartupError
from tx.models.loading import read_config
from tx.worker import memory

CPU = jax.devices("cpu")[0]


class Accelerator:
    """What JAX says of a device with memory of its own."""

    platform = "gpu"

    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_free_memory_of_a_cpu_is_what_linux_says():
    with open("/proc/meminfo") as file:
        fields = dict(line.split()[:2] for line in file)
    free = memory.free_bytes(CPU)
    assert 0 < free <= int(fields["MemTotal:"]) * 1024
    assert memory.kv_bytes(CPU, 0) <= free


def test_a_share_of_what_an_accelerator_has_left():
    device = Accelerator({"bytes_limit": 80_000, "bytes_in_use": 20_000})
    assert memory.free_bytes(device) == 60_000
    assert memory.kv_bytes(device, 0) == 30_000
    assert memory.kv_bytes(device, 55_000) == 55_000
    with pytest.raises(StartupError, match="--kv-cache-memory 60001: gpu has 60000 bytes left"):
        memory.kv_bytes(device, 60_001)


def test_a_device_that_does_not_tell():
    assert memory.kv_bytes(Accelerator(None), 0) == 2**30
    assert memory.kv_bytes(Accelerator(None), 5) == 5


def test_a_container_limits_it(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes(CPU) > 2**20
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory.free_bytes(CPU) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) > 2**20


def test_parked_adapters_get_what_is_asked_for_or_a_share_of_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory.parked_bytes(0) == 150_000
    assert memory.parked_bytes(1) == 1
    assert memory.parked_bytes(600_000) == 600_000
    with pytest.raises(StartupError, match="--parked-adapters-memory 600001: the machine has 600000 bytes left"):
        memory.parked_bytes(600_001)


def test_a_share_for_activations():
    assert memory.activation_bytes(Accelerator({"bytes_limit": 80_000, "bytes_in_use": 20_000})) == 18_000
    assert memory.activation_bytes(Accelerator(None)) is None
    assert 0 < memory.activation_bytes(CPU) <= memory.free_bytes(CPU) // 3


def test_kept_bytes_of_a_token(tiny_qwen3, tiny_qwen3_moe):
    """embed 64, 4 and 2 heads of 16, ffn 128, 2 layers: its input and the residual stream, q, k, v and what attention
    gives, gate and up, and four softmax statistics; of experts nothing. (Against real arrays: test_layerwise.)
    """
    attention = 2 * 64 + (64 + 32 + 32 + 64)
    dense, moe = read_config(tiny_qwen3), read_config(tiny_qwen3_moe)
    assert memory.kept_bytes_per_token(dense, np.float32) == 2 * ((attention + 2 * 128) * 4 + 4 * 4)
    assert memory.kept_bytes_per_token(dense, jnp.bfloat16) == 2 * ((attention + 2 * 128) * 2 + 4 * 4)
    assert memory.kept_bytes_per_token(moe, np.float32) == 2 * (attention * 4 + 4 * 4)


@pytest.mark.parametrize(
    ("room", "tokens"), [(None, 8192), (8192 * 10, 8192), (8192 * 10 - 1, 4096), (1024 * 10, 1024), (0, 512)]
)
def test_tokens_of_a_micro_batch(room, tokens):
    """Halved until 10 bytes per token fit, but not below 512."""
    assert memory.micro_batch_tokens(8192, 512, 10, room) == tokens
