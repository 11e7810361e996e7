"""The real engine process: one sentence when it can't start, ready with a true row, gone when told or orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.object_stores import CREDENTIALS
from tests.support.server import free_port
from tx.tinker import startup
from tx.tinker.db import Engine as EngineRow
from tx.tinker.db import open_database, reading
from tx.tinker.notify import ChangeSignal
from tx.tinker.registration import Registration
from tx.tinker.startup import PARENT_FD
from tx.worker.ahead import Call, Step, compiling

START_S = 120.0
STOP_S = 5.0


def command(tmp_path: Path, model: Path | str, *more: str) -> list[str]:
    engine = [sys.executable, "-m", "tx.tinker.engine"]
    return [*engine, "--base-model", str(model), "--data-dir", str(tmp_path / "data"), *more]


def environ(tmp_path: Path) -> dict[str, str]:
    nowhere = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    return os.environ | nowhere | {"TX_DATABASE_URL": f"sqlite:///{tmp_path / 'tx.db'}", "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("/no/such/folder", [], ["/no/such/folder", "does not exist"]),
        ("tiny", ["--tensor-parallel-size", "64"], ["64"]),
        ("tiny", ["--checkpoints-base", "/dev/null/x"], ["--checkpoints-base", "/dev/null/x", "Not a directory"]),
        ("tiny", ["--checkpoints-base", "s3://none"], ["--checkpoints-base", "s3://none", "no connection"]),
    ],
)
def test_what_cannot_start_says_so_in_one_sentence(tmp_path, tiny_qwen3, model, more, words):
    model = tiny_qwen3 if model == "tiny" else model
    done = subprocess.run(
        command(tmp_path, model, "--log-level", "error", *more), env=environ(tmp_path), capture_output=True, text=True,
        timeout=START_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tx: ")
    assert all(word in last for word in words)
    with reading(open_database(environ(tmp_path)["TX_DATABASE_URL"])) as db:
        name = str(tiny_qwen3) if model == tiny_qwen3 else model
        assert db.get(EngineRow, name).state == "failed"


@pytest.mark.parametrize("theirs", [None, "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_most_of_an_accelerator_is_taken_unless_its_owner_says_otherwise(monkeypatch, theirs):
    """JAX refuses both variables at once."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "0.4")  # undone at the end, whatever is set meanwhile
        if name != theirs:
            monkeypatch.delenv(name)
    startup._claim_memory()
    set_now = {name: value for name, value in os.environ.items() if "MEM_FRACTION" in name}
    assert set_now == ({theirs: "0.4"} if theirs else {"XLA_CLIENT_MEM_FRACTION": "0.9"})


class Steps:
    """Stands in for a worker: its warm-up notes what the engine's row said when each step ran."""

    def __init__(self, registration: Registration, database: Any, *, broken: int = -1) -> None:
        self.seen: list[tuple[str, str]] = []
        self._registration, self._database, self._broken = registration, database, broken

    def warm_up(self) -> list[Step]:
        return [Step(number, f"step {number}", partial(self._run, number)) for number in range(3)]

    def _run(self, number: int, call: Call) -> None:
        assert call is compiling
        with reading(self._database) as db:
            row = db.get(EngineRow, "base")
        self.seen.append((row.state, row.detail))
        if number == self._broken:
            raise RuntimeError("no room")


@pytest.fixture
def registered(database_url):
    database = open_database(database_url)
    registration = Registration(database, "base", ("base",))
    yield registration, database
    registration.close()
    database.dispose()


def test_warm_up_says_how_far_it_is(registered):
    steps = Steps(*registered)
    startup.warm_up(steps, registered[0], lambda: False)
    assert steps.seen == [("starting", f"warming up: {number + 1} of 3, step {number}") for number in range(3)]


def test_a_step_of_warm_up_that_fails_is_left_out(registered, caplog):
    steps = Steps(*registered, broken=1)
    startup.warm_up(steps, registered[0], lambda: False)
    assert len(steps.seen) == 3
    assert "step 1 failed: no room" in caplog.text


def test_warm_up_ends_between_two_steps_when_told_to(registered):
    steps = Steps(*registered)
    startup.warm_up(steps, registered[0], lambda: len(steps.seen) == 2)
    assert len(steps.seen) == 2


def test_an_engine_that_warms_up_is_gone_soon_after_it_is_told(tmp_path, tiny_qwen3):
    process = subprocess.Popen(command(tmp_path, tiny_qwen3, "--warmup"), env=environ(tmp_path))
    database = open_database(environ(tmp_path)["TX_DATABASE_URL"])
    said: list[str] = []
    try:
        deadline = time.monotonic() + START_S
        while not said or not said[-1].startswith("warming up: "):
            assert process.poll() is None, "the engine died"
            assert time.monotonic() < deadline, said
            with reading(database) as db:
                row = db.get(EngineRow, str(tiny_qwen3))
            said.append("" if row is None else row.detail)
        assert row.state == "starting"
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("way", ["SIGTERM", "orphaned"])
def test_a_running_engine_is_gone_soon_after_it_is_told(tmp_path, tiny_qwen3, way):
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        command(tmp_path, tiny_qwen3, "--served-model-name", "my/model"),
        env=environ(tmp_path) | {PARENT_FD: str(read_end)},
        pass_fds=(read_end,),
    )
    os.close(read_end)
    url = environ(tmp_path)["TX_DATABASE_URL"]
    database, changes = open_database(url), ChangeSignal(url)

    def row() -> EngineRow | None:
        with reading(database) as db:
            return db.get(EngineRow, str(tiny_qwen3))

    try:
        deadline = time.monotonic() + START_S
        while (seen := row()) is None or seen.state != "ready":
            assert process.poll() is None, "the engine died"
            assert time.monotonic() < deadline, "the engine never became ready"
            changes.wait(1.0)
        assert (seen.max_context, seen.vocab_size, seen.tokenizer) == (512, 2048, str(tiny_qwen3))
        assert seen.served_names == [str(tiny_qwen3), "my/model"]
        assert seen.pid == process.pid
        if way == "orphaned":
            os.close(write_end)
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
        assert row().state == "stopped"
    finally:
        process.kill()
        process.wait()
        if way != "orphaned":
            os.close(write_end)
