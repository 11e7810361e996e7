"""Compiling ahead: programs that are likely to be needed, in a thread, while nobody computes.

The code that runs programs says ``call(program, *args)`` instead of ``program(*args)``. Here the same code is given
another ``call``, which compiles and answers with shapes in place of arrays, so what is compiled is what will run, and
JAX finds it when the time comes. One program at a time, and none is begun unless the device is idle; one that is under
way when work comes goes on, and whoever needs that very program waits for it instead of compiling it as well.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jaxtyping import Array

log = logging.getLogger(__name__)

type Call = Callable[..., Any]
"""``call(program, *args)``, where ``program`` is a jitted function: its result, or shapes like it."""

Value = Array | jax.ShapeDtypeStruct
"""What a ``Call`` returns in the place of an array."""


def directly(program: Callable[..., Any], *args: Any) -> Any:
    """The plain call."""
    return program(*args)


class Ahead:
    """The thread and what it still has to do. Until ``start`` it takes nothing, and ``call`` is ``directly``."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: set[Hashable] = set()
        self._queue: deque[tuple[Hashable, Callable[[Call], object]]] = deque()
        self._idle = False
        self._compiling: Callable[..., Any] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on, compile what is asked for."""
        self._thread = threading.Thread(target=self._run, name="compile-ahead", daemon=True)
        self._thread.start()

    def ask(self, key: Hashable, work: Callable[[Call], object], *, next: bool = False) -> None:
        """Have ``work(call)`` compile its programs, once for each key, before all others if ``next``.

        ``work`` runs in the thread and is to change nothing. If it fails, whoever needs the program will hear of it.
        """
        with self._changed:
            if self._thread is None or key in self._asked:
                return
            self._asked.add(key)
            (self._queue.appendleft if next else self._queue.append)((key, work))
            self._changed.notify_all()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """The device has nothing to do meanwhile."""
        with self._changed:
            self._idle = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._idle = False

    def call(self, program: Callable[..., Any], *args: Any) -> Any:
        """Run the program; first wait if it is being compiled."""
        if self._compiling is program:
            with self._changed:
                self._changed.wait_for(lambda: self._compiling is not program)
        return program(*args)

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue and self._idle)
                key, work = self._queue.popleft()
            try:
                work(self._compile)
            except Exception as error:
                log.warning("compiling %s ahead failed: %s", key, error)

    def _compile(self, program: Any, *args: Any) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._idle)
            self._compiling = program
        try:
            lowered = program.lower(*args)
            compiled = lowered.compile()
        finally:
            with self._changed:
                self._compiling = None
                self._changed.notify_all()
        like = lambda out, place: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=place)
        return jax.tree.map(like, lowered.out_info, compiled.output_shardings)
