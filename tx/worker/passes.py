"""Passes of one model: its jobs to micro-batches, micro-batches one after the other to losses and gradients.

A *pass* is everything that one model has waiting, of forwards or of forward_backwards, whatever the losses: its datums
are packed into micro-batches (``packing``) that run one after the other on its adapter. Gradients of a pass grow in an
accumulator of their own and reach the model's state only when the whole pass is done, so a job that fails in the middle
leaves nothing behind: the pass starts again without it.

Programs (``layerwise``) are compiled per shape and padded rank, never per loss, config or learning rate. Not here:
whose turn it is (``trainer``).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import numpy as np

from tx.errors import InvalidInput
from tx.layers.lora import Adapter
from tx.models.loading import LoadedModel
from tx.types import Finished, ForwardBackward, ForwardBackwardResult
from tx.worker import datums, memory
from tx.worker.adapters import AdapterStore, Ranks, add, zeros_like
from tx.worker.ahead import Call, directly
from tx.worker.datums import Given
from tx.worker.layerwise import Layerwise, Outputs, Trained
from tx.worker.packing import MicroBatch, Piece, plan, smaller
from tx.worker.shapes import Limits, Shape
from tx.worker.throughput import Meter, PassCost, flops_per_token

log = logging.getLogger(__name__)

HEAD_TOKENS_CPU = 128
HEAD_BYTES_GPU = 512 << 20
"""Positions, or float32 logits, of one chunk of the head: enough to be compute-bound, few enough to skip others."""


@dataclass
class Job:
    """One submitted request and what is known of its results."""

    job_id: int
    request: ForwardBackward
    config: dict[str, float]
    alone: bool  # never beside other models
    logprobs: dict[int, np.ndarray] = field(default_factory=dict)  # by datum index
    losses: dict[int, float] = field(default_factory=dict)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Its datums, as they are planned."""
        data = enumerate(self.request.data)
        return [Piece(datums.num_targets(datum), datum.tokens.size, self.job_id, index) for index, datum in data]

    def given(self, index: int) -> Given:
        """A datum as ``datums.lay_out`` takes it."""
        return Given(self.request.data[index], self.request.loss_fn, self.config)

    def result(self, cost: dict[str, float]) -> ForwardBackwardResult:
        """What it has come to; ``cost`` joins its metrics."""
        data = self.request.data
        metrics = {
            "loss:sum": math.fsum(self.losses.values()),
            "num_tokens:sum": float(sum(datum.tokens.size for datum in data)),
        }
        return ForwardBackwardResult([self.logprobs[index] for index in range(len(data))], metrics | cost)


@dataclass
class Pass:
    """Jobs of one model that run together; ``accumulator`` is their gradient so far, None before the first."""

    jobs: dict[int, Job]
    batches: deque[MicroBatch]
    forward_only: bool
    accumulator: Adapter | None = None
    cost: PassCost = field(default_factory=PassCost)


class _NotFinite(Exception):
    """Datums of a micro-batch whose loss or gradient is not finite."""

    def __init__(self, pieces: Iterable[Piece], what: str) -> None:
        super().__init__(what)
        self.pieces, self.what = tuple(pieces), what


class Passes:
    """The passes under way, at most one of each model; see the module's docstring.

    Args:
        limits: of a micro-batch; out of memory, they shrink.
        gradient_checkpointing: always compute layers again in the backward pass; else only as many as don't fit into
            ``activation_bytes``.
        activation_bytes: what may live between the forward and the backward pass, None for no limit.
        call: how programs are run (``ahead``).
        clock: seconds, to measure passes by.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: AdapterStore,
        limits: Limits,
        *,
        gradient_checkpointing: bool = False,
        activation_bytes: int | None = None,
        call: Call = directly,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._store = model, store
        self._limits = limits
        self._call, self._clock = call, clock
        self._activation_bytes = 0 if gradient_checkpointing else activation_bytes
        on_gpu = model.mesh.devices.flat[0].platform == "gpu"
        gpu_chunk = HEAD_BYTES_GPU * model.mesh.shape["tp"] // (4 * model.config.vocab_size)
        self._layerwise = Layerwise(
            model, chunk=max(64, gpu_chunk) if on_gpu else HEAD_TOKENS_CPU, packed=limits.packed
        )
        self._meter = Meter(model)
        self._passes: dict[str, Pass] = {}

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._passes

    @property
    def limits(self) -> Limits:
        """What bounds a micro-batch at present."""
        return self._limits

    def start(self, model_id: str, jobs: Iterable[Job]) -> None:
        """Plan a pass of jobs that are all forwards or all forward_backwards."""
        self._plan(model_id, {job.job_id: job for job in jobs})

    def run(self, model_id: str) -> list[Finished]:
        """The next micro-batch of the model's pass; the jobs that it completed or that failed."""
        current = self._passes[model_id]
        batch = current.batches[0]
        try:
            self._run(model_id, current, batch)
            current.batches.popleft()
            if current.batches:
                return []
            finished = self.finish(model_id, current)
        except Exception as error:
            return self._recover(model_id, current, batch, error)
        del self._passes[model_id]
        return finished

    def finish(self, model_id: str, done: Pass) -> list[Finished]:
        """A pass is complete: its gradients join the model's; what its jobs have come to."""
        if done.accumulator is not None:
            state = self._store.state(model_id)
            grads = done.accumulator if state.grads is None else self._call(add, state.grads, done.accumulator)
            self._store.replace(model_id, replace(state, grads=grads))
        metrics = self._meter.finish(done.cost)
        return [Finished(job.job_id, job.result(metrics)) for job in done.jobs.values()]

    def discard(self, model_id: str) -> None:
        """Forget the model's pass, without results."""
        self._passes.pop(model_id, None)

    def compute(
        self,
        batch: MicroBatch,
        jobs: Mapping[int, Job],
        trained: Trained,
        sums: tuple[Adapter, ...] | None,
        forward_only: bool,
    ) -> tuple[Adapter, ...]:
        """Logprobs and losses of a micro-batch into its jobs, once all is known to be finite; its gradients.

        They are added to ``sums``, which are consumed, one per adapter of ``trained``; None is zero.
        """
        host = datums.lay_out([[jobs[p.job_id].given(p.index) for p in row] for row in batch.rows], batch.shape)
        if forward_only:
            outputs = self._layerwise.forward(trained, host, call=self._call)
        else:
            kept = self._kept_layers(batch.shape)
            outputs = self._layerwise.forward_backward(trained, sums, host, kept_layers=kept, call=self._call)
        _read(batch, jobs, outputs)
        return outputs.gradients

    def rehearse(self, adapter: tuple[Adapter, Ranks] | None, shape: Shape, forward_only: bool, call: Call) -> None:
        """``call`` each program of a pass of this shape; without an adapter, of the base model (forward only).

        Nothing changes; the adapter's arrays may be shapes.
        """
        host = datums.lay_out([()] * shape.rows, shape)
        trained = _BASE if adapter is None else _one(*adapter)
        if adapter is None or forward_only:
            self._layerwise.forward(trained, host, call=call)
            return
        sums, kept = (zeros_like(adapter[0], call=call),), self._kept_layers(shape)
        (grads,) = self._layerwise.forward_backward(trained, sums, host, kept_layers=kept, call=call).gradients
        call(add, grads, grads)

    # ---- a micro-batch ----------------------------------------------------------------------------------------

    def _plan(self, model_id: str, jobs: dict[int, Job]) -> None:
        batches = deque(plan((piece for job in jobs.values() for piece in job.pieces), self._limits))
        forward_only = next(iter(jobs.values())).request.forward_only
        self._passes[model_id] = Pass(jobs, batches, forward_only)

    def _run(self, model_id: str, current: Pass, batch: MicroBatch) -> None:
        """Its results into the jobs, its gradients into the accumulator."""
        state, ranks = self._store.state(model_id), self._store.ranks(model_id)
        trained = _BASE if current.forward_only and state.is_base else _one(state.weights, ranks)
        sums: tuple[Adapter, ...] | None = None
        if not current.forward_only:
            sums = (zeros_like(state.weights, call=self._call) if current.accumulator is None else current.accumulator,)
            current.accumulator = None  # consumed, whatever happens
        began = self._clock()
        gradients = self.compute(batch, current.jobs, trained, sums, current.forward_only)
        if gradients:
            current.accumulator = gradients[0]
        cost = flops_per_token(self._model, ranks, forward_only=current.forward_only)
        current.cost.add(batch.num_tokens, batch.shape.num_tokens, self._clock() - began, cost)

    def _kept_layers(self, shape: Shape) -> int:
        """Of how many layers the backward pass of this shape finds the activations; it computes the others again.

        In quarters: fewer would not be worth two more programs, and where a little less memory is free at the next
        start, a replay rounds as the first time.
        """
        num_layers, room = self._model.config.num_layers, self._activation_bytes
        counts = (num_layers * quarters // 4 for quarters in (4, 3, 2, 1))
        return next((count for count in counts if room is None or self._kept_bytes(shape, count) <= room), 0)

    def _kept_bytes(self, shape: Shape, layers: int) -> int:
        """What a micro-batch has on each device between its two passes if it keeps so many layers' activations."""
        config, dtype = self._model.config, self._model.dtype
        inputs = memory.layer_input_bytes_per_token(config, dtype)
        share = (memory.kept_bytes_per_token(config, dtype) - inputs) * layers // config.num_layers
        return shape.num_tokens * (inputs + share) // self._limits.row_multiple

    # ---- failures ---------------------------------------------------------------------------------------------

    def _recover(self, model_id: str, current: Pass, batch: MicroBatch, error: Exception) -> list[Finished]:
        """After a failed micro-batch: start the pass again, with less memory or without whoever failed.

        The accumulator was donated to the failed call, or has its numbers in it: a new pass begins without one.
        """
        guilty = error.pieces if isinstance(error, _NotFinite) else batch.pieces
        if _out_of_memory(error):
            if self._can_shrink(batch, current.forward_only):
                self._plan(model_id, current.jobs)
                return []
            guilty = (max(batch.pieces, key=lambda piece: piece.length),)  # shorter ones only filled its row
        failed: dict[int, Exception] = {}
        for piece in guilty:
            if isinstance(error, _NotFinite):
                accepted = "a finite loss with finite gradients; were logprobs, advantages or learning_rate too large?"
                failed.setdefault(piece.job_id, InvalidInput(f"data[{piece.index}]", error.what, accepted))
            else:
                failed.setdefault(piece.job_id, error)
        left = {job_id: job for job_id, job in current.jobs.items() if job_id not in failed}
        del self._passes[model_id]
        if left:
            self._plan(model_id, left)
        return [Finished(job_id, error=cause) for job_id, cause in failed.items()]

    def _can_shrink(self, batch: MicroBatch, forward_only: bool) -> bool:
        """Make this micro-batch's kind need less memory from now on; False if it can't."""
        shape = batch.shape
        kept = 0 if forward_only else self._kept_layers(shape)
        if kept:
            self._activation_bytes = self._kept_bytes(shape, kept // 2)
            log.warning(
                "out of memory: of %d tokens the activations of %d layers are kept, no longer of %d",
                shape.num_tokens, self._kept_layers(shape), kept,
            )  # fmt: skip
            return True
        limits = smaller(batch, self._limits)
        if limits is not None:
            self._limits = limits
            log.warning("out of memory: micro-batches now have at most %d tokens", self._limits.tokens)
            return True
        return False


_BASE = Trained((), None, None)
"""No adapter: the base model."""


def _one(weights: Adapter, ranks: Ranks) -> Trained:
    return with_scalings([weights], [ranks], ranks.padded[0])


def with_scalings(weights: Sequence[Adapter], ranks: Sequence[Ranks], width: int) -> Trained:
    """Adapters whose dense sites all have ``width`` columns, with their scalings."""
    gate = [np.full(width, each.scaling, np.float32) for each in ranks]
    expert_gate = [np.full(each.padded[1], each.expert_scaling, np.float32) for each in ranks[:1]]
    return Trained(tuple(weights), np.stack(gate), np.stack(expert_gate))


def _read(batch: MicroBatch, jobs: Mapping[int, Job], outputs: Outputs) -> None:
    """Logprobs and losses into the jobs; raises _NotFinite, and then nothing has changed."""
    logprobs, losses, finite = jax.device_get((outputs.logprobs, outputs.losses, outputs.finite))
    found, broken = [], []
    for row, pieces in enumerate(batch.rows):
        begin = 0
        for piece in pieces:
            here = (row, slice(begin, begin + piece.length))
            loss = math.fsum(losses[here].tolist()) if np.isfinite(losses[here]).all() else math.nan
            found.append((piece, logprobs[here][:, : piece.num_targets], loss))
            begin += piece.length
            if not math.isfinite(loss):
                broken.append(piece)
    if broken:
        raise _NotFinite(broken, "a loss that is not finite")
    if not finite:
        raise _NotFinite(batch.pieces, "gradients that are not finite")
    for piece, values, loss in found:
        job = jobs[piece.job_id]
        shape = job.request.data[piece.index].inputs["target_tokens"].shape
        job.logprobs[piece.index], job.losses[piece.index] = values.reshape(shape), loss


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
