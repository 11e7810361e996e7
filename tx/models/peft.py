"""A model's adapter to a PEFT folder and back: ``adapter_config.json`` and ``adapter_model.safetensors``. Pure numpy.

An export loads in PEFT and in vLLM and gives the same logits. Both scale every module by ``lora_alpha / r`` with one r,
while tx gives experts a smaller rank of their own (``tx.layers.lora.expert_rank``). So experts are written with zero
columns up to r and their B times ``r / expert rank``, which makes the product the same; reading undoes both. That is
exact when the ratio is a power of two, as it is for the usual ranks, and within one rounding otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tx.errors import InvalidInput, Unsupported
from tx.types import LoraConfig, ModelState

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

INIT_NOTE = "A uniform in +-1/sqrt(in_features), B zero; scaling lora_alpha / r with lora_alpha 32"

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?:model\.layers\.(?P<layer>\d+)\.(?:self_attn\.(?P<attn>[qkvo]_proj)"
    r"|mlp\.(?:experts\.(?P<expert>\d+)\.)?(?P<mlp>(?:gate|up|down)_proj))|(?P<head>lm_head))\.lora_(?P<side>[AB])\.weight"
)

# Fields of adapter_config.json that change the maths, with the values that mean "no change".
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
}


def export_files(state: ModelState, base_model: str) -> dict[str, bytes]:
    """The folder's files by name, of the weights only (moments and step are no part of the format)."""
    tensors, modules = _to_tensors(state)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": state.lora.rank,
        "lora_alpha": _whole(state.lora.alpha),
        # Explicit: without the list, PEFT attaches only its own default modules of the family and drops the rest.
        "target_modules": modules,
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
    return {CONFIG_FILE: json.dumps(config, indent=2).encode() + b"\n", WEIGHTS_FILE: save(tensors, metadata)}


def import_files(files: Mapping[str, bytes], num_experts_per_tok: int = 0) -> ModelState:
    """The adapter in a folder's files, with no moments and step 0; InvalidInput names what can't be honoured.

    ``num_experts_per_tok`` of the base model says which rank its experts have. The seed is not in the format: 0.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise InvalidInput("path", f"an adapter folder without {name}", f"{CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(files[CONFIG_FILE])
        tensors = load(files[WEIGHTS_FILE])
    except (ValueError, SafetensorError) as error:
        raise InvalidInput("path", f"an adapter folder that can't be read ({error})", "a PEFT LoRA adapter") from error
    rank, alpha = _checked_config(config)
    # Sorted: safetensors hands them out in no fixed order, and the same file should get the same error.
    weights = _from_tensors(dict(sorted(tensors.items())), rank, num_experts_per_tok)
    keys = {name.split(".")[-2] for name in weights}
    lora = LoraConfig(
        rank=rank,
        seed=0,
        train_attn=not keys.isdisjoint(_ATTENTION),
        train_mlp=not keys.isdisjoint(_MLP),
        train_unembed="unembed" in keys,
        alpha=alpha,
    )
    return ModelState(lora, weights)


def _checked_config(config: Any) -> tuple[int, float]:
    """(rank, alpha) of an adapter_config.json that says nothing else that changes the maths."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise Unsupported(f"{CONFIG_FILE}.peft_type", got, "LORA")
    for name, neutral in _NEUTRAL.items():
        if config.get(name, neutral[0]) not in neutral:
            raise Unsupported(f"{CONFIG_FILE}.{name}", config[name], f"{neutral[0]!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise InvalidInput(f"{CONFIG_FILE}.r", rank, "a whole number, at least 1")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise InvalidInput(f"{CONFIG_FILE}.lora_alpha", alpha, "a number above 0")
    return rank, float(alpha)


def _to_tensors(state: ModelState) -> tuple[dict[str, np.ndarray], list[str]]:
    """PEFT's tensors ([r, in] and [out, r], one per expert) and the modules they belong to."""
    tensors: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    for name, array in state.weights.items():
        site, side = name.rsplit(".lora_", 1)
        layer, key = _split(site)
        module = key.rsplit(".", 1)[-1]
        modules.add(module)
        suffix = f".lora_{side}.weight"
        if layer is None:
            tensors[f"{_PREFIX}lm_head{suffix}"] = _transposed(array)
        elif key.startswith("experts."):
            for expert, part in enumerate(_widened(array, side, state.lora.rank)):
                tensors[f"{_PREFIX}model.layers.{layer}.mlp.experts.{expert}.{module}{suffix}"] = _transposed(part)
        else:
            block = "self_attn" if module in _ATTENTION else "mlp"
            tensors[f"{_PREFIX}model.layers.{layer}.{block}.{module}{suffix}"] = _transposed(array)
    order = (*_ATTENTION, *_MLP, "lm_head")
    return tensors, sorted(modules, key=order.index)


def _split(site: str) -> tuple[int | None, str]:
    """ "layers.3.experts.up_proj" is (3, "experts.up_proj"); "unembed" is (None, "lm_head")."""
    if site == "unembed":
        return None, "lm_head"
    _, layer, key = site.split(".", 2)
    return int(layer), key


def _widened(array: np.ndarray, side: str, rank: int) -> np.ndarray:
    """An expert site's array at the adapter's common rank: zero columns, B scaled by the ratio of the ranks."""
    axis = 2 if side == "A" else 1
    own = array.shape[axis]
    padding = [(0, 0)] * 3
    padding[axis] = (0, rank - own)
    wide = np.pad(array, padding)
    return wide if side == "A" else wide * np.float32(rank / own)


def _from_tensors(tensors: Mapping[str, np.ndarray], rank: int, num_experts_per_tok: int) -> dict[str, np.ndarray]:
    """Sites' arrays by tx's names; per-expert tensors become one array each."""
    weights: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise Unsupported(f"{WEIGHTS_FILE}.{name}", "a tensor", "LoRA on attention, MLP, experts and lm_head")
        side = match["side"]
        if tensor.ndim != 2 or tensor.shape[0 if side == "A" else 1] != rank:
            raise InvalidInput(f"{WEIGHTS_FILE}.{name}", f"shape {tensor.shape}", f"rank {rank} as {CONFIG_FILE} says")
        array = _transposed(tensor)
        if match["head"]:
            weights[f"unembed.lora_{side}"] = array
        elif match["expert"] is not None:
            site = f"layers.{int(match['layer'])}.experts.{match['mlp']}.lora_{side}"
            experts.setdefault(site, {})[int(match["expert"])] = array
        else:
            weights[f"layers.{int(match['layer'])}.{match['attn'] or match['mlp']}.lora_{side}"] = array
    own = max(1, rank // max(1, num_experts_per_tok))
    for site, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            raise InvalidInput(f"{WEIGHTS_FILE}.{site}", f"experts {sorted(parts)}", "every expert, counted from 0")
        weights[site] = _narrowed(np.stack([parts[expert] for expert in range(len(parts))]), site, own)
    return weights


def _narrowed(array: np.ndarray, site: str, own: int) -> np.ndarray:
    """Undo ``_widened``; an adapter that uses more than tx's expert rank can't be held."""
    axis = 2 if site.endswith("A") else 1
    rank = array.shape[axis]
    kept, rest = np.split(array, [own], axis=axis)
    if rest.any():
        raise Unsupported(f"{WEIGHTS_FILE}.{site}", f"experts of rank {rank}", f"experts of rank {own}")
    return kept if axis == 2 else kept / np.float32(rank / own)


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T.astype(np.float32, copy=False))


def _whole(alpha: float) -> int | float:
    """PEFT types lora_alpha as int."""
    return int(alpha) if alpha == int(alpha) else alpha
