"""The API in this process around a real database, and a stand-in for the engine that answers what it claims."""

from __future__ import annotations

import itertools
import json
import threading

import pytest
from fastapi.testclient import TestClient
from sqlmodel import select

from tests.support.openapi import Document
from tx import types
from tx.tinker import db as tables
from tx.tinker.api import create_app
from tx.tinker.config import TxConfig
from tx.tinker.db import Checkpoint, Engine, Model, now, open_database, writing
from tx.tinker.jobs import JobTable, Outcome
from tx.tinker.notify import ChangeSignal
from tx.tinker.service import Service
from tx.tinker.wire import codec

BASE = "org/base"
ALIAS = "org/alias"


class StandInEngine:
    """Claims like the engine and answers without computing; ``seen`` is what it claimed, in order."""

    def __init__(self, url: str) -> None:
        self.db = open_database(url)
        self._signal = ChangeSignal(url)
        self._jobs = JobTable(self.db, self._signal)
        self._stop = threading.Event()
        self.seen: list[tables.Job] = []
        self.beat()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def beat(self, state: str = "ready", age_s: float = 0.0, pid: int = 1, detail: str = "") -> None:
        with writing(self.db) as session:
            session.merge(
                Engine(
                    base_model=BASE,
                    served_names=[ALIAS],
                    state=state,
                    detail=detail,
                    decode_slots=2,
                    pid=pid,
                    max_context=512,
                    tokenizer="org/tokenizer",
                    started_at=now(),
                    heartbeat_at=now() - age_s,
                )
            )

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._signal.close()
        self.db.dispose()

    def _run(self) -> None:
        while not self._stop.is_set():
            for job in self._jobs.claim(BASE, 100):
                self.seen.append(job)
                if job.payload and b"fail me" in job.payload:
                    self._jobs.fail(job.request_id, "sampling_params.stop: no", "user")
                else:
                    self._jobs.commit([self._answer(job)])
            self._signal.wait(0.05)

    def _answer(self, job: tables.Job) -> Outcome:
        body = json.loads(job.payload) if job.payload_type == "application/json" else {}
        rows: list = []
        if job.kind in ("forward", "forward_backward"):
            import numpy as np

            result = types.ForwardBackwardResult([np.array([-1.0, -2.0], np.float32)], {"loss:sum": 3.0})
            return Outcome(job.request_id, codec.encode_forward_backward(result), codec.FORWARD_BACKWARD_OUTPUT)
        if job.kind == "sample":
            import numpy as np

            sequence = types.SampledSequence(np.array([7, 8], np.int32), np.array([-0.5, -1], np.float32), "length")
            result = codec.encode_sample(types.SampleResult([sequence]))
            return Outcome(job.request_id, result, codec.SAMPLE_RESPONSE, tokens_out=2, tokens_cached=1)
        if job.kind in ("create_model", "load_weights") and job.seq_id == 0:
            with tables.reading(self.db) as session:
                model = session.get(Model, job.model_id)
            model.state = "ready"
            rows = [model]
            answer = {"model_id": job.model_id, "type": job.kind}
            if job.kind == "load_weights":
                answer["path"] = body["path"]
        elif job.kind in ("save_weights", "save_weights_for_sampler") and body.get("path"):
            kind = "weights" if job.kind == "save_weights" else "sampler_weights"
            with tables.reading(self.db) as session:
                named = {"model_id": job.model_id, "kind": kind, "name": body["path"]}
                replaced = session.exec(select(Checkpoint.id).filter_by(**named)).first()
            rows = [
                Checkpoint(
                    id=replaced,
                    model_id=job.model_id,
                    kind=kind,
                    name=body["path"],
                    folder=f"{job.model_id}/{kind}/{body['path']}",
                    size_bytes=10,
                    created_at=now(),
                    expires_at=now() + body["ttl_seconds"] if "ttl_seconds" in body else None,
                    seq_id=job.seq_id,
                )
            ]
            answer = {"path": f"tinker://{job.model_id}/{kind}/{body['path']}", "type": job.kind}
        elif job.kind == "save_weights_for_sampler":
            answer = {"sampling_session_id": f"{job.session_id}:sample:{body['sampling_session_seq_id']}", "path": None}
            answer["type"] = job.kind
        elif job.kind == "load_weights":
            answer = {"model_id": job.model_id, "path": body["path"], "type": job.kind}
        elif job.kind == "unload_model":
            answer = {"model_id": job.model_id, "type": job.kind}
        elif job.kind == "optim_step":
            answer = {"metrics": {"grad_norm:mean": 1.0}, "type": job.kind}
        else:
            answer = {"path": f"tinker://{job.model_id}/external_weights/{body['path']}", "type": job.kind}
        return Outcome(job.request_id, codec.encode_json(answer), rows=rows)


_document: Document | None = None  # the same for every service


class Client(TestClient):
    """HTTP client with the protocol's everyday sequences. Every reply has to be one that the document declares."""

    def __init__(self, service: Service) -> None:
        super().__init__(create_app(service), base_url="http://test/api/v1/")
        self.service = service
        self._seq = itertools.count(1)

    def request(self, *args, **kwargs):
        reply = super().request(*args, **kwargs)
        for one in (*reply.history, reply):
            self._document().check(one, self.app.root_path)
        return reply

    def _document(self) -> Document:
        global _document
        if _document is None:
            _document = Document(self.app.openapi())
        return _document

    def ask(self, route: str, /, status: int = 200, **body) -> dict:
        reply = self.post(route, json=body)
        assert reply.status_code == status, reply.text
        return reply.json()

    def result(self, future: dict, **headers) -> dict:
        reply = self.post("retrieve_future", json={"request_id": future["request_id"]}, headers=headers)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def new_session(self) -> str:
        return self.ask("create_session", tags=[], user_metadata={})["session_id"]

    def new_sampler(self, session: str | None = None, n: int = 0) -> str:
        ask = {"session_id": session or self.new_session(), "sampling_session_seq_id": n, "base_model": ALIAS}
        return self.ask("create_sampling_session", **ask)["sampling_session_id"]

    def sample(self, sampler: str, seq: int = 0, status: int = 200, **extra) -> dict:
        body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": {"chunks": [{"tokens": [1, 2, 3]}]}}
        return self.ask("asample", status, **body | extra)

    def new_model(self, session: str | None = None, n: int = 0, **lora) -> str:
        session = session or self.new_session()
        config = {"rank": 8} | lora
        future = self.ask("create_model", session_id=session, model_seq_id=n, base_model=ALIAS, lora_config=config)
        return self.result(future)["model_id"]


@pytest.fixture
def db(database_url):
    """An empty database; the test runs on both."""
    database = tables.open_database(database_url)
    yield database
    database.dispose()


@pytest.fixture
def config(tmp_path):
    return TxConfig(base_model=BASE, data_dir=tmp_path, database_url=f"sqlite:///{tmp_path / 'tx.db'}")


@pytest.fixture
def service(config):
    made = Service(config, open_database(config.resolved_database_url))
    yield made
    made.close()


@pytest.fixture
def engine(config, service):
    made = StandInEngine(config.resolved_database_url)
    yield made
    made.close()


@pytest.fixture
def running(engine):
    """An engine that answers."""
    engine.start()
    return engine


@pytest.fixture
def client(service, engine):
    with Client(service) as made:
        yield made
