"""How much memory keys and values of the sampler, activations of training, and parked adapters may take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tx.errors import StartupError

SHARE = 0.5
"""Of what an accelerator has left after the weights; training's activations and the adapters need the rest."""

CPU_SHARE = 0.25
"""Of what the machine has left: its memory isn't ours alone."""

TRAINING_SHARE = 0.3
"""Of an accelerator's memory after the weights, for activations; adapters and what programs use meanwhile is left."""

CPU_TRAINING_SHARE = 0.25

PARKED_SHARE = 0.25
"""Of what the machine has left, for adapters that are not on the device; those beyond it go to files."""

CGROUP = Path("/sys/fs/cgroup")

PROMPT_SHARE = 0.25
"""Of the blocks, kept for recent prompts; the pool of rows that decode has the others."""


def kv_bytes(device: Any, asked: int) -> int:
    """Bytes for keys and values on each device (a ``jax.Device``): what was asked for, or a share of what is left now.

    Raises:
        StartupError: there is less left than was asked for.
    """
    left = free_bytes(device)
    if asked:
        if left is not None and asked > left:
            raise StartupError(
                f"--kv-cache-memory {asked}: {device.platform} has {left} bytes left after loading the weights"
            )
        return asked
    if left is None:  # a device that doesn't tell
        return 2**30
    return int(left * (CPU_SHARE if device.platform == "cpu" else SHARE))


def parked_bytes(asked: int) -> int:
    """Bytes of host memory for parked adapters: what was asked for, or a share of what is left now.

    Raises:
        StartupError: there is less left than was asked for.
    """
    left = _free_host_bytes()
    if asked > left:
        raise StartupError(f"--parked-adapters-memory {asked}: the machine has {left} bytes left")
    return asked or int(left * PARKED_SHARE)


def activation_bytes(device: Any) -> int | None:
    """Bytes that activations may take on a device between a forward and a backward pass; None if it doesn't say."""
    left = free_bytes(device)
    return None if left is None else int(left * (CPU_TRAINING_SHARE if device.platform == "cpu" else TRAINING_SHARE))


def kept_bytes_per_token(config: Any, dtype: Any) -> int:
    """What a layer's backward pass finds of each token (``tx.layers.lora.KEPT`` and its input), of all layers.

    Of a mixture's experts nothing is kept but what goes in.
    """
    attention = config.hidden_size * 2 + config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    dense = sum(not config.is_moe(layer) for layer in range(config.num_layers))
    values = config.num_layers * attention + dense * 2 * config.intermediate_size
    statistics = config.num_layers * config.num_heads  # of the softmax, float32; rows of up to 512 on a CPU have none
    return values * np.dtype(dtype).itemsize + statistics * 4


def layer_input_bytes_per_token(config: Any, dtype: Any) -> int:
    """What is kept in any case: each layer's input."""
    return int(config.num_layers * config.hidden_size * np.dtype(dtype).itemsize)


def micro_batch_tokens(most: int, least: int, bytes_per_token: int, room: int | None) -> int:
    """``most`` halved until its activations fit into ``room`` bytes (None: no limit), or ``least`` is reached."""
    tokens = most
    while room is not None and tokens > least and tokens * bytes_per_token > room:
        tokens //= 2
    return tokens


def free_bytes(device: Any) -> int | None:
    """Bytes that this process could still allocate on a device, None if the device doesn't say."""
    if device.platform == "cpu":
        return _free_host_bytes()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats["bytes_in_use"])


def _free_host_bytes() -> int:
    return min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _reclaimable(), _left_in_cgroup())


def _reclaimable() -> int:
    """Page cache that Linux would give up, 0 where that can't be read."""
    fields = _fields(Path("/proc/meminfo"))
    return max(0, 1024 * (fields.get("MemAvailable:", 0) - fields.get("MemFree:", 0)))


def _left_in_cgroup() -> int:
    """What a container's limit leaves, or a number that never binds."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return 2**62 if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return 2**62


def _fields(file: Path) -> dict[str, int]:
    try:
        rows = (line.split() for line in file.read_text().splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) > 1}
    except (OSError, ValueError):
        return {}
