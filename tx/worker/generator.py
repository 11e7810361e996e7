"""The sampler: continuous batching over a pool of KV blocks, a bounded piece of device work per call of ``slice``.

The life of a request:

1. ``submit`` checks it and lets its group of ``num_samples`` rows wait; owners (snapshots) take turns.
2. When slots and blocks are free, a slice prefills the prompt of the group whose turn it is (``prefill``), once for all
   its rows, or finds it, or its beginning, among the recent ones.
3. Its rows are seated: the prompt's blocks are copied into blocks of their own.
4. A decode slice draws a few tokens for every seated row, whatever their snapshots and parameters, in one device loop,
   and the host hears of them once.
5. The host ends rows (``stopping``) and frees their blocks; a group whose rows have all ended is reported at once.

Sampled tokens are a function of weights, prompt, parameters and seed. Neighbours, slots, slices, shared prefixes and
sizes of pool enter only through float32 rounding of the logits (about 1e-6), which moves a draw only if its random
number lies within that of a boundary between two tokens.

The pool grows with the tokens that are live, up to ``kv_blocks``, and shrinks with them. When it is full, the row
seated last goes back to waiting and starts again later; its seed gives the same tokens. So do all rows after a failing
device call, out of memory above all, with half as many seats; only a row that fails alone fails its request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tx.errors import InvalidInput
from tx.layers import kv_cache
from tx.layers.kv_cache import BLOCK, KVBlocks
from tx.layers.lora import AdapterView
from tx.models.loading import LoadedModel
from tx.types import Finished, SampleRequest
from tx.worker import programs
from tx.worker.ahead import Call, directly
from tx.worker.block_table import BlockTable
from tx.worker.decode_slots import DecodeSlots, Seat, Size, Sizes, bucket_blocks, bucket_rows
from tx.worker.groups import Group, check
from tx.worker.memory import PROMPT_SHARE
from tx.worker.prefill import Prefill, PrefillSizes, PromptSize, copy_to
from tx.worker.shapes import power_of_two
from tx.worker.snapshots import LiveAdapters, Snapshot
from tx.worker.stopping import Detokenize

log = logging.getLogger(__name__)

_USUAL_ROWS, _USUAL_TOKENS = 16, 256
"""Usual are so many sequences at once, each of so many tokens."""

_MIN_TOPK = 8
"""Decoding with the most likely tokens is compiled for powers of two from here."""


class Generator:
    """Samples for many requests at once from one base model and any number of snapshots.

    Args:
        max_slots: rows that decode at once.
        max_context: positions of the longest row, prompt and sampled tokens together.
        kv_blocks: blocks of keys and values on the device, of rows that decode and of recent prompts; at least enough
            for one row of ``max_context``.
        eos_token_ids: tokens that end a row unless its request says otherwise.
        detokenize: token ids to text, for stop strings.
        slice_tokens: most tokens per row between two looks of the host.
        call: how programs are run (``ahead``).
        slice_s: what a decode slice should take, as far as it is not shorter than one token: whoever arrives meanwhile,
            a prompt or a training micro-batch, waits for its end.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_slots: int,
        max_context: int,
        kv_blocks: int,
        eos_token_ids: Sequence[int],
        detokenize: Detokenize,
        call: Call = directly,
        slice_tokens: int = 8,
        slice_s: float = 0.25,
    ) -> None:
        prompt_blocks = int(kv_blocks * PROMPT_SHARE)
        self._model = model
        self._call = call
        self._max_slots = max_slots
        self._max_context = max_context
        self._max_blocks = max(kv_blocks - prompt_blocks, kv_cache.num_blocks(max_context))
        self._eos = tuple(eos_token_ids)
        self._detokenize = detokenize
        self._slice_tokens = min(slice_tokens, BLOCK)
        self._slice_s = slice_s
        self._groups: dict[int, Group] = {}
        self._slots = DecodeSlots(max_slots)
        self._table = BlockTable()
        self._pool: KVBlocks | None = None
        sizes = PrefillSizes.of_platform(model.mesh.devices.flat[0].platform)
        self._prefill = Prefill(model, max_context, sizes, prompt_blocks, call)
        self._adapters = LiveAdapters()
        self._sizes = Sizes()
        self._size: Size = (1, 0)  # of the next decode slice; its blocks are the pool's
        self._finished: list[Finished] = []
        self._decode_next = False

    # ---- requests -------------------------------------------------------------------------------------------------

    def check(self, request: SampleRequest) -> None:
        """Raise InvalidInput, naming the field, if the request can't be sampled here."""
        check(request, self._model.config.vocab_size, self._max_context)

    def submit(self, job_id: int, request: SampleRequest, snapshot: Snapshot | None) -> None:
        """Check a request and let it wait; ``snapshot`` None is the base model."""
        self.check(request)
        self._groups[job_id] = Group(
            job_id,
            request,
            snapshot,
            max_context=self._max_context,
            eos_token_ids=self._eos,
            detokenize=self._detokenize,
        )
        self._slots.enqueue(job_id, snapshot, range(request.num_samples))

    def cancel(self, job_id: int) -> None:
        """Forget a request and free its seats and blocks; unknown ids are fine."""
        for seat in self._slots.remove(job_id):
            self._table.release(seat)
        group = self._groups.pop(job_id, None)
        if group is not None:
            self._prefill.abandon(group)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or decodes."""
        return bool(self._groups)

    @property
    def num_decoding(self) -> int:
        """Rows that decode."""
        return len(self._slots.seats)

    def slice(self) -> list[Finished]:
        """Prefill waiting prompts if slots are free, else decode a few tokens for every seated row."""
        try:
            admitted = not (self._decode_next and self._slots.seats) and self._admit()
            if not admitted and self._slots.seats:
                self._decode()
            head = self._slots.head()
            # A long prompt takes turns with those that decode; short ones first fill the slots.
            self._decode_next = admitted and head is not None and self._prefill.in_progress(self._groups[head])
        except Exception as error:  # the device's, whatever it is: see the module's docstring
            self._recover(error)
        finished, self._finished = self._finished, []
        return finished

    # ---- prefill and seats ----------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Seat waiting groups, prefilling them within a slice's budget; whether anything was prefilled."""
        budget, spent = max(self._prefill.sizes.piece, self._prefill.sizes.together), 0
        while (job_id := self._slots.head()) is not None:
            group = self._groups[job_id]
            room = self._room_for(group)
            if room == 0:
                break
            if self._prefill.ready(group):
                self._seat(group, room)
            elif spent >= budget:
                break
            else:
                spent += self._run_prefill(group)
        return spent > 0

    def _room_for(self, group: Group) -> int:
        """How many of a group's rows may be seated now. Everyone who sits may first grow by a block."""
        free = self._max_blocks - self._table.num_held - len(self._slots.seats)
        alone = not self._slots.seats  # always fits: a row is no longer than the context
        return min(self._slots.num_free, max(int(alone), free // kv_cache.num_blocks(len(group.prompt))))

    def _run_prefill(self, group: Group) -> int:
        """One prefill program, for the group alone if it fails for several; tokens computed."""
        waiting = [self._groups[job_id] for job_id in self._slots.in_turn()]
        mates = self._prefill.mates(group, waiting)
        try:
            return self._prefill.advance(mates)
        except Exception as error:
            log.warning("prefill of %d prompts failed: %s", len(mates), error)
            self._prefill.forget()
        try:
            return self._prefill.advance([group])
        except Exception as error:
            self._fail(group, error)
            return self._prefill.sizes.piece

    def _seat(self, group: Group, room: int) -> None:
        self._prefill.note_hit(group)
        prompt, per_row = self._prefill.blocks_of(group), kv_cache.num_blocks(len(group.prompt))
        seats = self._slots.seat(group.job_id, room)
        # Room for everyone who waits, so that the pool does not grow once per group.
        others = min(self._slots.num_free, self._slots.num_waiting)
        self._size_pool(len(self._slots.seats) + others, self._table.num_held + (len(seats) + others) * per_row)
        targets: list[int] = []
        for seat in seats:
            self._table.extend(seat, per_row)
            targets += self._table.held(seat)[: len(prompt)]
        assert self._pool is not None
        self._pool = copy_to(self._pool, prompt * len(seats), targets, call=self._call)

    def _size_pool(self, rows: int, blocks: int, steps: int = 0) -> None:
        """Give batch and pool a size for so many rows and blocks, which may be more than are in use."""
        rows = bucket_rows(min(rows, self._slots.limit), self._max_slots)
        wanted = (rows, bucket_blocks(min(blocks, self._max_blocks), rows, self._max_blocks))
        self._size = self._sizes.choose(wanted, steps)
        if self._pool is not None and self._size[1] == self._table.num_blocks:
            return
        pool = kv_cache.empty(self._model.config, self._size[1], self._model.dtype, self._model.mesh)
        old, new = self._table.resize(self._size[1])
        if self._pool is not None and len(old):
            pool = copy_to(pool, [(self._pool, int(block)) for block in old], new.tolist(), call=self._call)
        self._pool = pool

    # ---- decode ---------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        steps = self._make_room()
        assert self._pool is not None
        seats = list(self._slots.seats)
        groups = [self._groups[seat.job_id] for seat in seats]
        size = self._size
        owners: list[Snapshot | None] = [group.snapshot for group in groups]
        owners += [None] * (size[0] - len(owners))
        most_topk = max(group.request.topk_sample_logprobs for group in groups)
        num_topk = max(_MIN_TOPK, power_of_two(most_topk)) if most_topk else 0
        started = time.perf_counter()
        rows, view = self._rows(seats, size), self._adapters.view(owners)
        self._pool, drawn = self._decode_slice(self._pool, rows, view, steps, num_topk, self._call)
        drawn = jax.device_get(drawn)  # the slice's one look at the device
        self._sizes.note(size, (time.perf_counter() - started) / steps)
        for row, (seat, group) in enumerate(zip(seats, groups, strict=True)):
            if seat.job_id in self._groups:  # else it failed a few rows ago
                self._take(seat, group, drawn, row)

    def _decode_slice(
        self,
        pool: KVBlocks,
        rows: programs.DecodeRows,
        view: AdapterView | None,
        steps: int,
        num_topk: int,
        call: Call,
    ) -> tuple[KVBlocks, programs.Drawn]:
        return call(
            programs.decode_slice,
            self._model.graphdef,
            self._model.weights,
            pool,
            rows,
            view,
            jnp.int32(steps),
            most_steps=self._slice_tokens,
            num_topk=min(num_topk, self._model.config.vocab_size),
        )

    def _take(self, seat: Seat, group: Group, drawn: programs.Drawn, row: int) -> None:
        """Hand a row what a slice drew for it, and end it if that ends it."""
        count = int(drawn.counts[row])
        logprobs = drawn.logprobs[row, :count]
        if not np.isfinite(logprobs).all():
            self._clear([block for held in self._slots.seats_of(seat.job_id) for block in self._table.held(held)])
            wrong = InvalidInput("model_path", "logits that are not finite", "weights that give finite ones")
            self._fail(group, wrong)
            return
        topk = None
        if group.request.topk_sample_logprobs:
            topk = (drawn.topk_ids[row, :count], drawn.topk_logprobs[row, :count])
        if group.push(seat.sample, drawn.tokens[row, :count].tolist(), logprobs.tolist(), topk):
            self._slots.release(seat)
            self._table.release(seat)
            if group.done:
                del self._groups[seat.job_id]
                self._finished.append(Finished(seat.job_id, group.result()))

    def _make_room(self) -> int:
        """Blocks for every row's next slice, which has so many steps; the youngest rows leave if there are too few."""
        seats = self._slots.seats
        steps = self._steps()
        needed = [kv_cache.num_blocks(self._length_needed(seat, steps)) for seat in seats]
        while sum(needed) > self._max_blocks:
            needed.pop()
            self._send_back(seats[-1])
        self._size_pool(len(seats), sum(needed), steps)
        for seat, blocks in zip(seats, needed, strict=True):
            self._table.extend(seat, max(blocks, len(self._table.held(seat))))
        return steps

    def _steps(self) -> int:
        """Steps that take about ``slice_s`` at the present size, all of them while it is new."""
        step_s = self._sizes.step_s.get(self._size, 0.0)
        return max(1, int(min(self._slice_tokens, self._slice_s / step_s))) if step_s else self._slice_tokens

    def _length_needed(self, seat: Seat, steps: int) -> int:
        """Positions of a row that its next slice reads or writes."""
        group = self._groups[seat.job_id]
        end = len(group.prompt) + group.limit - 1  # the last token of a row is never read
        return max(len(group.prompt), min(group.position(seat.sample) + steps, end))

    def _rows(self, seats: Sequence[Seat], size: Size) -> programs.DecodeRows:
        """What the device must know of each row and block."""
        num_rows, num_blocks = size
        rows = programs.DecodeRows(
            token=np.zeros(num_rows, np.int32),
            position=np.zeros(num_rows, np.int32),
            remaining=np.zeros(num_rows, np.int32),
            temperature=np.ones(num_rows, np.float32),
            top_k=np.full(num_rows, -1, np.int32),
            top_p=np.ones(num_rows, np.float32),
            seed=np.zeros((num_rows, 2), np.uint32),
            sample=np.zeros(num_rows, np.int32),
            stop_ids=np.full((num_rows, programs.NUM_STOP_IDS), -1, np.int32),
            blocks=np.full((num_rows, 2), num_blocks, np.int32),
            owner=np.full(num_blocks, num_rows, np.int32),
            start=np.zeros(num_blocks, np.int32),
        )
        vocab_size = self._model.config.vocab_size
        for row, seat in enumerate(seats):
            group, params = self._groups[seat.job_id], self._groups[seat.job_id].request.params
            position = group.position(seat.sample)
            rows.token[row] = group.last_token(seat.sample)
            rows.position[row] = position
            rows.remaining[row] = group.limit - len(group.stops[seat.sample].tokens)
            rows.temperature[row] = min(params.temperature, float(np.finfo(np.float32).max))
            rows.top_k[row] = min(params.top_k, vocab_size)
            rows.top_p[row] = params.top_p
            rows.seed[row] = group.seed
            rows.sample[row] = seat.sample
            # Ids past int32 or the vocabulary are never drawn.
            stop_ids = [token for token in group.stop_ids if token < vocab_size][: programs.NUM_STOP_IDS]
            rows.stop_ids[row, : len(stop_ids)] = stop_ids
            held = np.asarray(self._table.held(seat), np.int32)
            ahead = held[position // BLOCK : position // BLOCK + 2]
            rows.blocks[row, : len(ahead)] = ahead
            rows.owner[held] = row
            rows.start[held] = BLOCK * np.arange(len(held), dtype=np.int32)
        return jax.tree.map(jnp.asarray, rows)

    # ---- compiling what is usual: see tx.worker.usual. Nothing changes; snapshots may be shapes. -------------------

    @property
    def usual_rows(self) -> list[int]:
        """Sizes of the decode batch for up to ``_USUAL_ROWS`` sequences."""
        return sorted({bucket_rows(rows, self._max_slots) for rows in range(1, min(_USUAL_ROWS, self._max_slots) + 1)})

    @property
    def likely_rows(self) -> list[int]:
        """Sizes that serve all smaller ones until those are worth compiling: for usual numbers, and the largest."""
        return sorted({self.usual_rows[-1], self._max_slots})

    @property
    def usual_prompts(self) -> list[PromptSize]:
        """Sizes of the prefill programs for prompts of up to ``_USUAL_TOKENS`` tokens."""
        return self._prefill.sizes_up_to(min(_USUAL_TOKENS, self._max_context - 1))

    def rehearse_prompts(self, size: PromptSize, snapshot: Snapshot | None, call: Call) -> None:
        """``call`` the prefill of this size."""
        earlier = self._outline(size.earlier) if size.earlier else None
        self._prefill.compute(snapshot, np.zeros((size.rows, size.length), np.int32), 0, earlier, False, call)

    def rehearse_decoding(self, rows: int, snapshot: Snapshot | None, call: Call) -> None:
        """``call`` the decoding of a batch of so many rows, in the pool that they have at first."""
        size = (rows, self._usual_blocks(rows))
        view = LiveAdapters().view([snapshot] * rows)
        self._decode_slice(self._outline(size[1]), self._rows([], size), view, 1, 0, call)
        self._sizes.expect(size)

    def rehearse_copies(self, call: Call) -> None:
        """``call`` the copying of blocks between all usual sizes of pools, and from fresh prompts."""
        pools = {self._usual_blocks(rows) for rows in (*self.usual_rows, *self.likely_rows)}
        earlier = {size.earlier for size in self.usual_prompts if size.earlier}
        prompts = {size.rows * kv_cache.num_blocks(size.length) for size in self.usual_prompts}
        for size in sorted(pools | earlier):
            kv_cache.zeros_like(self._outline(size).layers[0])
            for source in sorted(prompts | (pools if size in pools else set())):
                copy_to(self._outline(size), [(self._outline(source), 0)], [0], call=call)

    def _usual_blocks(self, rows: int) -> int:
        return bucket_blocks(0, rows, self._max_blocks)

    def _outline(self, blocks: int) -> KVBlocks:
        return kv_cache.outline(self._model.config, blocks, self._model.dtype, self._model.mesh)

    # ---- failures -------------------------------------------------------------------------------------------------

    def _fail(self, group: Group, error: Exception) -> None:
        self.cancel(group.job_id)
        self._finished.append(Finished(group.job_id, error=error))

    def _clear(self, blocks: Sequence[int]) -> None:
        """Make blocks that hold numbers that aren't finite safe for whoever has them next."""
        assert self._pool is not None
        size = power_of_two(len(blocks))
        padded = [*blocks, *[self._table.num_blocks] * (size - len(blocks))]
        self._pool = programs.clear_blocks(self._pool, jnp.asarray(padded, jnp.int32))

    def _send_back(self, seat: Seat) -> None:
        """Let a row wait again, first of its owner's; its seed will give it the same tokens."""
        group = self._groups[seat.job_id]
        group.restart(seat.sample)
        self._slots.release(seat)
        self._table.release(seat)
        self._slots.enqueue(seat.job_id, group.snapshot, [seat.sample], first=True)

    def _recover(self, error: Exception) -> None:
        """Throw the pool away and start the live rows again with half as many slots; fail a row that was alone."""
        num_live = len(self._slots.seats)
        log.error("sampling of %d rows failed: %s", num_live, error, exc_info=error)
        self._pool = None
        self._sizes = Sizes()  # what fitted before may be what doesn't now
        self._adapters = LiveAdapters()
        self._prefill.forget()
        for seat in reversed(list(self._slots.seats)):
            self._send_back(seat)
        self._table = BlockTable()
        if self._slots.limit > 1:
            self._slots.limit = max(1, min(self._slots.limit, num_live) // 2)
            return
        head = self._slots.head()
        if head is not None:
            self._fail(self._groups[head], error)
        self._slots.limit = self._max_slots
