"""Tiny Hugging Face folders with seeded random weights, made with numpy and safetensors only.

Every folder is a complete model as a user would download it: config.json, generation_config.json, safetensors,
tokenizer (from tests/data). The vocabulary (2048) is the real Qwen3 tokenizer, cut to 2022 BPE tokens and its 26
special ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"
VOCAB = 2048
EOS = (2024, 2022)  # <|im_end|>, <|endoftext|>

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": EOS[1],
    "eos_token_id": EOS[0],
    "dtype": "float32",
    "use_cache": True,
}

CONFIGS: dict[str, dict] = {
    "qwen3": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "qwen3_moe": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "sliding_window": None,
        "use_sliding_window": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "llama3": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
}


def write_tiny_model(folder: Path, family: str, *, seed: int = 0, **overrides: object) -> Path:
    """Write ``folder`` for ``family`` (a key of CONFIGS); ``overrides`` replace config.json fields."""
    config = CONFIGS[family] | overrides
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"bos_token_id": EOS[1], "pad_token_id": EOS[1], "eos_token_id": list(EOS)}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder / file.name)
    save_file(weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Every tensor of the family by its Hugging Face name, float32; linear layers are [out, in] as torch has them."""
    rng = np.random.default_rng(seed)
    embed, vocab, head_dim = config["hidden_size"], config["vocab_size"], config["head_dim"]
    query, key_value = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def linear(out: int, inner: int) -> np.ndarray:
        return rng.normal(0.0, 1.0 / np.sqrt(inner), (out, inner)).astype(np.float32)

    def norm(size: int) -> np.ndarray:  # away from 1, so that forgetting to multiply shows
        return rng.uniform(0.8, 1.2, size).astype(np.float32)

    def mlp(prefix: str, ffn: int) -> dict[str, np.ndarray]:
        return {
            f"{prefix}.gate_proj.weight": linear(ffn, embed),
            f"{prefix}.up_proj.weight": linear(ffn, embed),
            f"{prefix}.down_proj.weight": linear(embed, ffn),
        }

    tensors = {"model.embed_tokens.weight": linear(vocab, embed), "model.norm.weight": norm(embed)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = linear(vocab, embed)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": norm(embed),
            f"{prefix}.post_attention_layernorm.weight": norm(embed),
            f"{prefix}.self_attn.q_proj.weight": linear(query, embed),
            f"{prefix}.self_attn.k_proj.weight": linear(key_value, embed),
            f"{prefix}.self_attn.v_proj.weight": linear(key_value, embed),
            f"{prefix}.self_attn.o_proj.weight": linear(embed, query),
        }
        if config["model_type"].startswith("qwen3"):
            tensors[f"{prefix}.self_attn.q_norm.weight"] = norm(head_dim)
            tensors[f"{prefix}.self_attn.k_norm.weight"] = norm(head_dim)
        if "num_experts" in config:
            tensors[f"{prefix}.mlp.gate.weight"] = linear(config["num_experts"], embed)
            for expert in range(config["num_experts"]):
                tensors |= mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
        else:
            tensors |= mlp(f"{prefix}.mlp", config["intermediate_size"])
    return tensors
