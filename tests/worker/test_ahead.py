"""Compiling ahead: only while idle, each program once, and then the first step of a model compiles nothing."""

from __future__ import annotations

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
from tests.worker.test_warm_up import drain, submit
from tx.types import AdamParams, LoraConfig
from tx.worker.ahead import Ahead, Call, directly
from tx.worker.worker import Worker

LIMIT_S = 300.0


def adding(number: int) -> Callable[..., jax.Array]:
    return jax.jit(lambda x: x + number)


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
    ahead.ask(done, lambda _: done.set())
    with ahead.idle():
        assert done.wait(LIMIT_S)


def test_what_was_compiled_ahead_is_what_runs():
    ahead, first, second = Ahead(), adding(1), adding(2)
    ahead.start()
    ahead.ask("chain", work(first, second))
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
    ahead.ask("two programs", work(slow, following))
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
    num_traced = 0

    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        nonlocal num_traced
        num_traced += 1
        begun.set()
        assert may_go_on.wait(LIMIT_S)
        return x + 1

    ahead.start()
    ahead.ask("slow", work(slow))
    with ahead.idle():
        assert begun.wait(LIMIT_S)
    x = jax.device_put(np.zeros(3, np.float32), jax.devices()[0])
    caller = threading.Thread(target=lambda: answers.append(ahead.call(slow, x).tolist()))
    caller.start()
    assert ahead.call(adding(5), x).tolist() == [5.0, 5.0, 5.0]  # other programs run
    may_go_on.set()
    caller.join(LIMIT_S)
    assert answers == [[1.0, 1.0, 1.0]]
    assert num_traced == 1


def test_what_is_needed_next_goes_first_and_each_key_once():
    ahead, order = Ahead(), []
    ahead.start()
    for key, is_next in (("a", False), ("b", False), ("c", True), ("a", True)):
        ahead.ask(key, lambda _, key=key: order.append(key), next=is_next)
    settle(ahead)
    assert order == ["c", "a", "b"]


def test_a_failure_is_left_to_whoever_needs_the_program(caplog):
    ahead, order = Ahead(), []

    def fails(_: Call) -> None:
        raise RuntimeError("too large for this device")

    ahead.start()
    ahead.ask("what fails", fails)
    ahead.ask("what follows", lambda _: order.append("what follows"))
    settle(ahead)
    assert order == ["what follows"]
    assert "what fails" in caplog.text
    assert "too large for this device" in caplog.text


def test_before_it_starts_nothing_is_taken():
    ahead, order = Ahead(), []
    ahead.ask("key", lambda _: order.append("early"))
    ahead.start()
    ahead.ask("key", lambda _: order.append("key"))
    settle(ahead)
    assert order == ["key"]
    assert directly(adding(1), jnp.zeros(1)).tolist() == [1.0]


# ---- a worker -------------------------------------------------------------------------------------------------------


def test_a_new_models_first_step_compiles_nothing(tiny_qwen3: Path):
    """Of the usual ranks and of one that nobody could know before; of the longest rows and of others."""
    first_step_compiles_nothing(tiny_qwen3)


@pytest.mark.slow
def test_nor_does_it_on_a_mesh(tiny_qwen3: Path):
    """What is compiled ahead knows where arrays live; the devices are forced ones, in a process of its own."""
    code = f"""
from pathlib import Path
from tests.worker.test_ahead import first_step_compiles_nothing
first_step_compiles_nothing(Path({str(tiny_qwen3)!r}), tensor_parallel_size=2, data_parallel_size=2)
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def first_step_compiles_nothing(model: Path, **mesh: int) -> None:
    """AssertionError with what a model's first steps had to compile."""
    worker = Worker(model, "tiny/qwen3", max_lora_rank=8, train_micro_batch_tokens=32, **mesh)
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
    assert compiled == [], compiled


def test_steps_are_the_same_to_the_bit(tiny_qwen3: Path):
    """Nothing that training has is touched by compiling, while it trains or before."""
    states = []
    for ahead in (False, True):
        worker = Worker(tiny_qwen3, "tiny/qwen3", max_lora_rank=8, train_micro_batch_tokens=32)
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
