"""The sampler: continuous batching over decode slots, a bounded piece of device work per call of ``slice``.

The life of a request:

1. ``submit`` checks it and lets its group of ``num_samples`` rows wait; owners (snapshots) take turns.
2. When slots are free, a slice prefills the prompt of the group whose turn it is (``prefill``), once for all its rows,
   or finds it among the recent ones.
3. Its rows are seated in free slots: the prompt's keys and values are copied into their rows of the cache.
4. A decode slice draws up to ``slice_tokens`` tokens for every seated row, whatever their snapshots and parameters, in
   one device loop, and the host hears of them once.
5. The host ends rows (``stopping``) and frees their slots; a group whose rows have all ended is reported at once.

Sampled tokens are a function of weights, prompt, parameters and seed. Neighbours, slots, slices and sizes of cache
enter only through float32 rounding of the logits (about 1e-6), which moves a draw only if its random number lies within
that of a boundary between two tokens.

The cache grows with the rows and lengths that are live and shrinks when that pays. A failing device call, out of memory
above all, throws no request away: its rows go back to waiting, their seeds will give the same tokens, and half as many
are seated next time; only a row that fails alone fails its request.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tx.errors import InvalidInput
from tx.layers import kv_cache
from tx.layers.kv_cache import KVCache
from tx.models.loading import LoadedModel
from tx.types import Finished, SampleRequest
from tx.worker import programs
from tx.worker.decode_slots import DecodeSlots, Seat, bucket_cache_length, bucket_rows, choose_size
from tx.worker.groups import Group, check
from tx.worker.prefill import Prefill, PrefillSizes
from tx.worker.snapshots import LiveAdapters, Snapshot
from tx.worker.stopping import Detokenize

log = logging.getLogger(__name__)


class Generator:
    """Samples for many requests at once from one base model and any number of snapshots.

    Args:
        max_slots: rows that decode at once.
        max_context: positions of the longest row, prompt and sampled tokens together.
        eos_token_ids: tokens that end a row unless its request says otherwise.
        detokenize: token ids to text, for stop strings.
        slice_tokens: tokens per row between two looks of the host.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_slots: int,
        max_context: int,
        eos_token_ids: Sequence[int],
        detokenize: Detokenize,
        slice_tokens: int = 8,
    ) -> None:
        self._model = model
        self._max_slots = max_slots
        self._max_context = max_context
        self._eos = tuple(eos_token_ids)
        self._detokenize = detokenize
        self._slice_tokens = slice_tokens
        self._groups: dict[int, Group] = {}
        self._slots = DecodeSlots(max_slots)
        self._prefill = Prefill(model, max_context, PrefillSizes.of_platform(model.mesh.devices.flat[0].platform))
        self._adapters = LiveAdapters()
        self._cache: KVCache | None = None
        self._known_sizes: set[tuple[int, int]] = set()  # (rows, length) that decode programs exist for
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
        """Forget a request and free its slots; unknown ids are fine."""
        self._slots.remove(job_id)
        self._groups.pop(job_id, None)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or decodes."""
        return bool(self._groups)

    def slice(self) -> list[Finished]:
        """Prefill waiting prompts if slots are free, else decode a few tokens for every live row."""
        try:
            admitted = not (self._decode_next and self._slots.num_live) and self._admit()
            if not admitted and self._slots.num_live:
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
        while self._slots.num_free and (job_id := self._slots.head()) is not None:
            group = self._groups[job_id]
            if self._prefill.ready(group):
                self._seat(group)
            elif spent >= budget:
                break
            else:
                spent += self._run_prefill(group)
        return spent > 0

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

    def _seat(self, group: Group) -> None:
        slots = self._slots
        # Room for everyone who waits, so that the cache does not grow once per group.
        self._fit(min(slots.limit, slots.num_live + slots.num_waiting), len(group.prompt))
        prompt = self._prefill.cache_of(group)
        seated = [slot for slot, _ in slots.seat(group.job_id)]
        if prompt is None:
            return
        targets = np.zeros(len(slots.seats), np.int32)
        targets[: len(seated)] = seated
        self._cache = programs.insert(self._cache, prompt, jnp.asarray(targets), jnp.int32(len(seated)))

    def _fit(self, num_rows: int, length: int) -> None:
        """Give the cache room for ``num_rows`` rows, for ``length`` positions and for every live row's next slice."""
        live = self._slots.live()
        if not live:
            self._cache = None  # nothing to keep: take the size that is needed, be it smaller
            self._slots.resize(0)
        length = max([length, *(self._length_needed(seat) for _, seat in live)])
        needed = (bucket_rows(num_rows, self._max_slots), bucket_cache_length(length, self._max_context))
        if self._cache is None:
            config, dtype, mesh = self._model.config, self._model.dtype, self._model.mesh
            self._cache = kv_cache.empty(config, *needed, dtype, mesh)
            self._slots.resize(needed[0])
            return
        current = (self._cache.rows, self._cache.length)
        chosen = choose_size(current, needed, self._known_sizes)
        if chosen != current:
            sources = np.asarray(self._slots.resize(chosen[0]), np.int32)
            sources[sources < 0] = current[0]  # out of range: zeros
            self._cache = programs.regroup(self._cache, jnp.asarray(sources), length=chosen[1], mesh=self._model.mesh)

    def _length_needed(self, seat: Seat) -> int:
        """Positions that a live row's next slice writes to, or its insert has written to."""
        group = self._groups[seat.job_id]
        end = len(group.prompt) + group.limit - 1  # the last token of a row is never read
        return max(len(group.prompt), min(group.position(seat.sample) + self._slice_tokens, end))

    # ---- decode ---------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        self._fit(min(self._slots.limit, self._slots.num_live + self._slots.num_waiting), 1)
        assert self._cache is not None
        live = self._slots.live()
        groups = [self._groups[seat.job_id] for _, seat in live]
        owners: list[Snapshot | None] = [None] * len(self._slots.seats)
        for (slot, _), group in zip(live, groups, strict=True):
            owners[slot] = group.snapshot
        self._known_sizes.add((self._cache.rows, self._cache.length))
        self._cache, *drawn = programs.decode_slice(
            self._model.graphdef,
            self._model.weights,
            self._cache,
            self._rows(),
            self._adapters.view(owners),
            steps=self._slice_tokens,
            filtered=any(group.filtered for group in groups),
        )
        tokens, logprobs, counts = jax.device_get(drawn)  # the slice's one look at the device
        for (slot, seat), group in zip(live, groups, strict=True):
            if seat.job_id not in self._groups:
                continue  # failed a few rows ago
            count = int(counts[slot])
            if not np.isfinite(logprobs[slot, :count]).all():
                self._fail(
                    group, InvalidInput("model_path", "logits that are not finite", "weights that give finite ones")
                )
            elif group.push(seat.sample, tokens[slot, :count].tolist(), logprobs[slot, :count].tolist()):
                self._slots.release(slot)
                if group.done:
                    del self._groups[seat.job_id]
                    self._finished.append(Finished(seat.job_id, group.result()))

    def _rows(self) -> programs.DecodeRows:
        """What the device must know of each slot."""
        size = len(self._slots.seats)
        rows = programs.DecodeRows(
            token=np.zeros(size, np.int32),
            position=np.zeros(size, np.int32),
            remaining=np.zeros(size, np.int32),
            temperature=np.ones(size, np.float32),
            top_k=np.full(size, -1, np.int32),
            top_p=np.ones(size, np.float32),
            seed=np.zeros((size, 2), np.uint32),
            sample=np.zeros(size, np.int32),
            stop_ids=np.full((size, programs.NUM_STOP_IDS), -1, np.int32),
        )
        for slot, seat in self._slots.live():
            group, params = self._groups[seat.job_id], self._groups[seat.job_id].request.params
            rows.token[slot] = group.last_token(seat.sample)
            rows.position[slot] = group.position(seat.sample)
            rows.remaining[slot] = group.limit - len(group.stops[seat.sample].tokens)
            rows.temperature[slot] = min(params.temperature, float(np.finfo(np.float32).max))
            rows.top_k[slot] = min(params.top_k, self._model.config.vocab_size)
            rows.top_p[slot] = params.top_p
            rows.seed[slot] = group.seed
            rows.sample[slot] = seat.sample
            # Ids past int32 or the vocabulary are never drawn.
            stop_ids = [token for token in group.stop_ids if token < self._model.config.vocab_size]
            stop_ids = stop_ids[: programs.NUM_STOP_IDS]
            rows.stop_ids[slot, : len(stop_ids)] = stop_ids
        return jax.tree.map(jnp.asarray, rows)

    # ---- failures -------------------------------------------------------------------------------------------------

    def _fail(self, group: Group, error: Exception) -> None:
        self.cancel(group.job_id)
        self._finished.append(Finished(group.job_id, error=error))

    def _recover(self, error: Exception) -> None:
        """Throw the cache away and start the live rows again with half as many slots; fail a row that was alone."""
        live = self._slots.live()
        log.error("sampling of %d rows failed: %s", len(live), error, exc_info=error)
        self._cache = None
        self._adapters = LiveAdapters()
        self._prefill.forget()
        for slot, seat in reversed(live):
            group = self._groups[seat.job_id]
            group.restart(seat.sample)
            self._slots.release(slot)
            self._slots.enqueue(seat.job_id, group.snapshot, [seat.sample], first=True)
        self._slots.resize(0)
        if self._slots.limit > 1:
            self._slots.limit = max(1, min(self._slots.limit, len(live)) // 2)
            return
        head = self._slots.head()
        if head is not None:
            self._fail(self._groups[head], error)
        self._slots.limit = self._max_slots
