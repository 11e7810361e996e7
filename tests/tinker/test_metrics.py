"""Prometheus text of the three kinds of series."""

from __future__ import annotations

from tx.tinker.metrics import Metrics


def test_text_format():
    metrics = Metrics()
    metrics.count("hits", route='a"b')
    metrics.count("hits", 2, route='a"b')
    for seconds in (0.005, 0.02, 99.0):
        metrics.observe("wait_seconds", seconds, route="r")
    lines = metrics.render({"depth": 3}).splitlines()
    assert "# TYPE hits counter" in lines
    assert 'hits{route="a\\"b"} 3' in lines
    assert 'wait_seconds_bucket{route="r",le="0.005"} 1' in lines
    assert 'wait_seconds_bucket{route="r",le="0.025"} 2' in lines
    assert 'wait_seconds_bucket{route="r",le="+Inf"} 3' in lines
    assert 'wait_seconds_count{route="r"} 3' in lines
    assert 'wait_seconds_sum{route="r"} 99.025' in lines
    assert lines[-2:] == ["# TYPE depth gauge", "depth 3"]
