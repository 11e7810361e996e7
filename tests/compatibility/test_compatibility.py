"""docs/compatibility.md is what a live server does today, and nothing on it fails."""

import difflib
from pathlib import Path

import pytest

from tests.compatibility import introspect, matrix, registry, report
from tests.support.server import BASE_MODEL, Server


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # deprecated methods of the SDK are on the page too
def test_the_page_is_what_a_server_does(tiny_qwen3: Path, tmp_path: Path) -> None:
    """One test, so that the calls are made once however tests are spread over processes."""
    (tmp_path / "server").mkdir()
    (tmp_path / "home").mkdir()
    with Server(tiny_qwen3, tmp_path / "server", rank=32) as server:
        rows = matrix.run(server.url, BASE_MODEL, tmp_path / "home")
    failed = [f"{row.target} {row.option}: {row.note}\n{row.trace}" for row in rows if row.result == matrix.FAILS]
    assert not failed, "\n".join(failed)
    now, committed = report.render(rows).splitlines(), report.DOCUMENT.read_text(encoding="utf-8").splitlines()
    changes = "\n".join(difflib.unified_diff(committed, now, "committed", "now", n=0, lineterm=""))
    assert now == committed, f"write docs/compatibility.md anew: {report.REGENERATE}\n{changes}"


def test_an_uncovered_method_is_a_gap() -> None:
    registry.load()
    found = introspect.targets()
    assert registry.gaps(found) == []
    new = found | {"RestClient.do_something_new": {"quickly"}}
    assert registry.gaps(new) == [
        "RestClient.do_something_new has no call",
        "RestClient.do_something_new quickly has no call",
    ]
    del new["RestClient.do_something_new"], new["RestClient.whoami"]
    assert registry.gaps(new) == ["RestClient.whoami is no longer in the SDK"]
