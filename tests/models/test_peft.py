"""Exports: PEFT attaches all of them and gets our logits (the goldens of make_peft.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load

from tests.support.golden_lora import Golden, adapter_logits
from tx.models.peft import CONFIG_FILE, WEIGHTS_FILE, export_files
from tx.types import LoraConfig, ModelState

RANKS = {"llama": 3, "qwen3": 3, "moe": 4, "mixed": 4}
GROUPS = {
    "all": (True, True, True),
    "attn": (True, False, False),
    "mlp": (False, True, False),
    "head": (False, False, True),
}
CASES = [(family, case) for family in ("llama", "qwen3", "moe") for case in GROUPS] + [("mixed", "all")]


def state_of(golden: Golden, family: str, case: str = "all") -> ModelState:
    attn, mlp, head = GROUPS[case]

    def trained(name: str) -> bool:
        module = name.split(".")[-2]
        return head if module == "unembed" else attn if module in ("q_proj", "k_proj", "v_proj", "o_proj") else mlp

    weights = {name: array for name, array in golden.group("out/adapter").items() if trained(name)}
    return ModelState(LoraConfig(RANKS[family], 0, attn, mlp, head), weights)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_c07_peft_gets_our_logits_from_our_export(goldens: dict[str, Golden], family: str, case: str):
    """The golden's logits are PEFT's after PeftModel.from_pretrained of a folder that export_files wrote."""
    golden = goldens[family]
    ours = adapter_logits(golden, state_of(golden, family, case))
    np.testing.assert_allclose(ours, golden.arrays[f"out/{case}/logits"], atol=1e-4)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_c07_the_export_is_the_one_that_peft_has_read(goldens: dict[str, Golden], family: str, case: str):
    golden = goldens[family]
    files = export_files(state_of(golden, family, case), "tiny")
    assert json.loads(files[CONFIG_FILE]) == json.loads(golden.arrays[f"out/{case}/{CONFIG_FILE}"].tobytes())
    ours, theirs = load(files[WEIGHTS_FILE]), load(golden.arrays[f"out/all/{WEIGHTS_FILE}"].tobytes())
    assert case != "all" or ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tobytes() == theirs[name].tobytes(), name


def test_c07_target_modules_are_spelled_out(goldens: dict[str, Golden]):
    config = json.loads(export_files(state_of(goldens["moe"], "moe"), "tiny")[CONFIG_FILE])
    assert config["target_modules"] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    ]
    assert (config["r"], config["lora_alpha"]) == (4, 32)


def test_experts_have_the_names_and_shapes_that_vllm_packs(goldens: dict[str, Golden]):
    """Each expert's three modules by name, all of the rank that the config says."""
    golden = goldens["moe"]
    tensors = load(export_files(state_of(golden, "moe", "mlp"), "tiny")[WEIGHTS_FILE])
    prefix = "base_model.model.model.layers"
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{prefix}.{layer}.mlp.experts.{expert}.{module}.lora_{side}.weight": shape
        for layer in range(2)
        for expert in range(4)
        for module, inner, outer in (("gate_proj", 32, 16), ("up_proj", 32, 16), ("down_proj", 16, 32))
        for side, shape in (("A", (4, inner)), ("B", (outer, 4)))
    }


def test_modules_that_only_some_layers_have_are_named_in_full(goldens: dict[str, Golden]):
    whole = state_of(goldens["llama"], "llama", "attn")
    sites = ("layers.0.q_proj", "layers.1.v_proj")
    weights = {name: array for name, array in whole.weights.items() if name.rpartition(".")[0] in sites}
    lora = LoraConfig(3, 0, True, False, False, sites=sites)
    config = json.loads(export_files(ModelState(lora, weights), "tiny")[CONFIG_FILE])
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
