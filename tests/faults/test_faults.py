"""A short run of the harness on either database; ``python -m tests.faults`` makes long ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.faults.client import Lost
from tests.faults.harness import ADAPTER, OPTIMIZER, compare, run

KILLS = 6


@pytest.mark.timeout(900)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_nothing_is_lost_or_done_twice(request, tmp_path: Path, tiny_qwen3: Path, database: str) -> None:
    url = request.getfixturevalue("postgres_url") if database == "postgresql" else None
    report = run(tiny_qwen3, tmp_path, kills=KILLS, seed=5, database_url=url)
    assert report.kills >= KILLS
    assert report.bit_equal >= 3 * report.rounds, "of four tenants, three must be equal to the bit"
    assert report.bit_equal + report.within_tolerance == 4 * report.rounds


def test_what_counts_as_equal() -> None:
    expected = {f"{ADAPTER}/a": np.float32([1, 2]), f"{OPTIMIZER}/mu.a": np.float32([0, 1000])}
    assert compare(expected, expected, exact=True)
    near = {f"{ADAPTER}/a": np.float32([1, 2 + 5e-7]), f"{OPTIMIZER}/mu.a": np.float32([0, 1000.0005])}
    assert not compare(near, expected, exact=False)
    with pytest.raises(Lost):
        compare(near, expected, exact=True)
    for name, far in ((f"{ADAPTER}/a", [1, 2.00001]), (f"{OPTIMIZER}/mu.a", [0, 1000.01])):
        with pytest.raises(AssertionError, match=name):
            compare(expected | {name: np.float32(far)}, expected, exact=False)
