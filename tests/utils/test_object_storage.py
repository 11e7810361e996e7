"""Object stores: the process dies, or an operation fails, at every instant of a write; what each failure is called."""

from __future__ import annotations

import uuid
from datetime import timedelta

import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore, S3Store

from tests.support.folders import FOLDER, NEW, OLD, every, read
from tests.support.object_stores import CREDENTIALS, WatchedStore, answering, silent
from tx.errors import StartupError, StorageError
from tx.utils.object_storage import ObjectStorage
from tx.utils.storage import CARD, open_storage


class Died(BaseException):
    """Stands for the process being killed: nothing may handle it."""


# ---- a fault right before the n-th operation ----


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
