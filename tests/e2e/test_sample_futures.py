"""How samples are waited for and given up, through the real SDK: its poller for whole sessions, and cancelling."""

import time

import httpx
import pytest
import tinker
from tinker import types

from tests.support.server import BASE_MODEL, Server

PROMPT = types.ModelInput.from_ints([11, 12, 13, 14])
WAIT_S = 60.0


def draw(sampler: tinker.SamplingClient, seed: int, num_samples: int = 1, max_tokens: int = 12):
    params = types.SamplingParams(max_tokens=max_tokens, seed=seed, stop=[])
    return sampler.sample(PROMPT, num_samples, params)


@pytest.fixture
def poller_sampler(service: tinker.ServiceClient) -> tinker.SamplingClient:
    """A sampler that learns of its results with retrieve_futures, as a server may ask of its clients."""
    config = service.holder._client_config
    object.__setattr__(config, "sample_use_retrieve_futures", True)
    yield service.create_sampling_client(base_model=BASE_MODEL).result()
    object.__setattr__(config, "sample_use_retrieve_futures", False)


def test_one_poller_for_a_session_gives_what_single_polls_give(server: Server, service, poller_sampler):
    together = [draw(poller_sampler, seed) for seed in range(12)]
    results = [list(future.result(WAIT_S).sequences[0].tokens) for future in together]
    assert poller_sampler._futures_poller is not None, "the SDK did not take the way that this test is about"
    object.__setattr__(service.holder._client_config, "sample_use_retrieve_futures", False)
    plain = service.create_sampling_client(base_model=BASE_MODEL).result()
    assert [list(draw(plain, seed).result(WAIT_S).sequences[0].tokens) for seed in range(12)] == results


def metrics(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/api/v1/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def wait_for_queue(server: Server, allowed: range, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while (now := metrics(server)["tx_sequences_unfinished"]) not in allowed:
        assert time.monotonic() < deadline, f"{now} sequences are unfinished"


def test_a_sample_that_the_client_gives_up_leaves_the_queue(server: Server, service):
    sampler = service.create_sampling_client(base_model=BASE_MODEL).result()
    started = time.monotonic()
    flood = [draw(sampler, seed, num_samples=16, max_tokens=480) for seed in range(8)]
    wait_for_queue(server, range(7 * 16, 8 * 16 + 1), WAIT_S)  # the SDK can only cancel what it has a request id of
    for future in flood[1:]:
        future.future().cancel()
    assert len(flood[0].result(WAIT_S).sequences) == 16, "its neighbour was not cancelled"
    took_s = time.monotonic() - started
    wait_for_queue(server, range(1), 2 + took_s)  # the other seven would take seven times as long
    assert metrics(server)['tx_http_requests_total{route="/cancel_future",status="200"}'] >= 7
    assert len(draw(sampler, 1).result(WAIT_S).sequences[0].tokens) == 12
