"""The loss table: lookups refuse by name, settings are filled in or refused by key."""

import math

import pytest

from tx.errors import InvalidInput, Unsupported
from tx.loss_specs import LOSSES, check_config, get


def test_unknown_loss_lists_the_known():
    with pytest.raises(Unsupported, match=r"loss_fn: got 'hinge', accepted: one of cross_entropy.*gspo"):
        get("hinge")


@pytest.mark.parametrize("name", LOSSES)
def test_defaults_are_within_their_own_range(name):
    spec = get(name)
    assert spec.name == name
    assert check_config(spec, {}) == {key: entry.default for key, entry in spec.config.items()}
    assert check_config(spec, dict(check_config(spec, {}))) == check_config(spec, {})


def test_given_settings_replace_defaults_and_become_floats():
    values = check_config(get("ppo"), {"clip_low_threshold": 1})
    assert values == {"clip_low_threshold": 1.0, "clip_high_threshold": 1.2}
    assert isinstance(values["clip_low_threshold"], float)


@pytest.mark.parametrize(
    ("loss", "config", "field"),
    [
        ("cross_entropy", {"beta": 1.0}, "loss_fn_config.beta"),
        ("dro", {"beta": -0.1}, "loss_fn_config.beta"),
        ("dro", {"beta": math.nan}, "loss_fn_config.beta"),
        ("dro", {"beta": math.inf}, "loss_fn_config.beta"),
        ("dro", {"beta": "small"}, "loss_fn_config.beta"),
        ("ppo", {"clip_low_threshold": 1.3}, "loss_fn_config.clip_low_threshold"),
        ("ppo", {"clip_high_threshold": 0.7}, "loss_fn_config.clip_low_threshold"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_key(loss, config, field):
    with pytest.raises(InvalidInput) as caught:
        check_config(get(loss), config)
    assert caught.value.field == field
