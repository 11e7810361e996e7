"""How close training comes to what this device can do, in one process and without a server: prints a table.

usage: python benchmarks/training_roofline.py FOLDER [--lengths 128,256] [--rank 16] [--weighted 0.5]
       python benchmarks/training_roofline.py --random qwen3-4b [--lengths 4096,16384] [--datasheet-tflops 989]

Rows of one length, in requests of ``--batches`` full micro-batches, go through ``Trainer.submit`` and ``slice`` as the
engine's do; the first request of each kind compiles and is not counted. What is counted is FLOPs of the mathematics,
one multiplication and addition being two, per position of a row of length T:

    forward             2 N     + 2 P + A
    forward, backward   4 N     + 6 P + 3.5 A

N: the base model's parameters with the head and without an embedding table that is not the head. They are frozen: the
backward pass only carries the gradient through them. P: the adapter's parameters, which get a gradient of their own.
A = 2 (T + 1) x layers x heads x head_dim: scores and values of the (T + 1) / 2 positions that a position sees on
average. The 3.5 holds the scores that an attention which stores none of them computes again in the backward pass; 3
would be the count without. Other recomputation (``--gradient-checkpointing``, logits of the head) does not count: it is
time lost. With ``--weighted`` below 1 only that share of the positions, each row's last, has a weight, and the head
with its adapter counts for those alone, in both passes.

MFU is that count over the time, as a share of one large matrix product's rate, measured at the start, and of
``--datasheet-tflops`` if given. Peak memory is the process's so far and never falls: give lengths in ascending order.
"""

import argparse
import resource
import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from device_probe import ON_GPU, add_model_flags, matmul_peak, model_of, num_multiplied, numbers

from tx.models.config import ModelConfig
from tx.models.loading import LoadedModel
from tx.models.lora_sites import lora_sites
from tx.types import AdamParams, Datum, ForwardBackward, LoraConfig
from tx.worker.adapters import AdapterStore
from tx.worker.trainer import Trainer

MODEL_ID = "bench"
BAR = (
    "public bar: 6.23k tok/s, 21.7% MFU of 989 by its own count, 23.3 GiB "
    "(prime-rl, RL LoRA of rank 16, Qwen3-4B, 16,384 tokens, one H100, with recomputation)"
)


@dataclass(frozen=True)
class Flops:
    """What a position costs; see the module's docstring."""

    frozen: float
    adapter: float
    attention: float

    @property
    def forward(self) -> float:
        return 2 * self.frozen + 2 * self.adapter + self.attention

    @property
    def forward_backward(self) -> float:
        return 4 * self.frozen + 6 * self.adapter + 3.5 * self.attention


def flops_per_token(model: LoadedModel, rank: int, length: int, weighted: float) -> Flops:
    """Counts for rows of ``length``; ``frozen`` and ``adapter`` are parameters, ``attention`` FLOPs forward."""
    config = model.config
    spared = (1 - weighted) * config.vocab_size * config.hidden_size
    sites = lora_sites(config)
    share = {site.name: weighted if site.layer is None else 1.0 for site in sites}
    adapter = sum(share[site.name] * rank * (site.in_features + site.out_features) for site in sites)
    attention = 2 * (length + 1) * config.num_layers * config.num_heads * config.head_dim
    return Flops(num_multiplied(model) - spared, adapter, attention)


def data(config: ModelConfig, rows: int, length: int, weighted: float) -> tuple[Datum, ...]:
    """Random rows; the last ``weighted`` of each has weight 1, what is before it 0."""
    rng = np.random.default_rng(length)
    weights = (np.arange(length) >= round((1 - weighted) * length)).astype(np.float32)
    tokens = rng.integers(0, config.vocab_size, (rows, length + 1))
    return tuple(Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:], "weights": weights}) for row in tokens)


def run(trainer: Trainer, request: ForwardBackward) -> tuple[float, int]:
    """Seconds until everything that a request started is done, and the slices that it took."""
    started, slices = time.perf_counter(), 0
    trainer.submit(0, request)
    while trainer.has_work:
        for outcome in trainer.slice():
            if outcome.error is not None:
                raise outcome.error
        slices += 1
    jax.block_until_ready(jax.live_arrays())
    return time.perf_counter() - started, slices


def peak_bytes() -> int:
    """Most memory that the device, or on a CPU the process, has held so far."""
    if ON_GPU:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


HEAD = (
    "length  rows  pass           slices  ms/slice      tok/s  MFLOP/tok  TFLOP/s  of product  of datasheet  peak GiB"
)


def report(model: LoadedModel, flags: argparse.Namespace) -> None:
    """Measure the device, then both passes at each length."""
    peak = matmul_peak(flags.matmul, model.dtype)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{jnp.dtype(model.dtype)} product of {flags.matmul}: {peak / 1e12:.3g} TFLOP/s")
    print("FLOPs per token: forward 2 N + 2 P + A, forward and backward 4 N + 6 P + 3.5 A")
    for length in flags.lengths:
        count = flops_per_token(model, flags.rank, length, flags.weighted)
        print(f"{length}: N {count.frozen / 1e6:.4g}M, P {count.adapter / 1e6:.4g}M, A {count.attention / 1e6:.4g}M")
    print(HEAD)
    store = AdapterStore(model, 1)
    store.create(MODEL_ID, LoraConfig(flags.rank, 0))
    for length in flags.lengths:
        for forward_only in (True, False):
            print(line(model, store, length, forward_only, peak, flags), flush=True)
    if ON_GPU:
        print(BAR)


def line(
    model: LoadedModel, store: AdapterStore, length: int, forward_only: bool, peak: float, flags: argparse.Namespace
) -> str:
    """Measure one pass at one length."""
    options = {"gradient_checkpointing": True} if flags.gradient_checkpointing else {}
    trainer = Trainer(model, store, micro_batch_tokens=flags.tokens, max_context=max(flags.lengths), **options)
    trainer.optim_step(MODEL_ID, AdamParams())  # a fresh model's forward would leave its adapter out
    rows = flags.tokens // length * flags.batches
    work = data(model.config, rows, length, flags.weighted)
    request = ForwardBackward(MODEL_ID, 0, work, "cross_entropy", {}, forward_only)
    _, slices = run(trainer, request)
    seconds = statistics.median(run(trainer, request)[0] for _ in range(flags.repeats))
    count = flops_per_token(model, flags.rank, length, flags.weighted)
    flops = count.forward if forward_only else count.forward_backward
    rate = flops * rows * length / seconds
    of_datasheet = f"{rate / flags.datasheet_tflops / 1e12:.1%}" if flags.datasheet_tflops else "-"
    return (
        f"{length:6d} {rows:5d}  {'forward' if forward_only else 'with backward':14} {slices:6d} "
        f"{seconds / slices * 1e3:9.1f} {rows * length / seconds:10.1f} {flops / 1e6:10.5g} {rate / 1e12:8.3f} "
        f"{rate / peak:11.1%} {of_datasheet:>13} {peak_bytes() / 2**30:9.2f}"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_flags(parser)
    lengths = [4096, 16384] if ON_GPU else [128, 256]
    parser.add_argument("--lengths", type=numbers, default=lengths, help=f"positions of a row, default: {lengths}")
    parser.add_argument("--tokens", type=int, help="of a micro-batch, by default the greatest length")
    parser.add_argument("--batches", type=int, default=4 if ON_GPU else 2, help="micro-batches of a request")
    parser.add_argument("--repeats", type=int, default=3, help="timed requests of each kind")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weighted", type=float, default=1.0, help="share of the positions that have a weight")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as the server's flag")
    parser.add_argument("--datasheet-tflops", type=float, help="of this device and dtype, such as 989 for an H100")
    flags = parser.parse_args()
    flags.tokens = flags.tokens or max(flags.lengths)
    if max(flags.lengths) > flags.tokens:
        parser.error(f"--lengths {max(flags.lengths)} is more than a micro-batch of --tokens {flags.tokens} holds")
    if not 0 < flags.weighted <= 1:
        parser.error(f"--weighted {flags.weighted:g}: a share above 0, at most 1")
    return flags


def main() -> None:
    """Load or make the model and print its table."""
    flags = parse()
    report(model_of(flags), flags)


if __name__ == "__main__":
    main()
