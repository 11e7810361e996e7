"""The real engine around a worker that computes nothing: what the queue, the database and HTTP cost by themselves.

usage: python benchmarks/stub_engine.py --base-model stub/model [the engine's other flags] --slice-s 0.005

Claiming, scheduling, committing, recovery and housekeeping are ``tx.tinker.engine``'s own. The worker takes
``--slice-s`` for a slice, sleeping as if a device computed, and then has everything done that it was given (at most
``--slots`` sequences). A sample answers with its prompt's first token, a forward_backward with the sum of its tokens,
so that whoever asks can tell that an answer is its own.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from tx import types
from tx.tinker.checkpoints import CheckpointFolders
from tx.tinker.config import parse_args
from tx.tinker.db import open_database
from tx.tinker.engine import Engine
from tx.tinker.in_flight import InFlight
from tx.tinker.notify import ChangeSignal
from tx.tinker.recovery_points import RecoveryPoints
from tx.tinker.registration import Registration
from tx.tinker.startup import stop_signals
from tx.tinker.supervisor import say_ready
from tx.utils import log


class StubWorker:
    """What the engine asks of ``tx.worker.worker.Worker``, without arrays on any device."""

    def __init__(self, base_model: str, slice_s: float, decode_slots: int) -> None:
        self.card = types.ModelCard(base_model, 1 << 16, 1 << 15, (0,), 0, 0)
        self.decode_slots = decode_slots
        self.gather_s = 0.0
        self._slice_s = slice_s
        self._models: dict[str, types.LoraConfig] = {}
        self._snapshots: set[str] = set()
        self._samples: OrderedDict[int, types.SampleRequest] = OrderedDict()
        self._batches: OrderedDict[int, types.ForwardBackward] = OrderedDict()

    def idle(self) -> AbstractContextManager[None]:
        return nullcontext()

    # ---- models and snapshots ---------------------------------------------------------------------------------

    def create_model(self, model_id: str, lora: types.LoraConfig) -> None:
        self._models[model_id] = lora

    def drop_model(self, model_id: str) -> None:
        self._models.pop(model_id, None)
        for job_id in [job_id for job_id, batch in self._batches.items() if batch.model_id == model_id]:
            del self._batches[job_id]

    def has_model(self, model_id: str) -> bool:
        return model_id in self._models

    @property
    def resident_models(self) -> tuple[str, ...]:
        return ()

    def export_model(self, model_id: str) -> types.ModelState:
        return types.ModelState(self._models[model_id], {"stub": np.zeros(1, np.float32)})

    def restore_model(self, model_id: str, state: types.ModelState, with_optimizer: bool) -> None:
        self._models[model_id] = state.lora

    def take_snapshot(self, model_id: str, snapshot_id: str) -> None:
        self._snapshots.add(snapshot_id)

    def load_snapshot(self, snapshot_id: str, state: types.ModelState) -> None:
        self._snapshots.add(snapshot_id)

    def has_snapshot(self, snapshot_id: str) -> bool:
        return snapshot_id in self._snapshots

    def drop_snapshot(self, snapshot_id: str) -> None:
        self._snapshots.discard(snapshot_id)

    # ---- training ---------------------------------------------------------------------------------------------

    def submit_forward_backward(self, job_id: int, request: types.ForwardBackward, *, alone: bool = False) -> None:
        self._batches[job_id] = request

    @property
    def training(self) -> bool:
        return bool(self._batches)

    def train_slice(self) -> list[types.Finished]:
        time.sleep(self._slice_s)
        job_id, request = self._batches.popitem(last=False)
        logprobs = [np.zeros(datum.inputs["target_tokens"].shape, np.float32) for datum in request.data]
        metrics = {"loss:sum": float(sum(int(datum.tokens.sum()) for datum in request.data))}
        return [types.Finished(job_id, types.ForwardBackwardResult(logprobs, metrics))]

    def optim_step(self, model_id: str, params: types.AdamParams) -> dict[str, float]:
        return {"grad_norm:mean": 0.0}

    # ---- sampling ---------------------------------------------------------------------------------------------

    def submit_sample(self, job_id: int, request: types.SampleRequest, snapshot_id: str | None) -> None:
        self._samples[job_id] = request

    def cancel_sample(self, job_id: int) -> None:
        self._samples.pop(job_id, None)

    @property
    def sampling(self) -> bool:
        return bool(self._samples)

    def sample_slice(self) -> list[types.Finished]:
        time.sleep(self._slice_s)
        finished, room = [], self.decode_slots
        while self._samples and room > 0:
            job_id, request = self._samples.popitem(last=False)
            room -= request.num_samples
            tokens = np.asarray(request.prompt[:1], np.int32)
            sequence = types.SampledSequence(tokens, np.zeros(1, np.float32), "length")
            finished.append(types.Finished(job_id, types.SampleResult([sequence] * request.num_samples)))
        return finished


def _take(argv: list[str], flag: str, default: str) -> str:
    """A flag of ours, taken out of the engine's."""
    if flag not in argv:
        return default
    at = argv.index(flag)
    value = argv[at + 1]
    del argv[at : at + 2]
    return value


def main() -> None:
    """The engine's ``main`` with another worker."""
    argv = sys.argv[1:]
    slice_s, slots = float(_take(argv, "--slice-s", "0.005")), int(_take(argv, "--slots", "64"))
    config = parse_args(argv, "stub_engine.py")
    log.set_up("engine", config.log_level)
    stopping = stop_signals()
    db = open_database(config.resolved_database_url)
    registration = Registration(db, config.base_model_name, config.served_names)
    worker = StubWorker(config.base_model_name, slice_s, slots)
    engine = Engine(
        db,
        ChangeSignal(config.resolved_database_url, ("appended",)),
        worker,  # type: ignore[arg-type]  # as far as the engine can tell
        CheckpointFolders(config.checkpoints_folder),
        RecoveryPoints(db, config.recovery_folder, config.base_model_name, worker.export_model),
        InFlight(config.recovery_folder / "in-flight"),
        config.base_model_name,
        sample_room=2 * slots,
    )
    registration.update("ready", card=worker.card, decode_slots=slots)
    say_ready()
    engine.run(stopping.is_set)
    registration.close("stopped")


if __name__ == "__main__":
    main()
