"""Loaded by every Python process that has this folder in its PYTHONPATH."""

import os
import traceback

try:
    if "KILL_POINTS" in os.environ:
        from tests.inject import kill_points

        kill_points.install(os.environ["KILL_POINTS"])
    if "TROUBLES" in os.environ:
        from tests.inject import troubles

        troubles.install(os.environ["TROUBLES"])
except BaseException:  # Python would go on without, and tests would see a server that nothing happens to
    traceback.print_exc()
    os._exit(70)
