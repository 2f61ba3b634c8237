"""Which files and names of a Hugging Face folder are read: as transformers reads the same folder."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import camelid
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from camelid.model.params import named
from runs import called, tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, to_transformers, transformers_twin

Tensors = dict[str, torch.Tensor]
CONFIG = tiny_config(num_layers=2)
TIED = tiny_config(num_layers=2, tie_embeddings=True)
NORM, EMBED, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """What transformers wrote, untied and tied."""
    root = tmp_path_factory.mktemp("made")
    return {
        config.tie_embeddings: save_hf(
            transformers_twin(config, tiny_params(config)), root / str(config.tie_embeddings)
        )
        for config in (CONFIG, TIED)
    }


@pytest.fixture
def tensors(made: dict[bool, Path]) -> Tensors:
    return load_file(made[False] / "model.safetensors")


@pytest.fixture
def folder(made: dict[bool, Path], tmp_path: Path) -> Path:
    """A folder with config.json and no weights yet."""
    return described(made[False], tmp_path / "model")


def described(source: Path, folder: Path, **changes: object) -> Path:
    folder.mkdir()
    table = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in table.items() if value is not ...}))
    return folder


def save(tensors: Tensors, path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def save_index(folder: Path, single: str, weight_map: Mapping[Any, str]) -> None:
    (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def scaled(tensors: Tensors, factor: float) -> Tensors:
    return {name: tensor * factor for name, tensor in tensors.items()}


def in_transformers(folder: Path) -> dict[str, np.ndarray]:
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = found
    assert not report["missing_keys"], report
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


def assert_same_parameters(ours: camelid.Model, theirs: dict[str, np.ndarray]) -> None:
    for name, array in to_transformers(ours.params).items():
        np.testing.assert_array_equal(array.reshape(theirs[name].shape), theirs[name], err_msg=name)


# Which file -----------------------------------------------------------------------------


def write_whole(folder: Path, name: str, tensors: Tensors) -> None:
    save(tensors, folder / name)


def write_shards(folder: Path, name: str, tensors: Tensors) -> None:
    stem, suffix = name.rsplit(".", 1)
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {tensor: files[i % 2] for i, tensor in enumerate(tensors)}
    for file in files:
        save({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    save_index(folder, name, weight_map)


FORMS = [(write, name) for name in ("model.safetensors", "pytorch_model.bin") for write in (write_whole, write_shards)]


@pytest.mark.parametrize("bits", range(1, 16))
def test_of_several_forms_the_one_that_transformers_reads_is_read_and_the_others_are_named(
    folder: Path, tensors: Tensors, bits: int
):
    for i, (write, name) in enumerate(FORMS):
        if bits >> i & 1:
            write(folder, name, scaled(tensors, i + 1))
    model = camelid.load(folder)
    assert_same_parameters(model, in_transformers(folder))
    assert len(model.notes) == (bits.bit_count() > 1)
    assert all("not read: " in note for note in model.notes)


def test_a_stale_index_whose_parts_are_gone_does_not_matter_beside_the_whole_file(folder: Path, tensors: Tensors):
    save(tensors, folder / "model.safetensors")
    save_index(folder, "model.safetensors", dict.fromkeys(tensors, FIRST))
    model = camelid.load(folder)
    assert_same_parameters(model, in_transformers(folder))
    assert model.notes == (
        "the parameters are read from model.safetensors; these files are not read: model.safetensors.index.json",
    )
    told = called("inspect", folder)
    assert "note: the parameters are read from model.safetensors; these files are not read" in told.stderr


def test_an_index_alone_whose_parts_are_gone_is_refused_by_their_names(folder: Path, tensors: Tensors):
    save_index(folder, "model.safetensors", dict.fromkeys(tensors, FIRST) | {NORM: SECOND})
    save(tensors, folder / FIRST)
    save(tensors, folder / "pytorch_model.bin")  # which transformers does not take either
    with pytest.raises(UserError, match=f"names {SECOND}, which is not in the folder\nDownload.*remove the index"):
        camelid.load(folder)
    with pytest.raises(OSError, match=SECOND):
        in_transformers(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "pytorch_model.fp16.bin",
        "model-00003-of-00003.safetensors",
        "flax_model.msgpack",
        "tf_model.h5",
    ],
)
def test_files_of_weights_that_are_not_read_are_named_and_other_files_are_not(
    folder: Path, tensors: Tensors, name: str
):
    save(tensors, folder / "model.safetensors")
    for other in (name, "training_args.bin", "optimizer.pt", "scheduler.pt", "tokenizer.json"):
        (folder / other).write_bytes(b"x")
    assert open_checkpoint(f"hf::{folder}").notes == (
        f"the parameters are read from model.safetensors; these files are not read: {name}",
    )


def test_a_folder_of_other_weights_alone_is_refused_with_their_names(folder: Path, tensors: Tensors):
    save(tensors, folder / "model.fp16.safetensors")
    with pytest.raises(
        UserError, match=r"neither model\.safetensors nor .*; it contains model\.fp16\.safetensors\nRename"
    ):
        camelid.load(folder)


# An index -----------------------------------------------------------------------------


def test_of_two_copies_the_one_that_the_index_names_is_read_and_a_note_says_what_transformers_reads(
    folder: Path, tensors: Tensors
):
    save(tensors, folder / FIRST)
    save({NORM: tensors[NORM] * 2, EMBED: tensors[EMBED], HEAD: tensors[HEAD]}, folder / SECOND)
    save_index(folder, "model.safetensors", dict.fromkeys(tensors, FIRST) | {HEAD: SECOND})
    model = camelid.load(folder)
    np.testing.assert_array_equal(model.params.final_norm.scale, tensors[NORM])
    np.testing.assert_array_equal(in_transformers(folder)[NORM], 2 * tensors[NORM])
    assert model.notes == (
        f"{NORM}: several files contain different values; the file in the index is used ({FIRST}), "
        f"whereas transformers uses the last file ({SECOND})",
    )
    # As transformers reads it where the index names the last.
    save_index(folder, "model.safetensors", dict.fromkeys(tensors, FIRST) | {NORM: SECOND})
    model = camelid.load(folder)
    assert_same_parameters(model, in_transformers(folder))
    assert "transformers" not in model.notes[0]


@pytest.mark.parametrize("tied", [False, True])
def test_an_index_may_list_what_no_part_holds_and_leave_out_what_one_does(
    made: dict[bool, Path], tmp_path: Path, tied: bool
):
    folder, tensors = described(made[tied], tmp_path / "model"), load_file(made[tied] / "model.safetensors")
    save(tensors, folder / FIRST)
    listed = dict.fromkeys([*tensors, ROTARY, *([HEAD] if tied else [])], FIRST)
    save_index(folder, "model.safetensors", listed)
    model = camelid.load(folder)
    assert_same_parameters(model, in_transformers(folder))
    assert model.notes == ()
    save_index(folder, "model.safetensors", {**listed, "model.layers.0.mlp.gate_proj.bias": FIRST, NORM: FIRST})
    assert camelid.load(folder).notes == (
        "model.safetensors.index.json lists model.layers.0.mlp.gate_proj.bias, which none of its files contains",
    )
    save_index(folder, "model.safetensors", {name: file for name, file in listed.items() if name != NORM})
    model = camelid.load(folder)
    assert_same_parameters(model, in_transformers(folder))
    assert f"does not list {NORM}" in model.notes[0]


def test_what_an_index_lists_and_the_model_needs_must_be_there(folder: Path, tensors: Tensors):
    save({name: tensor for name, tensor in tensors.items() if name != HEAD}, folder / FIRST)
    save_index(folder, "model.safetensors", dict.fromkeys(tensors, FIRST))
    with pytest.raises(UserError, match=rf"lacks {re.escape(HEAD)}"):
        camelid.load(folder)


# Names -----------------------------------------------------------------------------


def outside(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def inside(word: str) -> Callable[[str], str]:
    return lambda name: re.sub(r"(layers\.\d+\.)", rf"\1{word}.", name)


WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": outside("_orig_mod."),
    "DDP": outside("module."),
    "compiled in DDP": outside("module._orig_mod."),
    "PEFT": outside("base_model.model."),
    "an attribute": outside("model."),
    "a student": outside("student.network."),
    "DeepSpeed in Fabric": outside("_forward_module.module."),
    "compiled layers": inside("_orig_mod"),
    "FSDP": lambda name: inside("_fsdp_wrapped_module")("_fsdp_wrapped_module." + name),
    "checkpointed layers": inside("_checkpoint_wrapped_module"),
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_names_that_a_wrapper_left_are_read_and_said(
    made: dict[bool, Path], folder: Path, tensors: Tensors, tmp_path: Path, rename: Callable[[str], str], file: str
):
    save({rename(name): tensor for name, tensor in (tensors | {ROTARY: torch.ones(5)}).items()}, folder / file)
    model = camelid.load(folder)
    assert_same_parameters(model, {name: tensor.numpy() for name, tensor in tensors.items()})
    assert len(model.notes) == 1
    assert re.fullmatch(r"the names of tensors are read without '.*\.', which a wrapper inserted", model.notes[0])
    model.save(tmp_path / "saved")
    assert tensor_bytes(tmp_path / "saved") == tensor_bytes(made[False])


def test_a_model_that_was_saved_without_its_head_is_read_as_transformers_reads_it(
    made: dict[bool, Path], tmp_path: Path
):
    folder = described(made[True], tmp_path / "model")
    bare = {n.removeprefix("model."): t for n, t in load_file(made[True] / "model.safetensors").items()}
    for prefix in ("", "module."):
        save({prefix + name: tensor for name, tensor in bare.items()}, folder / "model.safetensors")
        model = camelid.load(folder)
        assert "with the prefix 'model.'" in model.notes[0]
        np.testing.assert_array_equal(model.params.embed, bare["embed_tokens.weight"])
    save(bare, folder / "model.safetensors")
    assert_same_parameters(camelid.load(folder), in_transformers(folder))


@pytest.mark.parametrize(
    ("change", "named_there"),
    [
        (lambda t: {"student." + n: v for n, v in t.items()} | {"teacher." + n: v for n, v in t.items()}, "student."),
        (lambda t: {n: v for n, v in t.items() if n != NORM} | {"model.final_norm.weight": t[NORM]}, "final_norm"),
        (lambda t: {n.replace(".weight", ".w"): v for n, v in t.items()}, "lm_head.w"),
    ],
    ids=["two models", "another name", "other names"],
)
def test_what_a_file_holds_instead_of_what_it_lacks_is_named(
    folder: Path, tensors: Tensors, change: Callable[[Tensors], Tensors], named_there: str
):
    save(change(tensors), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"the checkpoint lacks .*; instead it holds .*{re.escape(named_there)}"):
        camelid.load(folder)


def test_tensors_of_another_head_are_refused_by_name_behind_a_wrapper_too(folder: Path, tensors: Tensors):
    wrapped = {"pretrained_model." + name: tensor for name, tensor in tensors.items()}
    save(wrapped | {"v_head.summary.weight": torch.ones(1, 48)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no place for: v_head\.summary\.weight"):
        camelid.load(folder)


# Tied heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keeps", [EMBED, HEAD])
def test_a_tied_model_may_keep_either_name(made: dict[bool, Path], tmp_path: Path, keeps: str, file: str):
    folder, tensors = described(made[True], tmp_path / "model"), load_file(made[True] / "model.safetensors")
    tensors[keeps] = tensors.pop(EMBED)
    save(tensors, folder / file)
    model = camelid.load(folder)
    assert_same_parameters(model, in_transformers(folder))
    assert model.notes == ()
    model.save(tmp_path / "saved")
    assert tensor_bytes(tmp_path / "saved") == tensor_bytes(made[True])


@pytest.mark.parametrize("keeps", [EMBED, HEAD])
def test_where_nothing_is_said_of_ties_a_model_with_one_table_is_tied(
    made: dict[bool, Path], tmp_path: Path, keeps: str
):
    folder = described(made[True], tmp_path / "model", tie_word_embeddings=...)
    tensors = load_file(made[True] / "model.safetensors")
    tensors[keeps] = tensors.pop(EMBED)
    save(tensors, folder / "model.safetensors")
    model = camelid.load(folder)
    assert model.config.tie_embeddings
    assert "the head is assumed to be tied" in model.notes[0]
    model.save(tmp_path / "saved")
    assert_same_parameters(model, in_transformers(tmp_path / "saved"))


def test_where_ties_are_denied_a_missing_head_is_an_error(made: dict[bool, Path], tmp_path: Path):
    folder = described(made[True], tmp_path / "model", tie_word_embeddings=False)
    save(load_file(made[True] / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"lacks {re.escape(HEAD)}"):
        camelid.load(folder)


def test_a_head_that_differs_is_used_where_nothing_is_said_of_ties_or_the_field_is_ignored(tmp_path: Path):
    config = transformers.Gemma2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    held = load_file(tmp_path / "gemma" / "model.safetensors")
    assert not torch.equal(held[HEAD], held[EMBED])
    for said in (..., True):
        folder = described(tmp_path / "gemma", tmp_path / str(said), tie_word_embeddings=said)
        save(held, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"differs from it\n.*--ignore-config-field tie_word_embeddings"):
        camelid.load(tmp_path / "True")
    for model in (
        camelid.load(folder := tmp_path / "Ellipsis"),
        camelid.load(tmp_path / "True", ignore=["tie_word_embeddings"]),
    ):
        assert not model.config.tie_embeddings
        np.testing.assert_array_equal(named(model.params)["lm_head"], held[HEAD])
        assert any("lm_head.weight differs from the embedding table" in note for note in model.notes)
    np.testing.assert_array_equal(in_transformers(folder)[HEAD], held[HEAD])
