"""Between many concurrent HTTP requests and the one job table: group their appends, wake their futures.

Requests that arrive while a transaction is being written share the next one. Waiting futures hold no connection and
no thread: one thread learns of commits and wakes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tx.errors import NotFound, Overloaded
from tx.tinker.jobs import Appended, JobTable, NewJob
from tx.tinker.notify import ChangeSignal
from tx.tinker.sessions import Beat, Sessions

log = logging.getLogger(__name__)

_MAX_GROUP_JOBS = 512
_MAX_GROUP_BYTES = 32 * 2**20
_MAX_WAITING_APPENDS = 10_000

_Entry = tuple[NewJob, asyncio.AbstractEventLoop, "asyncio.Future[Appended]"]


class Appender:
    """One thread that writes all appends, as many in one transaction as have arrived meanwhile."""

    def __init__(self, jobs: JobTable) -> None:
        self._jobs = jobs
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="append", daemon=True)
        self._thread.start()

    async def append(self, job: NewJob) -> int:
        """The request_id, durable when this returns.

        Raises:
            InvalidInput: its seq is taken by another request.
            Overloaded: the queue is full; nothing was appended.
        """
        if self._queue.qsize() >= _MAX_WAITING_APPENDS:
            raise Overloaded(f"{_MAX_WAITING_APPENDS} requests are waiting to be written; try again in a second.")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Appended] = loop.create_future()
        self._queue.put((job, loop, future))
        return (await future).request_id

    def close(self) -> None:
        """Write what was handed in, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            group, stop = [first], False
            num_bytes = len(first[0].payload)
            while len(group) < _MAX_GROUP_JOBS and num_bytes < _MAX_GROUP_BYTES:
                try:
                    entry = self._queue.get_nowait()
                except queue.Empty:
                    break
                if entry is None:
                    stop = True
                    break
                group.append(entry)
                num_bytes += len(entry[0].payload)
            self._write(group)
            if stop:
                return

    def _write(self, group: list[_Entry]) -> None:
        try:
            answers: list[Any] = list(self._jobs.append([job for job, _, _ in group]))
        except Exception as error:  # every request of the group learns of it; the thread must live on
            answers = [error] * len(group)
        for (_, loop, future), answer in zip(group, answers, strict=True):
            _call(loop, _resolve, future, answer)


class Heartbeats:
    """One thread that writes all heartbeats, as many in one transaction as have arrived meanwhile.

    So they wait neither behind other requests' threads nor for the disk one by one.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._queue: queue.SimpleQueue[tuple[Beat, asyncio.AbstractEventLoop, asyncio.Future[bool]] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    async def beat(self, session_id: str, owner: str | None) -> bool:
        """Note that the client lives; False if it has finished its session.

        Raises:
            NotFound: there is no such session, or it is another's (``owner`` None: all are the caller's).
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        self._queue.put(((session_id, owner), loop, future))
        return await future

    def close(self) -> None:
        """Write what was handed in, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        stop = False
        while not stop and (first := self._queue.get()) is not None:
            group = [first]
            with contextlib.suppress(queue.Empty):
                while (entry := self._queue.get_nowait()) is not None:
                    group.append(entry)
                stop = True
            answers: dict[Beat, Any] = {}
            try:
                answers.update(self._sessions.heartbeats({beat for beat, _, _ in group}))
            except Exception as error:  # all of them learn of it; the thread must live on
                answers = dict.fromkeys((beat for beat, _, _ in group), error)
            for beat, loop, future in group:
                unknown = NotFound("session_id", beat[0], "a session of this server")
                _call(loop, _resolve, future, answers.get(beat, unknown))


type Awaited = int | tuple[str, int]
"""What a waiter waits for: a request, or whatever a sampler finishes after a ``finish_seq``."""


class Watcher:
    """One thread that learns of commits and wakes those whose jobs are finished."""

    def __init__(self, jobs: JobTable, signal: ChangeSignal) -> None:
        self._jobs = jobs
        self._signal = signal
        self._lock = threading.Lock()
        self._waiting: dict[Awaited, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = defaultdict(set)
        self._someone = threading.Event()  # an idle service probes nothing
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    async def wait(self, awaited: Awaited, timeout: float, check: Callable[[], bool]) -> bool:
        """True once it is there, False after ``timeout`` seconds.

        ``check`` asks the table once, in a thread, after this waiter is registered: a job that finished in between
        is not missed.
        """
        me = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._waiting[awaited].add(me)
            self._someone.set()
        try:
            if await asyncio.to_thread(check):
                return True
            if self._stopped:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(me[1].wait(), timeout)
            return me[1].is_set() and not self._stopped
        finally:
            with self._lock:
                self._waiting[awaited].discard(me)
                if not self._waiting[awaited]:
                    del self._waiting[awaited]
                if not self._waiting and not self._stopped:
                    self._someone.clear()

    def stop(self) -> None:
        """Send every waiter home (they answer "try again"); safe to call in a signal handler."""
        self._stopped = True  # first, so that nobody clears the event after this
        self._someone.set()

    def close(self) -> None:
        """Stop the thread."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped:
            self._someone.wait()
            if self._stopped or not self._signal.wait(0.25):
                continue
            with self._lock:
                awaited = list(self._waiting)
            try:
                arrived = self._arrived(awaited)
            except Exception as error:  # the thread must live on, and who waits had better look for himself
                log.warning("finished jobs can't be looked up: %s", error)
                arrived = set(awaited)
            self._wake(arrived)
        with self._lock:
            awaited = list(self._waiting)
        self._wake(set(awaited))

    def _arrived(self, awaited: list[Awaited]) -> set[Awaited]:
        arrived: set[Awaited] = set(self._jobs.finished_ids([one for one in awaited if isinstance(one, int)]))
        of_samplers = [one for one in awaited if isinstance(one, tuple)]
        if of_samplers:
            last = self._jobs.last_finished({sampler_id for sampler_id, _ in of_samplers})
            arrived.update(one for one in of_samplers if last.get(one[0], 0) > one[1])
        return arrived

    def _wake(self, arrived: set[Awaited]) -> None:
        with self._lock:
            waiters = [waiter for awaited in arrived for waiter in self._waiting.get(awaited, ())]
        for loop, event in waiters:
            _call(loop, event.set)


def _resolve(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # the client hung up
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop may be closed by now, and with it whoever waited
        loop.call_soon_threadsafe(function, *args)
