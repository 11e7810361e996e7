"""Run the scenario with several versions of the SDK, compare their numbers, and show what came out as a table."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.sdks.compare import differing
from tests.sdks.environments import ROOT, environment
from tests.support.server import BASE_MODEL

DOCUMENT = ROOT / "docs" / "sdks.md"
LIMIT_S = 600.0
"""For one version: seconds, but the first run on a new server compiles most programs, and machines may be busy."""

MARKS = {"ok": "✓", "absent": "–", "not served": "no", "failed": "✗"}
"""The last never gets into the document: a run with complaints isn't written."""


@dataclass
class Run:
    """What one version of the SDK came back with."""

    version: str
    features: dict[str, dict[str, Any]]
    """Label to status, and values or reason."""
    log: list[str]
    """The SDK's own warnings and errors."""


def run(version: str, url: str) -> Run:
    """The scenario in the environment of ``version``, against the server at ``url``; raises Unreachable."""
    here = Path(__file__).parent
    # Where CI is set, transformers hands its advice on to everybody's log.
    client = {key: value for key, value in os.environ.items() if not key.startswith(("TINKER_", "PYTHON", "CI"))}
    result = subprocess.run(
        [environment(version), here / "scenario.py", url, BASE_MODEL],
        env=client | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(here / "stand_in")},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if result.returncode:
        raise AssertionError(f"SDK {version}: the scenario did not finish:\n{result.stderr[-4000:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["version"] == version, f"the environment of {version} holds {found['version']}"
    return Run(version, found["features"], found["log"])


def complaints(runs: list[Run]) -> list[str]:
    """What is wrong: features that failed, numbers that differ from the newest version's, lines in the SDK's log."""
    found = []
    reference = runs[-1]
    for each in runs:
        for label, result in each.features.items():
            if result["status"] == "failed":
                found.append(f"{each.version}: {label}: {result['reason']}")
            expected = reference.features[label]
            if result["status"] == expected["status"] == "ok":
                differences = list(differing(result["values"], expected["values"], result["tolerance"]))
                if differences:
                    place, value, other = differences[0]
                    words = f"{len(differences)} values differ from {reference.version}'s"
                    found.append(f"{each.version}: {label}: {words}, first {place}: {value}, not {other}")
        found += [f"{each.version}: the SDK logged: {line}" for line in each.log]
    return found


# ---- the table --------------------------------------------------------------------------------------------------


def table(runs: list[Run]) -> list[list[str]]:
    """Header and rows: one row per feature, one column per version."""
    header = ["", *(each.version for each in runs)]
    return [header, *([label, *(MARKS[each.features[label]["status"]] for each in runs)] for label in runs[0].features)]


def as_markdown(rows: list[list[str]]) -> str:
    """A table as the document has it."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def as_text(rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def documented() -> list[list[str]]:
    """The table in docs/sdks.md."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def outdated(runs: list[Run]) -> list[str]:
    """Where the document doesn't say what these runs found; versions that did not run are not looked at."""
    versions = {each.version for each in runs}
    said = {place: cell for place, cell in _cells(documented()).items() if place[1] in versions}
    found = _cells(table(runs))
    return [
        f"docs/sdks.md: {label}, {version}: {said.get((label, version))!r}, now {found.get((label, version))!r}"
        for label, version in sorted(said.keys() | found.keys())
        if said.get((label, version)) != found.get((label, version))
    ]


def _cells(rows: list[list[str]]) -> dict[tuple[str, str], str]:
    """Cells of a table by feature and version."""
    header = rows[0][1:]
    return {(row[0], version): cell for row in rows[1:] for version, cell in zip(header, row[1:], strict=True)}


def write_document(runs: list[Run]) -> None:
    """Replace the document's table."""
    text = DOCUMENT.read_text()
    start = text.index("\n|") + 1
    end = text.rindex("|\n") + 2
    DOCUMENT.write_text(text[:start] + as_markdown(table(runs)) + text[end:])
