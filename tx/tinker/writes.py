"""Checkpoints on their way from the engine to storage: threads write them, while their model trains on.

A job that saves has had its effect on its model by then; it is over when its files are in storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tx.tinker.db import Job
from tx.tinker.jobs import Outcome
from tx.tinker.wire.paths import TinkerPath

NUM_THREADS = 4

MAX_WRITES = 8
"""Under way at a time; with as many, the next save waits: each holds a model's state."""


@dataclass(frozen=True)
class Writing:
    """What is left of a save: ``write`` in any thread, then ``outcome`` in the engine's.

    When that is committed, ``tidy`` removes what it has replaced.
    """

    path: TinkerPath
    write: Callable[[], int]  # returns bytes written
    outcome: Callable[[int], Outcome]
    tidy: Callable[[], None]


class Writes:
    """The writes under way. Driven by the engine's one thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="write")
        self._under_way: dict[str, tuple[Job, Writing, Future[int]]] = {}  # by path

    def __len__(self) -> int:
        return len(self._under_way)

    def __contains__(self, path: str) -> bool:
        """Whether what ``path`` names is being written."""
        return path in self._under_way

    @property
    def are_full(self) -> bool:
        """Whether the next save has to wait."""
        return len(self) >= MAX_WRITES

    def begin(self, job: Job, writing: Writing) -> None:
        """Write its files in a thread. Nothing else may be under way to the same path."""
        path = str(writing.path)
        assert path not in self._under_way, path
        self._under_way[path] = job, writing, self._threads.submit(writing.write)

    def ended(self) -> Iterator[tuple[Job, Writing, Future[int]]]:
        """Those whose thread is done, well or not; they are no longer under way."""
        for path, (job, writing, future) in list(self._under_way.items()):
            if future.done():
                del self._under_way[path]
                yield job, writing, future

    def close(self) -> None:
        """Begin no more of them; those whose thread is at work are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
