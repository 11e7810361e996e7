"""What the programs that look at a device from inside share: models of random weights, and what the device can do.

Not a program. Peaks are those of simple programs, measured when asked for: on a machine that has other work to do they
mean nothing.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tx.layers.sharding import sharding
from tx.layers.weights import Weight
from tx.models.config import ModelConfig
from tx.models.loading import LoadedModel, assemble, load_model
from tx.models.registry import MODELS
from tx.worker.mesh import make_mesh

QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
QWEN3_0_6B = QWEN3_4B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}
RANDOM = {"qwen3-0.6b": QWEN3_0_6B, "qwen3-4b": QWEN3_4B, "qwen3-8b": QWEN3_8B}

ON_GPU = jax.default_backend() != "cpu"


def numbers(text: str) -> list[int]:
    """The value of a flag such as ``--lengths 4096,16384``."""
    return [int(part) for part in text.split(",")]


# ---- models ---------------------------------------------------------------------------------------------------------


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """A folder or ``--random``, and the dtype."""
    parser.add_argument("folder", nargs="?", type=Path, help="a model's folder")
    parser.add_argument("--random", help=f"instead: {', '.join(RANDOM)}, or a folder whose config.json says the sizes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--matmul", type=int, default=8192 if ON_GPU else 1536, help="rows and columns for the peak")


def model_of(flags: argparse.Namespace) -> LoadedModel:
    """The model that the flags name, on one device."""
    if (flags.folder is None) == (flags.random is None):
        raise SystemExit("give either a model's folder or --random")
    dtype = jnp.dtype(flags.dtype)
    if flags.random is None:
        model = load_model(flags.folder, make_mesh(), dtype)
    else:
        hf = RANDOM.get(flags.random) or json.loads((Path(flags.random) / "config.json").read_text(encoding="utf-8"))
        model = random_model(hf, dtype, make_mesh())
    if model.config.num_experts:
        raise SystemExit("a mixture of experts computes with as many experts as its rows choose: not counted here")
    return model


def random_model(hf: dict[str, Any], dtype: Any, mesh: Mesh) -> LoadedModel:
    """A model of a Hugging Face config's sizes, the same on every mesh, with weights that were never in a file."""
    config = ModelConfig.from_hf(hf)
    abstract = nnx.eval_shape(lambda: MODELS[config.architecture](config, mesh))
    graphdef, state = nnx.split(abstract)
    loaded = []
    for index, (path, weight) in enumerate(dict(nnx.to_flat_state(state)).items()):
        array = random_weight(weight, jax.random.key(index), dtype)
        placed = jax.device_put(array, sharding(weight.axes, array.shape, mesh))
        loaded.append((path, weight.replace(placed)))
    return assemble(config, mesh, graphdef, nnx.from_flat_state(loaded), dtype)


def num_multiplied(model: LoadedModel) -> int:
    """Parameters that a position is multiplied with: all but an embedding table that is not the head as well."""
    config = model.config
    return model.num_params - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def random_weight(weight: Weight, key: jax.Array, dtype: Any) -> jax.Array:
    """Of unit gain; a vector is a norm's or a bias."""
    shape = weight.get_value().shape
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    return jax.jit(lambda key: jax.random.normal(key, shape, dtype) / math.sqrt(shape[-2]))(key)


# ---- what the device can do -----------------------------------------------------------------------------------------


def seconds_per_call(program: Callable[..., Any], *arguments: Any, calls: int = 8, repeats: int = 3) -> float:
    """Best of ``repeats`` means over ``calls`` queued calls of a compiled program."""
    jax.block_until_ready(program(*arguments))
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            result = program(*arguments)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def read_bandwidths(num_bytes: int) -> dict[str, float]:
    """Bytes per second of three programs that do little but read ``num_bytes`` of float32."""
    width = 16384
    array = jnp.ones((num_bytes // 4 // width, width), jnp.float32)
    row, column = jnp.ones((1, array.shape[0])), jnp.ones((width, 1))
    product = jax.jit(jnp.dot)
    return {
        "maximum": array.nbytes / seconds_per_call(jax.jit(lambda x: jnp.max(x, axis=0)), array),
        "row product": array.nbytes / seconds_per_call(product, row, array),
        "column product": array.nbytes / seconds_per_call(product, array, column),
    }


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes per second, read and written, of an update in place: no page is touched for the first time."""
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = update(jnp.ones(num_bytes // 4, jnp.float32))
    best = math.inf
    for _ in range(8):
        started = time.perf_counter()
        array = jax.block_until_ready(update(array))
        best = min(best, time.perf_counter() - started)
    return 2 * array.nbytes / best


def matmul_peak(size: int, dtype: Any) -> float:
    """FLOP per second of one large product."""
    square = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=dtype))
    return 2 * size**3 / seconds_per_call(product, square, square)
