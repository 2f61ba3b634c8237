"""A checkpoint opened on a mesh is the checkpoint: same parameters, same logits, same bytes when saved."""

from pathlib import Path

import jax
import numpy as np
import pytest

import camelid
from camelid import ComputeConfig, MeshConfig
from camelid.checkpoint import layout
from camelid.errors import UserError
from camelid.model.params import named
from runs import tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, tiny_tokens, transformers_twin

CONFIG = tiny_config(vocab_size=96)
MESHES = {
    "data": MeshConfig(data=8, fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(transformers_twin(CONFIG, tiny_params(CONFIG)), tmp_path_factory.mktemp("load") / "hf")


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_parameters_and_saved_bytes_are_those_of_the_file_and_logits_those_of_one_device(
    folder: Path, tmp_path: Path, mesh: MeshConfig
):
    model = camelid.load(folder, mesh=mesh)
    for path, array in named(tiny_params(CONFIG)).items():
        np.testing.assert_array_equal(named(model.params)[path], array, err_msg=path)
    tokens = tiny_tokens(CONFIG, 8, 11)
    # Sums in another order, of logits that reach 20.
    np.testing.assert_allclose(model.logits(tokens), camelid.load(folder).logits(tokens), atol=1e-4)
    model.save(tmp_path / "saved")
    assert tensor_bytes(tmp_path / "saved") == tensor_bytes(folder)


def test_each_device_holds_its_part_and_no_more(folder: Path):
    model = camelid.load(folder, mesh=MESHES["all"])
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    for device in jax.devices():
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(model.params)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert held < 1.1 * whole / 4, "data = 2 copies are cut four ways"


def test_only_the_slices_of_a_device_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """No array larger than one device's part of a parameter is made on the host."""
    made: list[int] = []
    original = layout.aligned
    monkeypatch.setattr(
        layout, "aligned", lambda shape, dtype: made.append(int(np.prod(shape))) or original(shape, dtype)
    )
    model = camelid.load(folder, mesh=MESHES["fsdp"])
    assert made
    largest = max(shard.data.size for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards)
    assert max(made) == largest


def test_heads_that_do_not_divide_are_refused_with_the_largest_size_that_would(folder: Path):
    with pytest.raises(UserError, match=r"kv_heads = 2 does not divide over tensor = 4\n.*tensor = 2.*replicate"):
        camelid.load(folder, mesh=MeshConfig(fsdp=2, tensor=4), compute=ComputeConfig(replicate=("heads",)))


def test_a_replicated_axis_need_not_divide(folder: Path):
    compute = ComputeConfig(replicate=("kv_heads", "heads"))
    model = camelid.load(folder, mesh=MeshConfig(fsdp=2, tensor=4), compute=compute)
    tokens = tiny_tokens(CONFIG, 2, 11)
    np.testing.assert_allclose(model.logits(tokens), camelid.load(folder).logits(tokens), atol=1e-4)


def test_an_axis_to_replicate_that_is_none_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"compute\.replicate names 'head'\n.*heads"):
        camelid.load(folder, compute=ComputeConfig(replicate=("head",)))


def test_a_mesh_that_does_not_fill_the_devices_is_refused(folder: Path):
    with pytest.raises(UserError, match=r"does not fill 8 devices\n.*product is 8"):
        camelid.load(folder, mesh=MeshConfig(data=3, fsdp=1))
