"""The gated MLP of a dense layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tx.layers.lora import KEPT, LoraLinear, LoraWeights
from tx.layers.sharding import constrain


class GatedMlp(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, embed: int, ffn: int, *, bias: bool, mesh: Mesh | None) -> None:
        self.gate_proj = LoraLinear(embed, ffn, ("embed", "ffn"), bias=bias, mesh=mesh)
        self.up_proj = LoraLinear(embed, ffn, ("embed", "ffn"), bias=bias, mesh=mesh)
        self.down_proj = LoraLinear(ffn, embed, ("ffn", "embed"), bias=bias, mesh=mesh)
        self.mesh = mesh

    def __call__(
        self,
        x: Float[Array, "row seq embed"],
        lora: dict[str, LoraWeights],
        gate: Float[Array, "gate_rows rank"] | None,
    ) -> Float[Array, "row seq embed"]:
        """``gate`` is the adapters', not the MLP's."""
        gated = checkpoint_name(self.gate_proj(x, lora.get("gate_proj"), gate), KEPT)
        up = checkpoint_name(self.up_proj(x, lora.get("up_proj"), gate), KEPT)
        inner = silu_product(gated, up)
        inner = constrain(inner, ("row", "seq", "ffn"), self.mesh)
        return self.down_proj(inner, lora.get("down_proj"), gate)


def silu_product(gated: Float[Array, "*batch ffn"], up: Float[Array, "*batch ffn"]) -> Float[Array, "*batch ffn"]:
    """``silu(gated) * up``, in float32, rounded once."""
    return (jax.nn.silu(gated.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gated.dtype)
