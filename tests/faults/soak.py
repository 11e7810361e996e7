"""``python -m tests.faults.soak -- COMMAND …``: a client runs twice, the second time while engines are killed under it.

The command finds its server in ``TINKER_BASE_URL``, and ``{url}`` in it becomes that address too. Both runs must end
well and print the same rewards.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.server import Server


def run(server: Server, command: list[str], every_s: float | None) -> tuple[str, int]:
    """What the command printed, and how many engines died meanwhile."""
    words = [word.replace("{url}", server.url) for word in command]
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-soak"}
    killed = 0
    with tempfile.TemporaryFile("w+") as printed:
        client = subprocess.Popen(words, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        while True:
            try:
                client.wait(every_s)
                break
            except subprocess.TimeoutExpired:
                for pid in server.engine_pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
        printed.seek(0)
        output = printed.read()
    if client.returncode:
        raise SystemExit(f"the client ended with {client.returncode}:\n{output[-4000:]}")
    return output, killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--served-model-name", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--every-s", type=float, default=20.0, help="seconds between kills [20]")
    parser.add_argument("--rewards", default=r"reward\s+(\d+\.\d+)", help="regular expression of what must be equal")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    rewards: list[list[str]] = []
    for every_s in (None, args.every_s):
        with tempfile.TemporaryDirectory(prefix="tx-soak-") as folder:
            flags = ("--served-model-name", args.served_model_name)
            with Server(args.model, Path(folder), *flags) as server:
                output, killed = run(server, args.command, every_s)
        rewards.append(re.findall(args.rewards, output))
        print(f"{killed} engines killed; rewards {', '.join(rewards[-1])}", flush=True)
    if not killed or not rewards[0] or rewards[0] != rewards[1]:
        sys.exit("no engine was killed, or the rewards are not the same")


if __name__ == "__main__":
    main()
