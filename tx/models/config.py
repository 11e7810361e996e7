"""ModelConfig: what the mathematics of a base model depends on, read from a Hugging Face config.

Strict on purpose: a field that changes the result and that tx doesn't implement is refused by name, and so is a field
that tx has never heard of, because nobody can say that it doesn't. Fields known to be harmless are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tx.errors import Unsupported
from tx.layers.rotary import ROPE_KINDS, RopeConfig

LLAMA, QWEN3, QWEN3_MOE = "LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
ARCHITECTURES = (LLAMA, QWEN3, QWEN3_MOE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Bookkeeping, initialisation, generation defaults and training-only settings: no effect on logits.
_HARMLESS = _words("""
    architectures model_type torch_dtype dtype transformers_version initializer_range use_cache bos_token_id
    pad_token_id unk_token_id sep_token_id decoder_start_token_id output_router_logits router_aux_loss_coef
    output_hidden_states output_attentions return_dict return_dict_in_generate chunk_size_feed_forward id2label label2id
    problem_type name_or_path auto_map max_window_layers is_encoder_decoder task_specific_params
    tokenizer_class prefix finetuning_task language is_llama_config torchscript use_bfloat16
    gradient_checkpointing max_length min_length temperature top_k top_p do_sample num_beams repetition_penalty
    length_penalty no_repeat_ngram_size num_return_sequences early_stopping unsloth_version unsloth_fixed
    attn_implementation""")
_READ = _words("""
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps tie_word_embeddings max_position_embeddings attention_bias mlp_bias rope_theta rope_scaling
    rope_parameters eos_token_id""")
_READ_MOE = _words("""
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step
    mlp_only_layers""")
# Fields with one value that we implement.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, 1.0),
    "rope_interleaved": (False, None),
    "is_decoder": (False, None),
}


@dataclass(frozen=True)
class ModelConfig:
    """One base model's sizes and constants; hashable, so it can be static under jit.

    ``num_experts`` 0 is a dense model; ``moe_layers[i]`` says whether layer i is a mixture. ``eos_token_ids`` is the
    union of what config.json and generation_config.json name.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    max_position_embeddings: int
    attention_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    moe_layers: tuple[bool, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return bool(self.moe_layers) and self.moe_layers[layer]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json; Unsupported names the first field that can't be honoured."""
        architecture = _architecture(hf)
        _refuse_unknown(hf, architecture)
        num_heads, hidden_size = _positive(hf, "num_attention_heads"), _positive(hf, "hidden_size")
        num_kv_heads = _positive(hf, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise Unsupported("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
        if hf.get("head_dim") is None and hidden_size % num_heads:
            raise Unsupported("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})")
        # Hugging Face's own default: a Qwen3 config that says nothing has heads of 128, unlike the other families.
        head_dim = 128 if architecture == QWEN3 and "head_dim" not in hf else hidden_size // num_heads
        num_layers = _positive(hf, "num_hidden_layers")
        return cls(
            architecture=architecture,
            vocab_size=_positive(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(hf, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_positive(hf, "head_dim", head_dim),
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope=_rope(hf),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position_embeddings=_positive(hf, "max_position_embeddings"),
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)) and architecture == LLAMA,
            eos_token_ids=eos_token_ids(hf.get("eos_token_id")),
            **(_moe(hf, num_layers) if architecture == QWEN3_MOE else {}),
        )


def eos_token_ids(value: Any) -> tuple[int, ...]:
    """The ids of an ``eos_token_id`` field: an int, a list, or nothing."""
    if value is None:
        return ()
    return tuple(sorted({int(v) for v in value})) if isinstance(value, list | tuple) else (int(value),)


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures") or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise Unsupported("architectures", names or hf.get("model_type"), f"one of {', '.join(ARCHITECTURES)}")
    return names[0]


def _refuse_unknown(hf: Mapping[str, Any], architecture: str) -> None:
    """Every field is read, fixed to what we do, harmless, or refused."""
    read = _READ | _READ_MOE if architecture == QWEN3_MOE else _READ
    for field, value in hf.items():
        if field in _FIXED:
            if value not in _FIXED[field]:
                raise Unsupported(field, value, f"{_FIXED[field][0]!r}")
        elif field == "layer_types":
            if value is not None and set(value) != {"full_attention"}:
                raise Unsupported(field, value, "full_attention in every layer")
        elif field == "sliding_window":
            # Qwen3 keeps a window in its config that use_sliding_window turns off; Llama has no such switch.
            if value is not None and architecture == LLAMA:
                raise Unsupported(field, value, "null")
        elif field in read or field in _HARMLESS or field.startswith(("_", "transformers")):
            continue
        elif value not in (None, False, [], {}):
            raise Unsupported(field, value, "absent: tx doesn't know this config field, so it can't honour it")


def _positive(hf: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = hf.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Unsupported(field, value, "a positive integer")
    return value


def _rope(hf: Mapping[str, Any]) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    field = "rope_parameters" if hf.get("rope_parameters") is not None else "rope_scaling"
    given: dict[str, Any] = dict(hf.get(field) or {})
    theta = given.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in ROPE_KINDS:
        raise Unsupported(f"{field}.rope_type", kind, f"one of {', '.join(ROPE_KINDS)}")
    if given.pop("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise Unsupported(f"{field}.partial_rotary_factor", hf[field]["partial_rotary_factor"], "1.0")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[kind]
    values: dict[str, float] = {}
    for name in needed:
        value = given.pop(name, None)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise Unsupported(f"{field}.{name}", value, "a positive number")
        values[name] = value
    for name, value in given.items():
        if value is not None and not (kind == "default" and name == "factor" and value == 1.0):
            raise Unsupported(f"{field}.{name}", value, f"absent with rope_type {kind}")
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        factor=float(values.get("factor", 1.0)),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
        original_max_position=int(values.get("original_max_position_embeddings", 0)),
    )


def _moe(hf: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    field = "num_experts" if "num_experts" in hf else "num_local_experts"
    num_experts = _positive(hf, field)
    per_token = _positive(hf, "num_experts_per_tok")
    if per_token > num_experts:
        raise Unsupported("num_experts_per_tok", per_token, f"at most {field} ({num_experts})")
    dense = set(hf.get("mlp_only_layers") or [])
    step = _positive(hf, "decoder_sparse_step", 1)
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": _positive(hf, "moe_intermediate_size"),
        "norm_topk_prob": bool(hf.get("norm_topk_prob", False)),
        "moe_layers": tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers)),
    }
