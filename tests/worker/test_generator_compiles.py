"""The sampler after warm-up: whatever the parameters of a request, nothing compiles.

Every compilation of the process counts, whoever asked for it: the programs of the sampler, and the small ones that a
stray operation on a device array would need.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compilations import compilations
from tests.worker.sampler import make, random_state, request_of, tiny_model
from tx.worker.snapshots import SnapshotStore

VOCAB, CONTEXT, SLOTS = 384, 256, 4
OPTIONS = {"max_slots": SLOTS, "max_context": CONTEXT, "eos_token_ids": (300,)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", VOCAB, CONTEXT)


@pytest.fixture(scope="module")
def snapshots(model):
    """The base model and two adapters of one rank."""
    store = SnapshotStore(model, max_resident=8)
    for index in range(2):
        store.load(f"snapshot-{index}", random_state(model.config, 8, index))
    return [None, store.get("snapshot-0"), store.get("snapshot-1")]


def drain(generator):
    while generator.has_work:
        assert all(outcome.error is None for outcome in generator.slice())


def test_the_counter_counts():
    with compilations() as names:
        jax.jit(lambda x: x * 3)(np.ones(3, np.float32))
        jnp.asarray(np.ones(3, np.float32)) + 1
    assert len(names) >= 2


# ---- one parameter at a time ----------------------------------------------------------------------------------------

VALUES = {
    "temperature": [1.0, 0.0, 1e-6, 0.31, 1.7],
    "top_k": [5, 1, 17, 300, 100_000],
    "top_p": [0.9, 0.01, 0.5, 0.999],
    "seed": [0, -1, 2**63 - 1, 12345],
    "max_tokens": [20, 1, 7, 8, 9, 33],
    "stop_token_ids": [(), (1,), (1, 2, 3), tuple(range(200, 240)), (2**40,)],
    "stop_strings": [(), ("<1>",), ("<17><", "very long " * 9, "€")],
    "stop_on_eos": [True, False],
}


@pytest.mark.parametrize("field", VALUES)
def test_no_value_of_a_parameter_compiles(model, field):
    """After the field's first value, none of the others needs a program of its own."""
    generator, rng = make(model, **OPTIONS), np.random.default_rng(0)
    base = {"max_tokens": 20, "seed": 3, "top_k": 5 if field != "temperature" else -1, "stop_on_eos": False}
    for index, value in enumerate([VALUES[field][0], *VALUES[field]]):
        prompt = rng.integers(0, VOCAB, 20)
        with compilations() as names:
            generator.submit(index, request_of(prompt, 1, **base | {field: value}), None)
            drain(generator)
        assert index == 0 or names == [], (field, value)


def test_how_much_of_a_prompt_is_scored_compiles_nothing(model):
    """Top-k prompt logprobs exist for a few widths; within one, k is data, and so are the tokens that are scored."""
    generator, rng = make(model, **OPTIONS), np.random.default_rng(0)
    for index, topk in enumerate([8, 8, 5, 6, 7, 8]):
        with compilations() as names:
            generator.submit(index, request_of(rng.integers(0, VOCAB, 20), 1, True, topk, max_tokens=3), None)
            drain(generator)
        assert index == 0 or names == [], topk


def test_another_snapshot_of_the_same_rank_compiles_nothing(model, snapshots):
    generator, rng = make(model, **OPTIONS), np.random.default_rng(0)
    for index, snapshot in enumerate([*snapshots, *snapshots]):
        with compilations() as names:
            generator.submit(index, request_of(rng.integers(0, VOCAB, 20), 2, max_tokens=9), snapshot)
            drain(generator)
        assert index < 2 or names == []


# ---- all together ---------------------------------------------------------------------------------------------------


def stream(generator, snapshots, seed):
    """Sixteen requests, a few at a time; what is fixed is the lengths of their prompts and who owns them."""
    rng = np.random.default_rng(seed)
    for job_id in range(16):
        params = {
            "max_tokens": int(rng.integers(1, 40)),
            "seed": int(rng.integers(-(2**63), 2**63)),
            "temperature": float(rng.choice([0.0, 1.0, rng.uniform(0.1, 1.5)])),
            "top_k": int(rng.choice([-1, rng.integers(1, 400)])),
            "top_p": float(rng.choice([1.0, rng.uniform(0.05, 1.0)])),
            "stop_token_ids": tuple(rng.integers(0, VOCAB, rng.integers(0, 12)).tolist()),
            "stop_strings": tuple(f"<{token}>" for token in rng.integers(0, VOCAB, rng.integers(0, 3))),
            "stop_on_eos": bool(rng.random() < 0.5),
        }
        scores = bool(rng.random() < 0.3), int(rng.choice([0, 0, rng.integers(1, 9)]))
        prompt = rng.integers(0, VOCAB, (1, 20, 40, 60)[job_id % 4])
        request = request_of(prompt, int(rng.integers(1, 4)), *scores, **params)
        generator.submit(job_id, request, snapshots[(job_id // 2) % 2])
        for _ in range(int(rng.poisson(1))):
            generator.slice()
    drain(generator)


@pytest.mark.slow
def test_streams_of_random_parameters_compile_nothing_after_warm_up(model, snapshots):
    """Warm-up ends, because sizes come from small sets: three streams in a row compile nothing. Nor do four more."""
    generator, quiet = make(model, **OPTIONS), 0
    for seed in range(30):
        with compilations() as names:
            stream(generator, snapshots, seed)
        quiet = 0 if names else quiet + 1
        if quiet == 3:
            break
    assert quiet == 3
    for seed in range(100, 104):
        with compilations() as names:
            stream(generator, snapshots, seed)
        assert names == []
