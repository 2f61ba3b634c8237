"""Parameters follow from their declarations: shapes, first values, places on the mesh."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract, build, initialize, named, shardings
from camelid.parallel.mesh import MeshConfig, make_mesh
from leaves import adapted, quantized
from tiny import tiny_config, tiny_params

CONFIG = tiny_config(embed_dim=64, init_std=0.03)
SPECS = declare_decoder(CONFIG)


@pytest.fixture(scope="module")
def fresh() -> dict[str, jax.Array]:
    return named(jax.jit(partial(initialize, SPECS, CONFIG))(jax.random.key(0)))


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


SOME = {
    "embed": SPECS.embed,
    "layers": {"attn": {"q_proj": SPECS.layers.attn.q_proj}, "mlp": {"down_proj": SPECS.layers.mlp.down_proj}},
    "final_norm": {"scale": SPECS.final_norm.scale},
}


def test_a_parameter_starts_the_same_whatever_others_the_model_has_and_is_rounded_last(fresh):
    some = named(jax.jit(partial(initialize, SOME, CONFIG, dtype=jnp.bfloat16))(jax.random.key(0)))
    assert len(some) == 4
    for path, array in some.items():
        np.testing.assert_array_equal(array, fresh[path].astype(jnp.bfloat16))


def test_a_tied_model_lacks_the_head_alone(fresh):
    tied = named(declare_decoder(tiny_config(tie_embeddings=True)))
    assert fresh.keys() - tied.keys() == {"lm_head"}


def test_fresh_weights_are_the_same_on_any_mesh_and_lie_where_declared(fresh):
    # 97 tokens divide over nothing: the vocabulary stays whole.
    places = abstract(SOME, jnp.float32, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ("vocab", "vocab_in"))
    shardings = jax.tree.map(lambda place: place.sharding, places)
    cut = named(jax.jit(partial(initialize, SOME, CONFIG), out_shardings=shardings)(jax.random.key(0)))
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


def test_the_arrays_of_every_type_of_weight_are_sharded_like_its_inputs_and_outputs():
    """Ranks are unsharded; groups of inputs are sharded like the inputs if their number divides."""
    mesh, config = make_mesh(MeshConfig(fsdp=4, tensor=2)), tiny_config(vocab_size=96)
    specs, params = declare_decoder(config), tiny_params(config)
    declared, arrays, ranks = named(specs), named(params), [3, 1, 2, 2]
    q, o, up, down = ("layers.attn.q_proj", "layers.attn.o_proj", "layers.mlp.up_proj", "layers.mlp.down_proj")
    many = adapted(declared[up], arrays[up], ranks)
    leaves = {
        q: adapted(declared[q], quantized(declared[q], arrays[q], 8), ranks, magnitude=True),
        o: quantized(declared[o], arrays[o], 3),
        up: dataclasses.replace(
            many, **{name: jnp.stack([getattr(many, name)] * 2, 1) for name in ("a", "b", "scale")}
        ),
        down: adapted(declared[down], arrays[down], ranks),
    }
    places = named(shardings(specs, build(specs, (arrays | leaves).values()), mesh))
    found = {
        f"{path}.{jax.tree_util.keystr(inner, simple=True, separator='.')}": place.spec
        for path in leaves
        for inner, place in jax.tree_util.tree_flatten_with_path(places[path])[0]
    }
    fsdp, tensor = ("fsdp",), ("tensor",)
    assert found == {
        f"{q}.base.codes": PartitionSpec(None, tensor, None, fsdp),
        f"{q}.base.scale": PartitionSpec(None, tensor, None, fsdp),
        f"{q}.a": PartitionSpec(None, None, fsdp),
        f"{q}.b": PartitionSpec(None, tensor, None, None),
        f"{q}.scale": PartitionSpec(None),
        f"{q}.magnitude": PartitionSpec(None, tensor, None),
        f"{o}.codes": PartitionSpec(None, fsdp, tensor, None),
        f"{o}.scale": PartitionSpec(None, fsdp, None),
        f"{up}.base": PartitionSpec(None, tensor, fsdp),
        f"{up}.a": PartitionSpec(None, None, None, fsdp),
        f"{up}.b": PartitionSpec(None, None, tensor, None),
        f"{up}.scale": PartitionSpec(None, None),
        f"{down}.base": PartitionSpec(None, fsdp, tensor),
        f"{down}.a": PartitionSpec(None, None, tensor),
        f"{down}.b": PartitionSpec(None, fsdp, None),
        f"{down}.scale": PartitionSpec(None),
    }
