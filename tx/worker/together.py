"""Tiny requests of several models in one micro-batch, a row per model, each row with its own adapter.

Worth it where a model alone has too few tokens to pay for reading the weights. Each row has its own copy of an adapter,
which costs as much as ``rank / embed`` of the weights, so many tokens per model don't gain. Whatever goes wrong here,
nothing of any model has changed, and the same jobs run again one model at a time (``passes``).

Models that ran together tend to send their next tiny requests at the same time again: ``wait_s`` says how long to wait
for them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from tx.models.loading import LoadedModel
from tx.types import Finished
from tx.worker.adapters import AdapterStore, resize
from tx.worker.packing import MicroBatch, Piece
from tx.worker.passes import Job, Pass, Passes, with_scalings
from tx.worker.shapes import Shape, padded_length, power_of_two
from tx.worker.throughput import flops_per_token

log = logging.getLogger(__name__)

MOST_TOKENS = 64
"""Up to so many tokens, a model's waiting jobs may run beside those of other models."""

MOST_MODELS = 16

GATHER_SHARE = 0.5
"""Of the time that the last micro-batch of several models took: so long the next one may wait for those models."""


class Together:
    """Chooses who runs together, runs them, and remembers them; ``clock`` counts seconds."""

    def __init__(self, model: LoadedModel, store: AdapterStore, passes: Passes, clock: Callable[[], float]) -> None:
        self._model, self._store, self._passes = model, store, passes
        self._clock = clock
        self._can = model.mesh.size == 1 and not model.config.num_experts
        self._companions: frozenset[str] = frozenset()  # of the last micro-batch of several models
        self._took_s = 0.0  # that micro-batch
        self._arrived_at: float | None = None  # the first request since the last slice

    # ---- who --------------------------------------------------------------------------------------------------

    def choose(self, turns: Iterable[str], jobs_of: Callable[[str], Iterable[Job]]) -> list[str]:
        """The models, the next in turn first, whose waiting jobs can run together; none if the first one's can't.

        Args:
            turns: models with work, the next one first.
            jobs_of: a model's waiting jobs that may share a pass.
        """
        chosen: list[str] = []
        like = None
        for model_id in turns:
            kind = self._kind(model_id, jobs_of(model_id)) if self._can else None
            if not chosen:
                like = kind
            if like is None:
                return []
            if kind == like:
                chosen.append(model_id)
            if len(chosen) == self._most_models:
                break
        return chosen

    @property
    def _most_models(self) -> int:
        return min(MOST_MODELS, self._store.max_resident)

    def _kind(self, model_id: str, jobs: Iterable[Job]) -> tuple[bool | tuple[str, ...] | None, ...] | None:
        """What models that run together have in common: pass and trained sites; None if this one is not tiny.

        Looks at no more jobs than are tiny, however many wait.
        """
        if model_id in self._passes:
            return None
        limits, lora = self._passes.limits, self._store.lora(model_id)
        num_tokens = num_datums = 0
        forward_only = False
        for job in jobs:
            num_datums += len(job.pieces)
            num_tokens += sum(piece.length for piece in job.pieces)
            forward_only = job.request.forward_only
            if job.alone or num_tokens > MOST_TOKENS or (limits.datums and num_datums > limits.datums):
                return None
            if not limits.packed and num_datums > 1:  # a row's datums would see each other
                return None
            if any(piece.num_targets != 1 for piece in job.pieces):
                return None
        return (forward_only, lora.train_attn, lora.train_mlp, lora.train_unembed, lora.sites) if num_datums else None

    # ---- when -------------------------------------------------------------------------------------------------

    def arrived(self) -> None:
        """A request was submitted."""
        if self._arrived_at is None:
            self._arrived_at = self._clock()

    def wait_s(self, turns: Collection[str], chosen: Callable[[], Sequence[str]]) -> float:
        """Seconds for which the next micro-batch is worth putting off, for models that ran together the last time.

        Who is not back in a part of the time that it took is not waited for the next time. ``chosen`` is asked only
        where somebody is missing.
        """
        if self._arrived_at is None or self._companions <= set(turns):
            return 0.0
        if not 0 < len(chosen()) < self._most_models:
            return 0.0
        return max(0.0, self._arrived_at + GATHER_SHARE * self._took_s - self._clock())

    def started(self, chosen: Sequence[str]) -> None:
        """A micro-batch begins now; if it could have been one of several models but there is one, nobody came back."""
        self._arrived_at = None
        if len(chosen) == 1:
            self._companions = frozenset()

    def forget(self, model_id: str) -> None:
        """Don't wait for this model."""
        self._companions -= {model_id}

    # ---- how --------------------------------------------------------------------------------------------------

    def run(self, jobs: Mapping[str, list[Job]]) -> list[Finished] | None:
        """One micro-batch of all jobs, by model; None if it failed, and then each of them is to run alone."""
        began = self._clock()
        try:
            passes = self._run(jobs)
        except Exception as error:
            log.debug("%d models run one by one after: %s", len(jobs), error)
            for job in (job for group in jobs.values() for job in group):
                job.alone = True
            return None
        self._companions, self._took_s = frozenset(passes), self._clock() - began
        return [finished for model_id, done in passes.items() for finished in self._passes.finish(model_id, done)]

    def _run(self, jobs: Mapping[str, list[Job]]) -> dict[str, Pass]:
        states = [self._store.state(model_id) for model_id in jobs]
        ranks = [self._store.ranks(model_id) for model_id in jobs]
        widest = max(each.padded[0] for each in ranks)
        rows = tuple(tuple(piece for job in group for piece in job.pieces) for group in jobs.values())
        missing = power_of_two(len(rows)) - len(rows)
        shape = Shape(len(rows) + missing, padded_length(max(map(_length, rows)), self._passes.limits), 1)
        weights = [resize(state.weights, widest) for state in states]
        trained = with_scalings(weights + weights[-1:] * missing, ranks + ranks[-1:] * missing, widest)
        forward_only = next(iter(jobs.values()))[0].request.forward_only
        everyone = {job.job_id: job for group in jobs.values() for job in group}
        began = self._clock()
        gradients = self._passes.compute(MicroBatch(rows, shape), everyone, trained, None, forward_only)
        share = (self._clock() - began) / len(rows)
        passes = {}
        for index, (model_id, group) in enumerate(jobs.items()):
            done = Pass({job.job_id: job for job in group}, deque(), forward_only)
            if gradients:
                done.accumulator = resize(gradients[index], ranks[index].padded[0])
            cost = flops_per_token(self._model, ranks[index], forward_only=forward_only)
            done.cost.add(_length(rows[index]), shape.num_tokens // len(rows), share, cost)
            passes[model_id] = done
        return passes


def _length(row: tuple[Piece, ...]) -> int:
    return sum(piece.length for piece in row)
