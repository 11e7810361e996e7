"""The one table: names to mesh axes, what divides, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tx.errors import StartupError
from tx.layers.sharding import MESH_AXES, RULES, constrain, spec
from tx.worker.mesh import make_mesh

MESH = AbstractMesh((2, 2, 4, 8), MESH_AXES)


def test_every_rule_names_real_mesh_axes():
    assert {axis for axes in RULES.values() for axis in axes} == set(MESH_AXES)


def test_names_become_mesh_axes():
    assert spec(("embed", "ffn"), (64, 128), MESH) == PartitionSpec("fsdp", "tp")
    assert spec(("row", "seq", None), (8, 5, 64), MESH) == PartitionSpec(("data", "fsdp"))
    assert spec((None, "ffn", "rank"), (8, 64, 4), MESH) == PartitionSpec(None, "tp")
    assert spec(("expert", "embed", "ffn"), (8, 64, 128), MESH) == PartitionSpec("ep", "fsdp", "tp")


def test_axes_of_one_device_are_left_out():
    assert spec(("row", "heads"), (1, 9), make_mesh()) == PartitionSpec()


@pytest.mark.parametrize(("name", "size"), [("row", 3), ("kv_heads", 2), ("vocab", 49)])
def test_some_names_are_replicated_when_they_do_not_divide(name, size):
    assert spec((name,), (size,), MESH) == PartitionSpec()


def test_others_are_refused_with_the_numbers():
    with pytest.raises(StartupError, match="heads of size 9 doesn't divide over 8 devices"):
        spec(("heads",), (9,), MESH)
    assert spec(("heads",), (9,), MESH, strict=False) == PartitionSpec()


def test_two_dimensions_that_want_one_mesh_axis_are_an_error():
    with pytest.raises(ValueError, match="twice"):
        spec(("row", "embed"), (8, 64), MESH)
    with pytest.raises(ValueError, match="axis names"):
        spec(("row",), (8, 64), MESH)


def test_constrain_is_free_without_a_mesh():
    x = jnp.ones((2, 3))
    assert constrain(x, ("row", "embed")) is x
    assert "sharding" not in str(jax.make_jaxpr(lambda x: constrain(x, ("row", "embed"), make_mesh()))(x))
