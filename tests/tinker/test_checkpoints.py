"""A checkpoint folder is whole or absent, whatever moment the process dies at, and is verified when read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tx.errors import InvalidInput, NotFound
from tx.tinker import checkpoints
from tx.tinker.checkpoints import BrokenCheckpoint, CheckpointCard, CheckpointFolders, check_ttl
from tx.tinker.wire.paths import TinkerPath, parse_path
from tx.types import LoraConfig

PATH = parse_path("tinker://s:train:0/weights/ck1")
CARD = CheckpointCard("tiny/qwen3", LoraConfig(rank=4, seed=7, train_mlp=False), step=3, created_at=12.5)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 10}


class Died(BaseException):
    """Stands for the process being killed: nothing may handle it."""


@pytest.fixture
def folders(tmp_path: Path) -> CheckpointFolders:
    return CheckpointFolders(tmp_path)


def names(folders: CheckpointFolders) -> list[str]:
    parent = folders.folder(PATH).parent
    return sorted(entry.name for entry in parent.iterdir()) if parent.exists() else []


def test_what_is_written_is_read(folders):
    size = folders.write(PATH, CARD, FILES)
    assert folders.read(PATH) == (CARD, FILES)
    assert folders.card(PATH) == CARD
    assert size == sum(file.stat().st_size for file in folders.folder(PATH).iterdir())
    assert names(folders) == ["ck1"]


def test_overwriting_replaces_everything(folders):
    folders.write(PATH, CARD, FILES | {"optimizer.safetensors": b"m"})
    folders.write(PATH, CARD, {"adapter_config.json": b"new"})
    assert folders.read(PATH)[1] == {"adapter_config.json": b"new"}
    assert names(folders) == ["ck1"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(folders, damage):
    folders.write(PATH, CARD, FILES)
    file = folders.folder(PATH) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[100] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    with pytest.raises(BrokenCheckpoint, match=r"ck1: adapter_model\.safetensors"):
        folders.read(PATH)


def test_a_damaged_card_is_named_and_a_missing_folder_is_not_found(folders):
    with pytest.raises(NotFound, match="tinker://s:train:0/weights/ck1"):
        folders.read(PATH)
    folders.write(PATH, CARD, FILES)
    card = folders.folder(PATH) / checkpoints.CARD
    card.write_text(json.dumps({"format": 1}))
    with pytest.raises(BrokenCheckpoint, match=checkpoints.CARD):
        folders.read(PATH)


# Every system call that changes the disk, in order: what if the process dies right before the n-th?
def steps_of_a_write(monkeypatch, die_at: int | None) -> list[str]:
    calls: list[str] = []

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            if len(calls) == die_at:
                raise Died
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(os, "fsync")
    watch(Path, "rename")
    # A killed process cleans nothing up: leave out what the writer does on its way out.
    real_rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None if len(calls) == die_at else real_rmtree(*a, **k))
    return calls


@pytest.mark.parametrize("replacing", [False, True])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, replacing):
    with monkeypatch.context() as patch:
        calls = steps_of_a_write(patch, None)
        folders = CheckpointFolders(tmp_path / "count")
        if replacing:
            folders.write(PATH, CARD, {"adapter_config.json": b"old"})
            calls.clear()
        folders.write(PATH, CARD, FILES)
        num_steps = len(calls)
    assert num_steps >= 6
    outcomes = []
    for die_at in range(num_steps):
        folders = CheckpointFolders(tmp_path / str(die_at))
        if replacing:
            folders.write(PATH, CARD, {"adapter_config.json": b"old"})
        with monkeypatch.context() as patch:
            steps_of_a_write(patch, die_at)
            with pytest.raises(Died):
                folders.write(PATH, CARD, FILES)
        folders.sweep()
        assert names(folders) in ([], ["ck1"])
        outcomes.append(folders.read(PATH)[1] if names(folders) else None)
    before = {"adapter_config.json": b"old"} if replacing else None
    assert all(outcome in (before, FILES) for outcome in outcomes)
    assert outcomes[0] == before


def test_deleting_removes_the_folder_and_is_repeatable(folders):
    folders.write(PATH, CARD, FILES)
    other = TinkerPath("s:train:0", "weights", "ck2")
    folders.write(other, CARD, FILES)
    folders.delete(PATH)
    folders.delete(PATH)
    assert names(folders) == ["ck2"]
    with pytest.raises(NotFound):
        folders.card(PATH)


@pytest.mark.parametrize("ttl", [3599, 10 * 365 * 86400 + 1, "1h", True, float("nan")])
def test_c12_a_ttl_out_of_range_is_refused(ttl):
    with pytest.raises(InvalidInput, match="ttl_seconds"):
        check_ttl(ttl)


def test_a_ttl_in_range_is_taken():
    assert check_ttl(None) is None
    assert check_ttl(3600) == 3600.0
