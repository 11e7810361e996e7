"""Every refusal names the field, what was given and what is accepted, and stays short."""

import pytest

from tx import errors


@pytest.mark.parametrize("kind", [errors.InvalidInput, errors.NotFound, errors.TooLarge, errors.Unsupported])
def test_message_has_field_got_and_accepted(kind):
    error = kind("lora_config.rank", 64, "1 to 32")
    assert str(error) == "lora_config.rank: got 64, accepted: 1 to 32"
    assert error.field == "lora_config.rank"
    assert isinstance(error, errors.InvalidInput)


def test_a_huge_value_is_cut():
    error = errors.InvalidInput("prompt", "x" * 100_000, "a shorter one")
    assert len(str(error)) < 300
    assert str(error).endswith("…, accepted: a shorter one")


def test_only_callers_mistakes_are_invalid_input():
    for kind in (errors.Overloaded, errors.ModelLost, errors.StartupError):
        assert issubclass(kind, errors.TxError)
        assert not issubclass(kind, errors.InvalidInput)
