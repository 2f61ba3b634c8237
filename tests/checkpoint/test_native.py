"""Training state on disk: whole, exact, and refused where it does not fit."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.state import TrainState, abstract_state
from tiny import tiny_config

CONFIG = tiny_config(vocab_size=96)  # eight devices divide it


def target(mesh: Mesh, config: ModelConfig = CONFIG, dtype: str = "float32") -> TrainState:
    specs = declare_decoder(config)
    optimizer = make_optimizer(OptimizerConfig(), 9, specs)
    return abstract_state(abstract(specs, dtype, mesh), optimizer)


def random_state(mesh: Mesh, seed: int = 0, dtype: str = "float32") -> TrainState:
    """Every leaf different, and no value one that a fresh state has."""
    draw = np.random.default_rng(seed)

    def leaf(spec: jax.ShapeDtypeStruct) -> jax.Array:
        values = 1000 * draw.standard_normal(spec.shape)
        return jax.device_put(jnp.asarray(values, spec.dtype), spec.sharding)

    return jax.tree.map(leaf, target(mesh, dtype=dtype))


def saved(folder: Path, *steps: int, keep: int = 9, dtype: str = "float32") -> None:
    checkpoints = RunCheckpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, random_state(one_device(), step, dtype))
    checkpoints.wait()
    checkpoints.close()


def assert_same(left: TrainState, right: TrainState) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_process_restores_every_bit(tmp_path: Path, dtype: str):
    saved(tmp_path, 3, 7, dtype=dtype)
    later = RunCheckpoints(tmp_path, 9)
    assert later.latest() == 7
    for step in (3, 7):
        state = later.restore(step, target(one_device(), dtype=dtype))
        assert_same(state, random_state(one_device(), step, dtype))
    later.close()


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8, fsdp=1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), None),
        (None, MeshConfig(data=4, fsdp=1, tensor=2)),
    ],
    ids=["fsdp to 2x2x2", "2x2x2 to data", "2x2x2 to one device", "one device to data x tensor"],
)
def test_what_one_mesh_saves_another_restores_bit_by_bit(
    tmp_path: Path, there: MeshConfig | None, here: MeshConfig | None
):
    before, after = (one_device() if mesh is None else make_mesh(mesh) for mesh in (there, here))
    checkpoints = RunCheckpoints(tmp_path, 1)
    state = random_state(before)
    checkpoints.save(1, state)
    checkpoints.wait()
    restored = checkpoints.restore(1, target(after))
    checkpoints.close()
    assert_same(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target(after)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_the_newest_stay(tmp_path: Path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert {file.name for file in tmp_path.iterdir()} == {"3", "4"}


def test_a_step_is_saved_once(tmp_path: Path):
    checkpoints = RunCheckpoints(tmp_path, 2)
    checkpoints.save(5, random_state(one_device(), 0))
    checkpoints.save(5, random_state(one_device(), 1))
    checkpoints.wait()
    assert_same(checkpoints.restore(5, target(one_device())), random_state(one_device(), 0))
    checkpoints.close()


def test_a_checkpoint_that_was_never_finished_is_not_the_newest_and_is_swept_away(tmp_path: Path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    later = RunCheckpoints(tmp_path, 2)
    assert later.latest() == 1
    later.save(2, random_state(one_device(), 2))
    later.wait()
    later.close()
    assert {file.name for file in tmp_path.iterdir()} == {"1", "2"}


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        (CONFIG, "bfloat16", r"step 1 has params\..* as .*'float32'.* not as .*'bfloat16'"),
        (replace(CONFIG, mlp_dim=88), "float32", r"mlp.* as \(\(4, 48, 80\).* not as \(\(4, 48, 88\)"),
        (replace(CONFIG, tie_embeddings=True), "float32", r"lm_head as .* not as None"),
    ],
    ids=["dtype", "shape", "leaf"],
)
def test_a_state_of_another_dtype_shape_or_leaf_is_refused(
    tmp_path: Path, config: ModelConfig, dtype: str, message: str
):
    saved(tmp_path, 1)
    later = RunCheckpoints(tmp_path, 2)
    with pytest.raises(UserError, match=message) as refusal:
        later.restore(1, target(one_device(), config, dtype))
    assert "recipe" in refusal.value.advice
    later.close()


def test_a_disk_without_room_for_the_next_checkpoint_is_an_error_and_the_last_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints = RunCheckpoints(tmp_path, 2)
    state = random_state(one_device())
    checkpoints.save(1, state)
    checkpoints.wait()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    due = rf"a checkpoint of {size / 1e6:.1f} MB is due\nFree some space"
    with pytest.raises(UserError, match=rf"{(size - 1) / 1e6:.1f} MB free, and {due}"):
        checkpoints.save(2, state)
    assert {file.name for file in tmp_path.iterdir()} == {"1"}
    assert_same(checkpoints.restore(1, target(one_device())), state)
    checkpoints.close()
