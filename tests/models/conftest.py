"""Goldens that several files of this folder read."""

from __future__ import annotations

import pytest

from tests.support.golden_lora import Golden, read_golden


@pytest.fixture(scope="session")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Golden]:
    """What make_peft.py wrote, by family."""
    folder = tmp_path_factory.mktemp("peft")
    return {family: read_golden(f"peft_{family}", folder / family) for family in ("llama", "qwen3", "moe", "mixed")}
