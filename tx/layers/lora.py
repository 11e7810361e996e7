"""LoRA: the adapter's arrays, the forms in which they are applied, and the linear layer that applies them.

The common form serves training one adapter, sampling one, and sampling several side by side::

    delta = where(gate != 0, (x @ a) * gate, 0) @ b

``gate[row, j]`` is the scaling of the adapter that owns rank column j if the row uses that adapter, else 0. One
adapter is a gate full of its scaling. Several have their A's concatenated along rank and their B's too, so adapters of
different ranks stand side by side at the cost of the sum of their ranks, not of a common maximum; a base-model row has
a zero gate row. When tiny requests of several tenants train together, ``a`` and ``b`` are tuples of one array per row
instead: row i meets its own pair alone, and gets its own gradient. Products accumulate in float32 and the delta is
added before the sum is rounded to the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from tx.layers.sharding import Axes, constrain, sharding
from tx.layers.weights import Kernel, Weight

KEPT = "kept"
"""``checkpoint_name`` of what a layer's backward pass needs and would take a large product to compute again: outputs of
projections that something nonlinear follows, the attention's output and, where it goes over blocks, each softmax's
logarithm of the total, the residual stream between the two halves. Norms, rotations, weights of attention and gating
are computed again; they are cheap, and their values several times as large. cuDNN's kernel can't name anything:
``tx.layers.attention.keeps_cudnn`` stands for it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraWeights:
    """One site's pair. a: [in, rank], b: [rank, out]; of experts with that axis in front; tuples, one per row."""

    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """All sites of one adapter, or of several side by side.

    ``layers[i]`` maps "q_proj", …, "down_proj" or "experts.gate_proj", … to weights; untrained sites are absent.
    """

    layers: tuple[dict[str, LoraWeights], ...]
    unembed: LoraWeights | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterView:
    """An adapter and who uses which of its columns. gate: [row, rank], expert_gate: [row, expert_rank].

    Gates of one row count for every row.
    """

    adapter: Adapter
    gate: Any
    expert_gate: Any


@dataclass(frozen=True)
class LoraSite:
    """A place that takes an adapter. ``name`` is "layers.3.q_proj", "layers.3.experts.gate_proj" or "unembed"."""

    name: str
    layer: int | None
    key: str
    group: str  # "attn", "mlp" or "unembed": the create_model flag that trains it
    in_features: int
    out_features: int
    num_experts: int | None
    in_axis: str
    out_axis: str


def expert_rank(rank: int, num_experts_per_tok: int) -> int:
    """Rank of each expert's adapter, so that a token's active experts add up to ``rank`` (LoRA Without Regret)."""
    return max(1, rank // max(1, num_experts_per_tok))


def adapter_sharding(site: LoraSite, mesh: Mesh, rank: int = 1) -> LoraWeights:
    """Where a site's ``a`` and ``b`` live (NamedShardings); dimensions that don't divide are replicated."""
    lead_axes: tuple[str, ...] = () if site.num_experts is None else ("expert",)
    lead_shape = () if site.num_experts is None else (site.num_experts,)

    def place(axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        return sharding((*lead_axes, *axes), (*lead_shape, *shape), mesh, strict=False)

    return LoraWeights(
        a=place((site.in_axis, "rank"), (site.in_features, rank)),
        b=place(("rank", site.out_axis), (rank, site.out_features)),
    )


def single_view(
    adapter: Adapter, scaling: float | jax.Array, expert_scaling: float | jax.Array, rank: int, expert_rank: int
) -> AdapterView:
    """Every row uses this adapter; ``rank`` and ``expert_rank`` count columns, padding included."""
    return AdapterView(
        adapter=adapter,
        gate=jnp.full((1, rank), scaling, jnp.float32),
        expert_gate=jnp.full((1, expert_rank), expert_scaling, jnp.float32),
    )


def concatenate(adapters: Sequence[Adapter], ranks: Sequence[tuple[int, int]]) -> Adapter:
    """Adapters side by side along rank; ``ranks[i]`` is adapter i's (rank, expert_rank) in columns.

    A site that only some of them train gets zero columns for the others.
    """
    num_layers = len(adapters[0].layers)
    layers = []
    for layer in range(num_layers):
        keys = sorted({key for adapter in adapters for key in adapter.layers[layer]})
        layers.append({key: _join([a.layers[layer].get(key) for a in adapters], ranks) for key in keys})
    heads = [adapter.unembed for adapter in adapters]
    return Adapter(tuple(layers), None if all(head is None for head in heads) else _join(heads, ranks))


def _join(sites: Sequence[LoraWeights | None], ranks: Sequence[tuple[int, int]]) -> LoraWeights:
    model = next(site for site in sites if site is not None)
    is_expert = model.a.ndim == 3
    a, b = [], []
    for site, (rank, rank_of_experts) in zip(sites, ranks, strict=True):
        columns = rank_of_experts if is_expert else rank
        if site is None:
            a.append(jnp.zeros((*model.a.shape[:-1], columns), model.a.dtype))
            b.append(jnp.zeros((*model.b.shape[:-2], columns, model.b.shape[-1]), model.b.dtype))
        else:
            a.append(site.a)
            b.append(site.b)
    return LoraWeights(jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-2))


def all_finite(tree: Any) -> Any:
    """Whether every number of a tree is finite: bool []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)] or [jnp.array(True)]).all()


def dot(x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"]) -> Float[Array, "*batch outer"]:
    """A product that accumulates in, and returns, float32."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


@jax.custom_vjp
def frozen_dot(x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"]) -> Float[Array, "*batch outer"]:
    """``dot`` with a weight that nobody trains: backward, one product in ``x``'s dtype and none for ``w``."""
    return dot(x, w)


def _frozen_forward(x: Any, w: Any) -> tuple[Any, Any]:
    return dot(x, w), (w, jnp.zeros((), x.dtype))


def _frozen_backward(saved: Any, dy: Any) -> tuple[Any, None]:
    w, like = saved
    return dot(dy.astype(like.dtype), w.T).astype(like.dtype), None


frozen_dot.defvjp(_frozen_forward, _frozen_backward)


@jax.custom_vjp
def lora_delta(
    x: Float[Array, "row *seq inner"], lora: LoraWeights, gate: Float[Array, "gate_rows rank"]
) -> Float[Array, "row *seq outer"]:
    """What the adapters add to a linear layer's output, float32; ``gate_rows`` is the rows or 1."""
    return delta_and_low(x, lora, gate)[0]


def delta_and_low(x: Any, lora: LoraWeights, gate: Any) -> tuple[Any, Any]:
    """``lora_delta``, and the gated ``x @ a`` that it went through, in ``x``'s dtype."""
    a, b = _in_dtype_of(x, lora)
    low = _gated(_times(x, a), gate).astype(x.dtype)
    return _times(low, b), low


def delta_gradient(x: Any, low: Any, dy: Any, lora: LoraWeights, gate: Any) -> tuple[Any, LoraWeights]:
    """Gradients of ``lora_delta`` with respect to ``x`` (float32) and the adapter, from ``dy`` in ``x``'s dtype."""
    a, b = _in_dtype_of(x, lora)
    d_low = _gated(_times(dy, _transposed(b)), gate).astype(x.dtype)
    if isinstance(a, tuple):
        # A row is short: x transposed is less than a gradient transposed, of which there are as many as rows.
        x = jax.lax.optimization_barrier(x)
        grads = LoraWeights(
            tuple(_outer(*pair) for pair in zip(x, d_low, strict=True)),
            tuple(_outer(*pair) for pair in zip(low, dy, strict=True)),
        )
    else:
        # By hand for the sake of ``a``: differentiated, its gradient is ``x.T @ d``, and a CPU then computes all of x
        # again, element by element and transposed (11 ms of a layer's 44 for the down projection of SmolLM2 at 256
        # tokens). Kept apart from the transposition after it, or the compiler would undo the order of the two.
        grads = LoraWeights(jax.lax.optimization_barrier(_outer(d_low, x)).T, _outer(low, dy))
    grads = jax.tree.map(lambda grad, like: grad.astype(like.dtype), grads, lora)
    return _times(d_low, _transposed(a)), grads


def _outer(
    left: Float[Array, "*positions inner"], right: Float[Array, "*positions outer"]
) -> Float[Array, "inner outer"]:
    """Products of all pairs, summed over positions, in float32."""
    return jnp.einsum("...i,...o->io", left, right, preferred_element_type=jnp.float32)


def _in_dtype_of(x: Any, lora: LoraWeights) -> tuple[Any, Any]:
    return jax.tree.map(lambda w: w.astype(x.dtype), (lora.a, lora.b))


def _transposed(w: Any) -> Any:
    return jax.tree.map(lambda w: w.T, w)


def _times(x: Any, w: Any) -> Any:
    """``x @ w`` in float32; of several ``w``, each meets its own row."""
    if isinstance(w, tuple):
        return jnp.stack([dot(row, own) for row, own in zip(x, w, strict=True)])
    return dot(x, w)


def _gated(low: Any, gate: Any) -> Any:
    gate = gate.reshape(gate.shape[0], *(1,) * (low.ndim - 2), gate.shape[1])
    # where, not a product alone: another tenant's column may have overflowed, and 0 * inf would reach this row.
    return jnp.where(gate != 0, low * gate, 0.0)


def _delta_forward(x: Any, lora: LoraWeights, gate: Any) -> tuple[Any, Any]:
    return delta_and_low(x, lora, gate)[0], (x, lora, gate)


def _delta_backward(saved: Any, dy: Any) -> tuple[Any, LoraWeights, None]:
    x, lora, gate = saved
    low = _gated(_times(x, _in_dtype_of(x, lora)[0]), gate).astype(x.dtype)
    dx, grads = delta_gradient(x, low, dy.astype(x.dtype), lora, gate)
    return dx.astype(x.dtype), grads, None


lora_delta.defvjp(_delta_forward, _delta_backward)


class LoraLinear(nnx.Module):
    """A frozen linear layer that takes an adapter."""

    def __init__(
        self, in_features: int, out_features: int, axes: Axes, *, bias: bool = False, mesh: Mesh | None = None
    ) -> None:
        self.weight = Kernel((in_features, out_features), axes)
        self.bias = Weight((out_features,), (axes[1],), float32=True) if bias else None
        # Weights cut over fsdp are gathered where they are used; only their embed axis is cut that way.
        self.used_axes = tuple(None if axis == "embed" else axis for axis in axes)
        self.mesh = mesh

    def __call__(
        self,
        x: Float[Array, "row seq inner"],
        lora: LoraWeights | None = None,
        gate: Float[Array, "gate_rows rank"] | None = None,
    ) -> Float[Array, "row seq outer"]:
        """``x @ kernel + bias + delta``, rounded once."""
        y = frozen_dot(x, constrain(self.weight.get_value(), self.used_axes, self.mesh))
        if self.bias is not None:
            y = y + self.bias.get_value()
        if lora is not None and gate is not None:
            y = y + lora_delta(x, lora, gate)
        return y.astype(x.dtype)
