"""llama2.c files: the real one is read and written byte for byte, and every version holds what export.py puts there."""

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import camelid
from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.files import raw_payload
from camelid.checkpoint.formats import hf, llama2c
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder
from camelid.model.params import named
from camelid.parallel.mesh import one_device
from families import FAMILIES
from runs import tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, to_transformers, transformers_twin
from writing import put

VERSIONS = pytest.mark.parametrize("version", range(3))
tiny = partial(tiny_config, head_dim=8)
CONFIGS = {
    "grouped queries, untied": tiny(),
    "grouped queries, tied": tiny(tie_embeddings=True),
    "every head its own keys, untied": tiny(num_kv_heads=6),
    "every head its own keys, tied": tiny(num_kv_heads=6, tie_embeddings=True),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> camelid.ModelConfig:
    return CONFIGS[request.param]


def export(checkpoint: Checkpoint, dtype: Any = None) -> ExportSpec:
    dtypes = {path: np.dtype(dtype or own) for path, own in checkpoint.dtypes.items()}
    return ExportSpec(checkpoint.config, dtypes, checkpoint.read_slice, checkpoint.companions)


def params_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in named(load_params(checkpoint, ComputeConfig(), one_device())).items()}


def export_py(config: camelid.ModelConfig, params: Decoder, version: int, group: int = 16) -> bytes:
    """What export.py writes, put together once more; cos and sin are torch's."""
    tensors = {name: torch.tensor(array) for name, array in to_transformers(params).items()}

    def all_layers(name: str) -> list[torch.Tensor]:
        found = [tensors[f"model.layers.{layer}.{name}.weight"] for layer in range(config.num_layers)]
        if name.endswith(("q_proj", "k_proj")):
            found = [x.view(-1, 2, config.head_dim // 2, config.embed_dim).transpose(1, 2) for x in found]
        return found

    norms = [all_layers("input_layernorm"), all_layers("post_attention_layernorm"), [tensors["model.norm.weight"]]]
    attention = [all_layers(f"self_attn.{name}_proj") for name in "qkvo"]
    mlp = [all_layers(f"mlp.{name}_proj") for name in ("gate", "down", "up")]
    embed, head = [tensors["model.embed_tokens.weight"]], [] if config.tie_embeddings else [tensors["lm_head.weight"]]
    sizes = [config.embed_dim, config.mlp_dim, config.num_layers, config.num_heads, config.num_kv_heads]
    sizes += [config.vocab_size, config.context_length]
    plain = lambda tensors: b"".join(x.contiguous().numpy().tobytes() for x in tensors)  # noqa: E731
    if version == 0:
        sizes[5] *= -1 if head else 1
        freqs = 1.0 / 10000.0 ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(config.context_length), freqs)
        groups = [embed, norms[0], *attention, norms[1], *mlp, norms[2], [angles.cos(), angles.sin()], head]
        return struct.pack("<7i", *sizes) + b"".join(map(plain, groups))
    start = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, not head)
    if version == 1:
        return start.ljust(256, b"\0") + b"".join(map(plain, [*norms, embed, *attention, *mlp, head]))
    content = (start + struct.pack("<i", group)).ljust(256, b"\0") + b"".join(map(plain, norms))
    for x in (*embed, *(layer for matrix in attention + mlp for layer in matrix), *head):
        groups = x.reshape(-1, group)
        scales = groups.abs().max(1).values / 127.0
        content += plain([torch.round(groups / scales[:, None]).to(torch.int8), scales])
    return content


def without_angles(content: bytes, config: camelid.ModelConfig) -> bytes:
    """A file of version 0 without cos and sin."""
    size = 4 * config.context_length * config.head_dim
    end = len(content) - (0 if config.tie_embeddings else 4 * config.vocab_size * config.embed_dim)
    return content[: end - size] + content[end:]


# The real one ---------------------------------------------------------------------------


def test_the_real_file_gives_the_reference_logits_without_being_told_anything(assets: Path):
    folder = assets / "models" / "stories260K"
    arrays = np.load(folder / "reference.npz")
    for path in (folder / "stories260K.bin", folder):
        checkpoint = llama2c.open_checkpoint(path)
        assert checkpoint.config == read_model_config(folder / "hf")
        assert "norm_eps = 1e-05" in " ".join(checkpoint.notes)
    params = load_params(checkpoint, ComputeConfig(), one_device())
    model = camelid.Model(checkpoint.config, params, None, ComputeConfig(), one_device())
    for i in range(3):
        logits = model.logits(arrays[f"prompt{i}_ids"][None])
        np.testing.assert_allclose(logits[0], arrays[f"prompt{i}_logits"], rtol=0, atol=1e-4)


def test_the_real_model_is_written_as_the_real_file(stories: Path, tmp_path: Path):
    """Byte for byte but for cos and sin: one in twenty is rounded to the other side, by 2**-24 at most."""
    put(tmp_path, llama2c.plan_files, export(open_checkpoint(stories)), 0)
    ours, theirs = (tmp_path / "model.bin").read_bytes(), (stories.parent / "stories260K.bin").read_bytes()
    size, config = 4 * 512 * 8, read_model_config(stories)
    assert len(ours) == len(theirs)
    assert without_angles(ours, config) == without_angles(theirs, config)
    a, b = (np.frombuffer(content[-size:], "<f4") for content in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=0, atol=2**-24)
    assert (a == b).mean() > 0.94
    assert open_checkpoint(stories).config == llama2c.open_checkpoint(tmp_path).config
    assert (tmp_path / "tokenizer.json").read_bytes() == (stories / "tokenizer.json").read_bytes()


# Every version --------------------------------------------------------------------------


@VERSIONS
def test_files_hold_what_export_writes(config: camelid.ModelConfig, tmp_path: Path, version: int):
    params = tiny_params(config)
    theirs = save_hf(transformers_twin(config, params), tmp_path / "hf")
    expected = export_py(config, params, version)
    (tmp_path / "made").mkdir()
    put(tmp_path / "made", llama2c.plan_files, export(open_checkpoint(theirs)), version)
    written = (tmp_path / "made" / "model.bin").read_bytes()
    if version == 0:
        assert len(written) == len(expected)
        assert without_angles(written, config) == without_angles(expected, config)
    else:
        assert written == expected


@VERSIONS
def test_what_export_writes_is_read(config: camelid.ModelConfig, tmp_path: Path, version: int):
    params = tiny_params(config)
    path = tmp_path / "any.bin"
    path.write_bytes(export_py(config, params, version))
    assert [llama2c.matches(path, v) for v in range(3)] == [llama2c.matches(tmp_path, v) for v in range(3)]
    assert [llama2c.matches(path, v) for v in range(3)] == [v == version for v in range(3)]
    checkpoint = llama2c.open_checkpoint(path)
    assert checkpoint.config == replace(config, bos_id=1, eos_ids=(2,))
    opened = params_of(checkpoint)
    for name, array in named(params).items():
        if version == 2 and array.ndim > 1 and "norm" not in name:
            bound = bounds(np.asarray(array), 16, name)
            assert np.all(np.abs(opened[name] - array) <= bound), name
            assert np.abs(opened[name] - array).max() > 0.9 * bound.min(), name
        else:
            np.testing.assert_array_equal(opened[name], array, err_msg=name)


def bounds(array: np.ndarray, group: int, name: str) -> np.ndarray:
    """Half a scale for each number, and a little for float32; groups lie along the last axis of the file's matrix."""
    width = array.shape[-1] * (array.shape[-2] if name.endswith("o_proj") else 1)
    groups = np.abs(array).reshape(-1, width // group, group)
    half = groups.max(-1, keepdims=True) / 127 / 2 * (1 + 1e-4)
    return np.broadcast_to(half, groups.shape).reshape(array.shape)


def test_groups_may_run_on_from_row_to_row(tmp_path: Path):
    """As export.py makes them where group_size divides dim alone; any part of a matrix is read right."""
    config = tiny(mlp_dim=20)
    (tmp_path / "a.bin").write_bytes(export_py(config, tiny_params(config), 2, group=48))
    tensor = llama2c.open_checkpoint(tmp_path / "a.bin").tensors["layers.1.feed_forward.w2.weight"]
    whole, part = np.empty((48, 20), np.float32), np.empty((5, 3), np.float32)
    tensor.read_into(whole, (slice(0, 48), slice(0, 20)))
    tensor.read_into(part, (slice(7, 12), slice(4, 7)))
    np.testing.assert_array_equal(part, whole[7:12, 4:7])
    true = np.asarray(named(tiny_params(config))["layers.mlp.down_proj"][1])
    assert np.abs(whole - true).max() <= np.abs(true).max() / 127 / 2 * 1.001


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("version", [0, 1])
def test_there_and_back_again_is_exact(config: camelid.ModelConfig, tmp_path: Path, version: int, dtype: str):
    theirs = save_hf(transformers_twin(config, tiny_params(config)), tmp_path / "hf")
    for name in ("first", "file", "back"):
        (tmp_path / name).mkdir()
    kind = llama2c.FLOAT if dtype == "float32" else np.dtype(camelid.checkpoint.tensors.dtype_named(dtype))
    put(tmp_path / "first", hf.plan_files, export(open_checkpoint(theirs), kind))
    put(tmp_path / "file", llama2c.plan_files, export(open_checkpoint(tmp_path / "first")), version)
    again = llama2c.open_checkpoint(tmp_path / "file")
    assert again.config == config
    put(tmp_path / "back", hf.plan_files, export(again, kind))
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(tmp_path / "first")


@VERSIONS
def test_small_pieces_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int):
    config = CONFIGS["grouped queries, untied"]
    (tmp_path / "made").mkdir()
    (tmp_path / "a.bin").write_bytes(export_py(config, tiny_params(config), version))
    before = params_of(llama2c.open_checkpoint(tmp_path / "a.bin"))
    monkeypatch.setattr("camelid.checkpoint.layout.CHUNK_BYTES", 2000)
    monkeypatch.setattr(llama2c, "CHUNK", 1000)
    checkpoint = llama2c.open_checkpoint(tmp_path / "a.bin")
    put(tmp_path / "made", llama2c.plan_files, export(checkpoint), version)
    after = params_of(llama2c.open_checkpoint(tmp_path / "made"))
    for name in before:
        # A scale of version 2 is found again but for its last bit.
        np.testing.assert_allclose(after[name], before[name], rtol=1e-6 if version == 2 else 0, err_msg=name)


def test_groups_of_zeros_stay_zeros_and_the_tiniest_numbers_stay_tiny(tmp_path: Path):
    tiniest = np.float32(1.4e-45) * np.array([143, -143, 1, 0] * 12, np.float32)
    values = np.concatenate([np.zeros((2, 48), np.float32), tiniest[None]])
    matrix = raw_payload(camelid.checkpoint.tensors.PlannedTensor("w", values.shape, llama2c.FLOAT), lambda: [values])
    levels, _ = llama2c._levels(matrix, 16)
    assert not np.any(levels[:6])
    assert set(levels[6:].flatten()) == {127, -127, 1, 0}
    values[0, 0] = np.inf
    with pytest.raises(UserError, match="w has infinite or NaN values"):
        list(llama2c._levels(matrix, 16))


# Refusals -------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize(
    ("model", "about"),
    [
        (FAMILIES["gemma"].ours, "norm_offset"),
        (tiny(rope_theta=500.0), "rope_theta = 500.0"),
        (tiny(norm_eps=1e-6), "norm_eps = 1e-06"),
        (tiny_config(), "head_dim = 10"),
        (tiny(sliding_window=7), "sliding_window = 7"),
    ],
)
def test_what_llama2c_would_compute_otherwise_is_not_written(
    tmp_path: Path, model: camelid.ModelConfig, about: str, version: int
):
    nothing = ExportSpec(model, {}, lambda *_: np.empty(0))
    with pytest.raises(UserError, match=f"(cannot hold|does not support) {about}"):
        put(tmp_path, llama2c.plan_files, nothing, version)
    assert not list(tmp_path.iterdir())


def edited(content: bytes, at: int, kind: str, value: int) -> bytes:
    held = bytearray(content)
    struct.pack_into(kind, held, at, value)
    return bytes(held)


def size(index: int, value: int) -> Callable[[bytes, int], bytes]:
    """Another value for one of the seven sizes."""
    return lambda content, version: edited(content, (8 if version else 0) + 4 * index, "<i", value)


BAD: dict[str, tuple[int, Callable[[bytes, int], bytes], str]] = {  # from which version on
    "cut short": (0, lambda content, _: content[:-1], "bytes, and its header requires"),
    "too long": (0, lambda content, _: content + b"\0", "bytes, and its header requires"),
    "within the header": (0, lambda content, _: content[:20], "is truncated"),
    "empty": (0, lambda content, _: b"", "is truncated"),
    "no layers": (0, size(2, 0), "a size below 1"),
    "billions of layers": (0, size(2, 2**31 - 1), "bytes, and its header requires"),
    "seven heads": (0, size(3, 7), "multiple of n_heads"),
    "five key heads": (0, size(4, 5), "not a multiple of num_kv_heads"),
    "another version": (1, lambda content, _: edited(content, 4, "<i", 3), "version 3"),
    "a large flag": (1, lambda content, _: edited(content, 36, "<B", 2), "damaged"),
    "something behind the header": (1, lambda content, _: edited(content, 255, "<B", 2), "damaged"),
    "no group": (2, lambda content, _: edited(content, 37, "<i", 0), "a size below 1"),
    "groups that do not fit": (2, lambda content, _: edited(content, 37, "<i", 7), "groups of 7"),
}


@pytest.mark.parametrize(("case", "version"), [(case, version) for case in BAD for version in range(BAD[case][0], 3)])
def test_a_bad_file_is_refused(tmp_path: Path, case: str, version: int):
    _, change, about = BAD[case]
    config = CONFIGS["grouped queries, untied"]
    path = tmp_path / "model.bin"
    path.write_bytes(change(export_py(config, tiny_params(config), version), version))
    with pytest.raises(UserError, match=about) as refusal:
        llama2c.open_checkpoint(path)
    assert str(path) in refusal.value.problem


def test_a_config_of_another_model_is_refused_and_another_context_is_noted(tmp_path: Path):
    config = CONFIGS["grouped queries, untied"]
    path = tmp_path / "model.bin"
    path.write_bytes(export_py(config, tiny_params(config), 0))
    for name, value in {"num_kv_heads": 3, "vocab_size": 96, "tie_embeddings": True}.items():
        with pytest.raises(UserError, match=f"{name} = .* in its header, and the config {value}"):
            llama2c.open_checkpoint(path, tiny(**{name: value}))
    assert "context_length is 128" in llama2c.open_checkpoint(path, tiny(context_length=128)).notes[0]


def test_a_folder_must_hold_one(tmp_path: Path):
    with pytest.raises(UserError, match="and has none"):
        llama2c.open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        llama2c.open_checkpoint(tmp_path / "none.bin")
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(export_py(tiny(), tiny_params(tiny()), 1))
    with pytest.raises(UserError, match=r"and has a\.bin, b\.bin"):
        llama2c.open_checkpoint(tmp_path)


@VERSIONS
def test_random_damage_is_noticed_or_harmless(tmp_path: Path, version: int):
    draw, config = random.Random(version), tiny(num_layers=2)
    content, path = export_py(config, tiny_params(config), version), tmp_path / "model.bin"
    for _ in range(120):
        held = bytearray(content[: draw.randrange(len(content))] if draw.random() < 0.3 else content)
        for _ in range(draw.randint(0, 3) if held else 0):
            held[draw.randrange(min(len(held), 48))] = draw.randrange(256)
        path.write_bytes(held)
        try:
            checkpoint = llama2c.open_checkpoint(path)
        except UserError:
            continue
        assert all(tensor.offset < len(held) for tensor in checkpoint.tensors.values())
