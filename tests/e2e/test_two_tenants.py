"""Two real SDK clients with different ranks: training and sampling at once gives what each gets alone."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import tinker
from tinker import types

from tests.support.server import BASE_MODEL, Server

TOLERANCE = 1e-4
STEPS = 4


@dataclass
class Run:
    """What one client saw."""

    losses: list[float] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    error: BaseException | None = None


def example(seed: int, length: int) -> types.Datum:
    ids = np.random.default_rng(seed).integers(3, 2000, length + 1).tolist()
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": [1.0] * length},
    )


def client_run(url: str, rank: int, seed: int, run: Run, gate: threading.Barrier | None = None) -> None:
    """Train a few steps on ragged data and sample after each, greedily and with a seed."""
    try:
        with tinker.ServiceClient(base_url=url) as service:
            train_and_sample(service, rank, seed, run, gate)
    except BaseException as error:
        run.error = error
        if gate is not None:
            gate.abort()


def train_and_sample(
    service: tinker.ServiceClient, rank: int, seed: int, run: Run, gate: threading.Barrier | None
) -> None:
    training = service.create_lora_training_client(BASE_MODEL, rank=rank, seed=seed).result()
    data = [example(100 * seed + i, length) for i, length in enumerate((5, 17, 40))]
    prompt = types.ModelInput.from_ints([7, 8, 9 + seed])
    for step in range(STEPS):
        if gate is not None:
            gate.wait(timeout=120)
        result = training.forward_backward(data, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=5e-3)).result()
        run.losses.append(result.result().metrics["loss:sum"])
        run.logprobs += [np.asarray(out["logprobs"].data) for out in result.result().loss_fn_outputs]
        sampler = training.save_weights_and_get_sampling_client().result()
        for temperature in (0.0, 1.0):
            params = types.SamplingParams(max_tokens=10, temperature=temperature, seed=step)
            reply = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
            run.tokens += [list(sequence.tokens) for sequence in reply.sequences]


@pytest.fixture(scope="module")
def runs(server: Server) -> dict[str, list[Run]]:
    tenants = [(3, 1), (16, 2)]  # ranks and seeds
    alone = [Run(), Run()]
    for (rank, seed), run in zip(tenants, alone, strict=True):
        client_run(server.url, rank, seed, run)
    together, gate = [Run(), Run()], threading.Barrier(2)
    threads = [
        threading.Thread(target=client_run, args=(server.url, rank, seed, run, gate))
        for (rank, seed), run in zip(tenants, together, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in alone + together:
        if run.error is not None:
            raise run.error
    return {"alone": alone, "together": together}


@pytest.mark.parametrize("tenant", [0, 1])
def test_losses_together_equal_losses_alone(runs, tenant):
    alone, together = runs["alone"][tenant], runs["together"][tenant]
    assert alone.losses[-1] < alone.losses[0] - 1.0
    np.testing.assert_allclose(together.losses, alone.losses, rtol=TOLERANCE)
    for one, other in zip(alone.logprobs, together.logprobs, strict=True):
        np.testing.assert_allclose(other, one, atol=TOLERANCE)


@pytest.mark.parametrize("tenant", [0, 1])
def test_tokens_together_equal_tokens_alone(runs, tenant):
    assert runs["together"][tenant].tokens == runs["alone"][tenant].tokens


def test_the_tenants_really_differ(runs):
    one, other = runs["alone"]
    assert one.losses != other.losses
    assert one.tokens != other.tokens
