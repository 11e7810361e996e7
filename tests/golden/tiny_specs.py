"""The tiny models of the golden files: numpy only, so that the script and the tests make the same ones.

``write_model(folder, name)`` writes a Hugging Face folder; ``adapter(name)`` is a seeded adapter for its sites.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.tiny_models import write_tiny_model

VOCAB, RANK, EXPERT_RANK, SCALING, EXPERT_SCALING = 256, 3, 2, 2.0, 1.5

SPECS: dict[str, tuple[str, dict]] = {
    "qwen3": ("qwen3", {}),
    "qwen3_bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False, "head_dim": 24}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_mixed": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False, "mlp_only_layers": [0]},
    ),
    "llama3": ("llama3", {}),
    "llama_linear": (
        "llama3",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm2_shaped": (
        "llama3",
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "rope_scaling": None,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
    ),
}


def write_model(folder: Path, name: str, **more: object) -> Path:
    """The folder of one of SPECS; what the plain families lack, biases and dense layers, is drawn here."""
    family, overrides = SPECS[name]
    write_tiny_model(folder, family, seed=7, vocab_size=VOCAB, eos_token_id=2, bos_token_id=1, **(overrides | more))
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(11)
    for layer in config.get("mlp_only_layers", []):
        prefix = f"model.layers.{layer}.mlp"
        tensors = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
        sizes = (config["intermediate_size"], config["hidden_size"])
        for key, shape in (("gate_proj", sizes), ("up_proj", sizes), ("down_proj", sizes[::-1])):
            tensors[f"{prefix}.{key}.weight"] = rng.normal(0.0, 0.1, shape).astype(np.float32)
    for key in sorted(tensors):
        is_attention, is_mlp = "self_attn" in key and "_norm" not in key, ".mlp." in key
        if (is_attention and config["attention_bias"]) or (is_mlp and config.get("mlp_bias")):
            bias = rng.normal(0.0, 0.3, tensors[key].shape[0]).astype(np.float32)
            tensors[key.replace(".weight", ".bias")] = bias
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adapter(sites: dict[str, tuple[int | None, int, int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Seeded A [in, r] and B [r, out] (with a leading expert axis for experts) of each site: (experts, in, out)."""
    weights = {}
    for name, (experts, inner, outer) in sorted(sites.items()):
        rng = np.random.default_rng([sum(map(ord, name)), len(name)])
        lead = () if experts is None else (experts,)
        rank = RANK if experts is None else EXPERT_RANK
        a = rng.normal(0.0, 1.0 / np.sqrt(inner), (*lead, inner, rank)).astype(np.float32)
        b = rng.normal(0.0, 0.3, (*lead, rank, outer)).astype(np.float32)
        weights[name] = (a, b)
    return weights


def tokens() -> np.ndarray:
    """Two rows of 160 tokens: longer than the 128 positions beyond which llama3 scaling stretches."""
    return np.random.default_rng(5).integers(3, VOCAB, (2, 160)).astype(np.int32)
