"""Counters, gauges and histograms of the API process, as Prometheus text. No dependency, no push.

Routes are counted by their template (``/samplers/{sampler_id}``), so that the number of series stays small.
"""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Thread-safe; a series appears with its first observation.

    Args:
        common: labels of every series.
    """

    def __init__(self, **common: str) -> None:
        self._lock = threading.Lock()
        self._common = common
        self._counters: dict[tuple[str, _Labels], float] = defaultdict(float)
        self._histograms: dict[tuple[str, _Labels], list[float]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name, self._key(labels)] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add one duration to a histogram."""
        key = (name, self._key(labels))
        with self._lock:
            # One cell per bucket, one for what is slower than all of them, and the sum.
            cells = self._histograms.setdefault(key, [0.0] * (len(_BUCKETS_S) + 2))
            cells[bisect.bisect_left(_BUCKETS_S, seconds)] += 1
            cells[-1] += seconds

    def render(self, gauges: dict[str, float]) -> str:
        """Prometheus' text format; ``gauges`` are read by the caller at this moment."""
        lines: list[str] = []
        with self._lock:
            for name in sorted({name for name, _ in self._counters}):
                lines.append(f"# TYPE {name} counter")
                lines += [
                    f"{name}{_labels(labels)} {value:g}"
                    for (series, labels), value in sorted(self._counters.items())
                    if series == name
                ]
            for name in sorted({name for name, _ in self._histograms}):
                lines.append(f"# TYPE {name} histogram")
                for (series, labels), cells in sorted(self._histograms.items()):
                    if series == name:
                        lines += _histogram_lines(name, labels, cells)
        for name, value in sorted(gauges.items()):
            lines += [f"# TYPE {name} gauge", f"{name}{_labels(self._key({}))} {value:g}"]
        return "\n".join(lines) + "\n"

    def _key(self, labels: dict[str, str]) -> _Labels:
        return tuple(sorted((self._common | labels).items()))


def _histogram_lines(name: str, labels: _Labels, cells: list[float]) -> list[str]:
    lines, total = [], 0.0
    for bound, cell in zip((*map(str, _BUCKETS_S), "+Inf"), cells[:-1], strict=True):
        total += cell
        lines.append(f"{name}_bucket{_labels((*labels, ('le', bound)))} {total:g}")
    return [*lines, f"{name}_sum{_labels(labels)} {cells[-1]:g}", f"{name}_count{_labels(labels)} {total:g}"]


def _labels(labels: _Labels) -> str:
    if not labels:
        return ""
    escaped = ((key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels)
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
