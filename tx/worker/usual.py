"""The usual programs, as the steps that compile them: all before the first client (``--warmup``), or the likely ones
while there is nothing to do (``ahead``).

Usual is: adapters of the usual ranks that train everything, data of one target per position up to the token budget;
from the base model and from one such adapter, prompts of up to 256 tokens and up to 16 sequences of up to 256 tokens
each. What is rarer still compiles when it comes: longer data and prompts, more sequences at once, prompts that are
scored, sequences of several adapters at once, tiny requests of several models together.

A step is a program or a few, so that whoever runs them can say how far they are and stop in between.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

from tx.models.loading import LoadedModel
from tx.types import LoraConfig
from tx.worker.adapters import AdapterStore
from tx.worker.ahead import Call, Step
from tx.worker.generator import Generator
from tx.worker.prefill import PromptSize
from tx.worker.shapes import Shape, padded_rank
from tx.worker.snapshots import Snapshot, SnapshotStore
from tx.worker.throughput import matmul_peak
from tx.worker.trainer import Trainer

DEFAULT_RANK = 32
"""What the SDK asks for, unless it is told otherwise."""

_RANKS = (8, DEFAULT_RANK)
"""Ranks that most recipes ask for."""

_LIKELY_LENGTH, _LIKELY_PROMPT = 512, 128
"""Positions of training rows, and of prompts, that are likely to come first."""


def usual_ranks(max_rank: int) -> list[int]:
    """Ascending, one for each padded size: 8, 32 and the highest one. Example: 24 gives 8 and 24."""
    by_size = {padded_rank(rank): rank for rank in (*_RANKS, max_rank) if rank <= max_rank}
    return sorted(by_size.values())


class Usual:
    """The steps of one worker; see the module's docstring."""

    def __init__(
        self,
        model: LoadedModel,
        trainer: Trainer,
        adapters: AdapterStore,
        snapshots: SnapshotStore,
        generator: Generator,
        max_rank: int,
    ) -> None:
        self._model, self._trainer, self._adapters = model, trainer, adapters
        self._snapshots, self._generator = snapshots, generator
        self._loras = [LoraConfig(rank, seed=0) for rank in usual_ranks(max_rank)]
        self._frozen: dict[Hashable, Snapshot] = {}

    def all(self) -> list[Step]:
        """Every usual program."""
        shapes = self._trainer.usual_shapes
        steps = [self._peak(), *(self._pass(None, shape, True) for shape in shapes)]
        for lora in self._loras:
            steps.append(self._optimizer(lora))
            steps += [self._pass(lora, shape, only) for shape in shapes for only in (True, False)]
        for each in (None, *self._loras):
            steps += self._sampling(each, self._generator.usual_rows)
        return list({step.key: step for step in steps}.values())

    def first(self) -> list[Step]:
        """What a client is likely to ask for: models of the SDK's default rank, the base model, other ranks.

        Of those only training: decode programs take 80 MB each for SmolLM2 on a CPU.
        """
        default, *others = sorted(self._loras, key=lambda lora: abs(lora.rank - DEFAULT_RANK))
        steps = [self._peak(), *self.likely(default), *self._sampling(None, self._generator.likely_rows)]
        return steps + [step for lora in others for step in self._training(lora)]

    def likely(self, lora: LoraConfig) -> list[Step]:
        """What is likely to be asked of a model like this, the likeliest first."""
        first, optimizer, *others = self._training(lora)
        return [first, optimizer, *self._sampling(lora, self._generator.likely_rows), *others]

    # ---- one step -------------------------------------------------------------------------------------------------

    def _peak(self) -> Step:
        # Of it, the metrics of the first step say a fraction.
        return Step("peak", "the peak of products", lambda _: matmul_peak(self._model.dtype))

    def _pass(self, lora: LoraConfig | None, shape: Shape, forward_only: bool) -> Step:
        what = "forward" if forward_only else "forward and backward"
        run = partial(self._trainer.rehearse, lora, shape, forward_only)
        key = ("pass", self._kind(lora), shape, forward_only)
        return Step(key, f"{what}, {shape.rows} x {shape.length}, {_name(lora)}", run)

    def _optimizer(self, lora: LoraConfig) -> Step:
        run = partial(self._trainer.rehearse_step, lora)
        return Step(("optimizer", self._kind(lora)), f"optimizer step, {_name(lora)}", run)

    def _training(self, lora: LoraConfig) -> list[Step]:
        """Of each length of rows only the most rows, for fewer are over sooner."""
        shapes = sorted(self._trainer.usual_shapes, key=lambda shape: shape.rows)
        fullest = {shape.length: shape for shape in shapes}.values()
        nearest, *others = sorted(fullest, key=lambda shape: abs(math.log(shape.length / _LIKELY_LENGTH)))
        return [self._pass(lora, nearest, False), self._optimizer(lora), *(self._pass(lora, x, False) for x in others)]

    def _sampling(self, lora: LoraConfig | None, sizes: Sequence[int]) -> Iterator[Step]:
        kind, name, generator = self._kind(lora), _name(lora), self._generator
        if lora is not None:
            yield Step(("snapshot", kind), f"snapshot, {name}", partial(self._snapshot, lora))
        yield Step("copies", "moving keys and values", generator.rehearse_copies)

        def decode(rows: int, call: Call) -> None:
            generator.rehearse_decoding(rows, self._snapshot(lora, call), call)

        def prefill(size: PromptSize, call: Call) -> None:
            generator.rehearse_prompts(size, self._snapshot(lora, call), call)

        for rows in sizes:
            yield Step(("decoding", kind, rows), f"decoding, {rows} at once, {name}", partial(decode, rows))
        distance = lambda size: (size.rows > 1, size.earlier > 0, abs(math.log(size.length / _LIKELY_PROMPT)))
        for size in sorted(generator.usual_prompts, key=distance):
            behind = f" behind {size.earlier} blocks" if size.earlier else ""
            what = f"prompts, {size.rows} x {size.length}{behind}, {name}"
            yield Step(("prompts", kind, size), what, partial(prefill, size))

    def _snapshot(self, lora: LoraConfig | None, call: Call) -> Snapshot | None:
        """What a snapshot of such a model looks like, None of the base model; compiled for once."""
        if lora is None:
            return None
        kind = self._kind(lora)
        if kind not in self._frozen:
            self._frozen[kind] = self._snapshots.rehearse(self._adapters.outline(lora), lora, call)
        return self._frozen[kind]

    def _kind(self, lora: LoraConfig | None) -> Hashable:
        """What programs depend on."""
        if lora is None:
            return None
        padded = self._adapters.ranks_of(lora).padded
        return padded, lora.train_attn, lora.train_mlp, lora.train_unembed, lora.sites


def _name(lora: LoraConfig | None) -> str:
    return "the base model" if lora is None else f"rank {lora.rank}"
