"""Files that are cut short, garbage, or not what config.json says: refused by name, and nothing is written."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import camelid
from camelid.checkpoint.layout import tensor_chunks
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from runs import assert_refused, called, tensor_bytes
from text.tiny import save_byte_tokenizer
from tiny import save_hf, tiny_config, tiny_params, transformers_twin

DamagedState = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sound checkpoint."""
    config = tiny_config(num_layers=2)
    folder = save_hf(transformers_twin(config, tiny_params(config)), tmp_path_factory.mktemp("sound") / "hf")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(sound: dict[str, bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in sound.items():
        (folder / name).write_bytes(content)
    return folder


def weights(change: Callable[[bytes], bytes]) -> DamagedState:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def header(change: Callable[[dict], object]) -> DamagedState:
    """The header replaced by what `change` returns."""

    def rewrite(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return weights(rewrite)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> DamagedState:
    def damage(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return damage


def config(**fields: object) -> DamagedState:
    def damage(folder: Path) -> None:
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(table | fields))

    return damage


def index(value: object) -> DamagedState:
    """An index beside a file that only an index names."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))

    return damage


def without(name: str) -> DamagedState:
    return lambda folder: (folder / name).unlink()


def entry(name: str, **fields: object) -> Callable[[dict], dict]:
    return lambda table: table | {name: table[name] | fields}


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
DAMAGES: dict[str, tuple[DamagedState, tuple[str, ...]]] = {
    "empty": (weights(lambda content: b""), ("model.safetensors is not a safetensors file, or is cut short",)),
    "cut in the length": (weights(lambda content: content[:5]), ("model.safetensors", "cut short")),
    "cut in the header": (weights(lambda content: content[:100]), ("model.safetensors", "cut short")),
    "cut in the tensors": (weights(lambda content: content[:-10]), ("model.safetensors is cut short", "bytes")),
    "bytes after the end": (weights(lambda content: content + b"\0"), ("1 bytes after its last tensor",)),
    "another file": (weights(lambda content: b"PK\x03\x04" * 1000), ("model.safetensors is not a safetensors file",)),
    "garbage header": (
        weights(lambda content: content[:8] + b"\xff" * 64 + content[72:]),
        ("model.safetensors has an unreadable header",),
    ),
    "header a list": (header(list), ("header of another format",)),
    "entry without dtype": (header(lambda table: table | {NORM: {"shape": [1]}}), ("header of another format",)),
    "entry a number": (header(lambda table: table | {NORM: 3}), ("header of another format",)),
    "offsets text": (header(entry(NORM, data_offsets="ab")), ("header of another format",)),
    "unknown dtype": (header(entry(NORM, dtype="F8_E4M3")), (NORM, "F8_E4M3")),
    "size against shape": (header(entry(NORM, shape=[47])), (NORM, "(47,)")),
    "missing tensor": (tensors(lambda held: held.pop(DOWN)), (f"lacks {DOWN}",)),
    "many missing tensors": (tensors(lambda held: [held.pop(n) for n in [*held][:5]]), ("lacks", "and 2 more")),
    "extra tensor": (tensors(lambda held: held.update(extra=torch.ones(2))), ("no place for: extra",)),
    "wrong shape": (tensors(lambda held: held.update({NORM: torch.ones(47)})), (NORM, "(47,)", "(48,)")),
    "one axis more": (tensors(lambda held: held.update({NORM: torch.ones(48, 1)})), (NORM, "(48, 1)", "(48,)")),
    "more layers in config": (config(num_hidden_layers=3), ("lacks model.layers.2.",)),
    "fewer layers in config": (config(num_hidden_layers=1), ("no place for: model.layers.1.",)),
    "unknown config field": (config(alibi=True), ("alibi = True",)),
    "config not JSON": (lambda folder: (folder / "config.json").write_text('{"a": '), ("config.json is not JSON",)),
    "config a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ("config.json does not hold a JSON object",),
    ),
    "no config": (without("config.json"), ("has no config.json",)),
    "no weights": (without("model.safetensors"), ("neither model.safetensors nor",)),
    "index without map": (index({"metadata": {}}), ("model.safetensors.index.json has no weight_map",)),
    "index of numbers": (index({"weight_map": {NORM: 1}}), ("has no weight_map",)),
    "index names a lost file": (index({"weight_map": {NORM: "model-1.safetensors"}}), ("names model-1.safetensors",)),
    "index leaves the folder": (index({"weight_map": {NORM: "../a.safetensors"}}), ("names ../a.safetensors",)),
    "index alone lists a tensor": (
        index({"weight_map": {NORM: "part.safetensors", "x": "y.safetensors"}}),
        ("names y",),
    ),
}


@pytest.mark.parametrize(("damage", "about"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_written(
    folder: Path, tmp_path: Path, damage: DamagedState, about: tuple[str, ...]
):
    damage(folder)
    with pytest.raises(UserError) as refusal:
        camelid.load(folder)
    for part in about:
        assert part in refusal.value.problem
    assert_refused(called("convert", folder, tmp_path / "converted"), *about)
    assert_refused(called("inspect", folder), *about)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_the_sound_checkpoint_of_these_tests_opens(folder: Path, tmp_path: Path):
    assert called("convert", folder, tmp_path / "converted").returncode == 0
    assert tensor_bytes(tmp_path / "converted") == tensor_bytes(folder)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder: Path):
    checkpoint = open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(UserError, match="ended while it was read"):
        list(tensor_chunks(checkpoint.table, "lm_head.weight", np.dtype(np.float32), checkpoint.read_slice))


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_name_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(called("inspect", path), "does not exist")


def test_a_name_that_the_hub_does_not_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(called("inspect", "nobody/nothing"), "nobody/nothing is not a local folder")


def test_a_prompt_that_needs_an_id_beyond_the_model_is_refused(folder: Path):
    save_byte_tokenizer(folder)
    done = called("generate", folder, "a")
    assert "note: " in done.stderr
    assert "has 258 ids, the model's vocabulary only 97" in done.stderr
    assert_refused(done, "prompt 0 has token 97, and the vocabulary has 97")
