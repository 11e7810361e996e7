"""What the engine does for each kind of job: one handler per kind, from a stored payload to an outcome.

A handler finishes at once (``Outcome``), or leaves files to be written (``Writing``), or hands its rows to the
worker (None), whose result comes back through ``finish``. It raises what is wrong with the job and with it alone, or
StillReading before it has had any effect: it is called again when the checkpoint that it needs has been read.
When a job may start is the scheduler's to say; how a lost model comes back is in ``tx.tinker.rebuild``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.engine import Engine as Database
from sqlmodel import SQLModel, select

from tx import types
from tx.errors import InvalidInput, ModelLost, NotFound, Unsupported
from tx.tinker import age_files, model_files, recordings
from tx.tinker.checkpoint_rows import at_path, has_expired
from tx.tinker.checkpoints import CheckpointCard, CheckpointFolders, check_ttl
from tx.tinker.db import Checkpoint, Job, Model, Sampler, now, reading
from tx.tinker.jobs import Outcome
from tx.tinker.reads import Reads
from tx.tinker.uptime import Uptime
from tx.tinker.wire import codec, paths
from tx.tinker.wire.optimizer import adam_params, check_optimizer_config
from tx.tinker.wire.paths import TinkerPath
from tx.tinker.writes import Writes, Writing
from tx.worker.worker import Worker

MAX_SNAPSHOTS = 128
"""Snapshots that the worker keeps, on the device or parked; older ones come back from disk or by replay when used."""


@dataclass(frozen=True)
class SnapshotNeed:
    """The weights that a sample runs on: a checkpoint's, or those of ``model_id`` when job ``request_id`` ran."""

    snapshot_id: str
    checkpoint: Checkpoint | None = None
    model_id: str = ""
    request_id: int = 0


class Work:
    """The handlers, and what they share. Driven by the engine's one thread."""

    def __init__(
        self, db: Database, worker: Worker, folders: CheckpointFolders, base_model: str, uptime: Uptime
    ) -> None:
        self._db = db
        self._worker = worker
        self._folders = folders
        self._base_model = base_model
        self._uptime = uptime
        self._snapshots: OrderedDict[str, None] = OrderedDict()
        self._needs: dict[int, SnapshotNeed | None] = {}  # by sample job that waits for its snapshot
        self.reads = Reads()
        self.writes = Writes()
        self.applied: dict[str, int | None] = {}
        """By model: ``seq_id`` of the last job whose effect its weights and moments hold."""
        self._handlers: dict[str, Callable[[Job, str], Outcome | Writing | None]] = {
            "create_model": self._create_model,
            "load_weights": self._load_weights,
            "unload_model": self._unload_model,
            "forward": self._forward_backward,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "save_weights_external": self._save_weights_external,
            "sample": self._sample,
        }

    def start(self, job: Job) -> Outcome | Writing | None:
        """Do a job, or as much of it as this thread must do."""
        handler = self._handlers.get(job.kind)
        if handler is None:
            raise Unsupported("type", job.kind, "one of " + ", ".join(self._handlers))
        return handler(job, job.model_id or "")

    def redo(self, job: Job, target: str, job_id: int) -> bool:
        """Repeat the effect of a finished job on the model ``target``; True if the worker will report ``job_id``."""
        if job.kind == "forward_backward":
            request = self._decode(job, replaying=True)
            self._worker.submit_forward_backward(job_id, replace(request, model_id=target), alone=True)
            return True
        if job.kind == "load_weights":
            self._check_unchanged(job)
        self._handlers[job.kind](job, target)
        return False

    def finish(self, job: Job, result: types.ForwardBackwardResult | types.SampleResult) -> Outcome:
        """The outcome of a job that the worker has done."""
        if isinstance(result, types.ForwardBackwardResult):
            encoded = codec.encode_forward_backward(result)
            return Outcome(_id(job), encoded, codec.FORWARD_BACKWARD_OUTPUT)
        request = codec.decode_sample(_payload(job))
        rows: Sequence[SQLModel] = ()
        if request.record_stability_info:
            session_id = job.session_id or paths.session_of(job.sampler_id or "", "sampling_session_id")
            rows = recordings.rows_of(_id(job), session_id, request, result)
        num_tokens = sum(sequence.tokens.size for sequence in result.sequences)
        return Outcome(
            _id(job),
            codec.encode_sample(result),
            codec.SAMPLE_RESPONSE,
            tokens_out=num_tokens,
            tokens_cached=result.prompt_cache_hit_tokens,
            rows=rows,
        )

    def forget(self, job: Job) -> None:
        """Let go of what was noted of a job that will not be started."""
        self._needs.pop(_id(job), None)

    def rows_of_failure(self, job: Job) -> list[SQLModel]:
        """Rows to commit with a failed job: a model that could not be created is marked so."""
        self.forget(job)
        if job.kind not in ("create_model", "load_weights") or job.seq_id != 0:
            return []
        with reading(self._db) as session:
            model = session.get(Model, job.model_id)
        return [] if model is None else [_changed(model, state="failed")]

    # ---- models -----------------------------------------------------------------------------------------------

    def _create_model(self, job: Job, model_id: str) -> Outcome:
        model = self._model(job)
        check_optimizer_config(codec.parse_json(_payload(job)).get("optimizer_config"))
        self._worker.create_model(model_id, lora_of(model))
        self.applied[model_id] = job.seq_id
        result = {"model_id": model.model_id, "type": "create_model"}
        return Outcome(_id(job), codec.encode_json(result), rows=[_changed(model, state="ready")])

    def _load_weights(self, job: Job, model_id: str) -> Outcome:
        request = codec.parse_json(_payload(job))
        model = self._model(job)
        check_optimizer_config(request.get("optimizer_config"))
        path = paths.parse_path(str(request.get("path")))
        if path.kind != "weights":
            raise InvalidInput("path", str(path), "a training checkpoint, tinker://<model_id>/weights/<name>")
        checkpoint = self._checkpoint(path)
        if checkpoint is None or has_expired(checkpoint, now()):
            raise NotFound("path", str(path), "a checkpoint that exists")
        state = self.read_state(checkpoint)
        with_optimizer = bool(request.get("optimizer"))
        if with_optimizer and not checkpoint.has_optimizer:
            raise InvalidInput("optimizer", True, f"false: {path} holds no optimizer state")
        wanted, given = lora_of(model).requested, state.lora.requested
        if job.seq_id != 0 and given != wanted:
            shown, accepted = (", ".join(f"{name}={value}" for name, value in each.items()) for each in (given, wanted))
            raise InvalidInput("path", f"a checkpoint of {shown}", f"{accepted}, as the model was created")
        self._worker.restore_model(model_id, state, with_optimizer)
        self.applied[model_id] = job.seq_id
        lora = state.lora
        row = _changed(
            model, state="ready", rank=lora.rank, seed=lora.seed, source_path=str(path),
            train_attn=lora.train_attn, train_mlp=lora.train_mlp, train_unembed=lora.train_unembed,
        )  # fmt: skip
        result: dict[str, Any] = {"path": str(path), "model_id": model.model_id, "type": "load_weights"}
        result["saved_at"] = checkpoint.created_at  # not the protocol's: tells a replay whether it was overwritten
        return Outcome(_id(job), codec.encode_json(result), rows=[row])

    def _check_unchanged(self, job: Job) -> None:
        """Refuse to replay a load from a path that has other weights by now."""
        if job.result is None:
            return
        result = codec.parse_json(job.result)
        checkpoint = self._checkpoint(paths.parse_path(result["path"]))
        if checkpoint is None or checkpoint.created_at != result.get("saved_at"):
            raise ModelLost(f"{job.model_id} was loaded from {result['path']}, which has been deleted or overwritten.")

    def _unload_model(self, job: Job, model_id: str) -> Outcome:
        self._worker.drop_model(model_id)
        self.applied.pop(model_id, None)
        return Outcome(_id(job), codec.encode_json({"model_id": model_id, "type": "unload_model"}))

    def read_state(self, checkpoint: Checkpoint) -> types.ModelState:
        """The verified state of a checkpoint of this base model; raises StillReading until a thread has read it.

        A copy's files lie with its source's.
        """
        key = f"{checkpoint.folder}?{checkpoint.created_at!r}"
        return self.reads.take(key, lambda: self._read_now(checkpoint.folder))

    def _read_now(self, folder: str) -> types.ModelState:
        card, files = self._folders.read(folder)
        if card.base_model != self._base_model:
            raise InvalidInput("path", f"a checkpoint of {card.base_model}", f"one of {self._base_model}")
        return model_files.from_files(card, files, card.num_experts_per_tok)

    # ---- training ---------------------------------------------------------------------------------------------

    def _forward_backward(self, job: Job, model_id: str) -> None:
        self._worker.submit_forward_backward(_id(job), replace(self._decode(job), model_id=model_id))

    def _decode(self, job: Job, *, replaying: bool = False) -> types.ForwardBackward:
        request = codec.decode_forward_backward(_payload(job), job.payload_type, job.payload_encoding)
        session_id = paths.session_of(job.model_id or "")
        since, _ = self._uptime.span(recordings.USABLE_S)
        return recordings.resolve(self._db, request, session_id, usable_since=since, replaying=replaying)

    def _optim_step(self, job: Job, model_id: str) -> Outcome:
        metrics = self._worker.optim_step(model_id, adam_params(codec.parse_json(_payload(job))))
        self.applied[model_id] = job.seq_id
        return Outcome(_id(job), codec.encode_json({"metrics": metrics, "type": "optim_step"}))

    # ---- saving -----------------------------------------------------------------------------------------------

    def _save_weights(self, job: Job, model_id: str) -> Writing:
        request = codec.parse_json(_payload(job))
        path = self._new_path(job, request)
        return self._write(job, request, path, self._worker.export_model(model_id))

    def _save_weights_for_sampler(self, job: Job, model_id: str) -> Outcome | Writing:
        request = codec.parse_json(_payload(job))
        if request.get("path") is None and request.get("sampling_session_seq_id") is not None:
            return self._take_ephemeral(job, model_id)
        path = self._new_path(job, request)
        return self._write(job, request, path, self._worker.export_model(model_id))

    def _save_weights_external(self, job: Job, model_id: str) -> Writing:
        """A PEFT folder to take away, encrypted if the request names recipients."""
        request = codec.parse_json(_payload(job))
        recipients = age_files.parse_recipients(request.get(age_files.FIELD))
        path = self._new_path(job, request)
        return self._write(job, request, path, self._worker.export_model(model_id), recipients)

    def _take_ephemeral(self, job: Job, model_id: str) -> Outcome:
        """An unnamed save: a snapshot and the sampler that is bound to it, nothing on disk."""
        with reading(self._db) as session:
            sampler = session.get(Sampler, made_sampler(job))
        if sampler is None:
            raise NotFound("sampling_session_seq_id", made_sampler(job), "a number that makes a sampler")
        snapshot_id = f"{model_id}@{job.request_id}"
        self._worker.take_snapshot(model_id, snapshot_id)
        self._hold(snapshot_id)
        result = {"sampling_session_id": sampler.sampler_id, "path": None, "type": "save_weights_for_sampler"}
        return Outcome(_id(job), codec.encode_json(result), rows=[_changed(sampler, snapshot_id=snapshot_id)])

    def must_wait_to_write(self, job: Job) -> bool:
        """Whether a save has to wait for another: too many are under way, or one to the same path."""
        name = _name(job, codec.parse_json(_payload(job)))
        return self.writes.are_full or f"tinker://{job.model_id}/{paths.KIND_OF_SAVE[job.kind]}/{name}" in self.writes

    def _new_path(self, job: Job, request: dict[str, Any]) -> TinkerPath:
        """Where to save; refused if the name is taken and ``overwrite`` doesn't say so."""
        name = _name(job, request)
        path = TinkerPath(job.model_id or "", paths.KIND_OF_SAVE[job.kind], paths.check_name(name))
        check_ttl(request.get("ttl_seconds"))
        taken = str(path) in self.writes or self._checkpoint(path) is not None
        if taken and not request.get("overwrite"):
            raise InvalidInput("path", name, "a name that is not taken, or overwrite=true")
        return path

    def _place(self, path: TinkerPath, job: Job) -> TinkerPath:
        """Where the files go: in no folder that a row names, as copies share theirs and readers may be under way."""
        if self._is_named(path.folder) or str(path) in self.writes or self._checkpoint(path) is not None:
            return replace(path, name=f"{path.name}@{job.request_id}")  # no client may have "@" in a name
        return path

    def _write(
        self,
        job: Job,
        request: dict[str, Any],
        path: TinkerPath,
        state: types.ModelState,
        recipients: Sequence[Any] = (),
    ) -> Writing:
        created_at, ttl_s = now(), check_ttl(request.get("ttl_seconds"))
        with_optimizer = path.kind == "weights"
        if path.kind == "sampler_weights":  # hot for the sampler that will ask for it, and refused if not finite
            self._worker.take_snapshot(path.model_id, _checkpoint_snapshot(path, created_at))
            self._hold(_checkpoint_snapshot(path, created_at))
        card = CheckpointCard(self._base_model, state.lora, state.step, created_at, model_files.experts_per_tok(state))
        applied = self.applied.get(path.model_id)
        place = self._place(path, job)
        replaced: Checkpoint | None = None

        def write() -> int:
            files = model_files.to_files(state, self._base_model, with_optimizer=with_optimizer)
            if recipients:
                files = age_files.encrypt(files, recipients)
            folder_bytes = self._folders.write(place, card, files)
            return sum(map(len, files.values())) if path.kind == "external_weights" else folder_bytes

        def outcome(size_bytes: int) -> Outcome:
            nonlocal replaced
            replaced = self._checkpoint(path)
            row = Checkpoint(
                id=None if replaced is None else replaced.id,
                model_id=path.model_id,
                kind=path.kind,
                name=path.name,
                folder=place.folder,
                size_bytes=size_bytes,
                created_at=created_at,
                expires_at=None if ttl_s is None else created_at + ttl_s,
                user_metadata=request.get("user_metadata") or {},
                seq_id=applied,
                has_optimizer=with_optimizer,
            )
            result: dict[str, Any] = {"path": str(path), "type": job.kind}
            if path.kind == "external_weights":
                result["size_bytes"] = size_bytes
            return Outcome(_id(job), codec.encode_json(result), rows=[row])

        def tidy() -> None:
            if replaced is not None and not self._is_named(replaced.folder):
                self._folders.delete(replaced.folder)

        return Writing(path, write, outcome, tidy)

    # ---- sampling ---------------------------------------------------------------------------------------------

    def snapshot_need(self, job: Job) -> SnapshotNeed | None:
        """The snapshot that a sample runs on; None is the base model. It stays the same while the job waits."""
        if _id(job) not in self._needs:
            self._needs[_id(job)] = self._find_need(job)
        return self._needs[_id(job)]

    def _find_need(self, job: Job) -> SnapshotNeed | None:
        if job.sampler_id is None:
            given = codec.parse_json(_payload(job)).get("model_path")
            return None if given is None else self._path_need(str(given))
        with reading(self._db) as session:
            sampler = session.get(Sampler, job.sampler_id)
        if sampler is None:
            raise NotFound("sampling_session_id", job.sampler_id, "a sampling session of this server")
        if sampler.model_path is not None:
            return self._path_need(sampler.model_path)
        if sampler.kind == "base":
            return None
        if sampler.snapshot_id is None:
            raise NotFound("sampling_session_id", job.sampler_id, "one whose save_weights_for_sampler went well")
        model_id, _, request_id = sampler.snapshot_id.rpartition("@")
        return SnapshotNeed(sampler.snapshot_id, model_id=model_id, request_id=int(request_id))

    def load_snapshot(self, need: SnapshotNeed) -> bool:
        """Make a checkpoint's snapshot resident; False for an ephemeral one that is not: it takes a rebuild."""
        if not self._worker.has_snapshot(need.snapshot_id):
            if need.checkpoint is None:
                return False
            self._worker.load_snapshot(need.snapshot_id, self.read_state(need.checkpoint))
        self._hold(need.snapshot_id)
        return True

    def keep_rebuilt(self, need: SnapshotNeed, rebuilt_model: str) -> None:
        """Take the snapshot again, from a model that was rebuilt for it."""
        self._worker.take_snapshot(rebuilt_model, need.snapshot_id)
        self._worker.drop_model(rebuilt_model)
        self.applied.pop(rebuilt_model, None)
        self._hold(need.snapshot_id)

    def _sample(self, job: Job, _model_id: str) -> None:
        need = self._needs.pop(_id(job))
        request = codec.decode_sample(_payload(job))
        self._worker.submit_sample(_id(job), request, None if need is None else need.snapshot_id)

    def _path_need(self, model_path: str) -> SnapshotNeed:
        path = paths.parse_path(model_path, "model_path")
        checkpoint = self._checkpoint(path)
        if checkpoint is None or has_expired(checkpoint, now()):
            raise NotFound("model_path", model_path, "a checkpoint that exists")
        return SnapshotNeed(_checkpoint_snapshot(path, checkpoint.created_at), checkpoint)

    def _hold(self, snapshot_id: str) -> None:
        """Note a use; the longest unused snapshot goes when there are too many."""
        self._snapshots[snapshot_id] = None
        self._snapshots.move_to_end(snapshot_id)
        while len(self._snapshots) > MAX_SNAPSHOTS:
            oldest, _ = self._snapshots.popitem(last=False)
            self._worker.drop_snapshot(oldest)

    # ---- rows -------------------------------------------------------------------------------------------------

    def _model(self, job: Job) -> Model:
        with reading(self._db) as session:
            model = session.get(Model, job.model_id)
        if model is None:
            raise NotFound("model_id", job.model_id, "a model of this server")
        return model

    def _checkpoint(self, path: TinkerPath) -> Checkpoint | None:
        with reading(self._db) as session:
            return session.exec(at_path(path)).first()

    def _is_named(self, folder: str) -> bool:
        """Whether a checkpoint's files lie in this folder, be it a copy's."""
        with reading(self._db) as session:
            return session.exec(select(Checkpoint.id).where(Checkpoint.folder == folder)).first() is not None


def lora_of(model: Model) -> types.LoraConfig:
    """The adapter that a model's row asks for."""
    return types.LoraConfig(
        rank=model.rank,
        seed=model.seed,
        train_attn=model.train_attn,
        train_mlp=model.train_mlp,
        train_unembed=model.train_unembed,
    )


def made_sampler(job: Job) -> str | None:
    """The sampler that an unnamed save makes; None for every other job."""
    if job.kind != "save_weights_for_sampler":
        return None
    request = codec.parse_json(_payload(job))
    number = request.get("sampling_session_seq_id")
    if request.get("path") is not None or not isinstance(number, int):
        return None
    return paths.sampler_id(paths.session_of(job.model_id or ""), number)


def _checkpoint_snapshot(path: TinkerPath, created_at: float) -> str:
    """A checkpoint that is overwritten is another snapshot, so its time is part of the name."""
    return f"{path}?{created_at!r}"


def _changed(row: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(row, name, value)
    return row


def _id(job: Job) -> int:
    assert job.request_id is not None  # it was read from the table
    return job.request_id


def _payload(job: Job) -> bytes:
    assert job.payload is not None  # only finished jobs are pruned
    return job.payload


def _name(job: Job, request: dict[str, Any]) -> str:
    """What a save is to be called; unchecked."""
    name = request.get("path")
    return f"{job.request_id:06d}" if name is None else str(name)
