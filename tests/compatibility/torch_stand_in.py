"""As much of torch as the SDK needs around a custom loss, for machines without torch: sums and their gradients.

Custom losses run in the client; what tx has to answer is the same whoever computes the gradient.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import tinker
from tinker.lib.public_interfaces import service_client, training_client


class Tensor:
    """An array; a sum or a negation remembers what it was made of and how much each entry counted."""

    def __init__(self, value: Any, made_of: Tensor | None = None, factor: float = 1.0) -> None:
        self.value = np.asarray(value, np.float32)
        self.grad: np.ndarray | None = None
        self._made_of, self._factor = made_of, factor

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def reshape(self, shape: list[int]) -> Tensor:
        return Tensor(self.value.reshape(shape))

    def clone(self) -> Tensor:
        return Tensor(self.value)

    detach = clone

    def requires_grad_(self, _: bool) -> Tensor:
        return self

    def sum(self) -> Tensor:
        return Tensor(self.value.sum(), self)

    def __neg__(self) -> Tensor:
        return Tensor(-self.value, self, -1.0)

    def item(self) -> float:
        return float(self.value)

    def backward(self) -> None:
        leaf, factor = self, 1.0
        while leaf._made_of is not None:
            leaf, factor = leaf._made_of, factor * leaf._factor
        leaf.grad = np.full(leaf.value.shape, factor, np.float32)


_NUMBERS = itertools.count()


@dataclass
class _Graph:
    """What torch.fx makes of a loss: callable, with its code as text."""

    function: Any
    code: str = field(default_factory=lambda: f"loss {next(_NUMBERS)}")  # a session takes each loss once

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.function(*inputs)


def _trace(function: Any, input_ranks: dict[str, int], session_id: str) -> tinker.LossHandle:
    inputs = tuple(tinker.types.CustomLossInput(name=name, rank=rank) for name, rank in input_ranks.items())
    return tinker.LossHandle(name=function.__name__, inputs=inputs, session_id=session_id, graph=_Graph(function))


@contextmanager
def installed() -> Iterator[None]:
    """The SDK finds this module where it looks for torch."""
    torch = types.ModuleType("torch")
    torch.Tensor, torch.tensor = Tensor, Tensor  # type: ignore[attr-defined]
    with (
        mock.patch.dict(sys.modules, {"torch": torch}),
        mock.patch.object(training_client, "torch", torch),
        mock.patch.object(service_client, "trace_loss", _trace),
    ):
        yield
