"""What is put into the processes of a server under test from outside: the product knows nothing of it.

Every Python process whose PYTHONPATH names this folder loads ``sitecustomize``, and that, by the variables it finds,
``kill_points`` or ``troubles``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_HERE = Path(__file__).parent
_PYTHONPATH = os.pathsep.join((str(_HERE), str(_HERE.parents[1])))

Settings = dict[str, dict[str, float]]
"""By module, constants and what they are instead."""


def environment_for_kills(folder: Path, settings: Settings) -> dict[str, str]:
    """Environment of a server whose processes can be killed at named instants; they are armed in ``folder``."""
    return {"PYTHONPATH": _PYTHONPATH, "KILL_POINTS": str(folder), "SETTINGS": json.dumps(settings)}


def environment_for_troubles(folder: Path, settings: Settings | None = None) -> dict[str, str]:
    """Environment of a server that has the troubles whose files lie in ``folder``."""
    return {"PYTHONPATH": _PYTHONPATH, "TROUBLES": str(folder), "SETTINGS": json.dumps(settings or {})}
