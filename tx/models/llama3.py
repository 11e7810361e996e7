"""The Llama 3 family: Llama 3.x with its rope scaling, and models of the same shape such as SmolLM2."""

from __future__ import annotations

from tx.models.decoder import DecoderForCausalLM


class Llama3ForCausalLM(DecoderForCausalLM):
    """Nothing beyond the shared decoder: the rope scaling is in its config."""
