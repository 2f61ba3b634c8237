"""All formats by name: each is told from the others, and every lossless one leads to every other and back."""

import itertools
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import camelid
from camelid.cli import checkpoints
from camelid.checkpoint.compare import compare, config_differences
from camelid.checkpoint.convert import convert
from camelid.checkpoint.formats import FORMATS, OPEN, detect, open_checkpoint
from camelid.errors import UserError
from camelid.model.params import named
from families import FAMILIES
from runs import called, tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, transformers_twin

# What every format can hold: heads as wide as embed together, and what llama2.c has as constants.
MODELS = {
    "grouped, untied": tiny_config(head_dim=8, bos_id=1, eos_ids=(2,)),
    "grouped, tied": tiny_config(head_dim=8, tie_embeddings=True, bos_id=1, eos_ids=(2,)),
    "every head its own keys": tiny_config(head_dim=8, num_kv_heads=6, bos_id=1, eos_ids=(2,)),
}
LOSSLESS = [name for name, format in FORMATS.items() if not format.lossy]


@pytest.fixture(scope="module", params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every lossless format, by name."""
    config = MODELS[request.param]
    folder = tmp_path_factory.mktemp("formats")
    save_hf(transformers_twin(config, tiny_params(config)), folder / "theirs")
    for name in LOSSLESS:
        convert(folder / "theirs", folder / name, to=name)
    return {name: folder / name for name in LOSSLESS} | {"theirs": folder / "theirs"}


def test_the_command_line_names_every_format():
    assert list(get_args(checkpoints.Format)) == list(FORMATS)
    assert set(OPEN) >= set(FORMATS)


@pytest.mark.parametrize("name", LOSSLESS)
def test_each_is_known_by_its_files_and_holds_the_model(written: dict[str, Path], name: str):
    assert name.startswith(detect(written[name]))
    original, found = open_checkpoint(written["theirs"]), open_checkpoint(f"{name}::{written[name]}")
    assert config_differences(original.config, found.config) == {}
    assert all(difference.equal for difference in compare(original, found))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(LOSSLESS, 2)))
def test_every_format_leads_to_every_other_and_back(written: dict[str, Path], tmp_path: Path, first: str, second: str):
    convert(written[first], tmp_path / "second", to=second, format=first)
    convert(tmp_path / "second", tmp_path / "back", format=second)
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(written["theirs"])


@pytest.mark.parametrize("name", LOSSLESS)
def test_load_opens_and_save_writes_each(written: dict[str, Path], tmp_path: Path, name: str):
    model = camelid.load(written[name], format=name)
    model.save(tmp_path / "saved", format=name)
    again = camelid.load(tmp_path / "saved", format=name)
    for path, array in named(again.params).items():
        np.testing.assert_array_equal(array, named(model.params)[path], err_msg=path)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "hf"])
@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("gemma", "norm_offset|embed_scale|activation|head_dim"),
        ("qwen3", "qk_norm|q_norm|head_dim"),
        ("mistral, sliding window", "sliding_window|head_dim"),
        ("phi", "norm|bias"),
    ],
)
def test_what_a_format_cannot_say_is_refused_by_name(tmp_path: Path, name: str, family: str, field: str):
    config = FAMILIES[family].ours
    twin = transformers_twin(config, tiny_params(config), FAMILIES[family].theirs())
    folder = save_hf(twin, tmp_path / "theirs")
    with pytest.raises(UserError, match=field):
        convert(folder, tmp_path / "written", to=name)
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


def test_what_could_be_two_things_is_listed(written: dict[str, Path], tmp_path: Path):
    shutil.copytree(written["hf"], tmp_path / "both")
    shutil.copytree(written["meta"], tmp_path / "both", dirs_exist_ok=True)
    done = called("inspect", tmp_path / "both")
    assert done.returncode == 2
    assert "could be hf or meta" in done.stderr
    assert "hf::" in done.stderr
    assert called("inspect", f"meta::{tmp_path / 'both'}").returncode == 0


@pytest.mark.parametrize(
    ("name", "option", "ways"),
    [("gguf", "--tensor-parallel", 2), ("meta", "--pipeline-parallel", 2), ("meta", "--tensor-parallel", 0)],
)
def test_shards_that_a_format_does_not_have_are_refused(
    stories: Path, tmp_path: Path, name: str, option: str, ways: int
):
    done = called("convert", stories, tmp_path / "out", "--to", name, option, ways)
    assert done.returncode == 2
    assert f"{option[2:].replace('-', '_')} = {ways} is not for the format {name}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_prefix_is_refused(written: dict[str, Path]):
    with pytest.raises(UserError, match=r"format 'metta' is unknown\nThe formats are .*meta"):
        open_checkpoint(f"metta::{written['meta']}")


def test_a_file_without_a_config_needs_one(written: dict[str, Path], tmp_path: Path):
    shutil.copy(written["easylm"] / "streaming_params", tmp_path / "params")
    with pytest.raises(UserError, match="--config"):
        open_checkpoint(tmp_path / "params")
    done = called(
        "convert", tmp_path / "params", tmp_path / "hf", "--config", written["hf"] / "config.json", "--verify"
    )
    assert done.returncode == 0, done.stderr
    assert "every tensor is equal" in done.stderr
    assert tensor_bytes(tmp_path / "hf") == tensor_bytes(written["theirs"])


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.lossy])
def test_fewer_bits_are_said(stories: Path, tmp_path: Path, name: str):
    done = called("convert", stories, tmp_path / "small", "--to", name, "--verify")
    assert done.returncode == 0, done.stderr
    assert "tensors were rounded: they are at most 0." in done.stderr
