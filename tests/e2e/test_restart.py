"""What a client was promised survives Ctrl-C and kill -9: futures, models, snapshots, checkpoints, sampled tokens."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.server import Server
from tests.support.tenant import Tenant, good_datum
from tx.tinker.wire import tinker_pb2


@pytest.fixture(params=["ctrl-c", "kill -9 of the engine"])
def broken_by(request: pytest.FixtureRequest) -> str:
    return request.param


def losses(tenant: Tenant, steps: int) -> list[float]:
    out = []
    for _ in range(steps):
        out.append(tenant.forward_backward([good_datum(8), good_datum(25, seed=1)]).metrics["loss:sum"])
        tenant.optim_step()
    return out


def saved(tenant: Tenant, endpoint: str, **fields: object) -> dict:
    reply = tenant.ok(endpoint, model_id=tenant.model_id, seq_id=tenant.next_seq(), **fields)
    return tenant.json(reply["request_id"])


def test_everything_promised_is_there_afterwards(tiny_qwen3: Path, tmp_path: Path, broken_by: str) -> None:
    with Server(tiny_qwen3, tmp_path) as server, server.client() as http:
        control = Tenant(http, seed=5)
        expected = losses(control, 6)

        tenant = Tenant(http, seed=5)
        assert losses(tenant, 3) == expected[:3]
        pending = tenant.send(tenant.request([good_datum(12, seed=2)], forward_only=True)).json()["request_id"]
        answer = tenant.outcome(pending).protobuf
        checkpoint = saved(tenant, "save_weights", path="three")["path"]
        named = tenant.sampler(model_path=saved(tenant, "save_weights_for_sampler", path="sampler")["path"])
        unnamed = saved(tenant, "save_weights_for_sampler", sampling_session_seq_id=tenant.sampler_seq, kind="snapshot")
        ephemeral = unnamed["sampling_session_id"]
        tenant.sampler_seq += 1
        params = {"seed": 42, "max_tokens": 12}
        drawn = [tenant.sample(sampler, params=params).sequences for sampler in (named, ephemeral)]
        assert drawn[0] == drawn[1]

        if broken_by == "ctrl-c":
            server.interrupt()
            assert server.process is not None
            server.process.wait(timeout=10)
            server.start()
        else:
            (engine,) = server.engine_pids()
            os.kill(engine, signal.SIGKILL)

        assert tenant.outcome(pending).protobuf == answer
        assert [tenant.sample(sampler, params=params).sequences for sampler in (named, ephemeral)] == drawn
        assert losses(tenant, 3) == expected[3:]

        resumed = Tenant(http, seed=77)
        load = {"path": checkpoint, "optimizer": True}
        tenant.json(
            resumed.ok("load_weights", model_id=resumed.model_id, seq_id=resumed.next_seq(), **load)["request_id"]
        )
        assert losses(resumed, 3) == expected[3:]


def test_jobs_sent_while_the_engine_is_down_are_done_when_it_is_back(tiny_qwen3: Path, tmp_path: Path) -> None:
    with Server(tiny_qwen3, tmp_path) as server, server.client() as http:
        control = Tenant(http, seed=5)
        expected = losses(control, 2)
        tenant = Tenant(http, seed=5)
        (engine,) = server.engine_pids()
        os.kill(engine, signal.SIGKILL)
        sent = tenant.send(tenant.request([good_datum(8), good_datum(25, seed=1)]))
        assert sent.status_code == 200
        again = tenant.send(sent.request.content)  # a client that lost the answer sends the same bytes again
        assert again.json()["request_id"] == sent.json()["request_id"]
        output = tinker_pb2.ForwardBackwardOutput.FromString(tenant.outcome(sent.json()["request_id"]).protobuf or b"")
        assert output.metrics["loss:sum"] == expected[0]
        tenant.optim_step()
        assert losses(tenant, 1) == expected[1:]
