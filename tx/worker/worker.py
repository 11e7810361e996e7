"""Worker: the one object the engine calls; the base model, its adapters, the trainer and the sampler on one mesh.

Its surface is numpy and plain dataclasses (``tx.types``); it knows neither SQL nor HTTP. It is driven by one thread:
``submit_*`` checks a request and plans it, ``train_slice`` and ``sample_slice`` each do one bounded piece of device
work and return the jobs that it finished, so that the caller alternates between the two as fairly as it likes.
Everything else acts at once on one model or one snapshot. A caller's mistake raises ``tx.errors.InvalidInput`` before
any state has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from tx import types
from tx.errors import InvalidInput, NotFound, StartupError
from tx.layers import attention, kv_cache
from tx.layers.kv_cache import BLOCK
from tx.models.loading import LoadedModel, load_model
from tx.worker import memory
from tx.worker.adapters import AdapterStore, TrainingState
from tx.worker.ahead import Ahead, Step
from tx.worker.generator import Generator
from tx.worker.maps import MapsGuard
from tx.worker.mesh import make_mesh
from tx.worker.parking import Parking
from tx.worker.snapshots import SnapshotStore
from tx.worker.trainer import Trainer
from tx.worker.usual import Usual

log = logging.getLogger(__name__)

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

CPU_DECODE_SLOTS = 128
"""A CPU's matrix products gain until about 128 rows; more add latency, hardly tokens per second."""
GPU_DECODE_SLOTS = 256

BLOCKS_PER_SLOT = 4
"""Of a default number of slots: memory for rows of 256 tokens."""

MIN_KV_BLOCKS = 4
"""Fewer can't hold two short rows and their prompts."""

CPU_MICRO_BATCH_TOKENS = 512
GPU_MICRO_BATCH_TOKENS = 8192
"""Enough for matrix products to be compute-bound; a larger micro-batch would only make sampling wait longer."""

MIN_MICRO_BATCH_TOKENS = 128
"""Where memory is short, activations are computed twice before micro-batches become smaller than this."""


class Worker:
    """A loaded base model with everything that trains and samples on it.

    ``card`` says what it is, ``decode_slots`` how many sequences it samples at once.

    Args:
        model_folder: a Hugging Face folder (config.json, safetensors, tokenizer).
        base_model: the id under which the service lists it.
        dtype: "float32", "bfloat16" or "auto" (float32 on CPU, bfloat16 elsewhere).
        train_micro_batch_tokens: padded tokens of one training micro-batch, 0 chooses.
        sample_max_num_sequences: decode slots, 0 chooses.
        kv_cache_memory: bytes per device for keys and values, 0 for a share of what the weights leave.
        parked_adapters_memory: bytes of host memory for models that are not on the device, 0 for a share of it.
        parking_folder: where those beyond it go, of this worker alone and emptied now; None keeps them in memory.
        progress: called with (bytes read, bytes in all) while weights load.

    Raises:
        StartupError: the folder, the model family or the mesh doesn't work here.
    """

    def __init__(
        self,
        model_folder: Path,
        base_model: str,
        *,
        dtype: str = "auto",
        max_lora_adapters: int = 32,
        max_lora_rank: int = 32,
        data_parallel_size: int = 1,
        fully_sharded_data_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        tensor_parallel_size: int = 1,
        train_micro_batch_size: int = 0,
        train_micro_batch_tokens: int = 0,
        sample_max_num_sequences: int = 0,
        kv_cache_memory: int = 0,
        parked_adapters_memory: int = 0,
        parking_folder: Path | None = None,
        gradient_checkpointing: bool = False,
        shard_attention_heads: bool = True,
        enforce_eager: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        on_cpu = jax.default_backend() == "cpu"
        if dtype == "auto":
            dtype = "float32" if on_cpu else "bfloat16"
        if enforce_eager:
            jax.config.update("jax_disable_jit", True)
        mesh = make_mesh(
            data_parallel_size, fully_sharded_data_parallel_size, expert_parallel_size, tensor_parallel_size
        )
        self._max_rank = max_lora_rank
        self._model: LoadedModel = load_model(
            model_folder, mesh, _DTYPES[dtype], shard_attention_heads=shard_attention_heads, progress=progress
        )
        config = self._model.config
        self.card = types.ModelCard(
            base_model=base_model,
            vocab_size=config.vocab_size,
            max_context=config.max_position_embeddings,
            eos_token_ids=config.eos_token_ids,
            num_params=self._model.num_params,
            weight_bytes=self._model.weight_bytes,
        )
        parking: Parking[TrainingState] = Parking(memory.parked_bytes(parked_adapters_memory), parking_folder)
        self._adapters = AdapterStore(self._model, max_resident=max_lora_adapters, parking=parking)
        self._ahead, self._maps = Ahead(), MapsGuard()
        self._snapshots = SnapshotStore(self._model, max_lora_adapters, self._ahead.call)
        room = memory.activation_bytes(mesh.devices.flat[0])
        self._trainer = Trainer(
            self._model,
            self._adapters,
            micro_batch_tokens=train_micro_batch_tokens or self._micro_batch_tokens(room, on_cpu),
            micro_batch_rows=train_micro_batch_size,
            gradient_checkpointing=gradient_checkpointing,
            max_context=self.card.max_context,
            activation_bytes=room,
            call=self._ahead.call,
        )
        slots = sample_max_num_sequences or (CPU_DECODE_SLOTS if on_cpu else GPU_DECODE_SLOTS)
        kv_blocks = self._kv_blocks(kv_cache_memory, slots)
        # By default no more slots than the memory has short rows for: a seat without blocks is only sent back.
        self.decode_slots = sample_max_num_sequences or max(1, min(slots, kv_blocks // BLOCKS_PER_SLOT))
        log.info(
            "%d decode slots; attention: %s",
            self.decode_slots,
            attention.kernels(mesh, self._model.dtype, config.head_dim),
        )
        self._generator = Generator(
            self._model,
            max_slots=self.decode_slots,
            max_context=min(self.card.max_context, kv_blocks * BLOCK),
            kv_blocks=kv_blocks,
            eos_token_ids=config.eos_token_ids,
            detokenize=_detokenizer(model_folder),
            call=self._ahead.call,
        )
        self._usual = Usual(self._model, self._trainer, self._adapters, self._snapshots, self._generator, max_lora_rank)

    def _micro_batch_tokens(self, room: int | None, on_cpu: bool) -> int:
        """The usual budget, or as much of it as keeps its activations in ``room`` bytes per device."""
        most = CPU_MICRO_BATCH_TOKENS if on_cpu else GPU_MICRO_BATCH_TOKENS
        each = memory.kept_bytes_per_token(self._model.config, self._model.dtype)
        shape = self._model.mesh.shape
        tokens = memory.micro_batch_tokens(most, MIN_MICRO_BATCH_TOKENS, each // (shape["data"] * shape["fsdp"]), room)
        log.info("training: micro-batches of %d tokens, %.1f kB kept of each", tokens, each / 1e3)
        return tokens

    def _kv_blocks(self, asked_bytes: int, slots: int) -> int:
        """Blocks of keys and values that each device has room for, no more than ``slots`` rows can ever fill."""
        config, mesh = self._model.config, self._model.mesh
        parts = mesh.shape["tp"] if config.num_kv_heads % mesh.shape["tp"] == 0 else 1
        each = kv_cache.block_bytes(config, self._model.dtype) // parts
        room = memory.kv_bytes(mesh.devices.flat[0], asked_bytes)
        if room < MIN_KV_BLOCKS * each:
            raise StartupError(
                f"--kv-cache-memory: {room} bytes are too few for keys and values, accepted: at least "
                f"{MIN_KV_BLOCKS * each} ({MIN_KV_BLOCKS * BLOCK} tokens)"
            )
        useful = int(slots * kv_cache.num_blocks(self.card.max_context) / (1 - memory.PROMPT_SHARE)) + 1
        blocks = min(room // each, useful)
        log.info("KV cache: up to %d tokens, %.1f GB per device", blocks * BLOCK, blocks * each / 1e9)
        if blocks * BLOCK < self.card.max_context:
            log.warning("sampling stops at %d tokens of context: --kv-cache-memory", blocks * BLOCK)
        return blocks

    # ---- models -----------------------------------------------------------------------------------------------

    def create_model(self, model_id: str, lora: types.LoraConfig) -> None:
        """A fresh adapter; raises InvalidInput if its rank is not in [1, --max-lora-rank]."""
        self._check_rank(lora)
        self._adapters.create(model_id, lora)
        self._ahead.ask(self._usual.likely(lora), next=True)

    def drop_model(self, model_id: str) -> None:
        """Forget a model and its queued training; unknown ids are fine."""
        self._trainer.discard(model_id)
        self._adapters.drop(model_id)

    def has_model(self, model_id: str) -> bool:
        """Whether the model lives here, on the device or parked; no longer once a call has raised ModelLost for it."""
        return model_id in self._adapters

    @property
    def resident_models(self) -> tuple[str, ...]:
        """The models on the device, the least recently used first."""
        return self._adapters.resident

    def park_model(self, model_id: str) -> None:
        """Move a model off the device until it is asked for again; one that isn't there is fine."""
        self._adapters.park(model_id)

    def export_model(self, model_id: str) -> types.ModelState:
        """A host copy of weights, moments and step count."""
        self._require(model_id)
        return self._adapters.export(model_id)

    def restore_model(self, model_id: str, state: types.ModelState, with_optimizer: bool) -> None:
        """Put a saved state into the model, created if absent; accumulated gradients are cleared."""
        self._check_rank(state.lora)
        self._adapters.restore(model_id, state, with_optimizer)

    # ---- training ---------------------------------------------------------------------------------------------

    def submit_forward_backward(self, job_id: int, request: types.ForwardBackward, *, alone: bool = False) -> None:
        """Check and queue one request; raises InvalidInput naming the field, and then nothing has changed.

        ``alone``: in no micro-batch with other models, so that its numbers are those of the model by itself to the bit.
        """
        self._require(request.model_id)
        self._trainer.submit(job_id, request, alone=alone)

    @property
    def training(self) -> bool:
        """Whether ``train_slice`` has something to do."""
        return self._trainer.has_work

    @property
    def gather_s(self) -> float:
        """Seconds for which ``train_slice`` is worth putting off: models that trained together last time may follow."""
        return self._trainer.gather_s

    def train_slice(self) -> list[types.Finished]:
        """Run one micro-batch; the jobs that it completed or that failed."""
        self._maps.check()
        return self._trainer.slice()

    def optim_step(self, model_id: str, params: types.AdamParams) -> dict[str, float]:
        """One AdamW step of one model from its accumulated gradients; the step's metrics."""
        self._require(model_id)
        return self._trainer.optim_step(model_id, params)

    # ---- snapshots and sampling -------------------------------------------------------------------------------

    def take_snapshot(self, model_id: str, snapshot_id: str) -> None:
        """Freeze the model's present weights under ``snapshot_id``; InvalidInput if they are not finite."""
        self._require(model_id)
        state = self._adapters.state(model_id)
        self._snapshots.take(snapshot_id, state.weights, self._adapters.lora(model_id))

    def load_snapshot(self, snapshot_id: str, state: types.ModelState) -> None:
        """A snapshot from saved weights."""
        self._check_rank(state.lora)
        self._snapshots.load(snapshot_id, state)

    def has_snapshot(self, snapshot_id: str) -> bool:
        """Whether the snapshot lives here, on the device or parked."""
        return snapshot_id in self._snapshots

    def drop_snapshot(self, snapshot_id: str) -> None:
        """Forget a snapshot; rows that are decoding with it keep their copy until they finish."""
        self._snapshots.drop(snapshot_id)

    def submit_sample(self, job_id: int, request: types.SampleRequest, snapshot_id: str | None) -> None:
        """Check and queue one request (``snapshot_id`` None is the base model); raises InvalidInput."""
        if snapshot_id is not None and snapshot_id not in self._snapshots:
            raise NotFound("model_path", snapshot_id, "sampler weights that exist")
        snapshot = None if snapshot_id is None else self._snapshots.get(snapshot_id)
        self._generator.submit(job_id, request, snapshot)

    def cancel_sample(self, job_id: int) -> None:
        """Free the request's slots at the next slice; it will not be reported as finished."""
        self._generator.cancel(job_id)

    @property
    def sampling(self) -> bool:
        """Whether ``sample_slice`` has something to do."""
        return self._generator.has_work

    def sample_slice(self) -> list[types.Finished]:
        """Run one prefill batch or one decode slice; the requests that it finished."""
        self._maps.check()
        return self._generator.slice()

    # ---- compiling --------------------------------------------------------------------------------------------

    def compile_ahead(self) -> None:
        """From now on, compile what clients are likely to ask for while the worker is ``idle`` (``tx.worker.ahead``).

        That is models of the usual ranks, and every one that is created.
        """
        self._ahead.start()
        self._ahead.ask(self._usual.first())

    def idle(self) -> AbstractContextManager[None]:
        """Within it, the caller has nothing for the worker to do."""
        return self._ahead.idle()

    def warm_up(self) -> list[Step]:
        """Every usual program (``tx.worker.usual``), to be compiled before there is any work."""
        return self._usual.all()

    # ---- checks -----------------------------------------------------------------------------------------------

    def _require(self, model_id: str) -> None:
        if model_id not in self._adapters:
            raise NotFound("model_id", model_id, "a model that exists on this server")

    def _check_rank(self, lora: types.LoraConfig) -> None:
        if not 1 <= lora.rank <= self._max_rank:
            raise InvalidInput("lora_config.rank", lora.rank, f"1 to {self._max_rank} (--max-lora-rank)")
        if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
            raise InvalidInput(
                "lora_config", "nothing to train", "at least one of train_attn, train_mlp, train_unembed"
            )


def _detokenizer(model_folder: Path) -> Callable[[Sequence[int]], str]:
    """Token ids to text with special tokens spelled out, as stop strings see it; StartupError without a tokenizer."""
    file = model_folder / "tokenizer.json"
    if not file.is_file():
        raise StartupError(f"no tokenizer.json in {model_folder}: stop strings can't be matched without it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception on a file that it can't read
        raise StartupError(f"{file} is not a usable tokenizer: {error}") from error
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)
