"""Logging set-up of the two processes: one readable line per event, on standard error.

Modules log through ``logging.getLogger(__name__)`` and know nothing of this; only an entry point calls ``set_up``.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")

_QUIET = (
    "uvicorn.access",
    "httpx",
    "httpcore",
    "alembic",
    "sqlalchemy.engine",
    "jax",
    "asyncio",
    "urllib3",
    "filelock",
)
"""Loggers of others that speak once per request or per compiled function: warnings only, unless debugging."""


def set_up(process: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send every log record of this process to ``stream`` (standard error), each line marked with ``process``.

    Args:
        process: short name in front of every line, "api" or "engine".
        level: one of LEVELS.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # uvicorn brings handlers of its own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def human_bytes(count: float) -> str:
    """``count`` bytes as a person reads it: "269 MB", "7.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # 999.7 would print as 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class _Formatter(logging.Formatter):
    """``12:03:01 engine  loaded 134.5M parameters``; only warnings and worse name their level."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on its own lines."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        line = f"{clock} {self._process:<7} {level}{record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line
