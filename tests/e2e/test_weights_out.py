"""Taking weights out with the tools that people use: the SDK's command line in its own process, plain downloads."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyrage
import pytest
import tinker

from tests.e2e.test_resume import DATA, step
from tests.support.server import BASE_MODEL, Server, environment
from tx.models import peft, peft_import


def adapter(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a PEFT folder by tx's names."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    adapter_files = {name: files[name] for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE)}
    return dict(peft_import.import_files(adapter_files).weights)


def assert_same(weights: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


def download(server: Server, path: str, into: Path) -> dict:
    """``tinker checkpoint download`` as a user runs it."""
    command = [str(Path(sys.executable).with_name("tinker")), "--format", "json", "checkpoint", "download", path]
    env = environment() | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-test", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([*command, "--output", str(into)], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def rest(server: Server) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key="tml-test")


@pytest.fixture(scope="module")
def trained(server: Server, service: tinker.ServiceClient) -> tuple[tinker.TrainingClient, str, dict[str, np.ndarray]]:
    """A model after two steps, its training checkpoint, and the weights in that checkpoint's folder."""
    training = service.create_lora_training_client(BASE_MODEL, rank=6, seed=1).result()
    step(training)
    step(training)
    path = training.save_state("ck").result().path
    weights = adapter(server.folder / "checkpoints" / path.removeprefix("tinker://"))
    assert any(array.any() for name, array in weights.items() if name.endswith("lora_B"))
    return training, path, weights


def test_the_command_line_downloads_a_training_checkpoint(server, rest, trained, tmp_path):
    _, path, weights = trained
    said = download(server, path, tmp_path)
    folder = Path(said["destination"])
    assert sorted(file.name for file in folder.iterdir()) == [peft.CONFIG_FILE, peft.WEIGHTS_FILE]
    assert said["file_size_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert_same(adapter(folder), weights)
    listed = rest.list_user_checkpoints(limit=100).result().checkpoints
    assert [item.tinker_path for item in listed if item.tinker_path.endswith("/download")] == []


def test_the_command_line_downloads_external_weights(server, rest, trained, tmp_path):
    training, _, weights = trained
    path = training.save_weights_external("for-others", ttl_seconds=3600).result().path
    assert path == f"tinker://{training.model_id}/external_weights/for-others"
    folder = Path(download(server, path, tmp_path)["destination"])
    assert_same(adapter(folder), weights)
    listed = {item.tinker_path: item for item in rest.list_checkpoints(training.model_id).result().checkpoints}
    assert listed[path].checkpoint_type == "external"
    assert listed[path].size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 6


def test_encrypted_weights_are_for_their_recipients_alone(rest, trained, tmp_path):
    training, _, weights = trained
    mine, other = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    path = training.save_weights_external("secret", age_encryption_recipients=[str(mine.to_public())]).result().path
    urls = rest.get_external_weights_urls(path).result().urls
    assert sorted(urls) == [f"{peft.CONFIG_FILE}.age", f"{peft.WEIGHTS_FILE}.age"]
    for name, url in urls.items():
        with urllib.request.urlopen(url) as reply:
            content = reply.read()
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(content, [other])
        (tmp_path / name.removesuffix(".age")).write_bytes(pyrage.decrypt(content, [mine]))
    assert_same(adapter(tmp_path), weights)


def test_a_bad_recipient_is_the_callers_mistake(trained):
    training, _, _ = trained
    recipients = [str(pyrage.x25519.Identity.generate().to_public()), "age1nonsense"]
    future = training.save_weights_external("never", age_encryption_recipients=recipients)
    with pytest.raises(tinker.RequestFailedError, match=r"age_encryption_recipients\.1: got"):
        future.result()
    assert training.forward(DATA, "cross_entropy").result().metrics["loss:sum"] > 0


def test_a_copy_is_sampled_and_loaded_like_its_source_but_not_trained(server, service, rest, trained):
    training, path, _ = trained
    sampled = training.save_weights_for_sampler("s").result().path
    state, sampler = (rest.copy_weights(source, "project-b").result() for source in (path, sampled))
    assert state.split("/")[3:] == ["weights", "ck"]
    prompt = tinker.types.ModelInput.from_ints(list(range(20, 30)))
    params = tinker.types.SamplingParams(max_tokens=12, temperature=0.0)
    tokens = [
        service.create_sampling_client(model_path=each).result().sample(prompt, 1, params).result().sequences[0].tokens
        for each in (sampled, sampler)
    ]
    assert tokens[0] == tokens[1]
    resumed = [service.create_training_client_from_state_with_optimizer(each).result() for each in (path, state)]
    assert step(resumed[0]) == step(resumed[1])
    assert step(resumed[0]) == step(resumed[1])
    with server.client() as http:
        refusal = http.post("save_weights", json={"model_id": state.split("/")[2], "path": "x", "seq_id": 1})
    assert (refusal.status_code, refusal.json()["detail"].split(":")[0]) == (400, "model_id")


def test_a_copy_keeps_its_weights_when_the_source_is_overwritten(service, rest):
    training = service.create_lora_training_client(BASE_MODEL, rank=2, seed=4).result()
    path = training.save_state("here").result().path
    copy = rest.copy_weights(path, "project-b").result()
    before = service.create_training_client_from_state(copy).result().forward(DATA, "cross_entropy").result().metrics
    step(training)
    training.save_state("here", overwrite=True).result()
    clients = [service.create_training_client_from_state(each).result() for each in (copy, path)]
    after, new = (client.forward(DATA, "cross_entropy").result().metrics["loss:sum"] for client in clients)
    assert after == before["loss:sum"]
    assert new != after


def test_older_clients_get_one_tar(server, trained, tmp_path):
    training, _, weights = trained
    with server.client(follow_redirects=False) as http:
        reply = http.get(f"training_runs/{training.model_id}/checkpoints/weights/ck/archive")
    assert reply.status_code == 302
    archive, _ = urllib.request.urlretrieve(reply.headers["location"], tmp_path / "a.tar")
    with tarfile.open(archive, "r") as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "out", filter="data")
    assert "tx_checkpoint.json" not in names
    assert "checkpoint_complete" in names
    assert_same(adapter(tmp_path / "out"), weights)


def test_a_url_is_good_for_its_file_alone(rest, trained):
    training, _, _ = trained
    path = training.save_weights_external("alone").result().path
    urls = rest.get_external_weights_urls(path).result().urls
    url = urls[peft.CONFIG_FILE]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url.replace(peft.CONFIG_FILE, peft.WEIGHTS_FILE))
