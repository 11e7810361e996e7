# ruff: noqa: E402 (XLA reads its flags when JAX is imported)
"""What training moves between devices, on a mesh of eight: prints a table. No devices needed, only a CPU.

usage: python benchmarks/mesh_traffic.py [--layers 2] [--hidden 256] [--rows 8] [--length 128] [--rank 8]

A small Qwen3 of random float32 weights trains on eight virtual CPU devices: one forward_backward and one optim_step on
one of them, on data parallel 8 and on tensor parallel 8. XLA writes down every program that it compiles, and the
collectives are counted from that text, as ``hlo_collectives`` says: bytes per device and per run of the program.
A micro-batch runs the programs ``embed`` and ``gradient`` (the head) once, ``keep`` and ``backward`` once per layer,
and is counted so; what moves bytes once per job or step has lines of its own. For GPUs the compiler may choose other
forms.

The gradients and the weights after the step are compared with one device's: the largest difference within an array over
the array's largest value, of the worst array. Gradients are read from Adam's first moment after one step.
"""

import argparse
import os
import tempfile
from pathlib import Path

DUMP = tempfile.TemporaryDirectory(prefix="mesh-traffic-")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program from a cache is not written down
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 --xla_dump_to={DUMP.name} --xla_dump_hlo_as_text "
    "--xla_dump_hlo_module_re=jit_.*"
)

import jax.numpy as jnp
import numpy as np
from device_probe import QWEN3_4B, random_model
from hlo_collectives import Total, totals

from tx.models.lora_sites import lora_sites
from tx.types import AdamParams, Datum, ForwardBackward, LoraConfig
from tx.worker.adapters import AdapterStore
from tx.worker.mesh import make_mesh
from tx.worker.trainer import Trainer

MODEL_ID = "bench"
MESHES = {"one device": {}, "data parallel 8": {"data": 8}, "tensor parallel 8": {"tp": 8}}
MICRO_BATCH = ("embed", "keep", "gradient", "backward")
PER_LAYER = ("keep", "backward")
# A large eps: Adam's first step is otherwise the gradient's sign, which rounding turns where the gradient is near zero.
ADAM = AdamParams(learning_rate=1e-3, eps=1.0)

Arrays = dict[str, np.ndarray]


def shapes(flags: argparse.Namespace) -> dict:
    """The model's config: eight heads on four of keys and values, so that tensor parallel 8 must share the latter."""
    sizes = {"vocab_size": flags.vocab, "hidden_size": flags.hidden, "intermediate_size": 3 * flags.hidden}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": flags.hidden // 8}
    return QWEN3_4B | sizes | heads | {"num_hidden_layers": flags.layers}


def train(flags: argparse.Namespace, sizes: dict[str, int]) -> tuple[Arrays, Arrays]:
    """(gradients, weights after it) of one step on a mesh of these sizes."""
    model = random_model(shapes(flags), jnp.float32, make_mesh(**sizes))
    store = AdapterStore(model, 1)
    store.create(MODEL_ID, LoraConfig(flags.rank, 0))
    state = store.export(MODEL_ID)
    rng = np.random.default_rng(0)
    for array in state.weights.values():  # B away from zero, so that A has a gradient
        array += rng.normal(0, 0.02, array.shape).astype(np.float32)
    store.restore(MODEL_ID, state, with_optimizer=False)
    num_tokens = flags.rows * flags.length  # one micro-batch
    trainer = Trainer(model, store, micro_batch_tokens=num_tokens, max_context=num_tokens)
    tokens = rng.integers(0, flags.vocab, (flags.rows, flags.length + 1))
    weights = np.ones(flags.length, np.float32)
    data = tuple(Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:], "weights": weights}) for row in tokens)
    trainer.submit(0, ForwardBackward(MODEL_ID, 0, data, "cross_entropy", {}, forward_only=False))
    while trainer.has_work:
        for outcome in trainer.slice():
            if outcome.error is not None:
                raise outcome.error
    trainer.optim_step(MODEL_ID, ADAM)
    after = store.export(MODEL_ID)
    return {name: moment / (1 - ADAM.beta1) for name, moment in after.mu.items()}, after.weights


def programs() -> dict[Path, str]:
    """Optimized HLO written so far: file to the name of the jitted function."""
    files = Path(DUMP.name).glob("*after_optimizations.txt")
    return {file: file.name.split(".")[1].removeprefix("jit_").strip("_") for file in files}


def difference(arrays: Arrays, reference: Arrays) -> float:
    """Largest difference over the largest value, of the worst array."""
    assert arrays.keys() == reference.keys()
    return max(float(np.abs(arrays[name] - one).max() / np.abs(one).max()) for name, one in reference.items())


HEAD = "mesh               program                   collective           count  payload kB    sent kB  sent B/token"


def lines(mesh: str, program: str, found: dict[str, Total], num_tokens: int) -> list[str]:
    """One per kind of collective, and their sum."""
    return [
        f"{mesh:18} {program:25} {kind:19} {one.count:6d} {one.payload / 1e3:11.1f} {one.sent / 1e3:10.1f} "
        f"{one.sent / num_tokens:13.1f}"
        for kind, one in [*found.items(), ("all", sum(found.values(), start=Total()))]
    ]


def report(flags: argparse.Namespace) -> None:
    """Train on each mesh; the traffic, then how the results differ."""
    num_tokens = flags.rows * flags.length
    sites = lora_sites(random_model(shapes(flags), jnp.float32, make_mesh()).config)
    adapter = sum(flags.rank * (site.in_features + site.out_features) for site in sites) * 4
    print(f"{flags.layers} layers of {flags.hidden}, rank {flags.rank}, {flags.rows} x {flags.length} tokens, float32")
    print(f"least payloads: data parallel, the adapter's gradients once: {adapter / 1e3:.1f} kB;")
    hidden = 4 * flags.layers * flags.hidden * 4 * num_tokens
    print(f"tensor parallel, 4 x layers x hidden per token: {hidden / 1e3:.1f} kB\n{HEAD}")
    results = {}
    for mesh, sizes in MESHES.items():
        before = programs().keys()
        results[mesh] = train(flags, sizes)
        new = {file: name for file, name in programs().items() if file not in before}
        if missing := set(MICRO_BATCH) - set(new.values()):
            raise SystemExit(f"no program named {missing} was compiled for {mesh}, only {sorted(new.values())}")
        for file, name in sorted(new.items(), key=lambda item: (item[1] not in MICRO_BATCH, item[0])):
            runs = flags.layers if name in PER_LAYER else 1
            if found := totals(file.read_text(encoding="utf-8")):
                found = {kind: sum([one] * runs, start=Total()) for kind, one in found.items()}
                print("\n".join(lines(mesh, name, found, num_tokens)), flush=True)
    gradients, weights = results.pop("one device")
    for mesh, (others, after) in results.items():
        print(
            f"{mesh} against one device: gradients differ by {difference(others, gradients):.1e}, "
            f"weights after a step by {difference(after, weights):.1e}"
        )


def main() -> None:
    """Parse the flags, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--hidden", type=int, default=256, help="hidden size, a multiple of 8; the MLP is 3 times wider"
    )
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="rows of the micro-batch, a multiple of 8")
    parser.add_argument("--length", type=int, default=128, help="their positions")
    flags = parser.parse_args()
    for name in ("hidden", "rows"):
        if getattr(flags, name) % 8:
            parser.error(f"--{name} {getattr(flags, name)}: a multiple of 8 devices")
    with DUMP:
        report(flags)


if __name__ == "__main__":
    main()
