"""Kill a server's processes, at instants and at random, while tenants work on it; compare with a run without faults."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import load_file
from sqlmodel import Session, col, func, select

from tests import inject
from tests.faults.client import Lost
from tests.faults.tenants import Result, run_round
from tests.support.server import Server
from tx.tinker.db import UNFINISHED, Job, open_database, reading
from tx.tinker.wire.paths import parse_path

ADAPTER, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"

PACE = {
    "tx.tinker.recovery_points": {"MIN_TRAINED_S": 0.0, "SHARE": 1e9},
    "tx.tinker.supervisor": {"_FIRST_BACKOFF_S": 0.05, "_MAX_BACKOFF_S": 0.05, "_OF_USE_S": 0.0},
}
"""Points are taken, and engines come back, at the pace of a test."""

ENGINE_POINTS = tuple(
    f"{name}:{when}"
    for name in (
        "claim", "commit", "train", "step", "snapshot", "sample", "restore", "park", "write", "point", "point-row",
        "rebuild", "requeue",
    )
    for when in ("before", "after")
)  # fmt: skip
RECOVERY_POINTS = frozenset({"requeue", "rebuild", "restore"})
"""What an engine comes by while it recovers: these are armed and then an engine is killed."""

API_POINTS = ("append:before", "append:after", "answer:before", "answer:after")

STEPS = 6
_ARMED_S = 2.0
_RECOVERING_S = 8.0
"""How long to wait for a process to come by an armed point, in the middle of work and after a kill."""

TOLERANCE = 1e-6
MOMENTS_TOLERANCE = {"/mu.": 2e-6, "/nu.": 4e-6}
"""Of the adapter's largest. A gradient is a float32 sum of hundreds of terms in one order or another, and the second
moment goes with its square."""


@dataclass
class Report:
    """What happened. ``fired`` counts the kills by their kind."""

    rounds: int = 0
    answers: int = 0
    fired: Counter[str] = field(default_factory=Counter)
    bit_equal: int = 0
    within_tolerance: int = 0
    jobs: int = 0
    unfired: int = 0
    torn: int = 0
    """Files that lost what was not on the disk yet, when the power was cut."""
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """How many faults really fired."""
        return sum(self.fired.values())


class Faults:
    """The kills of one run, in a thread of their own until ``kills`` have fired or ``stop``."""

    def __init__(self, server: Server, folder: Path, kills: int, rng: random.Random, report: Report) -> None:
        self._server = server
        self._folder = folder
        self._kills = kills
        self._rng = rng
        self._report = report
        self._stop = threading.Event()
        self._last = time.monotonic()
        self._http = httpx.Client(timeout=5)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="faults")
        self._thread.start()

    def last(self) -> float:
        """When one last fired."""
        return self._last

    def stop(self) -> None:
        """No more kills; the server is up when this returns."""
        self._stop.set()
        self._thread.join()
        self._http.close()
        self._revive()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while self._report.kills < self._kills and not self._stop.is_set():
                kind = self._rng.choices(("point", "engine", "api point", "api", "power"), (60, 15, 12, 7, 6))[0]
                # Mostly in the middle of work; one random kill in two while everything is still coming back.
                if kind.endswith("point") or self._rng.random() < 0.5:
                    self._await_ready()
                self._stop.wait(self._rng.uniform(0.0, 1.0))
                before = self._report.kills
                self._one(kind)
                if self._report.kills > before:
                    self._last = time.monotonic()
                self._revive()
            while not self._stop.wait(0.1):  # who was killed last may not have died yet when we looked
                self._revive()
        except BaseException as error:
            self.error = error

    def _one(self, kind: str) -> None:
        if kind in ("point", "api point"):
            point = self._rng.choice(ENGINE_POINTS if kind == "point" else API_POINTS)
            if self._fire_at(point):
                self._report.fired[point] += 1
            else:
                self._report.unfired += 1
            return
        if kind == "power":
            self._cut_power()
            self._report.fired["power cut"] += 1
            return
        api = self._server.process
        if self._kill(self._server.engine_pids() if kind == "engine" else [api.pid] if api is not None else []):
            self._report.fired[f"{kind} at random"] += 1

    def _kill(self, pids: Iterable[int]) -> int:
        """How many of these were alive."""
        killed = 0
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        return killed

    def _cut_power(self) -> None:
        """Kill everything, and take from the data what had not reached the disk; SQLite's files are its own affair."""
        while pids := self._server.pids():
            self._kill(pids)
        synced = set(map(tuple, map(str.split, (self._folder / "synced").read_text().splitlines())))
        for file in self._server.folder.rglob("*"):
            if not file.is_file() or file.name.startswith("tx.db") or file.is_relative_to(self._folder):
                continue
            if file == self._server.log:  # ours to read afterwards
                continue
            found = file.stat()
            if found.st_size and (str(found.st_ino), str(found.st_mtime_ns), str(found.st_size)) not in synced:
                os.truncate(file, 0)
                self._report.torn += 1

    def _fire_at(self, point: str) -> bool:
        """Arm one point; whether a process died of it."""
        armed, fired = self._folder / "armed", self._folder / "fired"
        before = fired.read_text() if fired.exists() else ""
        temporary = self._folder / "arming"
        name = point.partition(":")[0]
        skip = 0 if name == "requeue" else self._rng.randrange(4)  # that one comes once in an engine's life
        temporary.write_text(f"{point} {skip} {self._rng.getrandbits(40):x}")
        temporary.rename(armed)
        recovers = name in RECOVERY_POINTS
        if recovers and self._kill(self._server.engine_pids()):
            self._report.fired["engine, to recover"] += 1
        deadline = time.monotonic() + (_RECOVERING_S if recovers else _ARMED_S)
        while time.monotonic() < deadline and not self._stop.is_set():
            if fired.exists() and fired.read_text() != before:
                return True
            time.sleep(0.01)
        armed.unlink(missing_ok=True)
        time.sleep(0.05)
        return fired.exists() and fired.read_text() != before

    def _revive(self) -> None:
        process = self._server.process
        if process is not None and process.poll() is not None:
            self._server.launch()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not self._stop.is_set():
            try:
                if self._http.get(f"{self._server.url}/api/v1/healthz").status_code == 200:
                    return
            except httpx.TransportError:
                self._revive()
            time.sleep(0.05)


def run(
    model: Path,
    folder: Path,
    *,
    kills: int,
    seed: int,
    database_url: str | None = None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Rounds of tenants until so many faults have fired; raises Lost, Hung or AssertionError for what went wrong."""
    began = time.monotonic()
    faults_folder = folder / "faults"
    faults_folder.mkdir(parents=True)
    flags = ["--max-lora-adapters", "2"]  # four tenants: they are parked and restored all the time
    if database_url is not None:
        flags += ["--database-url", database_url]
    report = Report()
    with Server(model, folder, *flags, variables=inject.environment_for_kills(faults_folder, PACE)) as server:
        fault_free: dict[int, Result] = {}
        run_round(server.url, STEPS, seed, lambda result: fault_free.update({result.tenant.seed: result}))
        expected = {number: _tensors(folder, result) for number, result in fault_free.items()}

        def check(result: Result) -> None:
            result.compare(fault_free[result.tenant.seed])
            if compare(_tensors(folder, result), expected[result.tenant.seed], exact=result.tenant.exact):
                report.bit_equal += 1
            else:
                report.within_tolerance += 1

        while (before := report.kills) < kills:
            faults = Faults(server, faults_folder, kills, random.Random(f"{seed}/{report.rounds}"), report)
            try:
                report.answers += run_round(server.url, STEPS, seed + report.rounds + 1, check, faults.last)
            except BaseException as error:
                error.add_note(_state(server, database_url))
                raise
            finally:
                faults.stop()
            assert report.kills > before, "no fault fired in a whole round"
            report.rounds += 1
            progress(report)
        report.jobs = _check_jobs(server, database_url)
    report.seconds = time.monotonic() - began
    return report


def _tensors(folder: Path, result: Result) -> dict[str, np.ndarray]:
    """Weights and moments of the final checkpoint, under ``<file>/<name>``."""
    checkpoint = folder / "checkpoints" / parse_path(result.path).folder
    return {
        f"{file}/{name}": tensor
        for file in (ADAPTER, OPTIMIZER)
        for name, tensor in load_file(checkpoint / file).items()
    }


def compare(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, exact: bool) -> bool:
    """Whether they are the same to the bit; raises if they aren't even near."""
    assert got.keys() == expected.keys()
    equal = all(np.array_equal(array, expected[name]) for name, array in got.items())
    if exact and not equal:
        raise Lost("an adapter differs from the one without faults")
    tolerances = {
        moment: share
        * max((float(np.max(np.abs(array))) for name, array in expected.items() if moment in name), default=0)
        for moment, share in MOMENTS_TOLERANCE.items()
    }
    for name, array in got.items():
        tolerance = next((size for moment, size in tolerances.items() if moment in name), TOLERANCE)
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance, err_msg=name)
    return equal


@contextlib.contextmanager
def _tables(server: Server, database_url: str | None) -> Iterator[Session]:
    db = open_database(database_url or f"sqlite:///{server.folder / 'tx.db'}")
    with reading(db) as session:
        yield session
    db.dispose()


def _state(server: Server, database_url: str | None) -> str:
    """For whoever has to find out why: what is unfinished, and the end of the log."""
    columns = (Job.request_id, Job.kind, Job.status, Job.model_id, Job.seq_id, Job.attempts)
    with _tables(server, database_url) as session:
        unfinished = session.exec(select(*columns).where(col(Job.status).in_(UNFINISHED))).all()
    return "\n".join(["unfinished:", *map(str, unfinished), *server.log.read_text().splitlines()[-60:]])


def _check_jobs(server: Server, database_url: str | None) -> int:
    """Every request has exactly one job, and every job has ended well; how many there are."""
    with _tables(server, database_url) as session:
        counts = dict(session.exec(select(Job.status, func.count()).group_by(Job.status)).all())
        failed = session.exec(select(Job.kind, Job.error).where(Job.status == "failed").limit(3)).all()
    if set(counts) != {"done"}:
        raise Lost(f"jobs: {counts}, {failed}")
    return counts["done"]
