"""Write lora_llama and lora_qwen3.safetensors: what torch autograd says about LoRA as PEFT has it.

Run with an environment that has torch, transformers and peft, from the repository's root::

    python tests/golden/make_lora.py

The models are tiny and random. Everything is computed in double precision and stored as float32, so what a test sees
as a difference is the error of the code under test. The losses are written here from their formulas, on logits.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.numpy import save_file

HERE = Path(__file__).parent
RANK, ALPHA = 3, 32  # a rank that needs padding to a power of two
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "eos_token_id": 1,
    "bos_token_id": 0,
}


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    elif family == "qwen3":
        config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=False)
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
        config = transformers.Qwen3MoeConfig(**SIZES, **experts, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.8, 1.2)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.double().eval()


def hf_folder(model: torch.nn.Module) -> tuple[str, dict[str, np.ndarray]]:
    """config.json and the checkpoint's tensors, as save_pretrained writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.float().save_pretrained(folder)
        model.double()
        from safetensors.numpy import load_file

        tensors = load_file(Path(folder) / "model.safetensors")
        config = (Path(folder) / "config.json").read_text()
    return config, {f"model/{name}": tensor for name, tensor in tensors.items()}


def site_name(name: str) -> str:
    """PEFT's parameter name to tx's: "…layers.0.self_attn.q_proj.lora_A.default.weight" to "layers.0.q_proj.lora_A"."""
    parts = name.split(".")
    side = next(part for part in parts if part.startswith("lora_"))
    if "lm_head" in parts:
        return f"unembed.{side}"
    return f"layers.{parts[parts.index('layers') + 1]}.{parts[parts.index(side) - 1]}.{side}"


def lora_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {site_name(name): p for name, p in model.named_parameters() if "lora_" in name}


def fresh_lora(model: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    config = PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).double().eval()
    parameters = lora_parameters(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape).float() * 0.08)
    return model, parameters


def make_data(vocab: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    data = []
    for length in (5, 11, 8):
        datum = {
            "tokens": rng.integers(0, vocab, length),
            "target_tokens": rng.integers(0, vocab, length),
            "targets_k": rng.integers(0, vocab, (length, 3)),
            "weights": rng.uniform(0, 1.5, length),
            "weights_k": rng.uniform(0, 1, (length, 3)),
            "advantages": rng.normal(0, 1, length) * (rng.uniform(size=length) > 0.2),
            "noise": rng.normal(0, 0.4, length),
            "mask": (np.arange(length) >= 2).astype(np.float64),
            "clip_low_threshold": rng.uniform(0.5, 0.9, length),
            "clip_high_threshold": rng.uniform(1.1, 1.5, length),
        }
        data.append(
            {k: v.astype(np.float32).astype(np.float64) if v.dtype.kind == "f" else v for k, v in datum.items()}
        )
    return data


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    return model(torch.from_numpy(tokens)[None]).logits[0]


def loss_of(case: str, lp: torch.Tensor, lp_k: torch.Tensor, datum: dict[str, torch.Tensor]) -> torch.Tensor:
    """One datum's loss by its formula."""
    if case == "cross_entropy":
        return -(datum["weights"] * lp).sum()
    if case == "cross_entropy_k":
        return -(datum["weights_k"] * lp_k).sum()
    q, adv = datum["logprobs"], datum["advantages"]
    ratio = torch.exp(lp - q)
    if case == "importance_sampling":
        return -(ratio * adv).sum()
    if case in ("ppo", "ppo_per_token"):
        low, high = 0.7, 1.1
        if case == "ppo_per_token":
            low, high = datum["clip_low_threshold"], datum["clip_high_threshold"]
        return -torch.minimum(ratio * adv, torch.clamp(ratio, low, high) * adv).sum()
    if case == "cispo":
        return -(torch.clamp(ratio, 0.5, 1.3).detach() * lp * adv).sum()
    if case == "dro":
        return -(lp * adv - 0.5 * 0.3 * (lp - q) ** 2).sum()
    if case == "gspo":
        mask = datum["mask"]
        sequence = torch.exp(((lp - q) * mask).sum() / mask.sum()).detach()
        token = sequence * lp.exp() / lp.exp().detach()
        return -torch.minimum(token * adv, torch.clamp(token, 0.9, 1.1) * adv).sum()
    known = datum["mask"]  # stable_reinforce
    weight = torch.where(known > 0, torch.clamp(ratio, max=1.2), torch.ones_like(ratio)).detach()
    k3 = (torch.exp(q - lp) - (q - lp) - 1) * known
    return (-weight * adv * lp + 0.1 * k3).sum()


CASES = (
    "cross_entropy",
    "cross_entropy_k",
    "importance_sampling",
    "ppo",
    "ppo_per_token",
    "cispo",
    "dro",
    "gspo",
    "stable_reinforce",
)


def total_loss(model: torch.nn.Module, data: list[dict[str, torch.Tensor]], case: str) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for datum in data:
        table = torch.log_softmax(logits_of(model, datum["tokens"].numpy()), -1)
        lp = table.gather(-1, datum["target_tokens"][:, None])[:, 0]
        total = total + loss_of(case, lp, table.gather(-1, datum["targets_k"]), datum)
    return total


def training(family: str, cases: tuple[str, ...]) -> None:
    base = tiny(family)
    config, out = hf_folder(base)
    model, parameters = fresh_lora(base)
    out |= {f"adapter/{name}": p.detach().T.contiguous().numpy() for name, p in parameters.items()}
    data = []
    for index, arrays in enumerate(make_data(SIZES["vocab_size"])):
        datum = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            logits = logits_of(model, arrays["tokens"])
            lp = torch.log_softmax(logits, -1).gather(-1, datum["target_tokens"][:, None])[:, 0]
        datum["logprobs"] = (lp + datum.pop("noise")).float().double()
        out[f"logits/{index}"] = logits.numpy()
        out |= {f"data/{index}/{name}": tensor.numpy() for name, tensor in datum.items()}
        data.append(datum)
    for case in cases:
        model.zero_grad()
        loss = total_loss(model, data, case)
        loss.backward()
        out[f"loss/{case}"] = loss.detach().numpy()
        out |= {f"grad/{case}/{name}": p.grad.T.contiguous().numpy() for name, p in parameters.items()}
    # Ten steps; the norm starts above clip_grad_norm and the learning rate changes half way.
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    norms, losses = [], []
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 3e-3 if step < 5 else 1e-3
        optimizer.zero_grad()
        loss = total_loss(model, data, "cross_entropy")
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), 15.0).item())
        optimizer.step()
    out |= {"adamw/norms": np.array(norms), "adamw/losses": np.array(losses)}
    out |= {f"adamw/weights/{name}": p.detach().T.contiguous().numpy() for name, p in parameters.items()}
    write(f"lora_{family}", config, out)


def write(name: str, config: str, arrays: dict[str, np.ndarray]) -> None:
    stored = {k: np.ascontiguousarray(v.astype(np.float32) if v.dtype == np.float64 else v) for k, v in arrays.items()}
    save_file(stored, HERE / f"{name}.safetensors", metadata={"config": json.dumps(json.loads(config))})
    print(name, (HERE / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    training("llama", CASES)
    training("qwen3", ("cross_entropy", "ppo", "gspo"))
