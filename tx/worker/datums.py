"""Datums on the host: checked against the loss's table, and laid out as a micro-batch's padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tx import loss_specs
from tx.errors import InvalidInput
from tx.layers.logprobs import Order
from tx.loss_specs import LossSpec
from tx.types import Datum, ForwardBackward
from tx.worker.losses import LOSS_IDS, LossBatch
from tx.worker.shapes import Shape

RECORDED_MASK = "recorded_mask"
"""Extra input of stable_reinforce, put there by the engine: 1 where ``logprobs`` is one that this server recorded."""


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HostBatch:
    """One micro-batch, numpy until it goes to the device. int32 [row seq] unless said; ``targets`` [row seq k].

    Attributes:
        positions: of each token in its own datum.
        starts: where in its row each token's datum begins.
        order: which positions the head looks at first.
        loss: arrays of LossBatch.
    """

    tokens: Any
    positions: Any
    starts: Any
    targets: Any
    order: Order
    loss: LossBatch

    @property
    def has_sequence_ratios(self) -> bool:
        """Whether a loss needs ``sequence_log_ratio``; asked while the arrays are numpy."""
        return bool((self.loss.loss_id == LOSS_IDS["gspo"]).any())


@dataclass(frozen=True)
class Given:
    """A datum with the loss that its request asked for."""

    datum: Datum
    loss_fn: str
    config: dict[str, float]


def lay_out(rows: Sequence[Sequence[Given]], shape: Shape) -> HostBatch:
    """Datums one behind the other in their rows. Padding is token 0 without a loss, on the right and in missing rows.

    Example: datums of 3 and 2 tokens in one row of 8 have positions [0 1 2 0 1 0 0 0] and starts [0 0 0 3 3 5 6 7]:
    each position of padding stands alone.
    """
    plane = (shape.rows, shape.length)
    own = np.broadcast_to(np.arange(shape.length, dtype=np.int32), plane)
    tokens, positions, starts = np.zeros(plane, np.int32), np.zeros(plane, np.int32), own.copy()
    targets = np.zeros((*plane, shape.num_targets), np.int32)
    loss_id = np.full(plane, -1, np.int32)
    weights = np.zeros(targets.shape, np.float32)
    planes = {name: np.zeros(plane, np.float32) for name in (*_INPUTS, "mask", "sequence_log_ratio")}
    for row, datums in enumerate(rows):
        begin = 0
        for given in datums:
            datum, config = given.datum, given.config
            length, inputs = datum.tokens.size, datum.inputs
            here = (row, slice(begin, begin + length))
            tokens[here], positions[here], starts[here] = datum.tokens, own[row, :length], begin
            targets[(*here, slice(num_targets(datum)))] = inputs["target_tokens"].reshape(length, -1)
            loss_id[here] = LOSS_IDS[given.loss_fn]
            if "weights" in inputs:
                weights[(*here, slice(num_targets(datum)))] = inputs["weights"].reshape(length, -1)
            for name, source in _INPUTS.items():
                planes[name][here] = inputs.get(source, config.get(source, 0.0))
            # stable_reinforce with logprobs but no mask: all of them are to be taken as recorded.
            known = inputs.get("sequence_ratio_mask", inputs.get(RECORDED_MASK, float("logprobs" in inputs)))
            planes["mask"][here] = known
            begin += length
    datum_ids = starts + shape.length * np.arange(shape.rows, dtype=np.int32)[:, None]
    loss = LossBatch(loss_id=loss_id, datum=datum_ids, weights=weights, **planes)
    return HostBatch(tokens, positions, starts, targets, _order(loss), loss)


_INPUTS = {
    "recorded": "logprobs",
    "advantages": "advantages",
    "clip_low": "clip_low_threshold",
    "clip_high": "clip_high_threshold",
    "beta": "beta",
    "kl_coeff": "kl_coeff",
    "ratio_cap": "ratio_cap",
}
"""Fields of LossBatch, and the input or setting by whose name a datum gives them."""


def _order(loss: LossBatch) -> Order:
    """Each row's positions: those whose loss has a derivative, then the other real ones, then padding."""
    valid = loss.loss_id >= 0
    weighted = (loss.weights != 0).any(axis=-1) | (loss.advantages != 0)
    weighted |= (loss.beta != 0) | ((loss.kl_coeff != 0) & (loss.mask > 0))
    weighted &= valid
    rank = np.where(weighted, 0, np.where(valid, 1, 2))
    first = np.argsort(rank, axis=1, kind="stable").astype(np.int32)
    most = lambda which: np.asarray(which.sum(axis=1).max(initial=0), np.int32)
    return Order(first, most(weighted), most(valid))
