"""GGUF files, against the gguf package of llama.cpp's authors and against transformers' own reader of them."""

import dataclasses
import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

import camelid
from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.containers.ggml import QUANTIZATIONS, dequantize, quantize
from camelid.checkpoint.files import MANIFEST
from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.formats import gguf as ours
from camelid.checkpoint.formats.gguf_config import metadata_from_config
from camelid.checkpoint.layout import read_parameter_slice
from camelid.checkpoint.registry import open_checkpoint, write_checkpoint
from camelid.checkpoint.tensors import dtype_named
from camelid.errors import UserError
from camelid.model.config import ComputeConfig, LinearScaling, Llama3Scaling, YarnScaling
from camelid.model.params import named
from camelid.parallel.mesh import one_device
from families import FAMILIES
from runs import tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, tiny_tokens, to_transformers, transformers_twin
from writing import put

QUANTISABLE: dict[str, Any] = {
    "embed_dim": 96,
    "mlp_dim": 128,
    "head_dim": 32,
    "num_layers": 2,
}  # rows of multiples of 32
LLAMA31 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)


def tiny(**fields: Any) -> camelid.ModelConfig:
    return tiny_config(**{"num_layers": 2} | fields)


CONFIGS = {
    "grouped, untied": tiny(bos_id=1, eos_ids=(2, 5), pad_id=0),
    "grouped, tied": tiny(tie_embeddings=True, rope_theta=500_000.0, norm_eps=1e-6),
    "all heads, untied": tiny(num_kv_heads=6, head_dim=8),
    "all heads, tied": tiny(num_kv_heads=6, head_dim=8, tie_embeddings=True),
    "linear": tiny(rope_scaling=LinearScaling(factor=3.1)),
    "llama 3.1": tiny(rope_scaling=LLAMA31, rope_theta=500_000.0, head_dim=32),
    "llama 3.2": tiny(
        rope_scaling=Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
        rope_theta=500_000.0,
        head_dim=32,
    ),
}
PLAIN = CONFIGS["grouped, untied"]
IDS = [1, 403, 407, 261, 378]
# Theirs by ours, written down once more; {} is the layer.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


# What llama.cpp's converter writes, by its package ------------------------------------------------


@cache
def their_tensors(config: camelid.ModelConfig) -> dict[str, np.ndarray]:
    """By GGUF's names, matrices of two axes; the rows of queries and keys with rotary pairs side by side."""
    tensors = {}
    for name, array in to_transformers(tiny_params(config)).items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        theirs = f"blk.{layer}.{NAMES[rest]}" if name.startswith("model.layers.") else NAMES[name]
        array = array.reshape(-1, array.shape[-1]) if array.ndim > 1 and "attn_output" not in theirs else array
        array = array.reshape(array.shape[0], -1) if array.ndim > 1 else array
        for part, heads in (("attn_q", config.num_heads), ("attn_k", config.num_kv_heads)):
            if part in theirs:
                halves = array.reshape(heads, 2, config.head_dim // 2, array.shape[1])
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        tensors[theirs] = array
    return tensors


def their_factors(config: camelid.ModelConfig) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by, pair by pair as in the paper."""
    scaling, factors = config.rope_scaling, []
    assert isinstance(scaling, Llama3Scaling)
    for pair in range(config.head_dim // 2):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * pair / config.head_dim)
        turns = scaling.original_context / wavelength
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        factors.append(1 / ((1 - kept) / scaling.factor + kept))
    return np.array(factors, np.float32)


def write_theirs(
    path: Path,
    config: camelid.ModelConfig,
    kind: str = "F32",
    sparse: bool = False,
    packed: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A file by llama.cpp's own writer; a sparse one leaves out what has a default.

    `packed` are the bytes of a kind that the package cannot make; all other tensors are float32 then.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if not sparse:
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_vocab_size(config.vocab_size)
        writer.add_custom_alignment(64)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"token {i} é" for i in range(config.vocab_size)])
        writer.add_token_scores([float(i) for i in range(config.vocab_size)])
        writer.add_array("tokenizer.ggml.merges", ["a b", ""])
        writer.add_add_bos_token(True)
    if config.bos_id is not None:
        writer.add_bos_token_id(config.bos_id)
    for end, add in zip(config.eos_ids, (writer.add_eos_token_id, writer.add_eot_token_id), strict=False):
        add(end)
    if config.pad_id is not None:
        writer.add_pad_token_id(config.pad_id)
    if isinstance(config.rope_scaling, LinearScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    elif config.rope_scaling is not None:
        writer.add_tensor("rope_freqs.weight", their_factors(config))
    code = gguf.GGMLQuantizationType[kind.upper()]
    for name, array in their_tensors(config).items():
        if packed is not None and name in packed:
            writer.add_tensor(name, packed[name], raw_dtype=code)
        elif array.ndim == 1 or kind == "F32" or packed is not None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def params_of(checkpoint: Checkpoint, dtype: str = "float32") -> dict[str, np.ndarray]:
    params = load_params(checkpoint, ComputeConfig(dtype=dtype, param_dtype=dtype), one_device())
    return {path: np.asarray(array) for path, array in named(params).items()}


def logits_of(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    params = load_params(checkpoint, ComputeConfig(), one_device())
    return np.asarray(camelid.Model(checkpoint.config, params, None, ComputeConfig(), one_device()).logits(tokens))


def saving_of(source: Path | Checkpoint, dtype: str | None = None) -> ExportSpec:
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    dtypes = checkpoint.dtypes if dtype is None else dict.fromkeys(checkpoint.dtypes, dtype_named(dtype))
    return ExportSpec(checkpoint.config, dtypes, checkpoint.read_slice, checkpoint.companions)


def written(folder: Path, source: Path | Checkpoint, dtype: str | None = None, kind: str | None = None) -> Path:
    with new_folder(folder, 0) as new:
        put(new, ours.plan_files, saving_of(source, dtype), kind)
    return folder


def save_tiny(config: camelid.ModelConfig, folder: Path) -> Path:
    """A Hugging Face folder, written by transformers where it can."""
    if config.rope_scaling is None or isinstance(config.rope_scaling, Llama3Scaling):
        return save_hf(transformers_twin(config, tiny_params(config)), folder)
    leaves = named(tiny_params(config))
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()}

    def source(path: str, layer: int | None, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        leaf = leaves[path] if layer is None else leaves[path][layer]
        return np.ascontiguousarray(np.asarray(leaf)[index], dtype)

    write_checkpoint(folder, ExportSpec(config, dtypes, source))
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> camelid.ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def hf_folder(config: camelid.ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(config, tmp_path_factory.mktemp("gguf") / "hf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file of theirs."""
    small = tiny_config(num_layers=1, embed_dim=8, mlp_dim=12, vocab_size=7, head_dim=4)
    return write_theirs(tmp_path_factory.mktemp("gguf") / "a.gguf", small).read_bytes()


# Reading --------------------------------------------------------------------------------


def test_a_file_of_llama_cpps_writer_is_read_without_any_other(config: camelid.ModelConfig, tmp_path: Path):
    path = write_theirs(tmp_path / "theirs.gguf", config)
    assert ours.matches(path)
    assert ours.matches(tmp_path)
    checkpoint = ours.open_checkpoint(tmp_path)
    assert checkpoint.config == config
    found = params_of(checkpoint)
    for path_of_ours, array in named(tiny_params(config)).items():
        np.testing.assert_array_equal(found[path_of_ours], array, err_msg=path_of_ours)
    assert any("Llama 3's" in note for note in checkpoint.notes) == isinstance(config.rope_scaling, Llama3Scaling)


def test_what_a_file_leaves_out_has_llama_cpps_defaults(tmp_path: Path):
    config = tiny_config(num_kv_heads=6, head_dim=8, rope_theta=10_000.0)
    checkpoint = ours.open_checkpoint(write_theirs(tmp_path / "a.gguf", config, sparse=True))
    assert checkpoint.config == config
    assert [note.split(": ")[1] for note in checkpoint.notes] == ["init_std = 0.02, family = 'llama'"]


def test_version_2_is_read_as_version_3(sound: bytes, tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(sound[:4] + struct.pack("<I", 2) + sound[8:])
    assert ours.open_checkpoint(tmp_path).config.vocab_size == 7


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_every_kind_of_number_is_read_as_the_gguf_package_reads_it(kind: str, tmp_path: Path):
    config = tiny_config(**QUANTISABLE)
    path = write_theirs(tmp_path / "a.gguf", config, kind)
    checkpoint = ours.open_checkpoint(path)
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert checkpoint.dtypes["layers.mlp.up_proj"] == dtype_named(dtype)
    assert checkpoint.dtypes["final_norm.scale"] == np.float32
    assert any("quantized" in note for note in checkpoint.notes) == kind.startswith("Q")
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        found = np.empty(checkpoint.tensors[tensor.name].shape, np.float32)
        checkpoint.tensors[tensor.name].read_into(found, tuple(slice(0, n) for n in found.shape))
        np.testing.assert_array_equal(found, expected, err_msg=tensor.name)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_slice_of_a_quantised_tensor_is_that_slice(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("camelid.checkpoint.containers.ggml.CHUNK", 200)  # a few rows at a time
    checkpoint = ours.open_checkpoint(write_theirs(tmp_path / "a.gguf", tiny_config(**QUANTISABLE), kind.upper()))
    part = checkpoint.table.entries["layers.attn.q_proj"]
    whole, cut = np.empty((6, 32, 96), np.float32), np.empty((3, 32, 10), np.float16)
    index = (slice(2, 5), slice(0, 32), slice(30, 40))
    read_parameter_slice(
        part, checkpoint.tensors["blk.1.attn_q.weight"], tuple(slice(0, n) for n in whole.shape), 1, whole
    )
    read_parameter_slice(part, checkpoint.tensors["blk.1.attn_q.weight"], index, 1, cut)
    np.testing.assert_array_equal(cut, whole[index].astype(np.float16))


def test_config_json_beside_wins_where_it_fits_and_is_left_out_where_not(tmp_path: Path):
    path = write_theirs(tmp_path / "a.gguf", PLAIN)
    hf_config = json.loads((save_tiny(PLAIN, tmp_path / "hf") / "config.json").read_text())
    for field, value, read in [("max_position_embeddings", 32, 32), ("num_attention_heads", 2, 64)]:
        (tmp_path / "config.json").write_text(json.dumps(hf_config | {field: value}))
        checkpoint = ours.open_checkpoint(path)
        assert checkpoint.config.context_length == read
        assert any(f"num_heads = {value}" in note for note in checkpoint.notes) == (read == 64)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = ours.open_checkpoint(path)
    assert checkpoint.config == PLAIN
    assert any("ignored: config.json has no" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("field", "value"), [("num_heads", 2), ("rope_theta", 500.0), ("rope_scaling", LLAMA31), ("tie_embeddings", True)]
)
def test_a_given_config_of_another_model_is_refused(field: str, value: object, tmp_path: Path):
    path = write_theirs(tmp_path / "a.gguf", tiny_config(head_dim=32))
    with pytest.raises(UserError, match=f"disagree: {field} = "):
        ours.open_checkpoint(path, tiny_config(**{"head_dim": 32, field: value}))


def test_factors_that_are_not_llama_3s_need_a_config(tmp_path: Path):
    scaling = Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)
    config = tiny_config(rope_scaling=scaling)
    path = write_theirs(tmp_path / "a.gguf", config)
    with pytest.raises(UserError, match=r"rope_freqs\.weight in .* does not match the scaling of Llama.*\n.*--config"):
        ours.open_checkpoint(path)
    assert ours.open_checkpoint(path, config).config == config


# Writing --------------------------------------------------------------------------------


def test_the_gguf_package_reads_what_camelid_writes(config: camelid.ModelConfig, hf_folder: Path, tmp_path: Path):
    folder = written(tmp_path / "ours", hf_folder)
    reader = gguf.GGUFReader(folder / "model.gguf")
    expected = dict(their_tensors(config))
    if isinstance(config.rope_scaling, Llama3Scaling):
        expected["rope_freqs.weight"] = their_factors(config)
    assert {tensor.name for tensor in reader.tensors} == expected.keys()
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        tolerance = 1e-5 if tensor.name == "rope_freqs.weight" else 0
        np.testing.assert_allclose(tensor.data, expected[tensor.name], rtol=tolerance, err_msg=tensor.name)
    theirs = gguf.GGUFReader(write_theirs(tmp_path / "theirs.gguf", config))
    for key, field in theirs.fields.items():
        if key.startswith("llama.") or key.endswith("_token_id"):
            assert reader.fields[key].contents() == field.contents(), key
            assert reader.fields[key].types == field.types, key
    assert reader.fields["general.file_type"].contents() == 0
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"


@pytest.mark.parametrize("name", ["grouped, untied", "all heads, tied"])
def test_transformers_computes_the_same_logits_from_what_camelid_writes(name: str, tmp_path: Path):
    config = CONFIGS[name]
    folder = written(tmp_path / "ours", save_tiny(config, tmp_path / "hf"))
    (folder / "config.json").unlink()
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
    tokens = tiny_tokens(config, 2, 23)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(tokens).long()).logits.numpy()
    # Logits reach 20, in another order of float32 sums.
    np.testing.assert_allclose(logits_of(ours.open_checkpoint(folder), tokens), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bit_exact(config: camelid.ModelConfig, hf_folder: Path, tmp_path: Path, dtype: str):
    start = tmp_path / "start"
    write_checkpoint(start, saving_of(hf_folder, dtype))
    folder = written(tmp_path / "ours", start)
    for metadata_only in (False, True):
        if metadata_only:
            (folder / "config.json").unlink()
        checkpoint = ours.open_checkpoint(folder)
        assert checkpoint.config == config
        assert {path: d.name for path, d in checkpoint.dtypes.items() if "norm" not in path} == dict.fromkeys(
            (path for path in checkpoint.dtypes if "norm" not in path), dtype
        )
        back = tmp_path / f"back {metadata_only}"
        write_checkpoint(back, saving_of(checkpoint, dtype))
        assert tensor_bytes(back) == tensor_bytes(start)
        assert json.loads((back / "config.json").read_text()) == json.loads((start / "config.json").read_text())


def test_norms_are_float32_whatever_the_rest_is(hf_folder: Path, tmp_path: Path):
    folder = written(tmp_path / "ours", hf_folder, "float16")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert {name for name, kind in types.items() if kind == "F32"} == {
        name for name in types if "norm" in name or name == "rope_freqs.weight"
    }
    assert set(types.values()) == {"F32", "F16"}


def test_companions_go_along_and_large_tensors_go_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_tiny(tiny_config(**QUANTISABLE), tmp_path / "hf")
    (folder / "LICENSE").write_text("")
    whole = written(tmp_path / "whole", folder, kind="q8_0")
    monkeypatch.setattr("camelid.checkpoint.layout.CHUNK_BYTES", 10_000)
    pieces = written(tmp_path / "pieces", folder, kind="q8_0")
    assert (pieces / "model.gguf").read_bytes() == (whole / "model.gguf").read_bytes()
    assert {file.name for file in pieces.iterdir()} == {
        "model.gguf",
        "config.json",
        MANIFEST,
        "LICENSE",
        "generation_config.json",
    }


REFUSED = {
    "gemma": (FAMILIES["gemma"].ours, "norm_offset = 1.0"),
    "qwen2": (FAMILIES["qwen2, tied"].ours, "qkv_bias = True"),
    "window": (FAMILIES["mistral, sliding window"].ours, "sliding_window = 7"),
    "yarn": (tiny_config(rope_scaling=YarnScaling(factor=4.0, original_context=16)), "rope_scaling = YarnScaling"),
}


@pytest.mark.parametrize(("refused", "field"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_llama_cpps_llama_is_not_is_refused(refused: camelid.ModelConfig, field: str, tmp_path: Path):
    export = ExportSpec(refused, {}, lambda *_: pytest.fail("something was read"))
    with pytest.raises(UserError, match=field):
        put(tmp_path, ours.plan_files, export)
    assert not list(tmp_path.iterdir())


def test_more_ends_than_llama_cpp_knows_are_refused():
    with pytest.raises(UserError, match=r"eos_ids = \(1, 2, 3, 4\): it has keys for 3"):
        metadata_from_config(dataclasses.replace(PLAIN, eos_ids=(1, 2, 3, 4)), 0, bos_id=None, eos_id=None)
    with pytest.raises(UserError, match=r"eos_ids = \(5, 1, 2, 3\): it has keys for 3"):
        metadata_from_config(dataclasses.replace(PLAIN, eos_ids=(1, 2, 3)), 0, bos_id=None, eos_id=5)


def test_an_unknown_quantisation_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"'q4_k' is unknown\n.*q8_0, q4_0"):
        put(tmp_path, ours.plan_files, ExportSpec(PLAIN, {}, lambda *_: pytest.fail("something was read")), "q4_k")


# Quantisation ---------------------------------------------------------------------------


def hard_numbers() -> np.ndarray:
    """Rows of many sizes, with zeros, exact halves, equal numbers, and the largest on either side."""
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((200, 96), np.float32) * 10.0 ** draw.integers(-6, 3, (200, 1)).astype(np.float32)
    rows[0], rows[1], rows[2, :32] = 0, 1, 0
    rows[3, :32] = (np.arange(32) - 15.5) * np.float32(127 / 15.5 / 2)
    rows[4, :32] = [127, *(np.arange(31) + np.float32(0.5))]
    rows[5, :32] = [-127, *(-np.arange(31) - np.float32(0.5))]
    rows[6, :32] = [8, *np.tile([-8, 7.5, -0.5], 10), 3]
    return rows.astype(np.float32)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_bytes_are_those_of_the_gguf_package(kind: str):
    rows, code = hard_numbers(), gguf.GGMLQuantizationType[kind.upper()]
    raw = quantize(rows, kind)
    np.testing.assert_array_equal(raw, gguf.quantize(rows, code))
    np.testing.assert_array_equal(dequantize(raw, kind), gguf.dequantize(raw, code))


@pytest.mark.parametrize("kind", [kind.name for kind in QUANTIZATIONS.values()])
def test_every_quantization_is_read_bit_for_bit_as_the_gguf_package_reads_it(kind: str, tmp_path: Path):
    code = gguf.GGMLQuantizationType[kind.upper()]
    block, size = gguf.GGML_QUANT_SIZES[code]
    draw = np.random.default_rng(1)
    raw = draw.integers(0, 256, (50, 4 * size), np.uint8)  # any bytes are numbers, some of them infinite or NaN
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, code)
    found = dequantize(raw, kind)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert found.shape == (50, 4 * block)


@pytest.mark.parametrize("kind", ["q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_a_model_of_a_kind_that_is_only_read_opens_with_its_numbers(kind: str, tmp_path: Path):
    """Every matrix with rows of whole blocks is made of random bytes, with scales that are small numbers."""
    code = gguf.GGMLQuantizationType[kind.upper()]
    block, size = gguf.GGML_QUANT_SIZES[code]
    config = tiny_config(num_layers=1, embed_dim=block, mlp_dim=block, num_heads=2, num_kv_heads=2, head_dim=8)
    numbers = np.random.default_rng(2)
    packed = {}
    for name, array in their_tensors(config).items():
        if array.ndim == 2 and array.shape[1] % block == 0:
            raw = numbers.integers(0, 40, (array.shape[0], array.shape[1] // block * size), np.uint8)
            packed[name] = raw
    path = write_theirs(tmp_path / "a.gguf", config, kind, packed=packed)
    checkpoint = ours.open_checkpoint(path)
    assert checkpoint.config == config
    assert [note for note in checkpoint.notes if kind in note]
    assert len(packed) > 5
    for name, raw in packed.items():
        found = np.empty(checkpoint.tensors[name].shape, np.float32)
        checkpoint.tensors[name].read_into(found, (slice(None), slice(None)))
        np.testing.assert_array_equal(found, gguf.dequantize(raw, code), err_msg=name)


@pytest.mark.parametrize(("kind", "steps"), [("q8_0", 127), ("q4_0", 8)])
def test_quantisation_is_as_close_as_it_says(kind: str, steps: int):
    rows = hard_numbers()
    error = np.abs(dequantize(quantize(rows, kind), kind) - rows).reshape(-1, 32)
    blocks = rows.reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    signed = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    whole = (kind == "q4_0") & (np.sign(blocks) == -np.sign(signed))
    rounding = np.maximum(largest / 2048, steps * 2.0**-25)
    assert (error <= largest / steps * np.where(whole, 1, 0.5) + rounding * (1 + 1e-6)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_numbers_that_cannot_be_quantised_are_refused(bad: float):
    rows = np.ones((2, 32), np.float32)
    rows[1, 7] = bad
    for kind in ("q8_0", "q4_0"):
        with pytest.raises(UserError, match=f"{kind} cannot hold"):
            quantize(rows, kind)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_quantised_folder_is_what_the_gguf_package_makes(kind: str, tmp_path: Path):
    config = tiny_config(**QUANTISABLE | {"mlp_dim": 80})  # down_proj has rows of 80 numbers
    folder = written(tmp_path / "ours", save_tiny(config, tmp_path / "hf"), kind=kind)
    reader, tensors = gguf.GGUFReader(folder / "model.gguf"), their_tensors(config)
    for tensor in reader.tensors:
        array = tensors[tensor.name]
        code = "F32" if array.ndim == 1 else "F16" if array.shape[1] % 32 else kind.upper()
        assert tensor.tensor_type.name == code, tensor.name
        expected = gguf.quantize(array, tensor.tensor_type)
        np.testing.assert_array_equal(tensor.data, expected, err_msg=tensor.name)
    assert reader.fields["general.file_type"].contents() == {"q8_0": 7, "q4_0": 2}[kind]
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert ours.open_checkpoint(folder).config == config


# A real model ---------------------------------------------------------------------------


def test_a_real_model_has_the_reference_logits(stories: Path, tmp_path: Path):
    """float32 as close as from Hugging Face's folder; bounds for the others are about twice what was seen."""
    arrays = np.load(stories.parent / "reference.npz")
    tokens, reference = arrays["prompt0_ids"][None].astype(np.int32), arrays["prompt0_logits"]
    for dtype, kind, bound in [
        ("float32", None, 1e-4),
        ("float16", None, 0.025),
        ("bfloat16", None, 0.15),
        ("float32", "q8_0", 0.45),
    ]:
        folder = written(tmp_path / f"{dtype} {kind}", stories, dtype, kind)
        off = np.abs(logits_of(ours.open_checkpoint(folder), tokens)[0] - reference).max()
        assert off < bound, (dtype, kind, off)
        if bound > 1e-4:
            assert off > bound / 10, (dtype, kind, off)


@pytest.mark.parametrize("name", ["hf_4layer", "hf_mha_untied"])
def test_other_real_models_have_the_logits_that_transformers_gave(assets: Path, tmp_path: Path, name: str):
    source = assets / "golden" / "hf_variants" / name
    reference = np.array(json.loads((source / "logits.json").read_text())["logits"], np.float32)
    folder = written(tmp_path / "ours", source)
    logits = logits_of(ours.open_checkpoint(folder), np.array([IDS], np.int32))
    np.testing.assert_allclose(logits.reshape(reference.shape), reference, rtol=0, atol=1e-4)


# Bad input ------------------------------------------------------------------------------

Change = Callable[[bytes], bytes]


def replaced(old: bytes, new: bytes) -> Change:
    def change(content: bytes) -> bytes:
        assert content.count(old) == 1
        assert len(old) == len(new)
        return content.replace(old, new)

    return change


def value(key: str, code: str, *numbers: float) -> Change:
    """The value of a key replaced, which must be of that type."""

    def change(content: bytes) -> bytes:
        at = content.index(key.encode()) + len(key) + 4
        packed = struct.pack(f"<{code}", *numbers)
        return content[:at] + packed + content[at + len(packed) :]

    return change


def tensor_field(name: str, skip: int, code: str, number: int) -> Change:
    """A number of a tensor's entry, `skip` bytes after its name."""

    def change(content: bytes) -> bytes:
        at = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + skip
        packed = struct.pack(f"<{code}", number)
        return content[:at] + packed + content[at + len(packed) :]

    return change


HUGE = 2**62
DAMAGES: dict[str, tuple[Change, str]] = {
    "empty": (lambda content: b"", "not a GGUF file"),
    "another file": (lambda content: b"PK\x03\x04" * 100, "not a GGUF file"),
    "version 1": (lambda content: content[:4] + struct.pack("<I", 1) + content[8:], "version 1;"),
    "big-endian": (lambda content: content[:4] + struct.pack(">I", 3) + content[8:], "big-endian"),
    "cut in the header": (lambda content: content[:300], "cut short or damaged: its header needs"),
    "cut in the tensors": (lambda content: content[:-100], "and it has"),
    "bytes after the end": (lambda content: content + bytes(64), "and it has"),
    "absurd tensors": (lambda content: content[:8] + struct.pack("<Q", HUGE) + content[16:], "cut short or damaged"),
    "absurd keys": (lambda content: content[:16] + struct.pack("<Q", HUGE) + content[24:], "cut short or damaged"),
    "absurd text": (lambda content: content[:24] + struct.pack("<Q", HUGE) + content[32:], "its header needs"),
    "absurd array": (value("tokenizer.ggml.tokens", "IQ", 8, HUGE), "cut short or damaged"),
    "an array of arrays": (value("tokenizer.ggml.tokens", "IQ", 9, 7), "array of type 9"),
    "a key twice": (replaced(b"llama.context_length", b"general.architecture"), "architecture is there twice"),
    "a strange key": (replaced(b"llama.vocab_size", b"llama.vocab\x1b[2J."), "a name is not plain text"),
    "another architecture": (
        replaced(b"architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"architecture\x08\0\0\0\x05\0\0\0\0\0\0\0gemma"),
        "architecture = 'gemma'",
    ),
    "no layers": (value("llama.block_count", "I", 0), "llama.block_count = 0"),
    "absurd layers": (
        value("llama.block_count", "I", 2**31 - 1),
        "llama.block_count = 2147483647, which is more than its tensors",
    ),
    "absurd heads": (value("llama.attention.key_length", "I", 2**31 - 1), "llama.attention.key_length = 2147483647"),
    "more layers": (value("llama.block_count", "I", 2), "lacks blk.1."),
    "heads that do not divide": (value("llama.attention.head_count", "I", 5), "num_heads = 5"),
    "rotary part": (value("llama.rope.dimension_count", "I", 2), "llama.rope.dimension_count = 2"),
    "alignment": (value("general.alignment", "I", 48), "general.alignment = 48"),
    "theta": (value("llama.rope.freq_base", "f", math.nan), "llama.rope.freq_base = nan"),
    "a quantisation": (tensor_field("blk.0.attn_v.weight", 20, "I", 16), "blk.0.attn_v.weight in .* is IQ2_XXS"),
    "super-blocks of 8": (tensor_field("blk.0.attn_v.weight", 20, "I", 12), "attn_v.weight has shape"),
    "an unknown type": (tensor_field("blk.0.attn_v.weight", 20, "I", 999), "of type 999"),
    "quantised rows of 8": (tensor_field("blk.0.attn_v.weight", 20, "I", 8), "attn_v.weight has shape"),
    "an absurd shape": (tensor_field("blk.0.attn_v.weight", 4, "Q", HUGE), "damaged"),
    "an empty shape": (tensor_field("blk.0.attn_v.weight", 4, "Q", 0), "attn_v.weight has shape"),
    "an absurd rank": (tensor_field("blk.0.attn_v.weight", 0, "I", 2**31), "2147483648 axes"),
    "another offset": (tensor_field("blk.0.attn_v.weight", 24, "Q", 64), "is at 64"),
    "another tensor": (replaced(b"blk.0.attn_v.weight", b"blk.0.attn_x.weight"), "lacks blk.0.attn_v.weight"),
    "a tensor twice": (replaced(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"), "attn_k.weight is there twice"),
    "an unknown setting": (
        replaced(b"llama.attention.value_length", b"llama.attention.clamp_length"),
        "clamp_length = 4",
    ),
}


@pytest.mark.parametrize(("damage", "about"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_by_name(sound: bytes, tmp_path: Path, damage: Change, about: str):
    path = tmp_path / "a.gguf"
    path.write_bytes(damage(sound))
    with pytest.raises(UserError, match=about) as refusal:
        ours.open_checkpoint(path)
    assert "a.gguf" in refusal.value.problem or "tensor" in refusal.value.problem or "lacks" in refusal.value.problem


def test_damage_anywhere_is_refused_or_gives_a_model_of_the_same_shape(sound: bytes, tmp_path: Path):
    draw, path, header = random.Random(0), tmp_path / "a.gguf", sound.index(b"blk.0.ffn_down")
    refused = opened = 0
    for i in range(250):
        content = bytearray(sound)
        if i % 5 == 0:
            del content[draw.randrange(len(content)) :]
        else:
            for _ in range(draw.choice((1, 1, 4))):
                content[draw.randrange(header + 200)] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        path.write_bytes(content)
        ours.matches(path)
        try:
            checkpoint = ours.open_checkpoint(path)
        except UserError as error:
            refused += len(error.problem) < 1000
        else:
            opened += checkpoint.table.shape("token_embd.weight")[1] == 8
    assert refused + opened == 250
    assert refused > 100


def test_a_scale_of_damaged_bytes_is_a_number_all_the_same(tmp_path: Path):
    raw = np.full((3, 34), 255, np.uint8)
    raw[1, :2] = 0, 0x7C  # infinity
    raw[1, 2:] = 0
    assert dequantize(raw, "q8_0").shape == (3, 32)


def test_parts_of_a_split_model_and_folders_of_several_are_refused(sound: bytes, tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "a-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"one of 2 parts\n.*--merge"):
        ours.open_checkpoint(tmp_path)
    (tmp_path / "b.gguf").write_bytes(sound)
    with pytest.raises(UserError, match=r"contains 2 GGUF files: a-00001-of-00002.gguf, b.gguf"):
        ours.open_checkpoint(tmp_path)
    assert ours.open_checkpoint(tmp_path / "b.gguf").config.vocab_size == 7


def test_looks_never_raises(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(b"GG")
    (tmp_path / "b.gguf").mkdir()
    assert not any(map(ours.matches, [tmp_path, tmp_path / "a.gguf", tmp_path / "none", tmp_path / "b.gguf"]))
    with pytest.raises(UserError, match=r"contains no \.gguf file"):
        ours.open_checkpoint(tmp_path / "b.gguf")


def test_bfloat16_is_rounded_to_nearest_even_on_its_way(tmp_path: Path):
    folder = written(tmp_path / "ours", save_tiny(PLAIN, tmp_path / "hf"), "bfloat16")
    for tensor in gguf.GGUFReader(folder / "model.gguf").tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            expected = their_tensors(PLAIN)[tensor.name].astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(tensor.data.reshape(-1), expected.view(np.uint8).reshape(-1))
