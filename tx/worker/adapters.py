"""Trainable adapters: what one tenant's training state is made of, and which of them are on the device.

A state is float32 throughout and belongs to one model: no array is shared with another model, so that a step can't
touch a neighbour. Ranks are padded with zeros to a power of two, which bounds the number of compiled programs; padding
gets exactly zero gradient and is cut off on export.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tx.errors import InvalidInput, NotFound
from tx.layers.lora import Adapter, LoraSite, LoraWeights, adapter_sharding, expert_rank
from tx.models.loading import LoadedModel
from tx.models.lora_sites import lora_sites
from tx.types import LoraConfig, ModelState
from tx.worker.ahead import Call, directly
from tx.worker.parking import Parking
from tx.worker.shapes import padded_rank, power_of_two

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainingState:
    """One model's trainable state, on the device or, with arrays of numpy, parked.

    Attributes:
        weights, mu, nu: float32, of the padded rank.
        grads: what forward_backwards have added up since the last step; None is zero.
        step: optimizer steps taken since the moments were zero.
        is_base: fresh, its b's still zero: it computes what the base model does.
    """

    weights: Adapter
    mu: Adapter
    nu: Adapter
    grads: Adapter | None = None
    step: int = field(default=0, metadata={"static": True})
    is_base: bool = field(default=False, metadata={"static": True})


@dataclass(frozen=True)
class Ranks:
    """True and padded ranks of an adapter, of dense sites and of expert sites, with their scalings."""

    dense: int
    expert: int
    scaling: float
    expert_scaling: float

    @property
    def padded(self) -> tuple[int, int]:
        """(dense, expert) columns of the arrays."""
        return padded_rank(self.dense), power_of_two(self.expert)

    def true_columns(self, site: LoraSite) -> int:
        """The rank of this site."""
        return self.dense if site.num_experts is None else self.expert

    def columns(self, site: LoraSite) -> int:
        """Columns of this site's arrays."""
        return self.padded[site.num_experts is not None]


def ranks(lora: LoraConfig, num_experts_per_tok: int) -> Ranks:
    """What ``lora`` means on a model with this many active experts (0 is a dense model)."""
    per_expert = lora.expert_rank or expert_rank(lora.rank, num_experts_per_tok)
    return Ranks(lora.rank, per_expert, lora.scaling, lora.alpha / per_expert)


def trained_sites(sites: tuple[LoraSite, ...], lora: LoraConfig) -> tuple[LoraSite, ...]:
    """The sites that this adapter has, by its train_attn, train_mlp and train_unembed, and its ``sites`` if given."""
    groups = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    only = None if lora.sites is None else frozenset(lora.sites)
    return tuple(site for site in sites if groups[site.group] and (only is None or site.name in only))


def site_shapes(site: LoraSite, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (a, b) at this rank."""
    lead = () if site.num_experts is None else (site.num_experts,)
    return (*lead, site.in_features, rank), (*lead, rank, site.out_features)


def initial_weights(site: LoraSite, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A uniform in ±1/sqrt(in), B zero ("LoRA Without Regret", and PEFT's default): the adapter starts as a no-op.

    A depends on the seed and the site's name only, not on which other sites are trained.
    """
    shape_a, shape_b = site_shapes(site, rank)
    rng = np.random.default_rng((seed & (2**64 - 1), zlib.crc32(site.name.encode())))
    bound = 1.0 / math.sqrt(site.in_features)
    return rng.uniform(-bound, bound, shape_a).astype(np.float32), np.zeros(shape_b, np.float32)


def padded_site(a: np.ndarray, b: np.ndarray, columns: int) -> LoraWeights:
    """A site's arrays with zero columns up to ``columns``: [… in rank] and [… rank out] of one dtype."""
    extra, lead = (0, columns - a.shape[-1]), [(0, 0)] * (a.ndim - 2)
    return LoraWeights(np.pad(a, [*lead, (0, 0), extra]), np.pad(b, [*lead, extra, (0, 0)]))


class AdapterStore:
    """Every model's training state, at most ``max_resident`` of them on the device.

    The least recently used of the others are parked whole, and come back when they are asked for. A parked state that
    can't be read back is lost: the model is no longer in the store, and whoever asks for it gets ModelLost until it is
    created or restored anew.
    """

    def __init__(self, model: LoadedModel, max_resident: int, parking: Parking[TrainingState] | None = None) -> None:
        self.max_resident = max(1, max_resident)
        self._model = model
        self._sites = lora_sites(model.config)
        self._lora: dict[str, LoraConfig] = {}
        self._resident: OrderedDict[str, TrainingState] = OrderedDict()
        self._parking: Parking[TrainingState] = Parking() if parking is None else parking

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._resident or model_id in self._parking

    @property
    def resident(self) -> tuple[str, ...]:
        """The models on the device, the least recently used first."""
        return tuple(self._resident)

    def create(self, model_id: str, lora: LoraConfig) -> None:
        """A fresh model: initial weights, zero moments, no gradients, step 0."""
        if model_id in self:
            raise InvalidInput("model_id", model_id, "an id that is not in use")
        fresh = {}
        for site in trained_sites(self._sites, lora):
            fresh[site.name + ".lora_A"], fresh[site.name + ".lora_B"] = self._initial(site, lora)
        self._put(model_id, lora, ModelState(lora, fresh))
        self._resident[model_id] = replace(self._resident[model_id], is_base=True)

    def drop(self, model_id: str) -> None:
        """Forget a model; unknown ids are fine."""
        self._lora.pop(model_id, None)
        self._resident.pop(model_id, None)
        self._parking.drop(model_id)

    def park(self, model_id: str) -> None:
        """Move a model off the device; one that isn't there is fine."""
        if model_id in self._resident:
            self._parking.put(model_id, jax.device_get(self._resident[model_id]))
            del self._resident[model_id]
            log.debug("parked %s", model_id)

    def lora(self, model_id: str) -> LoraConfig:
        """The model's config; NotFound if there is no such model."""
        if model_id not in self._lora:
            raise NotFound("model_id", model_id, "a model that exists on this server")
        return self._lora[model_id]

    def ranks(self, model_id: str) -> Ranks:
        """True ranks, padded ranks and scalings of the model's adapter."""
        return self.ranks_of(self.lora(model_id))

    def ranks_of(self, lora: LoraConfig) -> Ranks:
        """The same of an adapter that need not exist."""
        return ranks(lora, self._model.config.num_experts_per_tok)

    def outline(self, lora: LoraConfig) -> Adapter:
        """Shapes and places of such an adapter's arrays, as ``jax.ShapeDtypeStruct``."""

        def leaf(site: LoraSite) -> LoraWeights:
            columns = self.ranks_of(lora).columns(site)
            places = adapter_sharding(site, self._model.mesh, columns)
            a, b = site_shapes(site, columns)
            return LoraWeights(
                jax.ShapeDtypeStruct(a, jnp.float32, sharding=places.a),
                jax.ShapeDtypeStruct(b, jnp.float32, sharding=places.b),
            )

        return self._tree(lora, leaf)

    def state(self, model_id: str) -> TrainingState:
        """The model's state on the device, restored if it was parked; NotFound, or ModelLost if it can't be."""
        lora = self.lora(model_id)
        if model_id not in self._resident:
            parked = self._parking.peek(model_id)
            self._make_room()
            self._resident[model_id] = self._to_device(parked, lora)
            self._parking.drop(model_id)  # only now: the device may have had no room
            log.debug("restored %s to the device", model_id)
        self._resident.move_to_end(model_id)
        return self._resident[model_id]

    def replace(self, model_id: str, state: TrainingState) -> None:
        """Put the model's next state in the place of its present one."""
        self.lora(model_id)
        self._parking.drop(model_id)
        if model_id not in self._resident:
            self._make_room()
        self._resident[model_id] = state
        self._resident.move_to_end(model_id)

    def export(self, model_id: str) -> ModelState:
        """A host copy at the true rank: weights, moments, step. Accumulated gradients are no part of it.

        A parked model stays parked. Raises NotFound, or ModelLost if it can't be read back.
        """
        lora = self.lora(model_id)
        state = self._resident[model_id] if model_id in self._resident else self._parking.peek(model_id)
        weights, mu, nu = (self._named(jax.device_get(tree), lora) for tree in (state.weights, state.mu, state.nu))
        return ModelState(lora, weights, mu, nu, state.step)

    def restore(self, model_id: str, state: ModelState, with_optimizer: bool) -> None:
        """Put a saved state into the model, created if absent; accumulated gradients are cleared.

        Raises InvalidInput if it doesn't fit this base model or the model that is there; then nothing has changed.
        What no request names (alpha, the rank of experts, the set of sites) is the saved adapter's from then on.
        """
        present = self._lora.get(model_id, state.lora)
        for name, wanted in present.requested.items():
            got = state.lora.requested[name]
            if got != wanted:
                raise InvalidInput(
                    "path", f"a checkpoint with {name} {got}", f"one with {name} {wanted}, as the model has"
                )
        lora = replace(state.lora, seed=present.seed)
        if with_optimizer and not (state.mu and state.nu):
            raise InvalidInput(
                "optimizer", "a checkpoint without optimizer state", "one that has it, or optimizer=false"
            )
        weights = self._checked(state.weights, lora, "weights", self._initial)
        if not with_optimizer:
            self._put(model_id, lora, ModelState(lora, weights))
            return
        zeros = lambda site, lora: tuple(np.zeros_like(part) for part in self._initial(site, lora))
        mu, nu = (self._checked(moments, lora, "optimizer", zeros) for moments in (state.mu, state.nu))
        self._put(model_id, lora, ModelState(lora, weights, mu, nu, state.step))

    # ---- between ModelState's names and the pytree ------------------------------------------------------------

    def _initial(self, site: LoraSite, lora: LoraConfig) -> tuple[np.ndarray, np.ndarray]:
        return initial_weights(site, self.ranks_of(lora).true_columns(site), lora.seed)

    def _checked(
        self,
        arrays: Mapping[str, np.ndarray],
        lora: LoraConfig,
        what: str,
        missing: Callable[[LoraSite, LoraConfig], tuple[np.ndarray, ...]],
    ) -> dict[str, np.ndarray]:
        """All arrays of the adapter, absent sites filled in by ``missing``; InvalidInput on any that doesn't fit."""
        full: dict[str, np.ndarray] = {}
        left = dict(arrays)
        for site in trained_sites(self._sites, lora):
            names = (site.name + ".lora_A", site.name + ".lora_B")
            given = [left.pop(name, None) for name in names]
            if given[0] is None and given[1] is None:
                given = list(missing(site, lora))
            shapes = site_shapes(site, self.ranks_of(lora).true_columns(site))
            for name, array, shape in zip(names, given, shapes, strict=True):
                if array is None or array.shape != shape:
                    got = f"{what} with {name} of shape {None if array is None else array.shape}"
                    raise InvalidInput("path", got, f"shape {shape} on this base model")
                if not np.isfinite(array).all():
                    raise InvalidInput("path", f"{what} with a non-finite {name}", "finite numbers")
                full[name] = np.asarray(array, np.float32)
        if left:
            raise InvalidInput("path", f"{what} with {next(iter(left))}", "only sites that this model trains")
        return full

    def _put(self, model_id: str, lora: LoraConfig, state: ModelState) -> None:
        """Host arrays become the model's state on the device; absent moments are zero."""
        zeros = {name: np.zeros_like(array) for name, array in state.weights.items()}
        weights, mu, nu = (
            self._padded(arrays, lora) for arrays in (state.weights, state.mu or zeros, state.nu or zeros)
        )
        on_device = self._to_device(TrainingState(weights, mu, nu, None, state.step), lora)
        self._lora[model_id] = lora
        self.replace(model_id, on_device)

    def _padded(self, arrays: Mapping[str, np.ndarray], lora: LoraConfig) -> Adapter:
        padded = self.ranks_of(lora)
        pad = lambda site: padded_site(
            arrays[site.name + ".lora_A"], arrays[site.name + ".lora_B"], padded.columns(site)
        )
        return self._tree(lora, pad)

    def _named(self, adapter: Adapter, lora: LoraConfig) -> dict[str, np.ndarray]:
        named: dict[str, np.ndarray] = {}
        for site in trained_sites(self._sites, lora):
            weights = adapter.unembed if site.layer is None else adapter.layers[site.layer][site.key]
            assert weights is not None
            rank = self.ranks_of(lora).true_columns(site)
            # Copies: device_get may hand out a view of a buffer that the next optimizer step reuses.
            named[site.name + ".lora_A"] = np.asarray(weights.a)[..., :rank].copy()
            named[site.name + ".lora_B"] = np.asarray(weights.b)[..., :rank, :].copy()
        return named

    def _tree(self, lora: LoraConfig, leaf: Callable[[LoraSite], LoraWeights]) -> Adapter:
        layers: list[dict[str, LoraWeights]] = [{} for _ in range(self._model.config.num_layers)]
        unembed = None
        for site in trained_sites(self._sites, lora):
            if site.layer is None:
                unembed = leaf(site)
            else:
                layers[site.layer][site.key] = leaf(site)
        return Adapter(tuple(layers), unembed)

    # ---- between host and device ------------------------------------------------------------------------------

    def _to_device(self, state: TrainingState, lora: LoraConfig) -> TrainingState:
        places = jax.tree.map(lambda like: like.sharding, self.outline(lora))
        grads = None if state.grads is None else places
        return jax.device_put(state, replace(state, weights=places, mu=places, nu=places, grads=grads))

    def _make_room(self) -> None:
        """Park the least recently used models until one more fits."""
        while len(self._resident) >= self.max_resident:
            self.park(next(iter(self._resident)))


# ---- adapters as arrays ---------------------------------------------------------------------------------------------


def zeros_like(like: Adapter, *, call: Call = directly) -> Adapter:
    """Zeros in the places of ``like``: elsewhere, whoever adds to it would be compiled twice."""
    leaves, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, call(_zeros_at, leaves, tuple(leaf.sharding for leaf in leaves)))


@partial(jax.jit, static_argnums=1)
def _zeros_at(like: list[jax.Array], places: tuple[jax.sharding.Sharding, ...]) -> list[jax.Array]:
    return [jax.lax.with_sharding_constraint(jnp.zeros_like(x), at) for x, at in zip(like, places, strict=True)]


@partial(jax.jit, donate_argnums=(1,))
def add(grads: Adapter, more: Adapter) -> Adapter:
    """The sum. ``more`` is consumed; ``grads`` is not, so that the model's state survives a failure here."""
    return jax.tree.map(jnp.add, grads, more)


def resize(adapter: Adapter, rank: int) -> Adapter:
    """A dense adapter with so many columns: zeros added, or zeros cut off."""
    have = next(leaf.shape[-1] for leaf in jax.tree.leaves(adapter))
    return adapter if have == rank else _resized(adapter, rank)


@partial(jax.jit, static_argnums=1)
def _resized(adapter: Adapter, rank: int) -> Adapter:
    def resize(path: Any, x: jax.Array) -> jax.Array:
        axis = -1 if path[-1].name == "a" else -2
        if x.shape[axis] >= rank:
            return jax.lax.slice_in_dim(x, 0, rank, axis=x.ndim + axis)
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, rank - x.shape[axis])
        return jnp.pad(x, widths)

    return jax.tree_util.tree_map_with_path(resize, adapter)
