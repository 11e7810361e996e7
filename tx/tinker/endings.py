"""How jobs end: their outcomes are committed, or what failed them becomes a sentence for the client.

Category "user" is for InvalidInput, everything else is "server". What nobody foresaw goes to the log whole and to the
client as a number by which it is found there.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence

from tx.errors import InvalidInput, TxError
from tx.tinker.db import AWAY, Job
from tx.tinker.jobs import JobTable, Outcome
from tx.tinker.work import Work

log = logging.getLogger(__name__)

COMMIT_WAITS_S = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses between attempts to commit while the database is away."""


class Endings:
    """Of the jobs of one engine; ``work`` knows what else a failure changes."""

    def __init__(self, jobs: JobTable, work: Work) -> None:
        self._jobs, self._work = jobs, work

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Commit, and again while the database is away: an outcome that is lost would be computed anew."""
        for wait_s in COMMIT_WAITS_S:
            try:
                self._jobs.commit(outcomes)
                return
            except AWAY as error:
                log.warning("results can't be committed, next try in %.1f s: %s", wait_s, error.args[0])
                time.sleep(wait_s)
        self._jobs.commit(outcomes)

    def fail(self, job: Job, error: Exception) -> None:
        """The job is over, with this error alone."""
        rows = self._work.rows_of_failure(job)
        if isinstance(error, InvalidInput):
            self._jobs.fail(job.request_id or 0, str(error), "user", rows)
        elif isinstance(error, TxError):
            log.warning("%s %s failed: %s", job.kind, job.request_id, error)
            self._jobs.fail(job.request_id or 0, str(error), "server", rows)
        else:
            short = uuid.uuid4().hex[:8]
            log.error("%s %s failed (%s)", job.kind, job.request_id, short, exc_info=error)
            text = f"Internal error {short} ({type(error).__name__}); the server's log has more."
            self._jobs.fail(job.request_id or 0, text, "server", rows)
