"""What goes wrong around a server, by the files of a folder; without them all is well.

``clock`` holds seconds that are added to the wall clock, ``slow`` seconds that every statement to the database takes
longer. While there is ``read-only``, SQLite writes nothing.
"""

import os
import time

from tests.inject import import_hook

FOLDER = ""


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


def trouble_statements(_) -> None:
    """Every statement on every database waits first, and writes nothing if that is forbidden."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def before(connection, cursor, *_):
        time.sleep(number_in("slow"))
        if connection.dialect.name == "sqlite":
            cursor.execute(f"PRAGMA query_only = {int(os.path.exists(os.path.join(FOLDER, 'read-only')))}")

    event.listen(Engine, "before_cursor_execute", before)


def install(folder: str) -> None:
    """Have what goes wrong in ``folder`` go wrong in this process."""
    global FOLDER
    FOLDER = folder
    shift_clock()
    import_hook.install({"tx.tinker.db": trouble_statements})
