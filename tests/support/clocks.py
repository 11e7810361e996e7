"""A wall clock that a test may put forward or back, and one that only goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from tx.tinker.db import now


@dataclass
class Clocks:
    """In seconds; a new process may find the steady one anywhere."""

    wall: float = field(default_factory=now)
    steady: float = 100.0

    def go_on(self, seconds: float) -> None:
        """Time passes on both."""
        self.wall += seconds
        self.steady += seconds
