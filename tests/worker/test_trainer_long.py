"""A datum of 8,192 tokens: its logprobs are a numpy formula's, and its step is as fine as a short one's."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tests.support.tiny_models import VOCAB, weights, write_tiny_model
from tx.models.loading import load_model
from tx.types import AdamParams, Datum, ForwardBackward, LoraConfig
from tx.worker.adapters import AdapterStore
from tx.worker.mesh import make_mesh
from tx.worker.trainer import Trainer

LENGTH = 8192
CONFIG = {
    "num_hidden_layers": 1,
    "max_position_embeddings": LENGTH,
    "rope_scaling": None,
    "rope_theta": 1e6,
}


def reference_logprob(tensors: dict[str, np.ndarray], tokens: np.ndarray, at: int, target: int) -> float:
    """Of ``target`` after ``tokens[: at + 1]``: a Llama layer as Hugging Face defines it, float64, one query."""
    t = {name.removeprefix("model.").removeprefix("layers.0."): a.astype(np.float64) for name, a in tensors.items()}
    norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
    x = t["embed_tokens.weight"][tokens[: at + 1]]
    h = norm(x, t["input_layernorm.weight"])
    angles = np.arange(at + 1)[:, None] * 1e6 ** (-np.arange(8) / 8)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def heads(name: str, rotated: bool) -> np.ndarray:
        y = (h @ t[f"self_attn.{name}.weight"].T).reshape(at + 1, -1, 16)
        first, second = y[..., :8], y[..., 8:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1) if rotated else y

    q, k, v = heads("q_proj", True)[-1], heads("k_proj", True), heads("v_proj", False)
    attended = []
    for head in range(4):
        scores = k[:, head // 2] @ q[head] / 4.0
        shares = np.exp(scores - scores.max())
        attended.append(shares @ v[:, head // 2] / shares.sum())
    y = x[-1] + t["self_attn.o_proj.weight"] @ np.concatenate(attended)
    h = norm(y, t["post_attention_layernorm.weight"])
    gate, up = t["mlp.gate_proj.weight"] @ h, t["mlp.up_proj.weight"] @ h
    y = y + t["mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    logits = t["lm_head.weight"] @ norm(y, t["norm.weight"])
    return float(logits[target] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


def test_a_datum_of_8192_tokens(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "llama", "llama3", **CONFIG)
    model = load_model(folder, make_mesh(), jnp.float32)
    store = AdapterStore(model, 1)
    trainer = Trainer(model, store, micro_batch_tokens=512, max_context=LENGTH)
    store.create("m", LoraConfig(4, 0))
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, VOCAB, (2, LENGTH))
    inputs = {"target_tokens": targets, "weights": np.full(LENGTH, 1 / LENGTH, np.float32)}
    request = ForwardBackward("m", 0, (Datum(tokens.astype(np.int32), inputs),), "cross_entropy", {}, False)
    losses = []
    for _ in range(2):
        trainer.submit(0, request)
        (finished,) = trainer.slice()
        assert finished.result is not None, finished.error
        losses.append(finished.result.metrics["loss:sum"])
        if len(losses) == 1:
            tensors = weights(json.loads((folder / "config.json").read_text()), 0)
            for at in (0, 63, 64, 1000, 4095, 8000, LENGTH - 1):
                wanted = reference_logprob(tensors, tokens, at, targets[at])
                assert abs(finished.result.logprobs[0][at] - wanted) <= 2e-5, at
        trainer.optim_step("m", AdamParams(learning_rate=1e-2))
    assert losses[1] < losses[0]
