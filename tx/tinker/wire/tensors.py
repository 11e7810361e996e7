"""Tensors of the wire as numpy: byte counts, shapes and sparse layouts, checked by field name."""

from __future__ import annotations

import math

import numpy as np

from tx.errors import InvalidInput, TooLarge

MAX_DENSE_CELLS = 2**25
"""Cells that the sparse tensors of one request may expand to (256 MiB of int64): a CSR header is a few bytes."""


class Budget:
    """Counts down what one request may expand to."""

    def __init__(self, cells: int) -> None:
        self._left = cells

    def spend(self, cells: int, where: str) -> None:
        """Take ``cells`` from what is left; raises TooLarge when that is not enough."""
        self._left -= cells
        if self._left < 0:
            raise TooLarge(where, f"{cells} cells", f"at most {MAX_DENSE_CELLS} cells in one request")


def array(data: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    """A flat, read-only view of ``data``."""
    if len(data) % dtype.itemsize:
        raise InvalidInput(where, f"{len(data)} bytes", f"a multiple of {dtype.itemsize} ({dtype.name})")
    return np.frombuffer(data, dtype)


def shaped(flat: np.ndarray, shape: list[int], where: str) -> np.ndarray:
    """``flat`` in ``shape``; an empty shape means one dimension, as old clients leave it out."""
    if not shape:
        return flat
    if any(size < 0 for size in shape) or len(shape) > 2 or math.prod(shape) != flat.size:
        raise InvalidInput(f"{where}.shape", shape, f"one or two dimensions holding {flat.size} values")
    return flat.reshape(shape)


def densify(
    values: np.ndarray,
    crow: np.ndarray,
    col: np.ndarray,
    shape: list[int],
    where: str,
    cells: Budget,
    unlisted: int = 0,
) -> np.ndarray:
    """CSR to dense; cells that aren't listed are ``unlisted``.

    Example: shape [3, 2], crow [0, 1, 1, 3], col [1, 0, 1], values [5, 6, 7] is [[0, 5], [0, 0], [6, 7]].
    """
    if len(shape) != 2 or min(shape) < 0:
        raise InvalidInput(f"{where}.shape", shape, "two dimensions, as the tensor is sparse")
    rows, width = shape
    if crow.size != rows + 1:
        raise InvalidInput(f"{where}.crow_indices", f"{crow.size} values", f"{rows + 1} for shape {shape}")
    if crow[0] != 0 or crow[-1] != values.size or np.any(np.diff(crow) < 0):
        raise InvalidInput(f"{where}.crow_indices", "an unordered list", f"0 rising to {values.size}")
    if col.size != values.size or (col.size and (col.min() < 0 or col.max() >= width)):
        raise InvalidInput(f"{where}.col_indices", "indices out of range", f"{values.size} values in [0, {width})")
    cells.spend(rows * width, where)
    dense = np.full((rows, width), unlisted, values.dtype)
    dense[csr_rows(crow), col] = values
    return dense


def csr_rows(crow: np.ndarray) -> np.ndarray:
    """The row of each listed cell: crow [0, 1, 1, 3] is [0, 2, 2]."""
    return np.repeat(np.arange(crow.size - 1), np.diff(crow))


def as_input(name: str, array: np.ndarray, where: str) -> np.ndarray:
    """Token ids stay int64; everything else is float32 (integers there are exact enough to be meant as floats)."""
    if name == "target_tokens":
        if array.dtype.kind != "i":
            raise InvalidInput(f"{where}.loss_fn_inputs.target_tokens.dtype", "float32", "int64")
        return array
    return array.astype(np.float32, copy=False)
