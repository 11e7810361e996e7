"""Loaded by every Python process of a server under test, whose PYTHONPATH names this folder: puts in what goes wrong.

``$TROUBLE`` is a folder. Its file ``clock`` holds seconds that are added to the wall clock, ``slow`` seconds that every
statement to the database takes longer; without them all is well. ``$TROUBLE_SETTINGS`` is JSON: by module, constants
that are set in its source, so that chores come at the pace of a test. The product knows nothing of this.
"""

import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
import time

FOLDER = os.environ.get("TROUBLE", "")
SETTINGS = json.loads(os.environ.get("TROUBLE_SETTINGS", "{}"))


def number_in(name: str) -> float:
    """What a file says, 0 without it."""
    try:
        with open(os.path.join(FOLDER, name)) as file:
            return float(file.read() or 0)
    except FileNotFoundError:
        return 0.0


def shift_clock() -> None:
    """Wall-clock time is what it is plus what the file says."""
    real = time.time
    time.time = lambda: real() + number_in("clock")


def slow_statements() -> None:
    """Every statement on every database waits first."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    event.listen(Engine, "before_cursor_execute", lambda *_: time.sleep(number_in("slow")))


class Finder(importlib.abc.MetaPathFinder):
    """Changes modules when they are imported or run."""

    def find_spec(self, fullname, path, target=None):
        if fullname not in SETTINGS and fullname != "tx.tinker.db":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        loader = spec.loader

        def get_code(name):
            source = loader.get_source(name)
            for constant, value in SETTINGS.get(fullname, {}).items():
                source, count = re.subn(rf"(?m)^{constant} = .*$", f"{constant} = {value!r}", source)
                assert count == 1, f"{fullname} has no {constant}"
            if fullname == "tx.tinker.db":
                slow_statements()
            return compile(source, spec.origin, "exec")

        loader.get_code = get_code
        return spec


if FOLDER:
    shift_clock()
    sys.meta_path.insert(0, Finder())
