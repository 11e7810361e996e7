"""Checkpoint folders: written whole or not at all, verified when read.

A folder is ``<base>/<model_id>/<kind of weights>/<name>``, local or in an object store: how it comes to be
there whole is in ``tx.utils.storage``. Its card ``tx_checkpoint.json`` holds the size and SHA-256 of every other file,
and what is needed to train on. What the files contain (a PEFT adapter, optimizer moments) is the caller's to say: this
module knows neither models nor SQL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tx.errors import InvalidInput, NotFound, TxError
from tx.tinker.wire.paths import TinkerPath
from tx.types import LoraConfig
from tx.utils.storage import CARD, OpenFolder, Storage, open_storage

FORMAT = 1

MIN_TTL_S = 3600
MAX_TTL_S = 10 * 365 * 86400


class BrokenCheckpoint(TxError):
    """A checkpoint's files are missing or not what was written."""


@dataclass(frozen=True)
class CheckpointCard:
    """What a checkpoint says about itself besides its files."""

    base_model: str
    lora: LoraConfig
    step: int  # optimizer steps behind these weights
    created_at: float
    num_experts_per_tok: int = 0  # of the base model as the adapter's expert rank has it; 0 is a dense model


def check_ttl(ttl_seconds: object) -> float | None:
    """A time to live in seconds or None for ever; raises InvalidInput outside an hour to ten years."""
    if ttl_seconds is None:
        return None
    if (
        not isinstance(ttl_seconds, int | float)
        or isinstance(ttl_seconds, bool)
        or not MIN_TTL_S <= ttl_seconds <= MAX_TTL_S
    ):
        raise InvalidInput("ttl_seconds", ttl_seconds, f"{MIN_TTL_S} to {MAX_TTL_S} seconds, or null for never")
    return float(ttl_seconds)


class StoredCheckpoint:
    """One version of a checkpoint, open to be read; close it with ``with``.

    Attributes:
        card: what it says about itself.
        sizes: bytes of each file by name, without the card's.
    """

    def __init__(self, shown: str, opened: OpenFolder) -> None:
        try:
            self.card, sums = parse_card(opened.card)
        except BrokenCheckpoint as error:
            raise BrokenCheckpoint(f"{shown}: {error}") from error
        self._sums = sums
        self.sizes = {name: size for name, (size, _) in sums.items()}
        self._shown = shown
        self._opened = opened

    def read(self, name: str) -> bytes:
        """A whole file, verified; raises BrokenCheckpoint naming it, or StorageError."""
        try:
            content = self._opened.read(name)
        except FileNotFoundError as error:
            raise BrokenCheckpoint(f"{self._shown}: {name} is missing") from error
        try:
            check_file(name, content, self._sums[name])
        except BrokenCheckpoint as error:
            raise BrokenCheckpoint(f"{self._shown}: {error}") from error
        return content

    def open_file(self, name: str) -> BinaryIO:
        """A file to be read piece by piece, unverified; raises NotFound for any that the card doesn't list."""
        if name not in self.sizes:
            raise NotFound("file", name, "one of " + ", ".join(self.sizes))
        try:
            return self._opened.open(name)
        except FileNotFoundError as error:
            raise BrokenCheckpoint(f"{self._shown}: {name} is missing") from error

    def is_same_as(self, other: StoredCheckpoint) -> bool:
        """Whether both are the same version."""
        return self._opened.card == other._opened.card

    def __enter__(self) -> StoredCheckpoint:
        return self

    def __exit__(self, *details: object) -> None:
        self._opened.__exit__(*details)


def parse_card(described: Any) -> tuple[CheckpointCard, dict[str, tuple[int, str]]]:
    """What the JSON of a card says, and (size, SHA-256) of each file; BrokenCheckpoint if it can't be read."""
    try:
        lora = described["lora"]
        sites = lora.get("sites")
        card = CheckpointCard(
            base_model=described["base_model"],
            lora=LoraConfig(**lora | {"sites": None if sites is None else tuple(sites)}),
            step=described["step"],
            created_at=described["created_at"],
            num_experts_per_tok=described["num_experts_per_tok"],
        )
        return card, {name: (int(sums["size"]), str(sums["sha256"])) for name, sums in described["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{CARD} can't be read ({error})") from error


def check_file(name: str, content: bytes, expected: tuple[int, str]) -> None:
    """Raises BrokenCheckpoint if a file is not what its card says."""
    if (len(content), hashlib.sha256(content).hexdigest()) != expected:
        raise BrokenCheckpoint(f"{name} is not what was written (size or SHA-256 differ)")


class CheckpointFolders:
    """The folders under one base. Any thread may call it; two writers of one path must not overlap.

    A checkpoint is named by its path, or by its folder as its row has it. Everything raises StorageError when the
    storage itself fails.

    Args:
        base: local folder, URL, or the storage that is under it.
    """

    def __init__(self, base: Path | str | Storage) -> None:
        self._storage = open_storage(base) if isinstance(base, Path | str) else base

    def write(self, path: TinkerPath, card: CheckpointCard, files: Mapping[str, bytes]) -> int:
        """Write a folder, durably and at once; an older one of that path is replaced. Returns its size in bytes."""
        sums = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
        described = {"format": FORMAT, "path": str(path), **asdict(card), "files": sums}
        return self._storage.write(path.folder, described, files)

    def open(self, where: TinkerPath | str) -> StoredCheckpoint:
        """The checkpoint as it is now, whatever happens to it later; raises NotFound, or BrokenCheckpoint."""
        folder = where if isinstance(where, str) else where.folder
        try:
            opened = self._storage.open(folder)
        except FileNotFoundError as error:
            raise NotFound("path", str(where), "a checkpoint that exists") from error
        except ValueError as error:
            raise BrokenCheckpoint(f"{where}: {CARD} can't be read ({error})") from error
        try:
            return StoredCheckpoint(str(where), opened)
        except BaseException:
            opened.__exit__()
            raise

    def read(self, where: TinkerPath | str) -> tuple[CheckpointCard, dict[str, bytes]]:
        """The card and every file, verified; raises NotFound, or BrokenCheckpoint naming the file."""
        while True:
            with self.open(where) as stored:
                try:
                    return stored.card, {name: stored.read(name) for name in stored.sizes}
                except BrokenCheckpoint:
                    with self.open(where) as now:
                        if stored.is_same_as(now):
                            raise
                    # It was overwritten while we read, and the old files are gone: read the new ones.

    def card(self, where: TinkerPath | str) -> CheckpointCard:
        """The card alone, without verifying the files."""
        with self.open(where) as stored:
            return stored.card

    def delete(self, where: TinkerPath | str) -> None:
        """Remove a folder; one that is not there is fine."""
        self._storage.delete(where if isinstance(where, str) else where.folder)

    def sweep(self, model_ids: Container[str] | None = None) -> int:
        """Remove what crashes left half-written of these models, or of all. Returns how many folders or versions.

        Nobody may be writing checkpoints of those models meanwhile.
        """

        def owned(folder: str) -> bool:
            return model_ids is None or folder.partition("/")[0] in model_ids

        return self._storage.sweep(owned)

    def check(self) -> None:
        """Write, read and remove a small file; raises StorageError if that can't be done."""
        self._storage.check()
