"""Trainer: submitted requests to micro-batches, micro-batches to losses and gradients, gradients to optimizer steps.

A *pass* is everything that one model has waiting, of forwards or of forward_backwards, whatever the losses: its datums
are packed into micro-batches (``packing``) that run one after the other on its adapter. Gradients of a pass grow in an
accumulator of their own and reach the model's state only when the whole pass is done, so a job that fails in the middle
leaves nothing behind: the pass starts again without it. Models take turns, one micro-batch each.

Requests so small that reading the weights is most of their cost are an exception: those that wait at several models
run as rows of one micro-batch, each with its own adapter. Whatever goes wrong there, they run again one by one.

Programs (``layerwise``) are compiled per shape and padded rank, never per loss, config or learning rate.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from tx.errors import InvalidInput, ModelLost
from tx.layers.lora import Adapter
from tx.models.loading import LoadedModel
from tx.types import AdamParams, Finished, ForwardBackward, ForwardBackwardResult
from tx.worker import datums, memory, optimizer
from tx.worker.adapters import AdapterStore, Ranks, TrainingState, add, resize, zeros_like
from tx.worker.datums import Given
from tx.worker.layerwise import Layerwise, Outputs, Trained
from tx.worker.packing import MicroBatch, Piece, plan, smaller
from tx.worker.shapes import Limits, Shape, all_shapes, padded_length, power_of_two
from tx.worker.throughput import Meter, PassCost, flops_per_token

log = logging.getLogger(__name__)

HEAD_TOKENS_CPU = 128
HEAD_BYTES_GPU = 512 << 20
"""Positions, or float32 logits, of one chunk of the head: enough to be compute-bound, few enough to skip others."""

TOGETHER_TOKENS = 64
"""Up to so many tokens, a model's request may run beside those of other models: see ``Trainer._tiny``."""

TOGETHER_MODELS = 16

GATHER_SHARE = 0.5
"""Of the time that the last micro-batch of several models took: so long the next one may wait for those models."""


@dataclass
class _Job:
    """One submitted request and what is known of its results."""

    job_id: int
    request: ForwardBackward
    config: dict[str, float]
    alone: bool  # never beside other models
    logprobs: dict[int, np.ndarray] = field(default_factory=dict)  # by datum index
    losses: dict[int, float] = field(default_factory=dict)

    def given(self, index: int) -> Given:
        """A datum as ``datums.lay_out`` takes it."""
        return Given(self.request.data[index], self.request.loss_fn, self.config)

    def result(self, cost: dict[str, float]) -> ForwardBackwardResult:
        data = self.request.data
        metrics = {
            "loss:sum": math.fsum(self.losses.values()),
            "num_tokens:sum": float(sum(datum.tokens.size for datum in data)),
        }
        return ForwardBackwardResult([self.logprobs[index] for index in range(len(data))], metrics | cost)


@dataclass
class _Pass:
    """Jobs of one model that run together; ``accumulator`` is their gradient so far, None before the first."""

    jobs: dict[int, _Job]
    batches: deque[MicroBatch]
    forward_only: bool
    accumulator: Adapter | None = None
    cost: PassCost = field(default_factory=PassCost)

    def results(self, meter: Meter) -> list[Finished]:
        """What the jobs of a pass that is through have come to."""
        metrics = meter.finish(self.cost)
        return [Finished(job.job_id, job.result(metrics)) for job in self.jobs.values()]


class _NotFinite(Exception):
    """Datums of a micro-batch whose loss or gradient is not finite."""

    def __init__(self, pieces: Iterable[Piece], what: str) -> None:
        super().__init__(what)
        self.pieces, self.what = tuple(pieces), what


class Trainer:
    """Runs what is submitted, one micro-batch per ``slice``; see the module's docstring.

    Args:
        micro_batch_tokens: budget of padded positions per micro-batch.
        micro_batch_rows: cap on its datums, 0 is off.
        gradient_checkpointing: always compute layers again in the backward pass; else only where a micro-batch's
            activations don't fit into ``activation_bytes``.
        max_context: longest datum accepted.
        activation_bytes: what may live between the forward and the backward pass, None for no limit.
        clock: seconds, to wait for other models by.
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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._store = model, store
        self._clock = clock
        shards = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        on_gpu = model.mesh.devices.flat[0].platform == "gpu"  # there cuDNN attends, one datum per row
        self._limits = Limits(micro_batch_tokens, micro_batch_rows, max_context, shards, packed=not on_gpu)
        self._activation_bytes = 0 if gradient_checkpointing else activation_bytes
        gpu_chunk = HEAD_BYTES_GPU * model.mesh.shape["tp"] // (4 * model.config.vocab_size)
        self._layerwise = Layerwise(
            model, chunk=max(64, gpu_chunk) if on_gpu else HEAD_TOKENS_CPU, packed=self._limits.packed
        )
        self._meter = Meter(model)
        self._waiting: dict[str, list[_Job]] = {}
        self._passes: dict[str, _Pass] = {}
        self._turns: deque[str] = deque()  # models with work, the next one first
        self._companions: frozenset[str] = frozenset()  # of the last micro-batch of several models
        self._together_s = 0.0  # what it took
        self._gathering_since: float | None = None  # the first request since the last slice

    # ---- what the engine calls --------------------------------------------------------------------------------

    def submit(self, job_id: int, request: ForwardBackward, *, alone: bool = False) -> None:
        """Queue a request, ``alone``: never beside other models'; raises InvalidInput, and then nothing is queued."""
        self._store.lora(request.model_id)
        config = datums.check(request, self._model.config.vocab_size, self._limits.max_context)
        self._waiting.setdefault(request.model_id, []).append(_Job(job_id, request, config, alone))
        if request.model_id not in self._turns:
            self._turns.append(request.model_id)
        if self._gathering_since is None:
            self._gathering_since = self._clock()

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or under way."""
        return bool(self._turns)

    @property
    def gather_s(self) -> float:
        """Seconds for which the next ``slice`` is worth putting off, more requests being submitted meanwhile.

        Models that ran in one micro-batch tend to send their next tiny requests at the same time again. Who is not
        back in a part of the time that it took is not waited for the next time.
        """
        if self._gathering_since is None or self._companions <= set(self._turns):
            return 0.0
        if not 0 < len(self._tiny()) < self._most_together:
            return 0.0
        return max(0.0, self._gathering_since + GATHER_SHARE * self._together_s - self._clock())

    def slice(self) -> list[Finished]:
        """Run one micro-batch of the model whose turn it is; the jobs that it completed or that failed."""
        self._gathering_since = None
        if not self._turns:
            return []
        model_id = self._turns[0]
        together = self._tiny()
        if len(together) > 1:
            return self._slice_together(together)
        if together:
            self._companions = frozenset()
        current = self._passes.get(model_id) or self._start_pass(model_id)
        batch = current.batches[0]
        finished: list[Finished] = []
        try:
            self._run(model_id, current, batch)
            current.batches.popleft()
            if not current.batches:
                if current.accumulator is not None:
                    self._merge(model_id, current.accumulator)
                finished = current.results(self._meter)
                del self._passes[model_id]
        except Exception as error:
            finished = self._recover(model_id, current, batch, error)
        self._next_turn(model_id)
        return finished

    def discard(self, model_id: str) -> None:
        """Forget everything queued for a model, without results."""
        self._waiting.pop(model_id, None)
        self._passes.pop(model_id, None)
        self._companions -= {model_id}
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
        grads = state.grads if state.grads is not None else zeros_like(state.weights)
        sizes = optimizer.step_sizes(params, state.step + 1)
        try:
            weights, mu, nu, norm = optimizer.adamw(state.weights, state.mu, state.nu, grads, sizes)
            metrics = {"grad_norm:mean": float(norm)}
        except jax.errors.JaxRuntimeError as error:
            self._store.drop(model_id)  # its arrays were donated
            raise ModelLost(f"the optimizer step of {model_id} failed on the device: {error}") from error
        self._store.replace(model_id, TrainingState(weights, mu, nu, None, state.step + 1))
        return metrics

    @property
    def usual_shapes(self) -> list[Shape]:
        """Of data up to the token budget with one target per position; longer ones have few programs each."""
        return all_shapes(self._limits, longest=self._limits.tokens)

    # ---- passes -----------------------------------------------------------------------------------------------

    def _start_pass(self, model_id: str) -> _Pass:
        return self._plan_pass(model_id, {job.job_id: job for job in self._take(model_id)})

    def _next_jobs(self, model_id: str) -> list[_Job]:
        """The waiting jobs that may share a pass with the first."""
        waiting = self._waiting.get(model_id, [])
        return [job for job in waiting if job.request.forward_only == waiting[0].request.forward_only]

    def _take(self, model_id: str) -> list[_Job]:
        jobs = self._next_jobs(model_id)
        rest = [job for job in self._waiting[model_id] if job.request.forward_only != jobs[0].request.forward_only]
        if rest:
            self._waiting[model_id] = rest
        else:
            del self._waiting[model_id]
        return jobs

    def _plan_pass(self, model_id: str, jobs: dict[int, _Job]) -> _Pass:
        batches = deque(plan(_pieces(jobs.values()), self._limits))
        forward_only = next(iter(jobs.values())).request.forward_only
        self._passes[model_id] = _Pass(jobs, batches, forward_only)
        return self._passes[model_id]

    def _next_turn(self, model_id: str) -> None:
        """To the back of the queue, but for the models that already have a pass: no more passes than adapters fit."""
        self._turns.remove(model_id)
        if model_id in self._passes:
            self._turns.insert(min(len(self._turns), self._store.max_resident - 1), model_id)
        elif model_id in self._waiting:
            self._turns.append(model_id)

    def _run(self, model_id: str, current: _Pass, batch: MicroBatch) -> None:
        """One micro-batch; its results into the jobs, its gradients into the accumulator."""
        state, ranks = self._store.state(model_id), self._store.ranks(model_id)
        trained = _trained([state.weights], [ranks])
        if current.forward_only and state.is_base:
            trained = Trained((), None, None)
        sums: tuple[Adapter, ...] | None = None
        if not current.forward_only:
            sums = (zeros_like(state.weights) if current.accumulator is None else current.accumulator,)
            current.accumulator = None  # consumed, whatever happens
        began = self._clock()
        gradients = self._compute(batch, current.jobs, trained, sums, current.forward_only)
        if gradients:
            current.accumulator = gradients[0]
        cost = flops_per_token(self._model, ranks, forward_only=current.forward_only)
        current.cost.add(batch.num_tokens, batch.shape.num_tokens, self._clock() - began, cost)

    def _compute(
        self,
        batch: MicroBatch,
        jobs: dict[int, _Job],
        trained: Trained,
        sums: tuple[Adapter, ...] | None,
        forward_only: bool,
    ) -> tuple[Adapter, ...]:
        """Logprobs and losses of a micro-batch into its jobs, once all is known to be finite; its gradients."""
        host = datums.lay_out([[jobs[p.job_id].given(p.index) for p in row] for row in batch.rows], batch.shape)
        if forward_only:
            outputs = self._layerwise.forward(trained, host)
        else:
            outputs = self._layerwise.forward_backward(trained, sums, host, keep=self._keeps(batch.shape))
        self._read(batch, jobs, outputs)
        return outputs.gradients

    def _read(self, batch: MicroBatch, jobs: dict[int, _Job], outputs: Outputs) -> None:
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

    def _keeps(self, shape: Shape) -> bool:
        """Whether the backward pass of this shape finds its activations, or computes the layers again."""
        return self._activation_bytes is None or self._kept_bytes(shape) <= self._activation_bytes

    def _kept_bytes(self, shape: Shape) -> int:
        """What a micro-batch keeps on each device between its two passes."""
        each = memory.kept_bytes_per_token(self._model.config, self._model.dtype)
        return shape.num_tokens * each // self._limits.row_multiple

    def _merge(self, model_id: str, gradients: Adapter) -> None:
        """The pass is complete: its gradients join the model's."""
        state = self._store.state(model_id)
        grads = gradients if state.grads is None else add(state.grads, gradients)
        self._store.replace(model_id, replace(state, grads=grads))

    def _recover(self, model_id: str, current: _Pass, batch: MicroBatch, error: Exception) -> list[Finished]:
        """After a failed micro-batch: start the pass again, with less memory or without whoever failed.

        The accumulator was donated to the failed call, or has its numbers in it: a new pass begins without one.
        """
        guilty = error.pieces if isinstance(error, _NotFinite) else batch.pieces
        if _out_of_memory(error):
            if self._can_shrink(batch, current.forward_only):
                self._plan_pass(model_id, current.jobs)
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
            self._plan_pass(model_id, left)
        return [Finished(job_id, error=cause) for job_id, cause in failed.items()]

    def _can_shrink(self, batch: MicroBatch, forward_only: bool) -> bool:
        """Make this micro-batch's kind need less memory from now on; False if it can't."""
        shape = batch.shape
        if not forward_only and self._keeps(shape):
            self._activation_bytes = self._kept_bytes(shape) // 2
            log.warning("out of memory: layers of more than %d tokens are computed twice", shape.num_tokens // 2)
            return True
        limits = smaller(batch, self._limits)
        if limits is not None:
            self._limits = limits
            log.warning("out of memory: micro-batches now have at most %d tokens", self._limits.tokens)
            return True
        return False

    # ---- several models in one micro-batch --------------------------------------------------------------------

    def _tiny(self) -> list[str]:
        """The models, the next in turn first, whose tiny passes can run as rows of one micro-batch.

        Worth it where a model alone has too few tokens to pay for reading the weights. Each row has its own copy of
        an adapter, which costs as much as ``rank / embed`` of the weights, so many tokens per model don't gain.
        """
        if self._model.mesh.size > 1 or self._model.config.num_experts or not self._is_tiny(self._turns[0]):
            return []
        first = self._next_jobs(self._turns[0])[0].request.forward_only
        like = self._sites(self._turns[0])
        chosen: list[str] = []
        for model_id in self._turns:
            alike = self._is_tiny(model_id) and self._next_jobs(model_id)[0].request.forward_only == first
            if alike and self._sites(model_id) == like:
                chosen.append(model_id)
            if len(chosen) == self._most_together:
                break
        return chosen

    @property
    def _most_together(self) -> int:
        return min(TOGETHER_MODELS, self._store.max_resident)

    def _is_tiny(self, model_id: str) -> bool:
        if model_id in self._passes:
            return False
        jobs = self._next_jobs(model_id)
        if not jobs or any(job.alone for job in jobs):
            return False
        pieces = _pieces(jobs)
        length = sum(piece.length for piece in pieces)
        if self._limits.datums and len(pieces) > self._limits.datums:
            return False
        if not self._limits.packed and len(pieces) > 1:  # a row's datums would see each other
            return False
        return length <= TOGETHER_TOKENS and max(piece.num_targets for piece in pieces) == 1

    def _sites(self, model_id: str) -> tuple[bool, bool, bool]:
        lora = self._store.lora(model_id)
        return lora.train_attn, lora.train_mlp, lora.train_unembed

    def _slice_together(self, model_ids: list[str]) -> list[Finished]:
        jobs = {model_id: self._next_jobs(model_id) for model_id in model_ids}
        began = self._clock()
        try:
            passes = self._run_together(jobs)
        except Exception as error:
            log.debug("%d models run one by one after: %s", len(model_ids), error)
            for job in (job for group in jobs.values() for job in group):
                job.alone = True
            return []
        self._companions, self._together_s = frozenset(passes), self._clock() - began
        finished = []
        for model_id, done in passes.items():
            self._take(model_id)
            if done.accumulator is not None:
                self._merge(model_id, done.accumulator)
            finished += done.results(self._meter)
            self._next_turn(model_id)
        return finished

    def _run_together(self, jobs: dict[str, list[_Job]]) -> dict[str, _Pass]:
        """One micro-batch of a row per model; nothing of any model has changed if it raises."""
        states = [self._store.state(model_id) for model_id in jobs]
        ranks = [self._store.ranks(model_id) for model_id in jobs]
        widest = max(each.padded[0] for each in ranks)
        rows = tuple(tuple(_pieces(group)) for group in jobs.values())
        longest = max(sum(piece.length for piece in row) for row in rows)
        missing = power_of_two(len(rows)) - len(rows)
        shape = Shape(len(rows) + missing, padded_length(longest, self._limits), 1)
        batch = MicroBatch(rows, shape)
        weights = [resize(state.weights, widest) for state in states]
        trained = _trained(weights + weights[-1:] * missing, ranks + ranks[-1:] * missing, widest)
        forward_only = next(iter(jobs.values()))[0].request.forward_only
        everyone = {job.job_id: job for group in jobs.values() for job in group}
        began = self._clock()
        gradients = self._compute(batch, everyone, trained, None, forward_only)
        share = (self._clock() - began) / len(rows)
        passes = {}
        for index, (model_id, group) in enumerate(jobs.items()):
            done = _Pass({job.job_id: job for job in group}, deque(), forward_only)
            if gradients:
                done.accumulator = resize(gradients[index], ranks[index].padded[0])
            cost = flops_per_token(self._model, ranks[index], forward_only=forward_only)
            num_tokens = sum(piece.length for piece in rows[index])
            done.cost.add(num_tokens, shape.num_tokens // len(rows), share, cost)
            passes[model_id] = done
        return passes


def _pieces(jobs: Iterable[_Job]) -> list[Piece]:
    return [
        Piece(datums.num_targets(datum), datum.tokens.size, job.job_id, index)
        for job in jobs
        for index, datum in enumerate(job.request.data)
    ]


def _trained(weights: Sequence[Adapter], ranks: Sequence[Ranks], width: int | None = None) -> Trained:
    """Adapters with their scalings, of ``width`` columns or of their own padded rank."""
    gate = [np.full(width or each.padded[0], each.scaling, np.float32) for each in ranks]
    expert_gate = [np.full(each.padded[1], each.expert_scaling, np.float32) for each in ranks[:1]]
    return Trained(tuple(weights), np.stack(gate), np.stack(expert_gate))


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
