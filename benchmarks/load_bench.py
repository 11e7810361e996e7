"""Many clients at once against one server: does the queue hold, what do heartbeats cost, does memory stay flat.

usage: python benchmarks/load_bench.py --start stub [--clients 200 --samples 100000 --waiting 2000 --trainers 8]
       python benchmarks/load_bench.py --start /path/of/a/model --clients 20 --samples 400 --waiting 200

``--start stub`` starts an API and ``stub_engine.py`` (the engine without compute); a path starts the real engine on
that model. Each client opens a session, sends its share of the samples, then keeps as many futures waiting as its
share of ``--waiting``, until all are answered; a process of its own sends each client's heartbeat every
``--heartbeat-s``, as the SDK does, and measures. Trainers do forward_backward and optim_step in turn meanwhile.
``--backlog`` samples of a client that asks for no answers are in the queue before. 408, 429, 5xx and broken connections
are tried again, as the SDK does; anything else is an error. Prints one JSON line; with the
stub every answer is checked to be its own request's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tx.tinker.db import Session, now, open_database
from tx.tinker.jobs import JobTable, NewJob
from tx.tinker.sessions import Sessions
from tx.tinker.wire import tinker_pb2 as pb

STUB_MODEL = "stub/model"
TRIED_AGAIN = {408, 409, 429, 500, 502, 503, 504}
_READY_S = 300.0


@dataclass
class Tally:
    """What was measured."""

    statuses: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    heartbeats_s: list[float] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    most_waiting: int = 0
    steps: int = 0


class Connection:
    """HTTP/1.1 with keep-alive on one socket at a time: an SDK client has as many as it has calls under way."""

    def __init__(self, host: str, port: int, tally: Tally) -> None:
        self._at = host, port
        self._tally = tally
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(
        self, path: str, body: Any, kind: str = "application/json", accept: str = "*/*"
    ) -> tuple[str, bytes]:
        """Content type and body of the 200; tries again what the SDK would."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST /api/v1/{path} HTTP/1.1\r\nhost: load\r\ncontent-type: {kind}\r\naccept: {accept}\r\n"
        message = f"{head}x-api-key: tml-load\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
        while True:
            try:
                status, content_type, reply = await self._exchange(message)
            except (OSError, asyncio.IncompleteReadError):
                self.close()
                self._tally.statuses["broken connection"] += 1
                await asyncio.sleep(0.5)
                continue
            self._tally.statuses[f"{path} {status}"] += 1
            if status == 200:
                return content_type, reply
            if status not in TRIED_AGAIN:
                self._tally.errors.append(f"{path} {status} {reply[:200]!r}")
                raise RuntimeError(self._tally.errors[-1])
            if status != 408:
                await asyncio.sleep(1.0)

    async def _exchange(self, message: bytes) -> tuple[int, str, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._at)
        reader, writer = self._streams
        writer.write(message)
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), headers["content-type"], await reader.readexactly(int(headers["content-length"]))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def closed(self) -> None:
        if self._streams is not None:
            writer = self._streams[1]
            self.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Client:
    """One program with the SDK: a session, a sampler, its heartbeats."""

    def __init__(self, flags: argparse.Namespace, number: int, tally: Tally) -> None:
        self.flags, self.number, self.tally = flags, number, tally
        self._idle: list[Connection] = []
        self.session_id = ""

    async def call(self, path: str, body: Any, **options: str) -> tuple[str, bytes]:
        """A call on a free connection."""
        connection = self._idle.pop() if self._idle else Connection("127.0.0.1", self.flags.port, self.tally)
        try:
            return await connection.call(path, body, **options)
        finally:
            self._idle.append(connection)

    async def close(self) -> None:
        """Hang up."""
        await asyncio.gather(*(connection.closed() for connection in self._idle))

    async def json(self, path: str, **body: Any) -> Any:
        return json.loads((await self.call(path, body))[1])

    async def future(self, request_id: str) -> bytes:
        """The result, protobuf or JSON."""
        self.tally.waiting += 1
        self.tally.most_waiting = max(self.tally.most_waiting, self.tally.waiting)
        _, reply = await self.call("retrieve_future", {"request_id": request_id}, accept="application/x-protobuf")
        self.tally.waiting -= 1
        self.tally.answered[request_id] += 1
        return reply

    async def heartbeats(self) -> None:
        await asyncio.sleep(self.flags.heartbeat_s * self.number / self.flags.clients)
        while True:
            started = time.perf_counter()
            await self.json("session_heartbeat", session_id=self.session_id)
            self.tally.heartbeats_s.append(time.perf_counter() - started)
            await asyncio.sleep(max(0.0, started + self.flags.heartbeat_s - time.perf_counter()))

    async def open(self) -> None:
        self.session_id = (await self.json("create_session", tags=[]))["session_id"]

    async def sample(self, count: int, parallel: int) -> list[tuple[int, str]]:
        """Send them all; the first token of each prompt, which the stub answers with, and the request id."""
        sampler = (
            await self.json(
                "create_sampling_session",
                session_id=self.session_id,
                sampling_session_seq_id=0,
                base_model=self.flags.model,
            )
        )["sampling_session_id"]
        sent: list[tuple[int, str]] = []
        numbers = iter(range(count))

        async def send() -> None:
            for seq in numbers:
                token = 1 + (self.number * 7919 + seq) % 1000
                prompt = {"chunks": [{"type": "encoded_text", "tokens": [token, *range(1, self.flags.prompt)]}]}
                params = {"max_tokens": self.flags.max_tokens}
                body = {"sampling_session_id": sampler, "seq_id": seq, "num_samples": 1, "prompt": prompt}
                reply = await self.json("asample", **body, sampling_params=params)
                sent.append((token, reply["request_id"]))

        await asyncio.gather(*(send() for _ in range(parallel)))
        return sent

    async def collect(self, sent: list[tuple[int, str]], parallel: int) -> None:
        """Wait for all, so many at a time."""
        left = iter(sorted(sent, key=lambda each: int(each[1])))

        async def take() -> None:
            for token, request_id in left:
                reply = pb.SampleResponse.FromString(await self.future(request_id))
                expected = token.to_bytes(4, "little")
                if self.flags.start == "stub" and [each.tokens for each in reply.sequences] != [expected]:
                    self.tally.errors.append(f"request {request_id}: somebody else's answer")

        await asyncio.gather(*(take() for _ in range(parallel)))

    async def train(self, stop: asyncio.Event) -> None:
        """forward_backward and optim_step until told to stop."""
        lora = {"rank": 8, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}
        body = {"session_id": self.session_id, "model_seq_id": 0, "base_model": self.flags.model, "lora_config": lora}
        model_id = json.loads(await self.future((await self.json("create_model", **body))["request_id"]))["model_id"]
        seq_id = 0
        while not stop.is_set():
            seq_id += 1
            message = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
            datum = message.data.add()
            datum.model_input.add().encoded_text.tokens = b"".join(n.to_bytes(4, "little") for n in range(1, 33))
            targets = b"".join(n.to_bytes(8, "little") for n in range(2, 34))
            for name, content, dtype in (
                ("target_tokens", targets, pb.DTYPE_INT64),
                ("weights", b"\0\0\x80?" * 32, pb.DTYPE_FLOAT32),
            ):
                datum.loss_fn_inputs[name].CopyFrom(pb.Tensor(dense=content, dtype=dtype, shape=[32]))
            _, reply = await self.call("forward_backward", message.SerializeToString(), kind="application/x-protobuf")
            seq_id += 1
            adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
            step = await self.json("optim_step", model_id=model_id, seq_id=seq_id, adam_params=adam)
            result = pb.ForwardBackwardOutput.FromString(await self.future(json.loads(reply)["request_id"]))
            metrics = json.loads(await self.future(step["request_id"]))["metrics"]
            if self.flags.start == "stub" and (result.metrics["loss:sum"] != sum(range(1, 33)) or not metrics):
                self.tally.errors.append(f"{model_id} seq {seq_id}: somebody else's answer")
            self.tally.steps += 1


def _beat(flags: argparse.Namespace, session_ids: list[str], parent: Any) -> None:
    """The clients' heartbeats, until the parent says so; then what each took, in seconds."""

    async def beat() -> Tally:
        tally = Tally()
        tasks = []
        for number, session_id in enumerate(session_ids):
            client = Client(flags, number, tally)
            client.session_id = session_id
            tasks.append(asyncio.create_task(client.heartbeats()))
        parent.send("beating")
        await asyncio.to_thread(parent.recv)
        for task in tasks:
            task.cancel()
        return tally

    parent.send(asyncio.run(beat()))


def _fill(flags: argparse.Namespace) -> None:
    """Put the backlog into the queue, past HTTP."""
    url = flags.database_url or f"sqlite:///{Path(flags.data_dir) / 'tx.db'}"
    db = open_database(url)
    session_id = Sessions(db).create(Session(session_id="", created_at=now(), heartbeat_at=now() + 86400.0))
    body = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1, "seed": 1}}
    body |= {"sampling_session_id": f"{session_id}:sample:0", "seq_id": 0, "num_samples": 1}
    job = NewJob("sample", flags.model, json.dumps(body).encode(), session_id, num_sequences=1, tokens_in=1)
    for start in range(0, flags.backlog, 500):
        JobTable(db).append([job] * min(500, flags.backlog - start))
    db.dispose()


class Processes:
    """The server under load and what it uses, read from /proc once a second."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self.samples: list[dict[str, float]] = []
        common = ["--data-dir", flags.data_dir, "--log-level", "warning", "--base-model", flags.model]
        if flags.database_url:
            common += ["--database-url", flags.database_url]
        api = ["--port", str(flags.port), "--max-queued-samples", str(2 * flags.samples + flags.backlog + 1)]
        api += ["--api-workers", str(flags.api_workers)]
        api += ["--external-engine"] if flags.start == "stub" else []
        commands = [[sys.executable, "-m", "tx.tinker.api", *common, *api]]
        if flags.start == "stub":
            stub = str(Path(__file__).with_name("stub_engine.py"))
            commands.append([sys.executable, stub, *common, "--slice-s", str(flags.slice_s), "--slots", "64"])
        environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        self._started = [subprocess.Popen(command, env=environment) for command in commands]

    def stop(self) -> None:
        for process in self._started:
            process.send_signal(signal.SIGTERM)
        for process in self._started:
            process.wait()

    async def watch(self) -> None:
        while True:
            self.samples.append(await asyncio.to_thread(self.read))
            await asyncio.sleep(1.0)

    def read(self) -> dict[str, float]:
        """Resident MB and open sockets, of the API processes together and of the engine; MB of the database."""
        found = {"api_mb": 0.0, "engine_mb": 0.0, "api_sockets": 0.0, "engine_sockets": 0.0}
        for pid in self._family():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                entries = list(Path(f"/proc/{pid}/fd").iterdir())
            except OSError:
                continue
            links = []
            for entry in entries:
                with contextlib.suppress(OSError):  # closed meanwhile
                    links.append(os.readlink(entry))
            part = "engine" if "engine.py" in command or "tx.tinker.engine" in command else "api"
            found[f"{part}_mb"] += pages * resource.getpagesize() / 2**20
            found[f"{part}_sockets"] += sum(link.startswith("socket:") for link in links)
        files = Path(self._flags.data_dir).glob("tx.db*")
        found["database_mb"] = sum(file.stat().st_size for file in files if file.is_file()) / 2**20
        return found

    def _family(self) -> list[int]:
        pids = [process.pid for process in self._started]
        for pid in pids:
            for thread in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += [int(child) for child in thread.read_text().split()]
        return pids


async def _ready(flags: argparse.Namespace) -> None:
    for _ in range(int(_READY_S / 0.2)):
        await asyncio.sleep(0.2)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", flags.port)
        except OSError:
            continue
        writer.write(b"GET /api/v1/healthz HTTP/1.1\r\nhost: load\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        if b" 200 " in answer.partition(b"\r\n")[0]:
            return
    raise TimeoutError(f"the server was not ready within {_READY_S:.0f} s")


async def load(flags: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The whole run; what it found."""
    await _ready(flags)
    tally, stop = Tally(), asyncio.Event()
    clients = [Client(flags, number, tally) for number in range(flags.clients)]
    trainers = [Client(flags, flags.clients + number, tally) for number in range(flags.trainers)]
    await asyncio.gather(*(client.open() for client in (*clients, *trainers)))
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    beating = multiprocessing.get_context("spawn").Process(
        target=_beat, args=(flags, [client.session_id for client in clients], theirs)
    )
    beating.start()
    await asyncio.to_thread(ours.recv)
    watching = asyncio.create_task(processes.watch())
    training = [asyncio.create_task(client.train(stop)) for client in trainers]
    share, parallel = flags.samples // flags.clients, max(1, flags.waiting // flags.clients)
    began = time.perf_counter()
    sent = await asyncio.gather(*(client.sample(share, flags.sending) for client in clients))
    sent_s, first = time.perf_counter() - began, len(processes.samples)
    await asyncio.gather(*(client.collect(ids, parallel) for client, ids in zip(clients, sent, strict=True)))
    collected_s = time.perf_counter() - began
    stop.set()
    await asyncio.gather(*training)
    watching.cancel()
    ours.send("stop")
    beats_tally = await asyncio.to_thread(ours.recv)
    beating.join()
    await asyncio.gather(*(client.close() for client in (*clients, *trainers)))
    tally.statuses.update(beats_tally.statuses)
    tally.errors += beats_tally.errors
    processes.samples.append(processes.read())
    beats = sorted(beats_tally.heartbeats_s) or [float("nan")]
    wanted = {request_id for ids in sent for _, request_id in ids}
    return {
        "clients": flags.clients,
        "samples": len(wanted),
        "backlog": flags.backlog,
        "unanswered": len(wanted - set(tally.answered)),
        "answered_twice": sum(count > 1 for count in tally.answered.values()),
        "errors": tally.errors[:5],
        "statuses": dict(sorted(tally.statuses.items())),
        "most_waiting": tally.most_waiting,
        "sent_per_s": round(len(wanted) / sent_s, 1),
        "answered_per_s": round(len(wanted) / collected_s, 1),
        "seconds": round(collected_s, 1),
        "training_steps": tally.steps,
        "heartbeats": len(beats),
        "heartbeat_p50_ms": round(1000 * statistics.median(beats), 1),
        "heartbeat_p99_ms": round(1000 * beats[min(len(beats) - 1, int(0.99 * len(beats)))], 1),
        "heartbeat_max_ms": round(1000 * beats[-1], 1),
        "usage": {name: _course([each[name] for each in processes.samples], first) for name in processes.samples[0]},
    }


def _course(values: list[float], sent: int) -> dict[str, float]:
    """At the start, when all was sent, at the end, and the most."""
    picked = {"start": values[0], "sent": values[min(sent, len(values) - 1)], "end": values[-1], "most": max(values)}
    return {name: round(value, 1) for name, value in picked.items()}


def _flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--start", default="stub", help="stub, or the folder of a model for the real engine")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--samples", type=int, default=100_000, help="of all clients together")
    parser.add_argument("--backlog", type=int, default=0, help="samples that are queued before the clients come")
    parser.add_argument("--waiting", type=int, default=2000, help="futures that wait at once, of all clients together")
    parser.add_argument("--sending", type=int, default=2, help="samples that one client sends at once")
    parser.add_argument("--trainers", type=int, default=8)
    parser.add_argument("--heartbeat-s", type=float, default=10.0)
    parser.add_argument("--prompt", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--slice-s", type=float, default=0.05, help="what the stub takes for 64 sequences")
    parser.add_argument("--api-workers", type=int, default=1)
    parser.add_argument("--database-url", help="default: SQLite in the data folder")
    parser.add_argument("--data-dir", help="default: a new folder")
    parser.add_argument("--port", type=int, default=0)
    flags = parser.parse_args(argv)
    flags.model = STUB_MODEL if flags.start == "stub" else flags.start
    flags.data_dir = flags.data_dir or tempfile.mkdtemp(prefix="tx-load-")
    if not flags.port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            flags.port = probe.getsockname()[1]
    return flags


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """One run; its figures are printed and returned."""
    flags = _flags(argv)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    _fill(flags)
    processes = Processes(flags)
    try:
        figures = asyncio.run(load(flags, processes))
    finally:
        processes.stop()
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
