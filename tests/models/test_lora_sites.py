"""The sites are exactly the model's linear layers, with their sizes."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from tx.models.loading import read_config
from tx.models.lora_sites import lora_sites


@pytest.mark.parametrize("family", ["tiny_qwen3", "tiny_qwen3_moe", "tiny_llama3"])
def test_every_projection_of_the_checkpoint_is_a_site(family, request):
    folder = request.getfixturevalue(family)
    expected = {}
    with safe_open(folder / "model.safetensors", framework="np") as file:
        for key in file.keys():  # noqa: SIM118
            if not key.endswith("_proj.weight"):
                continue
            parts, (outer, inner) = key.split("."), file.get_slice(key).get_shape()
            prefix = "experts." if "experts" in parts else ""
            name = f"layers.{parts[2]}.{prefix}{parts[-2]}"
            num_experts = expected.get(name, (0,))[0] + 1 if prefix else None
            expected[name] = (num_experts, inner, outer)
    config = read_config(folder)
    expected["unembed"] = (None, config.hidden_size, config.vocab_size)
    sites = lora_sites(config)
    assert {site.name: (site.num_experts, site.in_features, site.out_features) for site in sites} == expected
    assert len(sites) == len(expected)
    for site in sites:
        assert site.name == (site.key if site.layer is None else f"layers.{site.layer}.{site.key}")
        assert site.group == ("unembed" if site.layer is None else "attn" if site.key[0] in "qkvo" else "mlp")


def test_dense_layers_of_a_mixture_model_have_dense_sites(tiny_qwen3_moe):
    from dataclasses import replace

    config = replace(read_config(tiny_qwen3_moe), moe_layers=(False, True))
    names = {site.name: site.out_features for site in lora_sites(config)}
    assert names["layers.0.gate_proj"] == config.intermediate_size
    assert names["layers.1.experts.gate_proj"] == config.moe_intermediate_size
