"""What sampling means, through the real SDK: stops, seeds, log-probabilities, prompts (docs/guides/sampling.md)."""

import numpy as np
import pytest
import tinker
from tinker import types
from transformers import AutoTokenizer

from tests.support.server import BASE_MODEL
from tests.support.tiny_models import EOS, TOKENIZER

PROMPT = [11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A model that a few steps have moved away from the base."""
    client = service.create_lora_training_client(BASE_MODEL, rank=7, seed=4).result()
    ids = np.random.default_rng(0).integers(3, 2000, 31).tolist()
    inputs = {"target_tokens": ids[1:], "weights": [1.0] * 30}
    datum = types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)
    for _ in range(3):
        client.forward_backward([datum], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    return client


@pytest.fixture(scope="module")
def sampler(training: tinker.TrainingClient) -> tinker.SamplingClient:
    return training.save_weights_and_get_sampling_client().result()


def draw(sampler: tinker.SamplingClient, tokens: list[int] = PROMPT, num_samples: int = 1, **params: object):
    params = {"max_tokens": 12, "seed": 1} | params
    future = sampler.sample(types.ModelInput.from_ints(tokens), num_samples, types.SamplingParams(**params))
    return future.result().sequences


def forward(training: tinker.TrainingClient, tokens: list[int]) -> np.ndarray:
    """The trainer's log-probabilities of tokens[1:]."""
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    output = training.forward([datum], "cross_entropy").result().loss_fn_outputs[0]
    return np.asarray(output["logprobs"].data)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampled_logprobs_are_the_trainers(training, sampler, temperature):
    (sequence,) = draw(sampler, temperature=temperature, max_tokens=40)
    tokens = list(sequence.tokens)
    assert len(tokens) == len(sequence.logprobs)
    expected = forward(training, PROMPT + tokens)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)


def test_prompt_logprobs_are_the_trainers(training, sampler):
    tokens = list(range(100, 140))
    logprobs = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    assert logprobs[0] is None
    assert len(logprobs) == len(tokens)
    np.testing.assert_allclose(logprobs[1:], forward(training, tokens), atol=1e-4)


def test_topk_prompt_logprobs_contain_the_prompts_own(sampler):
    params = types.SamplingParams(max_tokens=1)
    reply = sampler.sample(
        types.ModelInput.from_ints(PROMPT), 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=2048
    ).result()
    assert len(reply.topk_prompt_logprobs) == len(PROMPT)
    assert reply.topk_prompt_logprobs[0] is None
    for position in range(1, len(PROMPT)):
        row = reply.topk_prompt_logprobs[position]
        values = [value for _, value in row]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(np.exp(values).sum(), 1.0, atol=1e-4)  # k is the whole vocabulary here
        np.testing.assert_allclose(dict(row)[PROMPT[position]], reply.prompt_logprobs[position], atol=1e-5)


def test_tempered_logprobs_are_of_the_tempered_distribution(sampler):
    """Greedy choice at T=1 and a sample at T=0.5 of the same token: log p_T = (log p)/T − log Σ p^(1/T)."""
    params = types.SamplingParams(max_tokens=1)
    prompt = types.ModelInput.from_ints([*PROMPT, 1])
    reply = sampler.sample(prompt, 1, params, topk_prompt_logprobs=2048).result()
    full = dict(reply.topk_prompt_logprobs[len(PROMPT)])  # of the token after PROMPT
    temperature = 0.5
    normaliser = np.log(np.sum(np.exp(np.array(list(full.values())) / temperature)))
    for sequence in draw(sampler, num_samples=8, max_tokens=1, temperature=temperature, top_p=0.9):
        expected = full[sequence.tokens[0]] / temperature - normaliser  # over the whole vocabulary, despite top_p
        np.testing.assert_allclose(sequence.logprobs[0], expected, atol=1e-4)


def test_a_stop_token_is_returned_once_with_its_logprob(sampler):
    (free,) = draw(sampler, temperature=0.0, max_tokens=12)
    stop = free.tokens[5]
    first = list(free.tokens).index(stop)
    (stopped,) = draw(sampler, temperature=0.0, max_tokens=12, stop=[stop])
    assert stopped.tokens == free.tokens[: first + 1]
    np.testing.assert_allclose(stopped.logprobs, free.logprobs[: first + 1], atol=1e-5)
    assert stopped.stop_reason == "stop"
    assert free.stop_reason == "length"


def test_a_stop_string_keeps_the_tokens_through_it(sampler):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    (free,) = draw(sampler, temperature=0.0, max_tokens=20)
    text = tokenizer.decode(list(free.tokens), skip_special_tokens=False)
    stop = text[4:9]
    (stopped,) = draw(sampler, temperature=0.0, max_tokens=20, stop=stop)
    assert stopped.stop_reason == "stop"
    got = tokenizer.decode(list(stopped.tokens), skip_special_tokens=False)
    assert stop in got
    assert stop not in tokenizer.decode(list(stopped.tokens[:-1]), skip_special_tokens=False)


def test_end_of_sequence_ends_a_row_unless_stop_is_empty(service):
    """A model taught to say end-of-sequence: it stops there by default, and goes on with ``stop=[]``."""
    client = service.create_lora_training_client(BASE_MODEL, rank=16, seed=4).result()
    targets = [PROMPT[1], PROMPT[2], PROMPT[3], PROMPT[4], EOS[0]]
    inputs = {"target_tokens": targets, "weights": [0.0, 0.0, 0.0, 0.0, 1.0]}
    datum = types.Datum(model_input=types.ModelInput.from_ints(PROMPT), loss_fn_inputs=inputs)
    for _ in range(12):
        client.forward_backward([datum], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=2e-2)).result()
    taught = client.save_weights_and_get_sampling_client().result()
    (ended,) = draw(taught, temperature=0.0)
    assert list(ended.tokens) == [EOS[0]]
    assert ended.stop_reason == "stop"
    (endless,) = draw(taught, temperature=0.0, stop=[])
    assert endless.tokens[0] == EOS[0]
    assert len(endless.tokens) == 12
    assert endless.stop_reason == "length"


def test_without_max_tokens_a_row_runs_to_the_end_of_the_context(service):
    base = service.create_sampling_client(base_model=BASE_MODEL).result()
    (sequence,) = draw(base, list(range(3, 503)), max_tokens=None, stop=[])
    assert len(sequence.tokens) + 500 in (511, 512)
    assert sequence.stop_reason == "length"


def test_a_seed_gives_the_same_tokens_alone_and_among_eight_others(sampler, service):
    (alone,) = draw(sampler, seed=123)
    base = service.create_sampling_client(base_model=BASE_MODEL).result()
    others = [
        (base if i % 2 else sampler).sample(
            types.ModelInput.from_ints(list(range(20 + i, 40 + 3 * i))),
            1 + i % 3,
            types.SamplingParams(max_tokens=5 + 3 * i, seed=i, temperature=0.5 + i / 8, top_k=[-1, 40][i % 2]),
        )
        for i in range(8)
    ]
    (among,) = draw(sampler, seed=123)
    for other in others:
        other.result()
    assert among.tokens == alone.tokens
    np.testing.assert_allclose(among.logprobs, alone.logprobs, atol=1e-5)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_64_bit_seed_repeats_and_its_samples_differ(sampler, seed):
    first = draw(sampler, seed=seed, num_samples=4)
    assert [s.tokens for s in draw(sampler, seed=seed, num_samples=4)] == [s.tokens for s in first]
    assert len({tuple(s.tokens) for s in first}) == 4


def test_without_a_seed_samples_differ(sampler):
    assert draw(sampler, seed=None)[0].tokens != draw(sampler, seed=None)[0].tokens


def test_top_k_1_is_greedy(sampler):
    (greedy,) = draw(sampler, temperature=0.0)
    assert draw(sampler, top_k=1, seed=5)[0].tokens == greedy.tokens
    assert draw(sampler, top_p=1e-6, seed=6)[0].tokens == greedy.tokens
