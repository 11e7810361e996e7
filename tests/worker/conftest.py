"""What tests of the trainer share."""

from __future__ import annotations

import pytest

from tests.support.golden_lora import read_golden
from tests.support.trainer_lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A trainer on the golden Llama, for the tests of one file."""
    return Lab(read_golden("lora_llama", tmp_path_factory.mktemp("lora") / "llama"))
