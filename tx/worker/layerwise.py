"""A training micro-batch as a chain of compiled programs: embedding, each layer forward, head, each layer backward.

Layers of one kind share their programs, so compiling costs one layer forward, one backward, and the head, however deep
the model is (SmolLM2's first step: 5 programs of about a second, where the whole as one program takes 12 s). Nothing
is lost against one program: between layers only the residual stream passes, and the host is a few layers ahead of the
device. Between the two passes of a layer lives what ``tx.layers.lora.KEPT`` names, or only its input: then it is
computed again. Weights are arguments, never constants, and get no gradient; a layer's gradients are added to donated
accumulators the moment they are known.

One adapter's rows are plain products. Several adapters are one row each (``tx.layers.lora``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from tx.layers.attention import Packed, keeps_cudnn
from tx.layers.logprobs import loss_and_gradient, target_logprobs
from tx.layers.lora import KEPT, Adapter, LoraSite, LoraWeights, adapter_sharding, all_finite
from tx.layers.sharding import sharding
from tx.layers.stack import LayerLora
from tx.models.loading import LoadedModel
from tx.worker.ahead import Call, Value, directly
from tx.worker.datums import HostBatch
from tx.worker.losses import LossBatch, position_losses, with_sequence_ratios

Sites = dict[str, LoraWeights]


@dataclass(frozen=True)
class Trained:
    """Who a micro-batch trains: one adapter, or one per row (dense sites only), all of the same padded ranks.

    gate: float32 [adapters, rank], full of each one's scaling; expert_gate likewise. No adapters: the base model.
    """

    adapters: tuple[Adapter, ...]
    gate: np.ndarray | None
    expert_gate: np.ndarray | None


@dataclass(frozen=True)
class Outputs:
    """On the device: logprobs [row seq k], losses [row seq]; gradients per adapter, and whether all are finite."""

    logprobs: Float[Value, "row seq k"]
    losses: Float[Value, "row seq"]
    gradients: tuple[Adapter, ...] = ()
    finite: Bool[Value, ""] | bool = True


class Layerwise:
    """The programs of one loaded model.

    Args:
        chunk: positions that go through the head at a time.
        packed: whether rows hold several datums, so that attention must keep them apart.
    """

    def __init__(self, model: LoadedModel, *, chunk: int, packed: bool) -> None:
        self._model = model
        self._packed = packed
        self._ends = _ends(model.graphdef, chunk)
        whole = nnx.merge(model.graphdef, model.weights)
        by_layer: list[dict[str, LoraSite]] = [{} for _ in whole.layers]
        for site in whole.lora_sites():
            if site.layer is not None:
                by_layer[site.layer][site.key] = site
        self._layers: list[tuple[_LayerPrograms, Any]] = []
        for layer, sites in zip(whole.layers, by_layer, strict=True):
            graphdef, weights = nnx.split(layer)
            axes = tuple((key, site.in_axis, site.out_axis, site.num_experts) for key, site in sorted(sites.items()))
            self._layers.append((_layer_programs(graphdef, model.mesh, axes), weights))

    def forward(self, trained: Trained, host: HostBatch, *, call: Call = directly) -> Outputs:
        """Logprobs and losses."""
        batch = self._to_device(host)
        x, rope = call(self._ends.embed, self._model.weights, batch.tokens, batch.positions)
        rest = (rope, batch.positions, self._place(batch), trained.gate, trained.expert_gate)
        for index, (programs, weights) in enumerate(self._layers):
            x = call(programs.forward, weights, _sites(trained, index), x, *rest)
        logprobs = self._score(trained, x, batch, call)
        loss = _with_sequence_ratios(logprobs, batch.loss) if host.has_sequence_ratios else batch.loss
        return Outputs(logprobs, call(_position_losses, logprobs, loss))

    def forward_backward(
        self,
        trained: Trained,
        accumulators: tuple[Adapter, ...] | None,
        host: HostBatch,
        *,
        kept_layers: int,
        call: Call = directly,
    ) -> Outputs:
        """The same, and the accumulators, which are consumed, with this micro-batch's gradients added.

        Without accumulators its gradients alone; that is a program of its own. Of the last ``kept_layers`` layers the
        backward pass finds the activations: it begins with them, so there is room when others are computed again.
        """
        batch = self._to_device(host)
        x, rope = call(self._ends.embed, self._model.weights, batch.tokens, batch.positions)
        rest = (rope, batch.positions, self._place(batch), trained.gate, trained.expert_gate)
        saved: list[Any] = []
        first_kept = len(self._layers) - kept_layers
        for index, (programs, weights) in enumerate(self._layers):
            if index >= first_kept:
                y, kept = call(programs.keep, weights, _sites(trained, index), x, *rest)
                saved.append((x, kept))
            else:
                y = call(programs.forward, weights, _sites(trained, index), x, *rest)
                saved.append((x, None))
            x = y
        if host.has_sequence_ratios:  # all logprobs of a datum come before the loss of its first position
            batch = replace(batch, loss=_with_sequence_ratios(self._score(trained, x, batch, call), batch.loss))
        sums_of_head = None if accumulators is None else tuple(adapter.unembed for adapter in accumulators)
        dx, of_head, logprobs, losses, finite = call(
            self._ends.gradient, self._model.weights, _unembeds(trained), sums_of_head, x, trained.gate, batch
        )
        layers: list[tuple[Sites, ...]] = []
        for index in reversed(range(len(self._layers))):
            programs, weights = self._layers[index]
            sums = None if accumulators is None else tuple(adapter.layers[index] for adapter in accumulators)
            entered, kept = saved.pop()
            inputs = (weights, _sites(trained, index), entered, *rest)
            if kept is None:
                dx, sums, finite = call(programs.backward_again, inputs, dx, sums, finite)
            else:
                dx, sums, finite = call(programs.backward, inputs, kept, dx, sums, finite)
            layers.append(sums)
        gradients = tuple(
            Adapter(tuple(sums[which] for sums in reversed(layers)), unembed) for which, unembed in enumerate(of_head)
        )
        return Outputs(logprobs, losses, gradients, finite)

    def _score(self, trained: Trained, x: Any, batch: HostBatch, call: Call) -> Any:
        return call(self._ends.score, self._model.weights, _unembeds(trained), x, trained.gate, batch.targets)

    def _to_device(self, host: HostBatch) -> HostBatch:
        mesh = self._model.mesh

        def put(array: np.ndarray) -> jax.Array:
            axes = ("row", "seq", None)[: array.ndim]
            return jax.device_put(array, sharding(axes, array.shape, mesh))

        return jax.tree.map(put, host)

    def _place(self, batch: HostBatch) -> Packed | None:
        return Packed(batch.starts) if self._packed else None


def _sites(trained: Trained, layer: int) -> tuple[Sites, ...]:
    return tuple(adapter.layers[layer] for adapter in trained.adapters)


def _unembeds(trained: Trained) -> tuple[LoraWeights | None, ...]:
    return tuple(adapter.unembed for adapter in trained.adapters)


# ---- a layer --------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Kept:
    """What a layer's backward pass needs besides the layer's inputs.

    Those are left out: what a program returns is always a new array, and the weights would be there twice.

    Attributes:
        values: arrays of the pull-back's leaves that are not inputs.
        places: of each leaf, which of the inputs' leaves it is, or -1.
        tree: the pull-back's structure.
    """

    values: list[Any]
    places: tuple[int, ...] = field(metadata={"static": True})
    tree: Any = field(metadata={"static": True})


@dataclass(frozen=True)
class _LayerPrograms:
    forward: Callable[..., Any]
    keep: Callable[..., Any]
    backward: Callable[..., Any]
    backward_again: Callable[..., Any]


@lru_cache(maxsize=64)
def _layer_programs(graphdef: Any, mesh: Any, axes: tuple[tuple[Any, ...], ...]) -> _LayerPrograms:
    """Programs of one kind of layer. ``axes``: (key, in axis, out axis, experts) of each site."""

    def layer(
        weights: Any, sites: tuple[Sites, ...], x: Any, rope: Any, positions: Any, place: Any, *gates: Any
    ) -> Any:
        module = nnx.merge(graphdef, weights)
        y, _ = module(x, rope, positions, LayerLora(_join(sites), *gates), None, place)
        return y

    def pulled(function: Callable[..., Any], weights: Any, sites: Any, x: Any, *rest: Any) -> tuple[Any, Any]:
        return jax.vjp(lambda sites, x: function(weights, sites, x, *rest), sites, x)

    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(policies.save_only_these_names(KEPT), keeps_cudnn)

    def keep(*inputs: Any) -> tuple[Any, Any]:
        y, pull = pulled(jax.checkpoint(layer, policy=policy), *inputs)
        leaves, tree = jax.tree.flatten(pull)
        known = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(inputs))}
        places = tuple(known.get(id(leaf), -1) for leaf in leaves)
        return y, _Kept([leaf for leaf, place in zip(leaves, places, strict=True) if place < 0], places, tree)

    def backward(inputs: Any, kept: _Kept, dx: Any, sums: Any, finite: Any) -> tuple[Any, Any, Any]:
        given, own = jax.tree.leaves(inputs), iter(kept.values)
        leaves = [given[place] if place >= 0 else next(own) for place in kept.places]
        return add(jax.tree.unflatten(kept.tree, leaves), dx, sums, finite)

    def add(pull: Any, dx: Any, sums: Any, finite: Any) -> tuple[Any, Any, Any]:
        gradients, dx = pull(dx)
        sums = gradients if sums is None else jax.tree.map(jnp.add, sums, gradients)
        return dx, tuple(_in_place(site, mesh, axes) for site in sums), finite & all_finite(sums)

    def backward_again(inputs: Any, dx: Any, sums: Any, finite: Any) -> tuple[Any, Any, Any]:
        return add(pulled(layer, *inputs)[1], dx, sums, finite)

    return _LayerPrograms(
        forward=jax.jit(layer),
        keep=jax.jit(keep),
        backward=jax.jit(backward, donate_argnums=3),
        backward_again=jax.jit(backward_again, donate_argnums=2),
    )


def _join(sites: tuple[Any, ...]) -> Any:
    """One adapter's arrays as they are; of several, tuples: stacked, they would all be copied (45 MB each)."""
    if not sites:
        return {}
    return sites[0] if len(sites) == 1 else jax.tree.map(lambda *arrays: arrays, *sites)


def _in_place(sites: Sites, mesh: Any, axes: tuple[tuple[Any, ...], ...]) -> Sites:
    """Pinned to where adapters live on the mesh, so that donated accumulators keep their place.

    On one device too: an accumulator that comes back under another spelling of its place is compiled for once more.
    """
    pinned = {}
    for key, in_axis, out_axis, num_experts in axes:
        if key in sites:
            a, b = sites[key].a, sites[key].b
            site = LoraSite(key, None, key, "", a.shape[-2], b.shape[-1], num_experts, in_axis, out_axis)
            pinned[key] = _pin(sites[key], site, mesh)
    return pinned


def _pin(weights: LoraWeights, site: LoraSite, mesh: Any) -> LoraWeights:
    return jax.tree.map(jax.lax.with_sharding_constraint, weights, adapter_sharding(site, mesh, weights.a.shape[-1]))


# ---- both ends ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ends:
    embed: Callable[..., Any]
    score: Callable[..., Any]
    gradient: Callable[..., Any]


@lru_cache(maxsize=16)
def _ends(graphdef: Any, chunk: int) -> _Ends:
    """Programs of what is before the first layer and behind the last."""

    def embed(weights: Any, tokens: Any, positions: Any) -> Any:
        return nnx.merge(graphdef, weights).embed(tokens, positions)

    def score(weights: Any, unembeds: Any, x: Any, gate: Any, targets: Any) -> Any:
        model = nnx.merge(graphdef, weights)
        head = (model.norm(x), model.unembed_kernel(), targets, _join_unembeds(unembeds), gate)
        return target_logprobs(*head, chunk=chunk)

    def gradient(weights: Any, unembeds: Any, sums: Any, x: Any, gate: Any, batch: HostBatch) -> tuple[Any, ...]:
        model = nnx.merge(graphdef, weights)
        hidden, pull = jax.vjp(lambda x: model.norm(x), x)
        lora = _join_unembeds(unembeds)
        head = (hidden, model.unembed_kernel(), batch.targets, lora, gate)
        logprobs, losses, grads = loss_and_gradient(*head, batch.order, batch.loss, position_losses, chunk=chunk)
        gradients = _split(grads.lora, len(unembeds))
        sums = gradients if sums is None else jax.tree.map(jnp.add, sums, gradients)
        if model.mesh is not None and lora is not None:
            site = next(site for site in model.lora_sites() if site.layer is None)
            sums = tuple(_pin(one, site, model.mesh) for one in sums)
        (dx,) = pull(grads.hidden)
        return dx, sums, logprobs, losses, all_finite(sums)

    return _Ends(jax.jit(embed), jax.jit(score), jax.jit(gradient, donate_argnums=2))


_position_losses = jax.jit(position_losses)


def _with_sequence_ratios(logprobs: Any, loss: LossBatch) -> LossBatch:
    """Where the other arrays are, or the head's program would be compiled once more."""
    ratios = _sequence_ratios(logprobs, loss)
    return replace(loss, sequence_log_ratio=jax.device_put(ratios, loss.sequence_log_ratio.sharding))


@jax.jit
def _sequence_ratios(logprobs: Any, loss: LossBatch) -> Any:
    return with_sequence_ratios(logprobs, loss).sequence_log_ratio


def _join_unembeds(unembeds: tuple[LoraWeights | None, ...]) -> LoraWeights | None:
    return None if not unembeds or unembeds[0] is None else _join(unembeds)


def _split(joined: LoraWeights | None, count: int) -> tuple[LoraWeights | None, ...]:
    """The inverse of ``_join``."""
    if count == 1:
        return (joined,)
    if joined is None:
        return (None,) * count
    return tuple(LoraWeights(a, b) for a, b in zip(joined.a, joined.b, strict=True))
