"""What runs together equals what runs alone: packed datums, mixed losses, and tiny requests of several models."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest

from tests.support.golden_lora import read_golden
from tests.support.trainer_lab import CASES, Lab, arrays
from tx.errors import InvalidInput
from tx.types import AdamParams, Datum, ForwardBackward, ForwardBackwardResult, LoraConfig
from tx.worker.adapters import AdapterStore
from tx.worker.layerwise import Layerwise
from tx.worker.trainer import Trainer

VOCAB = 96
RELATIVE = 1e-5
RANKS = {"a": 1, "b": 3, "c": 8, "d": 5}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(read_golden("lora_llama", tmp_path_factory.mktemp("lora") / "llama"))


def random_request(model_id: str, loss_fn: str, lengths: list[int], seed: int, forward_only=False) -> ForwardBackward:
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        weights = rng.uniform(0, 1, length).astype(np.float32)
        weights[: length // 3] = 0
        sampled = {
            "logprobs": rng.normal(-5, 0.3, length).astype(np.float32),
            "advantages": rng.normal(0, 1, length).astype(np.float32),
        }
        if loss_fn == "gspo":
            sampled["sequence_ratio_mask"] = (np.arange(length) > 1).astype(np.float32)
        inputs = {"weights": weights} if loss_fn == "cross_entropy" else sampled
        targets = rng.integers(0, VOCAB, length)
        data.append(Datum(rng.integers(0, VOCAB, length).astype(np.int32), inputs | {"target_tokens": targets}))
    return ForwardBackward(model_id, 0, tuple(data), loss_fn, {}, forward_only)


def one_by_one(request: ForwardBackward) -> list[ForwardBackward]:
    return [
        ForwardBackward(request.model_id, 0, (datum,), request.loss_fn, {}, request.forward_only)
        for datum in request.data
    ]


def make(lab: Lab, **options) -> tuple[AdapterStore, Trainer]:
    """Models of several ranks whose B's are not zero, so that every A has a gradient too."""
    store, trainer = lab.trainer(max_resident=8, **options)
    for seed, (model_id, rank) in enumerate(RANKS.items()):
        store.create(model_id, LoraConfig(rank, seed))
        start = store.export(model_id)
        rng = np.random.default_rng(seed)
        for name, array in start.weights.items():
            start.weights[name] = array + rng.normal(0, 0.02, array.shape).astype(np.float32)
        store.restore(model_id, start, with_optimizer=False)
    return store, trainer


def gradients(store: AdapterStore) -> dict[str, dict[str, np.ndarray]]:
    return {model_id: arrays(store.state(model_id).grads) for model_id in RANKS if store.state(model_id).grads}


def check_equal(
    found: dict[str, dict[str, np.ndarray]], wanted: dict[str, dict[str, np.ndarray]], relative: float = RELATIVE
) -> None:
    assert found.keys() == wanted.keys()
    for model_id, sites in wanted.items():
        for name, grad in sites.items():
            scale = np.abs(grad).max()
            assert scale > 0, f"{model_id} {name}: a gradient of zero proves nothing"
            assert np.abs(found[model_id][name] - grad).max() <= relative * scale, f"{model_id} {name}"


def same_results(found: list[ForwardBackwardResult], wanted: list[ForwardBackwardResult]) -> None:
    """``wanted`` has a result per datum."""
    logprobs = [lp for result in found for lp in result.logprobs]
    for lp, alone in zip(logprobs, wanted, strict=True):
        np.testing.assert_allclose(lp, alone.logprobs[0], atol=2e-5)
    loss = sum(result.metrics["loss:sum"] for result in wanted)
    assert sum(result.metrics["loss:sum"] for result in found) == pytest.approx(loss, rel=RELATIVE)


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "ppo", "gspo"])
def test_packed_datums_equal_one_datum_at_a_time(lab: Lab, loss_fn: str):
    request = random_request("b", loss_fn, [3, 40, 17, 9, 1, 22, 12, 31], seed=1)
    outcomes = []
    for requests in ([request], one_by_one(request)):
        store, trainer = make(lab)
        results = []
        if len(requests) == 1:
            results = lab.run(trainer, *requests)
        else:
            for single in requests:
                results += lab.run(trainer, single)
        outcomes.append((results, gradients(store)))
    (packed, packed_grads), (alone, alone_grads) = outcomes
    assert packed[0].metrics["micro_batches:max"] < len(request.data)
    same_results(packed, alone)
    check_equal(packed_grads, alone_grads)


def test_jobs_of_different_losses_share_a_pass(lab: Lab):
    losses = [name for name in CASES if name in ("cross_entropy", "importance_sampling", "ppo", "cispo", "gspo")]
    requests = [random_request("c", name, [11, 6], seed) for seed, name in enumerate(losses)]
    store, trainer = make(lab)
    together = lab.run(trainer, *requests)
    assert together[0].metrics["micro_batches:max"] < len(losses), "they were to be packed"
    found = gradients(store)
    store, trainer = make(lab)
    for request, mixed in zip(requests, together, strict=True):
        same_results([mixed], [result for single in one_by_one(request) for result in lab.run(trainer, single)])
    check_equal(found, gradients(store))


def tiny_requests() -> list[ForwardBackward]:
    losses = ("cross_entropy", "ppo", "gspo", "importance_sampling")
    lengths = ([7, 3], [13], [5, 5, 5], [16])
    return [
        random_request(model_id, loss_fn, own, seed)
        for seed, (model_id, loss_fn, own) in enumerate(zip(RANKS, losses, lengths, strict=True))
    ]


def test_tiny_requests_of_several_models_run_together_and_equal_each_alone(lab: Lab):
    """Four models of four padded ranks with four losses: one micro-batch, and nobody's numbers change."""
    store, trainer = make(lab)
    for job_id, request in enumerate(tiny_requests()):
        trainer.submit(job_id, request)
    finished = {outcome.job_id: outcome for outcome in trainer.slice()}
    assert not trainer.has_work, "one slice was to do all four"
    found = gradients(store)
    store, trainer = make(lab)
    for job_id, request in enumerate(tiny_requests()):
        alone = [result for single in one_by_one(request) for result in lab.run(trainer, single)]
        assert finished[job_id].result is not None
        same_results([finished[job_id].result], alone)
    check_equal(found, gradients(store))


def test_models_that_ran_together_are_waited_for_a_little(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """Half of the time that it took, until they are all back; and not again for one that stayed away."""
    now, real, ids = [0.0], Layerwise.forward_backward, itertools.count()

    def slow(*arguments, **options):
        now[0] += 2.0
        return real(*arguments, **options)

    monkeypatch.setattr(Layerwise, "forward_backward", slow)
    _, trainer = make(lab, clock=lambda: now[0])

    def arrive(*model_ids: str) -> None:
        for model_id in model_ids:
            trainer.submit(next(ids), random_request(model_id, "cross_entropy", [9], 3))

    arrive("a", "b", "c")
    assert trainer.gather_s == 0.0, "nobody has ever run together"
    assert len(trainer.slice()) == 3
    arrive("b")
    assert trainer.gather_s == pytest.approx(1.0)
    now[0] += 0.25
    arrive("a")
    assert trainer.gather_s == pytest.approx(0.75)
    arrive("c")
    assert trainer.gather_s == 0.0, "all are back"
    assert len(trainer.slice()) == 3
    arrive("a", "b")
    now[0] += 1.5
    assert trainer.gather_s == 0.0, "c has stayed away"
    assert len(trainer.slice()) == 2
    arrive("b")
    assert trainer.gather_s == pytest.approx(1.0)
    arrive("a")
    assert trainer.gather_s == 0.0, "c is not waited for again"
    trainer.slice()
    trainer.discard("b")
    arrive("a")
    assert trainer.gather_s == 0.0, "b is gone"


def test_tiny_forwards_run_together(lab: Lab):
    store, trainer = make(lab)
    requests = [random_request(model_id, "cross_entropy", [9], 3, forward_only=True) for model_id in RANKS]
    for job_id, request in enumerate(requests):
        trainer.submit(job_id, request)
    finished = {outcome.job_id: outcome for outcome in trainer.slice()}
    assert len(finished) == len(RANKS)
    assert not gradients(store)
    for job_id, request in enumerate(requests):
        alone = lab.run(trainer, request)[0]
        np.testing.assert_allclose(finished[job_id].result.logprobs[0], alone.logprobs[0], atol=2e-5)


def test_a_tiny_request_that_overflows_fails_alone(lab: Lab):
    """It was in one micro-batch with three others; they get what they would have got without it."""
    requests = tiny_requests()
    store, trainer = make(lab)
    for request in requests[2:]:
        lab.run(trainer, request)
    wanted = gradients(store)
    store, trainer = make(lab)
    bad = requests[1].data[0]
    huge = np.full(bad.tokens.size, 3e38, np.float32)
    inputs = bad.inputs | {"advantages": huge, "logprobs": np.full_like(huge, -300.0)}
    poisoned = ForwardBackward("b", 0, (Datum(bad.tokens, inputs),), "importance_sampling", {}, False)
    finished = lab.finish(trainer, poisoned, *requests[2:])
    assert isinstance(finished[0].error, InvalidInput)
    assert finished[0].error.field == "data[0]"
    assert finished[1].error is None
    assert finished[2].error is None
    check_equal(gradients(store), wanted)


def test_a_fresh_model_computes_what_the_base_model_does(lab: Lab):
    """Its forward leaves the adapter out; with an adapter that is zero everywhere the numbers are the same."""
    store, trainer = make(lab)
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
    _, trainer = make(lab)
    with caplog.at_level(logging.INFO):
        metrics = lab.run(trainer, random_request("a", "cross_entropy", [40, 40, 20], 5))[0].metrics
    assert metrics["num_tokens:sum"] == 100
    assert metrics["micro_batches:max"] == 2  # 40 + 20 and 40 in rows of 64
    assert metrics["padding_fraction:mean"] == pytest.approx(1 - 100 / 128)
    assert metrics["tokens_per_s:mean"] > 0
    assert 0 < metrics["mfu:mean"] < 1
    assert metrics["memory_peak_bytes:max"] > 0
