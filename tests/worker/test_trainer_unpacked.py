"""Trainer where rows hold one datum each, as on a GPU: tiny requests together, running out of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.models.loading import LoadedModel, load_model
from tx.types import Datum, ForwardBackward, LoraConfig
from tx.worker import trainer as module
from tx.worker.adapters import AdapterStore
from tx.worker.layerwise import Layerwise
from tx.worker.mesh import make_mesh
from tx.worker.packing import Piece, plan
from tx.worker.shapes import Shape
from tx.worker.trainer import Trainer


@pytest.fixture(scope="module")
def model(tiny_qwen3: Path) -> LoadedModel:
    return load_model(tiny_qwen3, make_mesh(), jnp.float32)


def unpacked(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """What the trainer is on a GPU, but for the kernel."""
    monkeypatch.setattr(
        module, "Layerwise", lambda model, *, chunk, packed: Layerwise(model, chunk=chunk, packed=False)
    )
    trainer = Trainer(model, AdapterStore(model, 4), micro_batch_tokens=64, max_context=64)
    trainer._limits = replace(trainer._limits, packed=False)
    return trainer


def data(seed: int, *lengths: int) -> tuple[Datum, ...]:
    rng = np.random.default_rng(seed)
    draw = lambda length: rng.integers(0, 2048, length).astype(np.int32)
    return tuple(
        Datum(draw(length), {"target_tokens": draw(length), "weights": np.ones(length, np.float32)})
        for length in lengths
    )


def run(trainer: Trainer, *requests: ForwardBackward) -> dict[int, list[np.ndarray]]:
    for job_id, request in enumerate(requests):
        trainer.submit(job_id, request)
    done = {}
    for _ in range(50):
        for finished in trainer.slice():
            assert finished.error is None
            done[finished.job_id] = finished.result.logprobs
    assert not trainer.has_work
    return done


def test_tiny_requests_of_several_datums_do_not_share_a_row(model: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    """Each datum's logprobs are those of running alone: nothing keeps two of them apart in a row."""
    trainer = unpacked(model, monkeypatch)
    for name in ("a", "b"):
        trainer._store.create(name, LoraConfig(2, 0))
    mine, yours = data(0, 9, 7), data(1, 5, 8)
    requests = [ForwardBackward(name, 0, d, "cross_entropy", {}, False) for name, d in (("a", mine), ("b", yours))]
    together = run(trainer, *requests)
    alone = [
        run(trainer, ForwardBackward("a", 0, (datum,), "cross_entropy", {}, True))[0][0] for datum in (*mine, *yours)
    ]
    for one, other in zip([*together[0], *together[1]], alone, strict=True):
        assert np.max(np.abs(one - other)) <= 1e-5


@pytest.mark.parametrize("packed", [True, False])
def test_a_datum_that_never_fits_fails_instead_of_going_round(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, packed: bool
):
    """A long datum, with shorter ones in its row: nothing makes the row shorter, so its jobs fail."""
    trainer = unpacked(model, monkeypatch)
    trainer._limits = replace(trainer._limits, packed=packed)
    trainer._store.create("a", LoraConfig(2, 0))

    def full(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(trainer, "_compute", full)
    trainer.submit(0, ForwardBackward("a", 0, data(0, 40, 10, 5), "cross_entropy", {}, False))
    finished = [done for _ in range(20) for done in trainer.slice()]
    assert [str(done.error) for done in finished] == ["RESOURCE_EXHAUSTED: out of memory"]
    assert not trainer.has_work


def test_layers_are_computed_twice_after_one_failure_on_any_mesh(model: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    """What was kept on each of two devices is too much from then on: half of it is the new limit."""
    trainer = unpacked(model, monkeypatch)
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 1})
    trainer._model = SimpleNamespace(config=model.config, dtype=model.dtype, mesh=mesh)
    shape = Shape(2, 32, 1)
    assert trainer._keeps(shape)
    (batch,) = plan([Piece(1, 32, 0, 0), Piece(1, 30, 0, 1)], trainer._limits)
    assert batch.shape == shape
    assert trainer._can_shrink(batch, False)
    assert not trainer._keeps(shape)
    assert trainer._keeps(Shape(2, 16, 1))
