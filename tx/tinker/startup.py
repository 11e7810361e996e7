"""From parsed flags to an engine that can run: database, base model, compile cache, registration; and how to stop.

Whatever can't work here raises StartupError, one sentence for the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from sqlalchemy.engine import Engine as Database
from sqlmodel import select

from tx.errors import InvalidInput, StartupError, StorageError
from tx.tinker.base_model import locate
from tx.tinker.checkpoints import CheckpointFolders
from tx.tinker.config import TxConfig
from tx.tinker.db import Model, open_database, reading
from tx.tinker.notify import ChangeSignal
from tx.tinker.registration import Registration
from tx.tinker.supervisor import PARENT_FD
from tx.utils.log import human_bytes
from tx.worker.ahead import compiling
from tx.worker.worker import Worker

log = logging.getLogger(__name__)

HARD_STOP_S = 2.0
"""A slice or a compilation that takes longer than this is not waited for: its jobs start again next time."""

_PROGRESS_EVERY_S = 2.0

_MEMORY_SHARES = frozenset({"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"})
_MEMORY_SHARE = "0.9"
"""Of an accelerator's memory. JAX's own is 0.75: of 80 GB, 12 less, what 5,000 tokens of a 4B model keep."""


@dataclass(frozen=True)
class Ready:
    """What ``start`` has set up."""

    db: Database
    signal: ChangeSignal
    worker: Worker
    folders: CheckpointFolders
    registration: Registration


@contextlib.contextmanager
def start(config: TxConfig) -> Iterator[Ready]:
    """Load everything; on the way out the registration says how it ended."""
    db = open_database(config.resolved_database_url)
    registration = Registration(db, config.base_model_name, config.served_names)
    try:
        folders = _open_folders(config, db)
        worker = _load(config, registration)
        yield Ready(db, ChangeSignal(config.resolved_database_url, ("appended",)), worker, folders, registration)
    except StartupError as error:
        registration.close("failed", str(error))
        raise
    except BaseException as error:
        registration.close("failed", f"{type(error).__name__}: {error}")
        raise
    registration.close("stopped")


def stop_signals() -> threading.Event:
    """An event that SIGTERM, SIGINT or our parent's death sets; soon after, the process is gone either way.

    A thread learns of the signals through a pipe: a handler would not run while the main thread is compiling.
    """
    stop = threading.Event()
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch(descriptor: int, *, until_end: bool) -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1) and until_end:
                pass
        stop.set()
        time.sleep(HARD_STOP_S)
        os._exit(0)

    threading.Thread(target=watch, args=(signals,), kwargs={"until_end": False}, name="signals", daemon=True).start()
    if (descriptor := os.environ.get(PARENT_FD)) is not None:
        parent = (int(descriptor),)
        threading.Thread(target=watch, args=parent, kwargs={"until_end": True}, name="parent", daemon=True).start()
    return stop


def warm_up(worker: Worker, registration: Registration, stopping: Callable[[], bool]) -> None:
    """Compile every usual program, saying how far it is; one that fails is left to whoever needs it."""
    began, steps = time.monotonic(), worker.warm_up()
    for number, step in enumerate(steps, 1):
        if stopping():
            return
        registration.update("starting", f"warming up: {number} of {len(steps)}, {step.name}")
        step_began = time.monotonic()
        try:
            step.run(compiling)
        except Exception as error:
            log.warning("warming up, %s failed: %s", step.name, error)
        log.info("warming up: %d of %d, %s, %.1f s", number, len(steps), step.name, time.monotonic() - step_began)
    log.info("warmed up in %.0f s", time.monotonic() - began)


def _open_folders(config: TxConfig, db: Database) -> CheckpointFolders:
    """The checkpoints' base, checked and swept before anything that takes longer."""
    folders = CheckpointFolders(config.checkpoints_folder)
    try:
        folders.check()
    except StorageError as error:
        raise StartupError(f"--checkpoints-base: {error}.") from error
    with reading(db) as session:  # other engines may be writing theirs
        model_ids = set(session.exec(select(Model.model_id).where(Model.base_model == config.base_model_name)).all())
    try:
        swept = folders.sweep(model_ids)
    except StorageError as error:
        log.warning("What crashes left of checkpoints stays until the next start: %s", error)
    else:
        if swept:
            log.info("removed %d half-written checkpoints", swept)
    return folders


def _load(config: TxConfig, registration: Registration) -> Worker:
    began = time.monotonic()
    _use_compile_cache(config)
    _claim_memory()
    files = locate(config)
    registration.update("starting", f"reading {files.folder.name}", tokenizer=files.tokenizer)
    log.info("reading %s from %s", config.base_model_name, files.folder)
    try:
        worker = Worker(
            files.folder,
            config.base_model_name,
            dtype=config.dtype,
            max_lora_adapters=config.max_lora_adapters,
            max_lora_rank=config.max_lora_rank,
            data_parallel_size=config.data_parallel_size,
            fully_sharded_data_parallel_size=config.fully_sharded_data_parallel_size,
            expert_parallel_size=config.expert_parallel_size,
            tensor_parallel_size=config.tensor_parallel_size,
            train_micro_batch_size=config.train_micro_batch_size,
            train_micro_batch_tokens=config.train_micro_batch_tokens,
            sample_max_num_sequences=config.sample_max_num_sequences,
            kv_cache_memory=config.kv_cache_memory,
            parked_adapters_memory=config.parked_adapters_memory,
            parking_folder=config.parking_folder,
            gradient_checkpointing=config.gradient_checkpointing,
            shard_attention_heads=config.shard_attention_heads,
            enforce_eager=config.enforce_eager,
            progress=_progress(registration),
        )
    except InvalidInput as error:  # config.json says something that the models here can't honour
        raise StartupError(f"{config.base_model_name} can't be served: {error}") from error
    card = worker.card
    registration.update("starting", "loaded", card=card)
    log.info(
        "loaded %s: %.1fM parameters, %s on %d %s device(s), context %d, in %.1f s",
        card.base_model, card.num_params / 1e6, human_bytes(card.weight_bytes), jax.device_count(),
        jax.default_backend(), card.max_context, time.monotonic() - began,
    )  # fmt: skip
    return worker


def _use_compile_cache(config: TxConfig) -> None:
    config.compile_cache_folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(config.compile_cache_folder))
    # All of them: the default keeps only what took a second to compile, but most take less, and add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _claim_memory() -> None:
    """An accelerator is the engine's alone, unless its owner has said otherwise; before JAX first looks at it."""
    if not _MEMORY_SHARES & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = _MEMORY_SHARE


def _progress(registration: Registration) -> Callable[[int, int], None]:
    """Says how far reading the weights is, now and then."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _PROGRESS_EVERY_S and total:
            last = time.monotonic()
            detail = f"reading weights: {100 * done // total} % of {human_bytes(total)}"
            registration.update("starting", detail)
            log.info(detail)

    return report
