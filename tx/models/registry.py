"""Architecture name, as a Hugging Face config has it, to the class that implements it."""

from __future__ import annotations

from tx.models.config import LLAMA, QWEN3, QWEN3_MOE
from tx.models.decoder import DecoderForCausalLM
from tx.models.llama3 import Llama3ForCausalLM
from tx.models.qwen3 import Qwen3ForCausalLM

MODELS: dict[str, type[DecoderForCausalLM]] = {
    LLAMA: Llama3ForCausalLM,
    QWEN3: Qwen3ForCausalLM,
    QWEN3_MOE: Qwen3ForCausalLM,
}
