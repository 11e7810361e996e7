"""The optimizer's part of request bodies: AdamW's fields with their ranges, every other optimizer refused by name."""

from __future__ import annotations

from typing import Any

from tx import types
from tx.errors import InvalidInput, Unsupported

_ADAM_RANGES: dict[str, tuple[float, float, str]] = {
    "learning_rate": (0.0, 1e9, "a number at least 0"),
    "beta1": (0.0, 1.0 - 1e-12, "a number in [0, 1)"),
    "beta2": (0.0, 1.0 - 1e-12, "a number in [0, 1)"),
    "eps": (0.0, 1e9, "a number at least 0"),
    "weight_decay": (0.0, 1e9, "a number at least 0"),
    "grad_clip_norm": (0.0, 1e30, "a number at least 0 (0 is off)"),
}


def adam_params(request: dict[str, Any]) -> types.AdamParams:
    """The step that an ``optim_step`` asks for; every field is honoured or refused by name."""
    other = request.get("optimizer_params")
    if other is not None:
        kind = other.get("type") if isinstance(other, dict) else other
        raise Unsupported("optimizer_params.type", kind, "adam_params: tx has AdamW only")
    given = request.get("adam_params") or {}
    if not isinstance(given, dict):
        raise InvalidInput("adam_params", given, "an object")
    values = {}
    for name, value in given.items():
        if value is None or name == "type":
            continue
        if name not in _ADAM_RANGES:
            raise Unsupported(f"adam_params.{name}", value, ", ".join(_ADAM_RANGES))
        low, high, accepted = _ADAM_RANGES[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidInput(f"adam_params.{name}", value, accepted)
        values[name] = float(value)
    return types.AdamParams(**values)


def check_optimizer_config(config: Any) -> None:
    """Refuse the optimizers that tx doesn't have."""
    kind = config.get("type", "adamw") if isinstance(config, dict) else config
    if kind not in (None, "adamw"):
        raise Unsupported("optimizer_config.type", kind, "adamw")
