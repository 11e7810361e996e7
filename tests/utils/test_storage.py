"""A folder is whole or absent, and of one version, on a disk and in real object stores, whatever fails and when."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from obstore.exceptions import GenericError
from obstore.store import LocalStore, MemoryStore, S3Store

from tests.support.object_stores import CREDENTIALS, WatchedStore, answering, silent
from tx.errors import StartupError, StorageError
from tx.utils.storage import CARD, LocalStorage, ObjectStorage, check_url, is_url, open_storage

FOLDER = "s:train:0/weights/ck1"
OLD = ({"step": 1}, {"a.json": b"old a", "b.bin": b"old b", "c.bin": b"only in the old one"})
NEW = ({"step": 2}, {"a.json": b"new a", "b.bin": bytes(range(256)) * 50})


class Died(BaseException):
    """Stands for the process being killed: nothing may handle it."""


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


def read(storage, folder=FOLDER):
    """What a reader sees: card and files, None without a folder."""
    try:
        opened = storage.open(folder)
    except FileNotFoundError:
        return None
    with opened:
        card = {key: value for key, value in opened.card.items() if key != "version"}
        return card, {name: opened.read(name) for name in {1: OLD, 2: NEW}[card["step"]][1]}


def every(_folder: str) -> bool:
    return True


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


# ---- object stores: the process dies, or an operation fails, right before the n-th ----


def written_with_fault(n: int, fault: BaseException, lasts: bool) -> tuple[ObjectStorage, BaseException | None, int]:
    """The old folder overwritten by the new one, with a fault at operation ``n``; what was raised; operations seen."""
    store = MemoryStore()
    ObjectStorage(store, "the store").write(FOLDER, *OLD)
    seen = 0

    def before(_operation: str, _path: object) -> None:
        nonlocal seen
        seen += 1
        if seen == n or (lasts and seen > n):
            raise fault

    raised = None
    try:
        ObjectStorage(WatchedStore(store, before), "the store").write(FOLDER, *NEW)
    except (Died, StorageError) as error:
        raised = error
    return ObjectStorage(store, "the store"), raised, seen


NUM_OPERATIONS = written_with_fault(0, Died(), False)[2]


def test_operations_are_counted():
    assert NUM_OPERATIONS == 5, "two files, the card, a listing, a removal"


@pytest.mark.parametrize("n", range(1, NUM_OPERATIONS + 1))
def test_a_crash_leaves_one_whole_version_and_a_sweep_removes_the_rest(n):
    storage, raised, _ = written_with_fault(n, Died(), lasts=True)
    assert isinstance(raised, Died)
    expected = OLD if n <= 3 else NEW
    assert read(storage) == expected
    assert storage.sweep(every) == (1 if n > 1 else 0)
    assert read(storage) == expected
    assert storage.sweep(every) == 0
    num_objects = len(storage._list(""))
    assert num_objects == len(expected[1]) + 1


@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("n", range(1, NUM_OPERATIONS + 1))
def test_a_failure_before_the_card_fails_the_write_and_after_it_does_not(n, lasts):
    storage, raised, _ = written_with_fault(n, GenericError("no route to host"), lasts)
    if n <= 3:
        assert isinstance(raised, StorageError)
        assert "the store can't be written: no route to host" in str(raised)
        assert read(storage) == OLD
    else:
        assert raised is None
        assert read(storage) == NEW
    storage.write(FOLDER, *NEW)
    assert read(storage) == NEW
    assert storage.sweep(every) == 0, "the next write takes leftovers along"


def test_a_card_that_arrived_though_its_answer_did_not_is_whole():
    """The put of the card fails for the client but has happened: the files that it names must be there."""
    store = MemoryStore()

    class Late(WatchedStore):
        def put(self, path: str, content: bytes) -> None:
            store.put(path, content)
            if path.endswith(CARD):
                raise GenericError("it took too long")

    with pytest.raises(StorageError):
        ObjectStorage(Late(store, lambda *_: None), "the store").write(FOLDER, *NEW)
    assert read(ObjectStorage(store, "the store")) == NEW


def test_a_crash_while_deleting_leaves_nothing_to_be_read():
    for n in (2, 3, 4):
        store = MemoryStore()
        ObjectStorage(store, "the store").write(FOLDER, *OLD)
        calls: list[str] = []

        def before(operation: str, _path: object, calls: list[str] = calls, n: int = n) -> None:
            calls.append(operation)
            if len(calls) >= n:
                raise Died

        with pytest.raises(Died):
            ObjectStorage(WatchedStore(store, before), "the store").delete(FOLDER)
        storage = ObjectStorage(store, "the store")
        assert read(storage) == (OLD if n == 2 else None)
        storage.sweep(every)
        assert (read(storage), len(storage._list(""))) == ((OLD, 4) if n == 2 else (None, 0))


def test_deleting_leaves_alone_what_another_writer_is_putting_there():
    """The API deletes the old one while the engine uploads the next of that name."""
    store = MemoryStore()
    plain = ObjectStorage(store, "the store")
    plain.write(FOLDER, *OLD)

    def before(operation: str, path: object) -> None:
        if operation == "put" and str(path).endswith("b.bin"):
            plain.delete(FOLDER)

    ObjectStorage(WatchedStore(store, before), "the store").write(FOLDER, *NEW)
    assert read(plain) == NEW


def test_a_sweep_touches_only_what_is_owned_and_ours():
    storage = ObjectStorage(MemoryStore(), "the store")
    version = uuid.uuid4().hex
    mine, theirs = f"s:train:0/weights/x/{version}/a", f"t:train:0/weights/x/{version}/a"
    foreign = ["notes.txt", "deep/er/than/that/notes.txt", "s:train:0/weights/notes.txt"]
    for path in (mine, theirs, *foreign):
        storage._store.put(path, b"1")
    assert storage.sweep(lambda folder: folder == "s:train:0/weights/x") == 1
    assert sorted(storage._list("")) == sorted([theirs, *foreign])


def test_a_local_sweep_touches_only_what_is_owned(tmp_path):
    for name in ("s/weights/x~1", "t/weights/x~1", "s/weights/y"):
        (tmp_path / name).mkdir(parents=True)
    assert LocalStorage(tmp_path).sweep(lambda folder: folder.startswith("s/")) == 1
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/*")} == {"t/weights/x~1", "s/weights/y"}


# ---- why it failed ----


def s3(url: str) -> ObjectStorage:
    options = {"allow_http": True, "timeout": timedelta(seconds=1), "connect_timeout": timedelta(seconds=1)}
    config = {"endpoint": url, **{name.lower(): value for name, value in CREDENTIALS.items()}}
    return ObjectStorage(
        S3Store("b", prefix="p", client_options=options, retry_config={"max_retries": 0}, **config), "s3://b/p"
    )


DENIED = "<Error><Code>AccessDenied</Code><Message>You may not.</Message><Resource>secret</Resource></Error>"


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (403, DENIED, "s3://b/p can't be written: permission denied (AccessDenied: You may not.)"),
        (401, "", "s3://b/p can't be written: the credentials are not accepted ("),
        (404, "<Error><Code>NoSuchBucket</Code></Error>", "s3://b/p can't be written: there is no such bucket"),
        (503, "<Error><Code>SlowDown</Code><Message>Less.</Message></Error>", "can't be written: SlowDown: Less."),
    ],
)
def test_a_refusal_gives_the_stores_own_reason_in_one_line(status, body, reason):
    with answering(status, body) as url, pytest.raises(StorageError) as caught:
        s3(url).write(FOLDER, *NEW)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_bucket_that_is_gone_is_not_a_missing_folder():
    gone = answering(404, "<Error><Code>NoSuchBucket</Code></Error>")
    with gone as url, pytest.raises(StorageError, match="no such bucket"):
        s3(url).open(FOLDER)
    with answering(404, "<Error><Code>NoSuchKey</Code></Error>") as url, pytest.raises(FileNotFoundError):
        s3(url).open(FOLDER)


def test_nobody_there_and_no_answer_are_told_apart():
    with answering(200, "") as url:
        pass  # its port is free again
    with pytest.raises(StorageError, match="no connection"):
        s3(url).check()
    with silent() as url, pytest.raises(StorageError, match="it took too long"):
        s3(url).check()


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


@pytest.mark.parametrize(("url", "word"), [("gs://b/p", "/no/such.json"), ("az://c/p", "[Aa]ccount")])
def test_settings_that_are_missing_stop_the_start(url, word, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such.json")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StartupError, match=word):
        open_storage(url)


def test_each_scheme_has_its_own_store(monkeypatch, tmp_path):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    kinds = [type(open_storage(f"{scheme}://bucket/a/b")._store).__name__ for scheme in ("s3", "gs", "az")]
    assert kinds == ["S3Store", "GCSStore", "AzureStore"]
    assert open_storage("s3://bucket/a/b")._store.prefix == "a/b"


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
