"""What training means, through the real SDK: sums, chunks, accumulation, order, refusals by name."""

import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.test_two_tenants import example
from tests.support.server import BASE_MODEL

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning")


def client(service: tinker.ServiceClient, seed: int = 0, rank: int = 4, **layers: bool) -> tinker.TrainingClient:
    return service.create_lora_training_client(BASE_MODEL, rank=rank, seed=seed, **layers).result()


def weighted(datum: types.Datum, factor: float) -> types.Datum:
    weights = np.asarray(datum.loss_fn_inputs["weights"].data, np.float32) * np.float32(factor)
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": weights}
    return types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


def step(training: tinker.TrainingClient, data: list[types.Datum], loss: str = "cross_entropy", **adam: float) -> float:
    """One forward_backward and one step; the gradient's norm."""
    training.forward_backward(data, loss).result()
    return training.optim_step(types.AdamParams(**({"learning_rate": 1e-2} | adam))).result().metrics["grad_norm:mean"]


def test_losses_are_sums(service):
    training, data = client(service), [example(1, 10), example(2, 25)]
    parts = [training.forward([datum], "cross_entropy").result().metrics["loss:sum"] for datum in data]
    both = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    twice = training.forward([weighted(datum, 2.0) for datum in data], "cross_entropy").result().metrics["loss:sum"]
    np.testing.assert_allclose(both, sum(parts), rtol=1e-5)
    np.testing.assert_allclose(twice, 2 * both, rtol=1e-5)


def test_doubled_weights_double_the_gradient(service):
    data = [example(1, 10), example(2, 25)]
    one, two = (step(client(service), [weighted(datum, factor) for datum in data]) for factor in (1.0, 2.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-4)


def test_gradients_add_up_until_the_step(service):
    data = [example(i, 12) for i in range(4)]
    together = step(client(service), data)
    split = client(service)
    for datum in data[:3]:
        split.forward_backward([datum], "cross_entropy").result()
    np.testing.assert_allclose(step(split, data[3:]), together, rtol=1e-4)


def test_a_batch_that_the_sdk_cuts_into_chunks_is_one_batch(service):
    """More than 1024 data travel as several requests, the first one last."""
    data = [example(i, 3) for i in range(1500)]
    training = client(service)
    result = training.forward_backward(data, "cross_entropy").result()
    assert len(result.loss_fn_outputs) == 1500
    norm = training.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics["grad_norm:mean"]
    for index in (0, 1023, 1024, 1499):
        alone = client(service).forward([data[index]], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
        np.testing.assert_allclose(result.loss_fn_outputs[index]["logprobs"].data, alone, atol=1e-4)
    small = client(service)
    for start in range(0, 1500, 500):
        small.forward_backward(data[start : start + 500], "cross_entropy").result()
    again = small.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics["grad_norm:mean"]
    np.testing.assert_allclose(again, norm, rtol=1e-4)


def test_pipelined_calls_run_in_the_order_of_submission(service):
    data = [example(3, 20)]
    slow, pipelined = client(service), client(service)
    expected = []
    for _ in range(3):
        expected.append(slow.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
        slow.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    futures = []
    for _ in range(3):
        futures.append(pipelined.forward_backward(data, "cross_entropy"))
        pipelined.optim_step(types.AdamParams(learning_rate=1e-2))
    assert [future.result().metrics["loss:sum"] for future in futures] == expected


def test_several_targets_per_position(service):
    ids = np.random.default_rng(0).integers(3, 2000, (9, 5))
    weights = np.random.default_rng(1).random((9, 5)).astype(np.float32)
    prompt = types.ModelInput.from_ints(list(range(5, 14)))
    training = client(service)

    def logprobs(targets: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, float]:
        datum = types.Datum(model_input=prompt, loss_fn_inputs={"target_tokens": targets, "weights": given})
        result = training.forward([datum], "cross_entropy").result()
        return np.asarray(result.loss_fn_outputs[0]["logprobs"].to_numpy()), result.metrics["loss:sum"]

    both, loss = logprobs(ids, weights)
    assert both.shape == (9, 5)
    for column in range(5):
        one, _ = logprobs(ids[:, column].copy(), weights[:, column].copy())
        np.testing.assert_allclose(both[:, column], one, atol=1e-5)
    np.testing.assert_allclose(loss, -(weights * both).sum(), rtol=1e-5)


def test_layers_that_are_switched_off_do_not_train(service):
    data = [example(3, 20)]
    norms = {
        name: step(client(service, **{f"train_{other}": other == name for other in ("attn", "mlp", "unembed")}), data)
        for name in ("attn", "mlp", "unembed")
    }
    everything = step(client(service), data)
    np.testing.assert_allclose(sum(norm**2 for norm in norms.values()), everything**2, rtol=1e-3)


def test_weights_may_be_negative(service):
    training, data = client(service), [weighted(example(3, 20), -1.0)]
    before = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    step(training, data, learning_rate=1e-3)
    assert training.forward(data, "cross_entropy").result().metrics["loss:sum"] < before < 0


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"])
def test_a_policy_step_raises_what_was_rewarded(service, loss):
    """On-policy, one step: log-probabilities of a rewarded reply go up, those of a punished one go down."""
    training = client(service, rank=8)
    sampler = training.save_weights_and_get_sampling_client(record_stability_info=loss == "stable_reinforce").result()
    prompt = [21, 22, 23, 24]
    params = types.SamplingParams(max_tokens=8, seed=3, stop=[])
    good, bad = sampler.sample(types.ModelInput.from_ints(prompt), 2, params).result().sequences
    data = [policy_datum(loss, prompt, reply, sign) for reply, sign in ((good, 1.0), (bad, -1.0))]
    before = [sampled_logprob(output) for output in training.forward_backward(data, loss).result().loss_fn_outputs]
    np.testing.assert_allclose(before[0], sum(good.logprobs), atol=1e-3)
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    outputs = training.forward(data, loss).result().loss_fn_outputs
    assert sampled_logprob(outputs[0]) > before[0] + 1e-3
    assert sampled_logprob(outputs[1]) < before[1] - 1e-3


def sampled_logprob(output: dict) -> float:
    return float(np.sum(output["logprobs"].data[3:]))


def policy_datum(loss: str, prompt: list[int], reply: types.SampledSequence, advantage: float) -> types.Datum:
    tokens, before, count = prompt + list(reply.tokens), len(prompt) - 1, len(reply.tokens)
    inputs = {
        "target_tokens": tokens[1:],
        "logprobs": [0.0] * before + list(reply.logprobs),
        "advantages": [0.0] * before + [advantage] * count,
    }
    if loss == "gspo":
        inputs["sequence_ratio_mask"] = [0.0] * before + [1.0] * count
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    if loss != "stable_reinforce":
        return datum
    name = reply.sequence_id
    prompt_span, sampled_span = types.PromptProvenanceSpan, types.SampledProvenanceSpan
    return datum.with_provenance(
        model_input=[
            prompt_span(sequence_id=name, length=len(prompt)),
            sampled_span(sequence_id=name, length=count - 1),
        ],
        loss_fn_inputs=[
            prompt_span(sequence_id=name, offset=1, length=before),
            sampled_span(sequence_id=name, length=count),
        ],
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda t: t.forward_backward([example(1, 5)], "hinge"), "loss_fn"),
        (lambda t: t.forward_backward([example(1, 5)], "cross_entropy", {"margin": 1.0}), "margin"),
        (lambda t: t.forward_backward([example(1, 600)], "cross_entropy"), "model_input"),
        (lambda t: t.save_state("a", ttl_seconds=5), "ttl_seconds"),
        (lambda t: t.load_state("tinker://nobody:train:0/weights/none"), "path"),
    ],
)
def test_the_sdk_shows_which_field_was_wrong(service, call, named):
    training = client(service)
    with pytest.raises(tinker.TinkerError, match=named):
        call(training).result()
    assert step(training, [example(1, 5)]) > 0  # and the client goes on


def test_a_rank_above_the_maximum_is_refused_by_name(service):
    with pytest.raises(tinker.TinkerError, match=r"rank.*16"):
        client(service, rank=64)


def test_an_unknown_base_model_is_refused_by_name(service):
    with pytest.raises(tinker.TinkerError, match="base_model"):
        service.create_lora_training_client("meta/none", rank=4).result()
