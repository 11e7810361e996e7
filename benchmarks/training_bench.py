"""Benchmark of training on any Tinker server through the official SDK: one JSON line per phase.

usage: python benchmarks/training_bench.py --data train.jsonl [--base-url URL --model ID --phases …]

| Phase      | Measures                                                                                               |
|------------|--------------------------------------------------------------------------------------------------------|
| `first`    | forward_backward of 4 × 128 tokens and optim_step on a new model, then both again                      |
| `sft`      | steps on GSM8K at natural lengths: the first one, warm real tokens per second, the loss                |
| `latency`  | round trips of forward and forward_backward of 1 × 16 tokens and of optim_step, one at a time          |
| `publish`  | from save_weights_and_get_sampling_client's call to its return, and to the first token sampled from it |
| `optim`    | optim_step against the number of models that the server holds, and against the rank                    |
| `requests` | 16 requests with a step each, from 1, 4 and 16 models at once; of 4 problems, and of 16 tokens         |
| `tenants`  | a batch with one step, and shared out to 4 and 16 models with a step each; 16 problems, 16 short rows  |
| `long`     | forward_backward of one long datum                                                                     |

Only positions of the data count as tokens, never padding. What a phase calls first includes compilation, the other
figures are warm: of the later half of the steps, or after rounds that are not counted. ``first`` is a cold start only
on a server that has just started, and ``optim`` counts the models of this run alone: run it on a server without
others, before ``tenants``. Rank, models and tokens must be what the server allows (``--max-lora-rank``,
``--max-lora-adapters``, its context).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench_client import BenchClient, add_flags, num_positions, numbers, quantile, run_phases
from tinker import types

PHASES = "first,sft,latency,publish,optim,requests,tenants,long"
SHORT_TOKENS = 16
SHORT_ROUNDS = 4
"""Times as many rounds of short rows: they are over so soon that one recovery point more or less would show."""

WARM_UP = 2
"""Calls of each kind that are made before any is counted."""


class TrainingBench(BenchClient):
    """Each public method without arguments is a phase."""

    def __init__(self, flags: argparse.Namespace) -> None:
        super().__init__(flags)
        self.clients = [self.training]

    def tenants_of(self, count: int) -> list[Any]:
        """``count`` training clients of ``--rank``, the first ones of this run, created where they lack."""
        while len(self.clients) < count:
            self.clients.append(self.create_client())
        return self.clients[:count]

    def row(self, num_tokens: int) -> types.Datum:
        """A datum of exactly ``num_tokens`` positions, all weighted."""
        tokens = self.text(num_tokens + 1)
        inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0] * num_tokens}
        return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)

    # ---- throughput -------------------------------------------------------------------------------------------

    def first(self) -> dict[str, Any]:
        """What a user waits for who has just created a model; the second time shows what of it was compilation."""
        data = [self.row(128) for _ in range(4)]
        report = {"create_s": round(self.create_s, 2)}
        for name in ("first", "second"):
            gradient_s = seconds_of(lambda: forward_backward(self.training, data))
            step_s = seconds_of(lambda: optim_step(self.training))
            report |= {f"{name}_forward_backward_s": round(gradient_s, 3), f"{name}_optim_step_s": round(step_s, 3)}
        return report

    def sft(self) -> dict[str, Any]:
        """Fine-tuning on ragged data."""
        return self.fine_tune()

    def requests(self) -> dict[str, Any]:
        """The same requests, a step after each, from several models at once."""
        count, each = max(self.flags.tenants), self.flags.large
        kinds = {
            "large": [[self.sl_datum() for _ in range(each)] for _ in range(count)],
            "short": [[self.row(SHORT_TOKENS)] for _ in range(count)],
        }
        return self.shared({kind: lambda _, requests=requests: requests for kind, requests in kinds.items()})

    def tenants(self) -> dict[str, Any]:
        """The same batch, a request of one model or shared out to several, each of which takes a step."""
        kinds = {
            "problems": [self.sl_datum() for _ in range(self.flags.batch)],
            "short": [self.row(SHORT_TOKENS) for _ in range(self.flags.batch)],
        }
        return self.shared(
            {
                kind: lambda count, data=data: [data[index::count] for index in range(count)]
                for kind, data in kinds.items()
            }
        )

    def shared(self, kinds: dict[str, Callable[[int], list[list[types.Datum]]]]) -> dict[str, Any]:
        """Real tokens per second of all models together, and their ratio to the first count's.

        Every round has the same data, so that neither the tokens nor the shapes differ between counts and rounds.
        """
        flags, report = self.flags, {}
        for kind, requests_of in kinds.items():
            for count in flags.tenants:
                requests = requests_of(count)
                num_tokens = sum(map(num_positions, requests))
                num_rounds = flags.rounds * (SHORT_ROUNDS if kind == "short" else 1)
                rounds = [self.one_round(count, requests) for _ in range(WARM_UP + num_rounds)]
                report[f"{kind}_tokens"] = num_tokens
                report[f"{kind}_{count}_tokens_per_s"] = round(num_tokens / statistics.median(rounds[WARM_UP:]), 1)
                report[f"{kind}_{count}_round_s"] = [round(value, 3) for value in rounds]
            base = report[f"{kind}_{flags.tenants[0]}_tokens_per_s"]
            for count in flags.tenants[1:]:
                report[f"{kind}_{count}_to_{flags.tenants[0]}"] = round(
                    report[f"{kind}_{count}_tokens_per_s"] / base, 3
                )
        return report

    def one_round(self, count: int, requests: list[list[types.Datum]]) -> float:
        """Seconds in which ``count`` models share out the requests, each with its step, all in flight at once."""
        clients = self.tenants_of(count)
        started = time.monotonic()
        futures = []
        for index, data in enumerate(requests):
            client = clients[index % count]
            futures.append(client.forward_backward(data, "cross_entropy"))
            futures.append(client.optim_step(types.AdamParams(learning_rate=1e-5)))
        for future in futures:
            future.result()
        return time.monotonic() - started

    def long(self) -> dict[str, Any]:
        """One datum of ``--tokens`` positions."""
        data = [self.row(self.flags.tokens)]
        seconds = [seconds_of(lambda: forward_backward(self.training, data)) for _ in range(2)]
        return {"tokens": self.flags.tokens, "first_s": round(seconds[0], 2), "second_s": round(seconds[1], 2)}

    # ---- latency ----------------------------------------------------------------------------------------------

    def latency(self) -> dict[str, Any]:
        """Small requests, each sent when the one before it has been answered."""
        data, client = [self.row(SHORT_TOKENS)], self.training
        calls = {
            "forward": lambda: client.forward(data, "cross_entropy").result(),
            "forward_backward": lambda: forward_backward(client, data),
            "optim_step": lambda: optim_step(client),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(WARM_UP + self.flags.requests):
            for name, call in calls.items():
                seconds[name].append(seconds_of(call))
        report: dict[str, Any] = {}
        for name, values in seconds.items():
            report |= percentiles(name, values[WARM_UP:])
        return report

    def publish(self) -> dict[str, Any]:
        """New weights to a sampling client, and to a token of it."""
        data, prompt = [self.row(SHORT_TOKENS)], self.text(SHORT_TOKENS)
        published, sampled = [], []
        for _ in range(WARM_UP + self.flags.repeats):
            forward_backward(self.training, data)
            optim_step(self.training)
            sampler, seconds = self.sampler()
            published.append(seconds)
            sampled.append(seconds + self.sample_round(sampler, [prompt], 1, 1)["seconds"])
        return percentiles("publish", published[WARM_UP:]) | percentiles("first_token", sampled[WARM_UP:])

    def optim(self) -> dict[str, Any]:
        """Medians of optim_step, each after a forward_backward that is not counted."""
        report: dict[str, Any] = {"models_before": len(self.clients)}
        for count in self.flags.models:
            report[f"models_{count}_p50_ms"] = self.optim_p50_ms(self.tenants_of(count)[-1])
        for rank in self.flags.ranks:
            report[f"rank_{rank}_p50_ms"] = self.optim_p50_ms(self.create_client(rank))
        return report

    def optim_p50_ms(self, client: Any) -> float:
        data, seconds = [self.row(SHORT_TOKENS)], []
        for _ in range(WARM_UP + self.flags.repeats):
            forward_backward(client, data)
            seconds.append(seconds_of(lambda: optim_step(client)))
        return round(quantile(seconds[WARM_UP:], 0.5) * 1e3, 2)


def forward_backward(client: Any, data: list[types.Datum]) -> None:
    """Send the data and wait for their gradient."""
    client.forward_backward(data, "cross_entropy").result()


def optim_step(client: Any) -> None:
    """Send a step and wait for it."""
    client.optim_step(types.AdamParams(learning_rate=1e-5)).result()


def seconds_of(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.monotonic()
    call()
    return time.monotonic() - started


def percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    return {f"{name}_p{100 * q:.0f}_ms": round(quantile(seconds, q) * 1e3, 2) for q in (0.5, 0.95)}


def main() -> None:
    """Parse the flags, run the phases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, PHASES)
    parser.set_defaults(rank=32, batch=16)
    parser.add_argument("--steps", type=int, default=6, help="of sft")
    parser.add_argument("--tenants", type=numbers, default=[1, 4, 16], help="models at once, default: 1,4,16")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of problems per number of tenants")
    parser.add_argument("--large", type=int, default=4, help="problems of a large request in the phase requests")
    parser.add_argument("--requests", type=int, default=50, help="counted requests of each kind in the phase latency")
    parser.add_argument("--repeats", type=int, default=10, help="counted steps in publish and optim")
    parser.add_argument("--models", type=numbers, default=[1, 4, 16], help="models held in optim, default: 1,4,16")
    parser.add_argument("--ranks", type=numbers, default=[1, 8, 32], help="ranks in optim, default: 1,8,32")
    parser.add_argument("--tokens", type=int, default=8192, help="positions of the long datum")
    flags = parser.parse_args()
    if "tenants" in flags.phases.split(",") and max(flags.tenants) > flags.batch:
        parser.error(f"--tenants {max(flags.tenants)} can't share out --batch {flags.batch} data")
    bench = TrainingBench(flags)
    run_phases(flags.phases, lambda phase: getattr(bench, phase))


if __name__ == "__main__":
    main()
