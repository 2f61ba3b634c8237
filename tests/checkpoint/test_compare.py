"""Two checkpoints side by side: what `camelid diff` and `camelid convert --verify` say."""

import dataclasses
import json
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import camelid
from camelid.checkpoint.compare import compare, summarize_parameters, verify_embedded_checksums
from camelid.checkpoint.containers import mindspore_file, torch_files
from camelid.checkpoint.convert import convert
from camelid.checkpoint.files import MANIFEST
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.cli.shared import model_config
from camelid.errors import UserError
from camelid.evaluate.parity import mean_loss, streamed_logits
from camelid.model.presets import preset
from runs import assert_refused, called
from tiny import LLAMA3, save_hf, tiny_config, tiny_params, transformers_twin


def saved(folder: Path, **fields: Any) -> Path:
    config = tiny_config(**fields)
    return save_hf(transformers_twin(config, tiny_params(config)), folder)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")


def test_one_changed_number_is_found_in_the_parameter_that_has_it(model: Path, tmp_path: Path):
    convert(model, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] += np.float32(0.5)
    save_file(tensors, file, metadata={"format": "pt"})
    found = {each.path: each for each in compare(open_checkpoint(model), open_checkpoint(tmp_path / "other"))}
    assert [path for path, each in found.items() if not each.equal] == ["layers.mlp.up_proj"]
    assert found["layers.mlp.up_proj"].largest == pytest.approx(0.5, rel=1e-5)
    assert not found["layers.mlp.up_proj"].rounded
    done = called("diff", model, tmp_path / "other")
    assert done.returncode == 1
    assert "layers.mlp.up_proj: float32 and float32, maximum absolute difference 0.5" in done.stdout
    assert done.stdout.endswith("11 of 12 parameters are equal\n")


def test_rounding_is_told_from_change(model: Path, tmp_path: Path):
    convert(model, tmp_path / "rounded", dtype="bfloat16")
    found = list(compare(open_checkpoint(model), open_checkpoint(tmp_path / "rounded")))
    assert all(each.rounded and not each.equal and 0 < each.largest < 0.02 for each in found)
    assert {each.dtypes for each in found} == {("float32", "bfloat16")}
    convert(tmp_path / "rounded", tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    with file.open("r+b") as opened:  # the last byte of the last tensor
        opened.seek(-1, 2)
        opened.write(b"@")
    for pair, count in (((model, "rounded"), 12), (("rounded", model), 12), ((model, "changed"), 11)):
        done = called("diff", *(tmp_path / each for each in pair))
        last = done.stdout.splitlines()[-1]
        assert last == f"0 of 12 parameters are equal; {count} more are equal after rounding to bfloat16"


def test_equal_checkpoints_differ_in_nothing(model: Path, tmp_path: Path):
    assert called("convert", model, tmp_path / "same", "--verify").stderr.splitlines()[-2:] == [
        "all tensors are equal",
        "logits of 64 tokens, up to 4.66: maximum absolute difference 0; 100% of the most likely tokens agree",
    ]
    done = called("diff", model, tmp_path / "same", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["config"] == {}
    assert all(each["equal"] for each in report["parameters"])


def test_other_fields_are_differences_and_other_shapes_another_model(model: Path, tmp_path: Path):
    theta = saved(tmp_path / "theta", rope_theta=500.0)
    done = called("diff", model, theta)
    assert done.returncode == 1
    assert "rope_theta: 10000.0 and 500.0" in done.stdout
    with pytest.raises(
        UserError, match=r"layers\.mlp\.gate_proj is \(4, 80, 48\) in one and \(4, 96, 48\) in the other"
    ):
        list(compare(open_checkpoint(model), open_checkpoint(saved(tmp_path / "wide", mlp_dim=96))))
    with pytest.raises(UserError, match="only one of the two has lm_head"):
        list(compare(open_checkpoint(model), open_checkpoint(saved(tmp_path / "tied", tie_embeddings=True))))


def test_models_of_other_shapes_are_told_apart_parameter_by_parameter(model: Path, tmp_path: Path):
    other = saved(tmp_path / "other", mlp_dim=96, tie_embeddings=True, rope_theta=500.0)
    done = called("diff", model, other)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "mlp_dim: 80 and 96",
        "rope_theta: 10000.0 and 500.0",
        "tie_embeddings: False and True",
        "layers.mlp.gate_proj: (4, 80, 48) and (4, 96, 48)",
        "layers.mlp.up_proj: (4, 80, 48) and (4, 96, 48)",
        "layers.mlp.down_proj: (4, 48, 80) and (4, 48, 96)",
        f"lm_head: only in {model}",
    ]
    done = called("diff", other, model, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["config"]["mlp_dim"] == [96, 80]
    assert report["shapes"]["layers.mlp.up_proj"] == [[4, 96, 48], [4, 80, 48]]
    assert report["shapes"]["lm_head"] == [None, [97, 48]]
    assert (len(report["shapes"]), report["parameters"]) == (4, [])


def strict_json(text: str) -> dict:
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.filterwarnings("error")
def test_what_json_has_no_words_for_is_said_in_others(model: Path, tmp_path: Path):
    stretched = saved(tmp_path / "stretched", rope_scaling=LLAMA3)
    file = stretched / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = np.inf
    tensors["model.norm.weight"][0] = np.nan
    tensors["lm_head.weight"][0, 0] = 1e30
    save_file(tensors, file, metadata={"format": "pt"})
    report = strict_json(called("diff", model, stretched, "--json").stdout)
    assert report["config"]["rope_scaling"] == [None, dataclasses.asdict(LLAMA3)]
    held = {each["path"]: each for each in report["parameters"] if not each["equal"]}
    assert {path: each["largest"] for path, each in held.items()} == {
        "layers.mlp.up_proj": None,
        "final_norm.scale": None,
        "lm_head": pytest.approx(1e30),
    }
    same = shutil.copytree(stretched, tmp_path / "same")
    report = strict_json(called("diff", stretched, same, "--json").stdout)
    assert {(each["largest"], each["equal"], each["rounded"]) for each in report["parameters"]} == {(0.0, True, True)}


@pytest.mark.filterwarnings("error")
def test_numbers_that_a_dtype_cannot_hold_are_compared_without_a_word(model: Path, tmp_path: Path):
    convert(model, tmp_path / "half", dtype="float16")
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:2] = [1e30, np.inf]
    save_file(tensors, file, metadata={"format": "pt"})
    found = {each.path: each for each in compare(open_checkpoint(model), open_checkpoint(tmp_path / "half"))}
    assert {path for path, each in found.items() if not each.rounded} == {"final_norm.scale"}
    assert found["final_norm.scale"].largest == np.inf


def test_diff_is_told_what_files_do_not_say(stories: Path, tmp_path: Path):
    convert(stories, tmp_path / "ours", to="mindspore")
    (tmp_path / "ours" / "config.json").unlink()
    assert_refused(called("diff", stories, tmp_path / "ours"), "does not describe its model")
    for described in (stories, stories / "config.json"):
        done = called("diff", stories, tmp_path / "ours", "--config", described)
        assert (done.returncode, done.stdout) == (0, "11 of 11 parameters are equal\n")


@pytest.mark.parametrize("given", ["nowhere.json", "nowhere/config.json", "nowhere/model", "empty"])
def test_a_config_that_is_not_there_is_named_by_its_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    place = "empty/config.json" if given == "empty" else given
    assert_refused(called("diff", model, model, "--config", given), f"{place} does not exist")


def test_a_preset_is_one_beside_a_folder_of_its_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama_7b").mkdir()
    assert model_config("llama_7b") == preset("llama_7b")
    with pytest.raises(UserError, match="there is no preset 'llama_9b'"):
        model_config("llama_9b")


# convert --verify, --check, --rope-layout --------------------------------------------------


def test_verify_tells_what_was_rounded_and_what_only_config_json_says(stories: Path, tmp_path: Path):
    told = called("convert", stories, tmp_path / "meta", "--to", "meta", "--dtype", "bfloat16", "--verify").stderr
    assert "warning: tensors were rounded; the maximum absolute difference is 0.0" in told
    assert "logits of 64 tokens" in told
    assert "note: files of the format meta do not contain context_length = 512, tie_embeddings = True" in told
    told = called("convert", stories, tmp_path / "easylm", "--to", "easylm", "--verify").stderr
    assert "all tensors are equal" in told
    assert "note: files of the format easylm do not describe their model; keep config.json in the same folder" in told


def test_the_streamed_logits_are_those_of_the_whole_model(stories: Path):
    checkpoint, tokens = open_checkpoint(stories), np.arange(40) * 7 % 512
    whole = np.asarray(camelid.load(stories).logits(tokens[None]))[0]
    streamed = streamed_logits(checkpoint, tokens)
    np.testing.assert_allclose(streamed, whole, atol=1e-5 * np.abs(whole).max())
    log_probs = torch.log_softmax(torch.tensor(whole[:-1]), -1)
    expected = -log_probs[np.arange(39), tokens[1:]].mean()
    assert mean_loss(checkpoint, tokens) == pytest.approx(float(expected), rel=1e-5)


def test_check_reads_everything_and_writes_nothing(model: Path, tmp_path: Path):
    before = {file.name for file in tmp_path.iterdir()}
    done = called("convert", model, "--check")
    assert done.returncode == 0
    size = sum(each.size for each in summarize_parameters(open_checkpoint(model)))
    assert done.stdout.splitlines() == [f"hf: {size:,} parameters in float32", "checksums: none found"]
    assert {file.name for file in tmp_path.iterdir()} == before
    convert(model, tmp_path / "ours")
    assert called("convert", tmp_path / "ours", "--check").stdout.splitlines()[1].endswith("tensors match")
    convert(saved(tmp_path / "narrow", head_dim=8), tmp_path / "meta", to="meta")
    said = called("convert", tmp_path / "meta", "--check").stdout.splitlines()
    assert said[2:] == ["checksums: those embedded in consolidated.00.pth match"]


def test_check_reads_the_checkpoints_of_a_run(tmp_path: Path):
    config = tiny_config(head_dim=8)
    params = tiny_params(config)
    save_hf(transformers_twin(config, params), tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "run" / "recipe.toml").write_text("")
    checkpoints = RunCheckpoints(tmp_path / "run" / "checkpoints", keep=1)
    checkpoints.save(3, {"params": params, "opt_state": [{"mu": params, "nu": params}]})
    checkpoints.wait()
    checkpoints.close()
    done = called("convert", tmp_path / "run", "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "checksums: those embedded in checkpoints/3 match"


def test_check_names_files_from_their_folder_and_counts_the_rest(tmp_path: Path):
    convert(saved(tmp_path / "model", head_dim=8), tmp_path / "ours", to="megatron", pipeline_parallel=4)
    said = called("convert", tmp_path / "ours", "--check").stdout.splitlines()[-1]
    names = [f"iter_0000001/mp_rank_00_{stage:03}/model_optim_rng.pt" for stage in range(3)]
    assert said == f"checksums: those embedded in {', '.join(names)} and 1 more match"


def test_check_tells_of_a_zip_whose_unread_parts_are_damaged(tmp_path: Path):
    convert(saved(tmp_path / "model", head_dim=8), tmp_path / "ours", to="meta")
    file = tmp_path / "ours" / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        at = archive.getinfo("consolidated.00/version").header_offset
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    assert_refused(called("convert", tmp_path / "ours", "--check"), f"{file} does not match its checksums")


def test_check_finds_one_changed_bit_by_its_checksum(model: Path, tmp_path: Path):
    convert(model, tmp_path / "ours", shards=2)
    file = tmp_path / "ours" / "model-00002-of-00002.safetensors"
    held = json.loads((tmp_path / "ours" / MANIFEST).read_text())["files"][file.name]["tensors"]
    content = bytearray(file.read_bytes())
    content[held["model.layers.3.mlp.up_proj.weight"]["offset"] + 5] ^= 1
    file.write_bytes(content)
    assert_refused(called("convert", tmp_path / "ours", "--check"), f"model.layers.3.mlp.up_proj.weight in {file}")


@pytest.mark.parametrize(("to", "name"), [("meta", "consolidated.00.pth"), ("mindspore", "model.ckpt")])
def test_check_verifies_what_files_say_of_themselves_however_large_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, name: str
):
    for module in (torch_files, mindspore_file):
        monkeypatch.setattr(module, "CRC_BYTES", 1000)
    convert(saved(tmp_path / "model", head_dim=8), tmp_path / "ours", to=to)
    file = tmp_path / "ours" / name
    if to == "mindspore":  # whose writer leaves it out, as MindSpore's does
        content = file.read_bytes()
        file.write_bytes(content + b"crc_num" + zlib.crc32(content).to_bytes(10, "big"))
    checkpoint = open_checkpoint(tmp_path / "ours")
    assert any("is larger than 1 GiB: convert --check verifies its checksum" in note for note in checkpoint.notes)
    assert verify_embedded_checksums(checkpoint) == [file]
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)
    with pytest.raises(UserError, match=rf"{name} does not match its checksums"):
        verify_embedded_checksums(open_checkpoint(tmp_path / "ours"))


def test_check_names_parameters_with_numbers_that_are_none(model: Path):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, :2] = [np.nan, np.inf]
    save_file(tensors, file, metadata={"format": "pt"})
    done = called("convert", model, "--check")
    assert done.returncode == 1
    assert "layers.mlp.up_proj: 2 of " in done.stdout


def test_a_destination_and_check_exclude_each_other(model: Path, tmp_path: Path):
    assert_refused(called("convert", model), "convert has no DESTINATION")
    assert_refused(called("convert", model, tmp_path / "out", "--check"), "--check writes nothing")


@pytest.mark.parametrize("layout", [None, "half", "interleaved"])
def test_verify_says_what_it_compared_and_that_a_layout_was_assumed(stories: Path, tmp_path: Path, layout: str | None):
    """A file in the old layout, read in the new one, is equal to what was made of that: as wrong."""
    theirs = tmp_path / "theirs"
    assert called("convert", stories, theirs, "--to", "mindspore-interleaved").returncode == 0
    options = [] if layout is None else ["--rope-layout", layout]
    told = called("convert", theirs, tmp_path / "out", "--verify", *options).stderr
    assert f"of {theirs}, read as mindspore, with {tmp_path / 'out'}, read as hf" in told
    assert "all tensors are equal" in told
    assert told.count("is assumed for") == (layout is None)
    assert ("--rope-layout auto with --reference" in told) == (layout is None)
    assert (called("diff", stories, tmp_path / "out").returncode == 0) == (layout == "interleaved")


def test_diff_tells_what_was_not_read(stories: Path, tmp_path: Path):
    shutil.copytree(stories, tmp_path / "other")
    (tmp_path / "other" / "model.fp16.safetensors").write_bytes(b"x")
    done = called("diff", stories, tmp_path / "other")
    assert done.returncode == 0
    assert (
        f"note: {tmp_path / 'other'}: the parameters are read from model.safetensors; these files are not read: "
        in done.stderr
    )


@pytest.mark.parametrize(
    "option",
    [
        "--to hf",
        "--dtype float32",
        "--tensor-parallel 2",
        "--pipeline-parallel 2",
        "--shards 2",
        "--verify",
        "--resume",
        "--overwrite",
    ],
)
def test_options_of_writing_are_refused_beside_check(model: Path, option: str):
    about = f"--check cannot be combined with {option.split()[0]}"
    assert_refused(called("convert", model, "--check", *option.split()), about)


@pytest.mark.parametrize("place", ["", "hf::", "a file"])
def test_a_source_is_not_replaced_by_what_is_made_of_it(tmp_path: Path, place: str):
    own = tmp_path / "own"
    convert(saved(tmp_path / "model", head_dim=8), own, to="mindspore" if place == "a file" else "hf")
    before = {file: file.read_bytes() for file in own.iterdir()}
    source = own / "model.ckpt" if place == "a file" else f"{place}{own}"
    for options in (["--verify"], ["--dtype", "bfloat16"], ["--to", "gguf-q4_0"]):
        done = called("convert", source, tmp_path / "x" / ".." / "own", "--overwrite", *options)
        assert_refused(done, "own cannot be replaced, because")
    assert {file: file.read_bytes() for file in own.iterdir()} == before


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_rotary_layout_is_decided_by_a_text(stories: Path, assets: Path, tmp_path: Path, layout: str):
    convert(stories, tmp_path / "theirs", to="mindspore" if layout == "half" else "mindspore-interleaved")
    text = tmp_path / "text.txt"
    text.write_text((assets / "data" / "tinystories" / "tinystories_sample.txt").read_text()[:1000])
    done = called("convert", tmp_path / "theirs", tmp_path / "out", "--rope-layout", "auto", "--reference", text)
    assert done.returncode == 0, done.stderr
    assert f"the rotary layout is {layout}: the loss per token of " in done.stderr
    assert all(each.equal for each in compare(open_checkpoint(stories), open_checkpoint(tmp_path / "out")))
    done = called("convert", tmp_path / "theirs", tmp_path / "said", "--rope-layout", layout)
    assert "assumed to be half-split" not in done.stderr
    assert all(each.equal for each in compare(open_checkpoint(stories), open_checkpoint(tmp_path / "said")))


def test_the_rotary_layout_is_asked_of_mindspore_alone(stories: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert_refused(called("convert", stories, out, "--rope-layout", "half"), "is for MindSpore files")
    assert_refused(called("convert", stories, out, "--reference", "a.txt"), "--reference is for --rope-layout auto")
    convert(stories, tmp_path / "theirs", to="mindspore")
    assert_refused(called("convert", tmp_path / "theirs", out, "--rope-layout", "auto"), "requires a text")
    given = ["--rope-layout", "half", "--reference", "a.txt"]
    assert_refused(called("convert", tmp_path / "theirs", out, *given), "--reference is for --rope-layout auto")


def test_a_layout_is_said_once(stories: Path, tmp_path: Path):
    theirs = tmp_path / "theirs"
    convert(stories, theirs, to="mindspore-interleaved")
    half = ["--rope-layout", "half"]
    for words in (
        [theirs, tmp_path / "out", "--from", "mindspore-interleaved"],
        [f"mindspore-interleaved::{theirs}", "--check"],
    ):
        assert_refused(
            called("convert", *words, *half),
            "mindspore-interleaved means interleaved, which contradicts --rope-layout half",
        )
    done = called("convert", f"mindspore::{theirs}", tmp_path / "out", "--rope-layout", "interleaved")
    assert done.returncode == 0, done.stderr
    assert all(each.equal for each in compare(open_checkpoint(stories), open_checkpoint(tmp_path / "out")))


def test_a_tokenizer_with_more_ids_than_the_model_cannot_decide(stories: Path, tmp_path: Path):
    convert(saved(tmp_path / "model", head_dim=8), tmp_path / "theirs", to="mindspore")
    shutil.copy(stories / "tokenizer.json", tmp_path / "theirs")
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl.")
    given = ["--rope-layout", "auto", "--reference", tmp_path / "text.txt"]
    about = "text.txt contains token id 432, and the model has vocab_size = 97"
    assert_refused(called("convert", tmp_path / "theirs", tmp_path / "out", *given), about)


def test_concatenated_projections_have_one_layout(stories: Path, tmp_path: Path):
    convert(stories, tmp_path / "apart", to="mindspore-safetensors")
    arrays, config = load_file(tmp_path / "apart" / "model.safetensors"), open_checkpoint(stories).config
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}.attention."
        q, k, v = (arrays.pop(f"{block}w{x}.weight").reshape(config.num_kv_heads, -1, config.embed_dim) for x in "qkv")
        arrays[f"{block}w_qkv.weight"] = np.concatenate([q, k, v], 1).reshape(-1, config.embed_dim)
    save_file(arrays, tmp_path / "apart" / "model.safetensors", metadata={"format": "ms"})
    done = called("convert", tmp_path / "apart", tmp_path / "out", "--rope-layout", "auto")
    assert "the rotary layout is half: w_qkv is always stored so" in done.stderr
    assert all(each.equal for each in compare(open_checkpoint(stories), open_checkpoint(tmp_path / "out")))


def test_a_file_that_does_not_say_its_model_or_tokenizer_is_told_them(assets: Path, stories: Path, tmp_path: Path):
    file = assets / "golden" / "easylm" / "streaming_params_fp32"
    described = ["--config", stories / "config.json"]
    words = ["Once upon a time", *described, "--tokenizer", stories, "--max-new-tokens", 8]
    done = called("generate", file, *words)
    assert done.stdout == called("generate", stories, "Once upon a time", "--max-new-tokens", 8).stdout
    assert called("generate", file, *words[:3], "--max-new-tokens", 8).stdout == done.stdout, "the folder's tokenizer"
    alone = shutil.copy(stories / "config.json", tmp_path / "config.json")
    assert_refused(called("generate", file, "Once", "--config", alone), "the checkpoint has no tokenizer")
    assert "260,032" in called("inspect", file, *described).stdout
