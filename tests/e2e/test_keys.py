"""Two users with API keys of their own, through the real SDK: each sees only what is his, or published."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.support.server import BASE_MODEL, Server
from tx.tinker import keys

WAIT_S = 120


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys"


@pytest.fixture(scope="module")
def given(key_file: Path) -> dict[str, str]:
    return {name: keys.add(key_file, name) for name in ("alice", "bob")}


@pytest.fixture(scope="module")
def server(tiny_qwen3, tmp_path_factory, key_file, given) -> Iterator[Server]:
    with Server(tiny_qwen3, tmp_path_factory.mktemp("server"), "--api-keys-file", str(key_file)) as running:
        yield running


def test_each_sees_only_his_own_and_what_is_published(server: Server, given: dict[str, str]):
    with (
        tinker.ServiceClient(base_url=server.url, api_key=given["alice"]) as alice,
        tinker.ServiceClient(base_url=server.url, api_key=given["bob"]) as bob,
    ):
        training = alice.create_lora_training_client(BASE_MODEL, rank=4).result(WAIT_S)
        path = training.save_state("mine").result(WAIT_S).path
        sampled = training.save_weights_for_sampler("sampler").result(WAIT_S).path
        run = training.get_info().model_id
        hers, his = (tinker.RestClient(base_url=server.url, api_key=given[name]) for name in ("alice", "bob"))
        assert [each.training_run_id for each in hers.list_training_runs().result(WAIT_S).training_runs] == [run]
        assert his.list_training_runs().result(WAIT_S).training_runs == []
        assert his.list_user_checkpoints().result(WAIT_S).checkpoints == []
        for ask in (
            lambda: his.get_training_run(run).result(WAIT_S),
            lambda: his.delete_checkpoint_from_tinker_path(path).result(WAIT_S),
            lambda: his.publish_checkpoint_from_tinker_path(path).result(WAIT_S),
        ):
            with pytest.raises(tinker.NotFoundError):
                ask()
        with pytest.raises(tinker.RequestFailedError, match="a checkpoint on this server"):
            bob.create_training_client_from_state(path).result(WAIT_S)
        with pytest.raises(tinker.NotFoundError):
            bob.create_sampling_client(model_path=sampled).result(WAIT_S)

        for each in (path, sampled):
            hers.publish_checkpoint_from_tinker_path(each).result(WAIT_S)
        copied = bob.create_training_client_from_state(path).result(WAIT_S)
        assert copied.get_info().lora_rank == 4
        prompt = tinker.ModelInput.from_ints([1, 2, 3])
        greedy = tinker.SamplingParams(max_tokens=3, temperature=0)
        tokens = [
            client.create_sampling_client(model_path=sampled).result(WAIT_S).sample(prompt, 1, greedy).result(WAIT_S)
            for client in (alice, bob)
        ]
        assert tokens[0].sequences[0].tokens == tokens[1].sequences[0].tokens
        with pytest.raises(tinker.NotFoundError):
            his.delete_checkpoint_from_tinker_path(path).result(WAIT_S)


def test_a_key_that_is_none_of_the_servers_ends_the_client_at_once(server: Server):
    with pytest.raises(tinker.AuthenticationError, match="X-API-Key"):
        tinker.RestClient(base_url=server.url, api_key="tml-unknown").get_server_capabilities().result(WAIT_S)


def test_the_command_line_knows_who_it_is(server: Server, given: dict[str, str]):
    variables = os.environ | {"TINKER_API_KEY": given["alice"], "TINKER_BASE_URL": server.url}
    command = [sys.executable, "-m", "tinker.cli", "auth", "whoami"]
    said = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "alice" in said.stdout
