"""A model's adapter as a PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``. Pure numpy.

An export loads in PEFT and in vLLM and gives the same logits. Both scale every module by ``lora_alpha / r`` with one r,
while tx gives experts a smaller rank of their own (``tx.layers.lora.expert_rank``). So experts are written with zero
columns up to r and their B times ``r / expert rank``, which makes the product the same; ``tx.models.peft_import``
undoes both. That is exact when the ratio is a power of two, as for the usual ranks, and within one rounding otherwise.
"""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save

from tx.types import ModelState

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

INIT_NOTE = "A uniform in +-1/sqrt(in_features), B zero; scaling lora_alpha / r"

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."


def export_files(state: ModelState, base_model: str) -> dict[str, bytes]:
    """The folder's files by name, of the weights only (moments and step are no part of the format)."""
    modules, parameters = _targets(state)
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": state.lora.rank,
        "lora_alpha": _whole(state.lora.alpha),
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,  # PEFT's default initialisation is ours: A uniform, B zero
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    metadata = {"format": "pt", "init": INIT_NOTE}
    return {
        CONFIG_FILE: json.dumps(config, indent=2).encode() + b"\n",
        WEIGHTS_FILE: save(_to_tensors(state), metadata),
    }


def _to_tensors(state: ModelState) -> dict[str, np.ndarray]:
    """PEFT's tensors, [r, in] and [out, r], one per expert."""
    tensors: dict[str, np.ndarray] = {}
    for name, array in state.weights.items():
        site, side = name.rsplit(".lora_", 1)
        suffix = f".lora_{side}.weight"
        if array.ndim == 3:
            for expert, part in enumerate(_widened(array, side, state.lora.rank)):
                tensors[_PREFIX + _module(site, expert) + suffix] = _transposed(part)
        else:
            tensors[_PREFIX + _module(site) + suffix] = _transposed(array)
    return tensors


def _targets(state: ModelState) -> tuple[list[str], list[str]]:
    """(target_modules, target_parameters). Explicit: without them PEFT attaches only its own default modules.

    Modules are named in full where only some layers have them. PEFT takes the MLP's names for experts alone if the
    model has any, so the dense MLPs of such a model are named by their parameters.
    """
    sites = sorted(name.removesuffix(".lora_A") for name in state.weights if name.endswith(".lora_A"))
    has_experts = any(".experts." in site for site in sites)
    modules: set[str] = set()
    parameters = []
    for site in sites:
        short = _module(site).rpartition(".")[2]
        if has_experts and short in _MLP and ".experts." not in site:
            parameters.append(_module(site) + ".weight")
        elif state.lora.sites is not None and ".experts." not in site:
            modules.add(_module(site))
        else:
            modules.add(short)
    order = (*_ATTENTION, *_MLP, "lm_head")
    return sorted(modules, key=lambda name: (order.index(name.rpartition(".")[2]), name)), parameters


def _module(site: str, expert: int = 0) -> str:
    """ "layers.3.experts.up_proj" is "model.layers.3.mlp.experts.0.up_proj", "unembed" is "lm_head"."""
    if site == "unembed":
        return "lm_head"
    _, layer, key = site.split(".", 2)
    if key.startswith("experts."):
        return f"model.layers.{layer}.mlp.experts.{expert}.{key.removeprefix('experts.')}"
    return f"model.layers.{layer}.{'self_attn' if key in _ATTENTION else 'mlp'}.{key}"


def _widened(array: np.ndarray, side: str, rank: int) -> np.ndarray:
    """An expert site's array at the adapter's common rank: zero columns, B scaled by the ratio of the ranks."""
    axis = 2 if side == "A" else 1
    own = array.shape[axis]
    padding = [(0, 0)] * 3
    padding[axis] = (0, rank - own)
    wide = np.pad(array, padding)
    return wide if side == "A" else wide * np.float32(rank / own)


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T.astype(np.float32, copy=False))


def _whole(alpha: float) -> int | float:
    """PEFT types lora_alpha as int."""
    return int(alpha) if alpha == int(alpha) else alpha
