"""Too many memory maps: nothing more is compiled ahead, then all programs are forgotten, and the work goes on."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compilations import compilations
from tests.worker.test_ahead import settle, small_worker, step
from tests.worker.test_usual import drain, submit
from tx.types import LoraConfig
from tx.worker import maps
from tx.worker.ahead import Ahead
from tx.worker.maps import CHECK_EVERY_S, MapsGuard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fewer maps are allowed than any process has."""
    limit = tmp_path / "max_map_count"
    limit.write_text("20\n")
    monkeypatch.setattr(maps, "_LIMIT", limit)


def test_share_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert 0 < maps.share_in_use() < 1
    (tmp_path / "maps").write_text("one\ntwo\nthree\n")
    (tmp_path / "limit").write_text("12\n")
    monkeypatch.setattr(maps, "_MAPS", tmp_path / "maps")
    monkeypatch.setattr(maps, "_LIMIT", tmp_path / "limit")
    assert maps.share_in_use() == 0.25
    monkeypatch.setattr(maps, "_MAPS", tmp_path / "none")
    assert maps.share_in_use() == 0.0


def test_programs_are_forgotten_when_there_are_too_many_and_not_at_every_look(few: None):
    now = 0.0
    guard, program, x = MapsGuard(clock=lambda: now), jax.jit(lambda x: x + 1), jnp.zeros(3)
    for seconds, expected in ((0.0, 1), (CHECK_EVERY_S - 1, 0), (1.0, 1), (1.0, 0), (CHECK_EVERY_S, 1)):
        now += seconds
        guard.check()
        with compilations() as compiled:
            program(x)
        assert len(compiled) == expected, now


def test_programs_are_kept_while_there_is_room():
    now = 0.0
    guard, program, x = MapsGuard(clock=lambda: now), jax.jit(lambda x: x + 1), jnp.zeros(3)
    program(x)
    now = CHECK_EVERY_S
    guard.check()
    with compilations() as compiled:
        program(x)
    assert compiled == []


def test_what_leaves_no_room_is_not_compiled_ahead(monkeypatch: pytest.MonkeyPatch):
    shares, order = iter([maps.MOST_AHEAD + 0.1]), []
    monkeypatch.setattr(maps, "share_in_use", lambda: next(shares, 0.0))
    ahead = Ahead()
    ahead.start()
    ahead.ask([step(key, lambda _, key=key: order.append(key)) for key in ("too much", "fits")])
    settle(ahead)
    assert order == ["fits"]


def test_a_worker_goes_on_with_the_same_numbers(tmp_path: Path, few: None):
    worker, found = small_worker(tmp_path), []
    worker.create_model("a", LoraConfig(8, seed=1))
    for forget in (False, True):
        if forget:
            worker._maps._checked_at = -math.inf
        submit(worker, np.random.default_rng(0), "a", [30, 20], forward_only=False)
        with compilations() as compiled:
            (finished,) = drain(worker)
        assert compiled != []
        found.append(finished.result.logprobs)
    for before, after in zip(*found, strict=True):
        np.testing.assert_array_equal(before, after)
