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
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from device_probe import (
    ON_GPU,
    add_model_flags,
    copy_bandwidth,
    matmul_peak,
    model_of,
    num_multiplied,
    numbers,
    read_bandwidths,
)

from tx.layers.kv_cache import num_blocks
from tx.models.loading import LoadedModel
from tx.types import SampleRequest, SamplingParams
from tx.worker.generator import Generator

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
    attention = 4 * context * config.num_layers * config.num_heads * config.head_dim
    return batch * (2 * num_multiplied(model) + attention)


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
    add_model_flags(parser)
    batches = [1, 4, 16, 64, 256] if ON_GPU else [1, 8, 16, 32, 64]
    parser.add_argument(
        "--batches", type=numbers, default=batches, help=f"rows that decode together, default: {batches}"
    )
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens sampled per row")
    parser.add_argument("--slice-tokens", type=int, default=8, help="steps per slice")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs per batch size")
    parser.add_argument("--probe-mb", type=int, default=4096 if ON_GPU else 512, help="array for the bandwidth, MiB")
    flags = parser.parse_args()
    if flags.tokens % flags.slice_tokens:
        parser.error("--tokens must be a multiple of --slice-tokens")
    return flags


def main() -> None:
    """Load or make the model and print its table."""
    flags = parse()
    report(model_of(flags), flags)


if __name__ == "__main__":
    main()
