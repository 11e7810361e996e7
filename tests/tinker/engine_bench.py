"""An engine in this process, on a real worker and a real database, with a client's verbs to append jobs by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tx.tinker.checkpoints import CheckpointFolders
from tx.tinker.db import Job, Model, Sampler, now, open_database, writing
from tx.tinker.engine import Engine
from tx.tinker.in_flight import InFlight
from tx.tinker.jobs import Appended, JobTable, NewJob
from tx.tinker.notify import ChangeSignal
from tx.tinker.recovery_points import RecoveryPoints
from tx.tinker.wire import codec, paths
from tx.tinker.wire import tinker_pb2 as pb
from tx.utils.storage import Storage
from tx.worker.worker import Worker

BASE = "tiny/qwen3"


class Bench:
    """One database and one folder; ``restart`` stands for a crash: a new engine, and a worker that has forgotten."""

    def __init__(
        self, folder: Path, url: str, model_folder: Path, worker: Worker | None = None, room: int = 64
    ) -> None:
        self.url = url
        self.db = open_database(url)
        self.signal = ChangeSignal(url)
        self.pace = ChangeSignal(url)
        self.jobs = JobTable(self.db, self.signal)
        self.base = folder / "checkpoints"
        self.folders = CheckpointFolders(self.base)
        self.points_folder = folder / "recovery"
        self.model_folder = model_folder
        self.room = room
        self.worker = worker or new_worker(model_folder)
        self.engine = self._new_engine()

    def _new_engine(self) -> Engine:
        self.points = RecoveryPoints(self.db, self.points_folder, BASE, self.worker.export_model)
        self.in_flight = InFlight(self.points_folder / "in-flight")
        return Engine(
            self.db, self.signal, self.worker, self.folders, self.points, self.in_flight, BASE, sample_room=self.room
        )

    def restart(self) -> None:
        self.worker = new_worker(self.model_folder)
        self.engine = self._new_engine()
        self.jobs.requeue(BASE, self.in_flight.suspects)

    def folder(self, path: str) -> Path:
        """Where a checkpoint's files are, whether or not it exists."""
        return self.base / paths.parse_path(path).folder

    def use_storage(self, storage: Storage) -> None:
        """From here on checkpoints are kept elsewhere, by an engine that starts anew on the same worker."""
        self.folders = CheckpointFolders(storage)
        self.engine = self._new_engine()

    def close(self) -> None:
        self.signal.close()
        self.pace.close()
        self.db.dispose()

    def run(self, *request_ids: int) -> list[Job]:
        """Step until these jobs are finished."""
        for _ in range(20_000):
            if not self.engine.step():
                self.pace.wait(0.005)  # files are being written
            if len(self.jobs.finished_ids(request_ids)) == len(set(request_ids)):
                return [self.job(request_id) for request_id in request_ids]
        raise AssertionError("the engine does not get there")

    def job(self, request_id: int) -> Job:
        job = self.jobs.get(request_id)
        assert job is not None
        return job

    def append(self, kind: str, body: dict[str, Any] | bytes, **more: Any) -> int:
        payload = body if isinstance(body, bytes) else orjson.dumps(body)
        (answer,) = self.jobs.append([NewJob(kind, BASE, payload, **more)])
        assert isinstance(answer, Appended), answer
        return answer.request_id


def new_worker(model_folder: Path) -> Worker:
    return Worker(model_folder, BASE, dtype="float32", max_lora_adapters=4, max_lora_rank=8)


def body_of(job: Job) -> dict[str, Any]:
    """The result of a job that must have gone well, as JSON."""
    assert job.status == "done", job.error
    return codec.to_json(job.result, job.result_type)


def datum(message: pb.ForwardBackwardRequest, tokens: list[int], **inputs: list[float] | list[int]) -> pb.Datum:
    added = message.data.add()
    added.model_input.add().encoded_text.tokens = np.array(tokens, np.int32).tobytes()
    for name, values in inputs.items():
        is_int = name == "target_tokens"
        tensor = added.loss_fn_inputs[name]
        tensor.dense = np.array(values, np.int64 if is_int else np.float32).tobytes()
        tensor.dtype = pb.DTYPE_INT64 if is_int else pb.DTYPE_FLOAT32
        tensor.shape.append(len(values))
    return added


@dataclass
class Client:
    """One model of one session; every verb appends a job and returns its request id."""

    bench: Bench
    session_id: str = "sess-a"
    model_seq_id: int = 0
    rank: int = 4
    seed: int = 7
    seq_id: int = 0
    sampler_seq: int = 0
    sample_seqs: dict[str, int] = field(default_factory=dict)

    @property
    def model_id(self) -> str:
        return paths.model_id(self.session_id, self.model_seq_id)

    def _row(self) -> Model:
        return Model(
            model_id=self.model_id, session_id=self.session_id, model_seq_id=self.model_seq_id, base_model=BASE,
            served_name=BASE, rank=self.rank, seed=self.seed, created_at=now(), last_request_at=now(),
        )  # fmt: skip

    def create(self, **body: Any) -> int:
        return self.bench.append(
            "create_model", body, session_id=self.session_id, model_id=self.model_id, seq_id=0, rows=(self._row(),)
        )

    def create_from(self, path: str, optimizer: bool = True) -> int:
        body = {"session_id": self.session_id, "model_seq_id": self.model_seq_id, "path": path, "optimizer": optimizer}
        return self.bench.append(
            "load_weights", body, session_id=self.session_id, model_id=self.model_id, seq_id=0, rows=(self._row(),)
        )

    def do(self, kind: str, **body: Any) -> int:
        self.seq_id += 1
        return self.bench.append(kind, body, session_id=self.session_id, model_id=self.model_id, seq_id=self.seq_id)

    def step(self, **adam: float) -> int:
        return self.do("optim_step", adam_params={"learning_rate": 0.01, "eps": 1e-8} | adam)

    def message(self, loss_fn: str = "cross_entropy", **config: float) -> pb.ForwardBackwardRequest:
        self.seq_id += 1
        message = pb.ForwardBackwardRequest(model_id=self.model_id, seq_id=self.seq_id, loss_fn=loss_fn)
        for name, value in config.items():
            message.loss_fn_config_v2[name].number = value
        return message

    def send(self, message: pb.ForwardBackwardRequest) -> int:
        return self.bench.append(
            "forward" if message.forward_only else "forward_backward",
            message.SerializeToString(),
            session_id=self.session_id,
            model_id=self.model_id,
            seq_id=message.seq_id,
            payload_type=codec.PROTOBUF,
            tokens_in=sum(len(chunk.encoded_text.tokens) // 4 for datum in message.data for chunk in datum.model_input),
        )

    def train(self, seed: int = 0, lengths: tuple[int, ...] = (6, 11), forward_only: bool = False) -> int:
        rng = np.random.default_rng(seed)
        message = self.message()
        message.forward_only = forward_only
        for length in lengths:
            ids = rng.integers(0, 2000, length + 1).tolist()
            datum(message, ids[:-1], target_tokens=ids[1:], weights=[1.0] * length)
        return self.send(message)

    def snapshot(self, kind: str = "snapshot") -> tuple[int, str]:
        """An unnamed save: its request id and the sampler that it makes."""
        number, self.sampler_seq = self.sampler_seq, self.sampler_seq + 1
        sampler = Sampler(
            sampler_id=paths.sampler_id(self.session_id, number), session_id=self.session_id, seq=number,
            base_model=BASE, served_name=BASE, kind=kind, created_at=now(),
        )  # fmt: skip
        self.seq_id += 1
        request_id = self.bench.append(
            "save_weights_for_sampler",
            {"model_id": self.model_id, "sampling_session_seq_id": number, "kind": kind},
            session_id=self.session_id,
            model_id=self.model_id,
            seq_id=self.seq_id,
            rows=(sampler,),
        )
        return request_id, sampler.sampler_id

    def sampler(self, model_path: str | None = None) -> str:
        """A sampling session on a path or on the base model."""
        number, self.sampler_seq = self.sampler_seq, self.sampler_seq + 1
        sampler = Sampler(
            sampler_id=paths.sampler_id(self.session_id, number), session_id=self.session_id, seq=number,
            base_model=BASE, served_name=BASE, model_path=model_path, created_at=now(),
            kind="base" if model_path is None else "path",
        )  # fmt: skip
        with writing(self.bench.db) as db:
            db.merge(sampler)
        return sampler.sampler_id

    def sample(self, sampler_id: str | None, tokens: list[int], /, **body: Any) -> int:
        params = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "stop": []} | body.pop("params", {})
        number = self.sample_seqs.get(sampler_id or "", 0)
        self.sample_seqs[sampler_id or ""] = number + 1
        request = {"prompt": {"chunks": [{"tokens": tokens}]}, "sampling_params": params, "num_samples": 1} | body
        return self.bench.append(
            "sample", request, session_id=self.session_id, sampler_id=sampler_id,
            seq_id=None if sampler_id is None else number, num_sequences=request["num_samples"],
        )  # fmt: skip
