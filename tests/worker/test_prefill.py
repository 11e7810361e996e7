"""``tx.worker.prefill`` through the generator: prompt scores, pieces, prompts shared between requests."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.worker.sampler import (
    alone,
    check_logprobs,
    full_logits,
    log_softmax,
    make,
    prompt_of,
    random_state,
    request_of,
    run,
)
from tx.models.loading import load_model
from tx.worker import programs
from tx.worker.mesh import make_mesh
from tx.worker.prefill import PrefillSizes
from tx.worker.snapshots import SnapshotStore


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    return load_model(tiny_qwen3, make_mesh(), jnp.float32)


@pytest.fixture(scope="module")
def snapshots(model):
    store = SnapshotStore(model, max_resident=8)
    for index, rank in enumerate((8, 3)):
        store.load(f"snapshot-{index}", random_state(model.config, rank, index))
    return [store.get("snapshot-0"), store.get("snapshot-1")]


@pytest.mark.parametrize("length", [1, 2, 33, 400])
@pytest.mark.parametrize("piece", [512, 64], ids=["whole", "in pieces"])
def test_c09_prompt_logprobs_have_the_prompt_length(model, snapshots, length, piece):
    generator = make(model)
    generator._prefill.sizes = PrefillSizes(piece=piece, together=256)
    request = request_of(prompt_of(length), prompt_logprobs=True, topk=3, max_tokens=1, temperature=0.5)
    result = run(generator, {0: (request, snapshots[0])})[0]
    logprobs = log_softmax(full_logits(model, request.prompt, snapshots[0]))
    assert result.prompt_logprobs.shape == (length,)
    assert np.isnan(result.prompt_logprobs[0])
    assert result.topk_prompt_logprobs.token_ids.shape == (length, 3)
    expected = logprobs[np.arange(length - 1), request.prompt[1:]]
    np.testing.assert_allclose(result.prompt_logprobs[1:], expected, atol=1e-4)
    best = np.argsort(-logprobs[:-1], axis=-1)[:, :3]
    assert (result.topk_prompt_logprobs.token_ids[1:] == best).all()
    expected = np.take_along_axis(logprobs[:-1], best, axis=-1)
    np.testing.assert_allclose(result.topk_prompt_logprobs.logprobs[1:], expected, atol=1e-4)
    assert len(result.sequences[0].tokens) == 1


def test_prompt_scores_are_absent_unless_asked_for(model):
    result = alone(model, request_of(prompt_of(5), max_tokens=1))
    assert result.prompt_logprobs is None
    assert result.topk_prompt_logprobs is None
    only_topk = alone(model, request_of(prompt_of(5), max_tokens=1, topk=20))
    assert only_topk.prompt_logprobs is None
    assert only_topk.topk_prompt_logprobs.logprobs.shape == (5, 20)


def test_a_long_prompt_in_pieces_gives_the_same_and_lets_others_decode(model):
    generator = make(model)
    generator._prefill.sizes = PrefillSizes(piece=64, together=64)
    short = request_of(prompt_of(5), max_tokens=60, stop_on_eos=False)
    long = request_of(prompt_of(300, 1), 2, max_tokens=10, seed=9, stop_on_eos=False)
    generator.submit(0, short, None)
    generator.slice()
    generator.submit(1, long, None)
    order = []
    results = {}
    while generator.has_work:
        before = len(generator._groups[0].stops[0].tokens) if 0 in generator._groups else 60
        finished = generator.slice()
        results |= {outcome.job_id: outcome.result for outcome in finished}
        after = len(generator._groups[0].stops[0].tokens) if 0 in generator._groups else 60
        order.append(after > before)
    assert order[:8] == [False, True] * 4  # a piece of the prompt, a slice of the other's tokens, …
    for mine, theirs in zip(results[1].sequences, alone(model, long).sequences, strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()


def test_each_distinct_prompt_is_prefilled_once(model, snapshots, monkeypatch):
    runs = []
    real = programs.prefill
    monkeypatch.setattr(
        programs, "prefill", lambda *args, **kwargs: runs.append(args[2].shape) or real(*args, **kwargs)
    )
    generator = make(model, max_slots=4)
    same = prompt_of(40)
    jobs = {job: (request_of(same, 3, max_tokens=4, seed=job), snapshots[0]) for job in range(5)}
    results = run(generator, jobs)
    assert runs == [(1, 48)]
    assert [results[job].prompt_cache_hit_tokens for job in range(5)] == [0, 39, 39, 39, 39]
    run(generator, {9: (request_of(same, max_tokens=4), snapshots[1])})
    assert len(runs) == 2  # another snapshot's keys and values are others


def test_short_prompts_share_a_program(model, monkeypatch):
    runs = []
    real = programs.prefill
    monkeypatch.setattr(
        programs, "prefill", lambda *args, **kwargs: runs.append(args[2].shape) or real(*args, **kwargs)
    )
    requests = {job: (request_of(prompt_of(20, job), max_tokens=3, seed=job), None) for job in range(8)}
    results = run(make(model), requests)
    assert runs == [(8, 32)]
    for job, (request, _) in requests.items():
        check_logprobs(model, request, None, results[job].sequences[0])
