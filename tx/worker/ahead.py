"""Compiling ahead: programs that are likely to be needed, in a thread, while nobody computes.

The code that runs programs says ``call(program, *args)`` instead of ``program(*args)``. Here the same code is given
another ``call``, ``compiling``, which answers with shapes in place of arrays, so what is compiled is what will run, and
JAX finds it when the time comes. One program at a time, and none is begun unless the device is idle; one that is under
way when work comes goes on, and whoever needs that very program waits for it instead of compiling it as well.

Which programs those are is said in ``tx.worker.usual``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from tx.worker import maps

log = logging.getLogger(__name__)

type Call = Callable[..., Any]
"""``call(program, *args, **options)``, where ``program`` is a jitted function: its result, or shapes like it."""

Value = Array | jax.ShapeDtypeStruct
"""What a ``Call`` returns in the place of an array."""


def directly(program: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The plain call."""
    return program(*args, **options)


def compiling(program: Any, *args: Any, **options: Any) -> Any:
    """Compile the program and don't run it; shapes like its result."""
    lowered = program.lower(*args, **options)
    places = lowered.compile().output_shardings
    return jax.tree.map(
        lambda out, place: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=place), lowered.out_info, places
    )


@dataclass(frozen=True)
class Step:
    """A program, or a few, to be compiled by ``run(compiling)``, which changes nothing; ``key`` tells them apart."""

    key: Hashable
    name: str
    run: Callable[[Call], object]


class Ahead:
    """The thread and what it still has to do. Until ``start`` it takes nothing, and ``call`` is ``directly``."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: set[Hashable] = set()
        self._queue: deque[Step] = deque()
        self._idle = False
        self._compiling: _Signature | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on, compile what is asked for."""
        self._thread = threading.Thread(target=self._run, name="compile-ahead", daemon=True)
        self._thread.start()

    def ask(self, steps: Iterable[Step], *, next: bool = False) -> None:
        """Have these steps run, in their order and once for each key, before all others if ``next``.

        They run in the thread. If one fails, whoever needs its program will hear of it.
        """
        with self._changed:
            if self._thread is None:
                return
            new = {step.key: step for step in steps if step.key not in self._asked}
            self._asked.update(new)
            if next:
                self._queue.extendleft(reversed(new.values()))
            else:
                self._queue.extend(new.values())
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

    def call(self, program: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run the program; first wait if it is being compiled for such arguments."""
        current = self._compiling
        if current is not None and current.program is program and current == _signature(program, args, options):
            with self._changed:
                self._changed.wait_for(lambda: self._compiling is not current)
        return program(*args, **options)

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue and self._idle)
                step = self._queue.popleft()
            if maps.share_in_use() > maps.MOST_AHEAD:
                log.debug("%s is not compiled ahead: vm.max_map_count leaves no room", step.name)
                continue
            began = time.monotonic()
            try:
                step.run(self._compile)
                log.debug("compiled %s ahead, %.1f s", step.name, time.monotonic() - began)
            except Exception as error:
                log.warning("compiling %s ahead failed: %s", step.name, error)

    def _compile(self, program: Any, *args: Any, **options: Any) -> Any:
        signature = _signature(program, args, options)
        with self._changed:
            self._changed.wait_for(lambda: self._idle)
            self._compiling = signature
        try:
            return compiling(program, *args, **options)
        finally:
            with self._changed:
                self._compiling = None
                self._changed.notify_all()


@dataclass(frozen=True)
class _Signature:
    """What a program is compiled for, places apart; ``leaves`` are (shape, dtype), or values that are no arrays."""

    program: Callable[..., Any]
    tree: Any
    leaves: list[Any]


def _signature(program: Callable[..., Any], args: Any, options: Any) -> _Signature:
    leaves, tree = jax.tree.flatten((args, options))
    return _Signature(program, tree, [(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf for leaf in leaves])
