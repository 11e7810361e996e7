"""``tx.worker.prefill`` through the generator: prompt scores, pieces, prompts shared between requests."""

from dataclasses import replace

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
from tx.worker.mesh import make_mesh
from tx.worker.prefill import PrefillSizes
from tx.worker.programs import PrefillPrograms
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


def counting(monkeypatch):
    """Shapes of the prefill programs that run from now on."""
    runs = []
    real = PrefillPrograms.run
    monkeypatch.setattr(
        PrefillPrograms, "run", lambda *args, **kwargs: runs.append(args[1].shape) or real(*args, **kwargs)
    )
    return runs


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
    runs = counting(monkeypatch)
    generator = make(model, max_slots=4)
    same = prompt_of(40)
    jobs = {job: (request_of(same, 3, max_tokens=4, seed=job), snapshots[0]) for job in range(5)}
    results = run(generator, jobs)
    assert runs == [(1, 48)]
    assert [results[job].prompt_cache_hit_tokens for job in range(5)] == [0, 39, 39, 39, 39]
    run(generator, {9: (request_of(same, max_tokens=4), snapshots[1])})
    assert len(runs) == 2  # another snapshot's keys and values are others


def test_short_prompts_share_a_program(model, monkeypatch):
    runs = counting(monkeypatch)
    requests = {job: (request_of(prompt_of(20, job), max_tokens=3, seed=job), None) for job in range(8)}
    results = run(make(model), requests)
    assert runs == [(8, 32)]
    for job, (request, _) in requests.items():
        check_logprobs(model, request, None, results[job].sequences[0])


def test_a_common_beginning_is_computed_once(model, snapshots, monkeypatch):
    """A header of 150 tokens: whoever comes second computes what follows the header's two whole blocks."""
    runs = counting(monkeypatch)
    header = prompt_of(150)
    first, second, other = (np.concatenate([header, prompt_of(20, seed)]) for seed in (1, 2, 3))
    jobs = {
        job: (request_of(prompt, 2, max_tokens=6, seed=job, stop_on_eos=False), snapshot)
        for job, (prompt, snapshot) in enumerate([(first, None), (second, None), (other, snapshots[0]), (first, None)])
    }
    results = run(make(model), jobs)
    assert runs == [
        (1, 192),
        (1, 192),
        (1, 48),
    ]  # turns: the base model's first, the snapshot's, the base model's second
    assert [results[job].prompt_cache_hit_tokens for job in range(4)] == [0, 128, 0, 169]
    for job, (request, snapshot) in jobs.items():
        for mine, theirs in zip(results[job].sequences, alone(model, request, snapshot).sequences, strict=True):
            assert mine.tokens.tolist() == theirs.tokens.tolist()
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-5)


def test_turns_of_a_chat_build_on_each_other(model, monkeypatch):
    runs = counting(monkeypatch)
    generator, prompt, hits = make(model), prompt_of(70), []
    for turn in range(4):
        request = request_of(prompt, max_tokens=30, seed=turn, stop_on_eos=False)
        result = run(generator, {turn: (request, None)})[turn]
        hits.append(result.prompt_cache_hit_tokens)
        check_logprobs(model, request, None, result.sequences[0])
        prompt = np.concatenate([prompt, result.sequences[0].tokens, prompt_of(40, turn)])
    assert hits == [0, 64, 128, 192]
    assert runs == [(1, 96), (1, 96), (1, 96), (1, 96)]


def test_what_is_scored_is_computed_and_what_precedes_it_is_not(model, monkeypatch):
    runs = counting(monkeypatch)
    generator, prompt = make(model), prompt_of(200)
    whole = run(generator, {0: (request_of(prompt, prompt_logprobs=True, max_tokens=1), None)})[0]
    again = run(generator, {1: (request_of(prompt, prompt_logprobs=True, max_tokens=1), None)})[1]
    last = replace(request_of(prompt, prompt_logprobs=True, max_tokens=1), prompt_logprobs_last_n=20)
    part = run(generator, {2: (last, None)})[2]
    assert runs == [(1, 256), (1, 256), (1, 96)]
    assert [result.prompt_cache_hit_tokens for result in (whole, again, part)] == [0, 0, 128]
    np.testing.assert_allclose(part.prompt_logprobs[-20:], whole.prompt_logprobs[-20:], atol=1e-5)
    assert np.isnan(part.prompt_logprobs[:-20]).all()


def test_the_oldest_prompts_are_forgotten(model, monkeypatch):
    runs = counting(monkeypatch)
    generator = make(model, kv_blocks=16)  # four of them for prompts
    prompts = [prompt_of(100, seed) for seed in range(3)]  # two blocks each
    for job, prompt in enumerate([*prompts, prompts[2], prompts[1], prompts[0]]):
        run(generator, {job: (request_of(prompt, max_tokens=2), None)})
    assert len(runs) == 4  # the first one again


def test_a_prompt_that_is_cancelled_part_way_leaves_nothing(model):
    generator = make(model)
    generator._prefill.sizes = PrefillSizes(piece=64, together=64)
    generator.submit(0, request_of(prompt_of(300), max_tokens=4), None)
    generator.slice()
    assert generator._prefill._under_way is not None
    generator.cancel(0)
    assert generator._prefill._under_way is None
    assert not generator.has_work
    request = request_of(prompt_of(300, 1), max_tokens=4, seed=2, stop_on_eos=False)
    check_logprobs(model, request, None, run(generator, {1: (request, None)})[1].sequences[0])
