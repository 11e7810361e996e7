"""A trainer on a golden model with its golden adapter, and what tests do with them."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np

from tests.support.golden_lora import Golden
from tx.layers.lora import Adapter
from tx.models.loading import LoadedModel, load_model
from tx.types import Datum, Finished, ForwardBackward, ForwardBackwardResult, LoraConfig, ModelState
from tx.worker.adapters import AdapterStore
from tx.worker.mesh import make_mesh
from tx.worker.trainer import Trainer

RANK = 3
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
