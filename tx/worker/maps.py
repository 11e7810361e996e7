"""Memory maps of this process. On a CPU a compiled program has tens to hundreds of them, and Linux allows 65,530.

Whoever needs one more ends, whatever it was for; so programs are forgotten before that, and read from JAX's cache on
disk again when they are needed.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax

log = logging.getLogger(__name__)

MOST_AHEAD = 0.5
"""Of the maps that the process may have: with more, nothing is compiled ahead."""

MOST = 0.8
"""With more, all programs are forgotten."""

CHECK_EVERY_S = 30.0
"""Reading the maps takes up to 30 ms; meanwhile a busy compiler makes a tenth of what there may be."""

_MAPS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def share_in_use() -> float:
    """Of the maps that this process may have; 0 where there is no such limit."""
    try:
        return _MAPS.read_bytes().count(b"\n") / int(_LIMIT.read_text())
    except OSError:
        return 0.0


class MapsGuard:
    """Looks at the maps now and then, and forgets all programs when there are too many; ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checked_at = clock()

    def check(self) -> None:
        """Cheap to call often; not while a program runs."""
        if self._clock() - self._checked_at < CHECK_EVERY_S:
            return
        share = share_in_use()
        if share > MOST:
            log.warning("%.0f %% of the memory maps are in use (vm.max_map_count): forgetting programs", 100 * share)
            jax.clear_caches()
            gc.collect()
        self._checked_at = self._clock()
