"""How jobs end: what a client is told, what only the log says, and a commit that waits for its database."""

import logging
import re

import pytest
from sqlalchemy.exc import OperationalError

from tests.tinker.new_jobs import BASE, ids, new
from tx.errors import InvalidInput, ModelLost
from tx.tinker.endings import COMMIT_WAITS_S, Endings
from tx.tinker.jobs import JobTable, Outcome


class NothingElse:
    """Failures that change no other row."""

    def rows_of_failure(self, _job) -> tuple:
        return ()


@pytest.fixture
def jobs(db) -> JobTable:
    return JobTable(db)


@pytest.fixture
def endings(jobs) -> Endings:
    return Endings(jobs, NothingElse())


@pytest.fixture
def running(jobs):
    (request,) = ids(jobs.append([new(1)]))
    jobs.claim(BASE, 1)
    return jobs.get(request)


def failed(jobs: JobTable, request_id: int) -> tuple[str, str]:
    job = jobs.get(request_id)
    assert job.status == "failed"
    return job.category, job.error


def test_the_client_s_mistake_is_named(endings, jobs, running):
    error = InvalidInput("data[0].model_input", 70_000, "below 512")
    endings.fail(running, error)
    assert failed(jobs, running.request_id) == ("user", str(error))


def test_a_foreseen_failure_of_ours_is_told_as_it_is(endings, jobs, running):
    endings.fail(running, ModelLost("s:train:0 can't be rebuilt"))
    assert failed(jobs, running.request_id) == ("server", "s:train:0 can't be rebuilt")


def test_what_nobody_foresaw_is_told_by_a_number_that_the_log_has(endings, jobs, running, caplog):
    with caplog.at_level(logging.ERROR):
        endings.fail(running, KeyError("/secret/path"))
    category, text = failed(jobs, running.request_id)
    assert category == "server"
    assert "secret" not in text
    number = re.fullmatch(r"Internal error ([0-9a-f]{8}) \(KeyError\); .*", text).group(1)
    (record,) = caplog.records
    assert number in record.getMessage()
    assert record.exc_info[1].args == ("/secret/path",)


@pytest.mark.parametrize("away_for", [1, len(COMMIT_WAITS_S)])
def test_a_commit_waits_for_its_database(endings, jobs, running, monkeypatch, away_for):
    monkeypatch.setattr("tx.tinker.endings.COMMIT_WAITS_S", (0.0,) * len(COMMIT_WAITS_S))
    real, attempts = jobs.commit, []

    def commit(outcomes):
        attempts.append(len(outcomes))
        if len(attempts) <= away_for:
            raise OperationalError("COMMIT", {}, Exception("disk I/O error"))
        real(outcomes)

    monkeypatch.setattr(jobs, "commit", commit)
    endings.commit([Outcome(running.request_id, b"answer")])
    assert jobs.get(running.request_id).result == b"answer"
    assert attempts == [1] * (away_for + 1)
