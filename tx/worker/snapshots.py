"""Immutable sampler weights: taken from a model that trains, or loaded; parked in host memory; combined for a batch.

A snapshot is a copy in the model's compute dtype, which is also what the trainer multiplies by, and shares no buffer
with training state: the optimizer may donate its arrays the moment after. A snapshot with a weight that isn't finite
is refused, since in a batch of several tenants' rows one tenant's NaN must not reach the products of another.

Not here: files (a snapshot's durable form is the caller's), and which rows use which snapshot (``generator``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tx.errors import InvalidInput, NotFound
from tx.layers.lora import Adapter, AdapterView, LoraWeights, adapter_sharding, all_finite
from tx.models.loading import LoadedModel
from tx.models.lora_sites import lora_sites
from tx.types import LoraConfig, ModelState
from tx.worker.adapters import padded_site, ranks
from tx.worker.ahead import Call, directly
from tx.worker.shapes import power_of_two


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One frozen adapter, compared by identity.

    Attributes:
        adapter: every site at ``rank`` columns (experts at ``expert_rank``), zero columns past the true rank.
        scaling: factor on dense sites; expert_scaling: on expert sites.
    """

    snapshot_id: str
    adapter: Adapter
    rank: int
    expert_rank: int
    scaling: float
    expert_scaling: float


class SnapshotStore:
    """Snapshots by id. The ``max_resident`` most recently used live on the device, the others in host memory.

    ``call`` is how programs are run (``ahead``).
    """

    def __init__(self, model: LoadedModel, max_resident: int, call: Call = directly) -> None:
        self._model = model
        self._call = call
        self._max_resident = max_resident
        self._resident: OrderedDict[str, Snapshot] = OrderedDict()
        self._parked: dict[str, tuple[Snapshot, Any]] = {}  # adapter in numpy, and where each array goes back to

    def __contains__(self, snapshot_id: object) -> bool:
        return snapshot_id in self._resident or snapshot_id in self._parked

    def take(self, snapshot_id: str, adapter: Adapter, lora: LoraConfig) -> None:
        """Freeze the present weights of a model; InvalidInput if one of them is not finite."""
        self._keep(snapshot_id, adapter, lora)

    def load(self, snapshot_id: str, state: ModelState) -> None:
        """A snapshot from saved weights, padded to the rank that ``take`` would have seen."""
        padded = ranks(state.lora, self._model.config.num_experts_per_tok)
        layers: list[dict[str, LoraWeights]] = [{} for _ in range(self._model.config.num_layers)]
        unembed = None
        for site in lora_sites(self._model.config):
            if f"{site.name}.lora_A" not in state.weights:
                continue
            a, b = state.weights[f"{site.name}.lora_A"], state.weights[f"{site.name}.lora_B"]
            columns = padded.columns(site)
            place = adapter_sharding(site, self._model.mesh, columns)
            weights = jax.device_put(padded_site(a, b, columns), place)
            if site.layer is None:
                unembed = weights
            else:
                layers[site.layer][site.key] = weights
        self._keep(snapshot_id, Adapter(tuple(layers), unembed), state.lora)

    def get(self, snapshot_id: str) -> Snapshot:
        """The snapshot, on the device; it counts as used now."""
        if snapshot_id in self._parked:
            snapshot, places = self._parked.pop(snapshot_id)
            self._admit(replace(snapshot, adapter=jax.device_put(snapshot.adapter, places)))
        if snapshot_id not in self._resident:
            raise NotFound("model_path", snapshot_id, "sampler weights that exist")
        self._resident.move_to_end(snapshot_id)
        return self._resident[snapshot_id]

    def rehearse(self, adapter: Adapter, lora: LoraConfig, call: Call) -> Snapshot:
        """``call`` each program of ``take``; what it would keep, where ``adapter`` may be shapes. Nothing changes."""
        return self._snapshot("", self._copies(adapter, call), lora)

    def drop(self, snapshot_id: str) -> None:
        """Forget a snapshot; whoever holds the object may go on using it. Unknown ids are fine."""
        self._resident.pop(snapshot_id, None)
        self._parked.pop(snapshot_id, None)

    def _keep(self, snapshot_id: str, adapter: Adapter, lora: LoraConfig) -> None:
        copies = self._copies(adapter, self._call)
        if not all(jax.device_get([finite for _, finite in copies])):
            raise InvalidInput("weights", "a weight that is not finite", "finite weights (did training diverge?)")
        self.drop(snapshot_id)
        self._admit(self._snapshot(snapshot_id, copies, lora))

    def _copies(self, adapter: Adapter, call: Call) -> list[tuple[Any, Any]]:
        return [call(_frozen_copy, sites, self._model.dtype) for sites in (*adapter.layers, adapter.unembed)]

    def _snapshot(self, snapshot_id: str, copies: list[tuple[Any, Any]], lora: LoraConfig) -> Snapshot:
        *layers, unembed = (copy for copy, _ in copies)
        adapter = Adapter(tuple(layers), unembed)
        rank, expert_rank = _columns(adapter)
        own = ranks(lora, self._model.config.num_experts_per_tok)
        return Snapshot(snapshot_id, adapter, rank, expert_rank, own.scaling, own.expert_scaling)

    def _admit(self, snapshot: Snapshot) -> None:
        self._resident[snapshot.snapshot_id] = snapshot
        while len(self._resident) > self._max_resident:
            oldest_id, oldest = self._resident.popitem(last=False)
            places = jax.tree.map(lambda x: x.sharding, oldest.adapter)
            self._parked[oldest_id] = (replace(oldest, adapter=jax.device_get(oldest.adapter)), places)


class LiveAdapters:
    """The snapshots that rows of the current batch use, side by side in one adapter.

    The combined adapter is rebuilt when the set changes, into a power of two of columns, so that the decode program
    knows few sizes: ranks 8, 4 and 16 stand at columns 0-7, 8-11, 12-27 of 32. One snapshot alone is used as it is.
    """

    def __init__(self) -> None:
        self._offsets: dict[Snapshot, tuple[int, int]] = {}
        self._adapter: Adapter | None = None
        self._width = (0, 0)

    def view(self, rows: Sequence[Snapshot | None]) -> AdapterView | None:
        """The view in which row i uses ``rows[i]``; None when every row is the base model's."""
        live = list(dict.fromkeys(row for row in rows if row is not None))
        if set(live) != set(self._offsets):
            self._combine(live)
        if self._adapter is None:
            return None
        gate = np.zeros((len(rows), self._width[0]), np.float32)
        expert_gate = np.zeros((len(rows), self._width[1]), np.float32)
        for row, snapshot in enumerate(rows):
            if snapshot is not None:
                at, expert_at = self._offsets[snapshot]
                gate[row, at : at + snapshot.rank] = snapshot.scaling
                expert_gate[row, expert_at : expert_at + snapshot.expert_rank] = snapshot.expert_scaling
        return AdapterView(self._adapter, jnp.asarray(gate), jnp.asarray(expert_gate))

    def _combine(self, live: list[Snapshot]) -> None:
        self._offsets, at, expert_at = {}, 0, 0
        for snapshot in live:
            self._offsets[snapshot] = (at, expert_at)
            at, expert_at = at + snapshot.rank, expert_at + snapshot.expert_rank
        self._width = (power_of_two(at), power_of_two(expert_at))
        if len(live) <= 1:
            self._adapter = live[0].adapter if live else None
            # A rank that isn't a power of two (nobody makes one, but nothing forbids it) keeps its own width.
            self._width = (max(1, at), max(1, expert_at))
            return
        combined = _blank([snapshot.adapter for snapshot in live], *self._width)
        for snapshot, (start, expert_start) in self._offsets.items():
            combined = _place(combined, snapshot.adapter, jnp.int32(start), jnp.int32(expert_start))
        self._adapter = combined


def _columns(adapter: Adapter) -> tuple[int, int]:
    """Columns of the dense and of the expert sites, 0 where there are none."""
    sites = [site for layer in adapter.layers for site in layer.values()]
    if adapter.unembed is not None:
        sites.append(adapter.unembed)
    dense = next((site.a.shape[-1] for site in sites if site.a.ndim == 2), 0)
    return dense, next((site.a.shape[-1] for site in sites if site.a.ndim == 3), 0)


@partial(jax.jit, static_argnames="dtype")
def _frozen_copy(sites: Any, dtype: Any) -> tuple[Any, Any]:
    """Fresh buffers in ``dtype``, and whether every weight is finite in it.

    For one layer at a time, whose program serves all layers: for the whole adapter it takes a second to compile.
    """
    # copy=True: without it an array that already has the dtype would come back as the very buffer that training owns.
    cast = jax.tree.map(lambda x: jnp.array(x, dtype=dtype, copy=True), sites)
    return cast, all_finite(cast)


def _blank(adapters: Sequence[Adapter], rank: int, expert_rank: int) -> Adapter:
    """Zeros for every site that one of the adapters has, sharded as there."""

    def zeros(like: LoraWeights) -> LoraWeights:
        columns = expert_rank if like.a.ndim == 3 else rank
        a_shape = (*like.a.shape[:-1], columns)
        b_shape = (*like.b.shape[:-2], columns, like.b.shape[-1])
        return LoraWeights(
            jnp.zeros(a_shape, like.a.dtype, device=like.a.sharding),
            jnp.zeros(b_shape, like.b.dtype, device=like.b.sharding),
        )

    layers = []
    for same_layer in zip(*(adapter.layers for adapter in adapters), strict=True):
        sites = {key: site for layer in same_layer for key, site in layer.items()}
        layers.append({key: zeros(sites[key]) for key in sorted(sites)})
    unembed = next((adapter.unembed for adapter in adapters if adapter.unembed is not None), None)
    return Adapter(tuple(layers), None if unembed is None else zeros(unembed))


@partial(jax.jit, donate_argnums=0)
def _place(combined: Adapter, adapter: Adapter, start: Int[Array, ""], expert_start: Int[Array, ""]) -> Adapter:
    """Write an adapter's columns at ``start``; where is data, so that a program serves every arrangement."""

    def put(target: LoraWeights, source: LoraWeights | None) -> LoraWeights:
        if source is None:
            return target
        at = expert_start if source.a.ndim == 3 else start
        return LoraWeights(
            jax.lax.dynamic_update_slice_in_dim(target.a, source.a, at, axis=target.a.ndim - 1),
            jax.lax.dynamic_update_slice_in_dim(target.b, source.b, at, axis=target.b.ndim - 2),
        )

    layers = tuple(
        {key: put(site, own.get(key)) for key, site in layer.items()}
        for layer, own in zip(combined.layers, adapter.layers, strict=True)
    )
    return Adapter(layers, None if combined.unembed is None else put(combined.unembed, adapter.unembed))
