"""The state of any optax optimizer is sharded when it is created, saved, restored onto any mesh, and continued."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.model.config import ComputeConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract, initialize, named
from camelid.model.pytree import path_name
from camelid.parallel.batch_sharding import BatchSharding
from camelid.parallel.mesh import MeshConfig, make_mesh
from camelid.train.objective import NextTokenLoss
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.state import TrainState, abstract_state, sharded_like, start_state
from camelid.train.step import TrainStep
from tiny import tiny_config, tiny_tokens

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(vocab_size=96, num_layers=2)  # eight devices divide it
SPECS = declare_decoder(CONFIG)
HERE, THERE = MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)


def muon() -> optax.GradientTransformation:
    """Muon for the matrices of layers, which are stacked and have one or two output axes; AdamW for the others."""

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = path_name(path)
        if not name.endswith("_proj"):
            return None
        inputs = 2 if name.endswith("o_proj") else 1
        numbers = range(leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(numbers[leaf.ndim - inputs :]), tuple(numbers[1:-inputs]))

    return optax.contrib.muon(1e-2, muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(axes, params))


def by_label() -> optax.GradientTransformation:
    """One optimizer for the attention, another for everything else."""

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "sgd" if ".attn." in path_name(path) else "adam", params)

    return optax.multi_transform({"sgd": optax.sgd(1e-2, momentum=0.9), "adam": optax.adam(1e-2)}, labels)


OPTIMIZERS = {
    "adamw": lambda: make_optimizer(OptimizerConfig(), 9, SPECS),
    "muon": muon,
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "multi_transform": by_label,
    "with booleans": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
}


def target(optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    return abstract_state(abstract(SPECS, "float32", mesh), optimizer)


def created(optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The first state; no array of it is ever on one device alone."""

    def create(key: jax.Array) -> TrainState:
        return start_state(initialize(SPECS, CONFIG, key), optimizer)

    places = jax.tree.map(lambda x: x.sharding, target(optimizer, mesh))
    return jax.jit(create, out_shardings=places)(jax.random.key(0))


def continued(optimizer: optax.GradientTransformation, mesh: Mesh, state: TrainState, steps: range):
    """The state after some steps, and their losses."""
    step = TrainStep(NextTokenLoss(config=CONFIG, compute=ComputeConfig()), optimizer, lambda count: 1.0, 1.0)
    places = jax.tree.map(lambda x: x.sharding, target(optimizer, mesh))
    compiled, losses = jax.jit(step, out_shardings=(places, None)), []
    for number in steps:
        tokens = tiny_tokens(CONFIG, 8, 13, number)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 12), np.float32)}
        batch |= {"positions": np.tile(np.arange(12, dtype=np.int32), (8, 1)), "segments": np.ones((8, 12), np.int32)}
        state, metrics = compiled(state, BatchSharding(8, mesh).place(batch))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_saved_state_continues_as_if_it_was_never_interrupted_on_any_mesh(tmp_path: Path, make: Any):
    optimizer, here, there = make(), make_mesh(HERE), make_mesh(THERE)
    with jax.set_mesh(here):
        state, _ = continued(optimizer, here, created(optimizer, here), range(2))
        checkpoints = RunCheckpoints(tmp_path, 1)
        checkpoints.save(2, state)
        checkpoints.wait()
        expected, losses = continued(optimizer, here, state, range(2, 4))
        again = checkpoints.restore(2, target(optimizer, here))
        for name, leaf in leaves(again).items():
            assert leaf.sharding.is_equivalent_to(leaves(state)[name].sharding, leaf.ndim), name
        found, same_losses = continued(optimizer, here, again, range(2, 4))
    assert same_losses == losses
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(np.array_equal(leaf, leaves(expected)[name]) for name, leaf in leaves(found).items())
    with jax.set_mesh(there):
        moved = checkpoints.restore(2, target(optimizer, there))
        assert all(np.array_equal(leaf, leaves(state)[name]) for name, leaf in leaves(moved).items())
        _, other_losses = continued(optimizer, there, moved, range(2, 4))
    checkpoints.close()
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)  # the same sums in another order


def leaves(state: TrainState) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_statistic_of_a_parameter_is_sharded_like_it(make: Any):
    mesh = make_mesh(THERE)
    state = target(make(), mesh)
    params = named(state.trainable)
    matched = 0
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        name = path_name(path)
        param = next((p for path, p in params.items() if name.endswith(f".{path}")), None)
        if param is not None and leaf.shape == param.shape:
            matched += 1
            assert leaf.sharding == param.sharding, name
    assert matched >= 3  # Adafactor has statistics of this shape for norms alone


def test_factored_statistics_are_sharded_like_the_axes_that_they_keep():
    mesh = make_mesh(THERE)
    state = leaves(target(OPTIMIZERS["adafactor"](), mesh))
    assert named(SPECS)["layers.attn.q_proj"].shape == (2, 6, 10, 48)
    assert state["params.layers.attn.q_proj"].sharding.spec == PartitionSpec(None, ("tensor",), None, ("fsdp",))
    row, column, placeholder = (state[f"opt_state.0.{name}.layers.attn.q_proj"] for name in ("v_row", "v_col", "v"))
    assert (row.shape, row.sharding.spec) == ((2, 6, 10), PartitionSpec(None, ("tensor",), None))
    assert (column.shape, column.sharding.spec) == ((2, 6, 48), PartitionSpec(None, ("tensor",), ("fsdp",)))
    assert (placeholder.shape, placeholder.sharding.spec) == ((1,), PartitionSpec())
    assert state["opt_state.0.count"].sharding.spec == PartitionSpec()


def test_a_statistic_whose_axes_are_unclear_is_replicated():
    mesh = make_mesh(THERE)
    param = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jax.NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
    placed = sharded_like({"v_row": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}}, {"w": param})
    assert placed["v_row"]["w"].sharding.spec == PartitionSpec()


def test_a_moving_average_and_counters_are_saved_and_restored(tmp_path: Path):
    mesh, optimizer = make_mesh(HERE), OPTIMIZERS["adamw"]()
    with jax.set_mesh(mesh):
        state = created(optimizer, mesh)
    counters = {"skipped": jnp.int32(3), "loss_scale": jnp.float32(2.0**15)}
    full = TrainState(state.step, state.trainable, state.opt_state, ema=state.trainable, counters=counters)
    checkpoints = RunCheckpoints(tmp_path, 1)
    checkpoints.save(1, full)
    checkpoints.wait()
    shapes = jax.eval_shape(lambda tree: tree, full)
    restored = checkpoints.restore(1, sharded_like(shapes, target(optimizer, mesh).trainable))
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(full)
    assert all(np.array_equal(leaf, leaves(full)[name]) for name, leaf in leaves(restored).items())
    assert leaves(restored)["ema.layers.mlp.up_proj"].sharding == state.trainable.layers.mlp.up_proj.sharding
    assert {"counters.skipped", "ema.embed", "params.embed", "step"} <= leaves(restored).keys()
