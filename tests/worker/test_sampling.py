"""``tx.worker.sampling`` against exact distributions computed in numpy float64. Seeds are fixed: no test is random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tx.worker import sampling

VOCAB = 700  # three blocks, the last one partly padding

program = jax.jit(sampling.sample)
least_kept = jax.jit(sampling._floor)


def keys(rows, seed=7):
    seeds = np.tile(np.array([0, seed], np.uint32), (rows, 1))
    return sampling.row_keys(jnp.asarray(seeds), jnp.arange(rows))


def call(logits, *, temperature=1.0, top_k=-1, top_p=1.0, seed=7, position=3):
    rows = logits.shape[0]
    fill = lambda value, dtype: jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (rows,)))
    tokens, logprobs, _ = program(
        jnp.asarray(logits),
        keys(rows, seed),
        fill(position, np.int32),
        fill(temperature, np.float32),
        fill(top_k, np.int32),
        fill(top_p, np.float32),
    )
    return np.asarray(tokens), np.asarray(logprobs)


def skewed_logits(seed=0, vocab=VOCAB, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, vocab).astype(np.float32)


def log_softmax(logits, temperature=1.0):
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max()
    return scaled - np.log(np.exp(scaled).sum())


def expected(logits, temperature, top_k, top_p):
    """The distribution by its definition: sort, keep k, keep the nucleus, renormalise."""
    probabilities = np.exp(log_softmax(logits, temperature))
    order = np.argsort(-probabilities, kind="stable")
    keep = np.zeros(len(logits), bool)
    keep[order[: top_k if top_k > 0 else None]] = True
    probabilities = np.where(keep, probabilities, 0)
    probabilities /= probabilities.sum()
    if top_p < 1:
        cumulative = np.cumsum(probabilities[order])
        size = int(np.searchsorted(cumulative, top_p)) + 1
        keep[order[size:]] = False
        probabilities = np.where(keep, probabilities, 0)
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, -1, 1.0), (0.5, -1, 1.0), (1.7, -1, 1.0), (1.0, 20, 1.0), (1.0, -1, 0.8), (0.8, 50, 0.9), (1.3, 1, 1.0)],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    logits = skewed_logits()
    rows, rounds = 4000, 25
    batch = np.tile(logits, (rows, 1))
    counts = np.zeros(VOCAB)
    for position in range(rounds):
        tokens, _ = call(batch, temperature=temperature, top_k=top_k, top_p=top_p, position=position)
        counts += np.bincount(tokens, minlength=VOCAB)
    probabilities = expected(logits, temperature, top_k, top_p)
    assert counts[probabilities == 0].sum() == 0
    wanted = probabilities * rows * rounds
    common = wanted >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(wanted[common], wanted[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) > 1:
        assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_the_tail_is_drawn_in_proportion():
    """A block whose whole mass is two steps of a float32 uniform: its tokens still differ fourfold."""
    weights = np.zeros((1000, 600), np.float32)
    weights[:, 0] = 1.0
    weights[:, [300, 310, 400, 500]] = np.array([4.0, 1.0, 4.0, 1.0]) * 2.0**-23 / 10
    uniform = np.stack([np.full(1000, 1 - 2.0**-24), (np.arange(1000) + 0.5) / 1000], axis=1).astype(np.float32)
    drawn = np.asarray(sampling._draw(jnp.asarray(weights), jnp.asarray(uniform)))
    assert [(drawn == token).sum() for token in (300, 310, 400, 500)] == [400, 100, 400, 100]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (5, 0.5)], ids=["plain", "filtered"])
def test_logprobs_are_of_the_tempered_distribution_before_filters(temperature, top_k, top_p):
    logits = np.stack([skewed_logits(seed) for seed in range(16)])
    tokens, logprobs = call(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    for row, token in enumerate(tokens):
        assert logprobs[row] == pytest.approx(log_softmax(logits[row], temperature)[token], abs=2e-6)


def test_all_logprobs_are_of_the_same_distribution():
    logits = np.stack([skewed_logits(seed) for seed in range(4)])
    fill = lambda value: jnp.full((4,), value)
    tokens, logprobs, everything = program(logits, keys(4), fill(3), fill(0.7), fill(5), fill(0.5))
    assert (np.take_along_axis(np.asarray(everything), np.asarray(tokens)[:, None], 1)[:, 0] == logprobs).all()
    for row in range(4):
        np.testing.assert_allclose(everything[row], log_softmax(logits[row], 0.7), atol=1e-5)


def test_greedy_takes_the_best_and_reports_temperature_one():
    logits = np.stack([skewed_logits(seed) for seed in range(8)])
    tokens, logprobs = call(logits, temperature=0.0, top_k=3, top_p=0.2)
    assert (tokens == logits.argmax(axis=-1)).all()
    for row, token in enumerate(tokens):
        assert logprobs[row] == pytest.approx(log_softmax(logits[row])[token], abs=2e-6)


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 3e38])
def test_extreme_temperatures_stay_finite(temperature):
    logits = np.stack([skewed_logits(seed) for seed in range(8)])
    tokens, logprobs = call(logits, temperature=temperature, top_p=0.9)
    assert np.isfinite(logprobs).all()
    if temperature < 1:
        assert (tokens == logits.argmax(axis=-1)).all()
    else:
        assert logprobs == pytest.approx(-np.log(VOCAB), abs=1e-4)


def test_rows_of_one_batch_have_their_own_parameters():
    logits = np.tile(skewed_logits(), (400, 1))
    top_k = np.where(np.arange(400) % 2, 2, -1)
    temperature = np.where(np.arange(400) % 4 == 0, 0.0, 1.0)
    tokens, _ = call(logits, temperature=temperature, top_k=top_k)
    best = np.argsort(-logits[0])
    assert set(tokens[top_k == 2]) == set(best[:2])
    assert set(tokens[temperature == 0]) == {best[0]}
    assert len(set(tokens[(top_k == -1) & (temperature == 1)])) > 20


def test_ties_at_the_kth_place_are_all_kept():
    logits = np.full((3000, VOCAB), -5.0, np.float32)
    logits[:, [10, 400, 650]] = 2.0
    tokens, _ = call(logits, top_k=2)
    assert set(tokens) == {10, 400, 650}


def test_a_token_of_probability_zero_is_never_drawn():
    """Every number of the unit interval that float32 can hold near its ends, on rows whose ends have no mass."""
    weights = np.zeros((2, 600), np.float32)
    weights[:, [5, 17, 300]] = [[0.1, 0.7, 0.2], [1e-30, 1e-30, 1e-30]]
    for number in (0.0, 1e-45, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0):
        drawn = np.asarray(sampling._draw(jnp.asarray(weights), jnp.full((2, 2), number, jnp.float32)))
        assert set(drawn) <= {5, 17, 300}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.one_of(st.just(-1), st.integers(1, VOCAB + 10)),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.2, 3.0),
    scale=st.sampled_from([0.0, 0.1, 1.0, 3.0, 6.0]),
)
def test_kept_tokens_are_the_definition(seed, top_k, top_p, temperature, scale):
    logits = skewed_logits(seed % 1000, scale=scale)
    scaled = jnp.asarray((logits - logits.max()) / np.float32(temperature))[None]
    kept = (
        scaled >= least_kept(scaled, jnp.exp(scaled), jnp.asarray([top_k]), jnp.asarray([top_p], jnp.float32))[:, None]
    )
    kept = np.asarray(kept)[0]
    values = np.asarray(scaled)[0]
    probabilities = np.exp(values.astype(np.float64))
    if 0 < top_k < VOCAB:
        probabilities[values < np.sort(values)[-top_k]] = 0
    probabilities /= probabilities.sum()
    # A set of most likely tokens, ties together, whose mass reaches p; without its least likely value it does not.
    assert kept.any()
    floor = values[kept].min()
    assert (kept == (values >= floor) & (probabilities > 0)).all() or top_p >= 1
    if top_p < 1:
        assert probabilities[kept].sum() >= np.float32(top_p) - 1e-5
        assert probabilities[values > floor].sum() < np.float32(top_p) + 1e-5
    else:
        assert (kept == (probabilities > 0)).all() or scale > 5


def test_c14_a_draw_depends_on_seed_index_and_position_alone():
    logits = np.stack([skewed_logits(seed) for seed in range(8)])
    seeds = np.array([[2**31, seed] for seed in range(8)], np.uint32)
    index = np.arange(8, dtype=np.int32) * 3
    position = np.arange(8, dtype=np.int32) * 100
    ones, off = np.ones(8, np.float32), np.full(8, -1, np.int32)

    def draw(rows):
        rows = np.asarray(rows)
        key = sampling.row_keys(jnp.asarray(seeds[rows]), jnp.asarray(index[rows]))
        tokens, logprobs, _ = program(logits[rows], key, position[rows], ones[rows], off[rows], ones[rows])
        return np.asarray(tokens), np.asarray(logprobs)

    together = draw(range(8))
    for row in range(8):
        alone = draw([row])
        assert alone[0][0] == together[0][row]
        assert alone[1][0] == pytest.approx(together[1][row], abs=1e-6)
    backwards = draw(range(7, -1, -1))
    assert (backwards[0][::-1] == together[0]).all()


def test_seed_index_and_position_each_matter():
    base = {"logits": np.tile(skewed_logits(), (64, 1)), "seed": 1, "position": 5}
    first = call(**base)[0]
    assert (call(**base)[0] == first).all()
    assert len(set(first)) > 5  # rows differ by their index alone
    assert (call(**base | {"seed": 2})[0] != first).any()
    assert (call(**base | {"position": 6})[0] != first).any()


def test_high_seed_bits_matter():
    low = sampling.row_keys(jnp.array([[0, 5]], jnp.uint32), jnp.array([0]))
    high = sampling.row_keys(jnp.array([[1, 5]], jnp.uint32), jnp.array([0]))
    assert (jax.random.key_data(low) != jax.random.key_data(high)).any()
