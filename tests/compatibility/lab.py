"""What the calls share: one server, clients of it, a trained model with checkpoints, and how each thing is called."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tinker
from click.testing import CliRunner
from tinker import types
from tinker.cli.__main__ import main_cli
from tinker.cli.exceptions import TinkerCliError

from tests.compatibility import torch_stand_in
from tests.support.hub import Hub

LIMIT_S = 60.0
"""Nothing here takes a second once programs are compiled; on a busy machine their first use takes many."""

PROMPT = types.ModelInput.from_ints([11, 12, 13, 14, 15, 16])
SHORT = types.SamplingParams(max_tokens=4, seed=3, stop=[])
PROJECT = "project-of-the-matrix"


class Lab:
    """Everything is made when it is first used, so that a call which fails takes no other with it."""

    def __init__(self, url: str, base_model: str, folder: Path, hub: Hub) -> None:
        self.url, self.base_model, self.folder, self.hub = url, base_model, folder, hub
        self._numbers = itertools.count()

    def name(self) -> str:
        """A name that nothing has yet."""
        return f"name-{next(self._numbers)}"

    # ---- clients ----

    @cached_property
    def service(self) -> tinker.ServiceClient:
        return tinker.ServiceClient({"made": "lab"}, PROJECT, base_url=self.url, display_name="Matrix lab")

    @cached_property
    def session_id(self) -> str:
        return self.service.holder.get_session_id()

    @cached_property
    def training(self) -> tinker.TrainingClient:
        """One step old, so that it has moments and differs from the base model."""
        training = self.new_training()
        training.forward_backward([datum()], "cross_entropy").result(LIMIT_S)
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result(LIMIT_S)
        return training

    def new_training(self, **options: Any) -> tinker.TrainingClient:
        made = self.service.create_lora_training_client(self.base_model, **({"rank": 4, "seed": 0} | options))
        return made.result(LIMIT_S)

    @cached_property
    def run_id(self) -> str:
        return self.training.get_info().model_id

    @cached_property
    def sampler(self) -> tinker.SamplingClient:
        return self.training.save_weights_and_get_sampling_client().result(LIMIT_S)

    @cached_property
    def recording_sampler(self) -> tinker.SamplingClient:
        """Its samples can be trained on with stable_reinforce."""
        return self.training.save_weights_and_get_sampling_client(record_stability_info=True).result(LIMIT_S)

    @cached_property
    def rest(self) -> tinker.RestClient:
        return tinker.RestClient(base_url=self.url)

    def new_loss(self) -> tinker.LossHandle:
        """A custom loss, traced in the client."""
        with torch_stand_in.installed():
            return self.service.create_custom_loss(negative_sum, {"logprobs": 1}).result(LIMIT_S)

    # ---- checkpoints ----

    @cached_property
    def weights(self) -> str:
        return self.new_weights()

    @cached_property
    def sampler_weights(self) -> str:
        return self.training.save_weights_for_sampler(self.name()).result(LIMIT_S).path

    @cached_property
    def external_weights(self) -> str:
        return self.training.save_weights_external(self.name()).result(LIMIT_S).path

    def new_weights(self) -> str:
        return self.training.save_state(self.name()).result(LIMIT_S).path

    def checkpoint(self, path: str) -> types.Checkpoint | None:
        """As the listing of its run has it."""
        listed = self.rest.list_checkpoints(path.split("/")[2]).result(LIMIT_S).checkpoints
        return next((row for row in listed if row.tinker_path == path), None)

    def post_raw(self, route: str, body: dict[str, Any]) -> httpx.Response:
        """For what the SDK only sends when a server asks for it."""
        return httpx.post(f"{self.url}/api/v1/{route}", json=body, headers={"X-API-Key": "tml-test"}, timeout=LIMIT_S)

    def download(self, url: str) -> bytes:
        """A signed URL, as anybody may get it: without a key."""
        return httpx.get(url, timeout=LIMIT_S).raise_for_status().content

    # ---- how things are called ----

    def subject(self, owner: str) -> Any:
        """The object of this class whose methods are called."""
        return {
            "ServiceClient": lambda: self.service,
            "TrainingClient": lambda: self.training,
            "SamplingClient": lambda: self.sampler,
            "RestClient": lambda: self.rest,
            "AdminClient": lambda: tinker.AdminClient(base_url=self.url),
            "APIFuture": lambda: self.rest.get_server_capabilities(),
            "LossHandle": lambda: self.new_loss(),
            "SampleResponse": lambda: self.full_response,
            "SampledSequence": lambda: self.full_response.sequences[0],
            "BackcompatTrainingClientFuture": lambda: self._training_future,
            "BackcompatSamplingClientFuture": lambda: self.service.create_sampling_client(base_model=self.base_model),
        }[owner]()

    @cached_property
    def _training_future(self) -> tinker.BackcompatTrainingClientFuture:
        return self.service.create_lora_training_client(self.base_model, rank=4, seed=0)

    @cached_property
    def full_response(self) -> types.SampleResponse:
        """With everything that can be asked of prompt and sample."""
        future = self.sampler.sample(
            PROMPT,
            2,
            SHORT,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=2,
            topk_sample_logprobs=3,
            target_prompt_logprobs=types.TensorData.from_numpy(np.full((5, 2), 7, np.int64)),
            prompt_alt_tokens_k=2,
        )
        return future.result(LIMIT_S)

    def cli(self, *words: str, typed: str | None = None) -> str:
        """What the command prints; its own message as an error if it exits with one."""
        result = CliRunner().invoke(main_cli, words, input=typed)
        error = result.exception
        if isinstance(error, TinkerCliError):
            raise CommandRefused(". ".join(filter(None, [error.message.rstrip("."), error.details])))
        if result.exit_code:
            raise CommandRefused(result.output) from error
        return result.stdout


class CommandRefused(Exception):
    """A command of the CLI, or a request made by hand, ended with an error."""


class Bound:
    """A method of an object, sync or async, that is called like a function and gives the final value."""

    def __init__(self, name: str, subject: Callable[[], Any]) -> None:
        self.name, self._subject = name, subject

    def on(self, subject: Any) -> Bound:
        """The same method of another object."""
        return Bound(self.name, lambda: subject)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        member = getattr(self._subject(), self.name)
        if not callable(member):
            return member
        value = member(*args, **kwargs)
        if inspect.isawaitable(value) and (self.name.endswith("_async") or inspect.iscoroutine(value)):
            return asyncio.run(_awaited(value))
        return value.result(LIMIT_S) if isinstance(value, tinker.APIFuture) else value


async def _awaited(value: Any) -> Any:
    value = await value
    return await value.result_async(LIMIT_S) if isinstance(value, tinker.APIFuture) else value


# ---- data ----


def datum(length: int = 8, seed: int = 1) -> types.Datum:
    """Cross-entropy, every weight one."""
    ids = np.random.default_rng(seed).integers(3, 2000, length + 1).tolist()
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": [1.0] * length},
    )


def policy_datum(reply: types.SampledSequence, *extra: str) -> types.Datum:
    """A rewarded reply to PROMPT; ``extra`` names further inputs."""
    tokens, before, count = PROMPT.to_ints() + list(reply.tokens), PROMPT.length - 1, len(reply.tokens)
    inputs = {
        "target_tokens": tokens[1:],
        "logprobs": [0.0] * before + list(reply.logprobs),
        "advantages": [0.0] * before + [1.0] * count,
    }
    if "sequence_ratio_mask" in extra:
        inputs["sequence_ratio_mask"] = [0.0] * before + [1.0] * count
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def recorded_datum(reply: types.SampledSequence) -> types.Datum:
    """A rewarded reply with the spans that say where it was sampled."""
    before, count, name = PROMPT.length - 1, len(reply.tokens), reply.sequence_id
    prompt, sampled = types.PromptProvenanceSpan, types.SampledProvenanceSpan
    return policy_datum(reply).with_provenance(
        model_input=[
            prompt(sequence_id=name, length=PROMPT.length),
            sampled(sequence_id=name, length=count - 1),
        ],
        loss_fn_inputs=[
            prompt(sequence_id=name, offset=1, length=before),
            sampled(sequence_id=name, length=count),
        ],
    )


def negative_sum(logprobs: Any) -> Any:
    """Cross-entropy with weights of one, as a custom loss of one datum."""
    loss = -logprobs.sum()
    return loss, {"custom/negative_sum:sum": loss}
