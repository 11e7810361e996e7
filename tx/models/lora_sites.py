"""Which linear layers of a model take an adapter: all of them, experts and unembedding included; not the router."""

from __future__ import annotations

from tx.layers.lora import LoraSite
from tx.models.config import ModelConfig


def lora_sites(config: ModelConfig) -> tuple[LoraSite, ...]:
    """All sites in the order of the forward pass; see LoraSite for their names."""
    embed, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    sites: list[LoraSite] = []
    for layer in range(config.num_layers):
        moe = config.is_moe(layer)
        ffn = config.moe_intermediate_size if moe else config.intermediate_size
        prefix = "experts." if moe else ""
        num_experts = config.num_experts if moe else None
        for key, group, inner, outer, in_axis, out_axis, experts in (
            ("q_proj", "attn", embed, queries, "embed", "heads", None),
            ("k_proj", "attn", embed, keys, "embed", "kv_heads", None),
            ("v_proj", "attn", embed, keys, "embed", "kv_heads", None),
            ("o_proj", "attn", queries, embed, "heads", "embed", None),
            (f"{prefix}gate_proj", "mlp", embed, ffn, "embed", "ffn", num_experts),
            (f"{prefix}up_proj", "mlp", embed, ffn, "embed", "ffn", num_experts),
            (f"{prefix}down_proj", "mlp", ffn, embed, "ffn", "embed", num_experts),
        ):
            name = f"layers.{layer}.{key}"
            sites.append(LoraSite(name, layer, key, group, inner, outer, experts, in_axis, out_axis))
    head = LoraSite("unembed", None, "unembed", "unembed", embed, config.vocab_size, None, "embed", "vocab")
    return (*sites, head)
