"""Where two JSON values differ. Standard library alone: the scenario uses it in every environment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differing(value: Any, other: Any, tolerance: float = 0.0, place: str = "values") -> Iterator[tuple[str, Any, Any]]:
    """Each place with both values; floats may be ``tolerance`` apart, everything else must be equal."""
    if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
        for key in value:
            yield from differing(value[key], other[key], tolerance, f"{place}.{key}")
    elif isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        for i, pair in enumerate(zip(value, other, strict=True)):
            yield from differing(*pair, tolerance, f"{place}[{i}]")
    elif isinstance(value, float) and isinstance(other, float):
        if not abs(value - other) <= tolerance:
            yield place, value, other
    elif value != other or type(value) is not type(other):
        yield place, value, other
