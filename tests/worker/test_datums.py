"""Datums: every malformed one is refused by name; padding carries no weight."""

from __future__ import annotations

import numpy as np
import pytest

from tx.errors import InvalidInput, Unsupported
from tx.types import Datum, ForwardBackward
from tx.worker.datums import check, lay_out
from tx.worker.shapes import Shape


def tensors(length: int, *names: str) -> dict[str, np.ndarray]:
    targets = {"target_tokens": np.arange(length, dtype=np.int64)}
    return targets | {name: np.full(length, 0.5, np.float32) for name in names}


def request(*data: Datum, loss_fn: str = "cross_entropy", **config: float) -> ForwardBackward:
    return ForwardBackward("m", 0, data, loss_fn, dict(config), False)


def sft(length: int = 4, **changes: np.ndarray) -> Datum:
    return Datum(np.arange(length, dtype=np.int32), tensors(length, "weights") | changes)


def rl(length: int = 4, *more: str, **changes: np.ndarray) -> Datum:
    return Datum(np.arange(length, dtype=np.int32), tensors(length, "logprobs", "advantages", *more) | changes)


BAD = {
    "data: got no datums": request(),
    "loss_fn: got 'mse'": request(sft(), loss_fn="mse"),
    "loss_fn_config.temperature": request(rl(), loss_fn="ppo", temperature=1.0),
    "loss_fn_config.clip_low_threshold": request(rl(), loss_fn="ppo", clip_low_threshold=float("nan")),
    r"data\[0\].model_input: got tokens of shape \(0,\)": request(Datum(np.zeros(0, np.int32), tensors(0, "weights"))),
    r"data\[0\].model_input: got tokens of shape \(65,\)": request(sft(65)),
    r"data\[1\].model_input: got token id 100 at position 2, accepted: 0 to 99": request(
        sft(), Datum(np.array([1, 2, 100, 3], np.int32), tensors(4, "weights"))
    ),
    r"data\[0\].model_input: got token id -1": request(Datum(np.array([-1], np.int32), tensors(1, "weights"))),
    r"data\[0\].loss_fn_inputs.target_tokens: got token id 7000 at position 0": request(
        sft(1, target_tokens=np.array([7000]))
    ),
    r"data\[0\].loss_fn_inputs.target_tokens: got dtype float32": request(sft(target_tokens=np.zeros(4, np.float32))),
    r"data\[0\].loss_fn_inputs.target_tokens: got shape \(3,\)": request(sft(target_tokens=np.zeros(3, np.int64))),
    r"target_tokens: got shape \(4, 0\)": request(sft(target_tokens=np.zeros((4, 0), np.int64))),
    r"target_tokens: got shape \(4, 2\), accepted: shape \(4,\) as": request(
        rl(target_tokens=np.zeros((4, 2), np.int64)), loss_fn="ppo"
    ),
    r"data\[0\].loss_fn_inputs.weights: got shape \(3,\)": request(sft(weights=np.ones(3, np.float32))),
    r"data\[0\].loss_fn_inputs.weights: got nan at position 1": request(
        sft(weights=np.array([0, np.nan, 0, 0], np.float32))
    ),
    r"data\[0\].loss_fn_inputs.logprobs: got -inf at position 0": request(
        rl(logprobs=np.full(4, -np.inf, np.float32)), loss_fn="cispo"
    ),
    r"data\[0\].loss_fn_inputs.weights: got no tensor": request(Datum(np.zeros(4, np.int32), tensors(4))),
    r"data\[0\].loss_fn_inputs.target_tokens: got no tensor": request(
        Datum(np.zeros(4, np.int32), {"weights": np.ones(4, np.float32)})
    ),
    r"data\[0\].loss_fn_inputs.sequence_ratio_mask: got no tensor": request(rl(), loss_fn="gspo"),
    r"data\[0\].loss_fn_inputs.mask: got a tensor": request(rl(4, "mask"), loss_fn="ppo"),
    r"data\[0\].loss_fn_inputs.recorded_mask: got a tensor": request(rl(4, "recorded_mask"), loss_fn="ppo"),
}


@pytest.mark.parametrize("message", BAD)
def test_the_first_wrong_field_is_named(message: str):
    with pytest.raises(InvalidInput, match=message):
        check(BAD[message], vocab_size=100, max_context=64)


def test_good_requests_pass_and_get_their_defaults():
    wide = {"target_tokens": np.zeros((4, 3), np.int64), "weights": np.ones((4, 3), np.float32)}
    assert check(request(sft(), sft(64), Datum(np.zeros(4, np.int32), wide)), 100, 64) == {}
    assert check(request(rl(), loss_fn="ppo", clip_low_threshold=0.5), 100, 64) == {
        "clip_low_threshold": 0.5,
        "clip_high_threshold": 1.2,
    }
    check(request(rl(4, "clip_low_threshold"), loss_fn="cispo"), 100, 64)
    check(request(rl(4, "recorded_mask"), loss_fn="stable_reinforce"), 100, 64)
    with pytest.raises(Unsupported):
        check(request(sft(), loss_fn="custom"), 100, 64)


def test_padding_is_invalid_and_weightless():
    host = lay_out([sft(3), sft(2)], Shape(4, 4, 2), "cross_entropy", {})
    assert host.loss.valid.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert host.tokens[0].tolist() == [0, 1, 2, 0]
    assert host.targets[0, :, 0].tolist() == [0, 1, 2, 0]
    assert host.loss.weights.sum() == 0.5 * 5
    assert not host.loss.weights[..., 1].any()


def test_per_token_clips_override_the_config():
    low = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    host = lay_out([rl(clip_low_threshold=low), rl()], Shape(2, 4, 1), "ppo", config)
    np.testing.assert_array_equal(host.loss.clip_low, [low, np.full(4, 0.8, np.float32)])
    np.testing.assert_array_equal(host.loss.clip_high, np.full((2, 4), 1.2, np.float32))


def test_masks_of_gspo_and_stable_reinforce():
    half = np.array([0, 0, 1, 1], np.float32)
    shape = Shape(1, 4, 1)
    assert lay_out([rl(sequence_ratio_mask=half)], shape, "gspo", {}).loss.mask.tolist() == [[0, 0, 1, 1]]
    assert lay_out([rl(recorded_mask=half)], shape, "stable_reinforce", {}).loss.mask.tolist() == [[0, 0, 1, 1]]
    assert lay_out([rl()], shape, "stable_reinforce", {}).loss.mask.tolist() == [[1, 1, 1, 1]]
