"""Folders of files that exist whole or not at all, under one base: a local folder or a bucket of an object store.

A folder has a card, a JSON object that its writer fills in, and files. Names of folders are relative to the base, with
``/`` between their three parts. Whoever opened a folder sees one version of it, also while it is overwritten: the files
that were there when it was opened, or FileNotFoundError for those that have been removed since.

**Local**: ``<base>/<folder>/<file>``, the card beside the files. A folder is staged beside its place, synced and
renamed.

**Object store** (``s3://``, ``gs://``, ``az://``; needs the extra ``cloud``): ``tx.utils.object_storage``.

Two writers of one folder must not overlap; otherwise any thread and process may call anything here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tx.errors import StorageError

CARD = "tx_checkpoint.json"
SCHEMES = ("s3", "gs", "az")

Card = dict[str, Any]

_OLD = "-old"
"""Ending of a local folder that is being replaced."""


class OpenFolder(Protocol):
    """One version of a folder; to be closed, or used with ``with``."""

    card: Card

    def read(self, name: str) -> bytes:
        """A whole file; raises FileNotFoundError if it is gone, StorageError if the storage fails."""

    def open(self, name: str) -> BinaryIO:
        """A file to be read piece by piece, seekable; raises as ``read`` does, now or while reading."""

    def __enter__(self) -> OpenFolder: ...

    def __exit__(self, *_: object) -> None: ...


class Storage(Protocol):
    """What a base can do. Everything but ``open`` raises only StorageError, with the reason."""

    def write(self, folder: str, card: Card, files: Mapping[str, bytes]) -> int:
        """Write a folder durably and at once, an older one of that name is replaced. Returns its size in bytes."""

    def open(self, folder: str) -> OpenFolder:
        """The folder as it is now; raises FileNotFoundError without one, ValueError if its card is not JSON."""

    def delete(self, folder: str) -> None:
        """Remove a folder; one that is not there is fine."""

    def sweep(self, owned: Callable[[str], bool]) -> int:
        """Remove what crashes left of folders for which ``owned`` is true; nobody may be writing those. How many."""

    def check(self) -> None:
        """Write, read and remove a small file."""


def is_url(base: str) -> bool:
    """Whether a base is meant as a URL: a scheme of two letters or more, then a colon and a slash."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", base) is not None


def check_url(url: str) -> str:
    """A URL of a bucket without a slash at its end; raises ValueError with one sentence on what is accepted."""
    match = re.fullmatch(r"(\w+)://([A-Za-z0-9._-]+)((?:/[^/?#]+)*)/*", url)
    if match is None or match[1] not in SCHEMES:
        schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(
            f"It should be a folder, or a bucket and maybe a prefix after one of {schemes}, without credentials"
        )
    return f"{match[1]}://{match[2]}{match[3]}"


def open_storage(base: Path | str) -> Storage:
    """The storage under a local folder or a URL; raises StartupError if its library or its settings are missing."""
    if isinstance(base, str) and is_url(base):
        from tx.utils.object_storage import ObjectStorage, connect  # it imports this module

        return ObjectStorage(connect(check_url(base)), base)
    return LocalStorage(Path(base))


def encode_card(card: Card) -> bytes:
    """As it is written."""
    return json.dumps(card, indent=1).encode()


def decode_card(content: bytes) -> Card:
    """As it was written; raises ValueError if it is no JSON object."""
    card = json.loads(content)
    if not isinstance(card, dict):
        raise ValueError("it is not a JSON object")
    return card


class LocalStorage:
    """Folders of a file system."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def write(self, folder: str, card: Card, files: Mapping[str, bytes]) -> int:
        """As ``Storage.write``."""
        target = self._base / folder
        staging = target.with_name(f"{target.name}~{uuid.uuid4().hex}")  # no client may have "~" in a name
        try:
            with self._reasons("written"):
                target.parent.mkdir(parents=True, exist_ok=True)
                staging.mkdir()
                described = encode_card(card)
                for name, content in {**files, CARD: described}.items():
                    _write_synced(staging / name, content)
                _sync_folder(staging)
                self._swap_in(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return len(described) + sum(len(content) for content in files.values())

    def open(self, folder: str) -> OpenFolder:
        """As ``Storage.open``."""
        with self._reasons("read"):
            descriptor = os.open(self._base / folder, os.O_RDONLY | os.O_DIRECTORY)
        opened = _LocalFolder(descriptor, self)
        try:
            opened.card = decode_card(opened.read(CARD))
        except BaseException:
            os.close(descriptor)
            raise
        return opened

    def delete(self, folder: str) -> None:
        """As ``Storage.delete``."""
        target = self._base / folder
        gone = target.with_name(f"{target.name}~{uuid.uuid4().hex}")
        try:
            with self._reasons("deleted"):
                target.rename(gone)  # at once: a reader sees all of it or none
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self, owned: Callable[[str], bool]) -> int:
        """As ``Storage.sweep``."""
        removed = 0
        with self._reasons("swept"):
            for leftover in sorted(self._base.glob("*/*/*~*")):
                target = leftover.with_name(leftover.name.partition("~")[0])
                if not owned(target.relative_to(self._base).as_posix()):
                    continue
                if not target.exists() and leftover.name.endswith(_OLD):
                    leftover.rename(target)  # the crash came between the two renames of a replacement
                else:
                    shutil.rmtree(leftover, ignore_errors=True)
                    removed += 1
        return removed

    def check(self) -> None:
        """As ``Storage.check``."""
        with self._reasons("written"):
            self._base.mkdir(parents=True, exist_ok=True)
            probe = self._base / f"tx_check-{uuid.uuid4().hex}"
            _write_synced(probe, b"tx")
            probe.unlink()

    def _swap_in(self, staging: Path, target: Path) -> None:
        old = None
        if target.exists():
            # A non-empty folder can't be renamed over: step aside first, and let sweep() undo it after a crash.
            old = target.with_name(f"{target.name}~{uuid.uuid4().hex}{_OLD}")
            target.rename(old)
        staging.rename(target)
        _sync_folder(target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def _reasons(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and verb != "written":
                raise
            raise StorageError(f"{self._base} can't be {verb}: {error.strerror or error}") from error


class _LocalFolder:
    """Files by the folder's descriptor: a folder that steps aside takes its reader along."""

    card: Card

    def __init__(self, descriptor: int, storage: LocalStorage) -> None:
        self._descriptor = descriptor
        self._storage = storage

    def read(self, name: str) -> bytes:
        with self.open(name) as file, self._storage._reasons("read"):
            return file.read()

    def open(self, name: str) -> BinaryIO:
        with self._storage._reasons("read"):
            return os.fdopen(os.open(name, os.O_RDONLY, dir_fd=self._descriptor), "rb")

    def __enter__(self) -> OpenFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
