"""Runs one benchmark against two servers in turn and prints the ratios of their medians. It starts no server.

usage: python benchmarks/compare.py --server NAME URL MODEL PYTHON --server NAME URL MODEL PYTHON [--times 3]
         [--script benchmarks/sampling_bench.py] -- FLAGS OF THE SCRIPT

PYTHON is the interpreter whose SDK speaks to that server, MODEL the id under which it lists the model. Example:

    python benchmarks/compare.py --times 3 \\
      --server tx   http://localhost:8000 HuggingFaceTB/SmolLM2-135M-Instruct .venv/bin/python \\
      --server peer http://localhost:8101 /models/SmolLM2-135M-Instruct-fp32  peer/bin/python \\
      -- --data train.jsonl --tokenizer /models/SmolLM2-135M-Instruct-fp32 --stop 2,0 --phases ragged,group,latency

Only one server is driven at a time, a, b, a, b, …, with a new seed each time, the same for both. An idle server still
takes its memory; where that is short, run the script against one server after the other with ``--keep FILE`` and one
``--server``, and give the two files to ``--read``. "better" is how many times better the first server is than the
second: more per second, or fewer seconds, megabytes or kilobytes. First rounds hold compilation only when the servers
are new: take cold figures from the first turn (``--times 1``).
"""

import argparse
import json
import statistics
import subprocess
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

MORE_IS_BETTER = ("_per_s",)
LESS_IS_BETTER = ("_s", "_ms", "_mb", "_kb")

Runs = dict[str, dict[str, list[float]]]
"""Server name to metric (``phase.name``) to its value in each turn."""


def one_turn(script: Path, server: list[str], flags: list[str], limit_s: float) -> list[dict[str, Any]]:
    """Run the script against one server; its JSON lines, which are printed too.

    The limit is for servers that die: some clients go on asking for ever.
    """
    name, url, model, python = server
    command = [python, str(script), "--base-url", url, "--model", model, *flags]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(limit_s, process.kill)
        watchdog.start()
        for line in process.stdout:
            print(f"{name}: {line}", end="", flush=True)
            lines.append(json.loads(line))
        watchdog.cancel()
    if process.returncode:
        raise SystemExit(f"{name}: {script.name} ended with status {process.returncode}")
    return lines


def collect(results: list[dict[str, Any]]) -> Runs:
    """The numbers of all turns; lists within a result are left out."""
    runs: Runs = defaultdict(lambda: defaultdict(list))
    for result in results:
        for key, value in result["result"].items():
            if isinstance(value, int | float):
                runs[result["server"]][f"{result['result']['phase']}.{key}"].append(value)
    return runs


def better(metric: str, first: float, second: float) -> float | None:
    """How many times better the first value is; None for what is neither good nor bad, and for nothing."""
    if metric.endswith(MORE_IS_BETTER):
        first, second = second, first
    elif not metric.endswith(LESS_IS_BETTER):
        return None
    return second / first if first else None


def table(runs: Runs, first: str, second: str) -> list[str]:
    """Lines: metric, both medians with their spread, the ratio."""
    lines = [f"{'metric':34} {first:>24} {second:>24}  better"]
    for metric, values in runs[first].items():
        if other := runs[second].get(metric):
            ratio = better(metric, statistics.median(values), statistics.median(other))
            said = "" if ratio is None else f"{ratio:5.2f}×"
            lines.append(f"{metric:34} {spread(values):>24} {spread(other):>24}  {said}".rstrip())
    return lines


def spread(values: list[float]) -> str:
    """Median and range."""
    middle = f"{statistics.median(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g} … {max(values):.4g})"


def main() -> None:
    """Take turns, or read what earlier turns kept; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", nargs=4, action="append", default=[], metavar=("NAME", "URL", "MODEL", "PYTHON"))
    parser.add_argument("--script", type=Path, default=Path(__file__).with_name("sampling_bench.py"))
    parser.add_argument("--times", type=int, default=3, help="turns of each server")
    parser.add_argument("--limit", type=float, default=3600, help="most seconds of a turn")
    parser.add_argument("--keep", type=Path, help="append every result to this file")
    parser.add_argument("--read", type=Path, nargs="+", default=[], help="results that were kept earlier")
    parser.add_argument("flags", nargs="*", help="after --: flags of the script")
    flags = parser.parse_args()
    results = [json.loads(line) for file in flags.read for line in file.read_text(encoding="utf-8").splitlines()]
    for turn in range(flags.times):
        for server in flags.server:
            for result in one_turn(flags.script, server, [*flags.flags, "--seed", str(turn)], flags.limit):
                results.append({"server": server[0], "result": result})
                if flags.keep is not None:
                    with flags.keep.open("a", encoding="utf-8") as kept:
                        kept.write(json.dumps(results[-1]) + "\n")
    runs = collect(results)
    if len(runs) == 2:
        print("\n".join(table(runs, *runs)))


if __name__ == "__main__":
    main()
