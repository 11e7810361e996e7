"""The matrix as docs/compatibility.md."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from tests.compatibility.matrix import FAILS, REFUSED, WORKS, Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
REGENERATE = "uv run --extra dev --extra demo --extra tinker -m tests.compatibility"

_INTRODUCTION = """\
# Compatibility

Every public method of the official `tinker` SDK, each of its options, and every command of the `tinker` CLI, \
called against a running tx. This page is written by `{command}`; CI makes the same calls and fails when the page is \
out of date or anything on it fails. What the SDK offers is found by looking into the installed package, so a method \
that nobody has thought of shows up as a failure.

SDK {sdk}: {counts}.

*works*: the call was made and its result checked. *refused*: tx, or the SDK on its behalf, says no, with the message \
in the note. Methods ending in `_async` are the same ones awaited.
"""


def render(rows: list[Row]) -> str:
    """The whole document."""
    count = Counter(row.result for row in rows)
    counts = ", ".join(f"{count[result]} {result}" for result in (WORKS, REFUSED, FAILS) if count[result])
    parts = [_INTRODUCTION.format(command=REGENERATE, sdk=version("tinker"), counts=counts)]
    for title, section in groupby(rows, _section):
        lines = [f"## {title}\n", "| | Option | Result | Note |", "|---|---|---|---|"]
        lines += [f"| `{row.target}` | {_code(row.option)} | {row.result} | {_cell(row.note)} |" for row in section]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _section(row: Row) -> str:
    if row.target == "tinker" or row.target.startswith("tinker "):
        return "The `tinker` command"
    if row.note == "not covered":
        return "Not covered"
    owner = row.target.partition(".")[0].removesuffix("()")
    return {"auth": "tinker.auth"}.get(owner, owner)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
