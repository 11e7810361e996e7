"""What arrays a traced program has, at any depth: for tests that say how large one may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def shapes(program: Any, *arguments: Any) -> set[tuple[int, ...]]:
    """The shape of every value that ``program`` computes on its way, in all of its inner programs."""
    return set(_shapes(jax.make_jaxpr(program)(*arguments).jaxpr))


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(getattr(variable.aval, "shape", ()))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from _shapes(inner.jaxpr)
