"""Folders of files that exist whole or not at all, under one base: a local folder or a bucket of an object store.

A folder has a card, a JSON object that its writer fills in, and files. Names of folders are relative to the base, with
``/`` between their three parts. Whoever opened a folder sees one version of it, also while it is overwritten: the files
that were there when it was opened, or FileNotFoundError for those that have been removed since.

**Local**: ``<base>/<folder>/<file>``, the card beside the files. A folder is staged beside its place, synced and
renamed.

**Object store** (``s3://``, ``gs://``, ``az://``; needs the extra ``cloud``): there is no rename, but one object is
replaced at once::

    <folder>/tx_checkpoint.json     the card; it names the version that counts
    <folder>/<version>/<file>       never overwritten

So a writer puts its files under a version of its own, then the card, which is the commit; then it removes the old
version. What a crash leaves is never named by a card, and ``sweep`` removes it.

Two writers of one folder must not overlap; otherwise any thread and process may call anything here.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from tx.errors import StartupError, StorageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore.store import ObjectStore

log = logging.getLogger(__name__)

CARD = "tx_checkpoint.json"
SCHEMES = ("s3", "gs", "az")

Card = dict[str, Any]

_OLD = "-old"
"""Ending of a local folder that is being replaced."""

_VERSION = re.compile(r"[0-9a-f]{32}")

_PIECE_BYTES = 16 * 2**20
"""Objects are read in ranges of this size: a request has to be over within the time limit."""

_TIMEOUT = timedelta(seconds=60)
_CONNECT_TIMEOUT = timedelta(seconds=5)
_RETRY_TIMEOUT = timedelta(seconds=60)
_MAX_RETRIES = 6  # doubling from 0.1 s: about six seconds of waiting in all


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
        return ObjectStorage(_connect(check_url(base)), base)
    return LocalStorage(Path(base))


# ---- local ----------------------------------------------------------------------------------------------------


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
                described = _encode(card)
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
            opened.card = _decode(opened.read(CARD))
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


# ---- object stores --------------------------------------------------------------------------------------------


class ObjectStorage:
    """Folders of a bucket.

    Args:
        store: the bucket, with the prefix of the base.
        shown: what error messages call it.
    """

    def __init__(self, store: ObjectStore, shown: str) -> None:
        self._store = store
        self._shown = shown

    def write(self, folder: str, card: Card, files: Mapping[str, bytes]) -> int:
        """As ``Storage.write``."""
        version = uuid.uuid4().hex
        described = _encode({**card, "version": version})
        try:
            with self._reasons("written"):
                for name, content in files.items():
                    self._store.put(f"{folder}/{version}/{name}", content)
        except BaseException:
            self._clean_up(f"{folder}/{version}")
            raise
        with self._reasons("written"):
            # If this fails it may have happened all the same: from here on the new version stays until a sweep.
            self._store.put(f"{folder}/{CARD}", described)
        self._clean_up(folder, but=version)
        return len(described) + sum(len(content) for content in files.values())

    def open(self, folder: str) -> OpenFolder:
        """As ``Storage.open``."""
        with self._reasons("read"):
            card = _decode(bytes(self._store.get(f"{folder}/{CARD}").bytes()))
        if not isinstance(card.get("version"), str):
            raise ValueError("it names no version")
        return _ObjectFolder(card, f"{folder}/{card['version']}", self)

    def delete(self, folder: str) -> None:
        """As ``Storage.delete``; what another writer is putting there stays."""
        try:
            version = self._version(folder)
        except FileNotFoundError:
            return
        self._delete([f"{folder}/{CARD}"])
        if version is not None:
            self._clean_up(f"{folder}/{version}")

    def sweep(self, owned: Callable[[str], bool]) -> int:
        """As ``Storage.sweep``; it lists every object under the base."""
        cards: set[str] = set()
        versions: defaultdict[str, set[str]] = defaultdict(set)
        for path in self._list(""):
            parts = path.split("/")
            folder = "/".join(parts[:3])
            if len(parts) == 4 and parts[3] == CARD:
                cards.add(folder)
            elif len(parts) == 5 and _VERSION.fullmatch(parts[3]):
                versions[folder].add(parts[3])
        removed = 0
        for folder, found in versions.items():
            if not owned(folder) or (folder in cards and len(found) == 1):
                continue
            with contextlib.suppress(FileNotFoundError):
                named = self._version(folder) if folder in cards else ""
                if named is not None:  # what an unreadable card means is not for us to say
                    leftovers = [path for version in found - {named} for path in self._list(f"{folder}/{version}")]
                    self._delete(leftovers)
                    removed += len(found - {named})
        return removed

    def check(self) -> None:
        """As ``Storage.check``."""
        probe = f"tx_check-{uuid.uuid4().hex}"
        try:
            with self._reasons("written"):
                self._store.put(probe, b"tx")
            with self._reasons("read"):
                self._store.get(probe).bytes()
            with self._reasons("deleted"):
                self._store.delete(probe)
        except FileNotFoundError as error:
            raise StorageError(f"{self._shown} can't be read: what was just written is not there") from error

    def _version(self, folder: str) -> str | None:
        """The version that counts, None if the card can't be understood; raises FileNotFoundError without a card."""
        try:
            with self.open(folder) as opened:
                return str(opened.card["version"])
        except ValueError:
            return None

    def _list(self, folder: str) -> list[str]:
        with self._reasons("listed"):
            return [found["path"] for page in self._store.list(folder or None) for found in page]

    def _delete(self, paths: list[str]) -> None:
        with self._reasons("deleted"), contextlib.suppress(FileNotFoundError):  # S3 never says so, the others do
            if paths:
                self._store.delete(paths)

    def _clean_up(self, folder: str, but: str | None = None) -> None:
        """Remove what is not needed any more, all of ``folder`` or all but its card and one version, if it can be."""
        kept = () if but is None else (f"{folder}/{CARD}", f"{folder}/{but}/")
        try:
            self._delete([path for path in self._list(folder) if not path.startswith(kept)])
        except StorageError as error:
            log.warning("What is left of %s stays until a sweep: %s", folder, error)

    @contextlib.contextmanager
    def _reasons(self, verb: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            if verb == "written" or re.search("NoSuchBucket|ContainerNotFound", str(error)):
                raise StorageError(f"{self._shown} can't be {verb}: there is no such bucket") from error
            raise
        except (BaseError, OSError) as error:
            raise StorageError(f"{self._shown} can't be {verb}: {_reason(error)}") from error


class _ObjectFolder:
    """The files of one version."""

    def __init__(self, card: Card, prefix: str, storage: ObjectStorage) -> None:
        self.card = card
        self._prefix = prefix
        self._storage = storage

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        path = f"{self._prefix}/{name}"
        with self._storage._reasons("read"):
            size = self._storage._store.head(path)["size"]
        return io.BufferedReader(_ObjectFile(path, size, self._storage), _PIECE_BYTES)

    def __enter__(self) -> OpenFolder:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _ObjectFile(io.RawIOBase):
    """An object read in ranges, so that no request takes long."""

    def __init__(self, path: str, size: int, storage: ObjectStorage) -> None:
        self._path = path
        self._size = size
        self._storage = storage
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        room = memoryview(buffer).cast("B")
        length = min(len(room), self._size - self._position, _PIECE_BYTES)
        if length <= 0:
            return 0
        with self._storage._reasons("read"):
            piece = self._storage._store.get_range(self._path, start=self._position, length=length)
        room[: len(piece)] = memoryview(piece)
        self._position += len(piece)
        return len(piece)

    def readall(self) -> bytes:
        content = bytearray(max(0, self._size - self._position))
        filled = 0
        while filled < len(content):
            filled += self.readinto(memoryview(content)[filled:])
        return bytes(content)


def _connect(url: str) -> ObjectStore:
    """The bucket of a URL, with the credentials that its provider's usual environment variables hold."""
    try:
        from obstore import exceptions, store
    except ImportError as error:
        raise StartupError(
            f"--checkpoints-base {url} needs the extra `cloud`: install it with `uv sync --extra cloud`, "
            "or with pip as tx[cloud]."
        ) from error
    kind = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[url.partition("://")[0]]
    bucket, _, prefix = url.partition("://")[2].partition("/")
    endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    try:
        return kind(
            bucket,
            prefix=prefix or None,
            client_options={
                "timeout": _TIMEOUT,
                "connect_timeout": _CONNECT_TIMEOUT,
                # Plain HTTP only where the endpoint itself says so, as with a store in the same network.
                "allow_http": any(endpoint.startswith("http://") for endpoint in endpoints),
            },
            retry_config={"max_retries": _MAX_RETRIES, "retry_timeout": _RETRY_TIMEOUT},
        )
    except (exceptions.BaseError, ValueError, OSError) as error:
        raise StartupError(f"--checkpoints-base {url} can't be used: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """Why an object store failed, in one line: its own code and message if it gave any, never a signed query."""
    text = str(error)
    head, _, debug = text.partition("\n\nDebug source:")
    kinds = {"UnauthenticatedError": "the credentials are not accepted", "PermissionDeniedError": "permission denied"}
    transport = {"Connect": "no connection", "Timeout": "it took too long"}
    found = re.search(r"kind: (Connect|Timeout)\b", debug)
    what = transport[found[1]] if found is not None else kinds.get(type(error).__name__, "")
    code, message = re.search(r"<Code>(.*?)</Code>", head), re.search(r"<Message>(.*?)</Message>", head, re.DOTALL)
    said = ": ".join(match[1].strip() for match in (code, message) if match is not None)
    detail = said or re.sub(r"\?\S*", "", head.strip().partition("\n")[0])
    return f"{what} ({detail[:300]})" if what else detail[:300]


# ---- cards ----------------------------------------------------------------------------------------------------


def _encode(card: Card) -> bytes:
    return json.dumps(card, indent=1).encode()


def _decode(content: bytes) -> Card:
    card = json.loads(content)
    if not isinstance(card, dict):
        raise ValueError("it is not a JSON object")
    return card
