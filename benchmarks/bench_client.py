"""What the benchmarks that drive a server through the official SDK share: a tenant, its data, steps and samples.

Not a program. It must run with SDK 0.9.0 (another server's) and with the newest, so it uses only what both have.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_API_KEY", "tml-local")
os.environ.setdefault("TINKER_TELEMETRY", "0")

import tinker
from tinker import types


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, by rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def settled(value: Any) -> Any:
    """Newer SDKs return futures from the client factories, older ones the client itself."""
    return value.result() if hasattr(value, "result") else value


def numbers(text: str) -> list[int]:
    """The value of a flag such as ``--stop 2,0``."""
    return [int(part) for part in text.split(",")]


def num_positions(data: list[types.Datum]) -> int:
    """Real tokens that a server computes for these data."""
    return sum(len(datum.loss_fn_inputs["target_tokens"].data) for datum in data)


def add_flags(parser: argparse.ArgumentParser, phases: str) -> None:
    """The flags that every benchmark of a server has."""
    parser.add_argument("--base-url", default="http://localhost:8000")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="an id that the server lists")
    parser.add_argument("--tokenizer", default=None, help="folder or hub id; by default the one that the server names")
    parser.add_argument("--data", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--phases", default=phases, help=f"default: {phases}")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="problems per training step")
    parser.add_argument("--stop", type=numbers, default=None, help="stop token ids, by default the server's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the problems")


def run_phases(phases: str, find: Callable[[str], Callable[[], dict[str, Any]]]) -> None:
    """Run each phase, print its result as one JSON line, and end the process.

    At once: on an orderly way out the SDK's threads sometimes abort the interpreter, which would look like a failure.
    """
    for phase in phases.split(","):
        started = time.monotonic()
        result = find(phase)()
        print(json.dumps({"phase": phase, "wall_s": round(time.monotonic() - started, 1), **result}), flush=True)
    os._exit(0)


class BenchClient:
    """One training client and an endless, seeded stream of problems."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.rows = problems(Path(flags.data), flags.seed)
        self.service = tinker.ServiceClient(base_url=flags.base_url)
        started = time.monotonic()
        self.training = self.create_client()
        self.create_s = time.monotonic() - started
        if flags.tokenizer is None:
            self.tokenizer = self.training.get_tokenizer()
        else:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(flags.tokenizer)

    def create_client(self, rank: int | None = None) -> Any:
        """A training client of a new model, of ``--rank`` unless another is given."""
        rank = rank or self.flags.rank
        return settled(self.service.create_lora_training_client(base_model=self.flags.model, rank=rank))

    # ---- data -------------------------------------------------------------------------------------------------

    def sl_datum(self) -> types.Datum:
        """A problem with its solution, the solution weighted."""
        row = next(self.rows)
        prompt = self.tokenizer.encode(f"Question: {row['question']}\nAnswer: ")
        answer = self.tokenizer.encode(row["answer"] + "\n")
        tokens = prompt + answer
        weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
        inputs: Any = {"target_tokens": tokens[1:], "weights": weights}  # the SDK makes tensors of lists
        return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)

    def prompt(self) -> list[int]:
        """The next problem as a prompt."""
        return self.tokenizer.encode(f"Question: {next(self.rows)['question']}\nAnswer: ")

    def text(self, num_tokens: int) -> list[int]:
        """Problems one after another, cut to exactly this many tokens."""
        tokens: list[int] = []
        while len(tokens) < num_tokens:
            tokens += self.prompt()
        return tokens[:num_tokens]

    # ---- training ---------------------------------------------------------------------------------------------

    def train_step(self, data: list[types.Datum]) -> tuple[float, float]:
        """(seconds, loss per weighted token) of one forward_backward and optim_step, both sent at once."""
        started = time.monotonic()
        gradient = self.training.forward_backward(data, "cross_entropy")
        step = self.training.optim_step(types.AdamParams(learning_rate=1e-4))
        outputs = gradient.result().loss_fn_outputs
        step.result()
        seconds = time.monotonic() - started
        weights = [datum.loss_fn_inputs["weights"].data for datum in data]
        total = sum(
            logprob * weight
            for output, row in zip(outputs, weights, strict=True)
            for logprob, weight in zip(output["logprobs"].data, row, strict=True)
        )
        return seconds, -total / sum(map(sum, weights))

    def fine_tune(self) -> dict[str, Any]:
        """``--steps`` steps on fresh problems of natural lengths."""
        steps = []
        for _ in range(self.flags.steps):
            data = [self.sl_datum() for _ in range(self.flags.batch)]
            steps.append((num_positions(data), *self.train_step(data)))
        warm = steps[len(steps) // 2 :]
        return {
            "cold_step_s": round(steps[0][1], 2),
            "step_s": [round(seconds, 2) for _, seconds, _ in steps],
            "warm_tokens_per_s": round(sum(step[0] for step in warm) / sum(step[1] for step in warm), 1),
            "loss_per_token": [round(loss, 4) for _, _, loss in steps],
        }

    # ---- sampling ---------------------------------------------------------------------------------------------

    def sampler(self) -> tuple[Any, float]:
        """A sampling client of the training client's present weights, and the seconds it took to get it."""
        started = time.monotonic()
        client = settled(self.training.save_weights_and_get_sampling_client())
        return client, time.monotonic() - started

    def ask(self, sampler: Any, prompt: list[int], group: int, max_tokens: int) -> Any:
        """The future of ``group`` replies to one prompt, at temperature 1."""
        params = types.SamplingParams(max_tokens=max_tokens, temperature=1.0, stop=self.flags.stop)
        return sampler.sample(prompt=types.ModelInput.from_ints(prompt), num_samples=group, sampling_params=params)

    def sample_round(
        self, sampler: Any, prompts: list[list[int]], group: int, max_tokens: int | list[int]
    ) -> dict[str, Any]:
        """All prompts at once; replies, sampled tokens, seconds and each request's latency."""
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        started = time.monotonic()
        futures = [self.ask(sampler, prompt, group, limit) for prompt, limit in zip(prompts, limits, strict=True)]
        replies, latency = [], []
        for future in futures:
            replies.append(future.result())
            latency.append(time.monotonic() - started)
        return {
            "replies": replies,
            "num_tokens": num_tokens(replies),
            "seconds": time.monotonic() - started,
            "latency": latency,
        }


def problems(file: Path, seed: int) -> Iterator[dict[str, str]]:
    """The rows of a GSM8K file in a seeded order, again and again (in another order each time)."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    order = random.Random(seed)
    while True:
        order.shuffle(rows)
        yield from rows


def num_tokens(replies: list[Any]) -> int:
    """Sampled tokens of all sequences of some replies."""
    return sum(len(sequence.tokens) for reply in replies for sequence in reply.sequences)
