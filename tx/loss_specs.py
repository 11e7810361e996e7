"""Each loss once: its inputs, their dtypes and shapes, its config keys with ranges and defaults (protocol §3.6).

The wire decoder checks datums against this table, the trainer maps it to device arrays, the docs list it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tx.errors import InvalidInput, Unsupported


@dataclass(frozen=True)
class ConfigKey:
    """One ``loss_fn_config`` entry: accepted closed range and default."""

    default: float
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class LossSpec:
    """``required``/``optional``: per-position float32 inputs besides ``target_tokens`` (int64).

    ``multi_target``: ``target_tokens`` and the others may be [N, K]. ``needs_spans``: the provenance spans say which
    recorded sequences the positions belong to.
    """

    name: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: dict[str, ConfigKey] = field(default_factory=dict)
    multi_target: bool = False
    needs_spans: bool = False


_CLIP_OVERRIDES = ("clip_low_threshold", "clip_high_threshold")
_RL = ("logprobs", "advantages")

LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("cross_entropy", required=("weights",), multi_target=True),
        LossSpec("importance_sampling", required=_RL),
        LossSpec(
            "ppo",
            required=_RL,
            optional=_CLIP_OVERRIDES,
            config={"clip_low_threshold": ConfigKey(0.8, 0.0), "clip_high_threshold": ConfigKey(1.2, 0.0)},
        ),
        LossSpec(
            "cispo",
            required=_RL,
            optional=_CLIP_OVERRIDES,
            config={"clip_low_threshold": ConfigKey(0.0, 0.0), "clip_high_threshold": ConfigKey(4.0, 0.0)},
        ),
        LossSpec("dro", required=_RL, config={"beta": ConfigKey(0.05, 0.0)}),
        LossSpec(
            "gspo",
            required=(*_RL, "sequence_ratio_mask"),
            optional=_CLIP_OVERRIDES,
            config={"clip_low_threshold": ConfigKey(0.8, 0.0), "clip_high_threshold": ConfigKey(1.2, 0.0)},
        ),
        LossSpec(
            "stable_reinforce",
            required=("advantages",),
            optional=("logprobs",),
            config={"kl_coeff": ConfigKey(0.0, 0.0), "ratio_cap": ConfigKey(2.0, 0.0)},
            needs_spans=True,
        ),
    )
}
"""Names a client may put into ``loss_fn``; ``custom`` runs client-side as two ``cross_entropy`` passes."""


def get(name: str) -> LossSpec:
    """The spec of ``name``; raises Unsupported for a loss that tx doesn't have."""
    spec = LOSSES.get(name)
    if spec is None:
        raise Unsupported("loss_fn", name, "one of " + ", ".join(LOSSES))
    return spec


def check_config(spec: LossSpec, config: dict[str, float | str]) -> dict[str, float]:
    """The config with defaults filled in; raises InvalidInput on an unknown key, a non-number or one out of range."""
    values = {key: entry.default for key, entry in spec.config.items()}
    for key, value in config.items():
        entry = spec.config.get(key)
        if entry is None:
            accepted = ", ".join(spec.config) or "no keys"
            raise InvalidInput(f"loss_fn_config.{key}", value, f"for {spec.name}: {accepted}")
        if isinstance(value, str) or not math.isfinite(value) or not entry.low <= value <= entry.high:
            raise InvalidInput(f"loss_fn_config.{key}", value, f"a finite number in [{entry.low}, {entry.high}]")
        values[key] = float(value)
    low, high = values.get("clip_low_threshold"), values.get("clip_high_threshold")
    if low is not None and high is not None and low > high:
        raise InvalidInput("loss_fn_config.clip_low_threshold", low, f"at most clip_high_threshold ({high})")
    return values
