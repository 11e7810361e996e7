"""Qwen3, dense and mixture of experts."""

from __future__ import annotations

from tx.models.decoder import DecoderForCausalLM


class Qwen3ForCausalLM(DecoderForCausalLM):
    """The shared decoder with an RMSNorm on each head's query and key; the config says which layers are mixtures."""

    qk_norm = True
