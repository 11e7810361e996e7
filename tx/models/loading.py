"""A Hugging Face folder to a model on its mesh: strict, and streamed tensor by tensor to the shards that hold it.

Only the slices that a device keeps are read, and no more than one tensor is in host memory at a time. Every tensor of
the checkpoint must be used and every weight of the model must be found: a checkpoint that loads is loaded whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from safetensors import SafetensorError, safe_open

from tx.errors import StartupError
from tx.layers.sharding import sharding
from tx.layers.weights import ExpertKernel, Kernel, Weight
from tx.models.config import ModelConfig, eos_token_ids
from tx.models.registry import MODELS

_FLOATS = ("F32", "BF16", "F16")


def _hash_once(self: Any) -> int:
    """A GraphDef is hashed at every call that takes it as a static argument: 1.5 ms for 30 layers, if not kept."""
    value = self.__dict__.get("_hash")
    if value is None:
        value = nnx.GraphDef.__hash__(self)
        object.__setattr__(self, "_hash", value)
    return value


# type() and not a class statement: run-time checkers can't read the hints that a subclass would inherit from flax.
StaticGraphDef: Any = type("StaticGraphDef", (nnx.GraphDef,), {"__hash__": _hash_once})


@dataclass(frozen=True)
class LoadedModel:
    """A base model on its mesh. Inside jit: ``nnx.merge(graphdef, weights)``, graphdef static, weights an argument."""

    config: ModelConfig
    mesh: Mesh
    graphdef: Any  # nnx.GraphDef; its own type hints break run-time checkers
    weights: Any  # nnx.State
    dtype: Any
    num_params: int
    weight_bytes: int


def read_config(folder: Path) -> ModelConfig:
    """config.json, with the end-of-sequence ids of generation_config.json added."""
    config = ModelConfig.from_hf(_read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    extra = eos_token_ids(_read_json(generation).get("eos_token_id"))
    return replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *extra})))


def load_model(
    folder: Path,
    mesh: Mesh,
    dtype: Any,
    *,
    shard_attention_heads: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Read config and weights; StartupError says which tensor is missing, unexpected or of the wrong shape.

    ``progress`` is called with (bytes read, bytes in all), counted in the checkpoint's own dtype.
    """
    config = read_config(folder)
    _check_mesh(config, mesh, shard_attention_heads)
    model_class = MODELS[config.architecture]
    abstract = nnx.eval_shape(lambda: model_class(config, mesh, shard_attention_heads=shard_attention_heads))
    graphdef, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    with ExitStack() as stack:
        checkpoint = _Checkpoint(folder, stack)
        checkpoint.check_names({name for path, weight in flat.items() for name in _names(path, weight)}, config)
        loaded, done = [], 0
        for path, weight in flat.items():
            names = _names(path, weight)
            checkpoint.check_shape(names, weight)
            array = _place(checkpoint, names, weight, jnp.float32 if weight.float32 else dtype, mesh)
            loaded.append((path, weight.replace(array)))
            done += sum(checkpoint.num_bytes(name) for name in names)
            if progress is not None:
                progress(done, checkpoint.total_bytes)
    weights = nnx.from_flat_state(loaded)
    jax.block_until_ready(jax.tree.leaves(weights))
    return assemble(config, mesh, graphdef, weights, dtype)


def assemble(config: ModelConfig, mesh: Mesh, graphdef: Any, weights: Any, dtype: Any) -> LoadedModel:
    """A model of which the weights are there, wherever they come from."""
    leaves = jax.tree.leaves(weights)
    return LoadedModel(
        config=config,
        mesh=mesh,
        graphdef=StaticGraphDef(**{field.name: getattr(graphdef, field.name) for field in fields(graphdef)}),
        weights=weights,
        dtype=dtype,
        num_params=sum(leaf.size for leaf in leaves),
        weight_bytes=sum(leaf.nbytes for leaf in leaves),
    )


def _check_mesh(config: ModelConfig, mesh: Mesh | AbstractMesh, shard_attention_heads: bool) -> None:
    """Refuse a mesh that doesn't divide the model, with the numbers and the flag."""
    tp, ep, fsdp = mesh.shape["tp"], mesh.shape["ep"], mesh.shape["fsdp"]
    if shard_attention_heads and config.num_heads % tp:
        raise StartupError(
            f"{config.num_heads} attention heads don't divide over --tensor-parallel-size {tp}: "
            "choose a divisor, or replicate the heads with --no-shard-attention-heads"
        )
    for size in {
        config.moe_intermediate_size if config.is_moe(i) else config.intermediate_size for i in range(config.num_layers)
    }:
        if size % tp:
            raise StartupError(f"MLP width {size} doesn't divide over --tensor-parallel-size {tp}")
    if config.hidden_size % fsdp:
        raise StartupError(f"hidden size {config.hidden_size} doesn't divide over fsdp size {fsdp}")
    if ep > 1 and (config.num_experts == 0 or config.num_experts % ep):
        raise StartupError(f"{config.num_experts or 'no'} experts don't divide over --expert-parallel-size {ep}")


def _names(path: tuple[Any, ...], weight: Weight) -> list[str]:
    """A weight's tensors in the checkpoint: its path in the module tree, one per expert for a stack of experts.

    Example: ('layers', 3, 'mlp', 'experts', 'up_proj', 'weight') is model.layers.3.mlp.experts.{0, 1, …}.up_proj.weight
    """
    parts = [str(part) for part in path]
    if parts[0] != "lm_head":
        parts.insert(0, "model")
    if not isinstance(weight, ExpertKernel):
        return [".".join(parts)]
    num_experts = weight.get_value().shape[0]
    return [".".join([*parts[:-2], str(expert), *parts[-2:]]) for expert in range(num_experts)]


def _place(checkpoint: _Checkpoint, names: list[str], weight: Weight, dtype: Any, mesh: Mesh) -> jax.Array:
    """One weight onto its devices; a callback reads just the slice that a device asks for."""
    shape = weight.get_value().shape
    seen: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = repr(index)  # replicas ask for the same slice once per device
        if key not in seen:
            seen[key] = _read_slice(checkpoint, names, weight, index).astype(dtype)
        return seen[key]

    return jax.make_array_from_callback(shape, sharding(weight.axes, shape, mesh), read)


def _read_slice(checkpoint: _Checkpoint, names: list[str], weight: Weight, index: tuple[slice, ...]) -> np.ndarray:
    if isinstance(weight, ExpertKernel):
        experts = [checkpoint.read(name, (index[2], index[1])).T for name in names[index[0]]]
        return np.stack(experts)
    if isinstance(weight, Kernel):
        return np.ascontiguousarray(checkpoint.read(names[0], index[::-1]).T)
    return checkpoint.read(names[0], index)


class _Checkpoint:
    """The safetensors files of a folder as one table of tensors."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        for file in _weight_files(folder):
            try:
                opened = stack.enter_context(safe_open(folder / file, framework="np"))
            except (SafetensorError, OSError) as error:
                raise StartupError(f"can't read the weights in {folder / file}: {error}") from error
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in self._files:
                    raise StartupError(f"tensor {name} is in two files of {folder}")
                self._files[name] = opened
        self.total_bytes = sum(self.num_bytes(name) for name in self._files)

    def check_names(self, expected: set[str], config: ModelConfig) -> None:
        """Exactly the expected tensors; a tied model may also carry its head, if it is the embedding's twin."""
        unexpected = sorted(set(self._files) - expected)
        if config.tie_word_embeddings and unexpected == ["lm_head.weight"]:
            if not self._same("lm_head.weight", "model.embed_tokens.weight"):
                raise StartupError(f"{self._folder} ties its head to the embedding, but its lm_head.weight differs")
            unexpected = []
        missing = sorted(expected - set(self._files))
        for what, names in (("lacks", missing), ("has unexpected", unexpected)):
            if names:
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise StartupError(f"the checkpoint in {self._folder} {what} {len(names)} tensor(s): {shown}")

    def check_shape(self, names: list[str], weight: Weight) -> None:
        """Shape and dtype as the model declares them."""
        shape = weight.get_value().shape
        on_disk = list(shape[1:][::-1] if isinstance(weight, ExpertKernel) else shape)
        if isinstance(weight, Kernel):
            on_disk.reverse()
        for name in names:
            tensor = self._files[name].get_slice(name)
            if list(tensor.get_shape()) != on_disk:
                raise StartupError(f"tensor {name} has shape {tensor.get_shape()}, the config says {on_disk}")
            if tensor.get_dtype() not in _FLOATS:
                raise StartupError(f"tensor {name} is {tensor.get_dtype()}, accepted: {', '.join(_FLOATS)}")

    def num_bytes(self, name: str) -> int:
        """Size of a tensor on disk, if its dtype is one that we accept."""
        tensor = self._files[name].get_slice(name)
        return int(np.prod(tensor.get_shape())) * (4 if tensor.get_dtype() == "F32" else 2)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor."""
        return self._files[name].get_slice(name)[index]

    def _same(self, first: str, second: str) -> bool:
        shape, other = (self._files[name].get_slice(name).get_shape() for name in (first, second))
        if list(shape) != list(other):
            return False
        rows = shape[0]
        return all(np.array_equal(self.read(first, part), self.read(second, part)) for part in _row_slices(rows))


def _row_slices(rows: int, step: int = 4096) -> Iterator[tuple[slice, ...]]:
    for start in range(0, rows, step):
        yield (slice(start, min(start + step, rows)),)


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted(set(_read_json(index)["weight_map"].values()))
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    raise StartupError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StartupError(f"can't read {path}: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} is not a JSON object")
    return value
