"""--ignore-config-field: every command that opens a checkpoint refuses a field by its name, and opens without it."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file, save_file

import camelid
from camelid.checkpoint.formats.hf_ignored_fields import without
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from runs import assert_refused, called, stories_run

FIELD = "scale_emb"


@pytest.fixture
def model(stories: Path, tmp_path: Path) -> Path:
    """A model whose config.json has a field that camelid does not know."""
    folder = Path(shutil.copytree(stories, tmp_path / "model"))
    edit(folder, {FIELD: 12})
    return folder


def edit(folder: Path, change: dict[str, Any]) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | change))


def assert_names(done: CompletedProcess[str], option: str) -> None:
    """Refused, with the field, its value and the way on."""
    assert_refused(done, f"{FIELD} = 12")
    assert option in done.stderr


COMMANDS = {
    "generate": "generate {model} --max-new-tokens 2 Once",
    "evaluate perplexity": "evaluate perplexity --max-tokens 20 {model} {text}",
    "inspect": "inspect {model}",
    "convert": "convert {model} {out} --verify",
    "convert to another format": "convert --to meta {model} {out}",
    "convert --check": "convert {model} --check",
    "diff": "diff {stories} {model}",
    "delta make": "delta make {stories} {model} {out}",
    "delta apply": "delta apply {model} {stories} {out} --sum",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_opens_a_checkpoint_has_the_option(command: str, model: Path, stories: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog. It was a good dog and it had a ball.")
    places = {"model": model, "stories": stories, "out": tmp_path / "out", "text": tmp_path / "text.txt"}
    words = [word.format(**places) for word in command.split()]
    assert_names(called(*words), f"--ignore-config-field {FIELD}")
    assert not (tmp_path / "out").exists()
    # In the midst of the words, where a list of values would take what follows.
    done = called(*words[:-1], "--ignore-config-field", FIELD, words[-1])
    assert done.returncode == 0, done.stderr
    if not command.startswith("delta make"):
        assert f"config.json is read without {FIELD}, as requested" in done.stderr


def test_a_recipe_has_a_field_for_it(model: Path, assets: Path, tmp_path: Path):
    table = stories_run(tmp_path, assets, init=str(model), train__steps=1)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table))
    assert_names(called("train", tmp_path / "recipe.toml"), f"init_ignore = ['{FIELD}']")
    done = called("train", tmp_path / "recipe.toml", "--init-ignore", FIELD)
    assert done.returncode == 0, done.stderr
    assert f'init_ignore = [\n    "{FIELD}",\n]' in (tmp_path / "run" / "recipe.toml").read_text()
    assert open_checkpoint(tmp_path / "run" / "model").notes == ()
    table["init_ignore"] = [FIELD]
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table))
    assert called("data", "inspect", tmp_path / "recipe.toml").returncode == 0


def test_the_model_is_the_one_without_the_field_and_is_saved_as_such(model: Path, stories: Path, tmp_path: Path):
    tokens = np.arange(12)[None]
    ours = camelid.load(model, ignore=[FIELD])
    np.testing.assert_array_equal(ours.logits(tokens), camelid.load(stories).logits(tokens))
    ours.save(tmp_path / "saved")
    assert FIELD not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert open_checkpoint(tmp_path / "saved").notes == ()


def test_a_config_that_is_given_and_one_beside_another_format_are_read_without_it_too(
    model: Path, stories: Path, tmp_path: Path
):
    assert called("convert", stories, tmp_path / "c", "--to", "llama2c").returncode == 0
    option = ["--ignore-config-field", FIELD]
    given = ["--config", model / "config.json"]
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "c" / "model.bin", tmp_path / "alone")
    assert_names(called("inspect", tmp_path / "alone", *given), f"--ignore-config-field {FIELD}")
    assert called("inspect", tmp_path / "alone", *given, *option).returncode == 0
    edit(tmp_path / "c", {FIELD: 12})
    assert_names(called("inspect", tmp_path / "c"), f"--ignore-config-field {FIELD}")
    done = called("inspect", tmp_path / "c", *option)
    assert done.returncode == 0, done.stderr
    assert f"is read without {FIELD}" in done.stderr


def test_the_base_of_an_adapter_is_read_without_it(model: Path, stories: Path, tmp_path: Path):
    tuned = Path(shutil.copytree(stories, tmp_path / "tuned"))
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    made = called("delta", "make", stories, tuned, tmp_path / "adapter", "--kind", "lora", "--rank", "1")
    assert made.returncode == 0, made.stderr
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(model)})
    )
    with pytest.raises(UserError, match=f"{FIELD} = 12"):
        open_checkpoint(tmp_path / "adapter")
    opened = open_checkpoint(tmp_path / "adapter", ignore=[FIELD])
    assert f"config.json is read without {FIELD}, as requested" in opened.notes


def test_fields_of_tables_and_names_with_a_dot_are_left_out():
    table = {"a": 1, "rope_scaling": {"alpha": 2, "factor": 3}, "x.js": 4, "deep": {"one": {"two": 5, "three": 6}}}
    assert without(table, ["rope_scaling.alpha", "x.js", "deep.one.two", "b", "a.b", "rope_scaling.beta"]) == {
        "a": 1,
        "rope_scaling": {"factor": 3},
        "deep": {"one": {"three": 6}},
    }
    assert without(table, ["rope_scaling", "a"]).keys() == {"x.js", "deep"}
    assert table["rope_scaling"] == {"alpha": 2, "factor": 3}


def test_what_is_left_out_of_account_is_said(stories: Path, tmp_path: Path):
    folder = Path(shutil.copytree(stories, tmp_path / "model"))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attn_factor": 0.87}
    edit(folder, {"rope_scaling": yarn, "attention_dropout": 0.1, "hidden_dropout": 0.0})
    dropout, factor = camelid.load(folder).notes
    assert "dropout in training (attention_dropout = 0.1), which is not applied" in dropout
    assert "rope_scaling.attn_factor = 0.87 is ignored, as in transformers; vLLM and llama.cpp multiply" in factor
