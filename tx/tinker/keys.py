"""API keys: ``python -m tx.tinker.keys --help`` makes, lists and revokes them; the service reads their file.

The file has one JSON object per line, one per key: ``name``, who owns what is made with the key; ``sha256`` of the
key, in hex; and, where they were given, the key's limits. The key itself is nowhere: it is printed once, when it is
made. A fast hash is the right one here. Slow ones protect passwords, which can be guessed; a key is 256 random bits,
which cannot, and every request is checked, thousands in a second.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tx.errors import InvalidInput, StartupError, TxError

PREFIX = "tml-"
"""What every key begins with: the SDK refuses others before it sends anything (protocol §1.2)."""

_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Key(BaseModel):
    """One line of the file. Limits that are None are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    max_requests_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_queued_samples: Annotated[int, Field(ge=1)] | None = None


def hash_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(file: Path) -> dict[str, Key]:
    """The keys of a file, by name.

    Raises:
        InvalidInput: it can't be read, a line is no key, or two have one name or are one key.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInput("api_keys_file", str(file), f"a file that can be read ({reason})") from error
    keys: dict[str, Key] = {}
    hashes: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key = Key.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
            raise InvalidInput("api_keys_file", f"{file}:{number}", f"a key per line ({reason})") from error
        if key.name in keys or key.sha256 in hashes:
            raise InvalidInput("api_keys_file", f"{file}:{number}", "every name and every key once")
        keys[key.name] = key
        hashes.add(key.sha256)
    return keys


def add(
    file: Path, name: str, *, max_requests_per_s: float | None = None, max_queued_samples: int | None = None
) -> str:
    """Make a key, store what is kept of it, and return it.

    Raises:
        InvalidInput: the name is taken or can't be one, a limit is out of range, or the file is broken.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput("NAME", name, "1 to 63 of the characters A-Z a-z 0-9 . _ -, the first a letter or digit")
    key = PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    try:
        row = Key(
            name=name,
            sha256=hash_of(key),
            max_requests_per_s=max_requests_per_s,
            max_queued_samples=max_queued_samples,
        )
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise InvalidInput(flag, first["input"], first["msg"]) from error
    with _changing(file) as keys:
        if name in keys:
            raise InvalidInput("NAME", name, "a name that has no key yet: revoke that one first")
        keys[name] = row
    return key


def revoke(file: Path, name: str) -> None:
    """Forget a key. What it owns stays, and belongs to the next key of that name.

    Raises:
        InvalidInput: there is no such key, or the file is broken.
    """
    with _changing(file) as keys:
        if keys.pop(name, None) is None:
            raise InvalidInput("NAME", name, "one of " + (", ".join(keys) or "none: the file has no keys"))


@contextlib.contextmanager
def _changing(file: Path) -> Iterator[dict[str, Key]]:
    """The keys, to be changed by one process at a time; readers see the old file or the new one, whole."""
    with contextlib.ExitStack() as held:
        try:
            folder = os.open(file.parent, os.O_RDONLY)
        except OSError as error:
            raise InvalidInput("--file", str(file), f"a file in a folder that exists ({error.strerror})") from error
        held.callback(os.close, folder)
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = read_keys(file) if file.exists() else {}
        yield keys
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}-", delete=False) as written:
            try:  # such a file is readable by its owner alone (0600)
                written.writelines(key.model_dump_json(exclude_none=True) + "\n" for key in keys.values())
                written.flush()
                os.fsync(written.fileno())
                os.replace(written.name, file)
            except BaseException:
                os.unlink(written.name)
                raise
        os.fsync(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a mistake ends the process with one sentence and exit code 2."""
    arguments = _parser().parse_args(argv)
    file = Path(arguments.file).expanduser().absolute()
    try:
        if arguments.command == "add":
            limits = {name: getattr(arguments, name) for name in ("max_requests_per_s", "max_queued_samples")}
            _print(add(file, arguments.name, **limits))
        elif arguments.command == "revoke":
            revoke(file, arguments.name)
        else:
            for key in read_keys(file).values():
                said = key.model_dump(exclude={"name", "sha256"}, exclude_none=True)
                _print("  ".join([key.name, key.sha256[:12], *(f"{name}={value}" for name, value in said.items())]))
    except (TxError, OSError) as error:
        print(f"tx: {StartupError(str(error))}", file=sys.stderr)  # noqa: T201 (this is the terminal's sentence)
        raise SystemExit(2) from error


def _print(line: str) -> None:
    print(line)  # noqa: T201 (the answer)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tx.tinker.keys", description="API keys of a server with --api-keys-file.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("add", help="make a key and print it, this once")
    new.add_argument("name", metavar="NAME", help="who owns what is made with it")
    new.add_argument("--max-requests-per-s", type=float, metavar="N", help="requests per second (default: no limit)")
    new.add_argument(
        "--max-queued-samples", type=int, metavar="N", help="sequences that may wait or decode (default: no limit)"
    )
    listed = commands.add_parser("list", help="names, the beginning of each hash, limits")
    gone = commands.add_parser("revoke", help="forget a key; what it owns stays")
    gone.add_argument("name", metavar="NAME", help="whose key")
    for command in (new, listed, gone):
        command.add_argument("--file", required=True, help="the file of the keys, made when needed")
    return parser


if __name__ == "__main__":
    main()
