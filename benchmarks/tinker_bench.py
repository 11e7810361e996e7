"""Side-by-side benchmark of any Tinker server through the official SDK: one JSON line per phase.

usage: python benchmarks/tinker_bench.py --data train.jsonl [--base-url URL --model ID --phases sl,sample,rl,mixed]

The data is GSM8K's (``{"question": …, "answer": …}`` per line), at its natural, ragged lengths. Cold figures include
compilation; warm figures are those of the later half of the steps, on fresh data of the same distribution, as a
training run would see them. Compare servers in one session on one machine, alternating, by ratios of medians.
"""

import argparse
import math
import statistics
import threading
import time
from typing import Any

from bench_client import BenchClient, add_flags, quantile, run_phases
from tinker import types


class Bench(BenchClient):
    """Each public method without arguments is a phase."""

    def create(self) -> dict[str, Any]:
        """Time from asking for a training client to having one."""
        return {"create_s": round(self.create_s, 2)}

    def sl(self) -> dict[str, Any]:
        """Ragged fine-tuning."""
        return self.fine_tune()

    # ---- sampling ---------------------------------------------------------------------------------------------

    def sample(self) -> dict[str, Any]:
        """Groups of replies per prompt."""
        sampler, save_s = self.sampler()
        rounds = []
        for _ in range(self.flags.rounds):
            prompts = [self.prompt() for _ in range(self.flags.prompts)]
            rounds.append(self.sample_round(sampler, prompts, self.flags.group, self.flags.max_tokens))
        warm = rounds[len(rounds) // 2 :]
        tokens_per_s = sum(one["num_tokens"] for one in warm) / sum(one["seconds"] for one in warm)
        return {
            "save_s": round(save_s, 3),
            "cold_round_s": round(rounds[0]["seconds"], 2),
            "round_s": [round(one["seconds"], 2) for one in rounds],
            "tokens": [one["num_tokens"] for one in rounds],
            "warm_tokens_per_s": round(tokens_per_s, 1),
            "latency_p50_s": round(quantile(rounds[-1]["latency"], 0.5), 2),
            "latency_p95_s": round(quantile(rounds[-1]["latency"], 0.95), 2),
        }

    # ---- reinforcement ----------------------------------------------------------------------------------------

    def rl_data(self, prompts: list[list[int]], replies: list[Any]) -> list[types.Datum]:
        """Importance-sampling data; the reward is the share of distinct tokens, so that groups always differ."""
        data = []
        for prompt, reply in zip(prompts, replies, strict=True):
            rewards = [len(set(sequence.tokens)) / max(1, len(sequence.tokens)) for sequence in reply.sequences]
            mean = statistics.fmean(rewards)
            for sequence, reward in zip(reply.sequences, rewards, strict=True):
                tokens, before = prompt + list(sequence.tokens), len(prompt) - 1
                inputs: Any = {
                    "target_tokens": tokens[1:],
                    "logprobs": [0.0] * before + list(sequence.logprobs),
                    "advantages": [0.0] * before + [reward - mean] * len(sequence.tokens),
                }
                data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
        return data

    def rl_step(self) -> dict[str, float]:
        started = time.monotonic()
        sampler, save_s = self.sampler()
        prompts = [self.prompt() for _ in range(self.flags.prompts)]
        sampled = self.sample_round(sampler, prompts, self.flags.group, self.flags.max_tokens)
        data = self.rl_data(prompts, sampled["replies"])
        train_started = time.monotonic()
        gradient = self.training.forward_backward(data, "importance_sampling")
        step = self.training.optim_step(types.AdamParams(learning_rate=1e-5))
        outputs = gradient.result().loss_fn_outputs
        step.result()
        ended = time.monotonic()
        gaps = [
            old - new
            for datum, output in zip(data, outputs, strict=True)
            for old, new in zip(datum.loss_fn_inputs["logprobs"].data, output["logprobs"].data, strict=True)
            if old != 0.0
        ]
        return {
            "total": ended - started,
            "save": save_s,
            "sample": sampled["seconds"],
            "train": ended - train_started,
            "kl_v1": statistics.fmean(gaps),
            "kl_v2": statistics.fmean(gap * gap for gap in gaps) / 2,
            "max_gap": max(map(abs, gaps)),
        }

    def rl(self) -> dict[str, Any]:
        """Sample, train, repeat."""
        steps = [self.rl_step() for _ in range(self.flags.steps)]
        warm = steps[len(steps) // 2 :]
        return {
            "step_s": [round(step["total"], 2) for step in steps],
            "sample_s": [round(step["sample"], 2) for step in steps],
            "train_s": [round(step["train"], 2) for step in steps],
            "warm_step_s": round(statistics.median(step["total"] for step in warm), 2),
            **{
                name: [float(f"{step[name]:.3g}") for step in steps]
                for name in ("kl_v1", "kl_v2", "max_gap")
                if all(math.isfinite(step[name]) for step in steps)
            },
        }

    def mixed(self) -> dict[str, Any]:
        """One tenant trains flat out, another samples single short completions: how long does a sample wait?"""
        stop, trained = threading.Event(), []
        other = self.create_client()

        def train() -> None:
            while not stop.is_set():
                other.forward_backward([self.sl_datum() for _ in range(self.flags.batch)], "cross_entropy").result()
                trained.append(1)

        sampler, _ = self.sampler()
        self.sample_round(sampler, [self.prompt()], 1, 16)
        thread = threading.Thread(target=train)
        thread.start()
        time.sleep(3)  # the first training steps compile; they are not what this phase measures
        latency = [self.sample_round(sampler, [self.prompt()], 1, 16)["seconds"] for _ in range(self.flags.rounds * 3)]
        stop.set()
        thread.join()
        return {
            "sample16_p50_s": round(quantile(latency, 0.5), 2),
            "sample16_max_s": round(max(latency), 2),
            "train_batches": len(trained),
        }


def main() -> None:
    """Parse the flags, run the phases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, "create,sl,sample,rl,mixed")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4, help="replies per prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    flags = parser.parse_args()
    bench = Bench(flags)
    run_phases(flags.phases, lambda phase: getattr(bench, phase))


if __name__ == "__main__":
    main()
