"""A model's state as files and back: a checkpoint's (a PEFT adapter, the optimizer beside it), or a recovery point's.

``optimizer.safetensors`` holds the two moments under ``mu.<name>`` and ``nu.<name>``, float32, at the true rank, with
the names of ``tx.types.ModelState``. Step count and LoRA config are in the folder's card (``tx.tinker.checkpoints``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from safetensors.numpy import load, save

from tx.models import peft, peft_import
from tx.tinker.checkpoints import BrokenCheckpoint, CheckpointCard
from tx.types import ModelState

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.safetensors"


def to_files(state: ModelState, base_model: str, *, with_optimizer: bool) -> dict[str, bytes]:
    """What to write; without the optimizer it is what a server of adapters needs."""
    files = peft.export_files(state, base_model)
    if with_optimizer:
        moments = {f"mu.{name}": array for name, array in state.mu.items()}
        moments |= {f"nu.{name}": array for name, array in state.nu.items()}
        files[OPTIMIZER_FILE] = save(moments)
    return files


def from_files(card: CheckpointCard, files: Mapping[str, bytes], num_experts_per_tok: int) -> ModelState:
    """The state that was written; its moments are empty and its step 0 if the optimizer was not."""
    adapter = {name: content for name, content in files.items() if name != OPTIMIZER_FILE}
    state = peft_import.import_files(adapter, num_experts_per_tok, of_experts=card.lora.expert_rank)
    state = replace(state, lora=card.lora)
    if OPTIMIZER_FILE not in files:
        return state
    moments = _split(load(files[OPTIMIZER_FILE]))
    mu, nu = moments.get("mu", {}), moments.get("nu", {})
    if set(mu) != set(state.weights) or set(nu) != set(state.weights):
        raise BrokenCheckpoint(f"{OPTIMIZER_FILE} and the adapter hold different tensors")
    return replace(state, mu=mu, nu=nu, step=card.step)


def experts_per_tok(state: ModelState) -> int:
    """A count that gives the state's expert rank back from its rank, 0 for a dense model.

    Example: rank 8 and experts of rank 2 give 4, as ``8 // 4`` is 2.
    """
    expert_ranks = [array.shape[-1] for name, array in state.weights.items() if ".experts." in name and name[-1] == "A"]
    return state.lora.rank // expert_ranks[0] if expert_ranks else 0


def to_point(state: ModelState) -> dict[str, bytes]:
    """What a recovery point holds: every array as it is, under ``weights.<name>``, ``mu.<name>`` and ``nu.<name>``."""
    groups = {"weights": state.weights, "mu": state.mu, "nu": state.nu}
    arrays = {f"{group}.{name}": array for group, tree in groups.items() for name, array in tree.items()}
    return {STATE_FILE: save(arrays)}


def from_point(card: CheckpointCard, files: Mapping[str, bytes]) -> ModelState:
    """The state of a recovery point, bit for bit."""
    if STATE_FILE not in files:
        raise BrokenCheckpoint(f"a recovery point without {STATE_FILE}")
    groups = _split(load(files[STATE_FILE]))
    return ModelState(card.lora, groups.get("weights", {}), groups.get("mu", {}), groups.get("nu", {}), card.step)


def _split(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """``{"mu.a": x, "nu.a": y}`` as ``{"mu": {"a": x}, "nu": {"a": y}}``."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = array
    return groups
