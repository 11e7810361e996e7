"""How samples are waited for and given up, through the real SDK: its poller for whole sessions, and cancelling."""

import asyncio
import gc
import time
from collections.abc import Callable

import httpx
import pytest
import tinker
from tinker import types
from tinker.lib.api_future_impl import _APIFuture

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


def waited_for() -> dict[str, _APIFuture]:
    """Samples whose request id the SDK has, by it: the SDK can cancel no others."""
    futures = (thing for thing in gc.get_objects() if type(thing) is _APIFuture)
    return {future.request_id: future for future in futures if future.request_type == "Sample"}


def wait_until(server: Server, name: str, reached: Callable[[float], bool], limit_s: float = WAIT_S) -> None:
    """Until a metric has got there; one that isn't listed yet is 0."""
    deadline = time.monotonic() + limit_s
    while not reached(now := metrics(server).get(name, 0.0)):
        assert time.monotonic() < deadline, f"{name} is {now}"


def test_a_sample_that_the_client_gives_up_leaves_the_queue(server: Server, service):
    sampler = service.create_sampling_client(base_model=BASE_MODEL).result()
    cancelled = 'tx_http_requests_total{route="/cancel_future",status="200"}'
    before, started, earlier = metrics(server), time.monotonic(), waited_for()
    flood = [draw(sampler, seed, num_samples=16, max_tokens=480) for seed in range(8)]
    while len(waited_for().keys() - earlier) < 8:
        assert time.monotonic() < started + WAIT_S
    service.holder.run_coroutine_threadsafe(asyncio.sleep(0)).result(WAIT_S)  # those that it knows of are under way
    for future in flood[1:]:
        future.future().cancel()
    wait_until(server, cancelled, lambda count: count >= before.get(cancelled, 0.0) + 7)
    assert len(flood[0].result(WAIT_S).sequences) == 16, "its neighbour was not cancelled"
    took_s = time.monotonic() - started
    wait_until(server, "tx_sequences_unfinished", lambda left: left == 0, 2 + took_s)
    assert len(draw(sampler, 1).result(WAIT_S).sequences[0].tokens) == 12
