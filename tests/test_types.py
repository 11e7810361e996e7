"""The nouns: defaults are the protocol's, scaling is alpha over rank."""

import dataclasses

import pytest

from tx import types


@pytest.mark.parametrize(("rank", "scaling"), [(1, 32.0), (8, 4.0), (32, 1.0), (64, 0.5)])
def test_scaling_is_alpha_over_rank(rank, scaling):
    assert types.LoraConfig(rank=rank, seed=0).scaling == scaling


def test_adam_defaults_are_the_protocols():
    assert dataclasses.astuple(types.AdamParams()) == (1e-4, 0.9, 0.95, 1e-12, 0.0, 0.0)


def test_sampling_defaults_sample_the_whole_distribution_until_end_of_sequence():
    params = types.SamplingParams()
    assert (params.temperature, params.top_k, params.top_p) == (1.0, -1, 1.0)
    assert params.max_tokens is None
    assert params.stop_on_eos


def test_requests_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        types.AdamParams().learning_rate = 1.0
