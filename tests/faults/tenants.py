"""What the tenants of one round do. The same seed gives the same answers and the same adapters, whatever is killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tests.faults.client import Client, Lost, Trainer
from tx.tinker.wire import tinker_pb2

EXACT, TOLERANT = (1e-2, 1e-12), (1e-4, 1e-3)
"""Adam's learning rate and eps. The tolerant tenants' micro-batches depend on what has arrived: a gradient's rounding,
up to 1e-6, becomes ``learning_rate / eps`` times as much of a weight, where a lost step would be 1e-4."""


@dataclass(frozen=True)
class Tenant:
    """One program: its model's seed and rank, and whether its numbers must come out to the bit."""

    seed: int
    rank: int
    exact: bool

    def run(self, url: str, steps: int, rng: random.Random, last_fault: Callable[[], float]) -> Result:
        client = Client(url, rng, last_fault)
        model = Trainer(client, 0, self.seed, self.rank)
        model.create()
        losses: list[float] = []
        samples: list[bytes] = []
        for step in range(steps):
            if self.exact:
                replies = [model.forward_backward(step)]
            else:
                replies = model.forward_backward_in_chunks(step)
            losses += [tinker_pb2.ForwardBackwardOutput.FromString(reply).metrics["loss:sum"] for reply in replies]
            model.optim_step(*(EXACT if self.exact else TOLERANT))
            if step % 3 == 1 and self.exact:
                samples.append(model.sample_here(step))
            if step == steps // 2:  # go on from a checkpoint, in another model
                path = model.save("half")
                model = Trainer(client, 1, self.seed, self.rank)
                model.create_from(path)
        path = model.save("final")
        client.call(f"sessions/{client.session_id}/finish", reason={"type": "success"})
        client.http.close()
        return Result(self, tuple(losses), tuple(samples), path, client.answers)


@dataclass(frozen=True)
class Result:
    """What a tenant was told; ``path`` is its final checkpoint."""

    tenant: Tenant
    losses: tuple[float, ...]
    samples: tuple[bytes, ...]
    path: str
    answers: int

    def compare(self, fault_free: Result) -> None:
        """Raise Lost if this isn't what a run without faults was told."""
        if self.answers != fault_free.answers:
            raise Lost(f"{self.tenant}: {self.answers} answers instead of {fault_free.answers}")
        for sample, expected in zip(self.samples, fault_free.samples, strict=True):
            _compare_samples(sample, expected)
        if self.tenant.exact and self.losses != fault_free.losses:
            raise Lost(f"{self.tenant}: losses {self.losses} instead of {fault_free.losses}")
        np.testing.assert_allclose(self.losses, fault_free.losses, rtol=1e-5, err_msg=str(self.tenant))


def _compare_samples(got: bytes, expected: bytes) -> None:
    """The same tokens; log-probabilities depend on the batch's shape in their last bits."""
    replies = [tinker_pb2.SampleResponse.FromString(reply).sequences for reply in (got, expected)]
    if [list(sequence.tokens) for sequence in replies[0]] != [list(sequence.tokens) for sequence in replies[1]]:
        raise Lost("a seed gave other tokens than without faults")
    for sequence, other in zip(*replies, strict=True):
        logprobs = [np.frombuffer(one.logprobs, np.float32) for one in (sequence, other)]
        np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-5)


TENANTS = (
    Tenant(seed=1, rank=4, exact=True),
    Tenant(seed=2, rank=8, exact=True),
    Tenant(seed=3, rank=4, exact=False),
    Tenant(seed=4, rank=2, exact=True),
)


def run_round(
    url: str, steps: int, seed: int, check: Callable[[Result], None], last_fault: Callable[[], float] = lambda: 0.0
) -> int:
    """All tenants side by side, each checked as it ends; how many answers they got."""
    with ThreadPoolExecutor(len(TENANTS)) as pool:
        rngs = [random.Random(f"{seed}/{tenant.seed}") for tenant in TENANTS]
        running = [
            pool.submit(tenant.run, url, steps, rng, last_fault) for tenant, rng in zip(TENANTS, rngs, strict=True)
        ]
        answers = 0
        for future in running:
            result = future.result()
            check(result)
            answers += result.answers
    return answers
