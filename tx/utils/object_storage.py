"""Folders in a bucket of an object store (``s3://``, ``gs://``, ``az://``): there is no rename, but one object is
replaced at once::

    <folder>/tx_checkpoint.json     the card; it names the version that counts
    <folder>/<version>/<file>       never overwritten

So a writer puts its files under a version of its own, then the card, which is the commit; then it removes the old
version. What a crash leaves is never named by a card, and ``sweep`` removes it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, BinaryIO

from tx.errors import StartupError, StorageError
from tx.utils.storage import CARD, Card, OpenFolder, decode_card, encode_card

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore.store import ObjectStore

log = logging.getLogger(__name__)

_VERSION = re.compile(r"[0-9a-f]{32}")

_PIECE_BYTES = 16 * 2**20
"""Objects are read in ranges of this size: a request has to be over within the time limit."""

_TIMEOUT = timedelta(seconds=60)
_CONNECT_TIMEOUT = timedelta(seconds=5)
_RETRY_TIMEOUT = timedelta(seconds=60)
_MAX_RETRIES = 6  # doubling from 0.1 s: about six seconds of waiting in all


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
        described = encode_card({**card, "version": version})
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
            card = decode_card(bytes(self._store.get(f"{folder}/{CARD}").bytes()))
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


def connect(url: str) -> ObjectStore:
    """The bucket of a URL, with the credentials that its provider's usual environment variables hold.

    Raises:
        StartupError: the extra ``cloud`` is missing, or the settings are.
    """
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
