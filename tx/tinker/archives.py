"""A checkpoint's files as one tar, made while it is sent: nothing is held but the piece under way.

Plain tar and not compressed: float32 weights barely shrink, and so its length is known beforehand.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

PIECE_BYTES = 2**20

COMPLETE = "checkpoint_complete"
"""Empty last entry: older SDKs' ``push-hf`` takes an archive without it for a broken one."""


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, piece by piece; it is closed at the end."""
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def num_bytes(sizes: Mapping[str, int]) -> int:
    """Length of the tar of files of these sizes."""
    entries = {**sizes, COMPLETE: 0}.items()
    return sum(len(_header(name, size, 0)) + size + len(_padding(size)) for name, size in entries) + len(_END)


def tar(sizes: Mapping[str, int], created_at: float, open_file: Callable[[str], BinaryIO]) -> Iterator[bytes]:
    """The tar, piece by piece.

    Args:
        sizes: bytes of each file, by name.
        created_at: time of every entry, in UTC seconds.
        open_file: a file of that name, at its start.
    """
    for name, size in sizes.items():
        yield _header(name, size, created_at)
        yield from pieces(open_file(name))
        yield _padding(size)
    yield _header(COMPLETE, 0, created_at)
    yield _END


_END = bytes(2 * tarfile.BLOCKSIZE)


def _header(name: str, size: int, created_at: float) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, int(created_at), 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)  # its sizes may be past 8 GiB


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
