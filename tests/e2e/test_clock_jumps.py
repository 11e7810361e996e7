"""The wall clock leaps by days under a running server, forward and back: no future, no number and no bit changes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from safetensors.numpy import load_file

from tests import inject
from tests.support.server import Server
from tests.support.tenant import Outcome, Tenant, good_datum
from tx.tinker.wire import tinker_pb2

DAYS_S = 9 * 86400.0
LIMIT_S = 60.0

SETTINGS = {
    "tx.tinker.api": {"_SWEEP_S": 0.1, "_LOOK_FOR_ABANDONED_S": 0.1},
    "tx.tinker.engine": {"HOUSEKEEPING_EVERY_S": 0.1},
    "tx.tinker.uptime": {"SETTLE_S": 0.0},
    "tx.tinker.recovery_points": {"MIN_TRAINED_S": 0.0, "SHARE": 1e9},
}
"""Whatever deletes for age does so all the time."""


class Clock:
    """The server's wall clock, and what has been noticed of it."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.file = folder / "clock"

    def leap_to(self, ahead_s: float) -> None:
        """Put it so far ahead of the true time."""
        new = self.file.with_suffix(".new")
        new.write_text(str(ahead_s))
        new.replace(self.file)

    def wait_noticed(self, ahead_s: float) -> None:
        """Until API and engine have kept house by the clock that is so far ahead."""
        started = time.time()

        def noticed() -> bool:
            files = [*self.server.folder.glob("uptime-api"), *self.server.folder.glob("recovery/*/uptime")]
            records = [json.loads(file.read_text()) for file in files]
            offsets = [record["frames"][-1][2] + record["uptime_s"] - started for record in records]
            return len(files) == 2 and all(abs(offset - ahead_s) < 3600 for offset in offsets)

        wait(noticed)

    def kill_engine(self) -> None:
        """And wait until there is another."""
        (engine,) = self.server.engine_pids()
        os.kill(engine, signal.SIGKILL)
        wait(lambda: [pid for pid in self.server.engine_pids() if pid != engine] != [])


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(server: Server, request_id: str) -> str:
    with closing(sqlite3.connect(server.folder / "tx.db")) as db:
        (found,) = db.execute("SELECT status FROM job WHERE request_id = ?", (int(request_id),)).fetchone()
    return found


def trained(outcome: Outcome) -> tuple[float, list[bytes]]:
    """The loss and each datum's outputs, not how fast it went."""
    assert outcome.protobuf is not None, outcome.json
    output = tinker_pb2.ForwardBackwardOutput.FromString(outcome.protobuf)
    return output.metrics["loss:sum"], [each.SerializeToString() for each in output.loss_fn_outputs]


def sampled(outcome: Outcome) -> list[bytes]:
    """Tokens and logprobs."""
    assert outcome.protobuf is not None, outcome.json
    response = tinker_pb2.SampleResponse.FromString(outcome.protobuf)
    return [each.SerializeToString() for each in response.sequences]


def course(server: Server, tenant: Tenant, leaps: Callable[[int], None]) -> list[object]:
    """Everything that a tenant is answered in two rounds, and his adapter; ``leaps`` in each of them."""
    seen: list[object] = []
    for number in range(2):
        early = tenant.send(tenant.request([good_datum(9, seed=number)], forward_only=True)).json()["request_id"]
        wait(lambda early=early: status(server, early) == "done")  # it is there, and nobody has come for it yet
        step = tenant.send(tenant.request([good_datum(8, seed=number), good_datum(25, seed=1)])).json()["request_id"]
        adam = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
        optim = tenant.ok("optim_step", model_id=tenant.model_id, seq_id=tenant.next_seq(), adam_params=adam)
        save = tenant.ok(
            "save_weights_for_sampler", model_id=tenant.model_id, seq_id=tenant.next_seq(),
            sampling_session_seq_id=tenant.sampler_seq, kind="snapshot",
        )  # fmt: skip
        tenant.sampler_seq += 1
        sampler = tenant.json(save["request_id"])["sampling_session_id"]
        params = {"seed": 7, "max_tokens": 150}
        drawn = tenant.ok("asample", **tenant.sample_body(sampler, params=params))["request_id"]
        leaps(number)
        seen += [trained(tenant.outcome(each)) for each in (early, step)] + [sampled(tenant.outcome(drawn))]
        tenant.json(optim["request_id"])
    saved = tenant.ok("save_weights", model_id=tenant.model_id, seq_id=tenant.next_seq(), path="end")
    tenant.json(saved["request_id"])
    files = sorted(server.folder.glob(f"checkpoints/{tenant.model_id}/**/*.safetensors"))
    assert len(files) == 2, "weights and moments"
    seen += [{name: array.tobytes() for name, array in load_file(file).items()} for file in files]
    return seen


def test_leaps_by_days_change_nothing(tiny_qwen3: Path, tmp_path: Path) -> None:
    trouble, folder = tmp_path / "trouble", tmp_path / "server"
    trouble.mkdir()
    folder.mkdir()
    with (
        Server(tiny_qwen3, folder, variables=inject.environment_for_troubles(trouble, SETTINGS)) as server,
        server.client() as http,
    ):
        clock = Clock(server, trouble)
        expected = course(server, Tenant(http, seed=5), lambda _: None)

        def leaps(number: int) -> None:
            ahead_s = (DAYS_S, 0.0)[number]
            clock.leap_to(ahead_s)
            clock.kill_engine()
            clock.wait_noticed(ahead_s)

        assert course(server, Tenant(http, seed=5), leaps) == expected
        wait(lambda: http.get("/healthz").json()["status"] == "ok")
        metrics = http.get("/metrics").text.splitlines()
        assert not [line for line in metrics if not line.startswith("#") and float(line.rpartition(" ")[2]) < 0]
