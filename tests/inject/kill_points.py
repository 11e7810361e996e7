"""Kills at named instants.

While the file ``armed`` in the folder says ``<point> <skip> <serial>``, a process that has come by that point ``skip``
times notes the next time in ``fired`` and dies as by kill -9. What has been synced is noted in ``synced``, so that a
power cut can take the rest.
"""

import functools
import os
import signal
import stat
from collections import Counter

from tests.inject import import_hook

FOLDER = ""

# module: (attribute, name of the point). Each has an instant before it and one after it.
POINTS = {
    "tx.tinker.jobs": (
        ("JobTable.append", "append"),
        ("JobTable.claim", "claim"),
        ("JobTable.commit", "commit"),
        ("JobTable.requeue", "requeue"),
        ("JobTable.answer", "answer"),
    ),
    "tx.worker.worker": (
        ("Worker.train_slice", "train"),
        ("Worker.optim_step", "step"),
        ("Worker.take_snapshot", "snapshot"),
        ("Worker.sample_slice", "sample"),
        ("Worker.restore_model", "restore"),
    ),
    "tx.worker.parking": (("Parking.put", "park"),),
    "tx.tinker.checkpoints": (("CheckpointFolders.write", "write"),),
    "tx.tinker.recovery_points": (("RecoveryPoints.after_step", "point"), ("RecoveryPoints.collect", "point-row")),
    "tx.tinker.rebuild": (("Rebuilds.advance", "rebuild"),),
}

passed: Counter = Counter()


def reach(point: str) -> None:
    """Die here, if it is time."""
    try:
        with open(os.path.join(FOLDER, "armed")) as file:
            armed, skip, serial = file.read().split()
    except (OSError, ValueError):
        return
    if armed != point:
        return
    passed[serial] += 1
    if passed[serial] <= int(skip):
        return
    try:
        os.unlink(os.path.join(FOLDER, "armed"))  # one process dies of it, not two
    except FileNotFoundError:
        return
    with open(os.path.join(FOLDER, "fired"), "a") as file:
        file.write(f"{point} {os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(module, attribute: str, name: str) -> None:
    """Put ``reach`` before and after a method."""
    owner_name, _, method = attribute.partition(".")
    owner = getattr(module, owner_name)
    real = getattr(owner, method)

    def wrapped(*args, **kwargs):
        reach(f"{name}:before")
        result = real(*args, **kwargs)
        reach(f"{name}:after")
        return result

    setattr(owner, method, wrapped)


def note_syncs() -> None:
    """Write ``<inode> <time of its last change> <size>`` of each file that is synced."""
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode):
            with open(os.path.join(FOLDER, "synced"), "a") as file:
                file.write(f"{found.st_ino} {found.st_mtime_ns} {found.st_size}\n")

    os.fsync = fsync


def wrap_all(points, module) -> None:
    """Each of a module's methods that is named above."""
    for attribute, name in points:
        wrap(module, attribute, name)


def install(folder: str) -> None:
    """Watch ``folder`` for what is armed."""
    global FOLDER
    FOLDER = folder
    note_syncs()
    import_hook.install({module: functools.partial(wrap_all, points) for module, points in POINTS.items()})
