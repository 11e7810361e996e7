"""Every architecture that the config accepts has a class, and no other."""

from __future__ import annotations

from tx.models.config import ARCHITECTURES
from tx.models.llama3 import Llama3ForCausalLM
from tx.models.qwen3 import Qwen3ForCausalLM
from tx.models.registry import MODELS


def test_every_accepted_architecture_has_its_class():
    assert set(MODELS) == set(ARCHITECTURES)
    assert MODELS["LlamaForCausalLM"] is Llama3ForCausalLM
    assert MODELS["Qwen3ForCausalLM"] is MODELS["Qwen3MoeForCausalLM"] is Qwen3ForCausalLM
