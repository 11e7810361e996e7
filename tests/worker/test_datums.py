"""Datums: every malformed one is refused by name; several share a row, each with its own loss; padding has none."""

from __future__ import annotations

import numpy as np
import pytest

from tx.errors import InvalidInput, Unsupported
from tx.types import Datum, ForwardBackward
from tx.worker.datums import Given, check, lay_out, num_targets
from tx.worker.losses import LOSS_IDS
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


def given(datum: Datum, loss_fn: str = "cross_entropy", **config: float) -> Given:
    return Given(datum, loss_fn, config)


def test_several_datums_in_a_row():
    """The example of the docstring, a row of one datum, and a row that is missing."""
    host = lay_out([[given(sft(3)), given(sft(2))], [given(sft(8))]], Shape(3, 8, 1))
    own = list(range(8))
    assert host.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], own, [0] * 8]
    assert host.starts.tolist() == [[0, 0, 0, 3, 3, 5, 6, 7], [0] * 8, own]
    assert host.tokens.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], own, [0] * 8]
    assert host.targets[..., 0].tolist() == host.tokens.tolist()
    assert host.loss.loss_id.tolist() == [
        [LOSS_IDS["cross_entropy"]] * 5 + [-1] * 3,
        [LOSS_IDS["cross_entropy"]] * 8,
        [-1] * 8,
    ]
    assert host.loss.weights[..., 0].tolist() == [[0.5] * 5 + [0.0] * 3, [0.5] * 8, [0.0] * 8]
    # One number per datum, and one for each position of padding: segments of a sum over all of them.
    assert host.loss.datum.tolist() == [[0, 0, 0, 3, 3, 5, 6, 7], [8] * 8, list(range(16, 24))]
    for array in (host.tokens, host.positions, host.starts, host.targets, host.order.first, host.loss.datum):
        assert array.dtype == np.int32
    assert {array.dtype for array in (host.loss.weights, host.loss.recorded, host.loss.mask)} == {np.dtype(np.float32)}


def test_datums_of_several_widths_share_a_micro_batch():
    """K targets of [N, K], one of [N]: the other columns have no weight."""
    wide = Datum(
        np.array([7, 8], np.int32),
        {
            "target_tokens": np.array([[1, 2, 3], [4, 5, 6]], np.int64),
            "weights": np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], np.float32),
        },
    )
    assert num_targets(wide) == 3
    assert num_targets(sft(2)) == 1
    host = lay_out([[given(sft(2)), given(wide)]], Shape(1, 16, 4))
    assert host.targets[0, :5].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 2, 3, 0], [4, 5, 6, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(
        host.loss.weights[0, :5],
        np.array([[0.5, 0, 0, 0], [0.5, 0, 0, 0], [0.1, 0.2, 0.3, 0], [0.4, 0.5, 0.6, 0], [0] * 4], np.float32),
    )


def test_the_head_sees_weighted_positions_first():
    """Row 0: a datum of which two positions count, then one that counts whole; row 1: nothing that counts."""
    some = sft(4, weights=np.array([0, 1, 0, -2], np.float32))
    none = sft(5, weights=np.zeros(5, np.float32))
    order = lay_out([[given(some), given(sft(2))], [given(none)]], Shape(3, 8, 1)).order
    assert order.first.tolist() == [[1, 3, 4, 5, 0, 2, 6, 7], list(range(8)), list(range(8))]
    assert order.num_weighted.tolist() == 4
    assert order.num_valid.tolist() == 6


@pytest.mark.parametrize(
    ("loss_fn", "datum", "config", "count"),
    [
        ("ppo", rl(advantages=np.array([0, 1, 0, 0], np.float32)), {}, 1),
        ("dro", rl(advantages=np.zeros(4, np.float32)), {"beta": 0.1}, 4),
        ("dro", rl(advantages=np.zeros(4, np.float32)), {"beta": 0.0}, 0),
        ("stable_reinforce", rl(advantages=np.zeros(4, np.float32)), {"kl_coeff": 0.1}, 4),
        (
            "stable_reinforce",
            rl(advantages=np.zeros(4, np.float32), recorded_mask=np.array([1, 0, 0, 0], np.float32)),
            {"kl_coeff": 0.1},
            1,
        ),
        ("stable_reinforce", rl(advantages=np.zeros(4, np.float32)), {"kl_coeff": 0.0}, 0),
        ("cross_entropy", sft(4, weights=np.zeros(4, np.float32)), {}, 0),
    ],
)
def test_which_positions_have_a_derivative(loss_fn: str, datum: Datum, config: dict[str, float], count: int):
    host = lay_out([[given(datum, loss_fn, **config)]], Shape(1, 8, 1))
    assert host.order.num_weighted.tolist() == count
    assert host.order.num_valid.tolist() == 4


def test_losses_and_configs_are_each_datums_own():
    """Per-token clips override the config; a neighbour has its own loss, and no clips at all."""
    low = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    clips = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    row = [given(rl(clip_low_threshold=low), "ppo", **clips), given(rl(), "cispo", **clips), given(sft(2))]
    host = lay_out([row], Shape(1, 16, 1))
    fill = lambda *parts: np.concatenate([np.broadcast_to(np.float32(value), size) for value, size in parts])
    np.testing.assert_array_equal(host.loss.clip_low[0], fill((low, 4), (0.8, 4), (0, 8)))
    np.testing.assert_array_equal(host.loss.clip_high[0], fill((1.2, 8), (0, 8)))
    ids = [LOSS_IDS["ppo"]] * 4 + [LOSS_IDS["cispo"]] * 4 + [LOSS_IDS["cross_entropy"]] * 2 + [-1] * 6
    assert host.loss.loss_id[0].tolist() == ids
    assert host.loss.recorded[0].tolist() == [0.5] * 8 + [0.0] * 8
    assert not host.has_sequence_ratios


def test_masks_of_gspo_and_stable_reinforce():
    half = np.array([0, 0, 1, 1], np.float32)
    row = [
        given(rl(sequence_ratio_mask=half), "gspo"),
        given(rl(recorded_mask=half), "stable_reinforce", kl_coeff=0.1, ratio_cap=2.0),
        given(rl(), "stable_reinforce"),
        given(Datum(np.zeros(2, np.int32), tensors(2, "advantages")), "stable_reinforce"),
    ]
    host = lay_out([row], Shape(1, 16, 1))
    assert host.loss.mask[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(host.loss.kl_coeff[0], np.float32([0] * 4 + [0.1] * 4 + [0] * 8))
    np.testing.assert_array_equal(host.loss.ratio_cap[0], np.float32([0] * 4 + [2.0] * 4 + [0] * 8))
    assert host.has_sequence_ratios
