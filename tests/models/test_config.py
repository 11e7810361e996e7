"""Config reading: what is honoured arrives, what isn't is refused by name (lessons C13)."""

from __future__ import annotations

import json

import pytest

from tests.support.tiny_models import CONFIGS
from tx.errors import Unsupported
from tx.layers.rotary import RopeConfig
from tx.models.config import ModelConfig

LLAMA, QWEN3, MOE = CONFIGS["llama3"], CONFIGS["qwen3"], CONFIGS["qwen3_moe"]
LLAMA3_ROPE = LLAMA["rope_scaling"]


def test_dense():
    config = ModelConfig.from_hf(QWEN3)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert config.tie_word_embeddings
    assert config.rope == RopeConfig(1e6)
    assert not config.is_moe(0)
    assert hash(config) == hash(ModelConfig.from_hf(dict(QWEN3)))


def test_mixture():
    config = ModelConfig.from_hf(MOE | {"mlp_only_layers": [0], "norm_topk_prob": False})
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 2, 32)
    assert config.moe_layers == (False, True)
    assert not config.norm_topk_prob
    sparse = ModelConfig.from_hf(MOE | {"num_hidden_layers": 5, "decoder_sparse_step": 2})
    assert sparse.moe_layers == (False, True, False, True, False)
    renamed = {key: value for key, value in MOE.items() if key != "num_experts"} | {"num_local_experts": 4}
    assert ModelConfig.from_hf(renamed).num_experts == 4


def test_rope_in_both_spellings():
    expected = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 128)
    assert ModelConfig.from_hf(LLAMA).rope == expected
    new = {key: value for key, value in LLAMA.items() if not key.startswith("rope_")}
    assert ModelConfig.from_hf(new | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}).rope == expected
    old_linear = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelConfig.from_hf(old_linear).rope == RopeConfig(500000.0, "linear", 2.0)
    assert ModelConfig.from_hf(LLAMA | {"rope_scaling": None}).rope == RopeConfig(500000.0)


def test_defaults_are_those_of_transformers():
    bare = {key: value for key, value in LLAMA.items() if key not in ("head_dim", "num_key_value_heads")}
    config = ModelConfig.from_hf(bare)
    assert (config.head_dim, config.num_kv_heads) == (16, 4)
    assert ModelConfig.from_hf({k: v for k, v in QWEN3.items() if k != "head_dim"}).head_dim == 128
    assert ModelConfig.from_hf({k: v for k, v in MOE.items() if k != "head_dim"}).head_dim == 16


@pytest.mark.parametrize(("value", "ids"), [(7, (7,)), ([9, 7, 9], (7, 9)), (None, ())])
def test_eos_ids(value, ids):
    assert ModelConfig.from_hf(QWEN3 | {"eos_token_id": value}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("base", "change", "field"),
    [
        (QWEN3, {"architectures": ["Qwen2ForCausalLM"]}, "architectures"),
        (QWEN3, {"architectures": None}, "architectures"),
        (QWEN3, {"hidden_act": "gelu"}, "hidden_act"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (QWEN3, {"attention_dropout": 0.1}, "attention_dropout"),
        (QWEN3, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (QWEN3, {"logit_softcapping": 30.0}, "logit_softcapping"),
        (QWEN3, {"num_experts": 4}, "num_experts"),
        (QWEN3, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"mscale": 1.0}}, "rope_scaling.mscale"),
        (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": None}}, "rope_scaling.low_freq_factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"sliding_window": 64}, "sliding_window"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA, {"num_hidden_layers": "2"}, "num_hidden_layers"),
        (LLAMA, {"vocab_size": None}, "vocab_size"),
        (MOE, {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        (MOE, {"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size"),
    ],
)
def test_c13_what_is_not_honoured_is_refused_by_name(base, change, field):
    with pytest.raises(Unsupported) as error:
        ModelConfig.from_hf(base | change)
    assert field in error.value.field
    assert field in str(error.value)


def test_harmless_fields_are_accepted():
    extra = {"transformers.js_config": {"a": 1}, "_name_or_path": "x", "initializer_range": 0.5, "unheard_of": None}
    assert ModelConfig.from_hf(json.loads(json.dumps(QWEN3 | extra))) == ModelConfig.from_hf(QWEN3)
