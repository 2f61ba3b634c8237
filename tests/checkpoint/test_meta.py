"""Meta's folders: golden ones open with the numbers of their sources, and what is written is what Meta's code reads."""

import json
import math
import random
import shutil
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
from camelid.checkpoint.files import PlannedFile
from camelid.checkpoint.formats import hf, meta
from camelid.checkpoint.formats.meta_params import (
    LLAMA3_1,
    LLAMA3_2,
    config_from_params,
    params_from_config,
    read_params,
)
from camelid.checkpoint.tensors import Tensor, dtype_named
from camelid.errors import UserError
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.params import named
from camelid.model.presets import PRESETS
from camelid.parallel.mesh import one_device
from families import FAMILIES
from runs import tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, to_transformers, transformers_twin
from writing import put

IDS = [1, 403, 407, 261, 378]
MHA = tiny_config(head_dim=8, num_layers=2, num_kv_heads=6, vocab_size=99, mlp_dim=81)
GQA = tiny_config(head_dim=8, num_layers=2, vocab_size=98, rope_theta=1e6, bos_id=3, eos_ids=(5, 7))
LLAMA3 = replace(GQA, rope_theta=500_000.0, rope_scaling=LLAMA3_2, tie_embeddings=True)
CASES = {
    "every head its own keys": (MHA, 1),
    "every head its own keys, three shards": (MHA, 3),
    "grouped queries": (GQA, 1),
    "grouped queries, two shards": (GQA, 2),
    "tied, of the kind of Llama 3": (LLAMA3, 1),
    "tied, of the kind of Llama 3, two shards": (LLAMA3, 2),
}
each = pytest.mark.parametrize(("config", "ways"), CASES.values(), ids=CASES)


def loaded(checkpoint: Checkpoint) -> camelid.Model:
    """The model in float32."""
    compute, mesh = ComputeConfig(), one_device()
    return camelid.Model(checkpoint.config, load_params(checkpoint, compute, mesh), None, compute, mesh)


def converted(checkpoint: Checkpoint, write: Callable[..., list[PlannedFile]], folder: Path, **options: Any) -> Path:
    """A new folder of another format."""
    folder.mkdir()
    dtypes = checkpoint.dtypes
    if "dtype" in options:
        dtypes = dict.fromkeys(dtypes, dtype_named(options.pop("dtype")))
    put(folder, write, ExportSpec(checkpoint.config, dtypes, checkpoint.read_slice, checkpoint.companions, **options))
    return folder


def hugging_face(config: ModelConfig, folder: Path) -> Path:
    return save_hf(transformers_twin(config, tiny_params(config)), folder)


def opened(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


# Golden files ---------------------------------------------------------------------------


def test_one_shard_of_a_real_model_has_its_parameters_and_its_logits(assets: Path, stories: Path):
    checkpoint = meta.open_checkpoint(assets / "golden" / "meta" / "gqa_1shard")
    model, source = loaded(checkpoint), camelid.load(stories)
    ours, theirs = named(model.params), named(source.params)
    np.testing.assert_array_equal(ours.pop("lm_head"), theirs["embed"])  # Meta's format ties nothing
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)
    arrays = np.load(stories.parent / "reference.npz")
    for prompt in range(3):
        logits = model.logits(arrays[f"prompt{prompt}_ids"][None])[0]
        np.testing.assert_allclose(logits, arrays[f"prompt{prompt}_logits"], rtol=0, atol=1e-4)


def test_two_shards_in_float16_have_the_parameters_and_about_the_logits_of_their_source(assets: Path):
    checkpoint = meta.open_checkpoint(assets / "golden" / "meta" / "mha_2shard_fp16")
    source = assets / "golden" / "hf_variants" / "hf_mha_untied"
    model, rounded = loaded(checkpoint), named(camelid.load(source, dtype="float16").params)
    assert {dtype.name for dtype in checkpoint.dtypes.values()} == {"float16"}
    for path, array in named(model.params).items():
        np.testing.assert_array_equal(array, np.asarray(rounded[path], np.float32), err_msg=path)
    reference = np.array(json.loads((source / "logits.json").read_text())["logits"], np.float32)
    # Of scale 20; rounding the weights to float16 moves them by 0.017.
    np.testing.assert_allclose(model.logits(np.array([IDS])).reshape(reference.shape), reference, rtol=0, atol=0.03)


def test_two_shards_are_written_as_they_were(assets: Path, tmp_path: Path):
    golden = assets / "golden" / "meta" / "mha_2shard_fp16"
    folder = converted(meta.open_checkpoint(golden), meta.plan_files, tmp_path / "ours", tensor_parallel=2)
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        ours, theirs = opened(folder / name), opened(golden / name)
        del theirs["rope.freqs"]  # a buffer
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            assert torch.equal(ours[key], tensor), key
    assert json.loads((folder / "params.json").read_text()) == json.loads((golden / "params.json").read_text()) | {
        "vocab_size": 512
    }
    assert (folder / "tokenizer.model").read_bytes() == (golden / "tokenizer.model").read_bytes()


# There and back -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each
def test_hugging_face_to_meta_and_back_is_the_same_bit_for_bit(
    config: ModelConfig, ways: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    theirs = hf.open_checkpoint(hugging_face(config, tmp_path / "theirs"))
    source = converted(theirs, hf.plan_files, tmp_path / "source", dtype=dtype)
    monkeypatch.setattr("camelid.checkpoint.layout.CHUNK_BYTES", 5000)
    monkeypatch.setattr("camelid.checkpoint.tensors.CHUNK", 3000)
    folder = converted(hf.open_checkpoint(source), meta.plan_files, tmp_path / "meta", tensor_parallel=ways)
    assert len(sorted(folder.glob("*.pth"))) == ways
    checkpoint = meta.open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.config, checkpoint.notes) == ("meta", config, ())
    back = converted(checkpoint, hf.plan_files, tmp_path / "back")
    assert tensor_bytes(back) == tensor_bytes(source)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


def metas_tensors(config: ModelConfig, source: Path) -> dict[str, np.ndarray]:
    """By Meta's names, whole: written down once more, from what transformers has."""
    words = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo"}
    words |= {"gate_proj": "feed_forward.w1", "up_proj": "feed_forward.w3", "down_proj": "feed_forward.w2"}
    words |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = {}
    for name, (_, shape, data) in tensor_bytes(source).items():
        array = np.frombuffer(data, np.float32).reshape(shape)
        *front, word, _ = name.split(".")
        if word in ("q_proj", "k_proj"):
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}[word]
            array = array.reshape(heads, 2, -1, shape[1]).transpose(0, 2, 1, 3).reshape(shape)
        outer = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}
        tensors[f"{outer[word]}.weight" if word in outer else f"layers.{front[2]}.{words[word]}.weight"] = array
    return tensors | ({"output.weight": tensors["tok_embeddings.weight"]} if config.tie_embeddings else {})


@each
def test_shards_hold_what_metas_code_looks_for(config: ModelConfig, ways: int, tmp_path: Path):
    source = hugging_face(config, tmp_path / "theirs")
    folder = converted(hf.open_checkpoint(source), meta.plan_files, tmp_path / "meta", tensor_parallel=ways)
    shards = [opened(folder / f"consolidated.{i:02}.pth") for i in range(ways)]
    expected = metas_tensors(config, source)
    rows = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
    axes = rows | {"wo": 1, "w2": 1, "tok_embeddings": 0 if config.rope_theta == 500_000 else 1}
    for shard in shards:
        assert shard.keys() == expected.keys()
    for name, array in expected.items():
        parts = [shard[name].numpy() for shard in shards]
        axis = axes.get(name.split(".")[-2])
        cuts = [array] * ways if axis is None else np.split(array, ways, axis)
        for part, cut in zip(parts, cuts, strict=True):
            np.testing.assert_array_equal(part, cut, err_msg=name)


# params.json ----------------------------------------------------------------------------

RELEASED = {
    "LLaMA-13B": "llama_13b",
    "LLaMA-30B": "llama_30b",
    "Llama-2-7b": "llama2_7b",
    "Meta-Llama-3-8B": "llama3_8b",
    "Meta-Llama-3-70B-Instruct": "llama3_70b",
    "Llama-3.1-8B": "llama3_1_8b",
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_params_are_the_models_that_were_released(assets: Path, name: str):
    params = read_params(assets / "hf_files" / "params" / f"{name}.params.json")
    config, notes = config_from_params(params, 32_000, False)
    preset = PRESETS[RELEASED[name]]
    assert replace(config, eos_ids=preset.eos_ids, pad_id=preset.pad_id) == preset
    assert set(preset.eos_ids) <= set(config.eos_ids)
    assert [f"{preset.context_length} tokens" in note for note in notes].count(True) == 1
    assert [f"{preset.bos_id} and {preset.eos_ids[0]}" in note for note in notes].count(True) == 1


def metas_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None, **_: Any) -> int:
    """What Meta's FeedForward makes of 4 dim."""
    width = int(2 * (4 * dim) / 3)
    width = int(ffn_dim_multiplier * width) if ffn_dim_multiplier else width
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("llama", "codellama"))])
def test_presets_are_the_same_through_params_json(name: str):
    preset = PRESETS[name]
    params = params_from_config(preset)
    config, _ = config_from_params(params, 1, preset.tie_embeddings)
    same = {field: getattr(preset, field) for field in ("context_length", "bos_id", "eos_ids", "pad_id")}
    assert replace(config, **same) == preset
    assert metas_width(**params) == preset.mlp_dim


def test_the_formula_gives_every_width_of_the_mlp():
    draw = random.Random(0)
    for _ in range(200):
        dim, width = 4 * draw.randrange(1, 5000), draw.randrange(1, 60_000)
        params = params_from_config(tiny_config(embed_dim=dim, num_heads=2, head_dim=dim // 2, mlp_dim=width))
        assert metas_width(**params) == width


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of a tiny model, with nothing beside them but params.json, and where they come from."""
    return bare(GQA, tmp_path_factory.mktemp("meta")).parent


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path / "meta"


def bare(config: ModelConfig, tmp_path: Path, ways: int = 2) -> Path:
    source = hf.open_checkpoint(hugging_face(config, tmp_path / "theirs"))
    folder = converted(source, meta.plan_files, tmp_path / "meta", tensor_parallel=ways)
    (folder / "config.json").unlink()
    return folder


def edit_params(folder: Path, **values: Any) -> None:
    params = json.loads((folder / "params.json").read_text()) | values
    params = {key: value for key, value in params.items() if value is not ...}
    (folder / "params.json").write_text(json.dumps(params))


def edit_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], *ranks: int) -> None:
    for path in [folder / f"consolidated.{rank:02}.pth" for rank in ranks or (1,)]:
        tensors = opened(path)
        change(tensors)
        torch.save(tensors, path)


def test_what_params_json_does_not_say_is_guessed_and_told(folder: Path):
    checkpoint = meta.open_checkpoint(folder)
    assert checkpoint.config == replace(GQA, context_length=16_384, bos_id=1, eos_ids=(2,))
    said = [note.split(": ")[1] for note in checkpoint.notes]
    assert said[:2] == ["16384 tokens are assumed", "1 and 2 are assumed"]
    assert said[2].endswith("tie_embeddings = False")
    edit_params(folder, vocab_size=-1, n_kv_heads=2, max_seq_len=77, ffn_dim_multiplier=80.4 / 128)
    assert meta.open_checkpoint(folder / "consolidated.00.pth").config == checkpoint.config
    edit_params(folder, rope_theta=..., norm_eps=1e-6)
    config = meta.open_checkpoint(folder).config
    assert (config.rope_theta, config.norm_eps, config.context_length) == (10_000, 1e-6, 2048)


@pytest.mark.parametrize(
    ("config", "scaling", "tied"),
    [
        (replace(GQA, rope_theta=5e5, rope_scaling=LLAMA3_1), LLAMA3_1, False),
        (replace(GQA, rope_theta=5e5, rope_scaling=LLAMA3_1, tie_embeddings=True), LLAMA3_1, True),
        (replace(GQA, tie_embeddings=True), None, False),
    ],
)
def test_a_head_that_repeats_the_embeddings_is_tied_where_llama_3_2_is_meant(
    config: ModelConfig, scaling: object, tied: bool, tmp_path: Path
):
    folder = bare(config, tmp_path)
    checkpoint = meta.open_checkpoint(folder)
    assert (checkpoint.config.rope_scaling, checkpoint.config.tie_embeddings) == (scaling, tied)
    assert any("tied" in note for note in checkpoint.notes) == tied
    if scaling is not None:
        edit_params(folder, rope_scaling_factor=None)  # as Meta's own files of Llama 3.1 are
        assert meta.open_checkpoint(folder).config.rope_scaling == (LLAMA3_2 if tied else LLAMA3_1)
        edit_params(folder, rope_scaling_factor=5.0)
        assert meta.open_checkpoint(folder).config.rope_scaling == replace(LLAMA3_1, factor=5.0)


def test_a_given_config_wins_over_what_lies_beside_the_shards(folder: Path, tmp_path: Path):
    given = replace(GQA, norm_eps=0.5, rope_theta=77.0, context_length=5)
    assert meta.open_checkpoint(folder, given).config == given
    shutil.copy(tmp_path / "theirs" / "config.json", folder)
    assert meta.open_checkpoint(folder).config == GQA
    assert meta.open_checkpoint(folder, given).config == given
    (folder / "params.json").unlink()
    assert meta.open_checkpoint(folder).config == GQA
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no params\.json\n.*--config PRESET_OR_JSON"):
        meta.open_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value", "given"),
    [("n_heads", 4, True), ("n_heads", 4, False), ("norm_eps", 1e-6, False), ("use_scaled_rope", True, False)],
)
def test_two_descriptions_that_disagree_are_refused(folder: Path, tmp_path: Path, key: str, value: Any, given: bool):
    shutil.copy(tmp_path / "theirs" / "config.json", folder)
    edit_params(folder, **{key: value})
    with pytest.raises(UserError, match=rf"params\.json has {key} = {value}, and (config\.json|the given config) "):
        meta.open_checkpoint(folder, GQA if given else None)


def test_names_that_a_wrapper_left_are_read_and_said(folder: Path):
    before = meta.open_checkpoint(folder)
    for shard in folder.glob("*.pth"):
        torch.save({f"module._orig_mod.{name}": tensor for name, tensor in torch.load(shard).items()}, shard)
    after = meta.open_checkpoint(folder)
    assert after.tensors.keys() == before.tensors.keys()
    assert {*after.notes} - {*before.notes} == {
        "the names of tensors are read without '_orig_mod.' and 'module.', which a wrapper inserted"
    }


def test_a_table_called_model_stands_for_all(folder: Path):
    expected = named(loaded(meta.open_checkpoint(folder)).params)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({"model": params}))
    path = folder / "consolidated.01.pth"
    torch.save({"model": opened(path)}, path)
    for path, array in named(loaded(meta.open_checkpoint(folder)).params).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_folders_and_files_are_known_by_their_names(folder: Path, stories: Path):
    assert meta.matches(folder)
    assert meta.matches(folder / "consolidated.01.pth")
    assert not hf.matches(folder)
    for other in (stories, stories / "model.safetensors", folder / "params.json", folder / "nothing"):
        assert not meta.matches(other)


# Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "about"),
    [
        (FAMILIES["gemma"].ours, {}, "cannot hold norm_offset = 1.0"),
        (FAMILIES["qwen2, tied"].ours, {}, "cannot hold qkv_bias = True"),
        (FAMILIES["mistral, sliding window"].ours, {}, "cannot hold sliding_window = 7"),
        (tiny_config(), {}, "cannot hold head_dim = 10"),
        (replace(GQA, rope_scaling=replace(LLAMA3_1, low_freq_factor=2.0)), {}, "cannot hold rope_scaling"),
        (GQA, {"tensor_parallel": 4}, "heads = 6 is not divisible by tensor_parallel = 4"),
        (GQA, {"tensor_parallel": 3}, "kv_heads = 2 is not divisible by tensor_parallel = 3"),
        (GQA, {"pipeline_parallel": 2}, "no pipeline stages"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(config: ModelConfig, options: Any, about: str, tmp_path: Path):
    def source(*_: Any) -> Any:
        raise AssertionError("nothing is written before it is known that all can be")

    dtypes = dict.fromkeys(named(tiny_params(config)), np.dtype(np.float32))
    with pytest.raises(UserError, match=about):
        put(tmp_path, meta.plan_files, ExportSpec(config, dtypes, source, **options))
    assert not [*tmp_path.iterdir()]


NORM, W1, TABLE = "layers.1.ffn_norm.weight", "layers.0.feed_forward.w1.weight", "tok_embeddings.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no shard": (lambda f: [shard.unlink() for shard in f.glob("*.pth")], r"has no consolidated\.00\.pth"),
    "no first shard": (lambda f: (f / "consolidated.00.pth").unlink(), r"consolidated\.01\.pth: shards are missing"),
    "no last shard": (lambda f: (f / "consolidated.01.pth").unlink(), "24 columns in each of 1 shards, and dim is 48"),
    "a shard cut short": (
        lambda f: (f / "consolidated.01.pth").write_bytes((f / "consolidated.01.pth").read_bytes()[:-99]),
        r"consolidated\.01\.pth is damaged",
    ),
    "a name in one shard": (lambda f: edit_shard(f, lambda t: t.pop(W1)), f"disagree about {W1}"),
    "a name in none": (lambda f: edit_shard(f, lambda t: t.pop(W1), 0, 1), f"lacks {W1}"),
    "no embeddings": (lambda f: edit_shard(f, lambda t: t.pop(TABLE), 0, 1), f"has no matrix {TABLE}"),
    "a name too many": (
        lambda f: edit_shard(f, lambda t: t.update({"layers.0.x": torch.ones(2)}), 0, 1),
        r"no place for: layers\.0\.x",
    ),
    "norms that differ": (
        lambda f: edit_shard(f, lambda t: t[NORM][3:4].add_(1)),
        rf"{NORM} in .*consolidated\.01\.pth differs from that in consolidated\.00\.pth",
    ),
    "norms of two lengths": (lambda f: edit_shard(f, lambda t: t.update({NORM: torch.ones(3)})), "differs from that"),
    "two dtypes": (lambda f: edit_shard(f, lambda t: t.update({W1: t[W1].half()})), f"{W1} is .* float16 in"),
    "a dtype of no parameter": (
        lambda f: edit_shard(f, lambda t: t.update({W1: t[W1].int()}), 0, 1),
        f"{W1} is int32",
    ),
    "two widths": (lambda f: edit_shard(f, lambda t: t.update({W1: t[W1][:, 1:].clone()})), f"{W1} is .* and "),
    "one number over and over": (
        lambda f: edit_shard(f, lambda t: t.update({"norm.weight": torch.ones(1).expand(10**12)})),
        r"norm\.weight in .* is larger than the file",
    ),
    "no matrix": (
        lambda f: edit_shard(f, lambda t: t.update({W1: torch.tensor(1.0)}), 0, 1),
        rf"describes an MLP of width 80, and {W1} has shape \(\)",
    ),
    "params.json of a wider MLP": (lambda f: edit_params(f, multiple_of=3), "describes an MLP of width 81"),
    "params.json of another vocabulary": (lambda f: edit_params(f, vocab_size=77), "asks for \\(77, 48\\)"),
    "params.json of more heads": (lambda f: edit_params(f, n_kv_heads=3), r"attention\.wk\.weight has shape"),
    "params.json of other heads": (lambda f: edit_params(f, n_heads=7), "dim = 48 for n_heads = 7"),
    "params.json of odd heads": (lambda f: edit_params(f, n_heads=16), "rotary features; an even number"),
    "params.json of no group": (lambda f: edit_params(f, n_kv_heads=4), "describes no model: num_heads = 6"),
    "params.json of another dim": (lambda f: edit_params(f, dim=96), "24 columns in each of 2 shards"),
    "params.json of countless layers": (lambda f: edit_params(f, n_layers=10**12), "too few for 1000000000000"),
    "params.json of fewer layers": (lambda f: edit_params(f, n_layers=1), r"no place for: layers\.1\."),
    "params.json that says more": (lambda f: edit_params(f, moe=1, **{"\x1b[2J": 2}), r"unknown keys: '\\x1b\[2J', 'm"),
    "params.json that says less": (lambda f: edit_params(f, dim=..., norm_eps=...), "has no dim, norm_eps"),
    "params.json that is none": (lambda f: (f / "params.json").write_text("[]"), "does not hold a JSON object"),
    "a number that is none": (lambda f: edit_params(f, norm_eps=math.nan), "has norm_eps = nan"),
    "a number without end": (lambda f: edit_params(f, ffn_dim_multiplier=math.inf), "has ffn_dim_multiplier = inf"),
    "a number below one": (lambda f: edit_params(f, n_heads=0), "has n_heads = 0"),
    "a part of a number": (lambda f: edit_params(f, dim=48.0), r"has dim = 48\.0"),
    "a truth for a number": (lambda f: edit_params(f, n_layers=True), "has n_layers = True"),
    "a number for a truth": (lambda f: edit_params(f, use_scaled_rope=1), "has use_scaled_rope = 1"),
    "text for a number": (lambda f: edit_params(f, rope_theta="1e6"), "has rope_theta = '1e6'"),
}


@pytest.mark.parametrize(("damage", "about"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused_by_file_and_name(damage: Callable[[Path], Any], about: str, folder: Path):
    damage(folder)
    with pytest.raises(UserError, match=about) as refusal:
        meta.open_checkpoint(folder)
    assert "\x1b" not in refusal.value.problem


def test_a_tied_model_whose_head_differs_is_refused(tmp_path: Path):
    config = replace(GQA, tie_embeddings=True)
    folder = bare(config, tmp_path)
    assert meta.open_checkpoint(folder, config).config == config
    edit_shard(folder, lambda tensors: tensors["output.weight"][-1, -1:].add_(1))
    with pytest.raises(UserError, match=r"ties the head to the embedding table, and output\.weight differs"):
        meta.open_checkpoint(folder, config)
    edit_shard(folder, lambda tensors: tensors.pop("output.weight"), 0, 1)
    assert meta.open_checkpoint(folder, config).config == config
    assert meta.open_checkpoint(folder).config.tie_embeddings


def test_folders_with_other_bytes_give_an_error_or_tensors_inside_their_files(folder: Path):
    chance, found = random.Random(0), {"refused": 0, "opened": 0}
    sound = {file: file.read_bytes() for file in (folder / "params.json", folder / "consolidated.01.pth")}
    program = len(sound[folder / "consolidated.01.pth"]) // 8  # the pickle comes first; the rest is numbers
    for _ in range(100):
        file = chance.choice([*sound])
        damaged = bytearray(sound[file])
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        for _ in range(chance.choice((1, 1, 2, 8)) if damaged else 0):
            at = chance.randrange(min(len(damaged), program)) if chance.random() < 0.7 else -chance.randrange(1, 600)
            damaged[max(at, -len(damaged))] = chance.choice((0, 1, 0x30, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        file.write_bytes(damaged)
        try:
            tensors = meta.open_checkpoint(folder).tensors
            found["opened"] += 1
        except UserError:
            tensors = {}
            found["refused"] += 1
        for tensor in tensors.values():
            for part in getattr(tensor, "parts", (tensor,)):
                if type(part) is Tensor:
                    assert part.offset + math.prod(part.shape) * part.dtype.itemsize <= part.file.stat().st_size
        file.write_bytes(sound[file])
    assert found["refused"] > 50, found  # most: the checksums cover all but the container


def test_slices_of_whole_layers_are_written_as_slices_of_files_are(folder: Path, tmp_path: Path):
    """Model.save fetches whole layers, conversion reads slices."""
    checkpoint = meta.open_checkpoint(folder)
    params = to_transformers(loaded(checkpoint).params)
    for name, array in to_transformers(tiny_params(GQA)).items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)
    leaves = {path: np.asarray(leaf) for path, leaf in named(loaded(checkpoint).params).items()}

    def whole(path: str, layer: int | None, index: Any, dtype: Any) -> np.ndarray:
        return np.ascontiguousarray((leaves[path] if layer is None else leaves[path][layer])[index], dtype)

    (tmp_path / "saved").mkdir()
    put(tmp_path / "saved", meta.plan_files, ExportSpec(checkpoint.config, checkpoint.dtypes, whole, tensor_parallel=2))
    for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
