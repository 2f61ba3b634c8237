"""LoRA adapters: what PEFT saved computes what PEFT computes, and what camelid writes, PEFT loads."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import camelid
from camelid.checkpoint.adapters.added import with_adapters
from camelid.checkpoint.adapters.lora import AdaptedCheckpoint, Adapter, Pair, in_memory
from camelid.checkpoint.adapters.peft import adapter_files, on_base, open_adapter
from camelid.checkpoint.adapters.peft_config import read_settings
from camelid.checkpoint.files import write_files
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named
from families import FAMILIES
from runs import called
from tiny import save_hf, tiny_config, tiny_params, tiny_tokens, to_transformers, transformers_twin

# PEFT speaks of embedding tables that it saves, of heads that are tied, and of Hub names that it cannot look up.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

LLAMA, TIED = tiny_config(), tiny_config(tie_embeddings=True)
EVERY = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "two matrices of every layer": (LLAMA, {"target_modules": ["q_proj", "v_proj"]}),
    "every matrix, rank and alpha by pattern": (
        LLAMA,
        {"target_modules": EVERY, "rank_pattern": {r"layers\.1\..*q_proj": 5, "down_proj": 2}}
        | {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "up_proj": 1}},
    ),
    "rsLoRA, by a regular expression": (
        LLAMA,
        {"target_modules": r".*\.[02]\.mlp\.(up|down)_proj", "use_rslora": True, "rank_pattern": {"up_proj": 7}},
    ),
    "some layers": (LLAMA, {"target_modules": ["q_proj", "model.layers.3.mlp.up_proj"], "layers_to_transform": [1, 2]}),
    "all linear but one": (LLAMA, {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "the head and norms whole": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "the table and the head": (LLAMA, {"target_modules": ["o_proj", "embed_tokens", "lm_head"]}),
    "the table and the head whole": (
        LLAMA,
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "a tied head whole": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a tied table": (TIED, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, neither": (TIED, {"target_modules": ["q_proj"]}),
    "phi3, queries, keys and values in one": (
        FAMILIES["phi3, sliding window"].ours,
        {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]},
    ),
    "DoRA": (LLAMA, {"target_modules": ["q_proj", "o_proj", "down_proj", "lm_head"], "use_dora": True}),
    "phi3, queries, keys and values in one with DoRA": (
        FAMILIES["phi3, sliding window"].ours,
        {"target_modules": ["qkv_proj"], "use_dora": True},
    ),
    "phi, with biases": (FAMILIES["phi"].ours, {"target_modules": ["dense", "fc1"], "modules_to_save": ["lm_head"]}),
}
each = pytest.mark.parametrize("case", CASES)


def save_base(config: ModelConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    theirs = {"phi3": "phi3, sliding window", "phi": "phi"}.get(config.family or "")
    theirs = FAMILIES[theirs].theirs() if theirs else None
    return save_hf(transformers_twin(config, tiny_params(config), theirs).to(dtype), folder)


def with_adapter(base: Path, **settings: Any) -> peft.PeftModel:
    """PEFT's model of a base in its dtype, every number of the adapter drawn."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto", attn_implementation="eager")
    lora = peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | settings)
    model = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 5)
    return model


@pytest.fixture
def saved(case: str, tmp_path: Path) -> tuple[peft.PeftModel, Path]:
    """PEFT's model, and the folder that PEFT saved."""
    config, settings = CASES[case]
    model = with_adapter(save_base(replace(config, family=family_of(case)), tmp_path / "base"), **settings)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def family_of(case: str) -> str | None:
    return case.split(",")[0] if case.startswith("phi") else None


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def loaded_by_peft(base: Path, adapter: Path) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto", attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, adapter)
    found = load_file(adapter / "adapter_model.safetensors")
    lacks = peft.get_peft_model_state_dict(model).keys() ^ found.keys()
    assert not [name for name in lacks if "base_layer" not in name], lacks  # a table's own values, which it may lack
    return model.eval()


def write_adapter(folder: Path, adapter: Adapter) -> Path:
    folder.mkdir()
    write_files(folder, adapter_files(adapter))
    return folder


def read_adapter(folder: Path) -> Adapter:
    """An adapter on the base that it names."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return open_adapter(folder, read_model_config(folder / base))


# Reading --------------------------------------------------------------------------------


@each
def test_logits_are_those_that_peft_computes(saved: tuple[peft.PeftModel, Path]):
    theirs, folder = saved
    model = camelid.load(folder)
    tokens = tiny_tokens(model.config, 2, 9)
    # Four layers add up in another order; an adapter that is left out moves logits by 0.1 and more.
    np.testing.assert_allclose(np.asarray(model.logits(tokens)), logits_of(theirs, tokens), atol=1e-4)
    base = camelid.load(folder.parent / "base")
    assert np.abs(np.asarray(base.logits(tokens)) - logits_of(theirs, tokens)).max() > 0.1


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("a tied")])  # merged there, PEFT is not
def test_parameters_are_those_that_peft_merges(saved: tuple[peft.PeftModel, Path], case: str):
    theirs, folder = saved
    model = camelid.load(folder)
    ours = to_transformers(model.params, family_of(case) or "llama")
    merged = theirs.merge_and_unload().state_dict()
    for name, values in ours.items():
        expected = merged[name].numpy()
        found = values.reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=name)


def test_sums_in_bfloat16_are_rounded_once(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base", torch.bfloat16)
    theirs = with_adapter(base, target_modules=EVERY, modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path / "adapter")
    opened = open_checkpoint(tmp_path / "adapter")
    assert {dtype.name for dtype in opened.dtypes.values()} <= {"bfloat16", "float32"}
    adapter = read_adapter(tmp_path / "adapter")
    rounded, exact = (named(camelid.load(tmp_path / "adapter", dtype=d).params) for d in ("bfloat16", "float32"))
    before = named(camelid.load(base).params)
    pair = adapter.pairs["layers.attn.o_proj", 2]
    expected = np.asarray(before["layers.attn.o_proj"][2]).reshape(48, 60) + 4 * (pair.b @ pair.a)
    np.testing.assert_allclose(np.asarray(exact["layers.attn.o_proj"][2]).reshape(48, 60), expected, rtol=0, atol=1e-6)
    for path, values in exact.items():
        np.testing.assert_array_equal(np.asarray(rounded[path]), np.asarray(values.astype("bfloat16")), err_msg=path)
    merged = theirs.merge_and_unload().state_dict()
    for name, values in to_transformers(camelid.load(tmp_path / "adapter", dtype="bfloat16").params).items():
        theirs_of = merged[name].float().numpy()
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(theirs_of), 1e-30))) - 7)
        apart = np.abs(values.astype(np.float32).reshape(theirs_of.shape) - theirs_of)
        assert (apart <= ulp).all(), name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_slice_has_the_bits_of_the_whole(dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("camelid.checkpoint.adapters.lora.TILE", (16, 32))
    base = save_base(LLAMA, tmp_path / "base")
    with_adapter(base, target_modules=EVERY, r=8, use_dora=dora).save_pretrained(tmp_path / "adapter")
    opened = open_checkpoint(tmp_path / "adapter")
    draw = np.random.default_rng(0)
    for path in ("q_proj", "o_proj"):
        path = f"layers.attn.{path}"
        shape = opened.table.entries[path].spec.shape[1:]
        whole = opened.read_slice(path, 1, tuple(slice(0, n) for n in shape), np.dtype(np.float32))
        for _ in range(20):
            cuts = [sorted(draw.choice(n + 1, 2, replace=False)) for n in shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in cuts)
            np.testing.assert_array_equal(opened.read_slice(path, 1, index, np.dtype(np.float32)), whole[index])


def test_torchs_file_is_read_too(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    model = with_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not (tmp_path / "bin" / "adapter_model.safetensors").exists()
    one, two = (named(camelid.load(tmp_path / name).params) for name in ("adapter", "bin"))
    for path, values in one.items():
        np.testing.assert_array_equal(values, two[path], err_msg=path)


def test_an_adapter_is_converted_like_any_checkpoint(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    with_adapter(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    from camelid.checkpoint.compare import compare
    from camelid.checkpoint.convert import convert

    convert(tmp_path / "adapter", tmp_path / "merged")
    found = compare(open_checkpoint(f"peft::{tmp_path / 'adapter'}"), open_checkpoint(tmp_path / "merged"))
    assert all(difference.equal for difference in found)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()  # of the base: the adapter has none
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_adapters_are_added_with_weights(tmp_path: Path):
    """As PEFT's add_weighted_adapter and merge, whose sum of updates is that of the merged matrices."""
    base = save_base(LLAMA, tmp_path / "base")
    with_adapter(base, target_modules=["q_proj", "o_proj"]).save_pretrained(tmp_path / "one")
    with_adapter(base, target_modules=["q_proj"], r=5, use_rslora=True).save_pretrained(tmp_path / "two=2")
    result = called(
        *("convert", base, tmp_path / "sum", "--adapter", tmp_path / "one"),
        *("--adapter", f"{tmp_path / 'two=2'}=-0.25"),
    )
    assert result.returncode == 0, result.stderr
    before, one, two, found = (named(camelid.load(tmp_path / name).params) for name in ("base", "one", "two=2", "sum"))
    for path, values in before.items():
        expected = values + (one[path] - values) - 0.25 * (two[path] - values)
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-6, err_msg=path)
    opened = open_checkpoint(base)
    with_adapter(base, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path / "dora")
    with_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path / "whole")
    for requests, problem in (
        (["one=half"], "weight 'half'"),
        (["dora=0.5"], "DoRA adapter"),
        (["dora", "one"], "DoRA adapter"),
        (["whole=0.5"], "replaces lm_head of the base entirely, which has no weight 0.5"),
        (["whole", "whole"], "and so does"),
        (["nowhere"], "does not exist"),
        (["base"], "base has no adapter_config.json\n.*or of a run that trains one"),
    ):
        with pytest.raises(UserError, match=problem):
            with_adapters(opened, [str(tmp_path / request) for request in requests])
    with_adapters(opened, [str(tmp_path / "dora")])


def test_the_folder_of_a_run_is_the_adapter_that_it_trains(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    with_adapter(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "run" / "adapter")
    opened = open_checkpoint(base)
    one, other = (with_adapters(opened, [str(tmp_path / name)]) for name in ("run", "run/adapter"))
    assert isinstance(one, AdaptedCheckpoint)
    assert isinstance(other, AdaptedCheckpoint)
    assert one.adapter.pairs.keys() == other.adapter.pairs.keys()
    for key, pair in one.adapter.pairs.items():
        np.testing.assert_array_equal(pair.b, other.adapter.pairs[key].b)


def test_the_base_is_found_beside_the_adapter_or_by_its_path(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    folder = tmp_path / "adapters" / "one"
    with_adapter(base, target_modules=["q_proj"]).save_pretrained(folder)
    assert config_of(folder)["base_model_name_or_path"] == str(base)
    edit_config(folder, base_model_name_or_path="../../base")
    assert open_checkpoint(folder).config == LLAMA
    for name, problem in [
        ("../nowhere", "nowhere does not exist"),
        ("some-org/some-model", "offline mode"),
        (None, "does not name"),
    ]:
        edit_config(folder, base_model_name_or_path=name)
        with pytest.raises(UserError, match=problem):
            open_checkpoint(folder)


def test_the_revision_of_a_base_on_the_hub_is_kept(sound: Path, tmp_path: Path):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    edit_config(folder, base_model_name_or_path="some-org/some-model", revision="v2")
    adapter = open_adapter(folder, LLAMA)
    assert adapter.base == "some-org/some-model@v2"
    written = config_of(write_adapter(tmp_path / "written", adapter))
    assert (written["base_model_name_or_path"], written["revision"]) == ("some-org/some-model", "v2")


def test_more_tokens_come_with_the_table_and_the_head(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(101)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(model, replace(lora, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    ours = camelid.load(tmp_path / "adapter")
    assert ours.config.vocab_size == 101
    tokens = np.arange(90, 101)[None]
    np.testing.assert_allclose(np.asarray(ours.logits(tokens)), logits_of(model, tokens), atol=1e-4)
    edit(tmp_path / "adapter", lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
    with pytest.raises(
        UserError, match=r"lm_head\.modules_to_save\.weight, which is not a LoRA tensor"
    ):  # the two disagree
        open_checkpoint(tmp_path / "adapter")
    for copy in ("", "modules_to_save.", "original_module."):
        edit(tmp_path / "adapter", lambda tensors, copy=copy: tensors.pop(f"base_model.model.lm_head.{copy}weight"))
    edit_config(tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(
        UserError, match=r"embed_tokens\.weight has shape \(101, 48\), and that of the base has shape \(97, 48\)"
    ):
        open_checkpoint(tmp_path / "adapter")


def test_an_added_adapter_keeps_the_tokens_that_another_one_brought(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(101)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft.get_peft_model(model, replace(lora, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "more")
    with_adapter(base, target_modules=["o_proj"]).save_pretrained(tmp_path / "plain")
    opened, (more, plain) = open_checkpoint(base), (str(tmp_path / name) for name in ("more", "plain"))
    one, other = with_adapters(opened, [more, plain]), with_adapters(opened, [plain, more])
    assert one.config == other.config == replace(LLAMA, vocab_size=101)
    for path, part in one.table.entries.items():
        index = tuple(slice(0, n) for n in part.spec.shape[len(part.spec.stacked) :])
        for layer in part.layers():
            values = [held.read_slice(path, layer, index, np.dtype(np.float32)) for held in (one, other)]
            np.testing.assert_array_equal(*values, err_msg=path)


def test_a_table_that_the_adapter_holds_is_what_its_pair_is_added_to(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    with_adapter(base, target_modules=["q_proj", "embed_tokens"]).save_pretrained(tmp_path / "adapter")
    table = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(tmp_path / "adapter", lambda tensors: tensors[table].mul_(-2))
    tokens = tiny_tokens(LLAMA, 2, 9)
    theirs = logits_of(loaded_by_peft(base, tmp_path / "adapter"), tokens)
    np.testing.assert_allclose(np.asarray(camelid.load(tmp_path / "adapter").logits(tokens)), theirs, atol=1e-4)


def test_dora_of_an_embedding_table_is_refused(tmp_path: Path):
    """PEFT's magnitudes of a table belong to its columns."""
    base = save_base(LLAMA, tmp_path / "base")
    model = with_adapter(base, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"use_dora, and the adapter contains .*embed_tokens"):
        open_checkpoint(tmp_path / "adapter")


def test_real_adapter_configs_are_understood(assets: Path):
    files = sorted((assets / "hf_files" / "adapter_configs").glob("*.json"))
    assert len(files) >= 7
    for file in files:
        text = json.loads(file.read_text())
        settings = read_settings(text)
        assert (settings.rank, settings.alpha) == (text["r"], text["lora_alpha"])
        assert [name for name in text["target_modules"] if settings.targeted(f"model.layers.3.self_attn.{name}")]
        assert not settings.targeted("model.layers.3.self_attn.other_proj")


# Writing --------------------------------------------------------------------------------


@each
def test_what_was_read_is_written_with_the_bytes_of_peft(saved: tuple[peft.PeftModel, Path], tmp_path: Path):
    theirs, folder = saved
    written = write_adapter(tmp_path / "written", read_adapter(folder))
    tensors = "adapter_model.safetensors"
    assert (written / tensors).read_bytes() == (folder / tensors).read_bytes()
    tokens = tiny_tokens(read_model_config(tmp_path / "base"), 2, 9)
    again = loaded_by_peft(tmp_path / "base", written)
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(theirs, tokens))


def drawn(config: ModelConfig, places: list[tuple[str, int | None, int, float]], **fields: Any) -> Adapter:
    """An adapter as training has it: arrays, by place; each with a rank and an alpha."""
    draw, pairs = np.random.default_rng(1), {}
    specs = named(declare_decoder(replace(config, tie_embeddings=False)))
    for path, layer, rank, alpha in places:
        spec = specs[path]
        shape = spec.shape[len(spec.stacked) :]
        outputs, inputs = (int(np.prod(part)) for part in (shape[: len(spec.outputs)], shape[len(spec.outputs) :]))
        a, b = draw.standard_normal((rank, inputs), np.float32), draw.standard_normal((outputs, rank), np.float32)
        pairs[path, layer] = Pair(a / 5, b / 5, alpha)
    return Adapter(config, pairs, **fields)


ARRAYS: dict[str, tuple[str, list[tuple[str, int | None, int, float]], dict[str, Any]]] = {
    "layers of several ranks and alphas": (
        "llama",
        [("layers.attn.q_proj", 0, 2, 4.0), ("layers.attn.q_proj", 1, 3, 4.0), ("layers.attn.q_proj", 2, 2, 1.5)]
        + [("layers.mlp.down_proj", layer, 4, 8.0) for layer in range(4)],
        {"rslora": True},
    ),
    "the table and the head": ("llama", [("embed", None, 2, 4.0), ("lm_head", None, 3, 6.0)], {}),
    "keys alone of phi3's one tensor": ("phi3", [("layers.attn.k_proj", 1, 2, 4.0)], {}),
    "queries and values of phi3's one tensor": (
        "phi3",
        [("layers.attn.q_proj", 1, 2, 4.0), ("layers.attn.v_proj", 1, 3, 9.0), ("layers.mlp.up_proj", 0, 2, 4.0)],
        {"rslora": True},
    ),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_become_an_adapter_that_peft_loads(tmp_path: Path, case: str):
    family, places, fields = ARRAYS[case]
    config = LLAMA if family == "llama" else replace(FAMILIES["phi3, sliding window"].ours, family=family)
    base = save_base(config, tmp_path / "base")
    adapter = drawn(config, places, base=str(base), **fields)
    theirs = loaded_by_peft(base, write_adapter(tmp_path / "adapter", adapter))
    tokens = tiny_tokens(config, 2, 9)
    expected = logits_of(theirs, tokens)
    assert np.abs(logits_of(theirs.get_base_model(), tokens) - expected).max() < 1e-6
    ours = np.asarray(camelid.load(tmp_path / "adapter").logits(tokens))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    given = on_base(adapter, open_checkpoint(base), base)
    opened = open_checkpoint(tmp_path / "adapter")
    for path, part in opened.table.entries.items():
        index = tuple(slice(0, n) for n in part.spec.shape[len(part.spec.stacked) :])
        for layer in part.layers():
            one, two = (held.read_slice(path, layer, index, np.dtype(np.float32)) for held in (given, opened))
            np.testing.assert_allclose(one, two, atol=1e-6, err_msg=path)


def test_arrays_take_the_place_of_parameters(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    norm = np.linspace(0.5, 2, 48, dtype=np.float32)
    head = np.random.default_rng(3).standard_normal((97, 48), np.float32)
    saved = {
        ("layers.mlp_norm.scale", 2): in_memory(norm),
        ("final_norm.scale", None): in_memory(norm),
        ("lm_head", None): in_memory(head),
    }
    adapter = drawn(LLAMA, [("layers.attn.o_proj", 3, 2, 4.0)], saved=saved, base=str(base))
    theirs = loaded_by_peft(base, write_adapter(tmp_path / "adapter", adapter))
    assert config_of(tmp_path / "adapter")["modules_to_save"] == [
        "lm_head",
        "model.layers.2.post_attention_layernorm",
        "model.norm",
    ]
    tokens = tiny_tokens(LLAMA, 2, 9)
    ours = np.asarray(camelid.load(tmp_path / "adapter").logits(tokens))
    np.testing.assert_allclose(ours, logits_of(theirs, tokens), atol=1e-4)


# What is refused ------------------------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | fields))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    base = save_base(LLAMA, folder / "base")
    with_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(folder / "adapter")
    return folder / "adapter"


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "AdaLoRA": ({"peft_type": "ADALORA"}, "peft_type = 'ADALORA'"),
    "DoRA without magnitudes": (
        {"use_dora": True},
        r"lora_B.weight; DoRA has .*magnitude_vector",
    ),
    "biases": ({"bias": "lora_only"}, "bias = 'lora_only'"),
    "its own biases": ({"lora_bias": True}, "lora_bias = True"),
    "layers that are repeated": ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
    "an unknown field": ({"use_moonshine": True}, "unknown fields: use_moonshine = True"),
    "no rank": ({"r": None}, "has no r"),
    "a rank of zero": ({"r": 0}, "r = 0"),
    "a rank that is a text": ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern"),
    "another rank": ({"r": 4}, r"lora_A.weight has shape \(3, 48\); with rank 4, the base requires \(4, 48\)"),
    "another rank by pattern": ({"rank_pattern": {"q_proj": 2}}, r"with rank 2, the base requires \(2, 48\)"),
    "an endless alpha": ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
    "no targets": ({"target_modules": None}, "has no target_modules"),
    "a broken expression": ({"target_modules": "q_proj("}, "not a regular expression"),
    "more targets": ({"target_modules": ["q_proj", "v_proj"]}, r"lacks .*layers\.0\.self_attn\.v_proj\.lora_A"),
    "fewer targets": ({"layers_to_transform": [0, 1, 2]}, r"contains .*layers\.3\.self_attn\.q_proj, which"),
    "more that is whole": ({"modules_to_save": ["lm_head", "norm"]}, "lacks .*, which modules_to_save requires"),
    "what the base has not": ({"modules_to_save": ["lm_head", "score"]}, "no such module"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_ask_for_something_else_are_refused(sound: Path, tmp_path: Path, case: str):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    fields, problem = SETTINGS[case]
    edit_config(folder, **fields)
    with pytest.raises(UserError, match=problem):
        open_checkpoint(folder)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "half a pair": (lambda t: t.pop(f"{Q}B.weight"), r"layers\.1\.self_attn\.q_proj has lora_A\.weight; LoRA has"),
    "a pair less": (lambda t: (t.pop(f"{Q}B.weight"), t.pop(f"{Q}A.weight")), r"lacks .*layers\.1\.self_attn\.q_proj"),
    "another width": (lambda t: t.update({f"{Q}A.weight": torch.zeros(3, 47)}), r"\(3, 47\); with rank 3.* \(3, 48\)"),
    "a vector": (lambda t: t.update({f"{Q}B.weight": torch.zeros(60)}), r"shape \(60,\)"),
    "a magnitude": (
        lambda t: t.update({f"{Q}magnitude_vector": torch.zeros(60)}),
        r"has .*lora_magnitude_vector; LoRA has",
    ),
    "the adapter's name": (
        lambda t: t.update({f"{Q}A.default.weight": t.pop(f"{Q}A.weight")}),
        "which is not a LoRA tensor",
    ),
    "a fifth layer": (
        lambda t: t.update({f"{Q}A.weight".replace(".1.", ".4."): torch.zeros(3, 48)}),
        r"layers\.4\.self_attn\.q_proj\.lora_A\.weight, which is not a LoRA tensor of this model",
    ),
    "another vocabulary": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(98, 48)}),
        r"lm_head\.weight has shape \(98, 48\), and that of the base has shape \(97, 48\)",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_tensors_that_do_not_belong_together_are_refused(sound: Path, tmp_path: Path, case: str):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    change, problem = DAMAGE[case]
    edit(folder, change)
    with pytest.raises(UserError, match=problem):
        open_checkpoint(folder)


def test_damaged_and_incomplete_folders_are_refused(sound: Path, tmp_path: Path):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        open_checkpoint(folder)
    file.unlink()
    with pytest.raises(UserError, match=re.escape("neither adapter_model.safetensors nor adapter_model.bin")):
        open_checkpoint(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_checkpoint(folder)
    with pytest.raises(UserError, match="is an adapter, whose model is that of its base"):
        open_checkpoint(sound, config=LLAMA)


# A quantized base -------------------------------------------------------------------------


def test_an_adapter_is_added_to_the_values_of_a_quantized_base(assets: Path, tmp_path: Path):
    draw, path, gguf = np.random.default_rng(0), "layers.attn.o_proj", tmp_path / "base.gguf"
    original = assets / "models" / "stories260K" / "hf"
    assert called("convert", original, gguf, "--to", "gguf-q8_0").returncode == 0
    pair = Pair(draw.standard_normal((2, 64), np.float32), draw.standard_normal((64, 2), np.float32), 4.0)
    adapter = write_adapter(tmp_path / "adapter", Adapter(read_model_config(original), {(path, 1): pair}))
    done = called("convert", gguf, tmp_path / "merged", "--adapter", adapter)
    assert done.returncode == 0, done.stderr
    assert "are quantized (q8_0); they are read as float32" in done.stderr
    index = (slice(0, 64), slice(0, 8), slice(0, 8))
    before, exact, after = (
        open_checkpoint(place).read_slice(path, 1, index, np.dtype(np.float32)).reshape(64, 64)
        for place in (gguf, original, tmp_path / "merged")
    )
    assert 0 < np.abs(before - exact).max() < 0.02 * np.abs(exact).max()
    np.testing.assert_allclose(after, before + 2 * pair.b @ pair.a, rtol=0, atol=1e-5)


def test_a_base_of_quantized_weights_that_are_not_read_is_refused_with_the_way_out(tmp_path: Path):
    base = save_base(LLAMA, tmp_path / "base")
    pair = Pair(np.ones((1, 60), np.float32), np.ones((48, 1), np.float32), 1.0)
    adapter = write_adapter(tmp_path / "adapter", Adapter(LLAMA, {("layers.attn.o_proj", 1): pair}))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    refused = called("convert", base, tmp_path / "merged", "--adapter", adapter)
    assert refused.returncode == 2
    message = " ".join(refused.stderr.split())
    assert "quantization_config = {'quant_method': 'bitsandbytes'" in message
    assert "use the model that was quantized, also as the base of an adapter" in message
    ignoring = ("--ignore-config-field", "quantization_config")  # the weights are not quantized, as the advice says
    assert called("convert", base, tmp_path / "merged", "--adapter", adapter, *ignoring).returncode == 0
