"""Where states wait that are not on the device: host memory up to a budget, and files for the least recently used.

A state is any pytree of numpy arrays, and comes back bit for bit. An array that is zero throughout, as a fresh model's
moments are, is remembered as such and takes no room.

The files serve this process alone (after a restart models are rebuilt from their jobs), so nothing is synced, names
mean nothing, and what describes a file stays in memory: the tree, the step count in it, and a checksum that tells
whether the file is still what was written. A disk that doesn't take a state costs nothing but memory: the state stays
where it is. A file that can't be read back is a lost model, never wrong numbers.
"""

from __future__ import annotations

import logging
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tx.errors import ModelLost

log = logging.getLogger(__name__)

REST_AFTER_FAILURE_S = 30.0
"""So long a folder that has failed is left alone: a full disk must not cost a write per parked model."""

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Packed:
    """A state as its arrays.

    Attributes:
        structure: the tree without its leaves.
        arrays: contiguous, by the leaf's number; empty while they are in a file.
        zeros: (shape, dtype) of the leaves that are zero throughout, by number.
        num_bytes: what the arrays take, in memory or in the file.
    """

    structure: Any
    arrays: dict[str, np.ndarray]
    zeros: dict[str, tuple[tuple[int, ...], np.dtype]]
    num_bytes: int


@dataclass(frozen=True)
class _Spilled:
    """A file, its checksum, and what it doesn't say."""

    file: Path
    checksum: int
    packed: _Packed


class Parking[State]:
    """Parked states by model id, least recently put or looked at first.

    Args:
        memory: bytes of arrays that host memory may hold; more only while the folder fails.
        folder: where the others go, made when needed; what an earlier process left there is deleted now. None: all
            stay in memory, whatever ``memory`` says.
        clock: seconds, to leave a failing folder alone by.
    """

    def __init__(
        self, memory: int = 0, folder: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._memory = memory
        self._folder = folder
        self._clock = clock
        self._in_memory: OrderedDict[str, _Packed] = OrderedDict()
        self._in_files: dict[str, _Spilled] = {}
        self._num_bytes = 0
        self._folder_rests_until = float("-inf")
        if folder is not None:
            for leftover in folder.glob("*" + _SUFFIX):
                _delete(leftover)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._in_memory or model_id in self._in_files

    @property
    def num_bytes(self) -> int:
        """Bytes of arrays that are in host memory."""
        return self._num_bytes

    def put(self, model_id: str, state: State) -> None:
        """Keep a state, in the place of an older one; its arrays are held, not copied, and must not change."""
        self.drop(model_id)
        packed = _pack(state)
        self._in_memory[model_id] = packed
        self._num_bytes += packed.num_bytes
        self._spill()

    def peek(self, model_id: str) -> State:
        """The state, which stays here too: its arrays are to be read only.

        Raises:
            ModelLost: it is not here, or its file can't be read back; then it is not here any more.
        """
        if model_id in self._in_memory:
            self._in_memory.move_to_end(model_id)
            return _unpack(self._in_memory[model_id])
        spilled = self._in_files.get(model_id)
        if spilled is None:
            raise ModelLost(f"{model_id} has no parked state.")
        try:
            return _unpack(_read(spilled))
        except (OSError, SafetensorError, ValueError) as error:
            self._rest(f"the parked state of {model_id} can't be read back", error)
            self.drop(model_id)
            raise ModelLost(f"The parked state of {model_id} can't be read back: {error}") from error

    def drop(self, model_id: str) -> None:
        """Forget a state; unknown ids are fine."""
        packed = self._in_memory.pop(model_id, None)
        if packed is not None:
            self._num_bytes -= packed.num_bytes
        spilled = self._in_files.pop(model_id, None)
        if spilled is not None:
            _delete(spilled.file)

    def _spill(self) -> None:
        """Write the least recently used states to files until the others fit into memory."""
        while self._num_bytes > self._memory and self._folder is not None:
            if self._clock() < self._folder_rests_until:
                return
            model_id, packed = next(iter(self._in_memory.items()))
            file = self._folder / f"{uuid.uuid4().hex}{_SUFFIX}"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                save_file(packed.arrays, file)
            except (OSError, SafetensorError) as error:
                self._rest(f"{model_id} stays in memory: it can't be written to {self._folder}", error)
                _delete(file)
                return
            spilled = _Spilled(file, _checksum(packed.arrays), replace(packed, arrays={}))
            self.drop(model_id)
            self._in_files[model_id] = spilled
            log.debug("moved %s from host memory to %s", model_id, file)

    def _rest(self, what: str, error: Exception) -> None:
        self._folder_rests_until = self._clock() + REST_AFTER_FAILURE_S
        log.warning("%s (%s); no parked model is written for %.0f s", what, error, REST_AFTER_FAILURE_S)


def _pack(state: Any) -> _Packed:
    leaves, structure = jax.tree.flatten(state)
    arrays, zeros = {}, {}
    for number, leaf in enumerate(leaves):
        array = np.ascontiguousarray(leaf)
        if _is_zero(array):
            zeros[str(number)] = array.shape, array.dtype
        else:
            arrays[str(number)] = array
    return _Packed(structure, arrays, zeros, sum(array.nbytes for array in arrays.values()))


def _unpack(packed: _Packed) -> Any:
    leaves = []
    for number in map(str, range(packed.structure.num_leaves)):
        if number in packed.zeros:
            shape, dtype = packed.zeros[number]
            leaves.append(np.zeros(shape, dtype))
        else:
            leaves.append(packed.arrays[number])
    return jax.tree.unflatten(packed.structure, leaves)


def _is_zero(array: np.ndarray) -> bool:
    """Whether no bit is set: -0.0 has one."""
    flat = array.reshape(-1)
    return not flat[:1].any() and not flat.view(np.uint8).any()  # most arrays show in their first number


def _read(spilled: _Spilled) -> _Packed:
    arrays = load_file(spilled.file)
    if _checksum(arrays) != spilled.checksum:
        raise ValueError(f"{spilled.file} is not what was written")
    return replace(spilled.packed, arrays=arrays)


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    """Of names, shapes, dtypes and contents, in order of the names: what a file says in its header counts too."""
    checksum = 0
    for name in sorted(arrays):
        array = arrays[name]
        checksum = zlib.crc32(f"{name} {array.shape} {array.dtype} ".encode(), checksum)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8), checksum)
    return checksum


def _delete(file: Path) -> None:
    try:
        file.unlink()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        log.warning("%s can't be deleted: %s", file, error)
