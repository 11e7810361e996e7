"""What the SDK's ``forward_backward_custom`` needs of torch, on numpy. SDK 0.3 to 0.7 cannot be imported without it.

Real torch is gigabytes with its CUDA libraries on Linux. The SDK only makes leaves of the log-probabilities that the
server returned, calls the user's loss, and sends the leaves' gradients. Only what the scenario's loss uses has a
gradient: products, sums over a tensor, and sums of tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

float32, int64, bfloat16 = np.dtype("f4"), np.dtype("i8"), np.dtype("V2")


class Tensor:
    """A numpy array that remembers how it was made."""

    def __init__(self, array: Any, parents: tuple[tuple[Tensor, Any], ...] = ()) -> None:
        self.array = np.asarray(array)
        self.grad: Tensor | None = None
        self.requires_grad = False
        self._parents = parents  # each with the factor that an incoming gradient is multiplied by

    shape = property(lambda self: self.array.shape)
    ndim = property(lambda self: self.array.ndim)

    @property
    def dtype(self) -> Any:
        """Of the array, with torch's way to ask for its kind."""
        return DType(self.array.dtype)

    def __neg__(self) -> Tensor:
        return Tensor(-self.array)

    def __mul__(self, other: Tensor) -> Tensor:
        return Tensor(self.array * other.array, ((self, other.array), (other, self.array)))

    def __add__(self, other: Tensor) -> Tensor:
        one = np.ones((), self.array.dtype)
        return Tensor(self.array + other.array, ((self, one), (other, one)))

    def sum(self) -> Tensor:
        """All elements'."""
        return Tensor(self.array.sum(), ((self, np.ones_like(self.array)),))

    def backward(self) -> None:
        """Add this scalar's gradient to every leaf that asked for it."""
        self._receive(np.ones_like(self.array))

    def _receive(self, gradient: np.ndarray) -> None:
        if self.requires_grad:
            self.grad = Tensor(gradient if self.grad is None else self.grad.array + gradient)
        for parent, factor in self._parents:
            parent._receive(gradient * factor)

    def reshape(self, shape: Any) -> Tensor:
        """Of a leaf."""
        return Tensor(self.array.reshape(shape))

    def clone(self) -> Tensor:
        """Of a leaf."""
        return Tensor(self.array.copy())

    def detach(self) -> Tensor:
        """Without its history."""
        return Tensor(self.array)

    def requires_grad_(self, wanted: bool) -> Tensor:
        """Itself, as a leaf."""
        self.requires_grad = wanted
        return self

    def contiguous(self) -> Tensor:
        """Itself: numpy's copies are."""
        return self

    def cpu(self) -> Tensor:
        """Itself."""
        return self

    def numpy(self) -> np.ndarray:
        """The array itself."""
        return self.array

    def flatten(self) -> Tensor:
        """One dimension."""
        return Tensor(self.array.reshape(-1))

    def tolist(self) -> Any:
        """Nested lists."""
        return self.array.tolist()

    def item(self) -> Any:
        """The only element."""
        return self.array.item()


class DType:
    """A numpy dtype that compares as torch's constants do."""

    def __init__(self, dtype: np.dtype) -> None:
        self.numpy, self.is_floating_point = dtype, dtype.kind == "f"

    def __eq__(self, other: object) -> bool:
        return self.numpy == other

    __hash__ = None


def tensor(data: Any, dtype: Any = None) -> Tensor:
    """Floats are float32 unless told otherwise, as in torch."""
    array = np.array(data, dtype)
    return Tensor(array.astype(np.float32) if array.dtype == np.float64 and dtype is None else array)
