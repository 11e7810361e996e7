"""Benchmark of sampling on any Tinker server through the official SDK: one JSON line per phase.

usage: python benchmarks/sampling_bench.py --data train.jsonl --stop 2,0 [--base-url URL --model ID --phases …]

| Phase     | Measures                                                                                               |
|-----------|--------------------------------------------------------------------------------------------------------|
| `first`   | one prompt × group short replies, and again: what the first samples of a started server take            |
| `ragged`  | a round of RL sampling: prompts × group replies that end at real stop tokens, fresh prompts each round  |
| `group`   | one prompt × n replies against n prompts of the same length × one reply                                 |
| `latency` | a 16-token sample alone, with other samples in flight, and beside a tenant that trains without pause    |
| `memory`  | what the server's processes grow by, against the real tokens in flight; needs ``--engine-pid`` (Linux)  |

The replies come from a fresh adapter's snapshot, so two servers that serve one model sample from one distribution.
Only tokens that the client receives count. The first round includes compilation; warm figures are those of the later
half of the rounds. Servers are compared on one machine, one after the other, by ``benchmarks/compare.py``.
"""

import argparse
import contextlib
import functools
import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_client import BenchClient, add_flags, quantile, run_phases
from tinker import types

FIRST_PROMPT, FIRST_TOKENS = 64, 32
LATENCY_TOKENS = 16
MEMORY_POLL_S = 0.05


class SamplingBench(BenchClient):
    """Each public method without arguments is a phase."""

    def __init__(self, flags: argparse.Namespace) -> None:
        super().__init__(flags)
        self.random = random.Random(flags.seed)
        self.policy, self.save_s = self.sampler()

    def prompts(self, count: int) -> list[list[int]]:
        return [self.prompt() for _ in range(count)]

    def first(self) -> dict[str, Any]:
        """A group of replies to one prompt, and one to another prompt of that length."""
        first, again = (
            self.sample_round(self.policy, [self.text(FIRST_PROMPT)], self.flags.group, FIRST_TOKENS) for _ in range(2)
        )
        return {"first_s": round(first["seconds"], 2), "again_s": round(again["seconds"], 2)}

    # ---- throughput -------------------------------------------------------------------------------------------

    def ragged(self) -> dict[str, Any]:
        """Rounds of RL sampling."""
        flags = self.flags
        rounds = [
            self.sample_round(self.policy, self.prompts(flags.prompts), flags.group, flags.max_tokens)
            for _ in range(flags.rounds)
        ]
        warm = rounds[len(rounds) // 2 :]
        sequences = [sequence for one in rounds for reply in one["replies"] for sequence in reply.sequences]
        lengths = [len(sequence.tokens) for sequence in sequences]
        return {
            "first_round_s": round(rounds[0]["seconds"], 2),
            "warm_round_s": round(statistics.median(one["seconds"] for one in warm), 2),
            "warm_tokens_per_s": round(sum(one["num_tokens"] for one in warm) / sum(one["seconds"] for one in warm), 1),
            "round_s": [round(one["seconds"], 2) for one in rounds],
            "round_tokens": [one["num_tokens"] for one in rounds],
            "reply_tokens_mean": round(statistics.fmean(lengths), 1),
            "stopped": round(statistics.fmean(sequence.stop_reason == "stop" for sequence in sequences), 3),
        }

    def group(self) -> dict[str, Any]:
        """One prompt × n against n × one, in turn; every prompt is new and shares no prefix with another."""
        shared, single = [], []
        for _ in range(self.flags.rounds):
            prompts = [self.text(self.flags.group_prompt) for _ in range(self.flags.group_size + 1)]
            shared.append(self.sample_round(self.policy, prompts[:1], self.flags.group_size, self.flags.group_tokens))
            single.append(self.sample_round(self.policy, prompts[1:], 1, self.flags.group_tokens))
        half = self.flags.rounds // 2
        shared_s, single_s = (statistics.median(one["seconds"] for one in rounds[half:]) for rounds in (shared, single))
        return {
            "shared_s": round(shared_s, 3),
            "single_s": round(single_s, 3),
            "single_to_shared": round(single_s / shared_s, 2),
            "shared_tokens": [one["num_tokens"] for one in shared],
            "single_tokens": [one["num_tokens"] for one in single],
            "first_shared_s": round(shared[0]["seconds"], 2),
            "first_single_s": round(single[0]["seconds"], 2),
        }

    # ---- latency ----------------------------------------------------------------------------------------------

    def latency(self) -> dict[str, Any]:
        """A short sample alone, beside other samples, beside training."""
        self.short_samples(2)  # whatever still compiles
        alone = self.short_samples(self.flags.requests)
        with self.others_in_flight():
            beside_samples = self.short_samples(self.flags.requests)
        with self.training_flat_out() as num_batches:
            beside_training = self.short_samples(self.flags.requests)
            batches = num_batches()
        report: dict[str, Any] = {}
        for name, seconds in {"alone": alone, "busy": beside_samples, "training": beside_training}.items():
            report[f"{name}_p50_s"] = round(quantile(seconds, 0.5), 3)
            report[f"{name}_p95_s"] = round(quantile(seconds, 0.95), 3)
        report["busy_to_alone_p50"] = round(quantile(beside_samples, 0.5) / quantile(alone, 0.5), 2)
        report["training_to_alone_p50"] = round(quantile(beside_training, 0.5) / quantile(alone, 0.5), 2)
        return report | {"train_batches": batches}

    def short_samples(self, count: int) -> list[float]:
        """Seconds of each of ``count`` samples, one after another with pauses, so that none is in step with others."""
        seconds = []
        for _ in range(count):
            time.sleep(self.random.uniform(0, self.flags.pause))
            seconds.append(self.sample_round(self.policy, [self.prompt()], 1, LATENCY_TOKENS)["seconds"])
        return seconds

    @contextlib.contextmanager
    def others_in_flight(self) -> Iterator[None]:
        """``--others`` single samples of ``--max-tokens`` in flight, each replaced when it is done."""
        prompts = itertools.cycle(self.prompts(self.flags.others * 4))
        lock = threading.Lock()

        def ask() -> Any:
            with lock:
                prompt = next(prompts)
            return self.ask(self.policy, prompt, 1, self.flags.max_tokens)

        def keep_asking(first: Any, stop: threading.Event) -> None:
            first.result()
            while not stop.is_set():
                ask().result()

        with in_background(*(functools.partial(keep_asking, ask()) for _ in range(self.flags.others))):
            yield

    @contextlib.contextmanager
    def training_flat_out(self) -> Iterator[Callable[[], int]]:
        """Another tenant that always has its next step queued; entered when it has trained on each batch twice.

        Yields a function that says how many batches it has trained on since then.
        """
        tenant = self.create_client()
        batches = [[self.sl_datum() for _ in range(self.flags.batch)] for _ in range(2)]
        trained, warm = [0], threading.Event()

        def step(data: list[types.Datum]) -> list[Any]:
            gradient = tenant.forward_backward(data, "cross_entropy")
            return [gradient, tenant.optim_step(types.AdamParams(learning_rate=1e-5))]

        def train(stop: threading.Event) -> None:
            try:
                queued = step(batches[0])
                while not stop.is_set():
                    following = step(batches[(trained[0] + 1) % len(batches)])
                    for future in queued:
                        future.result()
                    queued = following
                    trained[0] += 1
                    if trained[0] == 2 * len(batches):
                        warm.set()
                for future in queued:
                    future.result()
            finally:
                warm.set()  # a failure must not leave the other thread waiting

        with in_background(train):
            warm.wait()
            before = trained[0]
            yield lambda: trained[0] - before

    # ---- memory -----------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """Growth of the server's resident memory while requests of very different lengths are in flight.

        Three readings: as found, after a round of the same size with two-token replies (its programs exist now), and
        the peak of the round itself. A prompt counts once as real tokens, however many replies it has. A server
        keeps what it once had: run this phase first, on a fresh one.
        """
        flags = self.flags
        fresh = resident_bytes(flags.engine_pid)
        self.sample_round(self.policy, self.prompts(flags.prompts), flags.group, 2)
        warm = resident_bytes(flags.engine_pid)
        peak, prompts = [warm], self.prompts(flags.prompts)
        limits = [self.random.randint(1, flags.max_tokens) for _ in prompts]

        def watch(stop: threading.Event) -> None:
            while not stop.wait(MEMORY_POLL_S):
                peak[0] = max(peak[0], resident_bytes(flags.engine_pid))

        with in_background(watch):
            sampled = self.sample_round(self.policy, prompts, flags.group, limits)
        real_tokens = sum(map(len, prompts)) + sampled["num_tokens"]
        return {
            "fresh_rss_mb": round(fresh / 1e6, 1),
            "warm_rss_mb": round(warm / 1e6, 1),
            "peak_rss_mb": round(peak[0] / 1e6, 1),
            "real_tokens": real_tokens,
            "growth_per_token_kb": round((peak[0] - fresh) / 1e3 / real_tokens, 1),
            "longest_sequence": max(map(len, prompts)) + flags.max_tokens,
            "sequences": len(prompts) * flags.group,
        }


@contextlib.contextmanager
def in_background(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    """Each ``work(stop)`` in a thread of its own until the block ends; a thread's exception is raised here."""
    stop, errors = threading.Event(), []

    def guarded(work: Callable[[threading.Event], None]) -> None:
        try:
            work(stop)
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=guarded, args=[work], daemon=True) for work in works]
    for thread in pool:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in pool:
            thread.join()
    if errors:
        raise errors[0]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants, from /proc."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if ":" in line)
                parents[int(entry.name)] = int(fields["PPid"])
                resident[int(entry.name)] = int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
    if pid not in resident:
        raise SystemExit(f"no process {pid}")
    family = {pid}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(resident[member] for member in family)


def main() -> None:
    """Parse the flags, run the phases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, "ragged,group,latency")
    parser.add_argument("--rounds", type=int, default=4, help="of ragged and group")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a round")
    parser.add_argument("--group", type=int, default=8, help="replies per prompt")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest reply")
    parser.add_argument("--group-size", type=int, default=16, help="n of the phase group")
    parser.add_argument("--group-prompt", type=int, default=256, help="its prompts' tokens")
    parser.add_argument("--group-tokens", type=int, default=32, help="its replies' most tokens")
    parser.add_argument("--requests", type=int, default=20, help="short samples of each kind in the phase latency")
    parser.add_argument("--others", type=int, default=32, help="other samples in flight in the phase latency")
    parser.add_argument("--pause", type=float, default=0.5, help="longest pause before a short sample, seconds")
    parser.add_argument("--engine-pid", type=int, default=None, help="the server's process, for the phase memory")
    flags = parser.parse_args()
    if "memory" in flags.phases.split(",") and flags.engine_pid is None:
        parser.error("the phase memory needs --engine-pid")
    bench = SamplingBench(flags)
    run_phases(flags.phases, lambda phase: getattr(bench, phase))


if __name__ == "__main__":
    main()
