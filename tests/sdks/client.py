"""What the scenario's features share: the SDK's clients, the data that every version sends, and plain results.

Runs in the environment of one SDK, and imports nothing else of this repository but its neighbours here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import tinker
from compare import differing
from tinker import types

SAMPLING = 1e-5
"""Log-probabilities of samples may be this far apart: the sampler's batch is sized by how fast it was, which enters
their rounding. Training is equal to the last bit."""


class Absent(Exception):
    """This version of the SDK doesn't have the feature."""


def method(owner: Any, name: str) -> Any:
    """A method of the SDK; raises Absent where the version has none."""
    if not hasattr(owner, name):
        raise Absent(name)
    return getattr(owner, name)


def done(value: Any) -> Any:
    """The result of a future, or the value itself where the version waits by itself."""
    return value.result() if hasattr(value, "result") else value


class Client:
    """What the features leave to those after them."""

    def __init__(self, url: str, base_model: str) -> None:
        self.base_model = base_model
        self.service = tinker.ServiceClient(base_url=url, api_key="tml-test")
        self.rest = self.service.create_rest_client()
        self.training: Any = None
        self.run_id = ""
        self.state = ""
        self.sampler_path = ""
        self.logprobs_at_state: list[list[float]] = []

    def another_model(self) -> Any:
        """Equal to what the first one began as, for what only some versions do: no later feature depends on it."""
        return done(self.service.create_lora_training_client(base_model=self.base_model, rank=4, seed=7))

    def both_ways(self, flag: str, run: Callable[[], Any], tolerance: float = 0.0) -> Any:
        """What ``run`` returns with a flag of the client off, then on, which must be the same.

        The server's config sets the flag for everybody else; raises Absent where the version has no such flag.
        """
        config = getattr(self.service.holder, "_client_config", None)
        if not hasattr(config, flag):
            raise Absent(flag)
        results = []
        for value in (False, True):
            settings, before = config.__dict__, config.__dict__[flag]  # the model itself may be frozen
            settings[flag] = value
            results.append(run())
            settings[flag] = before
        expect_equal(*results, tolerance)
        return results[1]


def expect_equal(value: Any, other: Any, tolerance: float = 0.0) -> None:
    """Raises AssertionError with the first difference."""
    for place, one, two in differing(value, other, tolerance):
        raise AssertionError(f"{place}: {one}, not {two}")


# ---- data and results -------------------------------------------------------------------------------------------


def floats(values: Iterable[float | None]) -> list[float | None]:
    """Plain floats; missing ones are None, as JSON has no NaN."""
    return [None if value is None or math.isnan(value) else float(value) for value in values]


def tensor(values: list[Any], dtype: str) -> types.TensorData:
    """One-dimensional."""
    return types.TensorData(data=values, dtype=dtype, shape=[len(values)])


def datums(**inputs: Callable[[int], list[float]]) -> list[types.Datum]:
    """Three sequences of different lengths; each input is float32, a function of the length."""
    found = []
    for length in (5, 12, 9):
        ids = [(37 * length + 11 * i * i) % 2000 for i in range(length + 1)]
        tensors = {name: tensor(make(length), "float32") for name, make in inputs.items()}
        tensors["target_tokens"] = tensor(ids[1:], "int64")
        found.append(types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=tensors))
    return found


def supervised() -> list[types.Datum]:
    """For cross_entropy; every second token counts half."""
    return datums(weights=lambda length: [1.0 - 0.5 * (i % 2) for i in range(length)])


def reinforced() -> list[types.Datum]:
    """For the losses of reinforcement learning."""
    return datums(
        logprobs=lambda length: [-7.0 - 0.25 * (i % 3) for i in range(length)],
        advantages=lambda length: [1.0 - 0.75 * (i % 4) for i in range(length)],
    )


def output(result: types.ForwardBackwardOutput) -> dict[str, Any]:
    """The numbers of a forward or forward_backward."""
    logprobs = [floats(each["logprobs"].data) for each in result.loss_fn_outputs]
    return {"loss": float(result.metrics["loss:sum"]), "logprobs": logprobs}


def logprobs_of(training: Any) -> list[list[float]]:
    """What the model says now."""
    return output(training.forward(supervised(), "cross_entropy").result())["logprobs"]


def step(training: Any) -> None:
    """One step of plain supervised learning, both requests sent before either is waited for."""
    passed = training.forward_backward(supervised(), "cross_entropy")
    stepped = training.optim_step(adam())
    passed.result(), stepped.result()


def adam() -> types.AdamParams:
    """Settings that every version knows."""
    return types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8)


PROMPT = [5, 17, 1900, 3, 3, 42, 8]


def samples(sampler: Any, **options: Any) -> Any:
    """Two seeded samples of six tokens."""
    params = types.SamplingParams(max_tokens=6, temperature=0.8, seed=11, top_p=0.95)
    return sampler.sample(types.ModelInput.from_ints(PROMPT), 2, params, **options).result()


def drawn(response: types.SampleResponse) -> list[dict[str, Any]]:
    """Tokens, logprobs and stop reasons."""
    return [
        {"tokens": list(map(int, each.tokens)), "logprobs": floats(each.logprobs), "stop_reason": str(each.stop_reason)}
        for each in response.sequences
    ]
