"""Trainer: torch+PEFT's gradients for every loss, torch's AdamW, exact sums, isolation, a bounded set of programs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compilations import compilations
from tests.support.golden_lora import read_golden, relative_error
from tests.support.trainer_lab import CASES, RANK, Lab, arrays, true_rank
from tx.errors import InvalidInput, NotFound
from tx.types import AdamParams, Datum, LoraConfig
from tx.worker import datums
from tx.worker.losses import position_losses
from tx.worker.shapes import Shape


@pytest.fixture(scope="module")
def qwen_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(read_golden("lora_qwen3", tmp_path_factory.mktemp("lora") / "qwen3"))


def check_gradients(lab: Lab, case: str, tolerance: float = 1e-4) -> None:
    store, trainer = lab.trainer()
    lab.load(store)
    result = lab.run(trainer, lab.request(case))[0]
    assert result.metrics["loss:sum"] == pytest.approx(lab.golden.arrays[f"loss/{case}"].item(), rel=1e-5, abs=1e-4)
    grads = arrays(store.state("m").grads)
    wanted = lab.golden.group(f"grad/{case}")
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        inside, padding = true_rank(name, grad)
        assert relative_error(inside, wanted[name]) <= tolerance, name
        assert not padding.any(), f"{name}: padded columns must get exactly zero gradient"


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_torch_autograd_with_peft(lab: Lab, case: str):
    check_gradients(lab, case)


@pytest.mark.parametrize("case", ["cross_entropy", "ppo", "gspo"])
def test_gradients_equal_torch_autograd_with_peft_untied(qwen_lab: Lab, case: str):
    check_gradients(qwen_lab, case)


@pytest.mark.parametrize("name", ["lab", "qwen_lab"])
def test_logprobs_are_those_of_peft(name: str, request: pytest.FixtureRequest):
    lab: Lab = request.getfixturevalue(name)
    store, trainer = lab.trainer()
    lab.load(store)
    both = lab.run(trainer, lab.request(), lab.request(forward_only=True))
    for result in both:
        for index, (logprobs, tensors) in enumerate(zip(result.logprobs, lab.golden.data(), strict=True)):
            logits = lab.golden.arrays[f"logits/{index}"].astype(np.float64)
            table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            wanted = np.take_along_axis(table, tensors["target_tokens"][:, None], 1)[:, 0]
            assert logprobs.dtype == np.float32
            np.testing.assert_allclose(logprobs, wanted, atol=2e-5)
    assert both[0].metrics["loss:sum"] == pytest.approx(both[1].metrics["loss:sum"], rel=1e-6)
    assert both[0].metrics["num_tokens:sum"] == 24


def test_multi_target_logprobs_have_the_targets_shape(lab: Lab):
    store, trainer = lab.trainer()
    lab.load(store)
    result = lab.run(trainer, lab.request("cross_entropy_k"))[0]
    assert [lp.shape for lp in result.logprobs] == [(5, 3), (11, 3), (8, 3)]


def test_ten_adamw_steps_equal_torch(lab: Lab):
    """Weight decay, clipping that is active at first, and a learning rate that changes half way."""
    store, trainer = lab.trainer()
    lab.load(store)
    for step in range(10):
        result = lab.run(trainer, lab.request())[0]
        assert result.metrics["loss:sum"] == pytest.approx(float(lab.golden.arrays["adamw/losses"][step]), rel=1e-5)
        rate = 3e-3 if step < 5 else 1e-3
        params = AdamParams(rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, grad_clip_norm=15.0)
        metrics = trainer.optim_step("m", params)
        assert metrics["grad_norm:mean"] == pytest.approx(float(lab.golden.arrays["adamw/norms"][step]), rel=1e-4)
    exported = store.export("m")
    assert exported.step == 10
    for name, wanted in lab.golden.group("adamw/weights").items():
        assert np.abs(exported.weights[name] - wanted).max() <= 1e-5, name


def test_gradient_checkpointing_changes_nothing(lab: Lab):
    results = []
    for remat in (False, True):
        store, trainer = lab.trainer(gradient_checkpointing=remat)
        lab.load(store)
        lab.run(trainer, lab.request())
        results.append(arrays(store.state("m").grads))
    for name, grad in results[0].items():
        np.testing.assert_allclose(grad, results[1][name], rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_chunks_budget_or_row_cap(lab: Lab):
    """One request, three requests of a datum each, a tiny budget, one row at a time: the same sums."""
    whole = lab.request()
    chunks = [lab.request(data=(datum,)) for datum in reversed(whole.data)]
    reference: dict[str, np.ndarray] = {}
    for requests, options in (
        ([whole], {}),
        (chunks, {}),
        (chunks, {"tokens": 16}),
        ([whole], {"micro_batch_rows": 1}),
    ):
        store, trainer = lab.trainer(**options)
        lab.load(store)
        lab.run(trainer, *requests)
        grads = arrays(store.state("m").grads)
        reference = reference or grads
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, reference[name], rtol=1e-4, atol=2e-5)


def test_c03_a_step_leaves_every_other_adapter_as_it_was(lab: Lab):
    store, trainer = lab.trainer()
    lab.load(store, "a")
    store.create("b", LoraConfig(RANK, 7))
    lab.run(trainer, lab.request(model_id="b"))
    before = store.export("b")
    grads = arrays(store.state("b").grads)
    lab.run(trainer, lab.request(model_id="a"))
    trainer.optim_step("a", AdamParams(learning_rate=0.1, weight_decay=0.1))
    after = store.export("b")
    for name in before.weights:
        assert before.weights[name].tobytes() == after.weights[name].tobytes()
        assert before.mu[name].tobytes() == after.mu[name].tobytes()
    for name, grad in arrays(store.state("b").grads).items():
        assert grad.tobytes() == grads[name].tobytes()


def test_c04_a_new_model_inherits_nothing_from_a_dropped_one(lab: Lab):
    store, trainer = lab.trainer(max_resident=1)
    store.create("m", LoraConfig(RANK, 1))
    fresh = store.export("m")
    lab.run(trainer, lab.request())
    trainer.optim_step("m", AdamParams())
    lab.run(trainer, lab.request())  # gradients that nobody steps with
    trainer.submit(0, lab.request())  # and a job that nobody runs
    trainer.discard("m")
    store.drop("m")
    assert not trainer.has_work
    store.create("m", LoraConfig(RANK, 1))
    again = store.export("m")
    assert again.step == 0
    assert store.state("m").grads is None
    for name in fresh.weights:
        assert again.weights[name].tobytes() == fresh.weights[name].tobytes()
        assert not again.mu[name].any()
        assert not again.nu[name].any()


def test_c05_doubling_the_weights_doubles_loss_and_gradient(lab: Lab):
    outcomes = []
    for factor in (1, 2):
        data = tuple(
            Datum(datum.tokens, datum.inputs | {"weights": datum.inputs["weights"] * np.float32(factor)})
            for datum in lab.data("cross_entropy")
        )
        store, trainer = lab.trainer()
        lab.load(store)
        loss = lab.run(trainer, lab.request(data=data))[0].metrics["loss:sum"]
        outcomes.append((loss, arrays(store.state("m").grads)))
    assert outcomes[1][0] == pytest.approx(2 * outcomes[0][0], rel=1e-6)
    for name, grad in outcomes[0][1].items():
        np.testing.assert_allclose(outcomes[1][1][name], 2 * grad, rtol=1e-5)


def test_c05_a_built_in_loss_run_as_a_custom_one_gives_the_same_gradient(lab: Lab):
    """The SDK's forward_backward_custom: forward, d loss / d logprobs on the client, cross_entropy weighted by it."""
    store, trainer = lab.trainer()
    lab.load(store)
    request = lab.request("ppo")
    plain = [
        Datum(d.tokens, {"target_tokens": d.inputs["target_tokens"], "weights": 0 * d.inputs["logprobs"]})
        for d in request.data
    ]
    logprobs = lab.run(trainer, lab.request(data=tuple(plain), forward_only=True))[0].logprobs
    weighted = []
    for datum, lp in zip(request.data, logprobs, strict=True):
        shape = Shape(1, 16, 1)
        host = datums.lay_out([[datums.Given(datum, "ppo", request.loss_config)]], shape)
        batch = jax.tree.map(jnp.asarray, host.loss)
        padded = np.zeros((*batch.loss_id.shape, 1), np.float32)
        padded[0, : lp.size, 0] = lp
        derivative = jax.grad(lambda values, batch=batch: position_losses(values, batch).sum())(jnp.asarray(padded))
        weights = -np.asarray(derivative)[0, : lp.size, 0]
        weighted.append(Datum(datum.tokens, {"target_tokens": datum.inputs["target_tokens"], "weights": weights}))
    lab.run(trainer, lab.request(data=tuple(weighted)))
    for name, grad in arrays(store.state("m").grads).items():
        assert relative_error(true_rank(name, grad)[0], lab.golden.group("grad/ppo")[name]) <= 1e-4


def test_c06_everything_trainable_is_float32_on_a_bfloat16_model(lab: Lab):
    low = Lab(lab.golden, jnp.bfloat16)
    store, trainer = low.trainer()
    low.load(store)
    before = store.export("m")
    for _ in range(3):
        result = low.run(trainer, low.request())[0]
        state = store.state("m")
        assert {leaf.dtype for leaf in jax.tree.leaves((state.weights, state.mu, state.nu, state.grads))} == {
            np.dtype(np.float32)
        }
        assert all(lp.dtype == np.float32 for lp in result.logprobs)
        trainer.optim_step("m", AdamParams(learning_rate=1e-6, beta2=0.999))
    after = store.export("m")
    for name, weights in before.weights.items():
        moved = np.abs(after.weights[name] - weights)
        assert np.isfinite(after.weights[name]).all()
        # Three steps of 1e-6 on weights around 0.08: bfloat16 weights (steps of 5e-4) would not have moved at all.
        assert 0 < np.median(moved) < 1e-5, name


def test_c10_a_refused_request_changes_nothing(lab: Lab):
    store, trainer = lab.trainer()
    lab.load(store)
    datum = lab.data("cross_entropy")[0]
    bad = Datum(datum.tokens, datum.inputs | {"weights": datum.inputs["weights"] * np.nan})
    with pytest.raises(InvalidInput, match=r"data\[1\].loss_fn_inputs.weights: got nan at position 0"):
        trainer.submit(0, lab.request(data=(datum, bad)))
    with pytest.raises(NotFound, match="model_id"):
        trainer.submit(1, lab.request(model_id="nobody"))
    assert not trainer.has_work
    assert trainer.slice() == []
    assert store.state("m").grads is None


def test_models_take_turns_and_parked_models_come_back(lab: Lab):
    """Three models, room for two: a model with one micro-batch never waits for all of another's many."""
    store, trainer = lab.trainer(max_resident=2, tokens=16)
    for seed, model_id in enumerate("abc"):
        store.create(model_id, LoraConfig(RANK, seed))
    for job_id, model_id in enumerate("abc"):
        data = lab.data("cross_entropy")
        trainer.submit(job_id, lab.request(model_id=model_id, data=data * 3 if model_id == "a" else data[:1]))
    order = []
    while trainer.has_work:
        order += [finished.job_id for finished in trainer.slice()]
    assert order == [1, 2, 0]
    with pytest.raises(InvalidInput, match="learning_rate"):
        trainer.optim_step("a", AdamParams(learning_rate=-1.0))
    assert all(trainer.optim_step(model_id, AdamParams())["grad_norm:mean"] > 0 for model_id in "abc")


def test_a_step_without_gradients_decays_moments_and_weights(lab: Lab):
    store, trainer = lab.trainer()
    lab.load(store)
    lab.run(trainer, lab.request())
    trainer.optim_step("m", AdamParams(learning_rate=0.0))
    before = store.export("m")
    metrics = trainer.optim_step("m", AdamParams(learning_rate=0.01, weight_decay=0.5, beta1=0.9, eps=1e9))
    after = store.export("m")
    assert metrics["grad_norm:mean"] == 0.0
    assert after.step == 2
    for name, weights in before.weights.items():  # eps is so large that only the decay is left
        np.testing.assert_allclose(after.weights[name], weights * 0.995, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(after.mu[name], before.mu[name] * 0.9, rtol=1e-6)


def test_losses_configs_and_learning_rates_compile_nothing(lab: Lab):
    store, trainer = lab.trainer()
    lab.load(store)
    lab.run(trainer, lab.request("ppo"), lab.request("ppo", forward_only=True))
    lab.run(trainer, lab.request())
    trainer.optim_step("m", AdamParams())
    with compilations() as compiled:
        for index, case in enumerate(("cispo", "dro", "gspo", "stable_reinforce", "importance_sampling")):
            config = {key: value * 1.01 for key, value in CASES[case][1].items()}
            lab.run(trainer, lab.request(case, loss_config=config), lab.request(case, forward_only=True))
            trainer.optim_step("m", AdamParams(1e-4 * index, weight_decay=0.01 * index, grad_clip_norm=index))
    assert not set(compiled) - {"jit(_sequence_ratios)"}  # of gspo, small, and compiled by its first request


def test_optim_step_refuses_to_overtake(lab: Lab):
    store, trainer = lab.trainer()
    lab.load(store)
    trainer.submit(0, lab.request())
    with pytest.raises(RuntimeError, match="still running"):
        trainer.optim_step("m", AdamParams())
    trainer.discard("m")


def test_save_and_restore_continue_exactly(lab: Lab, tmp_path: Path):
    """Three steps, export, restore under another name, two more steps: the same losses as five in a row."""
    params = AdamParams(learning_rate=3e-3)
    store, trainer = lab.trainer()
    lab.load(store)

    def steps(model_id: str, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append(lab.run(trainer, lab.request(model_id=model_id))[0].metrics["loss:sum"])
            trainer.optim_step(model_id, params)
        return losses

    steps("m", 3)
    saved = store.export("m")
    copies = {name: array.copy() for name, array in saved.weights.items()}
    straight = steps("m", 2)
    store.restore("n", saved, with_optimizer=True)
    assert steps("n", 2) == straight
    assert all(saved.weights[name].tobytes() == copy.tobytes() for name, copy in copies.items())
    store.restore("n", saved, with_optimizer=False)
    assert steps("n", 2) != straight
