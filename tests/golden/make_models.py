"""Writes models.npz: what transformers computes with the tiny models of tiny_specs.py, in float32.

usage: python -m tests.golden.make_models      (from the repository's root; torch, transformers, safetensors)

Per model: logits at every 8th position without an adapter and with one, merged into the weights; the gradient, with
respect to each A and B, of the summed log-probability of the next token, by the chain rule from the gradient of the
merged weights (d/dA = scaling * dW.T @ B.T, d/dB = scaling * A.T @ dW.T for W [out, in]).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.golden import tiny_specs as specs


def sites_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int | None, int, int]]:
    """Site name to (experts, in, out), from the checkpoint's tensors."""
    sites: dict[str, tuple[int | None, int, int]] = {}
    for key, tensor in tensors.items():
        if not key.endswith("_proj.weight"):
            continue
        parts = key.split(".")
        outer, inner = tensor.shape
        if "experts" in parts:
            name = f"layers.{parts[2]}.experts.{parts[-2]}"
            sites[name] = ((sites.get(name) or (0, 0, 0))[0] + 1, inner, outer)
        else:
            sites[f"layers.{parts[2]}.{parts[-2]}"] = (None, inner, outer)
    vocab, embed = tensors["model.embed_tokens.weight"].shape
    sites["unembed"] = (None, embed, vocab)
    return sites


def merge(tensors: dict[str, np.ndarray], adapter: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The checkpoint with the adapter added to its weights; a tied head becomes one of its own."""
    merged = dict(tensors)
    merged.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].copy())
    for key in list(merged):
        parts = key.split(".")
        if key == "lm_head.weight":
            a, b, scaling = *adapter["unembed"], specs.SCALING
        elif not key.endswith("_proj.weight"):
            continue
        elif "experts" in parts:
            a, b = (w[int(parts[5])] for w in adapter[f"layers.{parts[2]}.experts.{parts[-2]}"])
            scaling = specs.EXPERT_SCALING
        else:
            a, b, scaling = *adapter[f"layers.{parts[2]}.{parts[-2]}"], specs.SCALING
        merged[key] = (merged[key].astype(np.float64) + scaling * (a.astype(np.float64) @ b).T).astype(np.float32)
    return merged


def weight_gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Site name to dL/dW, [out, in] or [expert, out, in]; transformers keeps experts stacked, gate and up fused."""
    found = {}
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        gradient = None if parameter.grad is None else parameter.grad.numpy()
        if key == "lm_head.weight":
            found["unembed"] = gradient
        elif key.endswith("experts.gate_up_proj"):
            half = gradient.shape[1] // 2
            found[f"layers.{parts[2]}.experts.gate_proj"] = gradient[:, :half]
            found[f"layers.{parts[2]}.experts.up_proj"] = gradient[:, half:]
        elif key.endswith("experts.down_proj"):
            found[f"layers.{parts[2]}.experts.down_proj"] = gradient
        elif key.endswith("_proj.weight"):
            found[f"layers.{parts[2]}.{parts[-2]}"] = gradient
    return found


def run(name: str, folder: Path) -> dict[str, np.ndarray]:
    """All golden arrays of one model."""
    specs.write_model(folder, name)
    tokens = torch.tensor(specs.tokens(), dtype=torch.long)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        golden = {"logits": plain(tokens).logits[:, ::8].numpy()}

    tensors = load_file(folder / "model.safetensors")
    adapter = specs.adapter(sites_of(tensors))
    save_file(merge(tensors, adapter), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits = model(tokens).logits
    golden["lora_logits"] = logits[:, ::8].detach().numpy()
    logprobs = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, tokens[:, 1:, None])
    golden["logprobs"] = logprobs[..., 0].detach().numpy()
    logprobs.sum().backward()
    for site, gradient in weight_gradients(model).items():
        a, b = adapter[site]
        scaling = specs.EXPERT_SCALING if a.ndim == 3 else specs.SCALING
        transposed = np.swapaxes(gradient, -1, -2).astype(np.float64)
        golden[f"grad.{site}.a"] = (scaling * transposed @ np.swapaxes(b, -1, -2)).astype(np.float32)
        golden[f"grad.{site}.b"] = (scaling * np.swapaxes(a, -1, -2) @ transposed).astype(np.float32)
    return {f"{name}/{key}": value for key, value in golden.items()}


if __name__ == "__main__":
    arrays: dict[str, np.ndarray] = {}
    for name in specs.SPECS:
        with tempfile.TemporaryDirectory() as folder:
            arrays |= run(name, Path(folder))
    np.savez_compressed(Path(__file__).with_name("models.npz"), **arrays)
