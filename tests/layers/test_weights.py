"""A weight's declaration survives the module tree: axes and kept dtype are readable from the split state."""

from __future__ import annotations

import jax
from flax import nnx

from tx.layers.lora import LoraLinear
from tx.layers.weights import Kernel, Weight


def test_declaration_survives_a_split():
    abstract = nnx.eval_shape(lambda: LoraLinear(4, 6, ("embed", "ffn"), bias=True))
    state = dict(nnx.to_flat_state(nnx.split(abstract)[1]))
    kernel, bias = state[("weight",)], state[("bias",)]
    assert (type(kernel), kernel.axes, kernel.float32) == (Kernel, ("embed", "ffn"), False)
    assert (type(bias), bias.axes, bias.float32) == (Weight, ("ffn",), True)
    assert isinstance(kernel.get_value(), jax.ShapeDtypeStruct)  # nothing was allocated
    assert kernel.get_value().shape == (4, 6)


def test_layers_of_one_kind_share_a_graph():
    """The jitted layer function is traced once for all of them."""
    first, second = (nnx.split(nnx.eval_shape(lambda: LoraLinear(4, 6, ("embed", "ffn"))))[0] for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
