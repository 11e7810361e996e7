"""Checkpoint folders: written whole or not at all, verified when read, deleted when expired.

A folder is ``<base>/<model_id>/<weights|sampler_weights>/<name>``. It is written beside its place, synced and renamed,
so a folder under its own name is complete. ``tx_checkpoint.json`` holds the size and SHA-256 of every other file, and
what is needed to train on. What the files contain (a PEFT adapter, optimizer moments) is the caller's to say: this
module knows neither models nor SQL.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tx.errors import InvalidInput, NotFound, TxError
from tx.tinker.wire.paths import TinkerPath
from tx.types import LoraConfig

CARD = "tx_checkpoint.json"
FORMAT = 1

_OLD = "-old"
"""Ending of a folder that is being replaced."""

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


class CheckpointFolders:
    """The folders under one base folder. Any thread may call it; two writers of one path must not overlap."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def folder(self, path: TinkerPath) -> Path:
        """Where ``path`` lives, whether or not it exists."""
        return self._base / path.folder

    def write(self, path: TinkerPath, card: CheckpointCard, files: Mapping[str, bytes]) -> int:
        """Write a folder, durably and at once; an older one of that path is replaced. Returns its size in bytes."""
        target = self.folder(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f"{target.name}~{uuid.uuid4().hex}")  # no client may have "~" in a name
        staging.mkdir()
        try:
            sums = {name: _write_synced(staging / name, content) for name, content in files.items()}
            described = {"format": FORMAT, "path": str(path), **asdict(card), "files": sums}
            _write_synced(staging / CARD, json.dumps(described, indent=1).encode())
            _sync_folder(staging)
            self._swap_in(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return folder_bytes(target)

    def read(self, path: TinkerPath) -> tuple[CheckpointCard, dict[str, bytes]]:
        """The card and every file, verified; raises NotFound, or BrokenCheckpoint naming the file."""
        folder = self.folder(path)
        card, sums = self._read_card(path)
        files = {}
        for name, expected in sums.items():
            try:
                content = (folder / name).read_bytes()
            except OSError as error:
                raise BrokenCheckpoint(f"{path}: {name} can't be read ({error.strerror})") from error
            try:
                check_file(name, content, expected)
            except BrokenCheckpoint as error:
                raise BrokenCheckpoint(f"{path}: {error}") from error
            files[name] = content
        return card, files

    def card(self, path: TinkerPath) -> CheckpointCard:
        """The card alone, without verifying the files."""
        return self._read_card(path)[0]

    def delete(self, path: TinkerPath) -> None:
        """Remove a folder; one that is not there is fine."""
        target = self.folder(path)
        gone = target.with_name(f"{target.name}~{uuid.uuid4().hex}")
        try:
            target.rename(gone)  # at once: a reader sees all of it or none
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> int:
        """Remove what a crash left half-written; how many folders. Call it while nobody writes."""
        removed = 0
        for leftover in sorted(self._base.glob("*/*/*~*")):
            target = leftover.with_name(leftover.name.partition("~")[0])
            if not target.exists() and leftover.name.endswith(_OLD):
                leftover.rename(target)  # the crash came between the two renames of a replacement
            else:
                shutil.rmtree(leftover, ignore_errors=True)
                removed += 1
        return removed

    def _read_card(self, path: TinkerPath) -> tuple[CheckpointCard, dict[str, dict[str, object]]]:
        try:
            return parse_card((self.folder(path) / CARD).read_bytes())
        except FileNotFoundError as error:
            raise NotFound("path", str(path), "a checkpoint that exists") from error
        except (BrokenCheckpoint, OSError) as error:
            raise BrokenCheckpoint(f"{path}: {error}") from error

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


def parse_card(content: bytes) -> tuple[CheckpointCard, dict[str, dict[str, object]]]:
    """A folder's card, and ``size`` and ``sha256`` of each of its files; BrokenCheckpoint if it can't be read."""
    try:
        described = json.loads(content)
        lora = described["lora"]
        sites = lora.get("sites")
        card = CheckpointCard(
            base_model=described["base_model"],
            lora=LoraConfig(**lora | {"sites": None if sites is None else tuple(sites)}),
            step=described["step"],
            created_at=described["created_at"],
            num_experts_per_tok=described["num_experts_per_tok"],
        )
        return card, described["files"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{CARD} can't be read ({error})") from error


def check_file(name: str, content: bytes, expected: Mapping[str, object]) -> None:
    """Raises BrokenCheckpoint if a file is not what its card says."""
    if len(content) != expected["size"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise BrokenCheckpoint(f"{name} is not what was written (size or SHA-256 differ)")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in one checkpoint folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def _write_synced(file: Path, content: bytes) -> dict[str, object]:
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
