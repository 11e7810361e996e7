"""Write peft_llama, peft_qwen3, peft_moe and peft_mixed.safetensors: our exports as PEFT reads them, and its own.

Run with an environment that has torch, transformers 5 and peft, from the repository's root::

    python tests/golden/make_peft.py

Each file holds a tiny random base model, ``out/<case>``: an adapter, its export and PEFT's logits after loading it, and
``in/<case>``: a folder that PEFT wrote and its logits. Everything is computed in double precision.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.golden.make_lora import SIZES, hf_folder, lora_parameters, tiny, write  # noqa: E402
from tx.models.peft import CONFIG_FILE, WEIGHTS_FILE, export_files  # noqa: E402
from tx.types import LoraConfig, ModelState  # noqa: E402

GROUPS = {
    "all": (True, True, True),
    "attn": (True, False, False),
    "mlp": (False, True, False),
    "head": (False, False, True),
}
TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 12)


def base_of(family: str) -> torch.nn.Module:
    """The family's model; "mixed" is a mixture whose first layer is dense."""
    if family != "mixed":
        return tiny(family)
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(**SIZES, **experts, mlp_only_layers=[0], tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.8, 1.2) if "norm" in name else parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.double().eval()


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


def exported(family: str, rank: int, case: str) -> ModelState:
    """A random adapter on every site of the case's groups, by tx's names."""
    attn, mlp, head = GROUPS[case]
    rng = np.random.default_rng(5)
    weights: dict[str, np.ndarray] = {}

    def site(wanted: bool, name: str, inner: int, outer: int, rank: int, lead: tuple[int, ...] = ()) -> None:
        a, b = rng.normal(0, 0.15, (*lead, inner, rank)), rng.normal(0, 0.15, (*lead, rank, outer))
        if wanted:
            weights[f"{name}.lora_A"], weights[f"{name}.lora_B"] = a.astype(np.float32), b.astype(np.float32)

    for layer in range(2):
        for key, outer in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
            site(attn, f"layers.{layer}.{key}", 32, outer, rank)
        moe = family == "moe" or (family == "mixed" and layer == 1)
        prefix, ffn, lead = ("experts.", 16, (4,)) if moe else ("", 48, ())
        own = rank // 2 if moe else rank  # two experts per token
        for key, inner, outer in (("gate_proj", 32, ffn), ("up_proj", 32, ffn), ("down_proj", ffn, 32)):
            site(mlp, f"layers.{layer}.{prefix}{key}", inner, outer, own, lead)
    site(head, "unembed", 32, 96, rank)
    return ModelState(LoraConfig(rank, 0, attn, mlp, head), weights)


def load_export(family: str, folder: str, weights: bytes) -> torch.nn.Module:
    """PEFT's model with an export on it; every number of the export must have arrived."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base_of(family), folder).double().eval()
    assert not [w for w in caught if "missing" in str(w.message)], [str(w.message) for w in caught]
    for side in "AB":  # whatever PEFT stacks or moves, the sum of squares stays
        ours = sum((t.astype(np.float64) ** 2).sum() for name, t in load(weights).items() if f"lora_{side}" in name)
        theirs = sum((p.detach() ** 2).sum().item() for n, p in model.named_parameters() if f"lora_{side}" in n)
        np.testing.assert_allclose(
            theirs, ours, rtol=1e-12, err_msg=f"{family}: PEFT has other lora_{side} than we wrote"
        )
    return model


def out_cases(family: str, cases: tuple[str, ...]) -> dict[str, np.ndarray]:
    rank = 3 if family in ("llama", "qwen3") else 4
    out: dict[str, np.ndarray] = {}
    for case in cases:
        state = exported(family, rank, case)
        if case == "all":
            out |= {f"out/adapter/{name}": array for name, array in state.weights.items()}
        with tempfile.TemporaryDirectory() as folder:
            files = export_files(state, "tiny")
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            out[f"out/{case}/{CONFIG_FILE}"] = np.frombuffer(files[CONFIG_FILE], np.uint8)
            if case == "all":
                out[f"out/{case}/{WEIGHTS_FILE}"] = np.frombuffer(files[WEIGHTS_FILE], np.uint8)
            model = load_export(family, folder, files[WEIGHTS_FILE])
            out[f"out/{case}/logits"] = logits_of(model)
            if family == "moe" and case == "all":  # experts as PEFT stacks them, each module with its own A
                out |= saved("resaved", model)
    return out


def saved(case: str, model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """The folder that PEFT writes of its adapter, and its logits with the numbers that are in it."""
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.to(dtype).double())
    out = {f"in/{case}/logits": logits_of(model)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy.deepcopy(model).to(dtype).save_pretrained(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            out[f"in/{case}/{name}"] = np.frombuffer((Path(folder) / name).read_bytes(), np.uint8)
    return out


def foreign(family: str, seed: int, **settings: object) -> torch.nn.Module:
    """A base model with random numbers in a PEFT adapter of these settings."""
    model = get_peft_model(base_of(family), PeftConfig(task_type="CAUSAL_LM", **settings)).double().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape).float() * 0.3)
    return model


def step_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Every LoRA number after one step of AdamW on the tokens' cross-entropy."""
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    tokens = torch.from_numpy(TOKENS)
    logits = model(tokens[None]).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").backward()
    optimizer.step()
    return {f"in/rslora/stepped/{name}": p.detach().T.contiguous().numpy() for name, p in parameters.items()}


def in_cases(family: str) -> dict[str, np.ndarray]:
    if family == "llama":
        out = saved("plain", foreign("llama", 4, r=5, lora_alpha=10, target_modules=["q_proj", "v_proj"]))
        patterns = {
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
            "alpha_pattern": {"layers.0.mlp.down_proj": 5},
        }
        modules = ["q_proj", "v_proj", "down_proj"]
        out |= saved("patterns", foreign("llama", 5, r=4, lora_alpha=8, target_modules=modules, **patterns))
        rslora = foreign("llama", 6, r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "o_proj"])
        out |= saved("rslora", rslora, torch.float16)
        return out | step_of(rslora)
    if family == "qwen3":
        modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
        one_layer = {"target_modules": modules, "layers_to_transform": [1], "layers_pattern": "layers"}
        out = saved("layers", foreign("qwen3", 7, r=2, lora_alpha=2, **one_layer), torch.bfloat16)
        return out | saved("head", foreign("qwen3", 8, r=2, lora_alpha=4, target_modules=["k_proj", "lm_head"]))
    if family == "moe":
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return saved(
            "stacked", foreign("moe", 9, r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=stacks)
        )
    return {}


if __name__ == "__main__":
    for family in ("llama", "qwen3", "moe", "mixed"):
        config, arrays = hf_folder(base_of(family))
        arrays["tokens"] = TOKENS
        arrays |= out_cases(family, tuple(GROUPS) if family != "mixed" else ("all",))
        arrays |= in_cases(family)
        write(f"peft_{family}", config, arrays)
