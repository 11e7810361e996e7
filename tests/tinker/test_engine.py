"""The engine on a real worker and a real database: every kind of job, order, isolation, restarts."""

from __future__ import annotations

import itertools
import math
import zlib
from pathlib import Path

import numpy as np
import pyrage
import pytest
from sqlmodel import select

from tests.support.compilations import compilations
from tests.tinker.engine_bench import BASE, Bench, Client, body_of, datum, new_worker
from tx.models import peft_import
from tx.tinker import engine as engine_module
from tx.tinker.copies import CopyRequest, copy_checkpoint
from tx.tinker.db import Checkpoint, Model, RecordedSequence, Sampler, Session, now, reading, writing
from tx.tinker.engine import Engine
from tx.tinker.wire import paths
from tx.worker.worker import Worker

PROMPT = [5, 17, 900, 3]


@pytest.fixture(scope="module")
def worker(tiny_qwen3: Path) -> Worker:
    return new_worker(tiny_qwen3)


@pytest.fixture
def bench(tmp_path: Path, sqlite_url: str, tiny_qwen3: Path, worker: Worker):
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3, worker)
    yield bench
    for model_id in {"sess-a:train:0", "sess-a:train:1", "sess-b:train:0"}:
        bench.worker.drop_model(model_id)


def loss(job) -> float:
    return body_of(job)["metrics"]["loss:sum"]


def fails(job, category: str, *words: str) -> None:
    assert (job.status, job.category) == ("failed", category), job.error
    for word in words:
        assert word in job.error


def test_while_idle_it_compiles_what_models_are_likely_to_train_with(tmp_path, sqlite_url, tiny_qwen3):
    worker = Worker(tiny_qwen3, BASE, max_lora_rank=64)  # a rank that no other test here has
    worker.compile_ahead()
    bench, rounds = Bench(tmp_path, sqlite_url, tiny_qwen3, worker), itertools.count()
    with compilations() as compiled:
        bench.engine.run(lambda: "jit(backward)" in compiled or next(rounds) > 1000)
    assert "jit(backward)" in compiled


# ---- training ----


def test_a_model_trains(bench):
    client = Client(bench)
    ids = [client.create(), *(f() for _ in range(4) for f in (client.train, client.step))]
    created, *steps = bench.run(*ids)
    assert body_of(created) == {"model_id": "sess-a:train:0", "type": "create_model"}
    losses = [loss(job) for job in steps[::2]]
    assert losses[-1] < 0.95 * losses[0]
    assert body_of(steps[1])["metrics"]["grad_norm:mean"] > 0
    with reading(bench.db) as db:
        assert db.get(Model, "sess-a:train:0").state == "ready"


def test_c08_a_pipelined_step_does_not_overtake(bench):
    """[fb1, opt1, fb2, opt2] sent at once gives what sending them one by one gives."""
    one, two = Client(bench), Client(bench, "sess-b")
    slow = [bench.run(one.create())[0]]
    for _ in range(3):
        slow += bench.run(one.train(seed=5))
        slow += bench.run(one.step())
    fast = bench.run(two.create(), *(f() for _ in range(3) for f in (lambda: two.train(seed=5), two.step)))
    assert [loss(job) for job in fast[1::2]] == pytest.approx([loss(job) for job in slow[1::2]], abs=1e-5)
    states = [bench.worker.export_model(client.model_id) for client in (one, two)]
    for name, weights in states[0].weights.items():
        np.testing.assert_allclose(states[1].weights[name], weights, atol=1e-6)


def test_chunks_that_arrive_out_of_order_all_count_before_the_step(bench):
    whole, chunked = Client(bench), Client(bench, "sess-b")
    ids = [whole.create(), whole.train(seed=1, lengths=(4, 8, 6)), whole.step(), chunked.create()]
    rng = np.random.default_rng(1)
    messages = []
    for length in (4, 8, 6):
        tokens = rng.integers(0, 2000, length + 1).tolist()
        messages.append(chunked.message())
        datum(messages[-1], tokens[:-1], target_tokens=tokens[1:], weights=[1.0] * length)
    ids += [chunked.send(message) for message in (*messages[1:], messages[0])]
    jobs = bench.run(*ids, chunked.step())
    assert sum(loss(job) for job in jobs[4:7]) == pytest.approx(loss(jobs[1]), abs=1e-4)
    assert body_of(jobs[-1])["metrics"] == pytest.approx(body_of(jobs[2])["metrics"], rel=1e-4)


def test_forward_changes_nothing_and_returns_logprobs_of_the_targets_shape(bench):
    client = Client(bench)
    jobs = bench.run(client.create(), client.train(forward_only=True), client.step())
    outputs = body_of(jobs[1])["loss_fn_outputs"]
    assert [output["logprobs"]["shape"] for output in outputs] == [[6], [11]]
    assert body_of(jobs[2])["metrics"]["grad_norm:mean"] == 0.0


def test_c10_a_bad_datum_fails_its_own_job_by_name(bench):
    one, two = Client(bench), Client(bench, "sess-b")
    bench.run(one.create(), two.create())
    expected = loss(bench.run(two.train(seed=2, forward_only=True))[0])
    bad = one.message()
    datum(bad, [1, 2, 3], target_tokens=[2, 3, 4], weights=[1.0, 1.0, 1.0])
    datum(bad, [1, 70000], target_tokens=[2, 3], weights=[1.0, 1.0])
    jobs = bench.run(one.send(bad), two.train(seed=2), one.train(seed=3), one.step())
    fails(jobs[0], "user", "data[1]", "70000")
    assert loss(jobs[1]) == pytest.approx(expected, abs=1e-5)
    assert body_of(jobs[3])["metrics"]["grad_norm:mean"] > 0


def test_c10_a_worker_that_breaks_fails_what_it_holds_and_goes_on(bench, monkeypatch):
    client = Client(bench)
    bench.run(client.create(), client.train(), client.step())
    before = bench.worker.export_model(client.model_id)
    with monkeypatch.context() as patch:
        patch.setattr(bench.worker._trainer, "slice", lambda: 1 / 0)
        (broken,) = bench.run(client.train(seed=4))
    fails(broken, "server", "ZeroDivisionError")
    good = bench.run(client.train(seed=5))[0]
    assert good.status == "done", good.error
    after = bench.worker.export_model(client.model_id)
    for name, weights in before.weights.items():
        np.testing.assert_allclose(after.weights[name], weights, atol=1e-6)


def test_a_job_behind_a_barrier_that_ran_is_refused(bench):
    client = Client(bench)
    client.seq_id = 4
    bench.run(client.create(), client.step())
    client.seq_id = 1
    fails(bench.run(client.train())[0], "user", "seq_id", "above 5")


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("optim_step", {"optimizer_params": {"type": "dimuon", "learning_rate": 0.1}}, ["optimizer_params", "dimuon"]),
        ("optim_step", {"adam_params": {"beta1": 2.0}}, ["adam_params.beta1"]),
        ("save_weights", {"path": "../x"}, ["path"]),
        ("save_weights", {"path": "a", "ttl_seconds": 5}, ["ttl_seconds"]),
        ("load_weights", {"path": "tinker://nobody:train:0/weights/x", "optimizer": True}, ["path", "nobody"]),
        ("load_weights", {"path": "https://x", "optimizer": True}, ["path"]),
    ],
)
def test_c12_what_cannot_be_honoured_fails_by_name(bench, kind, body, words):
    client = Client(bench)
    fails(bench.run(client.create(), client.do(kind, **body))[1], "user", *words)
    assert loss(bench.run(client.train())[0]) > 0


def test_c12_a_model_that_cannot_be_created_is_marked_and_its_jobs_fail(bench):
    client = Client(bench, rank=9)
    created, trained = bench.run(client.create(), client.train())
    fails(created, "user", "rank", "9", "8")
    fails(trained, "user", "model_id")
    other = Client(bench, "sess-b")
    fails(bench.run(other.create(optimizer_config={"type": "dimuon"}))[0], "user", "optimizer_config")
    with reading(bench.db) as db:
        assert {db.get(Model, model_id).state for model_id in (client.model_id, other.model_id)} == {"failed"}


def test_an_unloaded_model_is_gone(bench):
    client = Client(bench)
    jobs = bench.run(client.create(), client.do("unload_model"), client.train())
    assert body_of(jobs[1]) == {"model_id": client.model_id, "type": "unload_model"}
    fails(jobs[2], "user", "model_id")


# ---- checkpoints ----


def test_a_resumed_model_continues_exactly(bench):
    client, other = Client(bench), Client(bench, model_seq_id=1)
    bench.run(client.create(), client.train(seed=1), client.step())
    (saved,) = bench.run(client.do("save_weights", path="ck1", user_metadata={"a": "b"}, ttl_seconds=3600))
    path = body_of(saved)["path"]
    assert body_of(saved) == {"path": "tinker://sess-a:train:0/weights/ck1", "type": "save_weights"}
    straight = bench.run(client.train(seed=2), client.step(), client.train(seed=3))
    loaded, *resumed = bench.run(other.create_from(path), other.train(seed=2), other.step(), other.train(seed=3))
    assert body_of(loaded)["path"] == path
    assert [loss(resumed[0]), loss(resumed[2])] == [loss(straight[0]), loss(straight[2])]
    assert body_of(resumed[1]) == body_of(straight[1])
    back = bench.run(client.do("load_weights", path=path, optimizer=True), client.train(seed=2))
    assert loss(back[1]) == loss(straight[0])
    with reading(bench.db) as db:
        row = db.get(Checkpoint, 1)
    assert (row.kind, row.name, row.seq_id, row.has_optimizer, row.user_metadata) == (
        "weights", "ck1", 2, True, {"a": "b"},
    )  # fmt: skip
    folder = bench.folder(path)
    assert row.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert row.expires_at == row.created_at + 3600


def test_loading_without_the_optimizer_starts_it_afresh(bench):
    client, other = Client(bench), Client(bench, model_seq_id=1)
    bench.run(client.create(), client.train(seed=1), client.step(), client.do("save_weights", path="ck1"))
    bench.run(other.create_from("tinker://sess-a:train:0/weights/ck1", optimizer=False))
    state = bench.worker.export_model(other.model_id)
    assert state.step == 0
    assert all(not np.any(moment) for moment in (*state.mu.values(), *state.nu.values()))
    for name, weights in bench.worker.export_model(client.model_id).weights.items():
        np.testing.assert_array_equal(state.weights[name], weights)


def test_a_taken_name_needs_overwrite(bench):
    client = Client(bench)
    bench.run(client.create(), client.do("save_weights", path="ck"), client.train(), client.step())
    again, over = bench.run(client.do("save_weights", path="ck"), client.do("save_weights", path="ck", overwrite=True))
    fails(again, "user", "path", "overwrite")
    assert over.status == "done"
    with reading(bench.db) as db:
        row = db.get(Checkpoint, 1)
    assert bench.folders.read(row.folder)[0].step == 1
    both = bench.run(client.do("save_weights", path="two"), client.do("save_weights", path="two"))
    assert [job.status for job in both] == ["done", "failed"]


def test_overwriting_leaves_the_files_that_a_copy_shares(bench):
    client, loaded = Client(bench), Client(bench, model_seq_id=1)
    bench.run(client.create(), client.do("save_weights", path="ck"), client.train(), client.step())
    source = paths.parse_path("tinker://sess-a:train:0/weights/ck")
    with writing(bench.db) as db:
        db.add(Session(session_id="sess-a", created_at=0.0, heartbeat_at=0.0))
    copy = copy_checkpoint(bench.db, CopyRequest(source, session_id="sess-a", model_seq_id=9))
    bench.run(client.do("save_weights", path="ck", overwrite=True))
    bench.run(loaded.create_from(str(copy)))
    assert bench.worker.export_model(loaded.model_id).step == 0
    with reading(bench.db) as db:
        first = db.get(Checkpoint, 1).folder
    assert (bench.folders.read(first)[0].step, bench.folders.read(source)[0].step) == (1, 0)
    bench.run(client.do("save_weights", path="ck", overwrite=True))
    assert not (bench.base / first).exists()  # nobody named it any more
    assert (bench.base / source.folder).exists()


def test_two_saves_of_one_new_name_do_not_share_a_folder(bench):
    client = Client(bench)
    bench.run(client.create())
    first = client.do("save_weights", path="ck")
    client.train()
    client.step()
    bench.run(first, client.do("save_weights", path="ck", overwrite=True))
    with reading(bench.db) as db:
        (row,) = db.exec(select(Checkpoint)).all()
    assert bench.folders.read(row.folder)[0].step == 1


def test_external_weights_are_the_adapter_alone(bench):
    client, identity = Client(bench), pyrage.x25519.Identity.generate()
    bench.run(client.create(), client.train(), client.step())
    plain, secret, again, bad = bench.run(
        client.do("save_weights_external", path="x", ttl_seconds=3600),
        client.do("save_weights_external", path="y", age_encryption_recipients=[str(identity.to_public())]),
        client.do("save_weights_external", path="x"),
        client.do("save_weights_external", path="z", age_encryption_recipients=["age1x"]),
    )
    _, files = bench.folders.read("sess-a:train:0/external_weights/x")
    assert body_of(plain) == {
        "path": "tinker://sess-a:train:0/external_weights/x",
        "type": "save_weights_external",
        "size_bytes": sum(map(len, files.values())),
    }
    imported = peft_import.import_files(files).weights
    for name, weights in bench.worker.export_model(client.model_id).weights.items():
        np.testing.assert_array_equal(imported[name], weights)
    _, encrypted = bench.folders.read("sess-a:train:0/external_weights/y")
    opened = {name.removesuffix(".age"): pyrage.decrypt(content, [identity]) for name, content in encrypted.items()}
    assert sorted(encrypted) == [f"{name}.age" for name in sorted(files)]
    for name, weights in peft_import.import_files(opened).weights.items():
        np.testing.assert_array_equal(weights, imported[name])
    assert secret.status == "done"
    fails(again, "user", "path", "not taken")
    fails(bad, "user", "age_encryption_recipients.0")


def test_a_checkpoint_of_another_shape_or_kind_is_refused(bench):
    small, large = Client(bench), Client(bench, model_seq_id=1, rank=8)
    bench.run(small.create(), large.create(), small.do("save_weights", path="ck"))
    bench.run(small.do("save_weights_for_sampler", path="s"))
    jobs = bench.run(
        large.do("load_weights", path="tinker://sess-a:train:0/weights/ck", optimizer=True),
        small.do("load_weights", path="tinker://sess-a:train:0/sampler_weights/s", optimizer=False),
    )
    fails(jobs[0], "user", "path", "rank=4", "rank=8")
    fails(jobs[1], "user", "path", "training checkpoint")


def test_a_damaged_checkpoint_is_a_server_error_and_an_expired_one_is_none(bench):
    client = Client(bench)
    bench.run(client.create(), client.do("save_weights", path="ck"), client.do("save_weights", path="old"))
    folder = bench.folder("tinker://sess-a:train:0/weights/ck")
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    fails(bench.run(client.do("load_weights", path="tinker://sess-a:train:0/weights/ck", optimizer=True))[0],
          "server", "optimizer.safetensors")  # fmt: skip
    with writing(bench.db) as db:
        db.exec(select(Checkpoint).where(Checkpoint.name == "old")).one().expires_at = now() - 1
    old = "tinker://sess-a:train:0/weights/old"
    fails(bench.run(client.do("load_weights", path=old, optimizer=True))[0], "user", "old")


# ---- sampling ----


def tokens_of(job) -> list[list[int]]:
    return [sequence["tokens"] for sequence in body_of(job)["sequences"]]


def test_the_base_model_samples_reproducibly(bench):
    client = Client(bench)
    base = client.sampler()
    jobs = bench.run(
        client.sample(base, PROMPT, num_samples=2, prompt_logprobs=True, topk_prompt_logprobs=3),
        client.sample(base, PROMPT, num_samples=2),
        client.sample(None, PROMPT, num_samples=2, base_model=BASE),
    )
    assert tokens_of(jobs[0]) == tokens_of(jobs[1]) == tokens_of(jobs[2])
    body = body_of(jobs[0])
    assert [len(sequence["tokens"]) for sequence in body["sequences"]] == [6, 6]
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == len(body["topk_prompt_logprobs"]) == 4
    assert all(len(pairs) == 3 for pairs in body["topk_prompt_logprobs"][1:])
    assert jobs[0].tokens_out == 12
    assert [job.tokens_cached for job in jobs] == [0, len(PROMPT) - 1, len(PROMPT) - 1], "one prefill for all three"


def test_c02_a_sampler_means_the_weights_at_its_save(bench):
    client = Client(bench)
    bench.run(client.create(), client.train(), client.step(learning_rate=0.1))
    save, first = client.snapshot()
    named = client.do("save_weights_for_sampler", path="s1")
    client.train(seed=1)
    client.step(learning_rate=0.1)
    later_save, later = client.snapshot("inflight")
    early = [client.sample(sampler, PROMPT) for sampler in (first, later)]  # wait for the saves that make them
    saved, saved_by_name, _, one, two = bench.run(save, named, later_save, *early)
    assert body_of(saved)["sampling_session_id"] == first
    path = body_of(saved_by_name)["path"]
    assert path == "tinker://sess-a:train:0/sampler_weights/s1"
    from_path = bench.run(client.sample(client.sampler(path), PROMPT))[0]
    again = bench.run(client.sample(first, PROMPT))[0]
    assert tokens_of(one) == tokens_of(again) == tokens_of(from_path)
    assert tokens_of(one) != tokens_of(two)
    assert not (bench.folder(path) / "optimizer.safetensors").exists()


def test_an_overwritten_path_means_the_new_weights(bench):
    client = Client(bench)
    bench.run(client.create(), client.train(), client.step(learning_rate=0.1))
    path = body_of(bench.run(client.do("save_weights", path="p"))[0])["path"]
    sampler = client.sampler(path)
    before = bench.run(client.sample(sampler, PROMPT))[0]
    bench.run(client.train(seed=1), client.step(learning_rate=0.1))
    bench.run(client.do("save_weights", path="p", overwrite=True))
    assert tokens_of(bench.run(client.sample(sampler, PROMPT))[0]) != tokens_of(before)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": {"chunks": []}}, ["prompt"]),
        ({"prompt": {"chunks": [{"tokens": [99999]}]}}, ["prompt", "99999"]),
        ({"params": {"temperature": -1}}, ["temperature"]),
        ({"topk_sample_logprobs": 10**6}, ["topk_sample_logprobs"]),
    ],
)
def test_a_bad_sample_fails_by_name_beside_a_good_one(bench, body, words):
    client = Client(bench)
    base = client.sampler()
    expected = tokens_of(bench.run(client.sample(base, PROMPT))[0])
    bad, good = bench.run(client.sample(base, PROMPT, **body), client.sample(base, PROMPT))
    fails(bad, "user", *words)
    assert tokens_of(good) == expected


def test_a_sampler_without_weights_fails(bench):
    client = Client(bench)
    sampler = Sampler(
        sampler_id="sess-a:sample:77", session_id="sess-a", seq=77, base_model=BASE, served_name=BASE, kind="snapshot",
        created_at=now(),
    )  # fmt: skip
    with writing(bench.db) as db:
        db.merge(sampler)
    fails(bench.run(client.sample("sess-a:sample:77", PROMPT))[0], "user", "sampling_session_id")


def test_a_flood_of_one_tenant_does_not_keep_another_waiting(tmp_path, sqlite_url, tiny_qwen3, worker):
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3, worker, room=4)
    greedy, modest = Client(bench, "sess-a"), Client(bench, "sess-b")
    flood = [greedy.sample(greedy.sampler(), PROMPT) for _ in range(24)]
    mine = modest.sample(modest.sampler(), PROMPT)
    bench.run(mine)
    assert len(bench.jobs.finished_ids(flood)) <= 8
    bench.run(*flood)


def test_a_flood_longer_than_the_engines_memory_does_not_either(tmp_path, sqlite_url, tiny_qwen3, worker, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_WAITING_SAMPLES", 8)
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3, worker, room=2)
    greedy, modest = Client(bench, "sess-a"), Client(bench, "sess-b")
    flood = [greedy.sample(greedy.sampler(), PROMPT) for _ in range(48)]
    bench.engine.step()
    mine = modest.sample(modest.sampler(), PROMPT)
    bench.run(mine)
    assert len(bench.jobs.finished_ids(flood)) <= 8
    bench.run(*flood)


def test_training_and_sampling_take_turns(bench, monkeypatch):
    """Sampling goes between any two micro-batches while it has work, and training goes on beside a flood of samples."""
    client = Client(bench)
    bench.run(client.create())
    turns = []

    def recorded(kind: str, run):
        def slice():
            turns.append((kind, bench.worker.sampling))
            return run()

        return slice

    monkeypatch.setattr(bench.worker, "train_slice", recorded("train", bench.worker.train_slice))
    monkeypatch.setattr(bench.worker, "sample_slice", recorded("sample", bench.worker.sample_slice))
    sampler = client.sampler()
    samples = [client.sample(sampler, PROMPT, params={"max_tokens": 64}) for _ in range(4)]
    training = [verb() for _ in range(4) for verb in (client.train, client.step)]
    bench.run(*samples, *training)
    in_a_row = [pair for pair in itertools.pairwise(turns) if pair == (("train", True), ("train", True))]
    assert in_a_row == []
    kinds = [kind for kind, _ in turns]
    assert "train" in kinds[: len(kinds) - 1 - kinds[::-1].index("sample")]


class Turns:
    """Stands for a worker that always has training, and sampling as long as ``sampling``; it moves the clock itself."""

    def __init__(self, train_s: float, sample_s: float) -> None:
        self.training, self.sampling, self.resident_models, self.gather_s = True, False, (), 0.0
        self.durations = {"train": train_s, "sample": sample_s}
        self.now_s, self.turns = 0.0, []

    def clock(self) -> float:
        return self.now_s

    def _turn(self, kind: str) -> list:
        self.turns.append(kind)
        self.now_s += self.durations[kind]
        return []

    def train_slice(self) -> list:
        return self._turn("train")

    def sample_slice(self) -> list:
        return self._turn("sample")


def engine_of(bench: Bench, worker: Turns) -> Engine:
    return Engine(
        bench.db, bench.signal, worker, bench.folders, bench.points, bench.in_flight, BASE,
        sample_room=8, clock=worker.clock,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("train_s", "sample_s", "slices"),
    [
        (1.0, 0.3, 4),  # sampling gets at least what the micro-batch took
        (1.0, 0.25, 4),
        (1.0, 5.0, 1),  # a slice that is longer than a micro-batch does not keep training waiting for two
        (0.2, 0.3, 1),
    ],
)
def test_sampling_gets_as_much_time_as_the_last_micro_batch_took(bench, train_s, sample_s, slices):
    worker = Turns(train_s, sample_s)
    engine = engine_of(bench, worker)
    for _ in range(3):
        assert engine.step()
    worker.sampling = True  # a sample arrives while training has had the device to itself
    for _ in range(2 * (slices + 1)):
        engine.step()
    assert worker.turns == ["train"] * 3 + (["sample"] * slices + ["train"]) * 2
    worker.training = False
    engine.step()
    assert worker.turns[-1] == "sample"


def test_samples_run_while_training_waits_for_other_models(bench):
    worker = Turns(1.0, 0.3)
    engine = engine_of(bench, worker)
    worker.gather_s, worker.sampling = 0.001, True
    engine.step()
    assert worker.turns == ["sample"]
    worker.sampling = False
    assert engine.step(), "it waits a millisecond and is not idle"
    assert worker.turns == ["sample"]
    worker.gather_s = 0.0
    engine.step()
    assert worker.turns == ["sample", "train"]


# ---- cancelling ----

LONG = {"max_tokens": 400}


def step_until(bench, condition) -> None:
    for _ in range(2000):
        if condition():
            return
        bench.engine.step()
    raise AssertionError("the engine does not get there")


def test_cancelling_frees_slots_so_that_a_waiting_sample_proceeds(tmp_path, sqlite_url, tiny_qwen3, worker):
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3, worker, room=worker.decode_slots)
    greedy, modest = Client(bench), Client(bench, "sess-b")
    flood = [greedy.sample(greedy.sampler(), PROMPT, num_samples=worker.decode_slots, params=LONG) for _ in range(3)]
    step_until(bench, lambda: len(bench.engine._running) == 1)
    short = modest.sample(modest.sampler(), PROMPT)
    bench.engine.step()
    assert short not in bench.engine._running
    assert bench.jobs.cancel(*flood) == 3
    (done,) = bench.run(short)
    assert len(tokens_of(done)[0]) == 6
    for job in bench.run(*flood):
        fails(job, "user", "Cancelled")
    assert not bench.worker.sampling
    assert not bench.engine._running
    assert not bench.engine._waiting


def test_a_cancelled_sample_leaves_its_neighbours_as_they_were(bench):
    client = Client(bench)
    base = client.sampler()
    (alone,) = bench.run(client.sample(base, PROMPT, params={"max_tokens": 40}))
    victim = client.sample(base, PROMPT, num_samples=4, params=LONG)
    neighbour = client.sample(base, PROMPT, params={"max_tokens": 40})
    step_until(bench, lambda: {victim, neighbour} <= set(bench.engine._running))
    bench.engine.step()
    assert bench.jobs.cancel(victim) == 1
    assert bench.jobs.cancel(victim) == 0
    (done,) = bench.run(neighbour)
    assert tokens_of(done) == tokens_of(alone)
    assert bench.jobs.cancel(neighbour) == 0
    assert bench.jobs.get(neighbour).status == "done"


def test_training_that_has_started_goes_on(bench):
    client = Client(bench)
    bench.run(client.create())
    train, step = client.train(), client.step()
    bench.engine._claim()
    assert bench.jobs.cancel(train, step) == 0
    assert [job.status for job in bench.run(train, step)] == ["done", "done"]


def test_a_sample_that_waits_for_its_snapshot_can_be_cancelled(tmp_path, sqlite_url, tiny_qwen3):
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3)
    client = Client(bench)
    bench.run(client.create(), client.train(), client.step())
    save, sampler = client.snapshot()
    bench.run(save)
    bench.restart()
    blocked = client.sample(sampler, PROMPT)
    step_until(bench, lambda: blocked in bench.engine._blocked)
    bench.jobs.cancel(blocked)
    bench.engine.step()
    assert blocked not in bench.engine._blocked
    assert blocked not in bench.engine._waiting
    assert len(tokens_of(bench.run(client.sample(sampler, PROMPT))[0])[0]) == 6


def test_an_engine_does_not_start_again_what_was_cancelled_in_its_predecessor(bench):
    client = Client(bench)
    sample = client.sample(client.sampler(), PROMPT)
    assert [job.request_id for job in bench.jobs.claim(BASE, 1)] == [sample]
    bench.jobs.cancel(sample)
    bench.engine.run(lambda: True)
    assert bench.jobs.take_cancelled(BASE) == []
    fails(bench.jobs.get(sample), "user", "Cancelled")


def test_a_sample_that_runs_for_long_is_marked_as_started(bench):
    client = Client(bench)
    base = client.sampler()
    sample = client.sample(base, PROMPT, params=LONG)
    step_until(bench, lambda: bench.jobs.get(sample).started_at is not None)
    assert bench.jobs.get(sample).status == "running"
    (short,) = bench.run(client.sample(base, PROMPT))
    assert short.started_at is None, "it was over within the second: no write for it"
    bench.jobs.cancel(sample)
    bench.engine.step()


# ---- stable_reinforce ----


def reinforce(client: Client, sequence_id: str, tokens: list[int], advantage: float = 1.0, **changes):
    """The datum that the cookbook makes of one sampled sequence."""
    full = PROMPT + tokens
    message = client.message("stable_reinforce", kl_coeff=0.1)
    advantages = [0.0] * (len(PROMPT) - 1) + [advantage] * len(tokens)
    added = datum(message, full[:-1], target_tokens=changes.get("targets", full[1:]), advantages=advantages)
    prompt, sampled = (added.loss_fn_input_spans.add() for _ in range(2))
    prompt.prompt_tokens.sequence_id = sampled.sampled_tokens.sequence_id = sequence_id
    prompt.prompt_tokens.offset, prompt.prompt_tokens.length = 1, len(PROMPT) - 1
    sampled.sampled_tokens.length = len(tokens) - changes.get("short", 0)
    return message


def test_stable_reinforce_uses_what_the_server_recorded(bench):
    client = Client(bench)
    save, sampler = (bench.run(client.create())[0], client.snapshot())[1]
    sampled = bench.run(save, client.sample(sampler, PROMPT, record_stability_info=True, num_samples=2))[1]
    second = body_of(sampled)["sequences"][1]
    sequence_id = paths.sample_sequence_id(sampled.request_id, 1)
    job = bench.run(client.send(reinforce(client, sequence_id, second["tokens"])))[0]
    logprobs = body_of(job)["loss_fn_outputs"][0]["logprobs"]["data"]
    np.testing.assert_allclose(logprobs[len(PROMPT) - 1 :], second["logprobs"], atol=1e-4)
    # On policy r = 1 and k3 = 0: the loss is minus the sum of A·logprob.
    assert loss(job) == pytest.approx(-sum(second["logprobs"]), abs=1e-3)
    assert body_of(bench.run(client.step())[0])["metrics"]["grad_norm:mean"] > 0


def test_stable_reinforce_refuses_what_it_did_not_record(bench):
    client, stranger = Client(bench), Client(bench, "sess-b")
    save, sampler = (bench.run(client.create(), stranger.create())[0], client.snapshot())[1]
    unrecorded, sampled = bench.run(
        save, client.sample(sampler, PROMPT), client.sample(sampler, PROMPT, record_stability_info=True)
    )[1:]
    tokens = tokens_of(sampled)[0]
    good = paths.sample_sequence_id(sampled.request_id, 0)
    no_spans = client.message("stable_reinforce")
    datum(no_spans, PROMPT, target_tokens=PROMPT, advantages=[0.0, 0.0, 0.0, 1.0])
    jobs = bench.run(
        client.send(reinforce(client, paths.sample_sequence_id(unrecorded.request_id, 0), tokens)),
        client.send(reinforce(client, "999-0", tokens)),
        stranger.send(reinforce(stranger, good, tokens)),
        client.send(reinforce(client, good, tokens, targets=[*PROMPT[1:], *tokens[:-1], tokens[-1] + 1])),
        client.send(reinforce(client, good, tokens, short=1)),
        client.send(no_spans),
    )
    for job, words in zip(
        jobs, (["-0"], ["999-0"], [good], [good], ["loss_fn_input_spans"], ["advantages"]), strict=True
    ):
        fails(job, "user", "data[0]", *words)
    with writing(bench.db) as db:
        row = db.get(RecordedSequence, good)
        row.used_at = now() - 90_000
        db.add(row)
    fails(bench.run(client.send(reinforce(client, good, tokens)))[0], "user", good)


# ---- restarts ----


def state_sum(bench, model_id: str) -> int:
    state = bench.worker.export_model(model_id)
    return zlib.crc32(b"".join(state.weights[name].tobytes() + state.mu[name].tobytes() for name in sorted(state.mu)))


@pytest.mark.parametrize("saved", [False, True])
def test_c11_after_a_crash_models_and_snapshots_come_back_exactly(tmp_path, sqlite_url, tiny_qwen3, saved):
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3)
    client = Client(bench)
    bench.run(client.create(), client.train(seed=1), client.step())
    save, sampler = client.snapshot()
    before = bench.run(save, client.sample(sampler, PROMPT))[1]
    bench.run(client.train(seed=2))  # its gradient waits for the step, across the save and the crash
    if saved:
        bench.run(client.do("save_weights", path="ck"))
    expected = Client(bench, "sess-b")
    bench.run(expected.create(), expected.train(seed=1), expected.step(), expected.train(seed=2), expected.step())
    wanted = state_sum(bench, expected.model_id)
    answered = {job.request_id: job.result for job in bench.jobs.history(client.model_id)}

    bench.restart()
    assert not bench.worker.has_model(client.model_id)
    stepped, again = bench.run(client.step(), client.sample(sampler, PROMPT))
    assert stepped.status == "done", stepped.error
    assert tokens_of(again) == tokens_of(before)
    assert state_sum(bench, client.model_id) == wanted
    for job in bench.jobs.history(client.model_id):  # nothing was answered twice
        assert answered.get(job.request_id, job.result) == job.result
    assert loss(bench.run(client.train(seed=3))[0]) > 0


def test_c11_jobs_that_a_crash_interrupted_run_once(tmp_path, sqlite_url, tiny_qwen3):
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3)
    client = Client(bench)
    bench.run(client.create(), client.train(seed=1))
    pending = [client.step(), client.train(seed=2), client.step()]
    claimed = bench.jobs.claim(BASE, 10)  # the engine that claimed them dies before it does them
    assert [job.request_id for job in claimed] == pending
    bench.restart()
    assert [job.status for job in bench.run(*pending)] == ["done"] * 3
    assert bench.worker.export_model(client.model_id).step == 2


def test_what_cannot_be_rebuilt_fails_and_others_go_on(tmp_path, sqlite_url, tiny_qwen3):
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3)
    lost, fine = Client(bench), Client(bench, "sess-b")
    saved = bench.run(lost.create(), fine.create(), lost.do("save_weights", path="ck"))[2]
    other = Client(bench, model_seq_id=1)
    bench.run(other.create_from(body_of(saved)["path"]), lost.do("save_weights", path="ck", overwrite=True))
    bench.restart()
    jobs = bench.run(other.train(), other.train(), fine.train(), lost.train())
    for job in jobs[:2]:
        fails(job, "server", "overwritten")
    assert all(math.isfinite(loss(job)) for job in jobs[2:])


def test_stopping_puts_unfinished_jobs_back(bench):
    client = Client(bench)
    rounds = iter([False])  # one round of the loop: what the step waits for is done, the step is not
    ids = [client.create(), *(client.train(seed=i) for i in range(12)), client.step()]
    bench.engine.run(lambda: next(rounds, True))
    left = [request_id for request_id in ids if not bench.jobs.finished_ids([request_id])]
    assert left
    assert {bench.jobs.get(request_id).status for request_id in left} == {"pending"}


def test_the_same_code_runs_on_postgresql(tmp_path, postgres_url, tiny_qwen3, worker):
    bench = Bench(tmp_path, postgres_url, tiny_qwen3, worker)
    client = Client(bench)
    jobs = bench.run(client.create(), client.train(), client.step(), client.do("save_weights", path="ck"))
    assert [job.status for job in jobs] == ["done"] * 4
    save, sampler = client.snapshot()
    assert len(tokens_of(bench.run(save, client.sample(sampler, PROMPT))[1])[0]) == 6
    bench.close()
