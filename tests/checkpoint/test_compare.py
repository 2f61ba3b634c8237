"""Two checkpoints side by side: what `camelid diff` and `camelid convert --verify` say."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from camelid.checkpoint.compare import compare
from camelid.checkpoint.convert import convert
from camelid.checkpoint.formats import open_checkpoint
from camelid.errors import UserError
from runs import called
from tiny import save_hf, tiny_config, tiny_params, transformers_twin


def saved(folder: Path, **fields: int) -> Path:
    config = tiny_config(**fields)
    return save_hf(transformers_twin(config, tiny_params(config)), folder)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")


def test_one_changed_number_is_found_in_the_parameter_that_has_it(model: Path, tmp_path: Path):
    convert(model, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] += np.float32(0.5)
    save_file(tensors, file, metadata={"format": "pt"})
    found = {each.path: each for each in compare(open_checkpoint(model), open_checkpoint(tmp_path / "other"))}
    assert [path for path, each in found.items() if not each.equal] == ["layers.mlp.up_proj"]
    assert found["layers.mlp.up_proj"].largest == pytest.approx(0.5, rel=1e-5)
    assert not found["layers.mlp.up_proj"].rounded
    done = called("diff", model, tmp_path / "other")
    assert done.returncode == 1
    assert "layers.mlp.up_proj: float32 and float32, at most 0.5 apart" in done.stdout
    assert "11 of 12 parameters are equal" in done.stdout


def test_rounding_is_told_from_change(model: Path, tmp_path: Path):
    convert(model, tmp_path / "rounded", dtype="bfloat16")
    found = list(compare(open_checkpoint(model), open_checkpoint(tmp_path / "rounded")))
    assert all(each.rounded and not each.equal and 0 < each.largest < 0.02 for each in found)
    assert {each.dtypes for each in found} == {("float32", "bfloat16")}


def test_equal_checkpoints_differ_in_nothing(model: Path, tmp_path: Path):
    assert called("convert", model, tmp_path / "same", "--verify").stderr.splitlines()[-2:] == [
        "every tensor is equal",
        "logits of 32 tokens are at most 0 apart; 100% agree on the next one",
    ]
    done = called("diff", model, tmp_path / "same", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["config"] == {}
    assert all(each["equal"] for each in report["parameters"])


def test_other_fields_are_differences_and_other_shapes_another_model(model: Path, tmp_path: Path):
    theta = saved(tmp_path / "theta", rope_theta=500.0)
    done = called("diff", model, theta)
    assert done.returncode == 1
    assert "rope_theta: 10000.0 and 500.0" in done.stdout
    with pytest.raises(
        UserError, match=r"layers\.mlp\.gate_proj is \(4, 80, 48\) in one and \(4, 96, 48\) in the other"
    ):
        list(compare(open_checkpoint(model), open_checkpoint(saved(tmp_path / "wide", mlp_dim=96))))
    with pytest.raises(UserError, match="only one of the two has lm_head"):
        list(compare(open_checkpoint(model), open_checkpoint(saved(tmp_path / "tied", tie_embeddings=True))))
