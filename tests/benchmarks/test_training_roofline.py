"""The roofline of training: its counts against hand-made ones, and the whole program on a tiny model."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import training_roofline as roofline
from tx.models.loading import load_model
from tx.worker.mesh import make_mesh

HEAD = 64 * 2048
# Two layers of q, k, v, o and a gated MLP; vectors of the norms: two per layer and of a head's q and k, and the last.
MATRICES = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
VECTORS = 2 * (2 * 64 + 2 * 16) + 64
# (in + out) of the same layers, and of the head.
LAYER_SITES = 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
HEAD_SITE = 64 + 2048


def test_counts(tiny_qwen3):
    model = load_model(tiny_qwen3, make_mesh(), jnp.float32)
    count = roofline.flops_per_token(model, rank=3, length=9, weighted=1.0)
    frozen, adapter = MATRICES + VECTORS + HEAD, 3 * (LAYER_SITES + HEAD_SITE)
    attention = (
        2 * 2 * 2 * 5 * 4 * 16
    )  # layers, two products of multiply and add, (9 + 1) / 2 positions, heads, head_dim
    assert (count.frozen, count.adapter, count.attention) == (frozen, adapter, attention)
    assert count.forward == 2 * frozen + 2 * adapter + attention
    assert count.forward_backward == 4 * frozen + 6 * adapter + 3.5 * attention


def test_a_position_without_weight_needs_no_head(tiny_qwen3):
    model = load_model(tiny_qwen3, make_mesh(), jnp.float32)
    count = roofline.flops_per_token(model, rank=3, length=9, weighted=0.25)
    assert count.frozen == MATRICES + VECTORS + HEAD / 4
    assert count.adapter == 3 * (LAYER_SITES + HEAD_SITE / 4)


def test_the_last_positions_are_the_weighted_ones(tiny_qwen3):
    config = load_model(tiny_qwen3, make_mesh(), jnp.float32).config
    rows = roofline.data(config, rows=3, length=8, weighted=0.25)
    for row in rows:
        assert row.inputs["weights"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
        assert np.array_equal(row.inputs["target_tokens"][:-1], row.tokens[1:])


@pytest.mark.parametrize("source", [[], ["--random"]], ids=["folder", "random"])
def test_the_program_prints_both_passes_at_each_length(tiny_qwen3, source, monkeypatch, capsys):
    sizes = ["--lengths", "16,32", "--batches", "2", "--repeats", "1", "--rank", "4", "--matmul", "128"]
    peaks = ["--datasheet-tflops", "0.5"]
    monkeypatch.setattr(sys, "argv", ["training_roofline.py", *source, str(tiny_qwen3), *sizes, *peaks])
    roofline.main()
    head, *lines = capsys.readouterr().out.splitlines()[-5:]
    assert head == roofline.HEAD
    cells = [line.replace("with backward", "backward").split() for line in lines]
    assert [row[:3] for row in cells] == [
        ["16", "4", "forward"],
        ["16", "4", "backward"],
        ["32", "2", "forward"],
        ["32", "2", "backward"],
    ]
    for row in cells:
        slices, milliseconds, tokens_per_s, flops, rate = (float(cell) for cell in row[3:8])
        assert tokens_per_s == pytest.approx(64 / slices / milliseconds * 1e3, rel=0.05)
        assert rate == pytest.approx(tokens_per_s * flops / 1e6, rel=0.01, abs=6e-4)
        assert float(row[9].rstrip("%")) == pytest.approx(rate / 0.5 * 100, abs=0.2)
        assert float(row[10]) > 0.1


def test_lengths_must_fit(tiny_qwen3, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training_roofline.py", str(tiny_qwen3), "--lengths", "64", "--tokens", "32"])
    with pytest.raises(SystemExit):
        roofline.main()
    assert "--lengths 64 is more than a micro-batch of --tokens 32 holds" in capsys.readouterr().err
