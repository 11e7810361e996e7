"""What the comparison of two servers computes from their results; that it takes turns is in test_sampling_bench."""

import json
import sys

import pytest

from benchmarks.compare import better, collect, main, one_turn, table


def results(server, *values):
    return [
        {"server": server, "result": {"phase": "ragged", "warm_tokens_per_s": value, "round_s": [1, 2], "first_s": 10}}
        for value in values
    ]


@pytest.mark.parametrize(
    ("metric", "times"),
    [
        ("a.tokens_per_s", 2.0),
        ("a.first_s", 0.5),
        ("a.p50_ms", 0.5),
        ("a.peak_mb", 0.5),
        ("a.growth_kb", 0.5),
        ("a.sequences", None),
    ],
)
def test_better_knows_the_direction_from_the_unit(metric, times):
    assert better(metric, 6.0, 3.0) == times


def test_nothing_divides_by_zero():
    assert better("a.first_s", 0.0, 3.0) is None
    assert better("a.tokens_per_s", 6.0, 0.0) is None


def test_ratios_are_those_of_medians():
    runs = collect([*results("tx", 100, 400, 120), *results("peer", 10, 30, 20)])
    assert runs["tx"]["ragged.warm_tokens_per_s"] == [100, 400, 120]
    assert "ragged.round_s" not in runs["tx"]
    lines = {line.split()[0]: line for line in table(runs, "tx", "peer")}
    assert lines["ragged.warm_tokens_per_s"].split()[-1] == "6.00×"
    assert "120 (100 … 400)" in lines["ragged.warm_tokens_per_s"]
    assert lines["ragged.first_s"].split()[-1] == "1.00×"


def test_kept_results_are_read_again(tmp_path, monkeypatch, capsys):
    for name, value in {"tx": 60, "peer": 20}.items():
        lines = [json.dumps(result) for result in results(name, value)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--read", str(tmp_path / "tx"), str(tmp_path / "peer")])
    main()
    assert "3.00×" in capsys.readouterr().out


def test_a_turn_that_takes_too_long_is_ended(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import threading\nprint('{}', flush=True)\nthreading.Event().wait()\n")
    with pytest.raises(SystemExit, match=r"tx: script\.py ended with status -9"):
        one_turn(script, ["tx", "http://localhost:1", "model", sys.executable], [], limit_s=1)
