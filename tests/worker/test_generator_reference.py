"""``tx.worker.generator`` under random traffic: every result equals that of the one-row reference decoder.

Requests of random prompts, parameters and owners arrive at random times, and some are cancelled. Whatever shared the
batch, the slots and the slices, a row's tokens, logprobs and stop reason are those of its definition. A different token
is accepted only where the definition itself is a tie within rounding, which has to be rare.
"""

from collections import deque
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.support.reference_decoder import TOLERANCE, ReferenceDecoder, as_right, choose, log_softmax, uniforms
from tests.support.tiny_models import TOKENIZER
from tests.worker.sampler import make, random_state, tiny_model
from tx.types import ABSENT_LOGPROB, Cells, SampleRequest, SampleResult, SamplingParams, TopkLogprobs
from tx.worker import sampling
from tx.worker.snapshots import Snapshot, SnapshotStore

VOCAB, CONTEXT = 384, 256
EOS = (300, 301)

TOKENS = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))


def detokenize(ids):
    return TOKENS.decode(list(ids), skip_special_tokens=False)


OPTIONS = {"max_context": CONTEXT, "eos_token_ids": EOS, "detokenize": detokenize}


@dataclass(frozen=True)
class Job:
    request: SampleRequest
    snapshot: Snapshot | None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The first 256 ids of the tokenizer are single bytes: a random model's text is full of cut characters."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", VOCAB, CONTEXT)


@pytest.fixture(scope="module")
def snapshots(model):
    """None, the base model; ranks 8, 5 and 1, the last of one site only.

    Strong enough to change what is sampled, and not so strong that float32 loses digits: with three times the scale,
    two correct programs differ by 2e-4 in a logprob.
    """
    store = SnapshotStore(model, max_resident=8)
    for index, rank in enumerate((8, 5, 1)):
        state = random_state(model.config, rank, index, scale=0.1)
        if rank == 1:
            state.weights = {name: array for name, array in state.weights.items() if "gate_proj" in name}
        store.load(f"snapshot-{index}", state)
    return [None, *(store.get(f"snapshot-{index}") for index in range(3))]


@pytest.fixture(scope="module")
def reference(model):
    return ReferenceDecoder(model, **OPTIONS)


# ---- traffic --------------------------------------------------------------------------------------------------------


def random_jobs(rng, count, snapshots):
    """Prompts of every length, some of which repeat or share a prefix, with parameters over their whole range."""
    headers = [rng.integers(0, VOCAB, length) for length in (33, 64, 90)]
    prompts: list[np.ndarray] = []
    for _ in range(count):
        kind, length = rng.random(), int(rng.choice([rng.integers(1, 4), *rng.integers(1, 100, 4)]))
        if kind < 0.3 and prompts:
            prompts.append(prompts[-rng.integers(1, 1 + min(6, len(prompts)))])
        elif kind < 0.55:
            prompts.append(np.concatenate([headers[rng.integers(3)], rng.integers(0, VOCAB, 1 + length // 8)]))
        elif kind < 0.6:  # close to the end of the context
            prompts.append(rng.integers(0, VOCAB, CONTEXT - int(rng.integers(1, 30))))
        else:
            prompts.append(rng.integers(0, VOCAB, length))
    return [Job(random_request(rng, prompt), snapshots[rng.integers(len(snapshots))]) for prompt in prompts]


def random_request(rng, prompt):
    temperature = float(rng.choice([0.0, 1.0, rng.uniform(0.1, 1.5)]))
    params = SamplingParams(
        max_tokens=None if len(prompt) > CONTEXT - 40 else int(rng.integers(1, 40)),
        seed=int(rng.integers(-(2**63), 2**63)),
        temperature=temperature,
        top_k=int(rng.choice([-1, -1, 1, rng.integers(2, 50), 1000])),
        top_p=float(rng.choice([1.0, 1.0, rng.uniform(0.05, 1.0)])),
        stop_token_ids=tuple(rng.integers(0, VOCAB, rng.choice([0, 0, 1, 12])).tolist()),
        stop_on_eos=bool(rng.random() < 0.5),
    )
    request = SampleRequest(np.asarray(prompt, np.int32), int(rng.choice([1, 1, 2, 5])), params)
    if rng.random() < 0.2:
        request = replace(request, topk_sample_logprobs=int(rng.integers(1, 9)))
    return with_scores(rng, request) if rng.random() < 0.3 else request


def with_scores(rng, request):
    """The same request, asking for some of what can be said of a prompt: a few combinations, as each is a program."""
    size, kind = len(request.prompt), rng.random()
    asked = {"prompt_logprobs": True}
    if kind < 0.6 and size > 1 and rng.random() < 0.5:
        asked["prompt_logprobs_last_n"] = int(rng.integers(1, size))
    if kind < 0.4:
        asked["topk_prompt_logprobs"] = int(rng.integers(1, 9))
    if kind > 0.6 and 1 < size < 60:
        ids = rng.integers(-1, VOCAB, (size - 1, 3))
        ids[rng.integers(0, size - 1)] = -1, 5, 6  # at least one is asked for
        asked = {"target_prompt_logprobs": Cells(ids), "prompt_alt_tokens_k": int(rng.integers(1, 5))}
    return replace(request, **asked)


def with_stops(rng, job, result):
    """The same job with a stop that lies inside what one of its rows sampled."""
    tokens = result.sequences[rng.integers(len(result.sequences))].tokens.tolist()
    params = replace(job.request.params, stop_on_eos=False)
    if rng.random() < 0.2:
        params = replace(params, stop_token_ids=(tokens[rng.integers(len(tokens))],))
    else:
        text = detokenize(tokens)
        beyond_ascii = [at for at, char in enumerate(text) if char > "\x7f" and char != "\ufffd"]
        if beyond_ascii:
            start = max(0, int(rng.choice(beyond_ascii)) - int(rng.integers(0, 3)))
        else:
            start = int(rng.integers(0, len(text)))
        string = text[start : start + int(rng.integers(1, 8))]
        params = replace(params, stop_strings=(string, "never in a text"), stop_token_ids=())
    return replace(job, request=replace(job.request, params=params))


def drive(generator, jobs, rng, *, cancel=0.0):
    """Submit a few at a time while others decode, cancel that share of them sometime; results by index of the job."""
    arriving = deque(range(len(jobs)))
    patience = {job_id: int(rng.integers(0, 10)) for job_id in arriving if rng.random() < cancel}
    live: set[int] = set()
    results: dict[int, SampleResult] = {}
    while arriving or generator.has_work:
        for _ in range(min(len(arriving), int(rng.poisson(2)))):
            job_id = arriving.popleft()
            generator.submit(job_id, jobs[job_id].request, jobs[job_id].snapshot)
            live.add(job_id)
        for job_id in sorted(live & patience.keys()):
            if not patience[job_id]:
                generator.cancel(job_id)
                live.remove(job_id)
            patience[job_id] -= 1
        for outcome in generator.slice():
            assert outcome.error is None
            live.remove(outcome.job_id)  # never reported twice, nor after it was cancelled
            results[outcome.job_id] = outcome.result
    assert not live
    assert generator.slice() == []
    return results


def check(reference, jobs, results):
    """Compare with the reference decoder; (tokens, of which ties)."""
    count = ties = 0
    for job_id, result in results.items():
        request, snapshot = jobs[job_id].request, jobs[job_id].snapshot
        assert len(result.sequences) == request.num_samples
        for sample, sequence in enumerate(result.sequences):
            row = reference.row(request, snapshot, sample, sequence.tokens)
            assert sequence.tokens.tolist() == row.tokens, (job_id, sample)
            assert sequence.stop_reason == row.stop_reason, (job_id, sample)
            np.testing.assert_allclose(sequence.logprobs, row.logprobs, atol=1e-4, err_msg=f"{job_id}, {sample}")
            check_topk(sequence.topk, np.stack(row.scores), request.topk_sample_logprobs)
            count, ties = count + len(row.tokens), ties + row.ties
        ties += check_prompt_scores(reference, request, snapshot, result)
        assert 0 <= result.prompt_cache_hit_tokens < len(request.prompt)
    return count, ties


def check_topk(topk, scores, width):
    """``width`` best tokens per row of [row, vocab] logprobs; tokens that tie may come in either order."""
    assert (topk is None) == (not width)
    if topk is None:
        return
    best = -np.sort(-scores, axis=1)[:, :width]
    np.testing.assert_allclose(topk.logprobs, best, atol=1e-4)
    # What is said of a token is true of it, and none is named twice.
    np.testing.assert_allclose(np.take_along_axis(scores, topk.token_ids, axis=1), best, atol=1e-4)
    assert all(len(set(row)) == len(row) for row in topk.token_ids.tolist())


def check_prompt_scores(reference, request, snapshot, result):
    """Everything that was asked for and nothing else; the ties among the alternatives."""
    expected = reference.prompt_logprobs(request.prompt, snapshot)
    scored = max(1, len(request.prompt) - (request.prompt_logprobs_last_n or len(request.prompt)))
    assert (result.prompt_logprobs is None) == (not request.prompt_logprobs)
    if request.prompt_logprobs:
        own = np.take_along_axis(expected, request.prompt[:, None], axis=1)[:, 0]
        own[:scored] = np.nan
        np.testing.assert_allclose(result.prompt_logprobs, own, atol=1e-4)
    topk = result.topk_prompt_logprobs
    assert (topk is None) == (not request.topk_prompt_logprobs)
    if topk is not None:
        assert len(topk.token_ids) == len(topk.logprobs) == len(request.prompt)
        assert (topk.logprobs[:scored] == ABSENT_LOGPROB).all()
        there = TopkLogprobs(topk.token_ids[scored:], topk.logprobs[scored:])
        check_topk(there, expected[scored:], request.topk_prompt_logprobs)
    assert (result.target_prompt_logprobs is None) == (request.target_prompt_logprobs is None)
    if request.target_prompt_logprobs is not None:
        ids = request.target_prompt_logprobs.values
        logprobs = np.where(ids < 0, 0.0, np.take_along_axis(expected[1:], np.maximum(ids, 0), axis=1))
        np.testing.assert_allclose(result.target_prompt_logprobs.values, logprobs, atol=1e-4)
    drawn = result.prompt_alt_tokens
    assert (drawn is None) == (not request.prompt_alt_tokens_k)
    if drawn is None:
        return 0
    assert drawn.token_ids.shape == (len(request.prompt) - 1, request.prompt_alt_tokens_k)
    ids, ties = reference.alternatives(request, snapshot, drawn.token_ids)
    assert (drawn.token_ids == ids).all()
    np.testing.assert_allclose(drawn.logprobs, np.take_along_axis(expected[1:], ids, axis=1), atol=1e-4)
    return ties


def slices_to_fill(generator, max_slots):
    """How many slices a request of as many rows as there are slots takes: more if a slot isn't free."""
    request = SampleRequest(np.array([7], np.int32), max_slots, SamplingParams(max_tokens=1))
    generator.submit(0, request, None)
    count = 0
    while generator.has_work:
        generator.slice()
        count += 1
    return count


# ---- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_random_traffic_equals_the_reference_decoder(model, snapshots, reference):
    count, max_slots = 240, 16
    rng = np.random.default_rng(count)
    generator = make(model, max_slots=max_slots, **OPTIONS)
    jobs = random_jobs(rng, count // 2, snapshots)
    first = drive(generator, jobs, rng, cancel=0.15)
    stopping = [with_stops(rng, jobs[job_id], result) for job_id, result in first.items()]
    second = drive(generator, stopping, rng, cancel=0.15)
    assert 0.5 * count < len(first) + len(second) < count  # some were cancelled
    ended = [sequence.stop_reason for result in second.values() for sequence in result.sequences]
    assert ended.count("stop") > len(ended) / 4
    assert slices_to_fill(generator, max_slots) <= slices_to_fill(
        make(model, max_slots=max_slots, **OPTIONS), max_slots
    )
    outcomes = [check(reference, jobs, first), check(reference, stopping, second)]
    tokens, ties = (sum(column) for column in zip(*outcomes, strict=True))
    assert tokens > 10 * count
    assert ties <= tokens / 1000


@pytest.mark.slow
def test_c14_company_slots_and_restarts_change_nothing(model, snapshots, reference):
    """Each is compared with the reference and not with another run: then all are equal, ties within rounding apart."""
    rng = np.random.default_rng(5)
    jobs = random_jobs(rng, 12, snapshots)
    jobs = [with_stops(rng, job, drive(make(model, max_slots=4, **OPTIONS), [job], rng)[0]) for job in jobs]
    for job in jobs:  # alone
        check(reference, [job], drive(make(model, max_slots=4, **OPTIONS), [job], rng))
    for max_slots in (1, 4):
        generator = make(model, max_slots=max_slots, **OPTIONS)
        for job_id in reversed(range(len(jobs))):
            generator.submit(job_id, jobs[job_id].request, jobs[job_id].snapshot)
        assert len(check_drained(reference, generator, jobs)) == len(jobs)
    # Half-way through, the process is gone; whoever had no result asks another one.
    abandoned = make(model, max_slots=4, **OPTIONS)
    for job_id, job in enumerate(jobs):
        abandoned.submit(job_id, job.request, job.snapshot)
    reported = {outcome.job_id for _ in range(20) for outcome in abandoned.slice()}
    left = [job for job_id, job in enumerate(jobs) if job_id not in reported]
    assert 0 < len(left) < len(jobs)
    check(reference, left, drive(make(model, max_slots=4, **OPTIONS), left, rng))


def check_drained(reference, generator, jobs):
    results = {}
    while generator.has_work:
        results |= {outcome.job_id: outcome.result for outcome in generator.slice()}
    check(reference, jobs, results)
    return results


# ---- the reference itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["base", "rank 8", "rank 5", "rank 1"])
def test_a_draft_changes_nothing(reference, snapshots, which):
    """One forward per token, one per draft, and one per stretch of a wrong draft sample the same row."""
    rng = np.random.default_rng(which)
    params = SamplingParams(max_tokens=25, seed=3, top_k=40, top_p=0.95, stop_on_eos=False)
    request = SampleRequest(rng.integers(0, VOCAB, 30).astype(np.int32), 2, params)
    plain = reference.row(request, snapshots[which], 1)
    assert len(plain.tokens) == 25
    others = [snapshot for snapshot in snapshots if snapshot is not snapshots[which]]
    assert all(reference.row(request, other, 1).tokens != plain.tokens for other in others)
    wrong = list(plain.tokens)
    wrong[7] = (wrong[7] + 100) % VOCAB
    for draft in (plain.tokens, wrong, [*plain.tokens, 5, 5], rng.integers(0, VOCAB, 25)):
        row = reference.row(request, snapshots[which], 1, draft)
        assert (row.tokens, row.stop_reason, row.ties) == (plain.tokens, "length", 0)
        np.testing.assert_allclose(row.logprobs, plain.logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct logits", "logits that tie"])
def test_the_rules_agree_with_the_device(step):
    """numpy's rules against ``tx.worker.sampling`` on 400 rows of 600 logits, that is two blocks and a part."""
    rng = np.random.default_rng(11)
    rows, vocab = 400, 600
    logits = rng.normal(0, 2, (rows, vocab)).astype(np.float32)
    if step:
        logits = np.round(logits / step) * step
    temperature = rng.choice([0.0, 0.3, 1.0, 1.4], rows).astype(np.float32)
    top_k = rng.choice([-1, 1, 3, 50, vocab, 5000], rows).astype(np.int32)
    top_p = rng.choice([1.0, 0.01, 0.5, 0.95], rows).astype(np.float32)
    words = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    samples = rng.integers(0, 9, rows).astype(np.int32)
    positions = rng.integers(1, CONTEXT, rows).astype(np.int32)
    keys = sampling.row_keys(jnp.asarray(words), jnp.asarray(samples))
    tokens, logprobs, _ = sampling.sample(
        jnp.asarray(logits), keys, *map(jnp.asarray, (positions, temperature, top_k, top_p))
    )
    differ = 0
    for row in range(rows):
        params = SamplingParams(temperature=float(temperature[row]), top_k=int(top_k[row]), top_p=float(top_p[row]))
        seed = int(words[row, 0]) << 32 | int(words[row, 1])
        uniform = uniforms(seed, int(samples[row]), CONTEXT)[positions[row]]
        token = choose(logits[row].astype(np.float64), uniform, params)
        if int(tokens[row]) != token:
            differ += 1
            assert int(tokens[row]) in as_right(logits[row].astype(np.float64), uniform, params), row
        expected = log_softmax(logits[row].astype(np.float64), params.temperature)[int(tokens[row])]
        assert float(logprobs[row]) == pytest.approx(expected, abs=2e-5)
    assert differ <= 4
