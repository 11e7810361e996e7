"""What the rooflines share: random models are like loaded ones, and which models are refused."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from benchmarks import device_probe as probe
from tests.support.tiny_models import CONFIGS
from tx.models.loading import load_model
from tx.worker.mesh import make_mesh


def test_a_random_model_has_the_shapes_of_a_loaded_one(tiny_qwen3):
    loaded = load_model(tiny_qwen3, make_mesh(), jnp.bfloat16)
    made = probe.random_model(CONFIGS["qwen3"], jnp.bfloat16, make_mesh())
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.weights) for model in (loaded, made)]
    assert kinds[0] == kinds[1]
    assert (made.num_params, made.weight_bytes) == (loaded.num_params, loaded.weight_bytes)


def test_an_embedding_table_is_multiplied_only_where_it_is_the_head_too(tiny_qwen3, tiny_llama3):
    tied, untied = (load_model(folder, make_mesh(), jnp.float32) for folder in (tiny_qwen3, tiny_llama3))
    assert probe.num_multiplied(tied) == tied.num_params
    assert probe.num_multiplied(untied) == untied.num_params - 2048 * 64


def test_the_sizes_of_the_named_models():
    # Parameters of the published checkpoints, a head that is the embedding counted once.
    published = {"qwen3-0.6b": 0.596e9, "qwen3-4b": 4.022e9, "qwen3-8b": 8.191e9}
    assert published.keys() == probe.RANDOM.keys()
    for name, hf in probe.RANDOM.items():
        embed, ffn, heads, kv = (
            hf[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        )
        layer = embed * hf["head_dim"] * 2 * (heads + kv) + 3 * embed * ffn
        tables = embed * hf["vocab_size"] * (1 if hf["tie_word_embeddings"] else 2)
        assert layer * hf["num_hidden_layers"] + tables == pytest.approx(published[name], rel=2e-3)


def flags(folder, random):
    return argparse.Namespace(folder=folder, random=random, dtype="float32")


def test_one_source_is_needed(tiny_qwen3):
    for folder, random in ((None, None), (tiny_qwen3, "qwen3-4b")):
        with pytest.raises(SystemExit, match="either a model's folder or --random"):
            probe.model_of(flags(folder, random))


def test_a_mixture_of_experts_is_refused(tiny_qwen3_moe):
    with pytest.raises(SystemExit, match="mixture of experts"):
        probe.model_of(flags(tiny_qwen3_moe, None))
