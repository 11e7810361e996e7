"""A checkpoint folder is whole or absent, whatever moment the process dies at, and is verified when read."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from obstore.exceptions import GenericError
from obstore.store import LocalStore, MemoryStore

from tests.support.object_stores import WatchedStore
from tx.errors import InvalidInput, NotFound, StorageError
from tx.tinker.checkpoints import BrokenCheckpoint, CheckpointCard, CheckpointFolders, StoredCheckpoint, check_ttl
from tx.tinker.wire.paths import TinkerPath, parse_path
from tx.types import LoraConfig
from tx.utils import storage
from tx.utils.object_storage import ObjectStorage

PATH = parse_path("tinker://s:train:0/weights/ck1")
CARD = CheckpointCard("tiny/qwen3", LoraConfig(rank=4, seed=7, train_mlp=False), step=3, created_at=12.5)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 10}


class Died(BaseException):
    """Stands for the process being killed: nothing may handle it."""


@pytest.fixture(params=["local", "object store"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointFolders:
    """On a disk, and as objects in files below the same folder."""
    if request.param == "local":
        return CheckpointFolders(tmp_path)
    return CheckpointFolders(ObjectStorage(LocalStore(tmp_path, mkdir=True), "the store"))


def names(base: Path) -> list[str]:
    parent = (base / PATH.folder).parent
    return sorted(entry.name for entry in parent.iterdir()) if parent.exists() else []


def file_of(base: Path, name: str) -> Path:
    """A file of the checkpoint, under its version if there is one."""
    (found,) = (base / PATH.folder).rglob(name)
    return found


def test_what_is_written_is_read(folders, tmp_path):
    size = folders.write(PATH, CARD, FILES)
    assert folders.read(PATH) == folders.read(PATH.folder) == (CARD, FILES)
    assert folders.card(PATH) == folders.card(PATH.folder) == CARD
    assert size == sum(file.stat().st_size for file in (tmp_path / PATH.folder).rglob("*") if file.is_file())
    assert names(tmp_path) == ["ck1"]


def test_a_file_is_read_piece_by_piece_and_only_those_that_the_card_lists(folders):
    folders.write(PATH, CARD, FILES)
    with folders.open(PATH) as stored:
        assert stored.sizes == {name: len(content) for name, content in FILES.items()}
        with stored.open_file("adapter_model.safetensors") as file:
            assert file.read(300) == FILES["adapter_model.safetensors"][:300]
            assert file.read() == FILES["adapter_model.safetensors"][300:]
        for name in ("../../../../etc/passwd", "/etc/passwd", "optimizer.safetensors"):
            with pytest.raises(NotFound, match=r"adapter_config\.json, adapter_model\.safetensors"):
                stored.open_file(name)


def test_overwriting_replaces_everything(folders, tmp_path):
    folders.write(PATH, CARD, FILES | {"optimizer.safetensors": b"m"})
    folders.write(PATH, CARD, {"adapter_config.json": b"new"})
    assert folders.read(PATH)[1] == {"adapter_config.json": b"new"}
    assert names(tmp_path) == ["ck1"]


def test_a_reader_that_is_overtaken_by_a_writer_reads_the_new_one(folders, monkeypatch):
    """The old files go between the reader's first and second: it starts again with the new card."""
    folders.write(PATH, CARD, FILES)
    newer, real = replace(CARD, step=4), StoredCheckpoint.read

    def read(self: StoredCheckpoint, name: str) -> bytes:
        content = real(self, name)
        if self.card.step == CARD.step:
            folders.write(PATH, newer, {name: content + b"newer" for name, content in FILES.items()})
        return content

    monkeypatch.setattr(StoredCheckpoint, "read", read)
    card, files = folders.read(PATH)
    assert card == newer
    assert files == {name: content + b"newer" for name, content in FILES.items()}


@pytest.mark.parametrize("damage", ["flip", "cut", "append", "remove"])
def test_a_damaged_file_is_named(folders, tmp_path, damage):
    folders.write(PATH, CARD, FILES)
    file = file_of(tmp_path, "adapter_model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[100] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "append":
        file.write_bytes(content + b"1")
    else:
        file.unlink()
    with pytest.raises(BrokenCheckpoint, match=r"ck1: adapter_model\.safetensors"):
        folders.read(PATH)


def test_a_damaged_card_is_named_and_a_missing_folder_is_not_found(folders, tmp_path):
    with pytest.raises(NotFound, match="tinker://s:train:0/weights/ck1"):
        folders.read(PATH)
    folders.write(PATH, CARD, FILES)
    card = file_of(tmp_path, storage.CARD)
    described = json.loads(card.read_text())
    for broken in ("{", json.dumps({"format": 1}), json.dumps(described | {"files": {"a": {}}})):
        card.write_text(broken)
        with pytest.raises(BrokenCheckpoint, match=storage.CARD):
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
        found = names(tmp_path / str(die_at))
        assert found in ([], ["ck1"])
        outcomes.append(folders.read(PATH)[1] if found else None)
    before = {"adapter_config.json": b"old"} if replacing else None
    assert all(outcome in (before, FILES) for outcome in outcomes)
    assert outcomes[0] == before


def test_deleting_removes_the_folder_and_is_repeatable(folders, tmp_path):
    folders.write(PATH, CARD, FILES)
    other = TinkerPath("s:train:0", "weights", "ck2")
    folders.write(other, CARD, FILES)
    folders.delete(PATH.folder)
    folders.delete(PATH)
    assert [entry.name for entry in (tmp_path / PATH.folder).parent.iterdir() if any(entry.rglob("*.*"))] == ["ck2"]
    with pytest.raises(NotFound):
        folders.card(PATH)


def test_a_sweep_removes_what_crashes_left_of_the_models_that_it_is_told(tmp_path):
    store = MemoryStore()
    left = [f"{model}/weights/x/{'0' * 32}/a" for model in ("s:train:0", "t:train:0")]
    for path in left:
        store.put(path, b"1")
        (tmp_path / path).parent.parent.with_name("x~1").mkdir(parents=True)
    for folders in (CheckpointFolders(ObjectStorage(store, "the store")), CheckpointFolders(tmp_path)):
        assert folders.sweep({"u:train:0"}) == 0
        assert folders.sweep({"t:train:0"}) == 1
        assert folders.sweep() == 1
    assert [found["path"] for page in store.list() for found in page] == []


def test_a_storage_that_fails_is_not_a_broken_checkpoint():
    store = MemoryStore()
    CheckpointFolders(ObjectStorage(store, "s3://b")).write(PATH, CARD, FILES)

    def before(operation: str, _path: object) -> None:
        if operation == "get_range":
            raise GenericError("no route to host")

    with pytest.raises(StorageError, match="s3://b can't be read: no route to host"):
        CheckpointFolders(ObjectStorage(WatchedStore(store, before), "s3://b")).read(PATH)


@pytest.mark.parametrize("ttl", [3599, 10 * 365 * 86400 + 1, "1h", True, float("nan")])
def test_c12_a_ttl_out_of_range_is_refused(ttl):
    with pytest.raises(InvalidInput, match="ttl_seconds"):
        check_ttl(ttl)


def test_a_ttl_in_range_is_taken():
    assert check_ttl(None) is None
    assert check_ttl(3600) == 3600.0
