"""Python's garbage collector in processes that stay: its full collections stop every thread, so there are few."""

from __future__ import annotations

import gc

_THRESHOLDS = (10_000, 20, 50)
"""With Python's own all objects are traversed every few seconds: in the API 0.3 s while 2,000 polls wait, in the engine
0.15 s, in the middle of an optimizer step."""


def collect_seldom() -> None:
    """What is here by now stays, so the collector needn't look at it; at the rest it looks less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
