"""What a worker hears from its parent. Whole servers of several workers are in tests/e2e/test_api_workers.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tx.tinker.api_workers import CONNECTIONS, EngineState, connections_of_each, worker_command
from tx.tinker.config import TxConfig, parse_args

WORKER = """
import sys, threading, time
from tx.tinker.api_workers import Parent
from tx.tinker.supervisor import say_ready
assert Parent.made_us()
parent, gone = Parent(), threading.Event()
say_ready()
parent.watch(gone.set)
while parent.pid is None:
    time.sleep(0.001)
print(parent.number, parent.pid, parent.restarts, parent.failure, parent.listener.getsockname()[1], flush=True)
gone.wait()
print("gone", flush=True)
"""


def test_a_worker_learns_of_the_engine_and_of_its_parents_death():
    ready_read, ready_write = os.pipe()
    told, telling = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environ = {
            "TX_LISTEN_FD": str(listener.fileno()), "TX_API_WORKER": "2",
            "TX_PARENT_FD": str(told), "TX_READY_FD": str(ready_write),
        }  # fmt: skip
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=os.environ | environ,
            pass_fds=(listener.fileno(), told, ready_write),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert os.read(ready_read, 1) == b"r"
        line = EngineState(pid=17, restarts=3, failure="it is tired").to_line() + b"\n"
        os.write(telling, line[:5])
        os.write(telling, line[5:])
        assert worker.stdout is not None
        assert worker.stdout.readline().split(maxsplit=3)[:3] == ["2", "17", "3"]
        os.close(telling)
        assert worker.stdout.readline() == "gone\n"
        worker.wait()
        worker.stdout.close()
    for descriptor in (ready_read, ready_write, told):
        os.close(descriptor)


def test_a_workers_command_says_the_same_as_the_parents():
    given = ["--base-model", "org/model", "--max-lora-rank", "8", "--api-workers", "3", "--external-engine"]
    given += ["--api-keys-file", "keys"]
    config = parse_args(given, "tx", environ={})
    command = worker_command(config)
    assert command[:3] == [sys.executable, "-m", "tx.tinker.api"]
    assert parse_args(command[3:], "tx", environ={}) == config


@pytest.mark.parametrize("workers", [1, 2, 7, 64])
def test_all_workers_together_have_room_for_a_usual_postgresql(workers):
    each = connections_of_each(TxConfig(api_workers=workers))
    assert each >= 8
    assert each * workers <= max(CONNECTIONS, 8 * workers)
