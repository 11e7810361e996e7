"""A folder is whole or absent, and of one version, on a disk and in real object stores."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

from tests.support.folders import FOLDER, NEW, OLD, every, read
from tx.errors import StorageError
from tx.utils.object_storage import ObjectStorage
from tx.utils.storage import CARD, LocalStorage, check_url, is_url, open_storage


@pytest.fixture(params=["local", "s3", "memory", "objects on disk"])
def storage(request, tmp_path, monkeypatch):
    """Each kind: the local one, a real S3 endpoint by URL, and two stores that stand for gs:// and az://."""
    if request.param == "local":
        return LocalStorage(tmp_path / "base")
    if request.param == "s3":
        server = request.getfixturevalue("s3_server")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = f"bucket-{uuid.uuid4().hex}"
        server.make_bucket(bucket)
        return open_storage(f"s3://{bucket}/some/prefix")
    store = MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "objects", mkdir=True)
    return ObjectStorage(store, "the store")


# ---- every kind ----


def test_what_is_written_is_read(storage):
    assert read(storage) is None
    size = storage.write(FOLDER, *NEW)
    assert read(storage) == NEW
    assert size > sum(map(len, NEW[1].values()))
    assert storage.sweep(every) == 0
    assert read(storage) == NEW


def test_overwriting_replaces_everything(storage):
    storage.write(FOLDER, *OLD)
    storage.write(FOLDER, *NEW)
    assert read(storage) == NEW
    with storage.open(FOLDER) as opened, pytest.raises(FileNotFoundError):
        opened.read("c.bin")
    assert storage.sweep(every) == 0, "nothing is left of the old one"


def test_a_reader_never_mixes_versions(storage):
    """Overwritten between two files, a reader gets the old file or none, never the new one of that name."""
    storage.write(FOLDER, *OLD)
    with storage.open(FOLDER) as opened:
        assert opened.read("a.json") == b"old a"
        storage.write(FOLDER, *NEW)
        with pytest.raises(FileNotFoundError):
            opened.read("b.bin")


def test_deleting_takes_one_folder_and_is_repeatable(storage):
    neighbour = "s:train:0/weights/ck10"
    storage.write(FOLDER, *OLD)
    storage.write(neighbour, *NEW)
    storage.delete(FOLDER)
    storage.delete(FOLDER)
    assert read(storage) is None
    assert read(storage, neighbour) == NEW
    assert storage.sweep(every) == 0


def test_files_are_read_in_pieces_and_from_anywhere(storage):
    content = bytes(range(251)) * 200_000  # 50 MB: more than three ranges
    storage.write(FOLDER, {}, {"big": content, "empty": b""})
    with storage.open(FOLDER) as opened, opened.open("big") as file:
        assert file.read(1000) == content[:1000]
        assert file.seek(20_000_000) == 20_000_000
        assert file.read(20_000_000) == content[20_000_000:40_000_000]
        assert file.seek(-7, 2) == len(content) - 7
        assert file.read() == content[-7:]
        assert file.read() == b""
        assert opened.read("empty") == b""
        assert opened.read("big") == content


def test_a_card_that_is_not_json_is_told_from_a_missing_one(storage, tmp_path):
    storage.write(FOLDER, *OLD)
    for broken in (b"{", b"[]"):
        if isinstance(storage, LocalStorage):
            (tmp_path / "base" / FOLDER / CARD).write_bytes(broken)
        else:
            storage._store.put(f"{FOLDER}/{CARD}", broken)
        with pytest.raises(ValueError):
            storage.open(FOLDER)
    assert storage.sweep(every) == 0
    storage.delete(FOLDER)
    assert read(storage) is None


def test_a_base_that_can_be_written_passes_the_check(storage):
    storage.check()
    storage.check()
    assert storage.sweep(every) == 0


def test_a_local_sweep_touches_only_what_is_owned(tmp_path):
    for name in ("s/weights/x~1", "t/weights/x~1", "s/weights/y"):
        (tmp_path / name).mkdir(parents=True)
    assert LocalStorage(tmp_path).sweep(lambda folder: folder.startswith("s/")) == 1
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/*")} == {"t/weights/x~1", "s/weights/y"}


def test_a_disk_that_refuses_says_why(tmp_path):
    (tmp_path / "base").write_text("a file, not a folder")
    storage = LocalStorage(tmp_path / "base")
    with pytest.raises(StorageError, match=r"base can't be written: (Not a directory|File exists)"):
        storage.write(FOLDER, *NEW)
    with pytest.raises(StorageError, match="can't be written"):
        storage.check()


# ---- which base ----


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("gs://bucket_1/a/b.c/", "gs://bucket_1/a/b.c"),
        ("az://container/a b", "az://container/a b"),
    ],
)
def test_urls_are_kept_in_one_spelling(given, kept):
    assert is_url(given)
    assert check_url(given) == kept


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "s3:/b", "s3://", "s3://k:s@b/p", "s3://b//p", "s3://b/p?x=1", "file:///x"]
)
def test_urls_that_cannot_be_served_say_what_can(url):
    assert is_url(url)
    with pytest.raises(ValueError, match="s3://, gs://, az://"):
        check_url(url)


def test_folders_are_not_urls(tmp_path):
    for folder in ("/x", "x", "./a:b/c", "~/x", "C:/x"):
        assert not is_url(folder)
    assert isinstance(open_storage(tmp_path), LocalStorage)
    assert isinstance(open_storage(str(tmp_path)), LocalStorage)


def test_without_the_extra_only_urls_are_refused(tmp_path):
    """In a process of its own, where the library can't be imported."""
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from tx.utils.storage import open_storage\n"
        "from pathlib import Path\n"
        f"s = open_storage(Path({str(tmp_path)!r})); s.check(); s.write('m/weights/x', {{}}, {{'a': b'1'}})\n"
        "try: open_storage('s3://b')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("StartupError --checkpoints-base s3://b needs the extra `cloud`")
    assert json.loads((tmp_path / "m/weights/x" / CARD).read_text()) == {}
    assert Path(tmp_path / "m/weights/x/a").read_bytes() == b"1"
