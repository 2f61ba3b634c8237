"""Megatron-LM's checkpoints: golden ones open with the numbers of their sources, and are written as they were."""

import argparse
import contextlib
import io
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import camelid
from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.containers.pickles import OpaqueObject
from camelid.checkpoint.containers.torch_files import unpickle
from camelid.checkpoint.files import PlannedFile
from camelid.checkpoint.formats import hf, megatron
from camelid.checkpoint.formats.megatron_files import FILE, INERT, TRACKER
from camelid.checkpoint.layout import read_parameter_slice
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.tensors import dtype_named
from camelid.errors import UserError
from camelid.model.config import ComputeConfig, Llama3Scaling, ModelConfig
from camelid.model.params import named
from camelid.parallel.mesh import one_device
from families import FAMILIES
from runs import tensor_bytes
from tiny import LLAMA3, save_hf, tiny_config, tiny_params, transformers_twin
from writing import put

IDS = [1, 403, 407, 261, 378]
MHA = tiny_config(num_kv_heads=6, vocab_size=99, mlp_dim=81)
GQA = tiny_config(vocab_size=98, rope_theta=1e6, bos_id=3, eos_ids=(5, 7), norm_eps=1e-6)
TIED = replace(GQA, tie_embeddings=True)
STRETCHED = replace(
    GQA,
    rope_theta=5e5,
    rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
)
GOLDEN = {
    "seed_legacy_tp1": "legacy",
    "seed_legacy_tp2": "legacy",
    "seed_legacy_tp2_bf16": "legacy",
    "seed_mcore_te_tp1": "te",
    "seed_mcore_te_tp2_pp5": "te",
    "core_local_tp2_bf16": "mcore",
    "core_local_4layer_tp2_pp2": "mcore",
}
QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"


def loaded(checkpoint: Checkpoint) -> camelid.Model:
    compute, mesh = ComputeConfig(), one_device()
    return camelid.Model(checkpoint.config, load_params(checkpoint, compute, mesh), None, compute, mesh)


def converted(checkpoint: Checkpoint, write: Callable[..., list[PlannedFile]], folder: Path, **options: Any) -> Path:
    """A new folder of another format."""
    folder.mkdir()
    names = {"names": options.pop("names")} if "names" in options else {}
    dtypes = checkpoint.dtypes
    if "dtype" in options:
        dtypes = dict.fromkeys(dtypes, dtype_named(options.pop("dtype")))
    put(
        folder,
        write,
        ExportSpec(checkpoint.config, dtypes, checkpoint.read_slice, checkpoint.companions, **options),
        **names,
    )
    return folder


def hugging_face(config: ModelConfig, folder: Path) -> Path:
    return save_hf(transformers_twin(config, tiny_params(config)), folder)


def flat(tree: dict[str, Any], start: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{start}{key}.") if isinstance(value, dict) else {start + key: value}
    return values


def tensor_of(tensor: Any) -> np.ndarray:
    """The numbers of a tensor of ours."""
    values = np.empty(tensor.shape, tensor.dtype)
    tensor.read_into(values, tuple(slice(0, n) for n in tensor.shape))
    return values


# Golden files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_checkpoints_have_the_parameters_and_the_logits_of_their_sources(assets: Path, stories: Path, name: str):
    smaller, dtype = "4layer" in name, "bfloat16" if "bf16" in name else "float32"
    source = assets / "golden" / "hf_variants" / "hf_4layer" if smaller else stories
    checkpoint = megatron.open_checkpoint(assets / "golden" / "megatron" / name)
    assert {dtype.name for dtype in checkpoint.dtypes.values()} == {dtype}
    model, rounded = loaded(checkpoint), named(camelid.load(source, dtype=dtype).params)
    ours = named(model.params)
    assert checkpoint.config.tie_embeddings == name.startswith("core")
    if "lm_head" in ours:  # the seed's converter ties nothing
        rounded |= {"lm_head": rounded["embed"]}
    assert ours.keys() == rounded.keys()
    for path, array in rounded.items():
        np.testing.assert_array_equal(ours[path], np.asarray(array, np.float32), err_msg=path)
    if smaller:
        reference = np.array(json.loads((source / "logits.json").read_text())["logits"], np.float32)
        ids = np.array([IDS])
        reference = reference.reshape(len(IDS), -1)
    else:
        arrays = np.load(stories.parent / "reference.npz")
        ids, reference = arrays["prompt0_ids"][None], arrays["prompt0_logits"]
    # Of scale 20; rounding the weights to bfloat16 moves them by some tenths.
    np.testing.assert_allclose(model.logits(ids)[0], reference, rtol=0, atol=1e-4 if dtype == "float32" else 0.3)


@pytest.mark.parametrize("name", [name for name, kind in GOLDEN.items() if kind != "te"])
def test_golden_checkpoints_are_written_as_they_were(assets: Path, tmp_path: Path, name: str):
    """Every folder, name, shape, dtype and bit of the model."""
    golden = assets / "golden" / "megatron" / name
    ways, stages = 2 if "tp2" in name else 1, 2 if "pp2" in name else 1
    options = {"tensor_parallel": ways, "pipeline_parallel": stages, "names": GOLDEN[name]}
    folder = converted(megatron.open_checkpoint(golden), megatron.plan_files, tmp_path / "ours", **options)
    files = sorted(file.relative_to(golden) for file in golden.rglob("*.pt"))
    assert files == sorted(file.relative_to(folder) for file in folder.rglob("*.pt"))
    tracker = "latest_checkpointed_iteration.txt"
    assert (folder / tracker).read_bytes() == (golden / tracker).read_bytes()
    for file in files:
        ours = torch.load(folder / file, weights_only=False)
        theirs = unpickle(golden / file, INERT)
        assert (ours["checkpoint_version"], ours["iteration"]) == (theirs["checkpoint_version"], theirs["iteration"])
        assert isinstance(ours["args"], argparse.Namespace)
        model, expected = flat(ours["model"]), flat(theirs["model"])
        assert model.keys() == expected.keys()
        for key, tensor in expected.items():
            if key.endswith("_extra_state"):
                assert model[key] is None is tensor
                continue
            values = tensor_of(tensor)
            assert tuple(model[key].shape) == values.shape
            assert str(model[key].dtype) == f"torch.{values.dtype.name}"
            assert model[key].view(torch.uint8).numpy().tobytes() == values.tobytes(), key


def test_settings_are_those_that_megatron_writes(assets: Path, tmp_path: Path):
    golden = assets / "golden" / "megatron" / "core_local_4layer_tp2_pp2"
    options = {"tensor_parallel": 2, "pipeline_parallel": 2}
    folder = converted(megatron.open_checkpoint(golden), megatron.plan_files, tmp_path / "ours", **options)
    file = "iter_0000001/mp_rank_01_001/model_optim_rng.pt"
    ours = vars(torch.load(folder / file, weights_only=False)["args"])
    theirs = unpickle(golden / file, INERT)["args"].state
    differ = {key for key, value in ours.items() if key in theirs and theirs[key] != value}
    # torch's own dtype is not numpy's; older versions need the others, and this one says the same by rope alone.
    differ -= {"use_rotary_position_embeddings", "add_position_embedding"}
    assert differ <= {"params_dtype", "rank", "make_vocab_size_divisible_by", "iteration"}
    assert (ours["params_dtype"], ours["rank"]) == (torch.float32, 3)
    assert {*ours} - {*theirs} <= {"iteration", "use_mcore_models"}


@pytest.mark.parametrize("place", ["", "iter_0000001", "iter_0000001/mp_rank_01", "iter_0000001/mp_rank_00/" + FILE])
def test_a_checkpoint_opens_from_every_place_of_it(assets: Path, place: str):
    path = assets / "golden" / "megatron" / "seed_legacy_tp2" / place
    assert megatron.matches(path)
    assert not hf.matches(path)
    assert len(megatron.open_checkpoint(path).tensors) == 38


def test_other_folders_do_not_look_like_it(stories: Path, tmp_path: Path):
    for path in (stories, stories / "config.json", tmp_path, tmp_path / "nothing"):
        assert not megatron.matches(path)


# There and back -------------------------------------------------------------------------

CASES: dict[str, tuple[ModelConfig, int, int, str]] = {
    "every head its own keys": (MHA, 1, 1, "mcore"),
    "every head its own keys, three ranks": (MHA, 3, 1, "legacy"),
    "grouped queries": (GQA, 1, 2, "legacy"),
    "grouped queries, two ranks": (GQA, 2, 4, "mcore"),
    "rotations stretched": (STRETCHED, 1, 1, "mcore"),
    "tied": (TIED, 2, 1, "mcore"),
    "tied, two stages": (TIED, 1, 2, "mcore"),
    "tied, two stages, old names": (TIED, 2, 2, "legacy"),
}


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "float32") for case in CASES), *((case, "bfloat16") for case in [*CASES][1::2])]
)
def test_hugging_face_to_megatron_and_back_is_the_same_bit_for_bit(
    case: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, ways, stages, names = CASES[case]
    theirs = hf.open_checkpoint(hugging_face(config, tmp_path / "theirs"))
    source = converted(theirs, hf.plan_files, tmp_path / "source", dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("camelid.checkpoint.layout.CHUNK_BYTES", 5000)
    options = {"tensor_parallel": ways, "pipeline_parallel": stages, "names": names}
    folder = converted(hf.open_checkpoint(source), megatron.plan_files, tmp_path / "ours", **options)
    assert len([*folder.rglob("*.pt")]) == ways * stages
    checkpoint = megatron.open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.config, checkpoint.notes) == ("megatron", config, ())
    back = converted(checkpoint, hf.plan_files, tmp_path / "back")
    assert tensor_bytes(back) == tensor_bytes(source)
    for name in ("config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    # Without config.json, the settings say all but which tokens begin and end a text, and the family.
    (folder / "config.json").unlink()
    checkpoint = megatron.open_checkpoint(folder)
    assert checkpoint.config == replace(config, bos_id=None, eos_ids=())
    assert len(checkpoint.notes) == 2


@pytest.mark.parametrize("names", ["mcore", "legacy"])
@pytest.mark.parametrize("band", [1, 4000, 2**28])
def test_what_lies_in_one_tensor_is_told_apart_when_it_is_read_across_its_rows(
    names: str, band: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Gate and up are one tensor of the file, and so are queries, keys and values; turned matrices need columns."""
    source = hf.open_checkpoint(hugging_face(GQA, tmp_path / "theirs"))
    folder = converted(source, megatron.plan_files, tmp_path / "m", tensor_parallel=2, names=names)
    monkeypatch.setattr("camelid.checkpoint.tensors.COLUMN_CACHE_BYTES", band)
    ours, theirs = open_checkpoint(folder).read_slice, source.read_slice
    for layer in range(GQA.num_layers):
        for start in range(0, GQA.embed_dim, 8):
            for name in ("mlp.gate", "mlp.up", "attn.q", "attn.k", "attn.v"):
                path = f"layers.{name}_proj"
                spec = source.table.entries[path].spec
                index = (*(slice(0, n) for n in spec.shape[1:-1]), slice(start, start + 8))
                found, expected = (read(path, layer, index, np.dtype(np.float32)) for read in (ours, theirs))
                np.testing.assert_array_equal(found, expected, err_msg=f"{path}, {layer}, {start}")


def test_a_device_may_have_a_part_of_a_group_of_queries(tmp_path: Path):
    """Where a mesh cuts finer than the file's groups."""
    source = hugging_face(GQA, tmp_path / "theirs")
    folder = converted(hf.open_checkpoint(source), megatron.plan_files, tmp_path / "ours")
    checkpoint = megatron.open_checkpoint(folder)
    part = checkpoint.table.entries["layers.attn.q_proj"]
    expected = np.asarray(named(tiny_params(GQA))["layers.attn.q_proj"])
    for start, stop in ((0, 1), (2, 4), (5, 6)):
        index = (slice(start, stop), slice(0, 10), slice(8, 48))
        out = np.empty((stop - start, 10, 40), np.float32)
        read_parameter_slice(part, checkpoint.tensors[part.name(1)], index, 1, out)
        np.testing.assert_array_equal(out, expected[1][index])


# Other ways to lay it out ---------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any], rank: str = "*") -> None:
    """Changes what the files hold, as torch itself writes it."""
    for file in sorted(folder.glob(f"iter_0000001/{rank}/*.pt")):
        held = torch.load(file, weights_only=False)
        change(held)
        torch.save(held, file)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model over two ranks and two stages, without config.json."""
    return bare(GQA, tmp_path_factory.mktemp("megatron"), tensor_parallel=2, pipeline_parallel=2)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def bare(config: ModelConfig, tmp_path: Path, **options: Any) -> Path:
    source = hf.open_checkpoint(hugging_face(config, tmp_path / "theirs"))
    folder = converted(source, megatron.plan_files, tmp_path / "ours", **options)
    (folder / "config.json").unlink()
    return folder


def assert_same(folder: Path, config: ModelConfig) -> Checkpoint:
    checkpoint = megatron.open_checkpoint(folder)
    ours, theirs = named(loaded(checkpoint).params), named(tiny_params(config))
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)
    return checkpoint


def test_rows_that_fill_up_the_vocabulary_are_left_out(folder: Path):
    """49 tokens for each of two ranks become 64, and the last rank begins with what the first had last."""

    def fill(key: str, stage: int) -> None:
        ranks = [f"mp_rank_0{way}_00{stage}" for way in (0, 1)]
        files = [folder / "iter_0000001" / rank / FILE for rank in ranks]
        table = torch.cat([torch.load(file, weights_only=False)["model"][key] for file in files])
        table = torch.cat([table, table[-1:].expand(30, -1)])
        for rank, part in zip(ranks, table.chunk(2), strict=True):
            part = part.clone()
            rewritten(folder, lambda held, part=part: held["model"].update({key: part}), rank)

    fill("embedding.word_embeddings.weight", 0)
    fill("output_layer.weight", 1)
    with pytest.raises(UserError, match=r"embeddings\.weight has shape \(128, 48\)"):
        megatron.open_checkpoint(folder)  # which says that nothing was filled up
    padded = {"make_vocab_size_divisible_by": 64, "padded_vocab_size": 128}
    rewritten(folder, lambda held: vars(held["args"]).update(padded))
    assert_same(folder, GQA)
    rewritten(folder, lambda held: vars(held["args"]).update(vocab_size=None))
    checkpoint = megatron.open_checkpoint(folder)
    assert checkpoint.config.vocab_size == 128
    assert "128 is assumed" in checkpoint.notes[-1]


@pytest.mark.parametrize("names", ["mcore", "legacy"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_that_does_not_divide_is_filled_up_with_its_last_row(tie: bool, names: str, tmp_path: Path):
    config = replace(GQA, vocab_size=97, tie_embeddings=tie)
    source = hf.open_checkpoint(hugging_face(config, tmp_path / "hf"))
    folder = converted(source, megatron.plan_files, tmp_path / "m", tensor_parallel=2, pipeline_parallel=2, names=names)
    (folder / "config.json").unlink()
    checkpoint = megatron.open_checkpoint(folder)
    assert checkpoint.config.vocab_size == 97
    assert tensor_bytes(converted(checkpoint, hf.plan_files, tmp_path / "back")) == tensor_bytes(tmp_path / "hf")
    tables = []
    for way in (0, 1):
        held = torch.load(folder / "iter_0000001" / f"mp_rank_0{way}_000" / FILE, weights_only=False)
        assert (held["args"].padded_vocab_size, held["args"].make_vocab_size_divisible_by) == (256, 128)
        model = flat(held["model"])
        tables.append(next(one for name, one in model.items() if name.endswith("word_embeddings.weight")))
    table, rows = torch.cat(tables), (slice(0, 97), slice(0, config.embed_dim))
    assert table.shape == (256, config.embed_dim)
    assert np.array_equal(table[:97], source.read_slice("embed", None, rows, np.dtype(np.float32)))
    assert torch.equal(table[97:], table[96:97].expand(256 - 97, -1))


def test_layers_of_a_virtual_pipeline_take_turns(folder: Path):
    """Of four layers, stage 0 has 0 and 2, and stage 1 has 1 and 3."""
    files = {
        (way, stage): folder / f"iter_0000001/mp_rank_0{way}_00{stage}" / FILE for way in (0, 1) for stage in (0, 1)
    }
    held = {place: torch.load(file, weights_only=False) for place, file in files.items()}
    models = {place: one.pop("model") for place, one in held.items()}
    for (way, stage), file in files.items():
        chunks: list[dict[str, Any]] = [{}, {}]
        for chunk in (0, 1):  # global layer 2 chunk + stage, which lies in stage `chunk` as its layer `stage`
            for key, value in models[way, chunk].items():
                if key.startswith(f"decoder.layers.{stage}."):
                    chunks[chunk][key.replace(f"layers.{stage}.", "layers.0.")] = value
        outer = {key: value for key, value in models[way, stage].items() if ".layers." not in key}
        chunks[stage] |= outer
        torch.save(held[way, stage] | {"model0": chunks[0], "model1": chunks[1]}, file)
    assert_same(folder, GQA)


def test_names_of_older_versions_are_read(tmp_path: Path):
    folder = bare(MHA, tmp_path, names="legacy", tensor_parallel=3)

    def age(held: dict[str, Any]) -> None:
        model = held["model"]["language_model"]
        new = {".self_attention.": ".attention.", ".input_norm.": ".input_layernorm."}
        new |= {".post_attention_norm.": ".post_attention_layernorm.", "final_norm.": "final_layernorm."}
        transformer = {}
        for key, value in model.pop("encoder").items():
            for ours, theirs in new.items():
                key = key.replace(ours, theirs)
            transformer[key] = value
        model["transformer"] = transformer

    rewritten(folder, age)
    assert_same(folder, MHA)


@pytest.mark.parametrize(("version", "order"), [(0, (1, 0, 2, 3)), (1.0, (0, 2, 1, 3)), (2.0, (0, 1, 2, 3))])
def test_queries_keys_and_values_of_older_versions_lie_otherwise(tmp_path: Path, version: float, order: tuple):
    folder = bare(MHA, tmp_path, tensor_parallel=3)

    def age(held: dict[str, Any]) -> None:
        held["checkpoint_version"] = version
        for layer in range(4):
            value = held["model"][QKV.format(layer)]
            held["model"][QKV.format(layer)] = value.view(2, 3, 10, 48).permute(order).reshape(-1, 48).contiguous()

    rewritten(folder, age)
    assert_same(folder, MHA)


def test_states_of_optimizers_and_random_numbers_are_left_alone(folder: Path):
    def add(held: dict[str, Any]) -> None:
        held["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0], "lr": 0.1}]}
        held["rng_state"] = [{"np_rng_state": np.random.default_rng(0).integers(0, 9, 5), "torch": torch.ones(2)}]
        held["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"\x00\xff")

    rewritten(folder, add)
    assert_same(folder, GQA)


def test_a_release_and_its_config_are_found(folder: Path, tmp_path: Path):
    (folder / "iter_0000001").rename(folder / "release")
    (folder / TRACKER).write_text("release\n")
    assert assert_same(folder, GQA).folder == folder
    given = replace(GQA, context_length=5)
    assert megatron.open_checkpoint(folder, given).config == given
    hugging_face(GQA, tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs" / "config.json", folder)
    assert megatron.open_checkpoint(folder).config == megatron.open_checkpoint(folder / "release").config == GQA
    shutil.move(folder / "config.json", folder / "release")
    assert megatron.open_checkpoint(folder).config == GQA


# Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "about"),
    [
        (FAMILIES["gemma"].ours, {}, "cannot hold norm_offset = 1.0"),
        (FAMILIES["qwen2, tied"].ours, {}, "cannot hold qkv_bias = True"),
        (FAMILIES["mistral, sliding window"].ours, {}, "cannot hold sliding_window = 7"),
        (replace(GQA, rope_scaling=LLAMA3), {}, "cannot hold rope_scaling"),
        (GQA, {"tensor_parallel": 4}, "heads = 6 is not divisible by tensor_parallel = 4"),
        (GQA, {"tensor_parallel": 3}, "kv_heads = 2 is not divisible by tensor_parallel = 3"),
        (MHA, {"tensor_parallel": 2}, "mlp = 81 is not divisible by tensor_parallel = 2"),
        (replace(GQA, mlp_dim=81), {"tensor_parallel": 2}, "mlp = 81 is not divisible by tensor_parallel = 2"),
        (GQA, {"pipeline_parallel": 3}, "layers = 4 is not divisible by pipeline_parallel = 3"),
    ],
)
def test_what_megatron_cannot_hold_is_refused_by_name(config: ModelConfig, options: Any, about: str, tmp_path: Path):
    def source(*_: Any) -> Any:
        raise AssertionError("nothing is written before it is known that all can be")

    dtypes = dict.fromkeys(named(tiny_params(config)), np.dtype(np.float32))
    with pytest.raises(UserError, match=about):
        put(tmp_path, megatron.plan_files, ExportSpec(config, dtypes, source, **options))
    assert not [*tmp_path.iterdir()]


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, lambda held: vars(held["args"]).update(values))


def entries(rank: str = "*", **values: Any) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, lambda held: held.update(values), rank)


def weights(change: Callable[[dict[str, Any]], Any], rank: str = "mp_rank_01_000") -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, lambda held: change(held["model"]), rank)


class Odd:
    """Of a module that is not Megatron's."""


FC1, NORM = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.input_layernorm.weight"
RANK = Path("iter_0000001/mp_rank_01_001")
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no rank": (lambda f: shutil.rmtree(f / "iter_0000001"), r"0 folders mp_rank_\*: ranks are missing"),
    "a rank missing": (lambda f: shutil.rmtree(f / RANK), "3 folders .*: ranks are missing"),
    "a stage missing": (
        lambda f: [shutil.rmtree(rank) for rank in f.glob("iter_*/*_001")],
        "pipeline_model_parallel_size = 2, and there are folders for 1",
    ),
    "a file missing": (lambda f: (f / RANK / FILE).unlink(), r"model_optim_rng\.pt is not a file"),
    "a file cut short": (
        lambda f: (f / RANK / FILE).write_bytes((f / RANK / FILE).read_bytes()[:-99]),
        r"model_optim_rng\.pt is damaged",
    ),
    "ranks of experts": (lambda f: (f / RANK).rename(f / "iter_0000001/mp_rank_01_001_000"), "rank of experts"),
    "a distributed checkpoint": (lambda f: (f / "iter_0000001/metadata.json").touch(), "is a distributed checkpoint"),
    "a tracker that climbs": (lambda f: (f / TRACKER).write_text("../x"), "no number of an iteration"),
    "a tracker of nothing": (lambda f: (f / TRACKER).write_text(""), "no number of an iteration"),
    "a tracker of another": (lambda f: (f / TRACKER).write_text("7"), r"iter_0000007 has 0 folders"),
    "no settings": (entries(args=None), "holds no args"),
    "settings in a table": (entries(args={"num_layers": 4}), "holds no args"),
    "no model": (entries(model=3), "holds no model"),
    "another version": (entries(checkpoint_version=4.0), "unknown version 4.0"),
    "a version of no number": (entries(checkpoint_version=[1]), "unknown version a list"),
    "an old version with groups": (entries(checkpoint_version=0), "no grouped queries"),
    "two versions": (entries("mp_rank_01_001", checkpoint_version=2.0), "is of another checkpoint"),
    "a class of its own": (entries(odd=Odd()), r"would call .*test_megatron\.Odd"),
    "no swiglu": (settings(swiglu=False), "has swiglu = False"),
    "another norm": (settings(normalization="LayerNorm"), "has normalization = LayerNorm"),
    "biases": (settings(add_bias_linear=True), "has add_bias_linear = True"),
    "a window": (settings(window_size=(5, 0)), "has window_size = a tuple"),
    "experts": (settings(num_experts=8), "has num_experts = 8"),
    "learned positions": (
        settings(position_embedding_type="learned_absolute", use_rotary_position_embeddings=False),
        "position_embedding_type = learned_absolute",
    ),
    "neighbouring pairs": (settings(rotary_interleaved=True), "has rotary_interleaved = True"),
    "a part of heads": (settings(rotary_percent=0.5), "has rotary_percent = 0.5"),
    "no layers": (settings(num_layers=0), "has num_layers = 0 in its args"),
    "countless layers": (settings(num_layers=10**12), "too few tensors for 1000000000000 layers"),
    "too few layers": (settings(num_layers=3), r"no place for: decoder\.layers\.3"),
    "a number beyond counting": (settings(hidden_size=10**5000), "has hidden_size = a int"),
    "a dtype for a number": (settings(hidden_size=torch.float32), "has hidden_size = a "),
    "text for a number": (settings(norm_epsilon="x\x1b"), r"has norm_epsilon = x\\x1b"),
    "groups that do not divide": (settings(num_query_groups=4), "describes no model: num_heads = 6"),
    "other heads": (settings(num_attention_heads=8), "has shape"),
    "a name in one rank": (weights(lambda t: t.pop(FC1)), f"disagree about {FC1}"),
    "a name in none": (weights(lambda t: t.pop(FC1), "mp_rank_*_000"), r"lacks .*mlp\.linear_fc1\.weight"),
    "a name too many": (weights(lambda t: t.update(x=torch.ones(2)), "mp_rank_*_000"), "no place for: x"),
    "a table of no end": (weights(lambda t: t.update(t=t), "mp_rank_*_000"), "is not a tensor"),
    "no tensor": (weights(lambda t: t.update({FC1: 3})), f"{FC1} in .* is not a tensor"),
    "norms that differ": (weights(lambda t: t[NORM][3:4].add_(1)), f"{NORM} in .*mp_rank_01_000.* differs"),
    "two dtypes": (weights(lambda t: t.update({FC1: t[FC1].half()})), "float16 in"),
    "a dtype of no parameter": (weights(lambda t: t.update({FC1: t[FC1].int()}), "mp_rank_*_000"), "is int32"),
    "an odd number of rows": (weights(lambda t: t.update({FC1: t[FC1][1:].clone()})), "79 rows, of 2 equal parts"),
    "one number over and over": (
        weights(lambda t: t.update({NORM: torch.ones(1).expand(10**12)})),
        f"{NORM} in .* is larger than the file",
    ),
    "a stage twice": (
        weights(lambda t: t.update({"decoder.final_layernorm.weight": torch.ones(48)}), "mp_rank_*_000"),
        "as a stage before it has",
    ),
    "a layer left out": (
        weights(lambda t: t.update({"decoder.layers.9.x": torch.ones(2)}), "mp_rank_*_000"),
        "lacks some of its layers",
    ),
}


@pytest.mark.parametrize(("damage", "about"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_file_and_name(damage: Callable[[Path], Any], about: str, folder: Path):
    damage(folder)
    with pytest.raises(UserError, match=about) as refusal:
        megatron.open_checkpoint(folder)
    assert "\x1b" not in refusal.value.problem


def test_a_config_of_another_size_is_refused(folder: Path):
    with pytest.raises(UserError, match="has ffn_hidden_size = 80, and the given config 81"):
        megatron.open_checkpoint(folder, replace(GQA, mlp_dim=81))


def test_a_tied_model_whose_head_differs_is_refused(tmp_path: Path):
    folder = bare(TIED, tmp_path, pipeline_parallel=2)
    rewritten(folder, lambda held: held["model"]["output_layer.weight"][:, 3].add_(1), "mp_rank_00_001")
    with pytest.raises(UserError, match=r"output_layer\.weight differs from it"):
        megatron.open_checkpoint(folder)


def test_nothing_of_a_file_is_called(folder: Path):
    """Classes become records, which nothing can call."""
    file = folder / RANK / FILE
    held = unpickle(file, INERT)
    assert isinstance(held["args"], OpaqueObject)
    assert held["args"].name == "argparse Namespace"
    for name in ("os system", "builtins eval", "builtins getattr", "megatron", "numpy.core.multiarray x y", "io open"):
        assert not INERT.fullmatch(name)
    with pytest.raises(UserError, match=r"would call argparse\.Namespace"):
        unpickle(file)


def test_damaged_bytes_never_do_more_than_a_refusal(folder: Path):
    draw, file = random.Random(0), folder / RANK / FILE
    whole = file.read_bytes()
    end = time.monotonic() + 1
    for _ in range(60):
        if time.monotonic() > end:
            break
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(0, 4000 if draw.random() < 0.7 else len(data))] = draw.randrange(256)
        file.write_bytes(bytes(data[: draw.randrange(len(data))]) if draw.random() < 0.2 else bytes(data))
        with contextlib.suppress(UserError):
            megatron.open_checkpoint(folder)
