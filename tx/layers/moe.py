"""Mixture of experts: the router, and the experts over blocks of tokens sorted by expert.

Routing is in float32. Each (token, chosen expert) pair becomes one line; lines are sorted by expert, each expert's
lines padded to whole blocks, and a scan multiplies block after block by its one expert's kernels. So the arithmetic is
that of the chosen experts (``num_experts_per_tok / num_experts`` of all of them) plus at most one part-filled block
per expert, and there is no capacity: no token is ever dropped. ``jax.lax.ragged_dot`` is not used: without a kernel of
its own it multiplies every line by every expert.

Memory is bounded: tokens go through in chunks of MAX_CHUNK_TOKENS, each with about ``2 * tokens * num_experts_per_tok *
embed`` values alive, and the backward pass recomputes a block's inner values instead of keeping them. A chunk reads
every used expert's kernels once, so a smaller chunk trades speed for memory.

On a mesh each device holds its experts (ep) and its part of ffn (tp), sees its own rows, computes what it can, and one
sum over both axes completes the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from tx.layers.lora import LoraWeights, dot, frozen_dot
from tx.layers.mlp import silu_product
from tx.layers.sharding import Axes, constrain, spec
from tx.layers.weights import ExpertKernel, Kernel

MAX_CHUNK_TOKENS = 2048
MAX_BLOCK_TOKENS = 128

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
KERNEL_AXES: dict[str, tuple[str, str, str]] = {
    "gate_proj": ("expert", "embed", "ffn"),
    "up_proj": ("expert", "embed", "ffn"),
    "down_proj": ("expert", "ffn", "embed"),
}


@dataclass(frozen=True)
class MoeShape:
    """Sizes of one mixture layer; ``normalize`` makes a token's chosen weights sum to one."""

    embed: int
    ffn: int
    num_experts: int
    num_experts_per_tok: int
    normalize: bool


class Router(nnx.Module):
    """Scores of every expert; on disk ``mlp.gate.weight``."""

    def __init__(self, shape: MoeShape) -> None:
        self.weight = Kernel((shape.embed, shape.num_experts), (None, None), float32=True)


class ExpertStack(nnx.Module):
    """One projection of every expert."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, axes: Axes) -> None:
        self.weight = ExpertKernel((num_experts, in_features, out_features), axes)


class Experts(nnx.Module):
    """The three projections of every expert."""

    def __init__(self, shape: MoeShape) -> None:
        for name in PROJECTIONS:
            sizes = (shape.ffn, shape.embed) if name == "down_proj" else (shape.embed, shape.ffn)
            setattr(self, name, ExpertStack(shape.num_experts, *sizes, KERNEL_AXES[name]))


class SparseMlp(nnx.Module):
    """The MoE layer's place in a decoder layer; adapters sit on the experts, not on the router."""

    def __init__(self, shape: MoeShape, mesh: Mesh | None) -> None:
        self.gate = Router(shape)
        self.experts = Experts(shape)
        self.shape = shape
        self.mesh = mesh

    def __call__(
        self,
        x: Float[Array, "row seq embed"],
        lora: dict[str, LoraWeights],
        gate: Float[Array, "gate_rows rank"] | None,
    ) -> Float[Array, "row seq embed"]:
        """``gate`` is the adapters' expert gate."""
        weights, chosen = route(x, self.gate.weight.get_value(), self.shape)
        kernels = {name: getattr(self.experts, name).weight.get_value() for name in PROJECTIONS}
        sites = {name: lora[f"experts.{name}"] for name in PROJECTIONS if f"experts.{name}" in lora}
        if gate is not None:
            gate = jnp.broadcast_to(gate, (x.shape[0], gate.shape[1]))
        if self.mesh is None or self.mesh.size == 1:
            y = _experts(x, weights, chosen, kernels, sites, gate, first_expert=0)
        else:
            y = _experts_on_mesh(x, weights, chosen, kernels, sites, gate, self.mesh)
        return constrain(y.astype(x.dtype), ("row", "seq", None), self.mesh)


def route(
    x: Float[Array, "row seq embed"], kernel: Float[Array, "embed expert"], shape: MoeShape
) -> tuple[Float[Array, "row seq chosen"], Int[Array, "row seq chosen"]]:
    """Each token's experts and their weights, float32."""
    scores = jax.nn.softmax(dot(x.astype(jnp.float32), kernel), axis=-1)
    weights, chosen = jax.lax.top_k(scores, shape.num_experts_per_tok)
    if shape.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def _experts_on_mesh(
    x: Any, weights: Any, chosen: Any, kernels: dict[str, Any], sites: dict[str, LoraWeights], gate: Any, mesh: Mesh
) -> Float[Array, "row seq embed"]:
    """``_experts`` on every device's own experts, ffn part and rows, then one sum over ep and tp."""
    by_row = spec(("row", "seq", None), x.shape, mesh)
    kernel_specs = {name: _local(KERNEL_AXES[name], kernels[name].shape, mesh) for name in kernels}
    site_specs = {}
    for name, site in sites.items():
        expert, inner, outer = KERNEL_AXES[name]
        site_specs[name] = LoraWeights(
            _local((expert, inner, "rank"), site.a.shape, mesh), _local((expert, "rank", outer), site.b.shape, mesh)
        )
    gate_spec = None if gate is None else spec(("row", "rank"), gate.shape, mesh)

    def local(x: Any, weights: Any, chosen: Any, kernels: Any, sites: Any, gate: Any) -> Any:
        first_expert = jax.lax.axis_index("ep") * kernels["gate_proj"].shape[0]
        y = _experts(x, weights, chosen, kernels, sites, gate, first_expert=first_expert)
        return jax.lax.psum(y, ("ep", "tp"))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_row, by_row, by_row, kernel_specs, site_specs, gate_spec),
        out_specs=by_row,
        check_vma=False,
    )(x, weights, chosen, kernels, sites, gate)


def _local(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """A kernel's place while it is used: like at rest, but gathered along embed."""
    return spec([None if axis == "embed" else axis for axis in axes], shape, mesh)


def _experts(
    x: Any,
    weights: Any,
    chosen: Any,
    kernels: dict[str, Any],
    sites: dict[str, LoraWeights],
    gate: Any,
    *,
    first_expert: Any,
) -> Float[Array, "row seq embed"]:
    """The weighted sum of the chosen experts that live here, in chunks of tokens."""
    rows, seq, embed = x.shape
    num_tokens = rows * seq
    lines = [x.reshape(num_tokens, embed), weights.reshape(num_tokens, -1), chosen.reshape(num_tokens, -1)]
    lines[2] = lines[2] - first_expert
    if gate is not None:
        lines.append(jnp.repeat(gate, seq, axis=0))
    chunks = -(-num_tokens // MAX_CHUNK_TOKENS)

    def one(part: Any) -> Any:
        return _chunk(part[0], part[1], part[2], part[3] if gate is not None else None, kernels, sites)

    if chunks == 1:
        return one(lines).reshape(rows, seq, embed)
    size = -(-num_tokens // chunks)
    # Padding tokens choose an expert that doesn't exist, so they cost nothing.
    fills = [0, 0, kernels["gate_proj"].shape[0], 0]
    padded = [
        jnp.pad(line, ((0, chunks * size - num_tokens), (0, 0)), constant_values=fill).reshape(chunks, size, -1)
        for line, fill in zip(lines, fills, strict=False)
    ]
    y = jax.lax.map(jax.checkpoint(one), padded)
    return y.reshape(chunks * size, embed)[:num_tokens].reshape(rows, seq, embed)


def _chunk(
    x: Float[Array, "token embed"],
    weights: Float[Array, "token chosen"],
    chosen: Int[Array, "token chosen"],
    gate: Float[Array, "token rank"] | None,
    kernels: dict[str, Any],
    sites: dict[str, LoraWeights],
) -> Float[Array, "token embed"]:
    """One chunk of tokens through the experts here; ids outside [0, experts here) belong to other devices."""
    num_experts = kernels["gate_proj"].shape[0]
    num_tokens, num_chosen = chosen.shape
    num_lines = num_tokens * num_chosen
    block = _block_size(num_lines, num_experts)
    num_blocks = -(-num_lines // block) + min(num_experts, num_lines)
    slot, expert_of_block, used_blocks = _place(chosen.reshape(-1), num_experts, block)
    slot = jnp.where(slot < 0, num_blocks * block, slot)  # past the end: dropped, and read back as zero

    def lay_out(values: Any) -> Any:
        """Each line's token value in its slot, zero in empty slots: [blocks, block, …]."""
        token = jnp.full((num_blocks * block,), num_tokens, jnp.int32)
        token = token.at[slot].set(jnp.arange(num_lines, dtype=jnp.int32) // num_chosen, mode="drop")
        return jnp.take(values, token, axis=0, mode="fill", fill_value=0).reshape(num_blocks, block, -1)

    per_block = {
        "x": lay_out(x),
        "gate": None if gate is None or not sites else lay_out(gate),
        "sites": jax.tree.map(lambda w: w[expert_of_block], sites),
        "expert": expert_of_block,
        "used": jnp.arange(num_blocks) < used_blocks,
    }

    def step(carry: None, part: Any) -> tuple[None, Any]:
        y = jax.lax.cond(
            part["used"],
            lambda p: _block(p["x"], {n: k[p["expert"]] for n, k in kernels.items()}, p["sites"], p["gate"]),
            lambda p: jnp.zeros((block, x.shape[1]), jnp.float32),
            part,
        )
        return carry, y

    _, y = jax.lax.scan(jax.checkpoint(step), None, per_block)
    y = jnp.take(y.reshape(num_blocks * block, -1), slot, axis=0, mode="fill", fill_value=0)
    return jnp.einsum("tce,tc->te", y.reshape(num_tokens, num_chosen, -1), weights)


def _block_size(num_lines: int, num_experts: int) -> int:
    """About the lines that an expert gets on average, as a power of two from 1 to MAX_BLOCK_TOKENS."""
    average = max(1.0, num_lines / num_experts)
    return min(MAX_BLOCK_TOKENS, 2 ** math.ceil(math.log2(average)))


def _place(experts: Int[Array, "line"], num_experts: int, block: int) -> tuple[Array, Array, Array]:
    """Each line's slot (-1 if its expert isn't here), each block's expert, and how many blocks hold lines.

    Example: block 2, experts [1, 0, 1, 1] of 2: expert 0 has block 0 with one line, expert 1 blocks 1 and 2 with
    three, so the slots are [2, 0, 3, 4], the blocks' experts [0, 1, 1, …] and 3 blocks are used.
    """
    num_lines = experts.shape[0]
    num_blocks = -(-num_lines // block) + min(num_experts, num_lines)
    here = (experts >= 0) & (experts < num_experts)
    experts = jnp.where(here, experts, num_experts)
    order = jnp.argsort(experts, stable=True)
    counts = jnp.bincount(experts, length=num_experts + 1)[:num_experts]
    blocks = -(-counts // block)
    first_block = jnp.cumsum(blocks) - blocks
    first_line = jnp.cumsum(counts) - counts
    in_order = jnp.minimum(experts[order], num_experts - 1)
    rank = jnp.arange(num_lines) - first_line[in_order]
    slots = jnp.zeros(num_lines, jnp.int32).at[order].set((first_block[in_order] * block + rank).astype(jnp.int32))
    expert_of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right")
    return jnp.where(here, slots, -1), jnp.minimum(expert_of_block, num_experts - 1), jnp.sum(blocks)


def _block(
    x: Float[Array, "line embed"], kernels: dict[str, Any], sites: dict[str, LoraWeights], gate: Any
) -> Float[Array, "line embed"]:
    """Lines of one expert through that expert, float32 out; on a tp mesh a partial sum, as all is linear in down."""

    def project(name: str, inner: Any) -> Any:
        y = frozen_dot(inner, kernels[name])
        site = sites.get(name)
        if site is None or gate is None:
            return y
        low = dot(inner, site.a.astype(inner.dtype))
        low = jnp.where(gate != 0, low * gate, 0.0)
        return y + dot(low.astype(inner.dtype), site.b.astype(inner.dtype))

    gated, up = project("gate_proj", x).astype(x.dtype), project("up_proj", x).astype(x.dtype)
    return project("down_proj", silu_product(gated, up))
