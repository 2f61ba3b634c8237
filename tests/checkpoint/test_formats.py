"""All formats by name: each is told from the others, and every lossless one leads to every other and back."""

import functools
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import camelid
from camelid.checkpoint.compare import compare, config_differences
from camelid.checkpoint.convert import convert
from camelid.checkpoint.formats.hf_config import config_from_hf, config_to_hf
from camelid.checkpoint.registry import FORMATS, OPENERS, TRAIN_STATE, detect, open_checkpoint
from camelid.cli import format_names
from camelid.errors import UserError
from camelid.model.config import DynamicScaling, LinearScaling, ModelConfig, YarnScaling
from camelid.model.params import named
from families import FAMILIES
from runs import called, tensor_bytes
from tiny import LLAMA3, save_hf, tiny_config, tiny_params, transformers_twin

# What every format can hold: heads as wide as embed together, and what llama2.c has as constants.
MODELS = {
    "grouped, untied": tiny_config(head_dim=8, bos_id=1, eos_ids=(2,)),
    "grouped, tied": tiny_config(head_dim=8, tie_embeddings=True, bos_id=1, eos_ids=(2,)),
    "every head its own keys": tiny_config(head_dim=8, num_kv_heads=6, bos_id=1, eos_ids=(2,)),
}
# A train state holds more than a model; test_easylm.py has its own tests.
WRITTEN = [name for name, format in FORMATS.items() if format.plan_files is not None and name != TRAIN_STATE]
LOSSLESS = [name for name in WRITTEN if not FORMATS[name].lossy]
# Whose files do not say all of a model: what is assumed without config.json, and the words of the note that says so.
SILENT = {
    "meta": {
        "context_length": "the context length",
        "bos_id": "BOS",
        "eos_ids": "EOS",
        "pad_id": "pad_id = None",
        "init_std": "init_std = 0.02",
        "family": "family = 'llama'",
        "tie_embeddings": "tie_embeddings = False",
    },
    "megatron": {
        "bos_id": "bos_id = None",
        "eos_ids": "eos_ids = none",
        "pad_id": "pad_id = None",
        "family": "family = 'llama'",
    },
    "llama2c": {
        "bos_id": "BOS 1",
        "eos_ids": "EOS 2",
        "pad_id": "pad_id = None",
        "init_std": "init_std = 0.02",
        "family": "family = 'llama'",
    },
    "gguf": {"init_std": "init_std = 0.02", "family": "family = 'llama'"},
}
# What opens without a config; the others ask for one. llama2.c has norm_eps and rope_theta as constants.
ALONE = [name for name in WRITTEN if name.split("-")[0] in SILENT]
LLAMA3_1 = replace(LLAMA3, original_context=8192)
SCALINGS = {
    "linear": LinearScaling(factor=4.0),
    "dynamic": DynamicScaling(factor=4.0),
    "llama3": LLAMA3_1,
    "llama3, of another context": LLAMA3,
    "yarn": YarnScaling(factor=4.0, original_context=16),
}
# Which of them a format can hold; GGUF the last one only where config.json says what its numbers mean.
HELD = {
    "meta": {"llama3"},
    "megatron": {"llama3"},
    "gguf": {"linear", "llama3", "llama3, of another context"},
}


def written_in_all(config: ModelConfig, folder: Path, dtype: torch.dtype) -> dict[str, Path]:
    """A model as transformers writes it, and from there in every lossless format, by name."""
    save_hf(transformers_twin(config, tiny_params(config)).type(dtype), folder / "theirs")
    for name in LOSSLESS:
        convert(folder / "theirs", folder / name, to=name)
    return {name: folder / name for name in (*LOSSLESS, "theirs")}


@pytest.fixture(scope="module", params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every lossless format, by name."""
    return written_in_all(MODELS[request.param], tmp_path_factory.mktemp("formats"), torch.float32)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """From a model's name to it in bfloat16, in every lossless format."""
    return functools.cache(
        lambda model: written_in_all(MODELS[model], tmp_path_factory.mktemp("rounded"), torch.bfloat16)
    )


def test_the_command_line_names_every_format():
    assert set(get_args(format_names.ReadableFormat)) == set(FORMATS)
    writable = [name for name, format in FORMATS.items() if format.plan_files is not None]
    assert list(get_args(format_names.WritableFormat)) == writable
    assert set(OPENERS) >= set(FORMATS)


@pytest.mark.parametrize("name", LOSSLESS)
def test_each_is_known_by_its_files_and_holds_the_model(written: dict[str, Path], name: str):
    assert name.startswith(detect(written[name]))
    original, found = open_checkpoint(written["theirs"]), open_checkpoint(f"{name}::{written[name]}")
    assert config_differences(original.config, found.config) == {}
    assert all(difference.equal for difference in compare(original, found))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_there_and_back(written: dict[str, Path], tmp_path: Path, first: str, second: str, dtype: str | None = None):
    """The same files again, byte for byte, and no field of the model lost on the way."""
    convert(written[first], tmp_path / "second", to=second, format=first, dtype=dtype)
    convert(tmp_path / "second", tmp_path / "back", to=first, format=second, dtype=dtype)
    assert contents(tmp_path / "back") == contents(written[first])
    configs = [
        open_checkpoint(path, name).config for path, name in ((written[first], first), (tmp_path / "second", second))
    ]
    assert config_differences(*configs) == {}
    assert configs[0].family == configs[1].family


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(LOSSLESS, 2)))
def test_every_format_leads_to_every_other_and_back(written: dict[str, Path], tmp_path: Path, first: str, second: str):
    assert_there_and_back(written, tmp_path, first, second)


# bfloat16 ---------------------------------------------------------------------------------

# What is float32 in a format whatever the model is: nothing is lost, and the way back has to say bfloat16.
WIDER = {"llama2c": "everything", "llama2c-v1": "everything", "gguf": "norms"}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("model", MODELS)
def test_each_holds_a_model_in_bfloat16(rounded: Callable[[str], dict[str, Path]], model: str, name: str):
    found, original = (open_checkpoint(rounded(model)[which], of) for which, of in ((name, name), ("theirs", "hf")))
    wider = {path for path in found.dtypes if WIDER.get(name) == "everything" or "norm" in path * (name in WIDER)}
    assert {path for path, dtype in found.dtypes.items() if dtype.name == "float32"} == wider
    assert {dtype.name for path, dtype in found.dtypes.items() if path not in wider} <= {"bfloat16"}
    assert all(difference.equal for difference in compare(original, found))


# Each format once on either side, with another one for every model.
@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        (model, first, LOSSLESS[(i + step) % len(LOSSLESS)])
        for model, step in zip(MODELS, (1, 5, 7), strict=True)
        for i, first in enumerate(LOSSLESS)
    ],
)
def test_every_format_leads_to_others_and_back_in_bfloat16(
    rounded: Callable[[str], dict[str, Path]], tmp_path: Path, model: str, first: str, second: str
):
    assert_there_and_back(rounded(model), tmp_path, first, second, "bfloat16")


# What files cannot say ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """From fields of a model to a checkpoint that has them; nothing in it is what anyone would assume."""
    folder = tmp_path_factory.mktemp("odd")

    def save(**fields: Any) -> Path:
        config = tiny_config(head_dim=8, bos_id=3, eos_ids=(5, 7), pad_id=9, init_std=0.05, family="mistral", **fields)
        place = folder / str(len([*folder.iterdir()]))
        plain = replace(config, rope_scaling=None, init_std=0.02)
        save_hf(transformers_twin(plain, tiny_params(plain)), place)
        (place / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
        return place

    return save


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_what_files_alone_do_not_say_of_a_model_is_named(
    odd: Callable[..., Path], tmp_path: Path, name: str, tied: bool
):
    constants = {} if name.startswith("llama2c") else {"norm_eps": 2e-6, "rope_theta": 70_000.0}
    source = odd(tie_embeddings=tied, context_length=48, **constants)
    convert(source, tmp_path / "out", to=name)
    (tmp_path / "out" / "config.json").unlink()
    found, config = open_checkpoint(f"{name}::{tmp_path / 'out'}"), open_checkpoint(source).config
    lost = {*config_differences(config, found.config), *(["family"] if config.family != found.config.family else [])}
    words = SILENT[name.split("-")[0]]
    assert lost == words.keys() - (set() if tied else {"tie_embeddings"})
    for field in lost:
        assert any(words[field] in note for note in found.notes), (field, found.notes)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in (*ALONE, "hf")])
def test_the_others_do_not_open_without_a_config(odd: Callable[..., Path], tmp_path: Path, name: str):
    source = odd(context_length=48)
    convert(source, tmp_path / "out", to=name)
    config = tmp_path / "config.json"
    (tmp_path / "out" / "config.json").rename(config)
    with pytest.raises(UserError, match="--config"):
        open_checkpoint(f"{name}::{tmp_path / 'out'}")
    given = config_from_hf(json.loads(config.read_text()))
    found = open_checkpoint(f"{name}::{tmp_path / 'out'}", config=given).config
    assert config_differences(open_checkpoint(source).config, found) == {}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaling_of_rotations_is_held_or_refused_by_name(odd: Callable[..., Path], tmp_path: Path, kind: str):
    scaling = SCALINGS[kind]
    source = odd(rope_scaling=scaling)
    for name in (name for name in WRITTEN if name != "hf"):
        if kind not in HELD.get(name.split("-")[0], ()):
            with pytest.raises(UserError, match="cannot hold rope_scaling"):
                convert(source, tmp_path / name, to=name)
            continue
        convert(source, tmp_path / name, to=name)
        assert open_checkpoint(tmp_path / name, name).config.rope_scaling == scaling
        (tmp_path / name / "config.json").unlink()
        if scaling == LLAMA3:
            with pytest.raises(UserError, match="does not match the scaling of Llama 3"):
                open_checkpoint(tmp_path / name, name)
        else:
            assert open_checkpoint(tmp_path / name, name).config.rope_scaling == scaling


@pytest.mark.parametrize("name", LOSSLESS)
def test_load_opens_and_save_writes_each(written: dict[str, Path], tmp_path: Path, name: str):
    model = camelid.load(written[name], format=name)
    model.save(tmp_path / "saved", format=name)
    again = camelid.load(tmp_path / "saved", format=name)
    for path, array in named(again.params).items():
        np.testing.assert_array_equal(array, named(model.params)[path], err_msg=path)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "hf"])
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
    assert f"{option[2:].replace('-', '_')} = {ways} does not apply to {name}" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "likely"),
    [
        (["model.fp16.safetensors", "tokenizer.json"], "hf"),
        (["weights.pth", "params.json"], "meta"),
        (["iter_0000100/x", "notes.txt"], "megatron"),
        (["llama-7b.gguf"], "gguf"),
        (["rank_0/x.ckpt", "strategy/y"], "mindspore"),
        (["adapter_model.bin.tmp", "adapter_weights.npz"], "peft"),
        (["params.pkl"], "llama2-jax"),
    ],
    ids=str,
)
def test_a_folder_of_no_format_is_refused_with_what_is_in_it_and_the_likeliest_formats(
    tmp_path: Path, names: list[str], likely: str
):
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"none of ours")
    done = called("inspect", tmp_path / "x")
    assert done.returncode == 2
    held = sorted({name.partition("/")[0] for name in names})
    assert f"it has no config.json, and holds {', '.join(held)}" in done.stderr
    known = re.findall(r"(?:are|;) ([\w-]+) \(", done.stderr)
    assert len(known) == 3
    assert known[0] == likely
    assert f"{likely}::{tmp_path / 'x'}" in done.stderr
    assert "--config" in done.stderr


def test_a_folder_around_a_checkpoint_and_a_file_of_another_kind_are_told(written: dict[str, Path], tmp_path: Path):
    shutil.copytree(written["meta"], tmp_path / "outer" / "original")
    with pytest.raises(UserError, match=rf"not a checkpoint itself\n.*{tmp_path / 'outer' / 'original'}: give"):
        open_checkpoint(tmp_path / "outer")
    with pytest.raises(UserError, match=rf"not a checkpoint itself\n.*{written['hf']}: give that folder"):
        open_checkpoint(written["hf"] / "config.json")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="does not look like a checkpoint"):
        open_checkpoint(tmp_path / "a.txt")


def test_weights_without_a_config_open_with_one(written: dict[str, Path], tmp_path: Path):
    (tmp_path / "bare").mkdir()
    shutil.copy(written["hf"] / "model.safetensors", tmp_path / "bare")
    with pytest.raises(UserError, match=r"has no config\.json.*\n.*--config"):
        open_checkpoint(f"hf::{tmp_path / 'bare'}")
    config = open_checkpoint(written["hf"]).config
    assert open_checkpoint(f"hf::{tmp_path / 'bare'}", config=config).config == config


def test_an_unknown_prefix_is_refused(written: dict[str, Path]):
    with pytest.raises(UserError, match=r"format 'metta' is unknown\nThe formats .*meta"):
        open_checkpoint(f"metta::{written['meta']}")


def test_a_file_without_a_config_needs_one(written: dict[str, Path], tmp_path: Path):
    shutil.copy(written["easylm"] / "streaming_params", tmp_path / "params")
    with pytest.raises(UserError, match="--config"):
        open_checkpoint(tmp_path / "params")
    done = called(
        "convert", tmp_path / "params", tmp_path / "hf", "--config", written["hf"] / "config.json", "--verify"
    )
    assert done.returncode == 0, done.stderr
    assert "all tensors are equal" in done.stderr
    assert tensor_bytes(tmp_path / "hf") == tensor_bytes(written["theirs"])


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.lossy])
def test_fewer_bits_are_said(stories: Path, tmp_path: Path, name: str):
    done = called("convert", stories, tmp_path / "small", "--to", name, "--verify")
    assert done.returncode == 0, done.stderr
    assert "tensors were rounded; the maximum absolute difference is 0." in done.stderr
