"""An adapter of PEFT's layout, imported into a running server: the real SDK samples from it and trains on from it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tinker
from safetensors.numpy import save
from tinker import types

from tests.e2e.test_two_tenants import example
from tests.support.server import BASE_MODEL, Server, environment
from tx.models.peft import CONFIG_FILE, WEIGHTS_FILE

RANK = 4
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}


@pytest.fixture(scope="module")
def path(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tinker:// path that the command prints, of q_proj and v_proj with rslora."""
    folder, rng = tmp_path_factory.mktemp("adapter"), np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for module, outer in (("q_proj", 64), ("v_proj", 32)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, 0.2, (RANK, 64)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.2, (outer, RANK)).astype(np.float32)
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG))
    (folder / WEIGHTS_FILE).write_bytes(save(tensors))
    command = [sys.executable, "-m", "tx.tinker.import", str(folder), "--data-dir", str(server.folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_it_samples_at_once_and_its_logprobs_are_the_trainers(service: tinker.ServiceClient, path: str):
    datum = example(1, 12)
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].data[-1])]
    prompt = types.ModelInput.from_ints(tokens)
    imported = service.create_sampling_client(model_path=path).result()
    base = service.create_sampling_client(base_model=BASE_MODEL).result()
    scores = [np.array(client.compute_logprobs(prompt).result()[1:]) for client in (imported, base)]
    assert np.abs(scores[0] - scores[1]).max() > 0.01  # it is not the base model
    training = service.create_training_client_from_state(path).result()
    trained = training.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(scores[0], trained, atol=1e-4)
    sampled = imported.sample(prompt, 1, types.SamplingParams(max_tokens=4, seed=1)).result()
    assert len(sampled.sequences[0].tokens) <= 4


def test_it_trains_on_and_its_checkpoints_have_the_same_modules(
    service: tinker.ServiceClient, server: Server, path: str
):
    training = service.create_training_client_from_state(path).result()
    assert training.get_info().lora_rank == RANK
    losses = []
    for _ in range(3):
        loss = training.forward_backward([example(1, 12)], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(loss.result().metrics["loss:sum"])
    assert losses == sorted(losses, reverse=True)
    saved = training.save_state("after").result().path
    folder: Path = server.folder / "checkpoints" / saved.removeprefix("tinker://")
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    assert config["lora_alpha"] / config["r"] == pytest.approx(6 / np.sqrt(RANK))
    resumed = service.create_training_client_from_state_with_optimizer(saved).result()
    again = resumed.forward([example(1, 12)], "cross_entropy").result().metrics["loss:sum"]
    assert again == training.forward([example(1, 12)], "cross_entropy").result().metrics["loss:sum"]
