"""``tx.worker.scoring`` against numpy's log-softmax: targets, the best, alternatives; and which positions it needs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.errors import InvalidInput
from tx.layers.lora import LoraWeights
from tx.types import ABSENT_LOGPROB, Cells, SampleRequest, SamplingParams
from tx.worker import sampling, scoring
from tx.worker.scoring import AltDraws, PromptScores, wanted

EMBED, VOCAB = 8, 300
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(EMBED, VOCAB)).astype(np.float32)
HIDDEN = RNG.normal(size=(1, 700, EMBED)).astype(np.float32)
PROMPT = RNG.integers(0, VOCAB, 40).astype(np.int32)
SCORE = jax.jit(scoring.score, static_argnames="num_topk")


def log_softmax(logits):
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


LOGPROBS = log_softmax(HIDDEN[0] @ KERNEL)


def request_of(size=40, params=None, **wants):
    return SampleRequest(PROMPT[:size], 1, params or SamplingParams(), **wants)


def drive(request, piece=16, start=None, upto=None):
    """Score a request's prompt piece by piece, as a prefill does; the states of all positions are given."""
    part = wanted(request)
    position = part.first if start is None else start
    while position < (len(request.prompt) - 1 if upto is None else upto):
        feed(part, position, piece)
        position += piece
    return part


def feed(part, position, size):
    scores = SCORE(
        HIDDEN[:, position : position + size], KERNEL, None, None, part.targets(position, size), part.draws(position),
        num_topk=part.num_topk,
    )  # fmt: skip
    part.take(position, jax.device_get(scores))


# ---- on the device ----


@pytest.mark.parametrize("seq", [1, 5, 255, 256, 257, 700])
@pytest.mark.parametrize("adapted", [False, True])
def test_targets_and_the_best_are_those_of_a_full_log_softmax(seq, adapted):
    hidden, logits, lora, gate = HIDDEN[:, :seq], HIDDEN[:, :seq] @ KERNEL, None, None
    if adapted:
        a, b = RNG.normal(size=(EMBED, 4)).astype(np.float32), RNG.normal(size=(4, VOCAB)).astype(np.float32)
        lora, gate = LoraWeights(jnp.asarray(a), jnp.asarray(b)), jnp.asarray([[1.0, 0.5, 0.0, 2.0]])
        logits = logits + (hidden @ a * np.array([1.0, 0.5, 0.0, 2.0], np.float32)) @ b
    expected = log_softmax(logits)
    targets = RNG.integers(0, VOCAB, (1, seq, 3)).astype(np.int32)
    scores = SCORE(hidden, KERNEL, lora, gate, targets, num_topk=8)
    np.testing.assert_allclose(scores.logprobs, np.take_along_axis(expected, targets, -1), atol=2e-5)
    np.testing.assert_allclose(scores.topk_logprobs, -np.sort(-expected, axis=-1)[..., :8], atol=2e-5)
    np.testing.assert_allclose(
        scores.topk_logprobs, np.take_along_axis(expected, np.asarray(scores.topk_ids), -1), atol=2e-5
    )
    assert scores.alt_ids is None


def test_rows_are_scored_apart():
    hidden = HIDDEN[0, :600].reshape(3, 200, EMBED)
    targets = RNG.integers(0, VOCAB, (3, 200, 1)).astype(np.int32)
    scores = SCORE(hidden, KERNEL, None, None, targets, num_topk=0)
    expected = np.take_along_axis(LOGPROBS[:600].reshape(3, 200, VOCAB), targets, -1)
    np.testing.assert_allclose(scores.logprobs, expected, atol=2e-5)
    assert scores.topk_ids is None


def test_more_than_the_vocabulary_is_the_vocabulary():
    scores = SCORE(HIDDEN[:, :2], KERNEL, None, None, np.zeros((1, 2, 1), np.int32), num_topk=512)
    assert scores.topk_ids.shape == (1, 2, VOCAB)
    np.testing.assert_allclose(np.exp(scores.topk_logprobs).sum(axis=-1), 1.0, atol=1e-5)


def test_no_array_of_all_logits():
    args = (HIDDEN, KERNEL, None, None, np.zeros((1, 700, 1), np.int32), draws_of(0.7))
    text = jax.jit(partial(scoring.score, num_topk=8)).lower(*args).as_text()
    assert f"256x1x{VOCAB}xf32" in text
    assert f"700x1x{VOCAB}x" not in text
    assert f"1x700x{VOCAB}x" not in text


def draws_of(temperature, num=8, seed=(0, 5), start=0):
    return AltDraws(
        np.array([seed], np.uint32), np.arange(num, dtype=np.int32), np.array([temperature], np.float32),
        np.array([start], np.int32),
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_alternatives_follow_the_tempered_distribution(temperature):
    """χ² over the likeliest tokens, the rest pooled: 4,000 positions with the same state, 8 draws each."""
    kernel, state = 2 * KERNEL[:, :20], HIDDEN[:, :1]
    states = np.repeat(state, 4000, axis=1)
    targets = np.zeros((1, 4000, 1), np.int32)
    scores = SCORE(states, kernel, None, None, targets, draws_of(temperature), num_topk=0)
    drawn = np.asarray(scores.alt_ids).ravel()
    logprobs = log_softmax(state[0, 0] @ kernel)
    np.testing.assert_allclose(scores.alt_logprobs.ravel(), logprobs[drawn], atol=2e-5)  # at temperature 1
    expected = np.exp(log_softmax(logprobs / temperature)) * drawn.size
    counts = np.bincount(drawn, minlength=20)
    likely = expected >= 20
    rare = counts[~likely].sum(), expected[~likely].sum()
    pairs = [*zip(counts[likely], expected[likely], strict=True), rare]
    chi2 = sum((got - wished) ** 2 / wished for got, wished in pairs if wished > 1)
    assert chi2 < 50, chi2  # 99.9 % of 20 degrees of freedom is 45


def test_alternatives_at_temperature_0_are_the_best_token():
    targets = np.zeros((1, 30, 1), np.int32)
    scores = SCORE(HIDDEN[:, :30], KERNEL, None, None, targets, draws_of(0.0), num_topk=0)
    best = LOGPROBS[:30].argmax(axis=-1)
    assert (np.asarray(scores.alt_ids)[0] == best[:, None]).all()


def test_an_alternative_is_what_a_sample_of_that_index_would_have_drawn():
    targets = np.zeros((1, 6, 1), np.int32)
    scores = SCORE(HIDDEN[:, :6], KERNEL, None, None, targets, draws_of(0.8, start=3), num_topk=0)
    for offset in range(6):
        for index in range(8):
            keys = sampling.row_keys(jnp.array([[0, 5]], jnp.uint32), jnp.array([index]))
            logits, one = jnp.asarray(HIDDEN[:, offset] @ KERNEL), jnp.ones(1)
            drawn, _, _ = sampling.sample(logits, keys, jnp.array([3 + offset + 1]), 0.8 * one, jnp.array([-1]), one)
            assert scores.alt_ids[0, offset, index] == drawn[0]


# ---- on the host ----


def test_nothing_is_wanted_unless_asked_for():
    assert wanted(request_of()) is None
    assert wanted(request_of(topk_sample_logprobs=5, record_stability_info=True)) is None


@pytest.mark.parametrize("piece", [1, 16, 64])
@pytest.mark.parametrize("last_n", [0, 1, 10, 39])
def test_prompt_logprobs_and_their_best_cover_the_last_n(piece, last_n):
    part = drive(request_of(prompt_logprobs=True, topk_prompt_logprobs=3, prompt_logprobs_last_n=last_n), piece)
    assert part.done
    absent = 40 - (last_n or 39)
    assert part.first == absent - 1
    assert np.isnan(part.prompt_logprobs[:absent]).all()
    expected = LOGPROBS[np.arange(39), PROMPT[1:]]
    np.testing.assert_allclose(part.prompt_logprobs[absent:], expected[absent - 1 :], atol=2e-5)
    topk = part.topk_prompt_logprobs
    assert topk.token_ids.shape == topk.logprobs.shape == (40, 3)
    assert (topk.token_ids[:absent] == 0).all()
    assert (topk.logprobs[:absent] == ABSENT_LOGPROB).all()
    best = np.argsort(-LOGPROBS[:39], axis=-1)[absent - 1 :, :3]
    assert (topk.token_ids[absent:] == best).all()
    assert part.target_prompt_logprobs is None
    assert part.prompt_alt_tokens is None


def test_what_was_not_asked_for_is_absent():
    part = drive(request_of(topk_prompt_logprobs=1))
    assert part.prompt_logprobs is None
    assert part.topk_prompt_logprobs.logprobs.shape == (40, 1)


def test_the_last_n_do_not_limit_alternatives_and_targets():
    ids = np.full((39, 1), -1)
    ids[4] = 7
    part = drive(request_of(prompt_logprobs=True, prompt_logprobs_last_n=2, target_prompt_logprobs=Cells(ids)))
    assert part.first == 4
    np.testing.assert_allclose(part.target_prompt_logprobs.values[4], LOGPROBS[4, 7], atol=2e-5)
    assert np.isfinite(part.prompt_logprobs).tolist() == [False] * 38 + [True] * 2
    both = wanted(request_of(prompt_logprobs=True, prompt_logprobs_last_n=2, prompt_alt_tokens_k=1))
    assert both.first == 0


def test_targets_keep_their_cells_and_rows_before_the_first_are_skipped():
    ids = np.full((39, 30), -1, np.int64)
    ids[20, [3, 17]] = [5, 6]
    ids[21, 29] = 7
    ids[38, :3] = [0, 299, 0]
    csr = (np.arange(40), np.arange(4))
    part = drive(request_of(target_prompt_logprobs=Cells(ids, csr)))
    assert (part.first, part.num_targets) == (20, 8)  # at most three ids in a row, whatever the columns
    got = part.target_prompt_logprobs
    assert got.csr is csr
    assert got.values.dtype == np.float32
    expected = np.where(ids >= 0, np.take_along_axis(LOGPROBS[:39], np.maximum(ids, 0), -1), 0.0)
    np.testing.assert_allclose(got.values, expected, atol=2e-5)
    assert part.prompt_logprobs is None


def test_the_worked_example():
    request = SampleRequest(
        np.array([7, 8, 9]), 1, SamplingParams(), target_prompt_logprobs=Cells(np.array([[5, -1], [-1, 6]]))
    )
    part = wanted(request)
    assert part.num_targets == 8
    assert part.targets(0, 4)[0, :, :3].tolist() == [[8, 5, 0], [9, 6, 0], [0, 0, 0], [0, 0, 0]]
    assert part.targets(1, 1)[0, :, :3].tolist() == [[9, 6, 0]]
    assert part.targets(5, 2).tolist() == np.zeros((1, 2, 8)).tolist()


@pytest.mark.parametrize("piece", [5, 64])
def test_alternatives_do_not_depend_on_pieces_or_on_their_number(piece):
    params = SamplingParams(temperature=0.7, seed=-3)
    part = drive(request_of(params=params, prompt_alt_tokens_k=9), piece)
    whole = drive(request_of(params=params, prompt_alt_tokens_k=4), 39)
    assert (part.num_draws, whole.num_draws) == (64, 8)
    got = part.prompt_alt_tokens
    assert (got.token_ids.dtype, got.token_ids.shape) == (np.int64, (39, 9))
    assert (got.token_ids[:, :4] == whole.prompt_alt_tokens.token_ids).all()
    expected = np.take_along_axis(LOGPROBS[:39], got.token_ids, -1)
    np.testing.assert_allclose(got.logprobs, expected, atol=2e-5)
    other = drive(request_of(params=SamplingParams(temperature=0.7, seed=-4), prompt_alt_tokens_k=9))
    assert (other.prompt_alt_tokens.token_ids != got.token_ids).any()


def test_a_prompt_of_one_token_has_nothing_to_score():
    part = wanted(request_of(1, prompt_logprobs=True, topk_prompt_logprobs=2, prompt_alt_tokens_k=3))
    assert (part.first, part.done) == (0, True)
    assert np.isnan(part.prompt_logprobs).tolist() == [True]
    assert part.topk_prompt_logprobs.logprobs.tolist() == [[ABSENT_LOGPROB] * 2]
    assert part.prompt_alt_tokens.token_ids.shape == (0, 3)


def test_a_restart_replaces_and_earlier_positions_are_dropped():
    request = request_of(prompt_logprobs=True, prompt_logprobs_last_n=30)
    part = drive(request, 10, upto=19)
    assert not part.done
    wrong = PromptScores(np.full((1, 5, 1), -7.0, np.float32))
    part.take(7, wrong)  # as a prefill that starts at the beginning of a block gives them
    assert np.isnan(part.prompt_logprobs[:10]).all()
    assert part.prompt_logprobs[10:13].tolist() == [-7.0] * 3
    for position in (0, 13, 26):
        feed(part, position, 13)
    assert part.done
    np.testing.assert_allclose(part.prompt_logprobs[10:], LOGPROBS[np.arange(9, 39), PROMPT[10:]], atol=2e-5)


def test_a_gap_is_an_error():
    part = wanted(request_of(prompt_logprobs=True))
    with pytest.raises(ValueError, match="from position 3, but those from 0"):
        feed(part, 3, 8)


# ---- what is refused ----

GOOD = {"topk_prompt_logprobs": 300, "prompt_alt_tokens_k": 256, "prompt_logprobs": True, "prompt_logprobs_last_n": 39}


def test_the_ends_of_every_range_are_accepted():
    ids = np.full((39, 2), -1)
    ids[0, 0] = VOCAB - 1
    scoring.check(request_of(**GOOD, target_prompt_logprobs=Cells(ids)), VOCAB)
    scoring.check(request_of(1, prompt_logprobs=True), VOCAB)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs: got -1, accepted: 0 to 300 "),
        ({"topk_prompt_logprobs": 301}, "topk_prompt_logprobs: got 301, accepted: 0 to 300 "),
        ({"prompt_alt_tokens_k": 257}, "prompt_alt_tokens_k: got 257, accepted: 0 to 256 "),
        ({"prompt_logprobs_last_n": 40}, "prompt_logprobs_last_n: got 40, accepted: 1 to 39"),
        ({"prompt_logprobs_last_n": -1}, "prompt_logprobs_last_n: got -1, accepted: 1 to 39"),
        ({"prompt_logprobs": False}, "prompt_logprobs_last_n: got 39, accepted: absent"),
        (
            {"target_prompt_logprobs": Cells(np.zeros((40, 1), np.int64))},
            r"target_prompt_logprobs: .*\[40, 1\].*\[39, K",
        ),
        ({"target_prompt_logprobs": Cells(np.zeros((39, 1), np.float32))}, "target_prompt_logprobs: .*float32"),
        ({"target_prompt_logprobs": Cells(np.zeros(39, np.int64))}, "target_prompt_logprobs: "),
        ({"target_prompt_logprobs": Cells(np.full((39, 3), -1))}, "target_prompt_logprobs: .*at least one"),
        ({"target_prompt_logprobs": Cells(np.zeros((39, 0), np.int64))}, "target_prompt_logprobs: .*at least one"),
        (
            {"target_prompt_logprobs": Cells(np.full((39, 3), 300))},
            r"target_prompt_logprobs\[0\]\[0\]: got 300, .* 299",
        ),
        ({"target_prompt_logprobs": Cells(np.full((39, 3), -2))}, r"target_prompt_logprobs\[0\]\[0\]: got -2"),
        ({"target_prompt_logprobs": Cells(np.zeros((39, 1025), np.int64))}, "target_prompt_logprobs: got 1025 ids"),
    ],
)
def test_wrong_wishes_name_their_field(changes, words):
    with pytest.raises(InvalidInput, match=f"^{words}"):
        scoring.check(request_of(**GOOD | changes), VOCAB)


def test_a_long_prompt_may_ask_for_less_per_token():
    long = SampleRequest(np.zeros(2**17, np.int32), 1, SamplingParams(), topk_prompt_logprobs=129)
    with pytest.raises(InvalidInput, match="0 to 128 for a prompt of 131072 tokens"):
        scoring.check(long, VOCAB)
