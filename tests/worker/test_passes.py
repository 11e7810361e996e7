"""Passes of one model: what runs together equals what runs alone; failures hit who caused them; out of memory."""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest

from tests.support.golden_lora import relative_error
from tests.support.trainer_lab import (
    CASES,
    Lab,
    arrays,
    check_equal,
    gradients_of,
    one_by_one,
    random_request,
    same_results,
    several_models,
    true_rank,
)
from tx.errors import InvalidInput
from tx.types import AdamParams, Datum, Finished, LoraConfig
from tx.worker import memory
from tx.worker.adapters import AdapterStore
from tx.worker.layerwise import Layerwise
from tx.worker.passes import Job, Passes
from tx.worker.shapes import Limits


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "ppo", "gspo"])
def test_packed_datums_equal_one_datum_at_a_time(lab: Lab, loss_fn: str):
    request = random_request("b", loss_fn, [3, 40, 17, 9, 1, 22, 12, 31], seed=1)
    outcomes = []
    for requests in ([request], one_by_one(request)):
        store, trainer = several_models(lab)
        results = []
        if len(requests) == 1:
            results = lab.run(trainer, *requests)
        else:
            for single in requests:
                results += lab.run(trainer, single)
        outcomes.append((results, gradients_of(store)))
    (packed, packed_grads), (alone, alone_grads) = outcomes
    assert packed[0].metrics["micro_batches:max"] < len(request.data)
    same_results(packed, alone)
    check_equal(packed_grads, alone_grads)


def test_jobs_of_different_losses_share_a_pass(lab: Lab):
    losses = [name for name in CASES if name in ("cross_entropy", "importance_sampling", "ppo", "cispo", "gspo")]
    requests = [random_request("c", name, [11, 6], seed) for seed, name in enumerate(losses)]
    store, trainer = several_models(lab)
    together = lab.run(trainer, *requests)
    assert together[0].metrics["micro_batches:max"] < len(losses), "they were to be packed"
    found = gradients_of(store)
    store, trainer = several_models(lab)
    for request, mixed in zip(requests, together, strict=True):
        same_results([mixed], [result for single in one_by_one(request) for result in lab.run(trainer, single)])
    check_equal(found, gradients_of(store))


def test_a_fresh_model_computes_what_the_base_model_does(lab: Lab):
    """Its forward leaves the adapter out; with an adapter that is zero everywhere the numbers are the same."""
    store, trainer = several_models(lab)
    store.create("fresh", LoraConfig(4, 9))
    assert store.state("fresh").is_base
    request = random_request("fresh", "cross_entropy", [30, 50], 4, forward_only=True)
    base = lab.run(trainer, request)[0]
    store.restore("same", store.export("fresh"), with_optimizer=False)
    assert not store.state("same").is_base
    request = random_request("same", "cross_entropy", [30, 50], 4, forward_only=True)
    zero = lab.run(trainer, request)[0]
    for one, other in zip(base.logprobs, zero.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    lab.run(trainer, random_request("fresh", "cross_entropy", [30, 50], 4))
    trainer.optim_step("fresh", AdamParams(learning_rate=1e-2))
    moved = lab.run(trainer, random_request("fresh", "cross_entropy", [30, 50], 4, forward_only=True))[0]
    assert np.abs(moved.logprobs[0] - base.logprobs[0]).max() > 1e-3


def test_metrics_say_what_was_achieved(lab: Lab, caplog: pytest.LogCaptureFixture):
    _, trainer = several_models(lab)
    with caplog.at_level(logging.INFO):
        metrics = lab.run(trainer, random_request("a", "cross_entropy", [40, 40, 20], 5))[0].metrics
    assert metrics["num_tokens:sum"] == 100
    assert metrics["micro_batches:max"] == 2  # 40 + 20 and 40 in rows of 64
    assert metrics["padding_fraction:mean"] == pytest.approx(1 - 100 / 128)
    assert metrics["tokens_per_s:mean"] > 0
    assert 0 < metrics["mfu:mean"] < 1
    assert metrics["memory_peak_bytes:max"] > 0


# ---- failures -------------------------------------------------------------------------------------------------------


def test_c10_one_jobs_failure_leaves_the_others_results_as_they_are(lab: Lab):
    """A row whose loss overflows is in the same micro-batch as good rows of another job."""
    store, trainer = lab.trainer()
    lab.load(store)
    alone = lab.run(trainer, lab.request("importance_sampling"))[0]
    wanted = arrays(store.state("m").grads)
    trainer.optim_step("m", AdamParams(learning_rate=0.0))
    poisoned = list(lab.data("importance_sampling"))
    huge = np.full(11, 3e38, np.float32)
    poisoned[1] = Datum(poisoned[1].tokens, poisoned[1].inputs | {"advantages": huge, "logprobs": -huge / 1e36})
    bad = lab.request("importance_sampling", data=tuple(poisoned))
    finished = lab.finish(trainer, bad, lab.request("importance_sampling"))
    assert isinstance(finished[0].error, InvalidInput)
    assert finished[0].error.field == "data[1]"
    assert finished[1].result is not None
    for name in ("loss:sum", "num_tokens:sum"):
        assert finished[1].result.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-6)
    for name, grad in arrays(store.state("m").grads).items():
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-5, atol=1e-6)


def test_c10_out_of_memory_shrinks_what_runs_and_then_fails_one_job(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """The device is told to have room for so many tokens; what runs below that is the real program."""
    room = 16
    real, calls = Layerwise.forward_backward, []

    def small_device(self, trained, accumulators, host, *, kept_layers, call):
        calls.append((host.tokens.shape, kept_layers))
        if host.tokens.size > room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return real(self, trained, accumulators, host, kept_layers=kept_layers, call=call)

    monkeypatch.setattr(Layerwise, "forward_backward", small_device)
    store, trainer = lab.trainer()
    lab.load(store)
    lab.run(trainer, lab.request())  # datums of 5, 11 and 8 tokens
    assert calls == [((1, 32), 2), ((1, 32), 1), ((1, 32), 0), ((1, 16), 0), ((1, 16), 0)]
    for name, grad in arrays(store.state("m").grads).items():
        assert relative_error(true_rank(name, grad)[0], lab.golden.group("grad/cross_entropy")[name]) <= 1e-4
    long = Datum(np.ones(40, np.int32), {"target_tokens": np.ones(40, np.int64), "weights": np.ones(40, np.float32)})
    finished = lab.finish(trainer, lab.request(data=(long,)), lab.request())
    assert isinstance(finished[0].error, jax.errors.JaxRuntimeError)
    assert finished[1].error is None


@pytest.mark.parametrize("packed", [True, False])
def test_a_datum_that_never_fits_fails_instead_of_going_round(lab: Lab, monkeypatch: pytest.MonkeyPatch, packed: bool):
    """A long datum, with shorter ones in its row: nothing makes the row shorter, so its job fails."""

    def full(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Layerwise, "forward_backward", full)
    passes = one_model(lab, Limits(64, 0, 64, packed=packed))
    finished = run(passes, 40, 10, 5)
    assert [str(done.error) for done in finished] == ["RESOURCE_EXHAUSTED: out of memory"]


def test_a_failure_halves_what_is_kept_on_any_mesh(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """What was kept on each of two devices is too much from then on: one layer of the shape, both of a smaller one."""
    real, calls = Layerwise.forward_backward, []

    def fails_once(self, trained, accumulators, host, *, kept_layers, call):
        calls.append((host.tokens.shape, kept_layers))
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(self, trained, accumulators, host, kept_layers=kept_layers, call=call)

    monkeypatch.setattr(Layerwise, "forward_backward", fails_once)
    passes = one_model(lab, Limits(64, 0, 64, row_multiple=2, packed=False))
    for lengths in ((32, 30), (16, 15)):
        assert [done.error for done in run(passes, *lengths)] == [None]
    assert calls == [((2, 32), 2), ((2, 32), 1), ((2, 16), 2)]


@pytest.mark.parametrize(("share", "kept"), [(1.0, 2), (0.99, 1), (0.6, 1), (0.3, 0), (0.0, 0)])
def test_as_many_layers_are_kept_as_there_is_room(lab: Lab, monkeypatch: pytest.MonkeyPatch, share: float, kept: int):
    """Room for a share of what both of two layers need, their inputs included."""
    calls, real = [], Layerwise.forward_backward

    def spy(self, trained, accumulators, host, *, kept_layers, call):
        calls.append(kept_layers)
        return real(self, trained, accumulators, host, kept_layers=kept_layers, call=call)

    monkeypatch.setattr(Layerwise, "forward_backward", spy)
    whole = 32 * memory.kept_bytes_per_token(lab.model.config, np.float32)
    passes = one_model(lab, Limits(64, 0, 64), activation_bytes=int(share * whole))
    assert [done.error for done in run(passes, 30)] == [None]
    assert calls == [kept]


def one_model(lab: Lab, limits: Limits, activation_bytes: int | None = None) -> Passes:
    store = AdapterStore(lab.model, 4)
    store.create("a", LoraConfig(2, 0))
    return Passes(lab.model, store, limits, activation_bytes=activation_bytes)


def run(passes: Passes, *lengths: int) -> list[Finished]:
    """One job of datums of these lengths, until it is done."""
    passes.start("a", [Job(0, random_request("a", "cross_entropy", list(lengths), 0), {}, alone=False)])
    finished: list[Finished] = []
    for _ in range(20):
        finished += passes.run("a") if "a" in passes else []
    assert "a" not in passes
    return finished
