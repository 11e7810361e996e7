"""Every family against transformers (golden files): logits, logits with an adapter, the adapter's gradients."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden import tiny_specs as specs
from tests.support import golden_models as run

TOKENS = specs.tokens()


@pytest.fixture(scope="module", params=list(specs.SPECS))
def case(request, tmp_path_factory):
    return run.load(tmp_path_factory.mktemp("golden"), request.param), run.golden(request.param)


def test_logits_equal_transformers(case):
    model, expected = case
    got = run.logits(model.graphdef, model.weights, TOKENS, run.positions(TOKENS))[:, ::8]
    assert np.max(np.abs(got - expected["logits"])) <= 1e-4


def test_adapter_equals_merged_weights(case):
    model, expected = case
    adapter = run.view(run.seeded_adapter(model))
    got = run.logits(model.graphdef, model.weights, TOKENS, run.positions(TOKENS), adapter)[:, ::8]
    assert np.max(np.abs(expected["lora_logits"] - expected["logits"])) > 1  # the adapter matters
    assert np.max(np.abs(got - expected["lora_logits"])) <= 2e-4


def test_gradients_equal_torch_autograd(case):
    model, expected = case
    logprobs, gradients = run.next_logprobs_and_gradients(
        model.graphdef, model.weights, run.seeded_adapter(model), TOKENS, run.positions(TOKENS)
    )
    assert np.max(np.abs(logprobs - expected["logprobs"])) <= 2e-4
    named = run.by_name(model, gradients)
    assert {f"grad.{name}" for name in named} == {key for key in expected if key.startswith("grad.")}
    errors = {name: run.relative_error(value, expected[f"grad.{name}"]) for name, value in named.items()}
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])
