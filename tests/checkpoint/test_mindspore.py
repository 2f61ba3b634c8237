"""MindSpore checkpoints: files that MindSpore and MindFormers wrote are read, and written again byte for byte."""

import json
import random
import re
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import camelid
from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.containers import mindspore_file
from camelid.checkpoint.containers.mindspore_file import CRC_BYTES, open_ckpt, verify_checksum
from camelid.checkpoint.formats import hf, mindspore
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.formats.mindspore_ranks import ShardLayout, merged, open_ranks, open_strategy, strategy_bytes
from camelid.checkpoint.layout import Table
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.tensors import PlannedTensor, Tensor, dtype_named
from camelid.errors import UserError
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.params import named
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from families import FAMILIES
from mindspore_files import field, file, float32, number, record
from runs import tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, to_transformers, transformers_twin
from writing import put

IDS = [1, 403, 407, 261, 378]
EVERY = {"num_kv_heads": 6, "head_dim": 8}
CONFIGS = {
    "every head its own keys": tiny_config(**EVERY, vocab_size=96),
    "grouped": tiny_config(head_dim=8),
    "every head its own keys, tied": tiny_config(**EVERY, tie_embeddings=True),
    "grouped, tied, another theta": tiny_config(head_dim=8, tie_embeddings=True, rope_theta=500.0),
}


@pytest.fixture(scope="session")
def golden(assets: Path) -> Path:
    return assets / "golden" / "mindspore"


@pytest.fixture(scope="session")
def variant(assets: Path) -> Path:
    """What the golden files hold, in Hugging Face form."""
    return assets / "golden" / "hf_variants" / "hf_mha_untied"


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def theirs(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    return save_hf(transformers_twin(config, tiny_params(config)), tmp_path_factory.mktemp("hf") / "theirs")


def content(tensor: Tensor, index: tuple[slice, ...] | None = None) -> np.ndarray:
    index = tuple(slice(0, n) for n in tensor.shape) if index is None else index
    out = np.empty([s.stop - s.start for s in index], tensor.dtype)
    tensor.read_into(out, index)
    return out


def written(source: Checkpoint, folder: Path, dtype: str | None = None, **how: object) -> Path:
    folder.mkdir()
    dtypes = source.dtypes if dtype is None else dict.fromkeys(source.dtypes, dtype_named(dtype))
    put(folder, mindspore.plan_files, ExportSpec(source.config, dtypes, source.read_slice), **how)
    return folder


def in_ranks(source: Checkpoint, folder: Path, ways: int, stages: int) -> Path:
    folder.mkdir()
    put(folder, mindspore.plan_files, ExportSpec(source.config, source.dtypes, source.read_slice, (), ways, stages))
    return folder


def to_hf(source: Checkpoint, folder: Path) -> Path:
    folder.mkdir()
    put(folder, hf.plan_files, ExportSpec(source.config, source.dtypes, source.read_slice))
    return folder


def params(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in named(load_params(checkpoint, ComputeConfig(), one_device())).items()}


def strategy(layouts: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], int, int]]) -> bytes:
    out = field(1, 0) + field(2, b"\x0a\x01x")
    for name, (devices, axes, step, ways) in layouts.items():
        lists = [b"".join(field(1, n) for n in numbers) for numbers in (devices, axes)]
        layout = field(1, lists[0]) + field(2, lists[1]) + field(3, b"") + field(4, b"") + field(5, 0)
        out += field(3, field(1, name.encode()) + field(2, layout + field(6, step) + field(7, ways)))
    return out


# Golden files ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [("r1.0", "half"), ("r1.0", None), ("seed", "interleaved")])
def test_logits_of_mindformers_files_are_those_of_the_model_in_float16(
    golden: Path, variant: Path, name: str, layout: mindspore.RopeLayout | None
):
    checkpoint = mindspore.open_checkpoint(golden / f"{name}_mha_fp16.ckpt", read_model_config(variant), layout)
    model = camelid.load(variant)
    half = replace(model, params=load_params(checkpoint, model.compute, model.mesh))
    for path, array in named(half.params).items():
        # The same numbers as the float32 model, rounded once.
        np.testing.assert_array_equal(array, np.float32(np.float16(named(model.params)[path])), err_msg=path)
    reference = np.array(json.loads((variant / "logits.json").read_text())["logits"], np.float32)
    logits = np.asarray(half.logits(np.array([IDS])))
    # Weights rounded to float16 (11 bits) move logits of scale 20 by 0.01; the other row order moves them by 10.
    np.testing.assert_allclose(logits.reshape(reference.shape), reference, atol=0.05)
    assert any("mindspore-interleaved::PATH" in note for note in checkpoint.notes) == (layout is None)


def test_the_wrong_layout_of_rows_gives_another_model(golden: Path, variant: Path):
    tables = [
        mindspore.open_checkpoint(golden / "seed_mha_fp16.ckpt", read_model_config(variant), layout)
        for layout in mindspore.RULES
    ]
    half, interleaved = map(params, tables)
    differ = {path for path in half if not np.array_equal(half[path], interleaved[path])}
    assert differ == {"layers.attn.q_proj", "layers.attn.k_proj"}


@pytest.mark.parametrize(("name", "layout"), [("r1.0", "half"), ("seed", "interleaved")])
def test_what_camelid_writes_is_mindformers_file_byte_for_byte(
    golden: Path, variant: Path, tmp_path: Path, name: str, layout: str
):
    folder = written(open_checkpoint(variant), tmp_path / "ours", "float16", rope_layout=layout)
    assert (folder / "model.ckpt").read_bytes() == (golden / f"{name}_mha_fp16.ckpt").read_bytes()
    assert (folder / "model.ckpt").stat().st_mode & 0o777 == 0o600
    assert read_model_config(folder) == read_model_config(variant)


def test_arrays_of_every_kind_are_those_that_mindspore_wrote(golden: Path):
    plain = open_ckpt(golden / "plain.ckpt")
    assert plain.keys() == {"a"}
    np.testing.assert_array_equal(content(plain["a"]), np.zeros(5, np.float32))
    held = {name: content(tensor) for name, tensor in open_ckpt(golden / "x.ckpt").items()}
    assert {name: (array.dtype.name, array.shape) for name, array in held.items()} == {
        "a.weight": ("float32", (3, 5)),
        "b.f16": ("float16", (4,)),
        "c.bf16": ("bfloat16", (2, 3)),
        "d.scalar": ("float32", ()),
        "e.i32": ("int32", (2, 3)),
        "f.bool": ("bool", (2,)),
        "g.i8": ("int8", (2,)),
        "epoch_num": ("int64", ()),
        "step_num": ("int64", ()),
        "lr": ("float32", ()),
        "flag": ("bool", ()),
        "note": ("str160", ()),
    }
    np.testing.assert_array_equal(held["e.i32"], [[0, 1, 2], [3, 4, 5]])
    assert held["d.scalar"] == 3.5
    assert held["step_num"] == 7
    assert held["flag"]
    assert held["note"] == "hello"
    assert held["g.i8"].tolist() == [-1, 2]
    assert held["f.bool"].tolist() == [True, False]
    bits = [[0x3F85, 0xBE04, 0x3FAF], [0xBF2A, 0x3EB4, 0x3F67]]
    np.testing.assert_array_equal(held["c.bf16"].view(np.uint16), bits)


def test_a_run_on_four_ranks_is_put_together(golden: Path):
    tensors, aside = open_ranks_of(golden)
    assert aside == []
    whole = {name: content(tensor) for name, tensor in tensors.items()}
    np.testing.assert_array_equal(whole["col.weight"], np.arange(24.0).reshape(4, 6))
    np.testing.assert_array_equal(whole["row.weight"], np.arange(24.0, 48.0).reshape(4, 6))
    np.testing.assert_array_equal(whole["norm.weight"], np.arange(4.0))
    np.testing.assert_array_equal(whole["opt.weight"], np.arange(200.0, 232.0).reshape(8, 4))
    for rows, columns in [(slice(1, 4), slice(2, 5)), (slice(3, 4), slice(0, 6))]:
        np.testing.assert_array_equal(
            content(tensors["row.weight"], (rows, columns)), whole["row.weight"][rows, columns]
        )


def open_ranks_of(golden: Path) -> tuple[dict[str, Tensor], list[str]]:
    return open_ranks(golden / "split4")


# Both ways ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_there_and_back_every_byte_is_the_same(theirs: Path, tmp_path: Path, dtype: str, layout: mindspore.RopeLayout):
    source = open_checkpoint(theirs)
    folder = written(source, tmp_path / "ours", dtype, rope_layout=layout)
    assert mindspore.matches(folder)
    assert mindspore.matches(folder / "model.ckpt")
    assert not hf.matches(folder)
    back = mindspore.open_checkpoint(folder, rope_layout=layout)
    assert (back.config, back.notes) == (source.config, ())
    export = ExportSpec(source.config, dict.fromkeys(source.dtypes, dtype_named(dtype)), source.read_slice)
    (tmp_path / "direct").mkdir()
    put(tmp_path / "direct", hf.plan_files, export)
    assert tensor_bytes(to_hf(back, tmp_path / "back")) == tensor_bytes(tmp_path / "direct")
    if source.config.tie_embeddings:
        held = open_ckpt(folder / "model.ckpt")
        np.testing.assert_array_equal(
            content(held["lm_head.weight"]), content(held["model.tok_embeddings.embedding_weight"])
        )


def test_large_tensors_are_cut_and_rows_may_straddle_the_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = CONFIGS["grouped, tied, another theta"]
    source = open_checkpoint(save_hf(transformers_twin(config, tiny_params(config)), tmp_path / "theirs"))
    whole = (written(source, tmp_path / "whole") / "model.ckpt").read_bytes()
    monkeypatch.setattr(mindspore_file, "SLICE", 1000)  # a row of the embedding has 192 bytes
    monkeypatch.setattr("camelid.checkpoint.layout.CHUNK_BYTES", 700)
    monkeypatch.setattr(mindspore_file, "CHUNK", 500)
    folder = written(source, tmp_path / "cut")
    table = np.asarray(tiny_params(source.config).embed)
    parts = [table.tobytes()[i : i + 1000] for i in range(0, table.nbytes, 1000)]
    name = "model.tok_embeddings.embedding_weight"
    first = b"".join(record(name, "Float32", table.shape, part) for part in parts)
    assert (folder / "model.ckpt").read_bytes().startswith(first)
    held = params(mindspore.open_checkpoint(folder))
    for path, array in named(tiny_params(source.config)).items():
        np.testing.assert_array_equal(held[path], array, err_msg=path)
    part = content(open_ckpt(folder / "model.ckpt")[name], (slice(3, 60), slice(5, 40)))
    np.testing.assert_array_equal(part, table[3:60, 5:40])
    assert len(whole) < len((folder / "model.ckpt").read_bytes())


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_each_device_reads_its_slice_whatever_the_cuts(
    tmp_path: Path, layout: mindspore.RopeLayout, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(head_dim=8, vocab_size=96)
    theirs = save_hf(transformers_twin(config, tiny_params(config)), tmp_path / "theirs")
    monkeypatch.setattr(mindspore_file, "SLICE", 5000)
    folder = written(open_checkpoint(theirs), tmp_path / "ours", rope_layout=layout)
    mesh = make_mesh(MeshConfig(tensor=2, fsdp=4))
    sharded = named(load_params(mindspore.open_checkpoint(folder, rope_layout=layout), ComputeConfig(), mesh))
    for path, array in named(tiny_params(config)).items():
        np.testing.assert_array_equal(np.asarray(sharded[path]), array, err_msg=path)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("llama,")])
def test_what_mindformers_cannot_compute_is_refused_by_field(tmp_path: Path, name: str):
    ours = FAMILIES[name].ours
    if ours == tiny_config(head_dim=ours.head_dim) and ours.head_dim == 8:
        pytest.skip("a plain Llama under another name")
    export = ExportSpec(ours, {}, lambda *_: pytest.fail("nothing is read"))
    with pytest.raises(UserError, match=r"MindFormers' LLaMA cannot hold \w+ = "):
        put(tmp_path, mindspore.plan_files, export)
    assert not any(tmp_path.iterdir())


def test_heads_that_do_not_add_up_to_embed_dim_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="head_dim = 10"):
        put(tmp_path, mindspore.plan_files, ExportSpec(tiny_config(), {}, lambda *_: pytest.fail("nothing is read")))


# Other forms that MindSpore writes ---------------------------------------------------------


TINY = CONFIGS["grouped"]


def their_arrays(config: ModelConfig = TINY) -> dict[str, np.ndarray]:
    """A tiny model under MindFormers' names, made from transformers'."""
    names = {
        "model.embed_tokens.": "model.tok_embeddings.embedding_",
        "self_attn.": "attention.",
        "q_proj": "wq",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.norm.": "model.norm_out.",
    }
    arrays = {}
    for name, array in to_transformers(tiny_params(config)).items():
        for word, instead in names.items():
            name = name.replace(word, instead)
        columns = config.embed_dim if "wo" not in name else array[0].size
        arrays[name] = array if array.ndim < 3 else array.reshape(-1, columns)
    return arrays


def assert_tiny(checkpoint: Checkpoint) -> None:
    held = params(checkpoint)
    for path, array in named(tiny_params(TINY)).items():
        np.testing.assert_array_equal(held[path], array, err_msg=path)


def test_values_of_training_are_left_out_and_said(tmp_path: Path):
    arrays = their_arrays()
    extra = record("epoch_num", "Int64", (), struct.pack("<q", 3)) + record("loss_scale", "Float32", (0,), b"\0" * 4)
    extra += file({f"adam_m.{name}": array for name, array in arrays.items()})
    (tmp_path / "a.ckpt").write_bytes(extra + file(arrays))
    checkpoint = mindspore.open_checkpoint(tmp_path, TINY)
    assert_tiny(checkpoint)
    assert any("not read: epoch_num, loss_scale, adam_m." in note for note in checkpoint.notes)
    (tmp_path / "a.ckpt").write_bytes(file(arrays | {"lora_a": np.ones(3)}))
    with pytest.raises(UserError, match="no place for: lora_a"):
        mindspore.open_checkpoint(tmp_path, TINY)


def test_safetensors_with_mindformers_names_are_read(tmp_path: Path):
    safetensors.numpy.save_file(their_arrays(), tmp_path / "model.safetensors", {"format": "ms"})
    assert mindspore.matches(tmp_path)
    assert mindspore.matches(tmp_path / "model.safetensors")
    assert_tiny(mindspore.open_checkpoint(tmp_path, TINY))
    assert_tiny(mindspore.open_checkpoint(tmp_path / "model.safetensors", TINY))


def test_safetensors_are_written_as_mindspore_writes_them(tmp_path: Path):
    (tmp_path / "a.ckpt").write_bytes(file(their_arrays()))
    source = mindspore.open_checkpoint(tmp_path / "a.ckpt", TINY)
    put(tmp_path / "ours", mindspore.plan_files, ExportSpec(TINY, source.dtypes, source.read_slice), safetensors=True)
    with safetensors.safe_open(tmp_path / "ours" / "model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "ms"}
        held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    theirs = their_arrays()
    assert held.keys() == theirs.keys()
    assert all(np.array_equal(array, theirs[name]) for name, array in held.items())
    assert_tiny(open_checkpoint(tmp_path / "ours"))


def test_concatenated_projections_are_taken_apart(tmp_path: Path):
    arrays, (kv, embed, head) = their_arrays(), (TINY.num_kv_heads, TINY.embed_dim, TINY.head_dim)
    for layer in range(TINY.num_layers):
        block = f"model.layers.{layer}."
        q, k, v = (arrays.pop(f"{block}attention.w{x}.weight").reshape(kv, -1, head, embed) for x in "qkv")
        arrays[f"{block}attention.w_qkv.weight"] = np.concatenate([q, k, v], 1).reshape(-1, embed)
        gate, up = (arrays.pop(f"{block}feed_forward.w{x}.weight") for x in "13")
        arrays[f"{block}feed_forward.w_gate_hidden.weight"] = np.stack([gate, up], 1).reshape(-1, embed)
    (tmp_path / "a.ckpt").write_bytes(file(arrays))
    checkpoint = mindspore.open_checkpoint(tmp_path / "a.ckpt", TINY)
    assert_tiny(checkpoint)
    assert checkpoint.notes == ()
    with pytest.raises(UserError, match="w_qkv is always half-split"):
        mindspore.open_checkpoint(tmp_path / "a.ckpt", TINY, "interleaved")


def test_a_checksum_is_verified_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, held = tmp_path / "a.ckpt", file(their_arrays())
    path.write_bytes(held + b"crc_num" + zlib.crc32(held).to_bytes(10, "big"))
    assert_tiny(mindspore.open_checkpoint(path, TINY, "half"))
    assert verify_checksum(path) is True
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="does not have the checksum"):
        mindspore.open_checkpoint(path, TINY)
    monkeypatch.setattr(mindspore_file, "CRC_BYTES", len(held))
    assert verify_checksum(path) is False
    assert any("a.ckpt is larger than 1 GiB" in note for note in mindspore.open_checkpoint(path, TINY).notes)
    assert CRC_BYTES == 2**30


def test_all_files_that_are_too_large_to_be_verified_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = pipelined(tmp_path / "checkpoint")
    for path in folder.rglob("*.ckpt"):
        held = path.read_bytes()
        path.write_bytes(held + b"crc_num" + zlib.crc32(held).to_bytes(10, "big"))
    monkeypatch.setattr(mindspore_file, "CRC_BYTES", 1000)
    names = ", ".join(f"rank_{i}/llama_rank_{i}-1_2.ckpt" for i in range(3))
    note = f"{names} and 5 more are larger than 1 GiB: convert --check verifies their checksums"
    assert note in mindspore.open_checkpoint(folder, TINY).notes


# Ranks ----------------------------------------------------------------------------------


def rank_files(folder: Path, ranks: list[dict[str, np.ndarray]]) -> Path:
    for i, arrays in enumerate(ranks):
        (folder / f"rank_{i}").mkdir(parents=True)
        (folder / f"rank_{i}" / f"llama_rank_{i}-1_2.ckpt").write_bytes(file(arrays))
    return folder


def pipelined(folder: Path, *, merge: bool = False) -> Path:
    """TINY in two stages of four ranks: two tensor-parallel, and two by optimizer sharding or alike."""
    stages: list[dict[str, np.ndarray]] = [{}, {}]
    for name, array in their_arrays().items():
        stages[any(word in name for word in ("layers.2.", "layers.3.", "norm_out", "lm_head"))][name] = array
    layouts: list[dict] = [{}, {}]
    ranks: list[dict[str, np.ndarray]] = []
    for stage, layout in zip(stages, layouts, strict=True):
        for local in range(4):
            data, tensor = divmod(local, 2)  # devices (2, 2): tensor parallelism is the last axis
            held = {"step_num": np.ones(1)}
            for name, array in stage.items():
                if array.ndim == 1:
                    held[name], layout[name] = array, ((2, 2), (-1,), 0, 0)
                elif ".wo." in name or ".w2." in name:
                    held[name], layout[name] = np.split(array, 2, 1)[tensor], ((2, 2), (-1, 0), 0, 0)
                elif ".w1." in name:
                    part = np.split(array, 2, 0)[tensor]
                    held[name], layout[name] = np.split(part, 2)[data], ((2, 2), (0, -1), 2, 2)
                elif ".w3." in name:
                    part = np.split(np.split(array, 2, 1)[data], 2)[tensor]
                    held[name], layout[name] = part, ((2, 2), (0, 1), 0, 0)
                else:
                    held[name], layout[name] = array, ((2, 2), (-1, -1), 0, 0)
            ranks.append(held)
    (folder.parent / "strategy").mkdir(parents=True)
    if merge:
        both = {f"{i}-{name}": value for i, layout in enumerate(layouts) for name, value in layout.items()}
        (folder.parent / "strategy" / "merged_ckpt_strategy.ckpt").write_bytes(strategy(both))
    else:
        for i, layout in enumerate(layouts):
            (folder.parent / "strategy" / f"ckpt_strategy_rank_{4 * i}.ckpt").write_bytes(strategy(layout))
    return rank_files(folder, ranks)


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_with_tensor_pipeline_and_optimizer_parallelism_is_put_together(tmp_path: Path, merge: bool):
    folder = pipelined(tmp_path / "checkpoint", merge=merge)
    assert mindspore.matches(folder)
    checkpoint = mindspore.open_checkpoint(folder, TINY)
    assert_tiny(checkpoint)
    assert any("not read: step_num" in note for note in checkpoint.notes)
    assert tensor_bytes(to_hf(checkpoint, tmp_path / "hf")).keys() == to_transformers(tiny_params(TINY)).keys()


def test_three_axes_over_devices_in_any_order(tmp_path: Path):
    whole = np.arange(4 * 6 * 4, dtype=np.float32).reshape(4, 6, 4)
    split = ShardLayout((2, 3, 2), (0, 1, 2))
    ranks = []
    for local in range(12):
        c, b, a = np.unravel_index(local, split.devices)
        part = np.split(np.split(np.split(whole, 2, 0)[a], 3, 1)[b], 2, 2)[c]
        (tmp_path / f"{local}.ckpt").write_bytes(float32("x", part))
        ranks.append(open_ckpt(tmp_path / f"{local}.ckpt"))
    held = merged(ranks, {"x": split})["x"]
    np.testing.assert_array_equal(content(held), whole)
    some = (slice(1, 3), slice(1, 5), slice(1, 4))
    np.testing.assert_array_equal(content(held, some), whole[some])


def test_strategies_say_what_they_say_and_are_written_byte_for_byte(golden: Path):
    splits = {
        "col.weight": ShardLayout((2, 2), (0, -1)),
        "row.weight": ShardLayout((2, 2), (-1, 0)),
        "norm.weight": ShardLayout((2, 2), (-1,)),
        "opt.weight": ShardLayout((2, 2), (0, -1), 2, 2),
    }
    assert open_strategy(golden / "split4_strategy.ckpt") == splits
    assert strategy_bytes(0, splits) == (golden / "split4_strategy.ckpt").read_bytes()


def test_ranks_hold_what_numpy_splits(tmp_path: Path, theirs: Path):
    """Of a model of any heads, tied or not, in two stages of two ranks."""
    source = hf.open_checkpoint(theirs)
    whole = open_ckpt(written(source, tmp_path / "whole") / "model.ckpt")
    folder = in_ranks(source, tmp_path / "ranks", ways=2, stages=2)
    found: set[str] = set()
    for rank in range(4):
        stage, way = divmod(rank, 2)
        splits = open_strategy(folder / "strategy" / f"ckpt_strategy_rank_{2 * stage}.ckpt")
        held = open_ckpt(folder / f"rank_{rank}" / "model.ckpt")
        assert held.keys() == splits.keys()
        for name, tensor in held.items():
            late = re.search(r"layers\.[23]\.|norm_out|lm_head", name) is not None
            uneven = re.search("embedding|lm_head", name) is not None and source.config.vocab_size % 2
            axis = None if "norm" in name or uneven else 1 if re.search(r"\.(wo|w2)\.", name) else 0
            parts = [content(whole[name])] * 2 if axis is None else np.split(content(whole[name]), 2, axis)
            assert late == bool(stage), name
            assert splits[name] == ShardLayout((2,), tuple(0 if i == axis else -1 for i in range(len(tensor.shape))))
            np.testing.assert_array_equal(content(tensor), parts[way])
            found.add(name)
    assert found == whole.keys()
    assert tensor_bytes(to_hf(mindspore.open_checkpoint(folder, source.config), tmp_path / "back")) == tensor_bytes(
        theirs
    )


def test_no_rank_plans_tensors_of_another_stage(tmp_path: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch):
    planned: list[str] = []
    payload = ExportSpec.payload

    def counted(self: ExportSpec, table: Table, tensor: PlannedTensor):
        planned.append(tensor.name)
        return payload(self, table, tensor)

    monkeypatch.setattr(ExportSpec, "payload", counted)
    in_ranks(hf.open_checkpoint(theirs), tmp_path / "ranks", ways=2, stages=4)
    assert set(Counter(planned).values()) == {2}


def test_without_stages_every_rank_has_the_tables(tmp_path: Path, theirs: Path):
    source = hf.open_checkpoint(theirs)
    folder = in_ranks(source, tmp_path / "ranks", ways=2, stages=1)
    for rank in range(2):
        table = open_ckpt(folder / f"rank_{rank}" / "model.ckpt")["model.tok_embeddings.embedding_weight"]
        assert table.shape == (source.config.vocab_size, source.config.embed_dim)


@pytest.mark.parametrize(
    ("ways", "stages", "about"),
    [(4, 1, "heads = 6 is not divisible by tensor_parallel = 4"), (1, 3, "layers = 4 is not divisible by pipeline")],
)
def test_what_ranks_cannot_share_is_named(tmp_path: Path, theirs: Path, ways: int, stages: int, about: str):
    with pytest.raises(UserError, match=about):
        in_ranks(hf.open_checkpoint(theirs), tmp_path / "ranks", ways, stages)


DamagedState = Callable[[Path], object]
FILE = "checkpoint/rank_3/llama_rank_3-1_2.ckpt"
STRATEGY = "strategy/ckpt_strategy_rank_0.ckpt"
W1 = "model.layers.0.feed_forward.w1.weight"


def layout_of_w1(*layout: object) -> DamagedState:
    """Says something else of w1 than the ranks hold."""

    def damage(root: Path) -> None:
        held = {name: (s.devices, s.axes, s.step, s.count) for name, s in open_strategy(root / STRATEGY).items()}
        (root / STRATEGY).write_bytes(strategy(held | {W1: layout}))

    return damage


def other_shape(root: Path) -> None:
    held = {name: content(tensor) for name, tensor in open_ckpt(root / FILE).items()}
    (root / FILE).write_bytes(file(held | {W1: held[W1][1:]}))


def another_run(root: Path) -> None:
    held = {name: content(tensor) for name, tensor in open_ckpt(root / FILE).items()}
    (root / FILE).write_bytes(file({name: array * 2 if "norm" in name else array for name, array in held.items()}))


RANKS: dict[str, tuple[DamagedState, str]] = {
    "no strategy": (lambda root: [f.unlink() for f in (root / "strategy").iterdir()], "no strategy file"),
    "half a strategy": (lambda root: (root / STRATEGY).unlink(), "do not specify the layout of model"),
    "strategy cut short": (
        lambda root: (root / STRATEGY).write_bytes((root / STRATEGY).read_bytes()[:-9]),
        "ckpt_strategy_rank_0.ckpt is damaged",
    ),
    "two strategies": (
        lambda root: (root / "strategy" / "z_strategy.ckpt").write_bytes(strategy({W1: ((4,), (-1, -1), 0, 0)})),
        "z_strategy.ckpt and another strategy file",
    ),
    "ranks of two runs": (
        another_run,
        r"layers\.0\.attention_norm\.weight in .*rank_3.* differs from that in .*rank_0",
    ),
    "the first rank is missing": (lambda root: (root / "checkpoint/rank_0").rename(root / "rank_0"), "has no rank_0"),
    "a rank is missing": (lambda root: (root / "checkpoint/rank_2").rename(root / "rank_2"), "has no rank_2"),
    "the last rank is missing": (
        lambda root: (root / "checkpoint/rank_7").rename(root / "rank_7"),
        "split over 4 ranks, and there are 7",
    ),
    "a rank is empty": (lambda root: (root / FILE).unlink(), "rank_3 has no .ckpt file"),
    "two checkpoints": (lambda root: (root / FILE).with_name("b.ckpt").write_bytes(b""), "rank_3 has 2 checkpoints"),
    "a rank lacks a tensor": (
        lambda root: (root / FILE).write_bytes(float32("model.norm_out.weight", np.ones(3))),
        "rank_3 lacks model.tok",
    ),
    "shapes differ": (other_shape, r"w1\.weight is \(20, 48\) float32 in .*, and \(19, 48\)"),
    "another number of axes": (layout_of_w1((2, 2), (-1,), 0, 0), "has shape"),
    "axes beyond the devices": (layout_of_w1((2, 2), (2, -1), 0, 0), "has the device array"),
    "no devices": (layout_of_w1((0, 2), (0, -1), 0, 0), "has the device array"),
    "step of another kind": (layout_of_w1((2, 2), (0, -1), 4, 2), "do not hold all parts"),
    "more devices than ranks": (layout_of_w1((2**40, 2), (0, -1), 0, 0), "and there are 8"),
    "parts alike": (layout_of_w1((2, 2), (0, -1), 0, 0), r"\(40, 48\), and the given config asks for \(80, 48\)"),
}


@pytest.mark.parametrize(("damage", "about"), RANKS.values(), ids=RANKS)
def test_damaged_folders_of_ranks_are_refused(tmp_path: Path, damage: DamagedState, about: str):
    folder = pipelined(tmp_path / "checkpoint")
    damage(tmp_path)
    with pytest.raises(UserError, match=about):
        mindspore.open_checkpoint(folder, TINY)


# Bad input ------------------------------------------------------------------------------

A = np.arange(6.0).reshape(2, 3)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "a zip": (b"PK\x03\x04" * 100, "no MindSpore checkpoint"),
    "cut in a tensor": (float32("a", A)[:-3], "cut short"),
    "cut in a name": (float32("a" * 50, A)[:20], "cut short"),
    "bytes after the end": (float32("a", A) + b"\0", "damaged"),
    "an absurd length": (b"\x0a" + number(2**60) + b"\x0a\x01a", "bytes at byte"),
    "an endless number": (b"\x0a" + b"\xff" * 40, "no number"),
    "a name without an end": (field(1, b"\x0a" + number(2**62) + b"a"), "are left"),
    "a name that is long": (record("a" * 5000, "Float32", (2, 3), bytes(24)), "too long"),
    "a name that is not text": (float32("a\x1b[2J", A), "cannot be printed"),
    "a name in another code": (record("a", "Float32", (6,), bytes(24)).replace(b"a\x12", b"\xff\x12", 1), "utf-8"),
    "no tensor": (field(1, field(1, b"a")), "not a plain tensor"),
    "a map": (field(1, field(1, b"a") + field(3, b"")), "not a plain tensor"),
    "a field that is unknown": (field(1, field(1, b"a") + field(9, b"")), "unexpected field 9"),
    "a field of tensors that is unknown": (
        field(1, field(1, b"a") + field(2, field(4, 3) + field(2, b"Float32"))),
        "unexpected field 4",
    ),
    "two names": (field(1, field(1, b"a") + field(1, b"b")), "unexpected field 1"),
    "no type": (field(1, field(1, b"a") + field(2, field(1, 3))), "missing"),
    "negative dims": (record("a", "Float32", (-2, -3), bytes(24)), "has the shape"),
    "many dims": (record("a", "Float32", (1,) * 40, bytes(4)), "unexpected field 1"),
    "too few bytes": (record("a", "Float32", (2, 3), bytes(20)), r"20 bytes for \(2, 3\)"),
    "absurd dims": (record("a", "Float32", (2**40, 2**40), bytes(20)), "20 bytes for"),
    "a type that is unknown": (record("a", "Int4", (2, 3), bytes(3)), r"a in .*bad\.ckpt is Int4"),
    "text of odd length": (record("a", "str", (0,), bytes(3)), "not text"),
    "a tensor twice": (float32("a", A) + float32("b", A) + float32("a", A), "a is there twice"),
    "a tensor twice in a row": (float32("a", A) * 2, "48 bytes for"),
    "parts that disagree": (float32("a", A) + float32("a", A.T), "parts of a disagree"),
    "cut within a number": (record("a", "Float32", (2,), b"123") + record("a", "Float32", (2,), b"45678"), "8 bytes"),
    "one half of a tensor": (record("a", "Float32", (2, 3), bytes(12)), "12 bytes for"),
    "a checksum alone": (b"crc_num" + bytes(10), "it is empty"),
    "encrypted": (struct.pack("<I", 0x7F3A5ED8) + bytes(100), "is encrypted .AES-GCM"),
    "encrypted by another": (struct.pack("<I", 0x7F3A5EDA) + bytes(100), "is encrypted .SM4-CBC"),
}


@pytest.mark.parametrize(("data", "about"), BAD.values(), ids=BAD)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, about: str):
    (tmp_path / "bad.ckpt").write_bytes(data)
    with pytest.raises(UserError, match=about):
        mindspore.open_checkpoint(tmp_path / "bad.ckpt", TINY)


def test_encrypted_files_look_like_mindspore_and_others_do_not(tmp_path: Path, variant: Path, golden: Path):
    (tmp_path / "a.ckpt").write_bytes(BAD["encrypted"][0])
    assert mindspore.matches(tmp_path)
    for data in (b"", b"PK\x03\x04" * 9, b"\x80\x02}q\x00.", b"\n\n\n\n"):
        (tmp_path / "a.ckpt").write_bytes(data)
        assert not mindspore.matches(tmp_path)
    assert not mindspore.matches(variant)
    assert not mindspore.matches(tmp_path / "nowhere")
    assert mindspore.matches(golden / "split4")
    assert mindspore.matches(golden / "plain.ckpt")
    assert not mindspore.matches(golden / "split4_strategy.ckpt")


def test_ranks_without_the_first_are_still_mindspores(tmp_path: Path):
    folder = pipelined(tmp_path / "checkpoint")
    (folder / "config.json").write_text("{}")
    shutil.rmtree(folder / "rank_0")
    assert mindspore.matches(folder)
    with pytest.raises(UserError, match="has no rank_0"):
        open_checkpoint(folder)
    for path in folder.rglob("*.ckpt"):
        path.unlink()
    assert not mindspore.matches(folder)


def test_a_file_that_describes_no_model_asks_for_one(tmp_path: Path):
    (tmp_path / "a.ckpt").write_bytes(file(their_arrays()))
    with pytest.raises(UserError, match=r"does not describe its model(.|\n)*--config") as refusal:
        mindspore.open_checkpoint(tmp_path)
    assert "--config" in refusal.value.advice
    (tmp_path / "b.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"has 2 checkpoints: a\.ckpt, b\.ckpt"):
        mindspore.open_checkpoint(tmp_path, TINY)


def test_a_tied_model_whose_head_differs_is_refused(tmp_path: Path):
    (tmp_path / "a.ckpt").write_bytes(file(their_arrays()))
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        mindspore.open_checkpoint(tmp_path, replace(TINY, tie_embeddings=True))


def test_no_damage_breaks_the_reader(golden: Path, tmp_path: Path):
    """Whatever happens to a file, it opens or is refused, and what opens can be read."""
    draw, path = random.Random(0), tmp_path / "a.ckpt"
    ranks = [open_ckpt(golden / "split4" / f"rank_{i}" / f"m_{i}.ckpt") for i in range(4)]
    for name in ("x.ckpt", "split4_strategy.ckpt"):
        sound = (golden / name).read_bytes()
        for trial in range(150):
            data = bytearray(sound[: draw.randrange(len(sound))] if trial % 4 == 0 else sound)
            for _ in range(draw.randint(0, 4)):
                if data:
                    data[draw.randrange(len(data))] = draw.choice((0, 1, 0x0A, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            path.write_bytes(data)
            try:
                if name == "x.ckpt":
                    for tensor in open_ckpt(path).values():
                        if 0 not in tensor.shape:
                            content(tensor)
                else:
                    merged(ranks, open_strategy(path))
            except UserError:
                pass
