"""Every field of AdamParams is honoured or refused by name (lessons C12)."""

import math

import pytest

from tx.errors import InvalidInput, Unsupported
from tx.tinker.wire.optimizer import adam_params, check_optimizer_config
from tx.types import AdamParams


def test_every_field_is_taken():
    given = {
        "learning_rate": 0.5, "beta1": 0.1, "beta2": 0.2, "eps": 1e-6, "weight_decay": 0.3, "grad_clip_norm": 2,
    }  # fmt: skip
    assert adam_params({"adam_params": given}) == AdamParams(0.5, 0.1, 0.2, 1e-6, 0.3, 2.0)


def test_absent_fields_take_the_sdks_defaults():
    expected = AdamParams(1e-4, 0.9, 0.95, 1e-12, 0.0, 0.0)
    assert adam_params({"adam_params": {"beta1": None}}) == adam_params({}) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-4),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("learning_rate", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("grad_clip_norm", -1),
        ("amsgrad", True),
    ],
)
def test_c12_a_field_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidInput, match=rf"^adam_params\.{field}: "):
        adam_params({"adam_params": {field: value}})


def test_c12_other_optimizers_are_refused_by_name():
    with pytest.raises(Unsupported, match="dimuon"):
        adam_params({"optimizer_params": {"type": "dimuon", "learning_rate": 0.01}})
    with pytest.raises(Unsupported, match=r"optimizer_config\.type: got 'dimuon'"):
        check_optimizer_config({"type": "dimuon", "version": 1})
    check_optimizer_config({"type": "adamw"})
    check_optimizer_config(None)
