"""Prompts to keys and values: each distinct prompt once, in bounded pieces, with its scores when a request wants them.

All of a prompt but its last token is prefilled; the decode loop reads that one and draws the first new token with
everyone else's next. Recent prompts are kept, within a budget: rows of one group and requests that repeat a prompt
share it whole, and a prompt that begins as a recent one did (a few-shot header, the turns of a chat) shares the blocks
that are equal and computes the rest. Blocks are never written to again, so sharing them is holding the same array.

Prompts up to ``piece`` tokens run whole, several of one padded length and one snapshot together while that saves time;
a longer one runs a piece at a time behind what it already has, so that decoding and training get their turn in between.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from tx.layers import kv_cache
from tx.layers.kv_cache import BLOCK, KVBlocks
from tx.layers.lora import AdapterView, single_view
from tx.models.loading import LoadedModel
from tx.worker import programs
from tx.worker.ahead import Call, directly
from tx.worker.decode_slots import bucket_prefill_length
from tx.worker.groups import Group
from tx.worker.shapes import power_of_two
from tx.worker.snapshots import Snapshot

PromptKey = tuple[Snapshot | None, bytes]
BlockOf = tuple[KVBlocks, int]
"""A block and where it is: its number in an array that other prompts may share."""


SCORED_TOGETHER = 64
"""Positions of a prompt that are scored in one program; a piece of a prompt is a multiple of it."""


@dataclass(frozen=True)
class PrefillSizes:
    """What bounds one program.

    Attributes:
        piece: longest piece of a prompt that runs in one program, whole blocks.
        together: padded tokens up to which several prompts are prefilled together. Below it the weights' bandwidth
            is the limit and rows are almost free.
    """

    piece: int
    together: int

    @staticmethod
    def of_platform(platform: str) -> PrefillSizes:
        """CPUs saturate at a hundred or two tokens, accelerators at a few thousand."""
        return PrefillSizes(512, 256) if platform == "cpu" else PrefillSizes(2048, 4096)


@dataclass(frozen=True, order=True)
class PromptSize:
    """Of a prefill program: ``rows`` of ``length`` positions; behind a pool of ``earlier`` blocks, or 0 for none."""

    rows: int
    length: int
    earlier: int = 0


@dataclass
class _Prompt:
    """The first tokens of a prompt and their blocks; ``earlier`` is a pool of its own while it is part way."""

    tokens: np.ndarray
    blocks: list[BlockOf] = field(default_factory=list)
    earlier: KVBlocks | None = None


class Prefill:
    """Runs prompts and remembers them.

    Args:
        remembered_blocks: blocks of recent prompts that are kept.
        call: how programs are run (``ahead``).
    """

    def __init__(
        self, model: LoadedModel, max_context: int, sizes: PrefillSizes, remembered_blocks: int, call: Call = directly
    ) -> None:
        self.sizes = sizes
        self._model = model
        self._programs = programs.PrefillPrograms(model)
        self._call = call
        self._max_context = max_context
        self._remembered_blocks = remembered_blocks
        self._recent: OrderedDict[PromptKey, _Prompt] = OrderedDict()
        self._under_way: tuple[Group, _Prompt] | None = None

    def ready(self, group: Group) -> bool:
        """Whether the group's rows can be seated now; otherwise ``advance`` it."""
        if group.scoring is not None and not group.scoring.done:
            return False
        return len(group.prompt) == 1 or _key(group) in self._recent

    def in_progress(self, group: Group) -> bool:
        """Whether the group's prompt is part way."""
        return self._under_way is not None and self._under_way[0] is group

    def blocks_of(self, group: Group) -> list[BlockOf]:
        """A ready group's blocks, all its prompt but the last token; none if it has but one."""
        if len(group.prompt) == 1:
            return []
        self._recent.move_to_end(_key(group))
        return self._recent[_key(group)].blocks

    def note_hit(self, group: Group) -> None:
        """Count a ready group's prompt as found, unless it was computed for this very group."""
        if group.cached_tokens is None:
            group.cached_tokens = len(group.prompt) - 1

    def abandon(self, group: Group) -> None:
        """Drop a group's prompt if it is part way."""
        if self.in_progress(group):
            self._under_way = None

    def forget(self) -> None:
        """Give the device memory back; prompts in progress start again."""
        self._recent.clear()
        self._under_way = None

    def mates(self, group: Group, others: Sequence[Group]) -> list[Group]:
        """The group and those of ``others`` whose distinct prompts share its program; all run together or it alone.

        A program exists for one row and for a full batch of rows only, so a batch less than half full isn't worth it,
        and one that can't be remembered until its groups are seated would run for its head alone. Prompts that begin
        alike are better run one after the other.
        """
        padded = self._padded(len(group.prompt) - 1)
        most = self._rows_together(padded)
        if most < 2 or not self._runs_whole(group):
            return [group]
        chosen = {_key(group): group}
        for other in others:
            if len(chosen) == most:
                break
            fits = other.snapshot is group.snapshot and self._padded(len(other.prompt) - 1) == padded
            if fits and not self.ready(other) and self._runs_whole(other):
                if any(_common(other.prompt, one.prompt) >= BLOCK for one in chosen.values()):
                    continue
                chosen[_key(other)] = other
        return list(chosen.values()) if 2 * len(chosen) > most else [group]

    def _rows_together(self, padded: int) -> int:
        """Prompts of this padded length that run, and can be remembered, together."""
        rows = max(1, self.sizes.together // padded)
        return rows if rows * kv_cache.num_blocks(padded) <= self._remembered_blocks else 1

    def _runs_whole(self, group: Group) -> bool:
        """One fresh program does it: short, nothing to share, nothing to score."""
        if group.scoring is not None or not 1 < len(group.prompt) <= self.sizes.piece + 1:
            return False
        return not self.in_progress(group) and not self._shared(group).blocks

    def advance(self, groups: Sequence[Group]) -> int:
        """Run one program for what ``mates`` chose; how many padded tokens it computed."""
        head = groups[0]
        if len(groups) == 1:
            return self._advance_one(head)
        padded = self._padded(len(head.prompt) - 1)
        rows = self.sizes.together // padded
        tokens = np.zeros((rows, padded), np.int32)
        for row, group in enumerate(groups):
            tokens[row, : len(group.prompt) - 1] = group.prompt[:-1]
        blocks = self._run(head, tokens, 0, None)
        per_row = kv_cache.num_blocks(padded)
        for row, group in enumerate(groups):
            group.cached_tokens = 0
            held = kv_cache.num_blocks(len(group.prompt) - 1)
            self._remember(group, _Prompt(group.prompt[:-1], [(blocks, row * per_row + i) for i in range(held)]))
        return rows * padded

    def _advance_one(self, group: Group) -> int:
        """The next piece of a prompt, behind what it shares or already has."""
        if self._under_way is None or self._under_way[0] is not group:
            prompt = self._shared(group)
            group.cached_tokens = len(prompt.tokens)
            self._under_way = (group, prompt)
        _, prompt = self._under_way
        start, end = len(prompt.tokens), len(group.prompt) - 1
        size = self.sizes.piece if end - start >= self.sizes.piece else self._padded(end - start)
        part = group.prompt[start : min(start + size, end)]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(part)] = part
        self._under_way = None  # if the program fails, the prompt starts again
        prompt.earlier = self._gathered(prompt, end)
        blocks = self._run(group, tokens, start, prompt.earlier)
        added = range(kv_cache.num_blocks(len(part)))
        prompt = _Prompt(
            group.prompt[: start + len(part)], [*prompt.blocks, *((blocks, i) for i in added)], prompt.earlier
        )
        if len(prompt.tokens) == end:
            prompt.earlier = None
            self._remember(group, prompt)
        else:
            self._under_way = (group, prompt)
        return size

    def _shared(self, group: Group) -> _Prompt:
        """The whole blocks that the group's prompt has in common with a recent one of the same weights.

        Positions whose successors are to be scored are computed, whatever is remembered.
        """
        most = len(group.prompt) - 1 if group.scoring is None else group.scoring.first
        best = _Prompt(group.prompt[:0])
        for (snapshot, _), prompt in self._recent.items():
            if snapshot is group.snapshot and min(most, len(prompt.tokens)) - len(best.tokens) >= BLOCK:
                blocks = min(most, _common(prompt.tokens, group.prompt)) // BLOCK
                if blocks * BLOCK > len(best.tokens):
                    best = _Prompt(group.prompt[: blocks * BLOCK], prompt.blocks[:blocks])
        return best

    def _gathered(self, prompt: _Prompt, end: int) -> KVBlocks | None:
        """The blocks so far in one pool with room for ``end`` tokens; None if there are none."""
        if not prompt.blocks:
            return None
        pool, fresh = prompt.earlier, prompt.blocks
        if pool is None:
            pool = kv_cache.empty(self._model.config, _earlier_blocks(end), self._model.dtype, self._model.mesh)
            targets = list(range(len(fresh)))
        else:  # only the last piece's are missing
            fresh = [block for block in fresh if block[0] is prompt.blocks[-1][0]]
            targets = list(range(len(prompt.blocks) - len(fresh), len(prompt.blocks)))
        return copy_to(pool, fresh, targets, call=self._call)

    def _run(self, group: Group, tokens: np.ndarray, start: int, earlier: KVBlocks | None) -> KVBlocks:
        scored = group.scoring is not None
        blocks, hidden = self.compute(group.snapshot, tokens, start, earlier, scored, self._call)
        if hidden is not None:
            self._score(group, hidden, start, min(tokens.shape[1], len(group.prompt) - 1 - start))
        return blocks

    def compute(
        self,
        snapshot: Snapshot | None,
        tokens: np.ndarray,
        start: int,
        earlier: KVBlocks | None,
        keep_hidden: bool,
        call: Call,
    ) -> tuple[KVBlocks, jax.Array | None]:
        """The prefill program on int32 [row, seq] tokens; remembers nothing."""
        view, start_at = self._view(snapshot), jnp.int32(start)
        return self._programs.run(jnp.asarray(tokens), earlier, start_at, view, keep_hidden=keep_hidden, call=call)

    def sizes_up_to(self, num_tokens: int) -> list[PromptSize]:
        """Of every program for prompts of up to so many tokens, no longer than a piece."""
        longest = min(num_tokens - 1, self.sizes.piece)
        lengths = sorted({self._padded(length) for length in range(1, longest + 1)})
        together = [PromptSize(self._rows_together(length), length) for length in lengths]
        behind = {
            PromptSize(1, self._padded(end - shared), _earlier_blocks(end))
            for shared in range(BLOCK, longest, BLOCK)
            for end in range(shared + 1, longest + 1)
        }
        alone = [PromptSize(1, length) for length in lengths]
        return [*alone, *(size for size in together if size.rows > 1), *sorted(behind)]

    def _score(self, group: Group, hidden: jax.Array, start: int, count: int) -> None:
        """Score ``count`` hidden states, which stand at ``start``, in pieces of one size whatever there are."""
        scoring = group.scoring
        assert scoring is not None
        # One length of hidden states, so that the program is one for all lengths of prompts.
        hidden = jnp.pad(hidden, ((0, 0), (0, self.sizes.piece - hidden.shape[1]), (0, 0)))
        for at in range(0, count, SCORED_TOGETHER):
            if start + at + SCORED_TOGETHER <= scoring.first:
                continue
            scores = programs.score_piece(
                self._model.graphdef,
                self._model.weights,
                hidden,
                jnp.int32(at),
                self._view(group.snapshot),
                jnp.asarray(scoring.targets(start + at, SCORED_TOGETHER)),
                scoring.draws(start + at),
                num_topk=min(scoring.num_topk, self._model.config.vocab_size),
            )
            scoring.take(start + at, jax.device_get(scores))

    def _view(self, snapshot: Snapshot | None) -> AdapterView | None:
        if snapshot is None:
            return None
        rank, expert_rank = max(1, snapshot.rank), max(1, snapshot.expert_rank)
        return single_view(snapshot.adapter, snapshot.scaling, snapshot.expert_scaling, rank, expert_rank)

    def _remember(self, group: Group, prompt: _Prompt) -> None:
        self._recent[_key(group)] = prompt
        self._recent.move_to_end(_key(group))
        # The newest always stays: its group is about to be seated.
        while len(self._recent) > 1 and self._num_blocks() > self._remembered_blocks:
            self._recent.popitem(last=False)

    def _num_blocks(self) -> int:
        arrays = {id(pool): pool.num_blocks for prompt in self._recent.values() for pool, _ in prompt.blocks}
        return sum(arrays.values())

    def _padded(self, length: int) -> int:
        return bucket_prefill_length(length, self._max_context)


def copy_to(pool: KVBlocks, blocks: Sequence[BlockOf], targets: Sequence[int], *, call: Call = directly) -> KVBlocks:
    """``pool`` (donated) with ``blocks[i]`` at ``targets[i]``: one program per array that the blocks are in."""
    by_array: dict[int, tuple[KVBlocks, list[int], list[int]]] = {}
    for (array, number), target in zip(blocks, targets, strict=True):
        _, sources, at = by_array.setdefault(id(array), (array, [], []))
        sources.append(number)
        at.append(target)
    for array, sources, at in by_array.values():
        padding = [0] * (max(_COPIES, power_of_two(len(at))) - len(at))
        which, where = (jnp.asarray([*x, *padding], jnp.int32) for x in (sources, at))
        pool = programs.copy_blocks(pool, array, which, where, jnp.int32(len(at)), call=call)
    return pool


_COPIES = 64
"""Lists of blocks to copy are filled up to this length or the next power of two, so that programs are few."""


def _earlier_blocks(end: int) -> int:
    """Blocks of the pool that a piece continues, of a prompt of ``end`` tokens."""
    return power_of_two(kv_cache.num_blocks(end))


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning of two prompts."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _key(group: Group) -> PromptKey:
    return group.snapshot, group.prompt[:-1].tobytes()
