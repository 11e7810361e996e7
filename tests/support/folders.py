"""Two versions of a folder in a storage, and how a reader sees it."""

from __future__ import annotations

FOLDER = "s:train:0/weights/ck1"
OLD = ({"step": 1}, {"a.json": b"old a", "b.bin": b"old b", "c.bin": b"only in the old one"})
NEW = ({"step": 2}, {"a.json": b"new a", "b.bin": bytes(range(256)) * 50})


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
