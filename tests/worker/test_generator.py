"""``tx.worker.generator`` on a tiny model, against a reference that decodes one row with one full forward per token."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worker.sampler import (
    CONTEXT,
    EOS,
    alone,
    check_logprobs,
    drain,
    full_logits,
    make,
    prompt_of,
    random_state,
    request_of,
    run,
)
from tx.errors import InvalidInput
from tx.models.loading import load_model
from tx.worker import decode_slots, programs, sampling
from tx.worker.mesh import make_mesh
from tx.worker.snapshots import SnapshotStore


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    return load_model(tiny_qwen3, make_mesh(), jnp.float32)


@pytest.fixture(scope="module")
def snapshots(model):
    """Adapters of ranks 8, 3 and 4, and None for the base model."""
    store = SnapshotStore(model, max_resident=8)
    for index, rank in enumerate((8, 3, 4)):
        store.load(f"snapshot-{index}", random_state(model.config, rank, index))
    return [*(store.get(f"snapshot-{index}") for index in range(3)), None]


draw = jax.jit(sampling.sample)


def reference_tokens(model, request, snapshot, sample):
    """One row by the definition: a full forward, a draw from (seed, sample, position), until its end."""
    params, tokens = request.params, list(request.prompt)
    seed = params.seed % 2**64
    key = sampling.row_keys(jnp.array([[seed >> 32, seed % 2**32]], jnp.uint32), jnp.array([sample]))
    stop_ids = {*params.stop_token_ids, *(EOS if params.stop_on_eos else ())}
    limit = min(params.max_tokens, CONTEXT - len(request.prompt))
    while len(tokens) - len(request.prompt) < limit:
        logits = full_logits(model, tokens, snapshot)[-1:]
        token, _, _ = draw(
            logits,
            key,
            np.array([len(tokens)], np.int32),
            np.array([params.temperature], np.float32),
            np.array([params.top_k], np.int32),
            np.array([params.top_p], np.float32),
        )
        tokens.append(int(token[0]))
        if tokens[-1] in stop_ids:
            return tokens[len(request.prompt) :], "stop"
    return tokens[len(request.prompt) :], "length"


# ---- what is sampled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 3], ids=["rank 8", "rank 3", "base"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_equal_a_full_forward(model, snapshots, which, temperature):
    request = request_of(prompt_of(20), 3, max_tokens=20, temperature=temperature, seed=5, stop_on_eos=False)
    result = alone(model, request, snapshots[which])
    assert [len(sequence.tokens) for sequence in result.sequences] == [20, 20, 20]
    for sequence in result.sequences:
        assert sequence.tokens.dtype == np.int32
        assert sequence.logprobs.dtype == np.float32
        check_logprobs(model, request, snapshots[which], sequence)
    if temperature == 0:
        assert (result.sequences[0].tokens == result.sequences[1].tokens).all()
        tokens = np.concatenate([request.prompt, result.sequences[0].tokens])
        best = np.asarray(full_logits(model, tokens, snapshots[which])).argmax(axis=-1)
        assert (best[19:-1] == result.sequences[0].tokens).all()


def random_requests(count, seed, max_tokens=24):
    rng = np.random.default_rng(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]
    requests = []
    for job in range(count):
        params = {
            "max_tokens": int(rng.integers(1, max_tokens + 1)),
            "seed": int(rng.integers(-(2**63), 2**63)),
            "temperature": float(pick(0.0, 0.7, 1.0, 1.3)),
            "top_k": int(pick(-1, -1, 5, 50)),
            "top_p": float(pick(1.0, 1.0, 0.9)),
            "stop_token_ids": tuple(rng.integers(0, 2048, pick(0, 1, 12)).tolist()),
            "stop_on_eos": bool(pick(True, False)),
        }
        length = int(pick(1, 2, 5, 33, 60))
        requests.append(request_of(prompt_of(length, 100 + job), int(pick(1, 1, 2, 3)), **params))
    return requests


@pytest.mark.slow
def test_random_requests_equal_the_reference_decoder(model, snapshots):
    requests = random_requests(24, seed=1)
    owners = [snapshots[job % 4] for job in range(len(requests))]
    generator = make(model, max_slots=6)
    results = run(generator, {job: (request, owners[job]) for job, request in enumerate(requests)})
    for job, request in enumerate(requests):
        for sample, sequence in enumerate(results[job].sequences):
            tokens, reason = reference_tokens(model, request, owners[job], sample)
            assert (sequence.tokens.tolist(), sequence.stop_reason) == (tokens, reason), (job, sample)


def test_c14_a_sample_is_the_same_alone_in_company_and_in_a_new_generator(model, snapshots):
    requests = random_requests(8, seed=2)
    owners = [snapshots[0] if job % 2 else None for job in range(8)]
    together = run(make(model, max_slots=8), {job: (request, owners[job]) for job, request in enumerate(requests)})
    crowded = make(model, max_slots=4)
    again = run(crowded, {job: (requests[job], owners[job]) for job in reversed(range(8))})
    for job, request in enumerate(requests):
        lone = alone(model, request, owners[job], max_slots=1)
        for other in (together[job], again[job]):
            for mine, theirs in zip(lone.sequences, other.sequences, strict=True):
                assert mine.tokens.tolist() == theirs.tokens.tolist()
                assert mine.stop_reason == theirs.stop_reason
                np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=2e-5)


def test_samples_differ_and_a_seed_repeats_them(model):
    request = request_of(prompt_of(7), 5, max_tokens=12, seed=-1)
    first, second = alone(model, request), alone(model, request)
    drawn = [tuple(sequence.tokens) for sequence in first.sequences]
    assert len(set(drawn)) == 5
    assert drawn == [tuple(sequence.tokens) for sequence in second.sequences]
    other = alone(model, request_of(prompt_of(7), 5, max_tokens=12, seed=2**32 - 1))  # -1's low word, another high one
    assert drawn != [tuple(sequence.tokens) for sequence in other.sequences]


def test_c14_sample_j_does_not_depend_on_num_samples(model):
    many = alone(model, request_of(prompt_of(7), 5, max_tokens=9, seed=3))
    few = alone(model, request_of(prompt_of(7), 2, max_tokens=9, seed=3))
    for mine, theirs in zip(few.sequences, many.sequences[:2], strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()


# ---- how rows end ---------------------------------------------------------------------------------------------------


def test_a_stop_token_is_included_once(model):
    free = alone(model, request_of(prompt_of(9), max_tokens=30, seed=4, stop_on_eos=False)).sequences[0]
    stop = int(free.tokens[10])
    first = free.tokens.tolist().index(stop)
    for stop_ids in [(stop,), (*range(2030, 2048), stop)]:  # more stops than the device loop looks at
        request = request_of(prompt_of(9), max_tokens=30, seed=4, stop_on_eos=False, stop_token_ids=stop_ids)
        ended = alone(model, request).sequences[0]
        assert ended.tokens.tolist() == free.tokens[: first + 1].tolist()
        assert len(ended.logprobs) == first + 1
        assert ended.stop_reason == "stop"


def test_eos_ends_a_row_unless_told_otherwise(model):
    free = alone(model, request_of(prompt_of(9), max_tokens=30, seed=4, stop_on_eos=False)).sequences[0]
    eos = int(free.tokens[6])
    first = free.tokens.tolist().index(eos)
    request = request_of(prompt_of(9), max_tokens=30, seed=4)
    ended = alone(model, request, eos_token_ids=(eos,)).sequences[0]
    assert (len(ended.tokens), ended.stop_reason) == (first + 1, "stop")
    request = request_of(prompt_of(9), max_tokens=30, seed=4, stop_on_eos=False)
    assert len(alone(model, request, eos_token_ids=(eos,)).sequences[0].tokens) == 30


def test_a_stop_string_across_tokens(model):
    free = alone(model, request_of(prompt_of(9), max_tokens=30, seed=4, stop_on_eos=False)).sequences[0]
    one, two = free.tokens[12:14].tolist()
    request = request_of(prompt_of(9), max_tokens=30, seed=4, stop_on_eos=False, stop_strings=(f"{one}><{two}",))
    ended = alone(model, request).sequences[0]
    assert (ended.tokens.tolist(), ended.stop_reason) == (free.tokens[:14].tolist(), "stop")


def test_max_tokens_is_cut_to_the_context(model):
    request = request_of(prompt_of(CONTEXT - 10), max_tokens=1000, seed=1, stop_on_eos=False)
    sequence = alone(model, request).sequences[0]
    assert (len(sequence.tokens), sequence.stop_reason) == (10, "length")
    check_logprobs(model, request, None, sequence)
    request = request_of(prompt_of(CONTEXT - 20), seed=1, stop_on_eos=False)
    assert len(alone(model, request).sequences[0].tokens) == 20


# ---- slots ----------------------------------------------------------------------------------------------------------


def test_more_samples_than_slots(model):
    request = request_of(prompt_of(12), 11, max_tokens=13, seed=6)
    few, many = alone(model, request, max_slots=4), alone(model, request, max_slots=16)
    for mine, theirs in zip(few.sequences, many.sequences, strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()


def test_a_short_request_overtakes_a_long_one(model):
    generator = make(model, max_slots=4)
    generator.submit(0, request_of(prompt_of(5), 2, max_tokens=200, stop_on_eos=False), None)
    for _ in range(3):
        assert generator.slice() == []
    generator.submit(1, request_of(prompt_of(6), max_tokens=4), None)
    order = []
    while generator.has_work:
        order += [outcome.job_id for outcome in generator.slice()]
    assert order == [1, 0]


def test_the_pool_grows_and_shrinks_without_a_trace(model, monkeypatch):
    monkeypatch.setattr(decode_slots, "COMPILE_S", 0.0)  # always the size that fits
    generator = make(model, max_slots=8)
    long = request_of(prompt_of(200), max_tokens=200, seed=3, stop_on_eos=False)
    shorts = {
        job: (request_of(prompt_of(3, job), max_tokens=job, seed=job, stop_on_eos=False), None) for job in range(1, 8)
    }
    sizes = set()
    generator.submit(0, long, None)
    generator.slice()
    for job, (request, snapshot) in shorts.items():
        generator.submit(job, request, snapshot)
    results = {}
    while generator.has_work:
        results |= {outcome.job_id: outcome.result for outcome in generator.slice()}
        sizes.add(generator._table.num_blocks)
        assert generator._pool.num_blocks == generator._table.num_blocks
    assert sizes == {4, 32, 8}  # one row of 200, seven short ones beside it, and at last one of 400
    assert generator._table.num_held == 0
    check_logprobs(model, long, None, results[0].sequences[0])
    for job, (request, snapshot) in shorts.items():
        check_logprobs(model, request, snapshot, results[job].sequences[0])


def test_cancel_frees_the_slots_and_reports_nothing(model):
    generator = make(model, max_slots=4)
    generator.submit(0, request_of(prompt_of(5), 6, max_tokens=100, stop_on_eos=False), None)
    generator.slice()
    generator.slice()
    generator.submit(1, request_of(prompt_of(6), max_tokens=4), None)
    generator.cancel(0)
    assert set(drain(generator)) == {1}
    generator.cancel(0)
    assert not generator.has_work
    assert generator.slice() == []


# ---- compilation ----------------------------------------------------------------------------------------------------


class Compilations(logging.Handler):
    """Names of what JAX compiles while it is open."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.logger = logging.getLogger("jax._src.interpreters.pxla")

    def emit(self, record):
        if record.getMessage().startswith("Compiling"):
            self.names.append(record.getMessage()[:80])

    def __enter__(self):
        self.propagate, self.logger.propagate = self.logger.propagate, False
        self.logger.addHandler(self)
        jax.config.update("jax_log_compiles", True)
        return self

    def __exit__(self, *_):
        jax.config.update("jax_log_compiles", False)
        self.logger.removeHandler(self)
        self.logger.propagate = self.propagate


def test_random_parameters_compile_nothing_after_warm_up(model, snapshots):
    """The programs of four slots and prompts up to 64 are few enough to run each once; then nothing compiles."""
    generator = make(model, max_slots=4)
    owners = [snapshots[0], None]

    def stream(seed):
        return {job: (request, owners[job % 2]) for job, request in enumerate(random_requests(16, seed=seed))}

    with Compilations() as compiled:
        for owner in owners:
            for length in (20, 40, 60):  # alone and together; to one row and to four
                batch = {job: (request_of(prompt_of(length, job), max_tokens=1), owner) for job in range(10)}
                run(generator, batch)
                run(generator, {0: (request_of(prompt_of(length, 99), max_tokens=2), owner)})
            for top_k in (-1, 5):  # decoding one row and four, from one row to four and back
                lone = request_of(prompt_of(20), max_tokens=80, top_k=top_k, stop_on_eos=False)
                generator.submit(0, lone, owner)
                generator.slice()
                run(generator, {1: (request_of(prompt_of(20), 3, max_tokens=9, top_k=top_k), owner)})
    assert compiled.names  # the counter counts
    with Compilations() as compiled:
        for seed in (6, 7):
            run(generator, stream(seed))
    assert compiled.names == []


def test_a_full_pool_sends_the_youngest_back_and_everyone_gets_their_tokens(model):
    """Ten rows that grow to 5 blocks each in a pool of 12: never more than that is held, and nobody's tokens change."""
    requests = {
        job: (request_of(prompt_of(40, job), 2, max_tokens=250, seed=job, stop_on_eos=False), None) for job in range(5)
    }
    generator, most_rows, restarts = make(model, max_slots=16, kv_blocks=16, max_context=400), 0, 0
    for job, (request, snapshot) in requests.items():
        generator.submit(job, request, snapshot)
    results = {}
    while generator.has_work:
        before = generator.num_decoding
        results |= {outcome.job_id: outcome.result for outcome in generator.slice()}
        restarts += generator.num_decoding < before
        most_rows = max(most_rows, generator.num_decoding)
        assert generator._table.num_held <= 12
    assert most_rows >= 4
    assert restarts
    for job, (request, _) in requests.items():
        for mine, theirs in zip(results[job].sequences, alone(model, request).sequences, strict=True):
            assert mine.tokens.tolist() == theirs.tokens.tolist()
    assert generator._table.num_held == 0


def test_c10_what_an_overflowing_adapter_leaves_behind_harms_nobody(model, snapshots):
    """Weights that are finite but overflow: their request fails by name, and its blocks are clean for the next."""
    store = SnapshotStore(model, max_resident=2)
    store.load("huge", random_state(model.config, 4, 0, scale=1e18))
    innocent = request_of(prompt_of(30, 1), 4, max_tokens=60, seed=3, stop_on_eos=False)
    expected = alone(model, innocent)
    generator = make(model, max_slots=8)
    jobs = {0: (request_of(prompt_of(90), 4, max_tokens=40, stop_on_eos=False), store.get("huge")), 1: (innocent, None)}
    together = run(generator, jobs)
    after = run(generator, {2: (innocent, None)})[2]
    assert isinstance(together[0], InvalidInput)
    for result in (together[1], after):
        for mine, theirs in zip(result.sequences, expected.sequences, strict=True):
            assert mine.tokens.tolist() == theirs.tokens.tolist()


# ---- failures -------------------------------------------------------------------------------------------------------


def test_running_out_of_memory_halves_the_slots_and_loses_nothing(model, monkeypatch):
    """The device refuses more than two rows: every request still gets the tokens that it gets alone."""
    real = programs.decode_slice

    def small_device(graphdef, weights, pool, rows, *args, **kwargs):
        if (rows.remaining > 0).sum() > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(graphdef, weights, pool, rows, *args, **kwargs)

    requests = {job: (request_of(prompt_of(9, job), 3, max_tokens=10, seed=job), None) for job in range(3)}
    expected = {job: alone(model, request) for job, (request, _) in requests.items()}
    monkeypatch.setattr(programs, "decode_slice", small_device)
    results = run(make(model, max_slots=2), requests)
    crowded = run(make(model, max_slots=8), requests)
    for outcome in (results, crowded):
        for job, result in expected.items():
            for mine, theirs in zip(result.sequences, outcome[job].sequences, strict=True):
                assert mine.tokens.tolist() == theirs.tokens.tolist()


def test_c10_a_request_that_fails_alone_fails_alone(model, monkeypatch):
    real = programs.decode_slice

    def broken(graphdef, weights, pool, rows, *args, **kwargs):
        if (np.asarray(rows.top_k) == 13).any():
            raise RuntimeError("INTERNAL: no such row")
        return real(graphdef, weights, pool, rows, *args, **kwargs)

    monkeypatch.setattr(programs, "decode_slice", broken)
    jobs = {job: (request_of(prompt_of(9, job), max_tokens=10, top_k=13 if job == 2 else -1), None) for job in range(5)}
    results = run(make(model, max_slots=8), jobs)
    assert isinstance(results[2], RuntimeError)
    assert all(len(results[job].sequences[0].tokens) for job in (0, 1, 3, 4))


def test_a_failing_prefill_fails_its_own_request(model, monkeypatch):
    real = programs.PrefillPrograms.run

    def broken(self, tokens, *args, **kwargs):
        if (np.asarray(tokens) == 1999).any():
            raise RuntimeError("INTERNAL: no such token")
        return real(self, tokens, *args, **kwargs)

    monkeypatch.setattr(programs.PrefillPrograms, "run", broken)
    prompts = [np.where(prompt_of(20, job) == 1999, 0, prompt_of(20, job)) for job in range(8)]
    prompts[3][4] = 1999
    results = run(make(model), {job: (request_of(prompt, max_tokens=3), None) for job, prompt in enumerate(prompts)})
    assert isinstance(results[3], RuntimeError)
    assert all(len(results[job].sequences[0].tokens) for job in range(8) if job != 3)


def test_logits_that_are_not_finite_fail_their_own_request(model, snapshots):
    store = SnapshotStore(model, max_resident=2)
    store.load("huge", random_state(model.config, 4, 7, scale=1e30))
    request = request_of(prompt_of(6), max_tokens=6, seed=1)
    results = run(make(model), {0: (request, store.get("huge")), 1: (request, snapshots[0]), 2: (request, None)})
    assert isinstance(results[0], InvalidInput)
    for job, owner in ((1, snapshots[0]), (2, None)):
        check_logprobs(model, request, owner, results[job].sequences[0])
