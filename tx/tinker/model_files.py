"""A model's state as the files of a checkpoint folder and back: a PEFT adapter, and the optimizer beside it.

``optimizer.safetensors`` holds the two moments under ``mu.<name>`` and ``nu.<name>``, float32, at the true rank, with
the names of ``tx.types.ModelState``. Step count and LoRA config are in the folder's card (``tx.tinker.checkpoints``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from safetensors.numpy import load, save

from tx.models import peft, peft_import
from tx.tinker.checkpoints import BrokenCheckpoint, CheckpointCard
from tx.types import ModelState

OPTIMIZER_FILE = "optimizer.safetensors"


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
    moments = load(files[OPTIMIZER_FILE])
    mu = {name.removeprefix("mu."): array for name, array in moments.items() if name.startswith("mu.")}
    nu = {name.removeprefix("nu."): array for name, array in moments.items() if name.startswith("nu.")}
    if set(mu) != set(state.weights) or set(nu) != set(state.weights):
        raise BrokenCheckpoint(f"{OPTIMIZER_FILE} and the adapter hold different tensors")
    return replace(state, mu=mu, nu=nu, step=card.step)


def experts_per_tok(state: ModelState) -> int:
    """A count that gives the state's expert rank back from its rank, 0 for a dense model.

    Example: rank 8 and experts of rank 2 give 4, as ``8 // 4`` is 2.
    """
    expert_ranks = [array.shape[-1] for name, array in state.weights.items() if ".experts." in name and name[-1] == "A"]
    return state.lora.rank // expert_ranks[0] if expert_ranks else 0
