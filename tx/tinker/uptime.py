"""How old a row is, whatever the wall clock has done since it was written.

Rows carry wall-clock times, and wall clocks leap: by NTP after a boot with a wrong time, by hand, with a suspended
machine. What is deleted or given up for its age must not go for that, so age is counted in uptime: seconds of the
steady clock while this process, or one before it, ran. The difference between the two clocks is noted whenever it
changes, in a file too if there is one; a time on the wall clock then means the oldest moment of uptime that may have
shown it. Time in which nobody ran counts as a leap forward: nobody could come for his answer then.

Example: at uptime 100 the wall clock shows 1100, then leaps to 9000. At uptime 110 (wall 9010) what is older than 50
seconds was written before 1060; at uptime 160 before 9010.

Limits in time that a user has set, of checkpoints and of keys, are not ages: they stay on the wall clock.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tx.tinker.db import now

log = logging.getLogger(__name__)

SETTLE_S = 3600.0
"""Without a record of the past, nothing is old before so much uptime: by then a clock that was wrong at boot is right,
and clients have come back."""

_DRIFT_S = 1.0
"""Differences between the clocks within so much of each other are one."""

_LEAP_S = 60.0
"""A change of the difference that is worth a line in the log."""

_SAVE_EVERY_S = 60.0
"""A crash forgets less uptime than this and one call's distance: then things are taken to be younger by that."""

_MAX_FRAMES = 100


@dataclass
class _Frame:
    """From the uptime ``since`` on, the wall clock minus the uptime was between ``low`` and ``high``."""

    since: float
    low: float
    high: float


class Uptime:
    """The uptime of one process, or with a file of all that have used the file. Any thread may ask.

    Args:
        file: where the record is kept; its folder is made when needed. One that can't be read counts as none, one that
            can't be written is left alone.
        settle_s: uptime before which nothing is old.
        clock: UTC seconds since the epoch.
        steady: seconds that never leap.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        settle_s: float = 0.0,
        clock: Callable[[], float] = now,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._settle_s = settle_s
        self._clock = clock
        self._steady = steady
        self._lock = threading.Lock()
        before, self._frames = _load(file)
        self._began = steady() - before
        self._saved = float("-inf")
        self._look()

    def seconds(self) -> float:
        """The uptime."""
        return self._steady() - self._began

    def before(self, age_s: float) -> float:
        """Whatever the wall clock showed, what was written since ``age_s`` seconds ago has a time from here on.

        0 (UTC seconds since the epoch) while nothing is old.
        """
        return self.span(age_s)[0] if self.seconds() >= self._settle_s else 0.0

    def span(self, age_s: float) -> tuple[float, float]:
        """The first and the last time that the wall clock can have shown within ``age_s`` seconds."""
        with self._lock:
            at = self._look()
            ends = [frame.since for frame in self._frames[1:]] + [at]
            seen = [frame for frame, end in zip(self._frames, ends, strict=True) if end >= at - age_s]
            return at - age_s + min(frame.low for frame in seen), at + max(frame.high for frame in seen)

    def _look(self) -> float:
        """Note what the clocks show; the uptime."""
        at = self.seconds()
        offset = self._clock() - at
        last = self._frames[-1] if self._frames else None
        if last is not None and last.high - _DRIFT_S <= offset <= last.low + _DRIFT_S:
            last.low, last.high = min(last.low, offset), max(last.high, offset)
        else:
            if last is not None and abs(offset - last.high) > _LEAP_S:
                text = "the wall clock has moved by %+.0f s against the uptime: a leap, or nothing ran meanwhile"
                log.info(text, offset - last.high)
            self._frames.append(_Frame(at, offset, offset))
            if len(self._frames) > _MAX_FRAMES:
                first, second = self._frames[:2]
                both = _Frame(first.since, min(first.low, second.low), max(first.high, second.high))
                self._frames[:2] = [both]
            self._saved = float("-inf")
        if at - self._saved >= _SAVE_EVERY_S:
            self._saved = at
            self._save(at)
        return at

    def _save(self, at: float) -> None:
        if self._file is None:
            return
        text = json.dumps({"uptime_s": at, "frames": [[one.since, one.low, one.high] for one in self._frames]})
        new = self._file.with_name(f"{self._file.name}.new")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(text)
            os.replace(new, self._file)
        except OSError as error:
            log.warning("the uptime can't be noted in %s: %s", self._file, error)


def _load(file: Path | None) -> tuple[float, list[_Frame]]:
    if file is None:
        return 0.0, []
    try:
        found = json.loads(file.read_text())
        frames = [_Frame(float(since), float(low), float(high)) for since, low, high in found["frames"]]
        return float(found["uptime_s"]), frames
    except FileNotFoundError:
        return 0.0, []
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("the uptime noted in %s can't be read: %s", file, error)
        return 0.0, []
