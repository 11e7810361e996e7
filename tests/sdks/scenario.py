"""The client's side of the matrix: everything one version of the SDK can do, in one small program.

Runs in the environment of that SDK, alone: ``python scenario.py URL BASE_MODEL``. Prints one line of JSON: the SDK's
version, what became of each feature, and what the SDK logged. Equal programs must get equal numbers, whatever the
version says on the wire: seeds, data and order of requests are fixed, and nobody else uses the server meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from typing import Any

import tinker
from client import Absent, Client
from features import FEATURES

EXPECTED = ("DEPRECATED", "Creating checkpoint archive")
"""How the SDK's warnings begin that it gives whatever the server does: about its own future, and before a download."""


class Kept(logging.Handler):
    """Everything from WARNING up that isn't expected."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        if not record.getMessage().startswith(EXPECTED):
            self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()[:300]}")


def attempt(label: str, client: Client) -> dict[str, Any]:
    """What became of one feature: ok with its values, absent from the SDK, not served, or failed with the reason."""
    run, tolerance = FEATURES[label]
    try:
        return {"status": "ok", "values": run(client), "tolerance": tolerance}
    except Absent:
        return {"status": "absent"}
    except Exception as error:
        if "is not served here" in str(error):  # what the server says of routes that it doesn't have
            return {"status": "not served"}
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        return {"status": "failed", "reason": reason}


def main() -> None:
    kept = Kept()
    logging.getLogger().addHandler(kept)
    client = Client(sys.argv[1], sys.argv[2])
    results = {label: attempt(label, client) for label in FEATURES}
    print(json.dumps({"version": tinker.__version__, "features": results, "log": kept.lines}), flush=True)
    os._exit(0)  # once in some fifty runs the SDK's transport aborts while its interpreter shuts down


if __name__ == "__main__":
    main()
