"""What an ``adapter_config.json`` says, strictly: the rank and the scale of each module, and nothing else that counts.

A field that changes the result and that tx doesn't have is refused by name, and so is one that tx has never heard of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tx.errors import InvalidInput, Unsupported
from tx.models.peft import CONFIG_FILE

# Fields that change the maths, with the values that mean "no change".
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
}

# Bookkeeping, what only training knows, and what the names of the tensors say again.
_HARMLESS = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"}
    | {"target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"}
    | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "ensure_weight_tying"}
    | {"lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config"}
)

# The others (PiSSA, OLoRA, CorDA, LoftQ, …) change the base weights too: such an adapter fits no original model.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Scale:
    """A module's factor on ``x @ A @ B``: ``alpha / divisor``, which is the rank, or its root with ``use_rslora``."""

    alpha: float
    divisor: float

    @property
    def value(self) -> float:
        """The factor."""
        return self.alpha / self.divisor

    def alpha_at(self, rank: int) -> float:
        """The alpha that gives this factor when divided by ``rank``; exactly ``alpha`` if that is the divisor."""
        return self.alpha * (rank / self.divisor)


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that count, checked."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rank of the module of this name (``model.layers.0.self_attn.q_proj``)."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> Scale:
        """Scale of the module of this name."""
        rank = float(self.rank_of(module))
        return Scale(_matching(self.alpha_pattern, module, self.alpha), math.sqrt(rank) if self.use_rslora else rank)


def check_config(config: Any) -> AdapterConfig:
    """The fields that count of an ``adapter_config.json``; InvalidInput or Unsupported names what can't be honoured."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise Unsupported(f"{CONFIG_FILE}.peft_type", got, "LORA")
    for name, value in config.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise Unsupported(f"{CONFIG_FILE}.{name}", value, f"{_NEUTRAL[name][0]!r}")
        elif name not in _HARMLESS and value not in (None, False, [], {}):
            raise Unsupported(
                f"{CONFIG_FILE}.{name}", value, "absent: tx doesn't know this field, so it can't honour it"
            )
    initialisation = config.get("init_lora_weights")
    if initialisation not in _INITIALISATIONS:
        reason = "one that leaves the base weights as they were: true, false, gaussian, eva, orthogonal"
        raise Unsupported(f"{CONFIG_FILE}.init_lora_weights", initialisation, reason)
    return AdapterConfig(
        rank=_rank("r", config.get("r")),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern={key: _rank("rank_pattern", value) for key, value in _pattern(config, "rank_pattern")},
        alpha_pattern={key: _alpha("alpha_pattern", value) for key, value in _pattern(config, "alpha_pattern")},
    )


def _rank(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInput(f"{CONFIG_FILE}.{name}", value, "a whole number, at least 1")
    return value


def _alpha(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InvalidInput(f"{CONFIG_FILE}.{name}", value, "a number above 0")
    return float(value)


def _pattern(config: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    given = config.get(name) or {}
    if not isinstance(given, dict):
        raise InvalidInput(f"{CONFIG_FILE}.{name}", given, "modules and their values")
    for key in given:
        try:
            re.compile(key)
        except re.error as error:
            raise InvalidInput(f"{CONFIG_FILE}.{name}", key, f"a regular expression ({error})") from error
    return list(given.items())


def _matching[T](pattern: Mapping[str, T], module: str, default: T) -> T:
    """As PEFT reads a pattern: the first key that matches the whole name or what follows one of its dots."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
