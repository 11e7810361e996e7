"""How close a decode step comes to what this device can do, in one process and without a server: prints a table.

usage: python benchmarks/decode_roofline.py FOLDER [--batches 1,8,16]
       python benchmarks/decode_roofline.py --random qwen3-4b --dtype bfloat16 [--batches 1,8,64,256]

A step must read every matrix of the model once and the keys and values of every row's context. Those bytes over the
step's time are the bandwidth it reached, to be compared with the best of three simple programs that read an array too
large for any cache (an update in place is printed too, but a step writes next to nothing). Past some batch the products
take longer than the reading: "of limit" compares with whichever of the two, at measured peaks, takes longer. Both are
measured once, at the start: on a machine that has other work to do the percentages mean nothing.

A step is timed as part of ``Generator.slice`` with all that belongs to it (sampling, the look of the host), while all
rows decode: prompts are prefilled, none has ended, and every program was compiled by a first run of the same requests.
Random weights (no download: sizes are all that matters here) make the same work as trained ones.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tx.layers.kv_cache import num_blocks
from tx.layers.weights import Weight
from tx.models.config import ModelConfig
from tx.models.loading import LoadedModel, assemble, load_model
from tx.models.registry import MODELS
from tx.types import SampleRequest, SamplingParams
from tx.worker.generator import Generator
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
RANDOM = {"qwen3-4b": QWEN3_4B, "qwen3-8b": QWEN3_8B}

ON_GPU = jax.default_backend() != "cpu"


def random_model(hf: dict[str, Any], dtype: Any) -> LoadedModel:
    """A model of a Hugging Face config's sizes on one device, with random weights that were never in a file."""
    config, mesh = ModelConfig.from_hf(hf), make_mesh()
    abstract = nnx.eval_shape(lambda: MODELS[config.architecture](config, mesh))
    graphdef, state = nnx.split(abstract)
    loaded = []
    for index, (path, weight) in enumerate(dict(nnx.to_flat_state(state)).items()):
        loaded.append((path, weight.replace(random_weight(weight, jax.random.key(index), dtype))))
    return assemble(config, mesh, graphdef, nnx.from_flat_state(loaded), dtype)


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


# ---- what a step does -----------------------------------------------------------------------------------------------


def requests(batch: int, flags: argparse.Namespace, vocab_size: int) -> list[SampleRequest]:
    """Prompts that share nothing, and no reason to stop before ``--tokens``."""
    rng = np.random.default_rng(batch)
    prompts = rng.integers(0, vocab_size, (batch, flags.prompt), dtype=np.int32)
    params = [SamplingParams(max_tokens=flags.tokens, seed=index, stop_on_eos=False) for index in range(batch)]
    return [SampleRequest(prompt, 1, each) for prompt, each in zip(prompts, params, strict=True)]


def slices(generator: Generator, work: list[SampleRequest]) -> tuple[list[float], list[int]]:
    """Seconds of every slice until all requests are done, and in which slice each of them was."""
    for job_id, request in enumerate(work):
        generator.submit(job_id, request, None)
    seconds, ends = [], []
    while generator.has_work:
        started = time.perf_counter()
        finished = generator.slice()
        seconds.append(time.perf_counter() - started)
        for outcome in finished:
            if outcome.error is not None:
                raise outcome.error
        ends += [len(seconds) - 1] * len(finished)
    return seconds, ends


def steady(seconds: list[float], ends: list[int], row_slices: int) -> list[float]:
    """The slices in which every row decoded and nothing was prefilled.

    A row is in ``row_slices`` slices, give or take one. The first to be seated is the first to end: between the
    seating of the last and the end of the first all rows are there.

    Example: rows of 10 slices that end in slices 11, 11 and 14: the last was seated in 14 - 10, all decode in 6 … 10.
    """
    window = seconds[max(ends) - row_slices + 2 : min(ends)]
    if len(window) < 3:
        raise SystemExit(f"only {len(window)} slices in which all {len(ends)} rows decode: raise --tokens")
    return window


def step_seconds(model: LoadedModel, batch: int, flags: argparse.Namespace) -> float:
    """Median time of one step of ``batch`` rows."""
    generator = Generator(
        model,
        max_slots=batch,
        max_context=flags.prompt + flags.tokens,
        kv_blocks=2 * batch * num_blocks(flags.prompt + flags.tokens),
        eos_token_ids=(),
        detokenize=lambda ids: "",
        slice_tokens=flags.slice_tokens,
        slice_s=math.inf,
    )
    work = requests(batch, flags, model.config.vocab_size)
    slices(generator, work)
    timed = [steady(*slices(generator, work), flags.tokens // flags.slice_tokens) for _ in range(flags.repeats)]
    return statistics.median(second for window in timed for second in window) / flags.slice_tokens


def step_bytes(model: LoadedModel, batch: int, context: float) -> float:
    """Bytes that a step must read: every matrix once (of an untied embedding only a few rows), and the context's KV."""
    config, itemsize = model.config, jnp.dtype(model.dtype).itemsize
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * itemsize
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return model.weight_bytes - table + batch * context * per_token


def step_flops(model: LoadedModel, batch: int, context: float) -> float:
    """Multiplications and additions of a step."""
    config = model.config
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 4 * context * config.num_layers * config.num_heads * config.head_dim
    return batch * (2 * (model.num_params - table) + attention)


# ---- the table ------------------------------------------------------------------------------------------------------

HEAD = "batch  ms/step     tok/s  GB/step     GB/s  of bandwidth  TFLOP/s  of limit"


def report(model: LoadedModel, flags: argparse.Namespace) -> None:
    """Measure the device, then a step of each batch size."""
    reads = read_bandwidths(flags.probe_mb * 2**20)
    copy = copy_bandwidth(flags.probe_mb * 2**20)
    peak = matmul_peak(flags.matmul, model.dtype)
    bandwidth = max(reads.values())
    said = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in reads.items())
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: reads at {said} GB/s, copies at {copy / 1e9:.1f} GB/s"
    )
    print(f"{jnp.dtype(model.dtype)} product of {flags.matmul}: {peak / 1e12:.3g} TFLOP/s")
    context = flags.prompt + flags.tokens / 2
    print(f"{model.num_params / 1e6:.1f}M parameters, {model.weight_bytes / 1e9:.3g} GB; context {context:.0f}\n{HEAD}")
    for batch in flags.batches:
        seconds = step_seconds(model, batch, flags)
        moved_bytes, flops = step_bytes(model, batch, context), step_flops(model, batch, context)
        limit = max(moved_bytes / bandwidth, flops / peak)
        print(
            f"{batch:5d} {seconds * 1e3:8.3f} {batch / seconds:9.1f} {moved_bytes / 1e9:8.3f} "
            f"{moved_bytes / seconds / 1e9:8.1f} {moved_bytes / seconds / bandwidth:13.0%} "
            f"{flops / seconds / 1e12:8.3f} {limit / seconds:9.0%}",
            flush=True,
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a model's folder")
    parser.add_argument("--random", help=f"instead: {', '.join(RANDOM)}, or a folder whose config.json says the sizes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if ON_GPU else "float32")
    batches = "1,4,16,64,256" if ON_GPU else "1,8,16,32,64"
    parser.add_argument("--batches", default=batches, help=f"rows that decode together, default: {batches}")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens sampled per row")
    parser.add_argument("--slice-tokens", type=int, default=8, help="steps per slice")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs per batch size")
    parser.add_argument("--probe-mb", type=int, default=4096 if ON_GPU else 512, help="array for the bandwidth, MiB")
    parser.add_argument("--matmul", type=int, default=8192 if ON_GPU else 1536, help="rows and columns for the peak")
    flags = parser.parse_args()
    if (flags.folder is None) == (flags.random is None):
        parser.error("give either a model's folder or --random")
    if flags.tokens % flags.slice_tokens:
        parser.error("--tokens must be a multiple of --slice-tokens")
    flags.batches = [int(part) for part in flags.batches.split(",")]
    return flags


def main() -> None:
    """Load or make the model and print its table."""
    flags = parse()
    dtype = jnp.dtype(flags.dtype)
    if flags.random is None:
        model = load_model(flags.folder, make_mesh(), dtype)
    else:
        hf = RANDOM.get(flags.random) or json.loads((Path(flags.random) / "config.json").read_text(encoding="utf-8"))
        model = random_model(hf, dtype)
    if model.config.num_experts:
        raise SystemExit("a mixture of experts reads as many experts as its rows choose: not counted here")
    report(model, flags)


if __name__ == "__main__":
    main()
