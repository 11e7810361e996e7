"""The roofline of a decode step: its counts against hand-made ones, and the whole program on a tiny model."""

import argparse
import sys

import jax.numpy as jnp
import pytest

from benchmarks import decode_roofline as roofline
from tx.models.loading import load_model
from tx.worker.mesh import make_mesh


def test_counts(tiny_qwen3, tiny_llama3):
    for folder in (tiny_qwen3, tiny_llama3):
        model = load_model(folder, make_mesh(), jnp.float32)
        # Two layers of q, k, v, o and a gated MLP, and the head; norms are vectors.
        matrices = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) + 64 * 2048
        vectors = model.num_params - matrices - (64 * 2048 if folder == tiny_llama3 else 0)
        assert 0 < vectors < 1000
        kv = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head_dim, bytes
        assert roofline.step_bytes(model, 3, 10) == 4 * (matrices + vectors) + 3 * 10 * kv
        attention = 2 * 2 * 10 * 2 * 4 * 16  # two products of 10 positions, layers, heads, head_dim
        assert roofline.step_flops(model, 3, 10) == 3 * (2 * (matrices + vectors) + attention)


def test_the_steady_part_of_a_run():
    seconds = [9.0, 1, 9, 1, 9, 1, 2, 2, 2, 2, 2, 1, 1, 1, 1]
    assert roofline.steady(seconds, [11, 11, 14], 10) == [2] * 5
    with pytest.raises(SystemExit, match="--tokens"):
        roofline.steady(seconds, [11, 14], 6)


def test_no_row_stops_early_and_none_shares_a_prompt():
    flags = argparse.Namespace(prompt=6, tokens=8)
    work = roofline.requests(4, flags, 2048)
    assert len({request.prompt.tobytes() for request in work}) == 4
    assert {(request.params.max_tokens, request.params.stop_on_eos) for request in work} == {(8, False)}


@pytest.mark.parametrize("source", [[], ["--random"]], ids=["folder", "random"])
def test_the_program_prints_a_line_per_batch_size(tiny_qwen3, source, monkeypatch, capsys):
    sizes = ["--batches", "1,3", "--prompt", "8", "--tokens", "64", "--repeats", "1", "--probe-mb", "8"]
    monkeypatch.setattr(sys, "argv", ["decode_roofline.py", *source, str(tiny_qwen3), *sizes, "--matmul", "128"])
    roofline.main()
    head, *lines = capsys.readouterr().out.splitlines()[-3:]
    assert head == roofline.HEAD
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == ["1", "3"]
    for row in rows:
        batch, milliseconds, tokens_per_s = (float(cell) for cell in row[:3])
        assert tokens_per_s == pytest.approx(batch / milliseconds * 1e3, rel=0.02)
