"""How much memory the sampler may use for keys and values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tx.errors import StartupError

SHARE = 0.5
"""Of what an accelerator has left after the weights; training's activations and the adapters need the rest."""

CPU_SHARE = 0.25
"""Of what the machine has left: its memory isn't ours alone."""

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


def free_bytes(device: Any) -> int | None:
    """Bytes that this process could still allocate on a device, None if the device doesn't say."""
    if device.platform == "cpu":
        return min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _reclaimable(), _left_in_cgroup())
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats["bytes_in_use"])


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
