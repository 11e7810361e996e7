"""Loaded by every Python process of a server under test, whose PYTHONPATH names this folder: kills at named instants.

``$TX_FAULTS`` is a folder. While its file ``armed`` says ``<point> <skip> <serial>``, a process that has come by that
point ``skip`` times notes the next time in ``fired`` and dies as by kill -9. What has been synced is noted in
``synced``, so that a power cut can take the rest. The product knows nothing of this.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import signal
import stat
import sys
from collections import Counter

FOLDER = os.environ.get("TX_FAULTS", "")

# module: (attribute, name of the point). Each has an instant before it and one after it.
POINTS = {
    "tx.tinker.jobs": (
        ("JobTable.append", "append"),
        ("JobTable.claim", "claim"),
        ("JobTable.commit", "commit"),
        ("JobTable.requeue", "requeue"),
        ("JobTable.finished", "answer"),
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

# So that points are taken and engines come back at the pace of a test.
SETTINGS = {
    "tx.tinker.recovery_points": {"MIN_TRAINED_S": 0.0, "SHARE": 1e9},
    "tx.tinker.supervisor": {"_MAX_BACKOFF_S": 0.05},
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


class Finder(importlib.abc.MetaPathFinder):
    """Changes the modules named above when they are imported."""

    def find_spec(self, fullname, path, target=None):
        if fullname not in POINTS and fullname not in SETTINGS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for name, value in SETTINGS.get(fullname, {}).items():
                assert hasattr(module, name), f"{fullname} has no {name}"
                setattr(module, name, value)
            if fullname == "tx.tinker.supervisor":
                module.Supervisor.__init__.__kwdefaults__.update(first_backoff_s=0.05, of_use_s=0.0)
            for attribute, name in POINTS.get(fullname, ()):
                wrap(module, attribute, name)

        spec.loader.exec_module = exec_module
        return spec


if FOLDER:
    note_syncs()
    sys.meta_path.insert(0, Finder())
