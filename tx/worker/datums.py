"""Datums on the host: checked against the loss's table, and laid out as a micro-batch's padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tx import loss_specs
from tx.errors import InvalidInput
from tx.loss_specs import LossSpec
from tx.types import Datum, ForwardBackward
from tx.worker.losses import LOSS_IDS, LossBatch
from tx.worker.shapes import Shape

RECORDED_MASK = "recorded_mask"
"""Extra input of stable_reinforce, put there by the engine: 1 where ``logprobs`` is one that this server recorded."""

CLIPS = ("clip_low_threshold", "clip_high_threshold")


def check(request: ForwardBackward, vocab_size: int, max_context: int) -> dict[str, float]:
    """The loss's config with defaults filled in; InvalidInput names the first field of the request that is wrong."""
    spec = loss_specs.get(request.loss_fn)
    config = loss_specs.check_config(spec, request.loss_config)
    if not request.data:
        raise InvalidInput("data", "no datums", "at least one")
    for index, datum in enumerate(request.data):
        _check_tokens(f"data[{index}].model_input", datum.tokens, vocab_size, max_context)
        _check_inputs(f"data[{index}].loss_fn_inputs", datum, spec, vocab_size)
    return config


def num_targets(datum: Datum) -> int:
    """K of ``target_tokens`` [N, K]; 1 for [N]."""
    targets = datum.inputs["target_tokens"]
    return 1 if targets.ndim == 1 else targets.shape[1]


def _check_tokens(field: str, tokens: np.ndarray, vocab_size: int, max_context: int) -> None:
    if tokens.ndim != 1 or not 1 <= tokens.size <= max_context:
        raise InvalidInput(field, f"tokens of shape {tokens.shape}", f"1 to {max_context} tokens")
    _check_vocabulary(field, tokens, vocab_size)


def _check_vocabulary(field: str, tokens: np.ndarray, vocab_size: int) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise InvalidInput(field, f"dtype {tokens.dtype}", "integers")
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if wrong.size:
        where = tuple(int(i) for i in wrong[0])
        position = where[0] if len(where) == 1 else list(where)
        raise InvalidInput(field, f"token id {tokens[where]} at position {position}", f"0 to {vocab_size - 1}")


def _check_inputs(field: str, datum: Datum, spec: LossSpec, vocab_size: int) -> None:
    known = {"target_tokens", *spec.required, *spec.optional} | ({RECORDED_MASK} if spec.needs_spans else set())
    for name in datum.inputs:
        if name not in known:
            raise InvalidInput(f"{field}.{name}", "a tensor", f"for {spec.name}: {', '.join(sorted(known))}")
    for name in ("target_tokens", *spec.required):
        if name not in datum.inputs:
            raise InvalidInput(f"{field}.{name}", "no tensor", f"one, which {spec.name} needs")
    targets, length = datum.inputs["target_tokens"], datum.tokens.size
    accepted = f"({length},) or ({length}, K)" if spec.multi_target else f"({length},)"
    if targets.shape[:1] != (length,) or targets.ndim > 1 + spec.multi_target or not targets.size:
        raise InvalidInput(f"{field}.target_tokens", f"shape {targets.shape}", f"shape {accepted} as model_input has")
    _check_vocabulary(f"{field}.target_tokens", targets, vocab_size)
    for name, array in datum.inputs.items():
        if array.shape != targets.shape:
            raise InvalidInput(f"{field}.{name}", f"shape {array.shape}", f"shape {targets.shape} as target_tokens")
        wrong = np.argwhere(~np.isfinite(array))
        if wrong.size:
            where = tuple(int(i) for i in wrong[0])
            raise InvalidInput(f"{field}.{name}", f"{array[where]} at position {where[0]}", "finite numbers")


@dataclass(frozen=True)
class HostBatch:
    """One micro-batch in numpy. tokens: int32 [row seq]; targets: int32 [row seq k]; loss: arrays of LossBatch."""

    tokens: np.ndarray
    targets: np.ndarray
    loss: LossBatch


def lay_out(data: Sequence[Datum], shape: Shape, loss_fn: str, config: dict[str, float]) -> HostBatch:
    """Datums as padded rows. Padding is token 0 with weight 0 and ``valid`` 0, on the right and in missing rows.

    Example: datums of 3 and 2 tokens in a shape of 4 rows x 4 positions have
    ``valid`` = [[1 1 1 0] [1 1 0 0] [0 0 0 0] [0 0 0 0]].
    """
    plane = (shape.rows, shape.length)
    tokens, targets = np.zeros(plane, np.int32), np.zeros((*plane, shape.num_targets), np.int32)
    weights = np.zeros(targets.shape, np.float32)
    valid, recorded, advantages, mask = (np.zeros(plane, np.float32) for _ in range(4))
    clips = {name: np.full(plane, config.get(name, 0.0), np.float32) for name in CLIPS}
    for row, datum in enumerate(data):
        length, inputs = datum.tokens.size, datum.inputs
        tokens[row, :length] = datum.tokens
        valid[row, :length] = 1.0
        targets[row, :length, : num_targets(datum)] = inputs["target_tokens"].reshape(length, -1)
        if "weights" in inputs:
            weights[row, :length, : num_targets(datum)] = inputs["weights"].reshape(length, -1)
        for name, plane_of in (("logprobs", recorded), ("advantages", advantages), *clips.items()):
            if name in inputs:
                plane_of[row, :length] = inputs[name]
        # stable_reinforce with logprobs but no mask: all of them are to be taken as recorded.
        known = inputs.get("sequence_ratio_mask", inputs.get(RECORDED_MASK, float("logprobs" in inputs)))
        mask[row, :length] = known
    scalars = (np.asarray(config.get(name, 0.0), np.float32) for name in ("beta", "kl_coeff", "ratio_cap"))
    loss_id = np.asarray(LOSS_IDS[loss_fn], np.int32)
    loss = LossBatch(loss_id, valid, weights, recorded, advantages, mask, *clips.values(), *scalars)
    return HostBatch(tokens, targets, loss)
