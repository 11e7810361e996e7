"""The supervisor with a stand-in engine: start, restart, refuse, stop, leave no orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tx.tinker.supervisor import PARENT_FD, Supervisor

LIVES = """
import os, signal, sys
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
os.read(int(os.environ["TX_PARENT_FD"]), 1)  # end-of-file when the parent is gone
open(sys.argv[1], "a").write("orphaned\\n")
"""


def wait_for(condition, limit_s: float = 20.0):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("timed out")


@pytest.fixture
def trace(tmp_path):
    file = tmp_path / "trace"
    file.touch()
    return file


def lines(trace) -> list[str]:
    return trace.read_text().split()


@pytest.fixture
def supervise(trace):
    made = []

    def make(script: str, **kwargs) -> Supervisor:
        made.append(Supervisor([sys.executable, "-c", script, str(trace)], first_backoff_s=0.01, **kwargs))
        return made[-1]

    yield make
    [supervisor.stop() for supervisor in made]


def test_a_dead_engine_is_started_again(supervise, trace):
    supervisor = supervise(LIVES)
    supervisor.start()
    first = int(wait_for(lambda: lines(trace))[0])
    assert supervisor.pid == first
    os.kill(first, signal.SIGKILL)
    second = int(wait_for(lambda: lines(trace)[1:])[0])
    assert second != first
    assert (supervisor.pid, supervisor.restarts, supervisor.failure) == (second, 1, None)


@pytest.mark.parametrize(
    ("death", "told"),
    [("os.kill(os.getpid(), signal.SIGKILL)", "killed"), ("os.abort()", "no"), ("sys.exit(1)", "no")],
)
def test_the_next_one_knows_whether_somebody_killed_the_last(supervise, trace, death, told):
    script = f"""
import os, signal, sys
from tx.tinker.supervisor import was_killed
open(sys.argv[1], "a").write("killed " if was_killed() else "no ")
{death}
"""
    supervise(script).start()
    first, second = wait_for(lambda: lines(trace)[1:] and lines(trace))[:2]
    assert (first, second) == ("no", told)


def test_stop_ends_the_engine_and_starts_no_other(supervise, trace):
    supervisor = supervise(LIVES)
    supervisor.start()
    pid = int(wait_for(lambda: lines(trace))[0])
    supervisor.stop()
    assert supervisor.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    supervisor.stop()
    assert lines(trace) == [str(pid)]


def test_an_engine_that_ignores_sigterm_is_killed(supervise, trace, monkeypatch):
    monkeypatch.setattr("tx.tinker.supervisor._STOP_GRACE_S", 0.2)
    supervisor = supervise("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LIVES)
    supervisor.start()
    wait_for(lambda: lines(trace))
    supervisor.stop()
    assert supervisor.pid is None


def test_an_engine_that_cannot_start_is_not_started_again(supervise, trace):
    codes, said = [], threading.Event()

    def on_fatal(code: int) -> None:
        codes.append(code)
        said.set()

    supervisor = supervise("open(__import__('sys').argv[1], 'a').write('try ')\nraise SystemExit(2)", on_fatal=on_fatal)
    supervisor.start()
    assert said.wait(20)
    supervisor.stop()
    assert codes == [2]
    assert lines(trace) == ["try"]
    assert supervisor.failure


BECOMES_READY = """
import os, sys
tries = open(sys.argv[1], "a+")
tries.seek(0)
count = len(tries.read().split())
tries.write("try ")
tries.close()
if count < 6:
    raise SystemExit(3)
os.write(int(os.environ["TX_READY_FD"]), b"r")
os.read(int(os.environ["TX_PARENT_FD"]), 1)
"""


def test_a_crash_loop_is_a_failure_and_ends_with_the_first_engine_that_gets_ready(supervise, trace, monkeypatch):
    monkeypatch.setattr("tx.tinker.supervisor._MAX_BACKOFF_S", 0.5)
    supervisor = supervise(BECOMES_READY)
    supervisor.start()
    failure = wait_for(lambda: supervisor.failure)
    assert "5 times in a row" in failure
    assert "exit code 3" in failure
    wait_for(lambda: supervisor.failure is None)
    assert supervisor.pid is not None
    assert supervisor.restarts == 6


def test_engines_that_were_of_use_are_no_crash_loop(supervise, trace):
    ready = "import os; os.write(int(os.environ['TX_READY_FD']), b'r')\n" + LIVES
    supervisor = supervise(ready, of_use_s=0.0)
    supervisor.start()
    for count in range(1, 8):
        pid = int(wait_for(lambda wanted=count: lines(trace)[wanted - 1 :])[0])
        wait_for(lambda wanted=pid: supervisor.pid == wanted)
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: supervisor.restarts == 7)
    assert supervisor.failure is None


def test_no_orphan_when_the_supervising_process_is_killed(trace):
    parent = f"""
import sys
from tx.tinker.supervisor import Supervisor
Supervisor([sys.executable, "-c", {LIVES!r}, {str(trace)!r}]).start()
import threading; threading.Event().wait()
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    wait_for(lambda: lines(trace))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: "orphaned" in lines(trace))


def test_the_engine_gets_its_environment(supervise, trace):
    script = "import os, sys; open(sys.argv[1], 'a').write(os.environ['TX_DATABASE_URL'])\n" + LIVES
    supervisor = supervise(script, environ={"TX_DATABASE_URL": "sqlite:///x"})
    supervisor.start()
    assert wait_for(lambda: lines(trace))[0].startswith("sqlite:///x")
    assert PARENT_FD not in os.environ
