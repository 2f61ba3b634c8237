"""Folders of every family: what transformers wrote is read, saved and converted byte for byte, and opens again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import camelid
from camelid.checkpoint.convert import convert
from camelid.model.params import named
from families import FAMILIES, Family
from runs import tensor_bytes
from tiny import save_hf, tiny_params, tiny_tokens, transformers_twin


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def theirs(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    twin = transformers_twin(family.ours, tiny_params(family.ours), family.theirs())
    return save_hf(twin, tmp_path_factory.mktemp("family") / "theirs")


@pytest.fixture(scope="module")
def model(theirs: Path) -> camelid.Model:
    return camelid.load(theirs)


def open_with_transformers(folder: Path) -> torch.nn.Module:
    twin, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return twin.eval()


def config_dict(folder: Path) -> dict:
    """config.json as transformers understands it, without what says nothing."""
    table = transformers.AutoConfig.from_pretrained(folder).to_dict()
    aside = {"_name_or_path", "transformers_version"}
    if not table.get("use_sliding_window", True):
        aside.add("max_window_layers")
    rope = dict(table["rope_parameters"])
    rope.pop("type", None)  # beside rope_type
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    return {key: value for key, value in table.items() if key not in aside} | {"rope_parameters": rope}


def test_parameters_are_those_that_transformers_wrote(family: Family, model: camelid.Model):
    assert model.config == family.ours
    ours, drawn = named(model.params), named(tiny_params(family.ours))
    assert ours.keys() == drawn.keys()
    for path, array in drawn.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)


def test_saved_and_converted_folders_are_the_original(theirs: Path, model: camelid.Model, tmp_path: Path):
    """Every tensor byte for byte, config.json as transformers understands it, and transformers' own logits."""
    model.save(tmp_path / "saved")
    convert(theirs, tmp_path / "converted")
    tokens = torch.from_numpy(tiny_tokens(model.config, 2, 23)).long()
    with torch.no_grad():
        logits = open_with_transformers(theirs)(tokens).logits
        for name in ("saved", "converted"):
            assert tensor_bytes(tmp_path / name) == tensor_bytes(theirs)
            written, original = config_dict(tmp_path / name), config_dict(theirs)
            assert {key: written[key] for key in original} == original
            assert torch.equal(open_with_transformers(tmp_path / name)(tokens).logits, logits)


@pytest.mark.parametrize("how", ["whole", "in shards", "legacy"])
def test_pytorch_files_hold_the_same_parameters(theirs: Path, model: camelid.Model, tmp_path: Path, how: str):
    tensors = load_file(theirs / "model.safetensors")
    (tmp_path / "config.json").write_bytes((theirs / "config.json").read_bytes())
    if how == "in shards":
        halves = list(tensors)[::2], list(tensors)[1::2]
        files = {f"pytorch_model-0000{i + 1}-of-00002.bin": half for i, half in enumerate(halves)}
        weight_map = {name: file for file, half in files.items() for name in half}
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        files = {"pytorch_model.bin": list(tensors)}
    for file, half in files.items():
        state = {name: tensors[name] for name in half}
        torch.save(state, tmp_path / file, _use_new_zipfile_serialization=how != "legacy")
    for path, array in named(camelid.load(tmp_path).params).items():
        np.testing.assert_array_equal(array, named(model.params)[path], err_msg=path)
