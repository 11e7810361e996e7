"""Ages by uptime: clocks that leap forward and back, in one process and between two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.clocks import Clocks
from tx.tinker.uptime import Uptime

DAY_S = 86400.0
T0 = 1.8e9


def new_uptime(clocks: Clocks, file: Path | None = None, settle_s: float = 0.0) -> Uptime:
    return Uptime(file, settle_s=settle_s, clock=lambda: clocks.wall, steady=lambda: clocks.steady)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks(T0)


def test_while_the_clock_is_right_an_age_is_an_age(clocks):
    uptime = new_uptime(clocks)
    for _ in range(3):
        assert uptime.before(DAY_S) == pytest.approx(clocks.wall - DAY_S)
        assert uptime.span(15.0) == pytest.approx((clocks.wall - 15, clocks.wall))
        clocks.go_on(1000.0)
    assert uptime.seconds() == 3000.0


def test_the_example_of_the_docstring(clocks):
    clocks.wall = 1000.0
    uptime = new_uptime(clocks)
    clocks.go_on(100)
    clocks.wall = 9000.0
    assert uptime.before(50) == pytest.approx(1050.0)
    clocks.go_on(10)
    assert uptime.before(50) == pytest.approx(1060.0)
    clocks.go_on(50)
    assert uptime.before(50) == pytest.approx(9010.0)


@given(
    ages=st.sampled_from((30.0, 3600.0, DAY_S)),
    happens=st.lists(
        st.tuples(
            st.floats(0.0, 2 * DAY_S),
            st.sampled_from((0.0, 0.0, 0.4, 9 * DAY_S, -9 * DAY_S, 365 * DAY_S)),
            st.booleans(),
        ),
        max_size=12,
    ),
)
def test_nothing_younger_is_ever_called_old(tmp_path_factory, ages, happens):
    """The clocks go on, leap and processes die in any order; a row is written after each."""
    clocks = Clocks(T0)
    file = tmp_path_factory.mktemp("uptime") / "uptime"
    uptime = new_uptime(clocks, file)
    written = []
    for seconds, leap, dies in happens:
        clocks.go_on(seconds)
        clocks.wall += leap
        if dies:
            clocks.steady += 1e5  # whatever: another process asks another clock
            uptime = new_uptime(clocks, file)
        written.append((clocks.wall, uptime.seconds()))
        for wall, at in written:
            first, last = uptime.span(ages)
            if uptime.seconds() - at <= ages:
                assert first - 1e-3 <= wall <= last + 1e-3
    clocks.go_on(2 * ages + 1)
    uptime.span(ages)
    clocks.go_on(2 * ages + 1)
    assert uptime.before(ages) == pytest.approx(clocks.wall - ages, abs=1.0), "a leap is forgotten after so long"


def test_a_leap_between_two_processes_is_noticed_by_the_second(clocks, tmp_path):
    file = tmp_path / "new folder" / "uptime"
    uptime = new_uptime(clocks, file)
    clocks.go_on(1000.0)
    uptime.before(1.0)
    written = clocks.wall
    clocks.wall += 9 * DAY_S
    clocks.steady = 3.0  # the machine has booted

    uptime = new_uptime(clocks, file)
    assert uptime.seconds() == 1000.0
    assert uptime.before(DAY_S) == pytest.approx(written - DAY_S)
    clocks.go_on(DAY_S - 1)
    assert uptime.before(DAY_S) <= written
    clocks.go_on(2)
    assert uptime.before(DAY_S) > written


@pytest.mark.parametrize("content", [None, "", "[]", '{"uptime_s": 3}', '{"uptime_s": 3, "frames": [[1]]}', "\0"])
def test_without_a_record_nothing_is_old_at_first(clocks, tmp_path, content):
    file = tmp_path / "uptime"
    if content is not None:
        file.write_text(content)
    uptime = new_uptime(clocks, file, settle_s=3600.0)
    assert uptime.before(DAY_S) == 0.0
    assert uptime.span(DAY_S)[0] > 0
    clocks.go_on(3600.0)
    assert uptime.before(DAY_S) == pytest.approx(clocks.wall - DAY_S)
    assert new_uptime(clocks, file, settle_s=3600.0).before(DAY_S) > 0, "with one, at once"


def test_a_folder_that_takes_no_file_costs_only_the_record(clocks, tmp_path):
    (tmp_path / "taken").write_text("a file")
    uptime = new_uptime(clocks, tmp_path / "taken" / "uptime")
    assert uptime.before(10.0) == pytest.approx(clocks.wall - 10)


def test_a_clock_that_leaps_all_the_time_fills_no_file(clocks, tmp_path):
    file = tmp_path / "uptime"
    uptime = new_uptime(clocks, file)
    for number in range(1000):
        clocks.go_on(1.0)
        clocks.wall += 5.0 if number % 2 else -5.0
        uptime.span(1.0)
    assert len(json.loads(file.read_text())["frames"]) <= 100
    assert uptime.before(5000.0) <= clocks.wall - 5000.0
