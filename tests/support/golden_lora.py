"""The golden files of make_lora.py and make_peft.py as models, adapters and datums."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from tx.layers.logprobs import next_logits
from tx.layers.lora import single_view
from tx.models.loading import load_model
from tx.types import ModelState
from tx.worker.adapters import AdapterStore
from tx.worker.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    """One golden file. folder: its base model as a Hugging Face folder; arrays: everything in the file by name."""

    folder: Path
    arrays: dict[str, np.ndarray]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays under ``prefix/`` by the rest of their names."""
        return {name[len(prefix) + 1 :]: a for name, a in self.arrays.items() if name.startswith(prefix + "/")}

    def data(self) -> list[dict[str, np.ndarray]]:
        """The datums' tensors."""
        count = len({name.split("/")[1] for name in self.arrays if name.startswith("data/")})
        return [self.group(f"data/{index}") for index in range(count)]


def read_golden(name: str, folder: Path) -> Golden:
    """Read a golden file and write its model into ``folder``."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    golden = Golden(folder, arrays)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(golden.group("model"), folder / "model.safetensors", metadata={"format": "pt"})
    return golden


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


def adapter_logits(golden: Golden, state: ModelState) -> np.ndarray:
    """Our own logits [position, vocab] with this adapter on the golden's base model and tokens."""
    loaded = load_model(golden.folder, make_mesh(), jnp.float32)
    store = AdapterStore(loaded, 1)
    store.restore("m", state, with_optimizer=False)
    ranks, adapter = store.ranks("m"), store.state("m").weights
    view = single_view(adapter, ranks.scaling, ranks.expert_scaling, *ranks.padded)
    model = nnx.merge(loaded.graphdef, loaded.weights)
    tokens = jnp.asarray(golden.arrays["tokens"], jnp.int32)[None]
    hidden, _ = model.hidden_states(tokens, jnp.arange(tokens.size, dtype=jnp.int32)[None], adapter=view)
    return np.asarray(next_logits(hidden, model.unembed_kernel(), adapter.unembed, view.gate))[0]
