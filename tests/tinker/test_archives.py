"""The streamed tar is one that tarfile reads, of the length that was announced."""

from __future__ import annotations

import io
import tarfile

import pytest

from tx.tinker import archives

FILES = {"empty": b"", "small": b"abc", "block": bytes(512), "big": bytes(range(256)) * 10_000}


def test_tarfile_reads_it_and_the_length_is_right():
    sizes = {name: len(content) for name, content in FILES.items()}
    content = b"".join(archives.tar(sizes, 1000.7, lambda name: io.BytesIO(FILES[name])))
    assert len(content) == archives.num_bytes(sizes)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r") as tar:
        entries = tar.getmembers()
        read = {entry.name: tar.extractfile(entry).read() for entry in entries}
    assert read == FILES | {"checkpoint_complete": b""}
    assert [entry.name for entry in entries][-1] == "checkpoint_complete"
    assert {(entry.mtime, entry.mode, entry.isreg()) for entry in entries} == {(1000, 0o644, True)}


@pytest.mark.parametrize("size", [8 * 2**30 - 1, 8 * 2**30, 2**40])
def test_the_largest_files_have_a_length_too(size):
    assert archives.num_bytes({"a": size}) == 512 + size + -size % 512 + 512 + 1024


def test_no_more_than_a_piece_is_read_ahead():
    opened = []

    def open_file(name: str) -> io.BytesIO:
        opened.append(name)
        return io.BytesIO(FILES[name])

    parts = archives.tar({"big": len(FILES["big"]), "small": 3}, 0.0, open_file)
    next(parts)
    assert opened == []
    assert len(next(parts)) == archives.PIECE_BYTES
    assert opened == ["big"]


def test_a_file_is_closed_when_its_reader_stops_early():
    file = io.BytesIO(FILES["big"])
    parts = archives.pieces(file)
    next(parts)
    parts.close()
    assert file.closed
