"""Which jobs the worker has at this moment, in a file that outlives the process.

After a crash it tells which jobs may have caused it: those are counted (``Job.attempts``), tried again alone, and given
up at last, so that no single request can keep an engine down. One small write without a sync: the page cache survives
the process, and after a power cut there is nobody to suspect.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger(__name__)

_MAX_JOBS = 4096
_COUNT = struct.Struct("<q")


class InFlight:
    """One engine's file; made when needed. A file system that fails costs only the knowledge.

    Args:
        blameless: what the previous engine had is not to blame for its end: somebody killed it.
    """

    def __init__(self, file: Path, *, blameless: bool = False) -> None:
        self.suspects = frozenset() if blameless else _read(file)
        """What the previous engine had when it ended, if it crashed."""
        self._descriptor: int | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            log.warning("%s can't be written: %s", file, error)
        self.set(())

    def set(self, request_ids: Collection[int]) -> None:
        """These, and no others, are with the worker."""
        if self._descriptor is None:
            return
        ids = list(request_ids)[:_MAX_JOBS]
        try:
            # One call: a process dies before it or after it, not in the middle.
            os.pwrite(self._descriptor, _COUNT.pack(len(ids)) + struct.pack(f"<{len(ids)}q", *ids), 0)
        except OSError as error:
            log.warning("what is in flight can't be written: %s", error)

    def close(self) -> None:
        """Nothing is in flight any more."""
        self.set(())
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read(file: Path) -> frozenset[int]:
    try:
        content = file.read_bytes()
    except OSError:
        return frozenset()
    if len(content) < _COUNT.size:
        return frozenset()
    (count,) = _COUNT.unpack_from(content)
    if not 0 <= count <= min(_MAX_JOBS, (len(content) - _COUNT.size) // 8):
        return frozenset()
    return frozenset(struct.unpack_from(f"<{count}q", content, _COUNT.size))
