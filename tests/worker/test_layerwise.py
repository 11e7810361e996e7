"""Layer by layer against one differentiated model, each datum in its own row; what is kept, donated, moved."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from tests.golden import tiny_specs as specs
from tests.support import golden_models as run
from tests.support.jaxprs import count
from tx.layers.attention import Attention
from tx.layers.blockwise import SHORT
from tx.layers.lora import Adapter
from tx.models.loading import LoadedModel, load_model
from tx.types import Datum
from tx.worker import memory
from tx.worker.datums import Given, HostBatch, lay_out
from tx.worker.layerwise import Layerwise, Trained
from tx.worker.mesh import make_mesh
from tx.worker.shapes import Shape

ROWS = ((9, 5), (12,))
"""Lengths of the datums of each row; a third row is padding."""

SHAPE = Shape(3, 16, 1)


@pytest.fixture(scope="module", params=["qwen3_bias", "qwen3_moe"])
def model(request, tmp_path_factory) -> LoadedModel:
    return run.load(tmp_path_factory.mktemp("layerwise"), request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> LoadedModel:
    return run.load(tmp_path_factory.mktemp("layerwise"), "smollm2_shaped")


def datums() -> list[list[Datum]]:
    rng = np.random.default_rng(0)

    def datum(length: int) -> Datum:
        weights = rng.normal(size=length).astype(np.float32)
        weights[0] = 0
        inputs = {"target_tokens": rng.integers(0, specs.VOCAB, length), "weights": weights}
        return Datum(rng.integers(0, specs.VOCAB, length).astype(np.int32), inputs)

    return [[datum(length) for length in lengths] for lengths in ROWS]


def host() -> HostBatch:
    return lay_out([[Given(datum, "cross_entropy", {}) for datum in row] for row in datums()], SHAPE)


def trained(*adapters: Adapter) -> Trained:
    scalings = specs.SCALING * np.arange(1, len(adapters) + 1, dtype=np.float32)
    gate = np.repeat(scalings[:, None], specs.RANK, axis=1)
    return Trained(adapters, gate, np.full((1, specs.EXPERT_RANK), specs.EXPERT_SCALING, np.float32))


def filled(adapter: Adapter, value: float) -> Adapter:
    return jax.tree.map(lambda x: jnp.full_like(x, value), adapter)


def reference(
    model: LoadedModel, adapter: Adapter, parts: list[Datum], scaling: float
) -> tuple[list[np.ndarray], Adapter]:
    """Each datum's logprobs, and the gradient of the sum of losses: a row per datum, all logits, differentiated."""
    padded = lambda arrays: jnp.asarray(np.stack([np.pad(array, (0, 16 - len(array))) for array in arrays]))
    tokens = padded([datum.tokens for datum in parts])
    targets, weights = (padded([datum.inputs[name] for datum in parts]) for name in ("target_tokens", "weights"))

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def total(adapter, weights_of_model):
        whole = nnx.merge(model.graphdef, weights_of_model)
        view = run.single_view(adapter, scaling, specs.EXPERT_SCALING, specs.RANK, specs.EXPERT_RANK)
        hidden, _ = whole.hidden_states(tokens, run.positions(tokens), adapter=view)
        logits = hidden @ whole.unembed_kernel() + scaling * (hidden @ adapter.unembed.a) @ adapter.unembed.b
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(weights * found), found

    gradient, found = total(adapter, model.weights)
    return [np.asarray(row)[: datum.tokens.size] for row, datum in zip(found, parts, strict=True)], gradient


def compare(mine: Adapter, theirs: Adapter, tolerance: float) -> None:
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert np.max(np.abs(one - other)) <= tolerance * max(1.0, float(np.max(np.abs(other))))


def test_forward_backward(model: LoadedModel):
    """Kept or computed again: the gradients of every datum alone added up, on top of what the accumulators had."""
    adapter, rows = run.seeded_adapter(model), datums()
    layerwise = Layerwise(model, chunk=8, packed=True)
    found = [
        layerwise.forward_backward(trained(adapter), (filled(adapter, 1.0),), host(), kept_layers=kept)
        for kept in range(model.config.num_layers, -1, -1)
    ]
    for other in found[1:]:
        compare(found[0].gradients[0], other.gradients[0], 1e-6)
    alone, total = reference(model, adapter, [datum for row in rows for datum in row], specs.SCALING)
    outputs = found[0]
    assert outputs.finite
    compare(outputs.gradients[0], jax.tree.map(lambda x: x + 1.0, total), 3e-5)
    for row, parts in enumerate((alone[:2], alone[2:])):
        logprobs = np.concatenate(parts)
        weights = np.concatenate([datum.inputs["weights"] for datum in rows[row]])
        assert np.max(np.abs(outputs.logprobs[row, : len(logprobs), 0] - logprobs)) <= 1e-4
        assert np.max(np.abs(outputs.losses[row, : len(logprobs)] + weights * logprobs)) <= 3e-4
    assert not outputs.losses[2].any()
    forward = layerwise.forward(trained(adapter), host())
    assert np.max(np.abs(forward.logprobs - outputs.logprobs)[np.asarray(host().loss.loss_id) >= 0]) <= 1e-5
    assert np.max(np.abs(forward.losses - outputs.losses)) <= 1e-5
    assert forward.gradients == ()


def test_several_adapters_are_a_row_each(dense: LoadedModel):
    """Each row's logprobs and gradients are those of its own adapter and scaling; padding's adapter gets none."""
    first = run.seeded_adapter(dense)
    adapters = [first, jax.tree.map(lambda x: x * 0.7, first), jax.tree.map(lambda x: -x, first)]
    layerwise = Layerwise(dense, chunk=8, packed=True)
    sums = tuple(filled(each, 0.0) for each in adapters)
    outputs = layerwise.forward_backward(trained(*adapters), sums, host(), kept_layers=2)
    for row, parts in enumerate(datums()):
        alone, total = reference(dense, adapters[row], parts, specs.SCALING * (row + 1))
        logprobs = np.concatenate(alone)
        assert np.max(np.abs(outputs.logprobs[row, : len(logprobs), 0] - logprobs)) <= 2e-4
        compare(outputs.gradients[row], total, 5e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(outputs.gradients[2]))


def test_accumulators_are_consumed_and_weights_are_not(dense: LoadedModel):
    adapter, layerwise = run.seeded_adapter(dense), Layerwise(dense, chunk=8, packed=True)
    sums = filled(adapter, 0.0)
    layerwise.forward_backward(trained(adapter), (sums,), host(), kept_layers=2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(sums))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((adapter, dense.weights)))


def a_layer(model: LoadedModel, seq: int, layer: int = 0) -> tuple[Any, tuple[Any, ...]]:
    """A layer's programs, and what its forward ones take: rows of one datum each."""
    adapter = run.seeded_adapter(model)
    programs, weights = Layerwise(model, chunk=8, packed=True)._layers[layer]
    x = jnp.ones((SHAPE.rows, seq, model.config.hidden_size), jax.tree.leaves(model.weights)[0].dtype)
    positions = jnp.zeros((SHAPE.rows, seq), jnp.int32)
    rope = nnx.merge(model.graphdef, model.weights).embed(positions, positions)[1]
    gates = (jnp.asarray(gate) for gate in (trained(adapter).gate, np.ones((1, 2))))
    return programs, (weights, (adapter.layers[layer],), x, rope, positions, None, *gates)


@pytest.mark.parametrize("seq", [SHAPE.length, 640])
def test_between_the_passes_live_the_kept_values_alone(dense: LoadedModel, seq: int):
    """No copies of weights, adapters or the layer's input, which are there anyway: what ``memory`` counts."""
    config, kept = dense.config, []
    for layer in range(config.num_layers):
        programs, given = a_layer(dense, seq, layer)
        kept.append(programs.keep(*given)[1])
    entering = config.num_layers * config.hidden_size * 4  # a layer's input, which the caller has
    statistics = 0 if seq > SHORT else config.num_layers * config.num_heads * 4  # counted, but only long rows have them
    wanted = SHAPE.rows * seq * (memory.kept_bytes_per_token(config, np.float32) - entering - statistics)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) == wanted


def test_no_attention_is_computed_twice_where_activations_are_kept(dense: LoadedModel):
    """Of a long row the forward program has one loop over blocks of queries, and so has the backward one."""
    programs, given = a_layer(dense, 640)
    y, kept = jax.eval_shape(programs.keep, *given)
    assert count(programs.keep, "scan", *given) == 1
    assert count(programs.backward, "scan", given, kept, y, None, True) == 1
    assert count(programs.backward_again, "scan", given, y, None, True) == 2


def test_nor_on_a_gpu(tmp_path: Path, monkeypatch):
    """Lowered for CUDA: which of cuDNN's two kernels each program calls, and how often."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda number: number == "9.0")
    monkeypatch.setattr(Attention, "_on_gpu", True)
    model = load_model(specs.write_model(tmp_path, "qwen3_bias"), make_mesh(), jnp.bfloat16)
    programs, given = a_layer(model, 128)
    y, kept = jax.eval_shape(programs.keep, *given)

    def kernels(program, *inputs) -> list[str]:
        text = program.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"@__cudnn\$fmhaSoftmax(Backward)?\(", text)

    forward, backward = "", "Backward"
    assert kernels(programs.forward, *given) == [forward]
    assert kernels(programs.keep, *given) == [forward]
    assert kernels(programs.backward, given, kept, y, None, True) == [backward]
    assert kernels(programs.backward_again, given, y, None, True) == [forward, backward]


@pytest.mark.parametrize("where", ["a layer", "the head"])
def test_gradients_that_are_not_finite_are_told(dense: LoadedModel, where: str):
    adapter, layerwise = run.seeded_adapter(dense), Layerwise(dense, chunk=8, packed=True)
    sums, broken = filled(adapter, 0.0), lambda pair: jax.tree.map(lambda x: x * jnp.nan, pair)
    if where == "a layer":
        sums.layers[0]["o_proj"] = broken(sums.layers[0]["o_proj"])
    else:
        sums = Adapter(sums.layers, broken(sums.unembed))
    assert not layerwise.forward_backward(trained(adapter), (sums,), host(), kept_layers=2).finite


# ---- on a mesh ------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from benchmarks import hlo_collectives
from tests.golden import tiny_specs as specs
from tests.support import golden_models as run
from tests.worker import test_layerwise as own
from tx.models.loading import load_model
from tx.worker.layerwise import Layerwise
from tx.worker.mesh import make_mesh

folder, found = specs.write_model(Path(sys.argv[1]), "qwen3_bias", num_attention_heads=8), []
for sizes in ({}, {"tp": 8}):
    model = load_model(folder, make_mesh(**sizes), jnp.float32)
    adapter, layerwise = run.seeded_adapter(model), Layerwise(model, chunk=6, packed=True)
    trained, sums = own.trained(adapter), own.filled(adapter, 0.0)
    x = jnp.zeros((own.SHAPE.rows, own.SHAPE.length, model.config.hidden_size))
    batch = layerwise._to_device(own.host())
    gradient = (model.weights, (adapter.unembed,), (sums.unembed,), x, trained.gate, batch)
    score = (model.weights, (adapter.unembed,), x, trained.gate, batch.targets)
    programs = ((layerwise._ends.gradient, gradient), (layerwise._ends.score, score))
    texts = [program.lower(*given).compile().as_text() for program, given in programs]
    moved = [(one.kind, one.payload) for text in texts for one in hlo_collectives.collectives(text)]
    places = jax.tree.map(lambda x: x.sharding, sums)
    outputs = layerwise.forward_backward(trained, (sums,), own.host(), kept_layers=2)
    same = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), outputs.gradients[0], places)
    found.append((jax.device_get((outputs.logprobs, outputs.losses, outputs.gradients)), moved, jax.tree.all(same)))
one, many = found
error = lambda a, b: float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
print(json.dumps({
    "errors": max(map(error, jax.tree.leaves(many[0]), jax.tree.leaves(one[0]))),
    "gathered": max((size for kind, size in many[1] if kind in ("all-gather", "all-to-all")), default=0),
    "collectives": len(many[1]),
    "alone": len(one[1]),
    "in_place": many[2],
}))
"""


def test_a_head_cut_over_its_vocabulary(tmp_path: Path):
    """On 8 devices: the same numbers, no piece's logits on one device, accumulators where they were."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] <= 1e-4
    assert found["alone"] == 0
    assert found["collectives"] > 0
    assert found["gathered"] < 4 * 6 * specs.VOCAB, "a piece of 6 positions has all of its logits on one device"
    assert found["in_place"]
