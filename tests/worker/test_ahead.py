"""Compiling ahead: only while idle, each program once, and then a model's first step and samples compile nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compilations import compilations
from tests.support.tiny_models import write_tiny_model
from tests.worker.test_usual import drain, sample, submit
from tx.types import AdamParams, LoraConfig
from tx.worker.ahead import Ahead, Call, Step, directly
from tx.worker.worker import Worker

LIMIT_S = 300.0


def adding(number: int) -> Callable[..., jax.Array]:
    return jax.jit(lambda x: x + number)


def step(key: str, run: Callable[[Call], object]) -> Step:
    return Step(key, f"what is called {key}", run)


def work(*programs: Callable[..., jax.Array]) -> Callable[[Call], None]:
    """One after the other, as training would run them."""

    def chain(call: Call) -> None:
        x = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        for program in programs:
            x = call(program, x)

    return chain


def settle(ahead: Ahead) -> None:
    """Idle until all that was asked for so far is done."""
    done = threading.Event()
    ahead.ask([Step(done, "settle", lambda _: done.set())])
    with ahead.idle():
        assert done.wait(LIMIT_S)


def test_what_was_compiled_ahead_is_what_runs():
    ahead, first, second = Ahead(), adding(1), adding(2)
    ahead.start()
    ahead.ask([step("chain", work(first, second))])
    with compilations() as compiled:
        settle(ahead)
    assert len(compiled) == 2
    x = jax.device_put(np.zeros(3, np.float32), jax.devices()[0])
    with compilations() as compiled:
        assert ahead.call(second, ahead.call(first, x)).tolist() == [3.0, 3.0, 3.0]
    assert compiled == []


def test_nothing_is_begun_unless_the_device_is_idle():
    """It waits before every program, the first and those that follow in the same entry."""
    ahead, begun, may_go_on = Ahead(), threading.Event(), threading.Event()

    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        begun.set()
        assert may_go_on.wait(LIMIT_S)
        return x

    traced: list[str] = []

    @jax.jit
    def following(x: jax.Array) -> jax.Array:
        traced.append("following")
        return x

    ahead.start()
    ahead.ask([step("two programs", work(slow, following))])
    assert not begun.is_set()
    with ahead.idle():
        assert begun.wait(LIMIT_S)
    may_go_on.set()  # work has come meanwhile: this one goes on, the next one is not begun
    ahead.call(slow, jnp.zeros(3))
    assert traced == []
    settle(ahead)
    assert traced == ["following"]


def test_who_needs_the_program_that_is_being_compiled_waits_for_it():
    ahead, begun, may_go_on, answers = Ahead(), threading.Event(), threading.Event(), []
    traced = []

    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        if x.shape == (3,):
            begun.set()
            assert may_go_on.wait(LIMIT_S)
        return x + 1

    ahead.start()
    ahead.ask([step("slow", work(slow))])
    with ahead.idle():
        assert begun.wait(LIMIT_S)
    x = jax.device_put(np.zeros(3, np.float32), jax.devices()[0])
    caller = threading.Thread(target=lambda: answers.append(ahead.call(slow, x).tolist()))
    caller.start()
    assert ahead.call(adding(5), x).tolist() == [5.0, 5.0, 5.0]  # other programs run
    assert ahead.call(slow, x[:2]).tolist() == [1.0, 1.0]  # and this one on other shapes
    may_go_on.set()
    caller.join(LIMIT_S)
    assert answers == [[1.0, 1.0, 1.0]]
    assert sorted(traced) == [(2,), (3,)]


def test_what_is_needed_next_goes_first_and_each_key_once():
    ahead, order = Ahead(), []
    ahead.start()
    for keys, is_next in (("ab", False), ("b", False), ("cda", True)):
        ahead.ask([step(key, lambda _, key=key: order.append(key)) for key in keys], next=is_next)
    settle(ahead)
    assert order == ["c", "d", "a", "b"]


def test_a_failure_is_left_to_whoever_needs_the_program(caplog):
    ahead, order = Ahead(), []

    def fails(_: Call) -> None:
        raise RuntimeError("too large for this device")

    ahead.start()
    ahead.ask([step("failure", fails), step("follower", lambda _: order.append("follower"))])
    settle(ahead)
    assert order == ["follower"]
    assert "what is called failure" in caplog.text
    assert "too large for this device" in caplog.text


def test_before_it_starts_nothing_is_taken():
    ahead, order = Ahead(), []
    ahead.ask([step("key", lambda _: order.append("early"))])
    ahead.start()
    ahead.ask([step("key", lambda _: order.append("late"))])
    settle(ahead)
    assert order == ["late"]
    assert directly(adding(1), jnp.zeros(1)).tolist() == [1.0]


# ---- a worker -------------------------------------------------------------------------------------------------------


def test_a_new_models_first_requests_compile_nothing(tmp_path: Path):
    """Of the usual ranks and of one that nobody could know before; rows and prompts of several lengths."""
    assert compiled_for_first_requests(tmp_path) == []


@pytest.mark.slow
def test_nor_do_they_on_a_mesh(tmp_path: Path):
    """What is compiled ahead knows where arrays live; the devices are forced ones, in a process of its own.

    But where XLA wants a small argument in pieces, JAX cuts it with a program that takes no time to compile.
    """
    code = f"""
from pathlib import Path
from tests.worker.test_ahead import compiled_for_first_requests
print(compiled_for_first_requests(Path({str(tmp_path)!r}), tensor_parallel_size=2, data_parallel_size=2))
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [name for name in ast.literal_eval(done.stdout) if name != "jit(_multi_slice)"] == []


def small_worker(folder: Path, **options: int) -> Worker:
    """Usual are rows of 16 and 32 positions, prompts of up to 64 tokens and up to 4 sequences."""
    model = write_tiny_model(folder / "model", "qwen3", max_position_embeddings=64)
    limits = {"max_lora_rank": 8, "train_micro_batch_tokens": 32, "sample_max_num_sequences": 4}
    return Worker(model, "tiny/qwen3", **limits, **options)


def compiled_for_first_requests(folder: Path, **mesh: int) -> list[str]:
    """What models' first steps and samples had to compile, though there was time before."""
    worker = small_worker(folder, **mesh)
    worker.compile_ahead()
    worker.create_model("a", LoraConfig(3, seed=1, train_unembed=False))
    settle(worker._ahead)
    rng = np.random.default_rng(0)
    with compilations() as compiled:
        worker.create_model("b", LoraConfig(8, seed=1))
        for model_id in ("a", "b"):
            for lengths in ([32, 30], [9, 7]):
                submit(worker, rng, model_id, lengths, forward_only=False)
                drain(worker)
                worker.optim_step(model_id, AdamParams(learning_rate=1e-3))
            worker.take_snapshot(model_id, f"of {model_id}")
        for snapshot in ("of a", "of b", None):
            for length, num_samples in ((7, 1), (40, 3), (60, 5)):
                worker.submit_sample(length, sample(rng, length, num_samples), snapshot)
                drain(worker)
    return compiled


def test_steps_are_the_same_to_the_bit(tmp_path: Path):
    """Nothing that training has is touched by compiling, while it trains or before."""
    states = []
    for ahead in (False, True):
        worker = small_worker(tmp_path)
        if ahead:
            worker.compile_ahead()
        worker.create_model("a", LoraConfig(8, seed=1))
        rng = np.random.default_rng(0)
        for _ in range(2):
            submit(worker, rng, "a", [30, 20], forward_only=False)
            drain(worker)
            worker.optim_step("a", AdamParams(learning_rate=1e-3))
            if ahead:
                settle(worker._ahead)
        states.append(worker.export_model("a").weights)
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])
