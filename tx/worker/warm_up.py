"""Warm-up: every usual program run once, so that the first clients don't wait for the compiler.

Usual is: adapters of the usual ranks that train everything, data of one target per position up to the token budget;
from the base model and from one such adapter, prompts of up to 256 tokens and up to 16 sequences of up to 256 tokens
each. What is rarer still compiles when it comes: longer data and prompts, more sequences at once, prompts that are
scored or that begin like another, sequences of several adapters at once, tiny requests of several models together.

It is a list of steps, a program or a few each, so that the caller can say how far it is and stop in between. Nothing is
left behind but compiled programs, here and in JAX's cache on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from tx.types import AdamParams, Datum, ForwardBackward, LoraConfig
from tx.worker.adapters import AdapterStore
from tx.worker.generator import Generator
from tx.worker.shapes import Shape, padded_rank
from tx.worker.snapshots import Snapshot, SnapshotStore
from tx.worker.trainer import Trainer

DEFAULT_RANK = 32
"""What the SDK asks for, unless it is told otherwise."""

_RANKS = (8, DEFAULT_RANK)
"""Ranks that most recipes ask for."""

_MODEL = "warm-up"


@dataclass(frozen=True)
class Step:
    """``run`` compiles what ``name`` says; it raises what the device raises."""

    name: str
    run: Callable[[], None]


def usual_ranks(max_rank: int) -> list[int]:
    """Ascending, one for each padded size: 8, 32 and the highest one. Example: 24 gives 8 and 24."""
    by_size = {padded_rank(rank): rank for rank in (*_RANKS, max_rank) if rank <= max_rank}
    return sorted(by_size.values())


class WarmUp:
    """The steps of one worker; see the module's docstring."""

    def __init__(
        self, trainer: Trainer, adapters: AdapterStore, snapshots: SnapshotStore, generator: Generator
    ) -> None:
        self._trainer, self._adapters = trainer, adapters
        self._snapshots, self._generator = snapshots, generator

    def steps(self, ranks: list[int]) -> list[Step]:
        """All of them for adapters of these ranks, in the order in which they must run."""
        found: list[Step] = []
        for rank in ranks:
            found += self._training(rank, of_base=rank == ranks[0])
        found.append(Step("moving keys and values", self._generator.rehearse_copies))
        for snapshot_rank in (None, *ranks):
            found += self._sampling(snapshot_rank)
        found.append(Step("tidying up", partial(self._tidy, ranks)))
        return found

    # ---- training ---------------------------------------------------------------------------------------------

    def _training(self, rank: int, *, of_base: bool) -> Iterator[Step]:
        yield Step(f"a model of rank {rank}", partial(self._adapters.create, _MODEL, LoraConfig(rank, 0)))
        shapes = self._trainer.usual_shapes
        for shape in shapes if of_base else ():  # a model that has never stepped is computed as the base model
            yield Step(f"forward of the base model, {_size(shape)}", partial(self._rehearse, shape, True))
        yield Step(f"optimizer step, rank {rank}", self._step)
        for shape in shapes:
            yield Step(f"forward, {_size(shape)}, rank {rank}", partial(self._rehearse, shape, True))
            yield Step(f"forward and backward, {_size(shape)}, rank {rank}", partial(self._rehearse, shape, False))
        yield Step(f"snapshot, rank {rank}", partial(self._snapshot, rank))

    def _rehearse(self, shape: Shape, forward_only: bool) -> None:
        tokens = np.zeros(shape.length, np.int32)
        inputs = {"target_tokens": tokens, "weights": np.ones(shape.length, np.float32)}
        data = (Datum(tokens, inputs),) * shape.rows
        self._trainer.submit(0, ForwardBackward(_MODEL, 0, data, "cross_entropy", {}, forward_only))
        while self._trainer.has_work:
            for finished in self._trainer.slice():
                if finished.error is not None:
                    raise finished.error

    def _step(self) -> None:
        self._trainer.optim_step(_MODEL, AdamParams(learning_rate=0.0))

    def _snapshot(self, rank: int) -> None:
        self._step()  # with gradients
        self._snapshots.take(_snapshot_id(rank), self._adapters.state(_MODEL).weights, self._adapters.lora(_MODEL))
        self._adapters.drop(_MODEL)

    # ---- sampling ---------------------------------------------------------------------------------------------

    def _sampling(self, rank: int | None) -> Iterator[Step]:
        of = "the base model" if rank is None else f"rank {rank}"
        for rows, length in self._generator.usual_prompts:
            yield Step(f"prompts, {rows} x {length}, {of}", partial(self._prefill, rank, rows, length))
        for rows in self._generator.usual_rows:
            yield Step(f"decoding, {rows} at once, {of}", partial(self._decode, rank, rows))

    def _prefill(self, rank: int | None, rows: int, length: int) -> None:
        self._generator.rehearse_prompts(rows, length, self._snapshot_of(rank))

    def _decode(self, rank: int | None, rows: int) -> None:
        self._generator.rehearse_decoding(rows, self._snapshot_of(rank))

    def _snapshot_of(self, rank: int | None) -> Snapshot | None:
        return None if rank is None else self._snapshots.get(_snapshot_id(rank))

    def _tidy(self, ranks: list[int]) -> None:
        self._generator.forget()
        self._adapters.drop(_MODEL)  # there only if one of its steps failed
        for rank in ranks:
            self._snapshots.drop(_snapshot_id(rank))


def _snapshot_id(rank: int) -> str:
    return f"{_MODEL} at rank {rank}"


def _size(shape: Shape) -> str:
    return f"{shape.rows} x {shape.length}"
