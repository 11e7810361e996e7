"""Checkpoints on their way from storage to the engine: threads read them, so that a slow store holds up nobody else.

Whoever needs one asks for it again and again. Until it is there the answer is StillReading, and the job waits with what
is behind it, as for a rebuild.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

from tx.types import ModelState

NUM_THREADS = 4


class StillReading(Exception):
    """Not there yet; ask again once ``Reads.is_done(key)``."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


class Reads:
    """The reads under way, and those whose state nobody has taken yet. Driven by the engine's one thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read")
        self._futures: dict[str, Future[ModelState]] = {}
        self._left: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._futures)

    def take(self, key: str, read: Callable[[], ModelState]) -> ModelState:
        """The state that ``read`` gives, or what it raises; StillReading until then. ``key`` names the checkpoint."""
        if key not in self._futures:
            self._futures[key] = self._threads.submit(read)
            raise StillReading(key)
        future = self._futures[key]
        if not future.done():
            raise StillReading(key)
        del self._futures[key]
        self._left.discard(key)
        return future.result()

    def is_done(self, key: str) -> bool:
        """Whether it has been read and can be taken."""
        return key in self._futures and self._futures[key].done()

    def drop_untaken(self) -> None:
        """Let go of states that nobody has taken since the last call: their jobs were cancelled."""
        for key in self._left:
            self._futures.pop(key, None)
        self._left = {key for key, future in self._futures.items() if future.done()}


def when_read[Result](call: Callable[[], Result]) -> Generator[None, None, Result]:
    """What ``call`` returns, yielding for as long as it has to wait for a read."""
    while True:
        try:
            return call()
        except StillReading:
            yield
