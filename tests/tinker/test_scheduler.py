"""Design §4's invariants, with fabricated jobs in random order: no model, no database."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tx.tinker.scheduler import SAMPLE, JobHeader, in_seq_order, plan

BARRIERS = ("optim_step", "save_weights", "load_weights", "create_model")


def fb(request_id, seq_id, model="m", kind="forward_backward"):
    return JobHeader(request_id, kind, model_id=model, seq_id=seq_id)


def barrier(request_id, seq_id, model="m", kind="optim_step", **more):
    return JobHeader(request_id, kind, model_id=model, seq_id=seq_id, **more)


def sample(request_id, session="s", sampler="s:sample:0", num_sequences=1):
    return JobHeader(request_id, SAMPLE, session_id=session, sampler_id=sampler, num_sequences=num_sequences)


def ids(jobs):
    return [job.request_id for job in jobs]


def start(waiting, running=(), room=100, last=None):
    return plan(waiting, running, sample_room=room, last_barrier=last or {})


# ---- worked examples ----


def test_c08_a_pipelined_step_waits_for_its_own_gradients_only():
    jobs = [fb(1, 1), barrier(2, 2), fb(3, 3), barrier(4, 4)]
    assert ids(start(jobs).start) == [1]
    assert ids(start(jobs[1:], [jobs[0]]).start) == []
    assert ids(start(jobs[1:]).start) == [2]
    assert ids(start(jobs[2:], last={"m": 2}).start) == [3]
    assert ids(start(jobs[3:], last={"m": 2}).start) == [4]


def test_chunks_that_arrive_first_chunk_last_start_together():
    jobs = [fb(1, 2), fb(2, 3), fb(3, 1), barrier(4, 4), fb(5, 6), fb(6, 5)]
    assert ids(start(jobs).start) == [3, 1, 2]
    assert ids(start(jobs[4:], [jobs[3]]).start) == []


def test_forward_commutes_with_forward_backward():
    assert ids(start([fb(1, 1), fb(2, 2, kind="forward")]).start) == [1, 2]


def test_holes_never_block():
    assert ids(start([fb(1, 7)]).start) == [1]
    assert ids(start([barrier(1, 9)], last={"m": 4}).start) == [1]


def test_a_job_behind_a_finished_barrier_is_late():
    decision = start([fb(5, 3), fb(6, 5)], last={"m": 4})
    assert (ids(decision.start), ids(decision.late)) == ([6], [5])


def test_what_overtook_a_running_barrier_waits_for_it():
    decision = start([fb(5, 3)], [barrier(4, 4)])
    assert (ids(decision.start), ids(decision.late)) == ([], [])


def test_jobs_without_seq_id_follow_what_arrived_before_them():
    jobs = [fb(1, 2), fb(2, 1), fb(3, None), fb(4, 3), fb(5, None)]
    assert ids(in_seq_order(jobs)) == [2, 1, 3, 4, 5]
    creation = [barrier(1, None, kind="create_model"), fb(2, 1)]
    assert ids(start(creation).start) == [1]


def test_models_do_not_wait_for_each_other_and_take_turns():
    jobs = [fb(i, i, model="a") for i in range(1, 5)] + [fb(5, 1, model="b"), fb(6, 2, model="b"), barrier(7, 1, "c")]
    assert ids(start(jobs).start) == [1, 5, 7, 2, 6, 3, 4]


def test_a_sample_waits_for_the_save_that_makes_its_sampler():
    save = barrier(1, 2, kind="save_weights_for_sampler", sampler_id="s:sample:0")
    assert ids(start([save, sample(2), sample(3, sampler="s:sample:9")]).start) == [1, 3]
    assert ids(start([sample(2)], [save]).start) == []
    assert ids(start([sample(2)]).start) == [2]


def test_sessions_share_the_room_whoever_came_first():
    greedy = [sample(i, "greedy") for i in range(1, 9)]
    late = [sample(9, "late"), sample(10, "late")]
    assert ids(start([*greedy, *late], room=4).start) == [1, 9, 2, 10]
    assert ids(start([*greedy[2:], *late], greedy[:2], room=2).start) == [9, 10]
    assert start(greedy, room=0).start == ()


def test_the_room_is_counted_in_sequences():
    groups = [sample(i, "groups", num_sequences=8) for i in range(1, 5)]
    singles = [sample(i, "singles") for i in range(5, 15)]
    assert ids(start(groups, room=16).start) == [1, 2]
    assert ids(start(groups, room=1).start) == [1], "a group that is larger than the room must not wait for ever"
    assert ids(start([*groups, *singles], room=17).start) == [1, *range(5, 13), 2]
    assert ids(start(singles, [groups[0]], room=2).start) == [5, 6]


# ---- properties ----


@st.composite
def histories(draw):
    """Per model: calls of several chunks (first chunk sent last) and barriers, some ids burnt; then interleaved."""
    streams = []
    for model in range(draw(st.integers(1, 3))):
        seq_id, stream = 0, []
        for _ in range(draw(st.integers(1, 6))):
            seq_id += 1 + draw(st.integers(0, 2))  # a refused id leaves a hole
            if draw(st.booleans()):
                count = draw(st.integers(1, 4))
                chunks = [("forward_backward", seq_id + i) for i in range(count)]
                rest = draw(st.permutations(chunks[1:]))
                stream += [*rest, chunks[0]]
                seq_id += count - 1
            else:
                stream.append((draw(st.sampled_from(BARRIERS)), seq_id))
        streams.append([(f"m{model}", kind, seq) for kind, seq in stream])
    arrivals = []
    while any(streams):
        stream = draw(st.sampled_from([stream for stream in streams if stream]))
        arrivals.append(stream.pop(0))
    return [JobHeader(i, kind, model_id=model, seq_id=seq) for i, (model, kind, seq) in enumerate(arrivals)]


@settings(max_examples=200, deadline=None)
@given(jobs=histories(), seed=st.integers(0, 2**32))
def test_any_arrival_and_completion_order_runs_everything_in_seq_order(jobs, seed):
    rng = random.Random(seed)
    arriving, waiting, running, last = list(jobs), [], [], {}
    finished: list[JobHeader] = []
    while arriving or waiting or running:
        for _ in range(rng.randint(0, 3)):
            if arriving:
                waiting.append(arriving.pop(0))
        decision = plan(waiting, running, sample_room=0, last_barrier=last)
        assert not decision.late, "a client that follows the protocol is never late"
        assert waiting == [] or decision.start or running or arriving, "deadlock"
        for job in decision.start:
            before = [other for other in jobs if other.model_id == job.model_id and other.seq_id < job.seq_id]
            barriers = before if job.is_barrier else [other for other in before if other.is_barrier]
            assert all(other in finished for other in barriers)
            assert not any(other.is_barrier for other in running if other.model_id == job.model_id)
            waiting.remove(job)
            running.append(job)
        if running and rng.random() < 0.7:
            job = running.pop(rng.randrange(len(running)))
            finished.append(job)
            if job.is_barrier:
                last[job.model_id] = max(last.get(job.model_id, -1), job.seq_id)
    assert sorted(ids(finished)) == sorted(ids(jobs))


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    busy=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    room=st.integers(0, 20),
)
def test_sample_room_is_filled_and_shared_fairly(counts, busy, room):
    waiting, running = [], []
    for session, count in enumerate(counts):
        running += [sample(1000 + 10 * session + i, session) for i in range(busy[session])]
        waiting += [sample(100 * session + i, session) for i in range(count)]
    chosen = plan(waiting, running, sample_room=room, last_barrier={}).start
    assert len(chosen) == min(room, len(waiting))
    share = {s: busy[s] + sum(job.session_id == s for job in chosen) for s in range(len(counts))}
    for session in range(len(counts)):
        own = [job.request_id for job in chosen if job.session_id == session]
        assert own == sorted(own)
        if len(own) < counts[session]:  # still waiting: nobody who was given something has more than one over it
            richest = max((share[s] for s in share if any(job.session_id == s for job in chosen)), default=0)
            assert richest <= share[session] + 1


@pytest.mark.parametrize("kind", ["optim_step", "save_weights", "unload_model", "anything_new"])
def test_every_other_kind_of_a_model_is_a_barrier(kind):
    assert JobHeader(1, kind, model_id="m").is_barrier
