"""Trainer: submitted requests, whose turn it is, optimizer steps.

Models take turns, one micro-batch each (``passes``). Requests so small that reading the weights is most of their cost
are an exception: those that wait at several models run as rows of one micro-batch (``together``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax

from tx.errors import ModelLost
from tx.models.loading import LoadedModel
from tx.types import AdamParams, Finished, ForwardBackward, LoraConfig
from tx.worker import datums, optimizer
from tx.worker.adapters import AdapterStore, TrainingState, zeros_like
from tx.worker.ahead import Call, directly
from tx.worker.passes import Job, Passes
from tx.worker.shapes import Limits, Shape, all_shapes
from tx.worker.together import Together


class Trainer:
    """Runs what is submitted, one micro-batch per ``slice``; see the module's docstring.

    Args:
        micro_batch_tokens: budget of padded positions per micro-batch.
        micro_batch_rows: cap on its datums, 0 is off.
        max_context: longest datum accepted.
        gradient_checkpointing, activation_bytes: see ``Passes``.
        call: how programs are run (``ahead``).
        clock: seconds, to measure passes and to wait for other models by.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: AdapterStore,
        *,
        micro_batch_tokens: int,
        micro_batch_rows: int = 0,
        gradient_checkpointing: bool = False,
        max_context: int,
        activation_bytes: int | None = None,
        call: Call = directly,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store = store
        self._call = call
        self._vocab_size, self._max_context = model.config.vocab_size, max_context
        shards = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        on_gpu = model.mesh.devices.flat[0].platform == "gpu"  # there cuDNN attends, one datum per row
        self._passes = Passes(
            model,
            store,
            Limits(micro_batch_tokens, micro_batch_rows, max_context, shards, packed=not on_gpu),
            gradient_checkpointing=gradient_checkpointing,
            activation_bytes=activation_bytes,
            call=call,
            clock=clock,
        )
        self._together = Together(model, store, self._passes, clock)
        self._waiting: dict[str, list[Job]] = {}
        self._turns: deque[str] = deque()  # models with work, the next one first
        self._chosen: list[str] | None = None  # who can run together; None is to be found out

    def submit(self, job_id: int, request: ForwardBackward, *, alone: bool = False) -> None:
        """Queue a request, ``alone``: never beside other models'; raises InvalidInput, and then nothing is queued."""
        self._store.lora(request.model_id)
        config = datums.check(request, self._vocab_size, self._max_context)
        self._waiting.setdefault(request.model_id, []).append(Job(job_id, request, config, alone))
        if request.model_id not in self._turns:
            self._turns.append(request.model_id)
        self._chosen = None
        self._together.arrived()

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or under way."""
        return bool(self._turns)

    @property
    def gather_s(self) -> float:
        """Seconds for which the next ``slice`` is worth putting off, more requests being submitted meanwhile."""
        return self._together.wait_s(self._turns, self._choose)

    def slice(self) -> list[Finished]:
        """Run one micro-batch, of the model whose turn it is or of several; the jobs that it completed or failed."""
        together = self._choose()
        self._chosen = None
        self._together.started(together)
        if not self._turns:
            return []
        if len(together) > 1:
            finished = self._together.run({model_id: list(self._next_jobs(model_id)) for model_id in together})
            if finished is None:
                return []
            for model_id in together:
                self._take(model_id)
                self._next_turn(model_id)
            return finished
        model_id = self._turns[0]
        if model_id not in self._passes:
            self._passes.start(model_id, self._take(model_id))
        finished = self._passes.run(model_id)
        self._next_turn(model_id)
        return finished

    def discard(self, model_id: str) -> None:
        """Forget everything queued for a model, without results."""
        self._waiting.pop(model_id, None)
        self._passes.discard(model_id)
        self._together.forget(model_id)
        self._chosen = None
        if model_id in self._turns:
            self._turns.remove(model_id)

    def optim_step(self, model_id: str, params: AdamParams) -> dict[str, float]:
        """One AdamW step from the accumulated gradients, which are zero again after it; its metrics.

        Without any gradient it is still a step, as torch's with zero gradients: moments decay, weight decay applies.
        """
        optimizer.check(params)
        if model_id in self._turns:
            raise RuntimeError(f"optim_step of {model_id} while its forward_backwards are still running")
        state = self._store.state(model_id)
        call = self._call
        grads = state.grads if state.grads is not None else zeros_like(state.weights, call=call)
        sizes = optimizer.step_sizes(params, state.step + 1)
        try:
            weights, mu, nu, norm = optimizer.adamw(state.weights, state.mu, state.nu, grads, sizes, call=call)
            metrics = {"grad_norm:mean": float(jax.device_get(norm))}
        except jax.errors.JaxRuntimeError as error:
            self._store.drop(model_id)  # its arrays were donated
            raise ModelLost(f"the optimizer step of {model_id} failed on the device: {error}") from error
        self._store.replace(model_id, TrainingState(weights, mu, nu, None, state.step + 1))
        return metrics

    @property
    def usual_shapes(self) -> list[Shape]:
        """Of data up to the token budget with one target per position; longer ones have few programs each."""
        limits = self._passes.limits
        return all_shapes(limits, longest=limits.tokens)

    def rehearse(self, lora: LoraConfig | None, shape: Shape, forward_only: bool, call: Call) -> None:
        """``call`` each program of a pass of this shape, of a model like this or (forward only) of the base model."""
        like = None if lora is None else (self._store.outline(lora), self._store.ranks_of(lora))
        self._passes.rehearse(like, shape, forward_only, call)

    def rehearse_step(self, lora: LoraConfig, call: Call) -> None:
        """``call`` each program of an optim_step of a model like this."""
        like = self._store.outline(lora)
        optimizer.adamw(like, like, like, zeros_like(like, call=call), optimizer.step_sizes(AdamParams(), 1), call=call)

    # ---- the queue --------------------------------------------------------------------------------------------

    def _choose(self) -> Sequence[str]:
        if self._chosen is None:
            self._chosen = self._together.choose(self._turns, self._next_jobs)
        return self._chosen

    def _next_jobs(self, model_id: str) -> Iterator[Job]:
        """The waiting jobs that may share a pass with the first."""
        waiting = self._waiting.get(model_id, [])
        return (job for job in waiting if job.request.forward_only == waiting[0].request.forward_only)

    def _take(self, model_id: str) -> list[Job]:
        jobs = list(self._next_jobs(model_id))
        rest = [job for job in self._waiting[model_id] if job.request.forward_only != jobs[0].request.forward_only]
        if rest:
            self._waiting[model_id] = rest
        else:
            del self._waiting[model_id]
        return jobs

    def _next_turn(self, model_id: str) -> None:
        """To the back of the queue, but for the models that already have a pass: no more passes than adapters fit."""
        self._turns.remove(model_id)
        if model_id in self._passes:
            self._turns.insert(min(len(self._turns), self._store.max_resident - 1), model_id)
        elif model_id in self._waiting:
            self._turns.append(model_id)
