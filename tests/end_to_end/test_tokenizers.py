"""Tokenizers on their way with a model: converted, borrowed, and with more ids than the model has."""

import shutil
from pathlib import Path

import pytest

import camelid
from camelid.model.config import ComputeConfig
from camelid.parallel.mesh import one_device
from camelid.text.tokenizer import load_tokenizer
from runs import assert_refused, called, write_recipe_file
from tiny import tiny_config, tiny_params

TEXT = "<|start_header_id|>user<|end_header_id|>\n\nOne day  12345<|eot_id|>"


@pytest.fixture
def llama3(assets: Path, tmp_path: Path) -> Path:
    """A folder as Meta's of Llama 3."""
    config = tiny_config(head_dim=8, num_layers=1, vocab_size=2256)
    compute, mesh = ComputeConfig(), one_device()
    camelid.Model(config, tiny_params(config), None, compute, mesh).save(tmp_path / "meta", "meta")
    shutil.copyfile(assets / "tokenizers/tiny-tiktoken/tiktoken_small.model", tmp_path / "meta" / "tokenizer.model")
    return tmp_path / "meta"


def test_metas_llama3_tokenizer_is_converted_for_transformers(llama3: Path, tmp_path: Path):
    import transformers

    done = called("convert", llama3, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(llama3)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT, specials=True)
    camelid.load(llama3).save(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    # Meta's own code reads no other file.
    assert called("convert", llama3, tmp_path / "back", "--to", "meta").returncode == 0
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (llama3 / "tokenizer.model").read_bytes()


def test_convert_takes_another_tokenizer_in_the_place_of_the_sources(stories: Path, assets: Path, tmp_path: Path):
    ranks = assets / "tokenizers/tiny-tiktoken/tiktoken_small.model"
    done = called("convert", stories, tmp_path / "out", "--tokenizer", ranks)
    assert done.returncode == 0, done.stderr
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "tokenizer.model" not in names
    assert "special_tokens_map.json" not in names
    assert "generation_config.json" in names
    assert load_tokenizer(tmp_path / "out").encode(TEXT) == load_tokenizer(ranks).encode(TEXT)
    assert_refused(called("convert", stories, "--check", "--tokenizer", ranks), "--tokenizer")
    camelid.load(stories, tokenizer=ranks).save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(TEXT) == load_tokenizer(ranks).encode(TEXT)
    other = assets / "models/stories260K/tok512.model"
    assert called("convert", stories, tmp_path / "renamed", "--tokenizer", other).returncode == 0
    assert (tmp_path / "renamed" / "tokenizer.model").read_bytes() == other.read_bytes()
    assert not (tmp_path / "renamed" / "tokenizer.json").exists()


def test_the_folder_of_config_gives_its_tokenizer_where_there_is_none(stories: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(stories / "model.safetensors", bare / "model.safetensors")
    shutil.copyfile(stories / "config.json", bare / "config.json")
    assert called("convert", bare, tmp_path / "out", "--config", stories).returncode == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (stories / "tokenizer.json").read_bytes()
    written = called("generate", bare, "Once upon", "--max-new-tokens", "3", "--config", stories)
    assert written.returncode == 0, written.stderr
    assert written.stdout == called("generate", stories, "Once upon", "--max-new-tokens", "3").stdout
    # A checkpoint's own tokenizer is kept.
    (bare / "tokenizer.model").write_bytes((stories / "tokenizer.model").read_bytes())
    assert called("convert", bare, tmp_path / "own", "--config", stories).returncode == 0
    assert not (tmp_path / "own" / "tokenizer.json").exists()


def test_a_tokenizer_may_have_more_ids_than_the_model_until_one_is_needed(stories: Path, tmp_path: Path):
    folder = shutil.copytree(stories, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text('{"<pad>": 512, "Tim": 513}')
    model = camelid.load(folder)
    assert any("has 514 ids, the model's vocabulary only 512" in note for note in model.notes)
    plain = camelid.load(stories).generate("One day", max_new_tokens=4)
    assert model.generate("One day", max_new_tokens=4)[0].text == plain[0].text
    with pytest.raises(camelid.UserError, match="prompt 0 has token 513, and the vocabulary has 512"):
        model.generate("Tim", max_new_tokens=1)

    recipe = {"init": str(folder), "run": str(tmp_path / "run"), "train": {"steps": 1}}
    recipe["data"] = {"train": [str(tmp_path / "text.txt")], "sequence_length": 16, "batch_size": 8}
    write_recipe_file(recipe, tmp_path / "recipe.toml")
    (tmp_path / "text.txt").write_text("One day, a big red dog saw a ball. He was glad. " * 3)
    done = called("train", tmp_path / "recipe.toml")
    assert done.returncode == 0, done.stderr
    assert "has 514 ids" in done.stdout + done.stderr
    (tmp_path / "text.txt").write_text("One day, Tim saw a big red dog. " * 3)
    shutil.rmtree(tmp_path / "run")
    assert_refused(
        called("train", tmp_path / "recipe.toml"), "holds token id 513, but the vocabulary of the model has 512 tokens"
    )
    (tmp_path / "text.txt").write_text("One day, Tim saw a dog.")
    assert_refused(
        called("evaluate", "perplexity", folder, tmp_path / "text.txt"),
        "the text has token 513, and the vocabulary has 512",
    )
