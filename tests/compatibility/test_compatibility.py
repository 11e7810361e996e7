"""docs/compatibility.md is what a live server does today, and nothing on it fails."""

import difflib
from pathlib import Path

import pytest

from tests.compatibility import introspect, matrix, registry, report
from tests.support.server import BASE_MODEL, Server

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def rows(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> list[matrix.Row]:
    with Server(tiny_qwen3, tmp_path_factory.mktemp("compatibility"), rank=32) as server:
        return matrix.run(server.url, BASE_MODEL, tmp_path_factory.mktemp("home"))


def test_nothing_fails(rows: list[matrix.Row]) -> None:
    failed = [f"{row.target} {row.option}: {row.note}\n{row.trace}" for row in rows if row.result == matrix.FAILS]
    assert not failed, "\n".join(failed)


def test_the_page_is_up_to_date(rows: list[matrix.Row]) -> None:
    now, committed = report.render(rows), report.DOCUMENT.read_text(encoding="utf-8")
    changes = "\n".join(
        difflib.unified_diff(committed.splitlines(), now.splitlines(), "committed", "now", "", "", 0, "")
    )
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
