"""Counting what JAX compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled meanwhile, by name."""
    names: list[str] = []

    def record(event, _duration, **labels):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(labels.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
