"""What one process writes, the next one reads, however the first one ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tx.tinker.in_flight import InFlight


def test_a_killed_process_leaves_what_it_had(tmp_path):
    file = tmp_path / "new" / "in-flight"
    script = f"""
import os, signal
from pathlib import Path
from tx.tinker.in_flight import InFlight
flight = InFlight(Path({str(file)!r}))
flight.set(range(1, 300))
flight.set([3, 2**40])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    flight = InFlight(file)
    assert flight.suspects == {3, 2**40}
    flight.close()


def test_nobody_is_suspected_when_somebody_killed_the_engine(tmp_path):
    InFlight(tmp_path / "f").set([1])
    assert InFlight(tmp_path / "f", blameless=True).suspects == frozenset()
    assert InFlight(tmp_path / "f").suspects == frozenset(), "nor later"


def test_a_process_that_stops_in_order_leaves_nothing(tmp_path):
    flight = InFlight(tmp_path / "f")
    flight.set([1, 2])
    flight.close()
    assert InFlight(tmp_path / "f").suspects == frozenset()


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, (2**62).to_bytes(8, "little")])
def test_a_damaged_file_suspects_nobody(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    assert InFlight(tmp_path / "f").suspects == frozenset()


def test_a_folder_that_cannot_be_written_costs_only_the_knowledge(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    flight = InFlight(tmp_path / "file" / "in-flight")
    flight.set([1])
    flight.close()
    assert "can't be written" in caplog.text
