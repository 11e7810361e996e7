"""Tiny requests of several models in one micro-batch: nobody's numbers change, failures stay with their model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.support.trainer_lab import (
    RANKS,
    Lab,
    check_equal,
    gradients_of,
    one_by_one,
    random_request,
    same_results,
    several_models,
)
from tx.errors import InvalidInput
from tx.types import Datum, ForwardBackward, LoraConfig
from tx.worker.adapters import AdapterStore
from tx.worker.layerwise import Layerwise
from tx.worker.passes import Job, Passes
from tx.worker.shapes import Limits
from tx.worker.together import MOST_TOKENS, Together


def tiny_requests() -> list[ForwardBackward]:
    losses = ("cross_entropy", "ppo", "gspo", "importance_sampling")
    lengths = ([7, 3], [13], [5, 5, 5], [16])
    return [
        random_request(model_id, loss_fn, own, seed)
        for seed, (model_id, loss_fn, own) in enumerate(zip(RANKS, losses, lengths, strict=True))
    ]


def test_tiny_requests_of_several_models_run_together_and_equal_each_alone(lab: Lab):
    """Four models of four padded ranks with four losses: one micro-batch, and nobody's numbers change."""
    store, trainer = several_models(lab)
    for job_id, request in enumerate(tiny_requests()):
        trainer.submit(job_id, request)
    finished = {outcome.job_id: outcome for outcome in trainer.slice()}
    assert not trainer.has_work, "one slice was to do all four"
    found = gradients_of(store)
    store, trainer = several_models(lab)
    for job_id, request in enumerate(tiny_requests()):
        alone = [result for single in one_by_one(request) for result in lab.run(trainer, single)]
        assert finished[job_id].result is not None
        same_results([finished[job_id].result], alone)
    check_equal(found, gradients_of(store))


def test_models_that_ran_together_are_waited_for_a_little(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """Half of the time that it took, until they are all back; and not again for one that stayed away."""
    now, real, ids = [0.0], Layerwise.forward_backward, itertools.count()

    def slow(*arguments, **options):
        now[0] += 2.0
        return real(*arguments, **options)

    monkeypatch.setattr(Layerwise, "forward_backward", slow)
    _, trainer = several_models(lab, clock=lambda: now[0])

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
    arrive("c")
    trainer.slice()
    arrive("a")
    trainer.discard("a")
    assert trainer.gather_s == 0.0, "c is missing, but nobody is there to wait for it"


def test_tiny_forwards_run_together(lab: Lab):
    store, trainer = several_models(lab)
    requests = [random_request(model_id, "cross_entropy", [9], 3, forward_only=True) for model_id in RANKS]
    for job_id, request in enumerate(requests):
        trainer.submit(job_id, request)
    finished = {outcome.job_id: outcome for outcome in trainer.slice()}
    assert len(finished) == len(RANKS)
    assert not gradients_of(store)
    for job_id, request in enumerate(requests):
        alone = lab.run(trainer, request)[0]
        np.testing.assert_allclose(finished[job_id].result.logprobs[0], alone.logprobs[0], atol=2e-5)


def test_a_tiny_request_that_overflows_fails_alone(lab: Lab):
    """It was in one micro-batch with three others; they get what they would have got without it."""
    requests = tiny_requests()
    store, trainer = several_models(lab)
    for request in requests[2:]:
        lab.run(trainer, request)
    wanted = gradients_of(store)
    store, trainer = several_models(lab)
    bad = requests[1].data[0]
    huge = np.full(bad.tokens.size, 3e38, np.float32)
    inputs = bad.inputs | {"advantages": huge, "logprobs": np.full_like(huge, -300.0)}
    poisoned = ForwardBackward("b", 0, (Datum(bad.tokens, inputs),), "importance_sampling", {}, False)
    finished = lab.finish(trainer, poisoned, *requests[2:])
    assert isinstance(finished[0].error, InvalidInput)
    assert finished[0].error.field == "data[0]"
    assert finished[1].error is None
    assert finished[2].error is None
    check_equal(gradients_of(store), wanted)


def test_one_datum_per_row_where_nothing_keeps_two_apart(lab: Lab):
    """As on a GPU: models of one datum each run together, those of several don't."""
    store, _ = several_models(lab)
    passes = Passes(lab.model, store, Limits(64, 0, 64, packed=False))
    together = Together(lab.model, store, passes, clock=lambda: 0.0)
    jobs = {"a": jobs_of("a", 9, 7), "b": jobs_of("b", 5), "c": jobs_of("c", 8)}
    assert together.choose("abc", jobs.__getitem__) == []
    assert together.choose("bac", jobs.__getitem__) == ["b", "c"]
    found = together.run({model_id: jobs[model_id] for model_id in "bc"})
    assert found is not None
    grads = gradients_of(store)
    store, trainer = several_models(lab)
    for model_id, finished in zip("bc", found, strict=True):
        same_results([finished.result], lab.run(trainer, jobs[model_id][0].request))
    check_equal(grads, gradients_of(store))


def test_models_that_differ_do_not_run_together(lab: Lab):
    """In what they train, in passes, in targets per position, or because one has to run alone."""
    store = AdapterStore(lab.model, 8)
    for model_id in "abcde":
        store.create(model_id, LoraConfig(2, 0, train_unembed=model_id != "b"))
    together = Together(lab.model, store, Passes(lab.model, store, Limits(64, 0, 64)), clock=lambda: 0.0)
    jobs = {model_id: jobs_of(model_id, 8) for model_id in "abcde"}
    jobs["c"] = [Job(0, random_request("c", "cross_entropy", [8], 0, forward_only=True), {}, alone=False)]
    jobs["d"][0].alone = True
    assert together.choose("abcde", jobs.__getitem__) == ["a", "e"]
    assert together.choose("dabce", jobs.__getitem__) == []
    assert together.choose("cab", jobs.__getitem__) == ["c"]


def test_choosing_looks_at_no_more_jobs_than_are_tiny(lab: Lab):
    store, _ = several_models(lab)
    together = Together(lab.model, store, Passes(lab.model, store, Limits(64, 0, 64)), clock=lambda: 0.0)
    seen = 0

    def waiting(model_id: str):
        nonlocal seen
        for job in [jobs_of(model_id, 8)[0]] * 1000:
            seen += 1
            yield job

    assert together.choose("ab", waiting) == []
    assert seen == MOST_TOKENS // 8 + 1


def test_who_runs_together_is_found_out_once(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """Waiting for others and the micro-batch itself ask for the same; a request more, and it is asked again."""
    real, asked = Together.choose, []
    monkeypatch.setattr(Together, "choose", lambda *arguments: asked.append(0) or real(*arguments))
    _, trainer = several_models(lab)
    for arriving in ("abc", "ab"):
        for job_id, model_id in enumerate(arriving):
            trainer.submit(job_id, random_request(model_id, "cross_entropy", [9], 3))
        assert not asked
        for _ in range(3):
            assert (trainer.gather_s > 0) == (arriving == "ab")
        trainer.slice()
        assert len(asked) == 1
        asked.clear()


def jobs_of(model_id: str, *lengths: int) -> list[Job]:
    return [Job(ord(model_id), random_request(model_id, "cross_entropy", list(lengths), 0), {}, alone=False)]
