"""Parameters follow from their declarations: shapes, first values, places on the mesh."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract, initialize, named
from camelid.parallel.mesh import MeshConfig, make_mesh
from tiny import tiny_config

CONFIG = tiny_config(embed_dim=64, init_std=0.03)
SPECS = declare_decoder(CONFIG)
run = partial(initialize, SPECS, CONFIG)


@pytest.fixture(scope="module")
def fresh() -> dict[str, jax.Array]:
    return named(jax.jit(run)(jax.random.key(0)))


def test_fresh_weights_have_the_declared_standard_deviations(fresh):
    for path, array in fresh.items():
        if path.endswith("norm.scale"):
            np.testing.assert_array_equal(array, np.ones(array.shape, np.float32))
            continue
        residual = path in ("layers.attn.o_proj", "layers.mlp.down_proj")
        std = CONFIG.init_std / math.sqrt(2 * CONFIG.num_layers) if residual else CONFIG.init_std
        # Of n draws the mean and the standard deviation are off by std / sqrt(n) and std / sqrt(2 n), times a few.
        assert abs(array.mean()) < 4 * std / math.sqrt(array.size), path
        assert abs(array.std() - std) < 4 * std / math.sqrt(2 * array.size), path


def test_no_two_parameters_and_no_two_layers_start_alike(fresh):
    matrices = {path: array for path, array in fresh.items() if not path.endswith("norm.scale")}
    starts = [np.asarray(array).ravel()[:8] / array.std() for array in matrices.values()]
    starts += [np.asarray(layer).ravel()[:8] / layer.std() for layer in fresh["layers.attn.q_proj"][1:]]
    distance = [np.abs(a - b).max() for i, a in enumerate(starts) for b in starts[:i]]
    assert min(distance) > 0.1


def test_a_parameter_starts_the_same_whatever_others_the_model_has(fresh):
    tied = tiny_config(embed_dim=64, init_std=0.03, tie_embeddings=True)
    others = named(jax.jit(partial(initialize, declare_decoder(tied), tied, dtype=jnp.bfloat16))(jax.random.key(0)))
    assert fresh.keys() - others.keys() == {"lm_head"}
    for path, array in others.items():
        # The tied model was asked for in bfloat16: the same draws, rounded.
        np.testing.assert_array_equal(array, fresh[path].astype(jnp.bfloat16))


def test_fresh_weights_are_the_same_on_any_mesh_and_lie_where_declared(fresh):
    # 97 tokens divide over nothing: the vocabulary stays whole.
    places = abstract(SPECS, jnp.float32, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ("vocab", "vocab_in"))
    cut = named(jax.jit(run, out_shardings=jax.tree.map(lambda place: place.sharding, places))(jax.random.key(0)))
    for path, place in named(places).items():
        assert cut[path].sharding == place.sharding
        np.testing.assert_array_equal(cut[path], fresh[path])


def test_parameters_are_stored_cut_over_fsdp_and_tensor(fresh):
    places = named(abstract(SPECS, jnp.float32, make_mesh(MeshConfig(fsdp=4, tensor=2))))
    assert {path: place.sharding.spec for path, place in places.items()} == {
        "embed": PartitionSpec(("fsdp", "tensor"), None),
        "layers.attn_norm.scale": PartitionSpec(None, ("fsdp",)),
        "layers.attn.q_proj": PartitionSpec(None, ("tensor",), None, ("fsdp",)),
        "layers.attn.k_proj": PartitionSpec(None, ("tensor",), None, ("fsdp",)),
        "layers.attn.v_proj": PartitionSpec(None, ("tensor",), None, ("fsdp",)),
        "layers.attn.o_proj": PartitionSpec(None, ("fsdp",), ("tensor",), None),
        "layers.mlp_norm.scale": PartitionSpec(None, ("fsdp",)),
        "layers.mlp.gate_proj": PartitionSpec(None, ("tensor",), ("fsdp",)),
        "layers.mlp.up_proj": PartitionSpec(None, ("tensor",), ("fsdp",)),
        "layers.mlp.down_proj": PartitionSpec(None, ("fsdp",), ("tensor",)),
        "final_norm.scale": PartitionSpec(("fsdp",)),
        "lm_head": PartitionSpec(("tensor",), ("fsdp",)),
    }
    assert all(place.shape == fresh[path].shape for path, place in places.items())
