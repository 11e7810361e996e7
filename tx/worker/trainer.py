"""Trainer: submitted requests to micro-batches, micro-batches to losses and gradients, gradients to optimizer steps.

A *pass* is everything that one model has waiting with the same loss: its rows are sorted by length and share
micro-batches, each of which is one jitted call on one adapter. Gradients of a pass grow in an accumulator of their own
and reach the model's state only when the whole pass is done, so a job that fails in the middle leaves nothing behind:
the pass starts again without it. Models take turns, one micro-batch each.

Programs are compiled per (shape, padded rank, adapter structure), never per loss, config or learning rate.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tx.errors import InvalidInput, ModelLost
from tx.layers.logprobs import target_logprobs
from tx.layers.lora import Adapter, LoraWeights, adapter_sharding, single_view
from tx.layers.sharding import sharding
from tx.models.loading import LoadedModel
from tx.types import AdamParams, Finished, ForwardBackward, ForwardBackwardResult
from tx.worker import datums, optimizer
from tx.worker.adapters import AdapterStore, TrainingState
from tx.worker.losses import LossBatch, row_losses
from tx.worker.packing import MicroBatch, Row, plan
from tx.worker.shapes import Limits

log = logging.getLogger(__name__)

HEAD_BYTES_CPU = 64 << 20
HEAD_BYTES_GPU = 512 << 20
"""float32 logits of one chunk of the head: enough tokens to be compute-bound, little enough to hold beside the rest."""


@dataclass
class _Job:
    """One submitted request and what is known of its results."""

    job_id: int
    request: ForwardBackward
    config: dict[str, float]
    logprobs: dict[int, np.ndarray] = field(default_factory=dict)  # by datum index
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """Jobs of one model with equal keys may share a pass."""
        return self.request.forward_only, self.request.loss_fn, tuple(sorted(self.config.items()))

    def result(self) -> ForwardBackwardResult:
        data = self.request.data
        metrics = {
            "loss:sum": math.fsum(self.losses.values()),
            "num_tokens:sum": float(sum(datum.tokens.size for datum in data)),
        }
        return ForwardBackwardResult([self.logprobs[index] for index in range(len(data))], metrics)


@dataclass
class _Pass:
    """Jobs of one model that run together; ``accumulator`` is their gradient so far, None before the first."""

    jobs: dict[int, _Job]
    batches: deque[MicroBatch]
    accumulator: Adapter | None = None


class _NotFinite(Exception):
    """Rows of a micro-batch whose loss or gradient is not finite."""

    def __init__(self, rows: Iterable[Row], what: str) -> None:
        super().__init__(what)
        self.rows, self.what = tuple(rows), what


class Trainer:
    """Runs what is submitted, one micro-batch per ``slice``; see the module's docstring.

    Args:
        micro_batch_tokens: budget of padded positions per micro-batch.
        micro_batch_rows: cap on its rows, 0 is off.
        gradient_checkpointing: recompute layers in the backward pass instead of keeping their activations.
        max_context: longest datum accepted.
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
    ) -> None:
        self._model, self._store = model, store
        shards = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        self._limits = Limits(micro_batch_tokens, micro_batch_rows, max_context, shards)
        self._remat = gradient_checkpointing
        # On a CPU compiling is what a first step waits for; elsewhere unrolled layers spare a copy of the weights.
        self._scan = model.mesh.size == 1 and model.mesh.devices.flat[0].platform == "cpu"
        head_bytes = HEAD_BYTES_CPU if jax.default_backend() == "cpu" else HEAD_BYTES_GPU
        self._chunk = max(64, head_bytes * model.mesh.shape["tp"] // (4 * model.config.vocab_size))
        self._waiting: dict[str, list[_Job]] = {}
        self._passes: dict[str, _Pass] = {}
        self._turns: deque[str] = deque()  # models with work, the next one first

    # ---- what the engine calls --------------------------------------------------------------------------------

    def check(self, request: ForwardBackward) -> None:
        """Raises InvalidInput naming the first wrong field."""
        datums.check(request, self._model.config.vocab_size, self._limits.max_context)

    def submit(self, job_id: int, request: ForwardBackward) -> None:
        """Queue a request; raises InvalidInput, and then nothing is queued."""
        self._store.lora(request.model_id)
        config = datums.check(request, self._model.config.vocab_size, self._limits.max_context)
        self._waiting.setdefault(request.model_id, []).append(_Job(job_id, request, config))
        if request.model_id not in self._turns:
            self._turns.append(request.model_id)

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or under way."""
        return bool(self._turns)

    def slice(self) -> list[Finished]:
        """Run one micro-batch of the model whose turn it is; the jobs that it completed or that failed."""
        if not self._turns:
            return []
        model_id = self._turns[0]
        current = self._passes.get(model_id) or self._start_pass(model_id)
        batch = current.batches[0]
        finished: list[Finished] = []
        try:
            self._run(model_id, current, batch)
            current.batches.popleft()
            if not current.batches:
                self._merge(model_id, current)
                finished = [Finished(job.job_id, job.result()) for job in current.jobs.values()]
                del self._passes[model_id]
        except Exception as error:
            finished = self._recover(model_id, current, batch, error)
        self._next_turn(model_id)
        return finished

    def discard(self, model_id: str) -> None:
        """Forget everything queued for a model, without results."""
        self._waiting.pop(model_id, None)
        self._passes.pop(model_id, None)
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
        grads = state.grads if state.grads is not None else jax.tree.map(jnp.zeros_like, state.weights)
        sizes = optimizer.step_sizes(params, state.step + 1)
        try:
            weights, mu, nu, norm = optimizer.adamw(state.weights, state.mu, state.nu, grads, sizes)
            metrics = {"grad_norm:mean": float(norm)}
        except jax.errors.JaxRuntimeError as error:
            self._store.drop(model_id)  # its arrays were donated
            raise ModelLost(f"the optimizer step of {model_id} failed on the device: {error}") from error
        self._store.replace(model_id, TrainingState(weights, mu, nu, None, state.step + 1))
        return metrics

    # ---- passes -----------------------------------------------------------------------------------------------

    def _start_pass(self, model_id: str) -> _Pass:
        waiting = self._waiting[model_id]
        jobs = [job for job in waiting if job.key == waiting[0].key]
        rest = [job for job in waiting if job.key != waiting[0].key]
        if rest:
            self._waiting[model_id] = rest
        else:
            del self._waiting[model_id]
        return self._plan_pass(model_id, {job.job_id: job for job in jobs})

    def _plan_pass(self, model_id: str, jobs: dict[int, _Job]) -> _Pass:
        rows = [
            Row(datums.num_targets(datum), datum.tokens.size, job.job_id, index)
            for job in jobs.values()
            for index, datum in enumerate(job.request.data)
        ]
        self._passes[model_id] = _Pass(jobs, deque(plan(rows, self._limits)))
        return self._passes[model_id]

    def _next_turn(self, model_id: str) -> None:
        """To the back of the queue, but for the models that already have a pass: no more passes than adapters fit."""
        self._turns.remove(model_id)
        if model_id in self._passes:
            self._turns.insert(min(len(self._turns), self._store.max_resident - 1), model_id)
        elif model_id in self._waiting:
            self._turns.append(model_id)

    def _run(self, model_id: str, current: _Pass, batch: MicroBatch) -> None:
        """One jitted call; its results into the jobs, its gradients into the accumulator."""
        jobs = [current.jobs[row.job_id] for row in batch.rows]
        request = jobs[0].request
        data = [job.request.data[row.index] for job, row in zip(jobs, batch.rows, strict=True)]
        host = datums.lay_out(data, batch.shape, request.loss_fn, jobs[0].config)
        accumulator, logprobs, losses, finite = self._call(model_id, current.accumulator, host, request.forward_only)
        broken = [row for row, loss in zip(batch.rows, losses, strict=False) if not math.isfinite(loss)]
        if broken:
            raise _NotFinite(broken, "a loss that is not finite")
        if not finite:
            raise _NotFinite(batch.rows, "gradients that are not finite")
        current.accumulator = accumulator
        for row, job, values, loss in zip(batch.rows, jobs, logprobs, losses, strict=False):
            targets = job.request.data[row.index].inputs["target_tokens"]
            job.logprobs[row.index] = values[: row.length, : row.num_targets].reshape(targets.shape)
            job.losses[row.index] = float(loss)

    def _call(
        self, model_id: str, accumulator: Adapter | None, host: datums.HostBatch, forward_only: bool
    ) -> tuple[Adapter | None, np.ndarray, np.ndarray, bool]:
        model, state, ranks = self._model, self._store.state(model_id), self._store.ranks(model_id)
        scalings = (np.float32(ranks.scaling), np.float32(ranks.expert_scaling))
        batch = jax.tree.map(self._to_device, (host.tokens, host.targets, host.loss))
        static = (model.graphdef, ranks.padded, self._chunk, self._scan)
        if forward_only:
            outputs = _forward(*static, model.weights, state.weights, scalings, *batch)
            logprobs, losses = jax.device_get(outputs)
            return None, logprobs, losses, True
        if accumulator is None:
            accumulator = jax.tree.map(jnp.zeros_like, state.weights)
        accumulator, *outputs = _forward_backward(
            *static, self._remat, model.weights, state.weights, accumulator, scalings, *batch
        )
        logprobs, losses, finite = jax.device_get(outputs)
        return accumulator, logprobs, losses, bool(finite)

    def _to_device(self, array: np.ndarray) -> jax.Array:
        axes = ("row", "seq", None)[: array.ndim]
        return jax.device_put(array, sharding(axes, array.shape, self._model.mesh))

    def _merge(self, model_id: str, current: _Pass) -> None:
        """The pass is complete: its gradients join the model's."""
        if current.accumulator is None:
            return
        state = self._store.state(model_id)
        grads = current.accumulator if state.grads is None else _add(state.grads, current.accumulator)
        self._store.replace(model_id, replace(state, grads=grads))

    def _recover(self, model_id: str, current: _Pass, batch: MicroBatch, error: Exception) -> list[Finished]:
        """After a failed micro-batch: start the pass again, with smaller micro-batches or without whoever failed.

        The accumulator was donated to the failed call, or has its numbers in it: a new pass begins without one.
        """
        if _out_of_memory(error) and batch.shape.rows > self._limits.row_multiple:
            self._limits = replace(self._limits, tokens=batch.shape.num_tokens // 2)
            log.warning("out of memory: micro-batches now have at most %d tokens", self._limits.tokens)
            self._plan_pass(model_id, current.jobs)
            return []
        failed: dict[int, Exception] = {}
        for row in error.rows if isinstance(error, _NotFinite) else batch.rows:
            if isinstance(error, _NotFinite):
                accepted = "a finite loss with finite gradients; were logprobs, advantages or learning_rate too large?"
                failed.setdefault(row.job_id, InvalidInput(f"data[{row.index}]", error.what, accepted))
            else:
                failed.setdefault(row.job_id, error)
        left = {job_id: job for job_id, job in current.jobs.items() if job_id not in failed}
        del self._passes[model_id]
        if left:
            self._plan_pass(model_id, left)
        return [Finished(job_id, error=cause) for job_id, cause in failed.items()]


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


# ---- jitted programs ------------------------------------------------------------------------------------------


def _losses(
    model: Any,
    adapter: Adapter,
    padded_ranks: tuple[int, int],
    chunk: int,
    scan: bool,
    remat: bool,
    scalings: tuple[jax.Array, jax.Array],
    tokens: Int[Array, "row seq"],
    targets: Int[Array, "row seq k"],
    batch: LossBatch,
) -> tuple[Float[Array, "row seq k"], Float[Array, " row"]]:
    """Logprobs of the targets and each row's loss."""
    view = single_view(adapter, *scalings, *padded_ranks)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = model.hidden_states(tokens, positions, adapter=view, remat=remat, scan=scan)
    logprobs = target_logprobs(hidden, model.unembed_kernel(), targets, adapter.unembed, view.gate, chunk=chunk)
    return logprobs, row_losses(logprobs, batch)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _forward(
    graphdef: Any,
    padded_ranks: tuple[int, int],
    chunk: int,
    scan: bool,
    weights: Any,
    adapter: Adapter,
    scalings: tuple[jax.Array, jax.Array],
    tokens: Int[Array, "row seq"],
    targets: Int[Array, "row seq k"],
    batch: LossBatch,
) -> tuple[Float[Array, "row seq k"], Float[Array, " row"]]:
    model = nnx.merge(graphdef, weights)
    return _losses(model, adapter, padded_ranks, chunk, scan, False, scalings, tokens, targets, batch)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=(7,))
def _forward_backward(
    graphdef: Any,
    padded_ranks: tuple[int, int],
    chunk: int,
    scan: bool,
    remat: bool,
    weights: Any,
    adapter: Adapter,
    accumulator: Adapter,
    scalings: tuple[jax.Array, jax.Array],
    tokens: Int[Array, "row seq"],
    targets: Int[Array, "row seq k"],
    batch: LossBatch,
) -> tuple[Adapter, Float[Array, "row seq k"], Float[Array, " row"], Bool[Array, ""]]:
    """The accumulator with this micro-batch's gradients added, logprobs, losses, and whether the sum is finite."""
    model = nnx.merge(graphdef, weights)

    def loss(adapter: Adapter) -> tuple[Float[Array, ""], tuple[jax.Array, jax.Array]]:
        logprobs, per_row = _losses(model, adapter, padded_ranks, chunk, scan, remat, scalings, tokens, targets, batch)
        return jnp.sum(per_row), (logprobs, per_row)

    grads, (logprobs, per_row) = jax.grad(loss, has_aux=True)(adapter)
    total = _in_place(jax.tree.map(jnp.add, accumulator, grads), model, padded_ranks)
    finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(total)]).all()
    return total, logprobs, per_row, finite


@partial(jax.jit, donate_argnums=(1,))
def _add(grads: Adapter, more: Adapter) -> Adapter:
    """``more`` is consumed; ``grads`` is not, so that the model's state survives a failure here."""
    return jax.tree.map(jnp.add, grads, more)


def _in_place(adapter: Adapter, model: Any, padded_ranks: tuple[int, int]) -> Adapter:
    """Pinned to where adapters live on the mesh, so that donated accumulators keep their place."""
    if model.mesh is None or model.mesh.size == 1:
        return adapter

    def pin(site: Any, weights: LoraWeights) -> LoraWeights:
        places = adapter_sharding(site, model.mesh, padded_ranks[site.num_experts is not None])
        return jax.tree.map(jax.lax.with_sharding_constraint, weights, places)

    layers: list[dict[str, LoraWeights]] = [dict(layer) for layer in adapter.layers]
    unembed = adapter.unembed
    for site in model.lora_sites():
        if site.layer is None:
            unembed = None if unembed is None else pin(site, unembed)
        elif site.key in layers[site.layer]:
            layers[site.layer][site.key] = pin(site, layers[site.layer][site.key])
    return Adapter(tuple(layers), unembed)
