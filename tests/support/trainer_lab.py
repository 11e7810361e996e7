"""A trainer on a golden model with its golden adapter, and what tests do with them."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.golden_lora import Golden
from tx.layers.lora import Adapter
from tx.models.loading import LoadedModel, load_model
from tx.types import Datum, Finished, ForwardBackward, ForwardBackwardResult, LoraConfig, ModelState
from tx.worker.adapters import AdapterStore
from tx.worker.mesh import make_mesh
from tx.worker.trainer import Trainer

RANK = 3
VOCAB = 96
RELATIVE = 1e-5
RANKS = {"a": 1, "b": 3, "c": 8, "d": 5}
CASES = {  # the golden's case: (loss_fn, config, inputs of the datum)
    "cross_entropy": ("cross_entropy", {}, ("weights",)),
    "cross_entropy_k": ("cross_entropy", {}, ()),
    "importance_sampling": ("importance_sampling", {}, ("logprobs", "advantages")),
    "ppo": ("ppo", {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}, ("logprobs", "advantages")),
    "ppo_per_token": ("ppo", {}, ("logprobs", "advantages", "clip_low_threshold", "clip_high_threshold")),
    "cispo": ("cispo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.3}, ("logprobs", "advantages")),
    "dro": ("dro", {"beta": 0.3}, ("logprobs", "advantages")),
    "gspo": ("gspo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, ("logprobs", "advantages", "mask")),
    "stable_reinforce": (
        "stable_reinforce",
        {"kl_coeff": 0.1, "ratio_cap": 1.2},
        ("logprobs", "advantages", "mask"),
    ),
}


class Lab:
    """A base model with one golden adapter, and what tests do with it."""

    def __init__(self, golden: Golden, dtype: jnp.dtype = jnp.float32) -> None:
        self.golden = golden
        self.model: LoadedModel = load_model(golden.folder, make_mesh(), dtype)
        self.ids = itertools.count()

    def trainer(self, *, max_resident: int = 4, tokens: int = 64, **options) -> tuple[AdapterStore, Trainer]:
        store = AdapterStore(self.model, max_resident)
        return store, Trainer(self.model, store, micro_batch_tokens=tokens, max_context=64, **options)

    def load(self, store: AdapterStore, model_id: str = "m") -> None:
        store.restore(model_id, ModelState(LoraConfig(RANK, 0), self.golden.group("adapter")), with_optimizer=False)

    def data(self, case: str) -> tuple[Datum, ...]:
        loss_fn, _, names = CASES[case]
        renamed = {"mask": "sequence_ratio_mask" if loss_fn == "gspo" else "recorded_mask"}
        data = []
        for tensors in self.golden.data():
            inputs = {renamed.get(name, name): tensors[name] for name in names}
            inputs["target_tokens"] = tensors["targets_k" if case.endswith("_k") else "target_tokens"]
            if case.endswith("_k"):
                inputs["weights"] = tensors["weights_k"]
            data.append(Datum(tensors["tokens"].astype(np.int32), inputs))
        return tuple(data)

    def request(self, case: str = "cross_entropy", model_id: str = "m", **changes) -> ForwardBackward:
        loss_fn, config, _ = CASES[case]
        fields = {"data": self.data(case), "loss_fn": loss_fn, "loss_config": config, "forward_only": False}
        return ForwardBackward(model_id=model_id, seq_id=next(self.ids), **(fields | changes))

    def run(self, trainer: Trainer, *requests: ForwardBackward) -> list[ForwardBackwardResult]:
        """Submit all, run until done, results in the order submitted; a failed job raises."""
        finished = self.finish(trainer, *requests)
        for outcome in finished.values():
            if outcome.error is not None:
                raise outcome.error
        return [finished[index].result for index in range(len(requests))]

    def finish(self, trainer: Trainer, *requests: ForwardBackward) -> dict[int, Finished]:
        for index, request in enumerate(requests):
            trainer.submit(index, request)
        finished: dict[int, Finished] = {}
        while trainer.has_work:
            finished |= {outcome.job_id: outcome for outcome in trainer.slice()}
        return finished


def arrays(adapter: Adapter | None) -> dict[str, np.ndarray]:
    """An adapter by site names, padding included."""
    assert adapter is not None
    sites = {f"layers.{i}.{key}": site for i, layer in enumerate(adapter.layers) for key, site in layer.items()}
    if adapter.unembed is not None:
        sites["unembed"] = adapter.unembed
    return {f"{name}.lora_{side.upper()}": np.asarray(getattr(w, side)) for name, w in sites.items() for side in "ab"}


def true_rank(name: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what belongs to the true rank, the padding) of a dense site's array."""
    axis = 1 if name.endswith("A") else 0
    return np.split(array, [RANK], axis=axis)[0], np.split(array, [RANK], axis=axis)[1]


# ---- models of several ranks, random requests, and comparisons ------------------------------------------------------


def random_request(model_id: str, loss_fn: str, lengths: list[int], seed: int, forward_only=False) -> ForwardBackward:
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        weights = rng.uniform(0, 1, length).astype(np.float32)
        weights[: length // 3] = 0
        sampled = {
            "logprobs": rng.normal(-5, 0.3, length).astype(np.float32),
            "advantages": rng.normal(0, 1, length).astype(np.float32),
        }
        if loss_fn == "gspo":
            sampled["sequence_ratio_mask"] = (np.arange(length) > 1).astype(np.float32)
        inputs = {"weights": weights} if loss_fn == "cross_entropy" else sampled
        targets = rng.integers(0, VOCAB, length)
        data.append(Datum(rng.integers(0, VOCAB, length).astype(np.int32), inputs | {"target_tokens": targets}))
    return ForwardBackward(model_id, 0, tuple(data), loss_fn, {}, forward_only)


def one_by_one(request: ForwardBackward) -> list[ForwardBackward]:
    return [
        ForwardBackward(request.model_id, 0, (datum,), request.loss_fn, {}, request.forward_only)
        for datum in request.data
    ]


def several_models(lab: Lab, **options) -> tuple[AdapterStore, Trainer]:
    """Models of several ranks whose B's are not zero, so that every A has a gradient too."""
    store, trainer = lab.trainer(max_resident=8, **options)
    for seed, (model_id, rank) in enumerate(RANKS.items()):
        store.create(model_id, LoraConfig(rank, seed))
        start = store.export(model_id)
        rng = np.random.default_rng(seed)
        for name, array in start.weights.items():
            start.weights[name] = array + rng.normal(0, 0.02, array.shape).astype(np.float32)
        store.restore(model_id, start, with_optimizer=False)
    return store, trainer


def gradients_of(store: AdapterStore) -> dict[str, dict[str, np.ndarray]]:
    return {model_id: arrays(store.state(model_id).grads) for model_id in RANKS if store.state(model_id).grads}


def check_equal(
    found: dict[str, dict[str, np.ndarray]], wanted: dict[str, dict[str, np.ndarray]], relative: float = RELATIVE
) -> None:
    assert found.keys() == wanted.keys()
    for model_id, sites in wanted.items():
        for name, grad in sites.items():
            scale = np.abs(grad).max()
            assert scale > 0, f"{model_id} {name}: a gradient of zero proves nothing"
            assert np.abs(found[model_id][name] - grad).max() <= relative * scale, f"{model_id} {name}"


def same_results(found: list[ForwardBackwardResult], wanted: list[ForwardBackwardResult]) -> None:
    """``wanted`` has a result per datum."""
    logprobs = [lp for result in found for lp in result.logprobs]
    for lp, alone in zip(logprobs, wanted, strict=True):
        np.testing.assert_allclose(lp, alone.logprobs[0], atol=2e-5)
    loss = sum(result.metrics["loss:sum"] for result in wanted)
    assert sum(result.metrics["loss:sum"] for result in found) == pytest.approx(loss, rel=RELATIVE)
