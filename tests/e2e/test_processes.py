"""The processes themselves: start-up failures in one sentence, Ctrl-C, no orphans, an engine of its own, PostgreSQL."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.server import BASE_MODEL, Server, environment, free_port
from tests.support.tenant import Tenant, good_datum

STOP_LIMIT_S = 5.0


def wait_gone(server: Server, limit_s: float) -> list[int]:
    """The server's processes that are still there after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while server.pids() and time.monotonic() < deadline:
        time.sleep(0.02)
    return server.pids()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "sampling"])
def test_ctrl_c_stops_both_processes_within_five_seconds(tiny_qwen3: Path, tmp_path: Path, busy: bool) -> None:
    with Server(tiny_qwen3, tmp_path) as server, server.client() as http:
        assert len(server.pids()) >= 2
        tenant = Tenant(http)
        if busy:
            for number in range(8):
                body = tenant.sample_body(tenant.sampler(), num_samples=8, params={"max_tokens": 400, "seed": number})
                tenant.ok("asample", **body)
            tenant.send(tenant.request([good_datum(400, seed=i) for i in range(16)]))
        started = time.monotonic()
        server.interrupt()
        assert wait_gone(server, STOP_LIMIT_S) == []
        assert time.monotonic() - started < STOP_LIMIT_S
        assert server.process is not None
        assert server.process.wait() in (0, 130)
        assert "Traceback" not in server.log.read_text()


def test_kill_9_of_the_api_leaves_no_orphan(tiny_qwen3: Path, tmp_path: Path) -> None:
    with Server(tiny_qwen3, tmp_path) as server:
        assert server.engine_pids()
        server.kill_api()
        assert wait_gone(server, STOP_LIMIT_S) == []


def test_health_tells_the_truth_about_a_dead_engine(tiny_qwen3: Path, tmp_path: Path) -> None:
    with Server(tiny_qwen3, tmp_path) as server:
        (engine,) = server.engine_pids()
        os.kill(engine, signal.SIGKILL)
        seen = set()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            response = httpx.get(f"{server.url}/api/v1/healthz")
            seen.add((response.status_code, response.json()["status"]))
            if response.status_code == 200 and len(seen) > 1:
                break
            time.sleep(0.02)
        statuses = {status for code, status in seen if code == 503}
        assert statuses
        assert statuses <= {"starting", "recovering"}
        assert (200, "ok") in seen


def failing(*flags: str, module: str = "tx.tinker.api", **variables: str) -> str:
    """Standard error of a start that must fail with exit code 2."""
    result = subprocess.run(
        [sys.executable, "-m", module, "--port", str(free_port()), *flags]
        if module.endswith("api")
        else [sys.executable, "-m", module, *flags],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, f"exit code {result.returncode}: {result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr + result.stdout
    return result.stderr


def test_unknown_flag() -> None:
    assert "--max-lora-rnak" in failing("--max-lora-rnak", "8")


def test_bad_value() -> None:
    said = failing("--max-lora-rank", "many")
    assert "max-lora-rank" in said
    assert "many" in said


def test_bad_value_from_the_environment() -> None:
    said = failing(TX_MAX_LORA_RANK="many")
    assert "max_lora_rank" in said.lower().replace("-", "_")


def test_missing_folder(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-model-here")
    assert missing in failing("--base-model", missing, "--data-dir", str(tmp_path))


def test_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in failing("--base-model", str(tmp_path / "empty"), "--data-dir", str(tmp_path))


def test_unknown_model_family(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for file in tiny_qwen3.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((tiny_qwen3 / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    said = failing("--base-model", str(folder), "--data-dir", str(tmp_path))
    assert "GPT2LMHeadModel" in said
    assert "Qwen3ForCausalLM" in said


def test_unreachable_hub(tmp_path: Path) -> None:
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    assert "nobody/nothing" in failing("--base-model", "nobody/nothing", "--data-dir", str(tmp_path), **nowhere)


def test_mesh_that_does_not_fit(tiny_qwen3: Path, tmp_path: Path) -> None:
    said = failing("--base-model", str(tiny_qwen3), "--data-dir", str(tmp_path), "--tensor-parallel-size", "64")
    assert "64" in said
    assert "device" in said


def test_unreachable_database(tiny_qwen3: Path, tmp_path: Path) -> None:
    url = "postgresql://nobody@127.0.0.1:9/none"
    flags = ("--base-model", str(tiny_qwen3), "--data-dir", str(tmp_path), "--database-url", url)
    assert "database" in failing(*flags)
    assert "database" in failing(*flags, module="tx.tinker.engine")


def test_port_that_is_taken(server: Server, tiny_qwen3: Path, tmp_path: Path) -> None:
    said = failing("--base-model", str(tiny_qwen3), "--data-dir", str(tmp_path), "--port", str(server.port))
    assert str(server.port) in said


def test_help_explains_every_flag() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tx.tinker.api", "--help"], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    for flag in ("--base-model", "--max-lora-adapters", "--checkpoints-base", "--database-url", "--served-model-name"):
        assert flag in result.stdout


def test_an_engine_of_its_own_on_postgresql(tiny_qwen3: Path, postgres_url: str, tmp_path: Path) -> None:
    """`tx.tinker.api --external-engine` and `tx.tinker.engine`, joined only by the database URL."""
    flags = ("--database-url", postgres_url)
    api = Server(tiny_qwen3, tmp_path, *flags, "--external-engine")
    command = [sys.executable, "-m", "tx.tinker.engine", "--base-model", str(tiny_qwen3), *flags]
    command += ["--served-model-name", BASE_MODEL, "--data-dir", str(tmp_path)]
    with (tmp_path / "engine.log").open("wb") as log:
        engine = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    try:
        with api, api.client() as http:
            assert len(api.pids()) == 1
            tenant = Tenant(http)
            first = tenant.forward_backward([good_datum()]).metrics["loss:sum"]
            tenant.optim_step()
            assert tenant.forward_backward([good_datum()]).metrics["loss:sum"] < first
            reply = tenant.ok("save_weights", model_id=tenant.model_id, seq_id=tenant.next_seq(), path="pg")
            assert tenant.json(reply["request_id"])["path"] == f"tinker://{tenant.model_id}/weights/pg"
            drawn = tenant.sample(tenant.sampler(), num_samples=3)
            assert len(drawn.sequences) == 3
            runs = http.get("/training_runs").json()["training_runs"]
            assert [run["training_run_id"] for run in runs] == [tenant.model_id]
        engine.send_signal(signal.SIGINT)
        assert engine.wait(timeout=STOP_LIMIT_S) in (0, 130)
    finally:
        engine.kill()
        engine.wait()
