import re

import jax
import pytest
from jax.sharding import PartitionSpec

from camelid.errors import UserError
from camelid.parallel.mesh import MeshConfig, make_mesh
from camelid.parallel.rules import COMPUTE, STORE, check_divides, partition, shard
from tiny import tiny_config


def test_axis_words_are_cut_as_the_rules_say():
    assert partition(("layers", "heads", "head_dim", "embed"), STORE) == PartitionSpec(
        None, ("tensor",), None, ("fsdp",)
    )
    assert partition(("batch", "seq", "mlp"), COMPUTE) == PartitionSpec(("data", "fsdp"), None, ("tensor",))


def test_replicated_words_stay_whole():
    assert partition(("kv_heads", "embed"), STORE, ("kv_heads",)) == PartitionSpec(None, ("fsdp",))


def test_a_mesh_axis_cannot_cut_one_array_twice():
    with pytest.raises(ValueError, match="a mesh axis can shard an array only once"):
        partition(("heads", "mlp"), STORE)


def test_outside_a_mesh_there_is_nothing_to_cut():
    x = jax.numpy.ones((3, 5))
    assert shard(x, "batch seq") is x


# 6 heads over 4, 2 kv_heads over 4, 97 tokens over 2: each names the largest size that would do.
@pytest.mark.parametrize(
    ("mesh", "replicate", "message"),
    [
        ({"fsdp": 2, "tensor": 4}, ("vocab", "vocab_in"), "heads = 6 does not divide over tensor = 4\nUse tensor = 3,"),
        (
            {"fsdp": 2, "tensor": 4},
            ("vocab", "vocab_in", "heads"),
            "kv_heads = 2 does not divide over tensor = 4\nUse tensor = 2, or leave the axis unsharded with "
            'compute.replicate = ["kv_heads"].',
        ),
        ({"fsdp": 4, "tensor": 2}, (), "vocab = 97 does not divide over tensor = 2\nUse tensor = 1,"),
        ({"fsdp": 8}, (), "vocab_in = 97 does not divide over fsdp x tensor = 8\nUse fsdp x tensor = 1,"),
    ],
)
def test_an_axis_that_does_not_divide_is_refused_with_the_largest_size_that_would(mesh, replicate, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        check_divides(tiny_config().axis_sizes, make_mesh(MeshConfig(**mesh)), replicate)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_axes_that_divide_pass(mesh: dict[str, int]):
    check_divides(tiny_config(vocab_size=96).axis_sizes, make_mesh(MeshConfig(**mesh)))
