"""Every mesh of eight simulated devices trains what one device trains."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import camelid.runs.run
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import initialize, map_specs
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from camelid.parallel.rules import placement
from camelid.parallel.stop_signal import StopSignal
from runs import column, losses, recipe, stories_run
from tiny import tiny_config

MESHES = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 2, "fsdp": 1, "tensor": 4},  # the model has four key/value heads
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


@pytest.fixture(scope="module")
def alone(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """20 steps on one device."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        camelid.runs.run.run(recipe(stories_run(folder, assets)))
    return losses(folder / "run")


def assert_same_training(rows: list[dict], reference: list[dict], rtol: float) -> None:
    assert column(rows, "step").tolist() == column(reference, "step").tolist()
    assert column(rows, "weight").tolist() == column(reference, "weight").tolist()
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(column(rows, name), column(reference, name), rtol=rtol, err_msg=name)


@pytest.mark.quick_compile
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_twenty_losses_and_gradient_norms_are_those_of_one_device(
    assets: Path, alone: list[dict], tmp_path: Path, mesh: dict[str, int]
):
    assert len(alone) == 20
    assert column(alone, "loss")[:5].mean() > column(alone, "loss")[-5:].mean() + 0.2, "nothing is learned"
    outcome = camelid.runs.run.run(recipe(stories_run(tmp_path, assets, mesh=mesh)))
    assert dict(outcome.model.mesh.shape) == {"data": 1, "tensor": 1} | mesh
    assert len(jax.tree.leaves(outcome.model.params)[0].sharding.device_set) == 8
    # Measured: 3e-6. Sums over devices are taken in another order.
    assert_same_training(losses(tmp_path / "run"), alone, rtol=1e-4)


@pytest.mark.quick_compile
def test_microbatches_on_a_mesh_change_nothing(assets: Path, alone: list[dict], tmp_path: Path):
    table = stories_run(tmp_path, assets, mesh=MESHES["all"], train__accumulate=2)
    camelid.runs.run.run(recipe(table))
    assert_same_training(losses(tmp_path / "run"), alone, rtol=1e-4)


RATES = ("embedding", "attention", "residual", "mlp", "forgetful_max_ratio")
DROPOUT = {"train__steps": 8, **{f"dropout__{name}": 0.1 for name in RATES}}


@pytest.mark.quick_compile
def test_dropout_depends_on_no_mesh_and_no_microbatch(
    assets: Path, alone: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tables = [stories_run(tmp_path, assets, run=str(tmp_path / name), **DROPOUT) for name in ("one", "eight")]
    tables[1] |= {"mesh": MESHES["all"]}
    tables[1]["train"]["accumulate"] = 2
    camelid.runs.run.run(recipe(tables[1]))
    on_one_device(monkeypatch)
    camelid.runs.run.run(recipe(tables[0]))
    one, eight = (losses(tmp_path / name) for name in ("one", "eight"))
    assert_same_training(one, eight, rtol=1e-4)
    assert np.abs(column(one, "loss") - column(alone, "loss")[:8]).min() > 1e-3, "nothing is dropped"


class StopAfterEight(StopSignal):
    def should_stop(self, step: int) -> bool:
        return step == 8


@pytest.mark.quick_compile
def test_a_run_stopped_on_one_mesh_goes_on_on_another(assets: Path, alone: list[dict], tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "StopSignal", StopAfterEight)
        first = camelid.runs.run.run(recipe(stories_run(tmp_path, assets, mesh=MESHES["fsdp"])))
    assert (first.steps, first.finished) == (8, False)
    assert not (tmp_path / "run" / "model").exists()
    second = camelid.runs.run.run(recipe(stories_run(tmp_path, assets, mesh=MESHES["all"])))
    assert (second.steps, second.finished) == (20, True)
    assert_same_training(losses(tmp_path / "run"), alone, rtol=1e-4)


def test_fresh_parameters_are_the_same_on_every_mesh_bit_by_bit():
    config = tiny_config(vocab_size=96)
    specs = declare_decoder(config)

    def fresh(mesh: Mesh) -> Decoder:
        places = map_specs(lambda spec: placement(spec.axes, mesh), specs)
        return jax.jit(lambda key: initialize(specs, config, key), out_shardings=places)(jax.random.key(3))

    alone = jax.tree.leaves(fresh(one_device()))
    for mesh in (MESHES["data"], MESHES["fsdp"], MESHES["all"]):
        leaves = jax.tree.leaves(fresh(make_mesh(MeshConfig(**mesh))))
        assert all(map(np.array_equal, leaves, alone))
