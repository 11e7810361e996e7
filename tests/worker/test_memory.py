"""``tx.worker.memory``: what is left, what of it is taken, what is refused."""

import jax
import pytest

from tx.errors import StartupError
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
