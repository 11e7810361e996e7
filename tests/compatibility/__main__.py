"""``python -m tests.compatibility``: start a server on a tiny model, make every call, write docs/compatibility.md."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the SDK's libraries read it

from tests.compatibility import matrix, report
from tests.support.server import BASE_MODEL, Server
from tests.support.tiny_models import write_tiny_model


def main() -> int:
    """0 if nothing fails; the document is written anyhow."""
    with tempfile.TemporaryDirectory(prefix="tx-compatibility-") as made:
        folder = Path(made)
        model = write_tiny_model(folder / "model", "qwen3")
        (folder / "server").mkdir()
        (folder / "home").mkdir()
        with Server(model, folder / "server", rank=32) as server:
            rows = matrix.run(server.url, BASE_MODEL, folder / "home")
    report.DOCUMENT.write_text(report.render(rows), encoding="utf-8")
    failed = [row for row in rows if row.result == matrix.FAILS]
    for row in failed:
        print(f"{row.target} {row.option}: {row.note}\n{row.trace}", file=sys.stderr)
    print(f"{report.DOCUMENT}: {len(rows)} rows, {len(failed)} fail")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
