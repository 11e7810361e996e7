"""What a traced program consists of, at any depth: how large its arrays are, how often it does something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def shapes(program: Any, *arguments: Any) -> set[tuple[int, ...]]:
    """The shape of every value that ``program`` computes on its way, in all of its inner programs."""
    equations = _equations(jax.make_jaxpr(program)(*arguments).jaxpr)
    return {tuple(getattr(variable.aval, "shape", ())) for equation in equations for variable in equation.outvars}


def count(program: Any, primitive: str, *arguments: Any) -> int:
    """How many equations of this primitive ``program`` has."""
    equations = _equations(jax.make_jaxpr(program)(*arguments).jaxpr)
    return sum(equation.primitive.name == primitive for equation in equations)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from _equations(inner.jaxpr)
