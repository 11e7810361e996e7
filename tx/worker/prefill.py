"""Prompts to keys and values: each distinct prompt once, in bounded pieces, with its scores when a request wants them.

All of a prompt but its last token is prefilled; the decode loop reads that one and draws the first new token with
everyone else's next. Prompts up to ``piece`` tokens run whole, several of one padded length and one snapshot together
while that saves time; a longer one runs a piece at a time against a cache of its own, so that decoding and training
get their turn in between. Recent prompts are kept, within a budget of tokens: rows of one group, and requests that
repeat a prompt (one per member of an RL group, typically), share them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tx.layers import kv_cache
from tx.layers.kv_cache import KVCache
from tx.layers.lora import AdapterView, single_view
from tx.models.loading import LoadedModel
from tx.worker import programs
from tx.worker.decode_slots import bucket_cache_length, bucket_prefill_length
from tx.worker.groups import Group
from tx.worker.snapshots import Snapshot

PromptKey = tuple[Snapshot | None, bytes]

_MIN_TOPK = 8
"""Top-k scoring is compiled for powers of two from here."""


@dataclass(frozen=True)
class PrefillSizes:
    """What bounds one program.

    Attributes:
        piece: longest piece of a prompt that runs in one program.
        together: padded tokens up to which several prompts are prefilled together. Below it the weights' bandwidth
            is the limit and rows are almost free.
        remembered: padded tokens of recent prompts that are kept.
    """

    piece: int
    together: int
    remembered: int

    @staticmethod
    def of_platform(platform: str) -> PrefillSizes:
        """CPUs saturate at a hundred or two tokens, accelerators at a few thousand."""
        return PrefillSizes(512, 256, 8192) if platform == "cpu" else PrefillSizes(2048, 4096, 32768)


class Prefill:
    """Runs prompts and remembers them."""

    def __init__(self, model: LoadedModel, max_context: int, sizes: PrefillSizes) -> None:
        self.sizes = sizes
        self._model = model
        self._max_context = max_context
        self._recent: OrderedDict[PromptKey, KVCache] = OrderedDict()
        # The long prompt that is part way: its group, its cache and how many tokens it holds.
        self._long: tuple[Group, KVCache, int] | None = None

    def ready(self, group: Group) -> bool:
        """Whether the group's rows can be seated now; otherwise ``advance`` it."""
        if len(group.prompt) == 1:
            return True
        return _key(group) in self._recent and (not group.wants_scores or group.scored == len(group.prompt) - 1)

    def in_progress(self, group: Group) -> bool:
        """Whether the group's prompt is part way."""
        return self._long is not None and self._long[0] is group

    def cache_of(self, group: Group) -> KVCache | None:
        """A ready group's prompt as one row of keys and values; None if it has but one token and needs none."""
        if len(group.prompt) == 1:
            return None
        self._recent.move_to_end(_key(group))
        return self._recent[_key(group)]

    def forget(self) -> None:
        """Give the device memory back; prompts in progress start again."""
        self._recent.clear()
        self._long = None

    def mates(self, group: Group, others: Sequence[Group]) -> list[Group]:
        """The group and those of ``others`` whose distinct prompts share its program; all run together or it alone.

        A program exists for one row and for a full batch of rows only, so a batch less than half full isn't worth it.
        """
        padded = self._padded(group)
        most = self.sizes.together // padded
        if most < 2 or group.wants_scores or len(group.prompt) - 1 > self.sizes.piece:
            return [group]
        chosen = {_key(group): group}
        for other in others:
            if len(chosen) == most:
                break
            fits = other.snapshot is group.snapshot and not other.wants_scores and self._padded(other) == padded
            if fits and not self.ready(other):
                chosen.setdefault(_key(other), other)
        return list(chosen.values()) if 2 * len(chosen) > most else [group]

    def advance(self, groups: Sequence[Group]) -> int:
        """Run one program for what ``mates`` chose; how many padded tokens it computed."""
        head = groups[0]
        if len(head.prompt) - 1 > self.sizes.piece:
            return self._advance_long(head)
        padded = self._padded(head)
        rows = 1 if len(groups) == 1 else self.sizes.together // padded
        tokens = np.zeros((rows, padded), np.int32)
        for row, group in enumerate(groups):
            tokens[row, : len(group.prompt) - 1] = group.prompt[:-1]
        cache = self._run(head, tokens, 0, None)
        for row, group in enumerate(groups):
            self._remember(group, cache if rows == 1 else programs.row_of(cache, jnp.int32(row)))
        return rows * padded

    def _advance_long(self, group: Group) -> int:
        """The next piece of a prompt, in a cache as long as its decoding will need anyway."""
        if self._long is None or self._long[0] is not group:
            length = bucket_cache_length(len(group.prompt), self._max_context)
            config, dtype, mesh = self._model.config, self._model.dtype, self._model.mesh
            self._long = (group, kv_cache.empty(config, 1, length, dtype, mesh), 0)
            group.scored = 0
        _, cache, start = self._long
        self._long = None  # the program takes the cache; if it fails, the prompt starts again
        size = self.sizes.piece
        tokens = np.zeros((1, size), np.int32)
        part = group.prompt[start : min(start + size, len(group.prompt) - 1)]
        tokens[0, : len(part)] = part
        cache = self._run(group, tokens, start, cache)
        if start + len(part) == len(group.prompt) - 1:
            self._remember(group, cache)
        else:
            self._long = (group, cache, start + len(part))
        return size

    def _run(self, group: Group, tokens: np.ndarray, start: int, cache: KVCache | None) -> KVCache:
        targets, num_topk = None, group.request.topk_prompt_logprobs
        if group.wants_scores:
            following = group.prompt[start + 1 : start + 1 + tokens.shape[1]]
            targets = np.zeros(tokens.shape, np.int32)
            targets[0, : len(following)] = following
        padded_topk = min(max(_MIN_TOPK, 1 << (num_topk - 1).bit_length()), self._model.config.vocab_size)
        cache, scores = programs.prefill(
            self._model.graphdef,
            self._model.weights,
            jnp.asarray(tokens),
            jnp.int32(start),
            cache,
            self._view(group.snapshot),
            None if targets is None else jnp.asarray(targets),
            num_topk=padded_topk if num_topk else 0,
        )
        if scores is not None:
            scores = jax.device_get(scores)
            place = slice(start + 1, start + 1 + len(following))
            group.prompt_logprobs[place] = scores.logprobs[0, : len(following)]
            if num_topk:
                group.topk_ids[place] = scores.topk_ids[0, : len(following), :num_topk]
                group.topk_logprobs[place] = scores.topk_logprobs[0, : len(following), :num_topk]
            group.scored = start + len(following)
        group.computed = True
        return cache

    def _view(self, snapshot: Snapshot | None) -> AdapterView | None:
        if snapshot is None:
            return None
        rank, expert_rank = max(1, snapshot.rank), max(1, snapshot.expert_rank)
        return single_view(snapshot.adapter, snapshot.scaling, snapshot.expert_scaling, rank, expert_rank)

    def _remember(self, group: Group, prompt: KVCache) -> None:
        group.computed = True
        self._recent[_key(group)] = prompt
        self._recent.move_to_end(_key(group))
        # The newest always stays: its group is about to be seated.
        while len(self._recent) > 1 and sum(kept.length for kept in self._recent.values()) > self.sizes.remembered:
            self._recent.popitem(last=False)

    def _padded(self, group: Group) -> int:
        return bucket_prefill_length(len(group.prompt) - 1, self._max_context)


def _key(group: Group) -> PromptKey:
    return group.snapshot, group.prompt.tobytes()
