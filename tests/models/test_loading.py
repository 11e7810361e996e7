"""Strict loading: every tensor used, every weight found; sharded files, tied heads, dtypes, progress (lessons C13)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file, save_file

from tests.support.tiny_models import write_tiny_model
from tx.errors import StartupError
from tx.layers.sharding import MESH_AXES
from tx.models.loading import _check_mesh, load_model, read_config
from tx.worker.mesh import make_mesh


def _load(folder: Path, dtype=jnp.float32, **options):
    return load_model(folder, make_mesh(), dtype, **options)


@pytest.fixture
def edit(tmp_path):
    """Copy a model folder with its tensors changed by a function."""

    def copy(source: Path, change) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return copy


def _leaves(model) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(model.weights)]


def test_every_value_arrives(tiny_qwen3_moe):
    """The sum over the model is the sum over the files, and each kernel is its tensor transposed."""
    model, tensors = _load(tiny_qwen3_moe), load_file(tiny_qwen3_moe / "model.safetensors")
    assert model.num_params == sum(tensor.size for tensor in tensors.values())
    assert model.weight_bytes == 4 * model.num_params
    assert np.isclose(sum(leaf.sum() for leaf in _leaves(model)), sum(t.sum() for t in tensors.values()), rtol=1e-4)
    layer = model.weights["layers"][1]
    assert np.array_equal(
        layer["self_attn"]["k_proj"]["weight"].get_value(), tensors["model.layers.1.self_attn.k_proj.weight"].T
    )
    for expert in range(4):
        tensor = tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        assert np.array_equal(layer["mlp"]["experts"]["up_proj"]["weight"].get_value()[expert], tensor.T)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight", "lm_head.weight"])
def test_c13_a_missing_tensor_fails(tiny_qwen3_moe, edit, name):
    folder = edit(tiny_qwen3_moe, lambda tensors: tensors.pop(name))
    with pytest.raises(StartupError, match=rf"lacks 1 tensor\(s\): {name}"):
        _load(folder)


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_c13_an_unread_tensor_fails(tiny_llama3, edit, name):
    folder = edit(tiny_llama3, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    with pytest.raises(StartupError, match=rf"has unexpected 1 tensor\(s\): {name}"):
        _load(folder)


def test_wrong_shapes_and_types_fail(tiny_qwen3, edit):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = edit(tiny_qwen3, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    with pytest.raises(StartupError, match=rf"{name} has shape \[64, 128\], the config says \[128, 64\]"):
        _load(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: np.zeros((128, 64), np.int8)}, folder / "model.safetensors")
    with pytest.raises(StartupError, match=rf"{name} is I8, accepted: F32, BF16, F16"):
        _load(folder)


def test_a_tied_head_may_be_stored_twice_but_not_differently(tiny_qwen3, edit):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    folder = edit(tiny_qwen3, add_head)
    assert _load(folder).num_params == _load(tiny_qwen3).num_params
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(StartupError, match=r"lm_head.weight differs"):
        _load(folder)


def test_sharded_files(tiny_qwen3, tmp_path):
    tensors = load_file(tiny_qwen3 / "model.safetensors")
    for file in ("config.json", "generation_config.json"):
        shutil.copy(tiny_qwen3 / file, tmp_path / file)
    names, index = sorted(tensors), {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, tmp_path / file)
        index |= dict.fromkeys(names[part::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for one, other in zip(_leaves(_load(tmp_path)), _leaves(_load(tiny_qwen3)), strict=True):
        assert np.array_equal(one, other)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StartupError, match="model-00002-of-00003"):
        _load(tmp_path)


def test_bfloat16_on_disk(tiny_qwen3, edit):
    def narrow(tensors):
        tensors.update({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})

    folder = edit(tiny_qwen3, narrow)
    wide, low = _load(folder), _load(folder, jnp.bfloat16)
    assert low.weight_bytes < 0.51 * wide.weight_bytes
    for one, other in zip(_leaves(wide), _leaves(low), strict=True):
        assert np.array_equal(one, other)


def test_progress_counts_every_byte(tiny_qwen3_moe):
    calls = []
    _load(tiny_qwen3_moe, progress=lambda done, total: calls.append((done, total)))
    tensors = load_file(tiny_qwen3_moe / "model.safetensors")
    assert calls[-1][0] == calls[-1][1] == sum(tensor.nbytes for tensor in tensors.values())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_damaged_folders_are_one_sentence(tiny_qwen3, edit, tmp_path):
    folder = edit(tiny_qwen3, lambda tensors: None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(StartupError, match="can't read the weights"):
        _load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(StartupError, match=r"neither model.safetensors nor"):
        _load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(StartupError, match=r"can't read .*config.json"):
        read_config(folder)
    with pytest.raises(StartupError, match=r"can't read .*config.json"):
        read_config(tmp_path / "nowhere")


def test_eos_ids_are_the_union(tiny_qwen3):
    assert read_config(tiny_qwen3).eos_token_ids == (2022, 2024)


def test_the_graph_is_hashable_once_and_equal_across_loads(tiny_qwen3):
    first, second = _load(tiny_qwen3), _load(tiny_qwen3)
    assert first.graphdef == second.graphdef
    assert hash(first.graphdef) == hash(second.graphdef)


@pytest.mark.parametrize(
    ("sizes", "overrides", "message"),
    [
        ((1, 1, 1, 8), {}, "4 attention heads don't divide over --tensor-parallel-size 8"),
        ((1, 1, 4, 1), {}, "no experts don't divide over --expert-parallel-size 4"),
        ((1, 3, 1, 1), {}, "hidden size 64 doesn't divide over fsdp size 3"),
        ((1, 1, 1, 4), {"intermediate_size": 130}, "MLP width 130 doesn't divide over --tensor-parallel-size 4"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_the_numbers(
    tiny_qwen3, tmp_path, sizes, overrides, message
):
    config = read_config(write_tiny_model(tmp_path, "qwen3", **overrides))
    with pytest.raises(StartupError, match=message):
        _check_mesh(config, AbstractMesh(sizes, MESH_AXES), True)  # sizes alone: this process has one device
