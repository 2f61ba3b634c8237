"""The pages for people who come from another system keep their word, on files that those systems' own code wrote.

The console and python blocks of a page are one story, told in a folder where those files have the names that the page
gives them. The models in them are smaller than any preset: a config.json with the name of a preset stands for it.
"""

import dataclasses
import itertools
import re
import shlex
import shutil
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from camelid.runs.recipe import Recipe, read_recipe
from runs import called
from test_docs import ROOT, parse

pytestmark = pytest.mark.quick_compile

PAGES = sorted(page for page in (ROOT / "docs" / "migrating").glob("*.md") if page.name != "index.md")
HF = "models/stories260K/hf"
TEXT = {"train.jsonl": "golden/easylm/train.jsonl", "held_out.txt": "data/tinystories/tinystories_sample.txt"}
TOKENIZER = f"{HF}/tokenizer.model"
FILES: dict[str, dict[str, str]] = {
    "easylm": {
        "llama_7b": f"{HF}/config.json",
        "tokenizer.model": TOKENIZER,
        "streaming_params": "golden/easylm/streaming_params_fp32",
        "easylm_run/streaming_params": "golden/easylm/streaming_params_fp32",
        "easylm_run/streaming_train_state": "golden/easylm/streaming_train_state",
        "easylm_run/config.json": f"{HF}/config.json",
        "easylm_run/tokenizer.model": TOKENIZER,
    },
    "ll3m": {  # its files are EasyLM's, of bfloat16
        "tiny_llama_1b": f"{HF}/config.json",
        "tokenizer.model": TOKENIZER,
        "streaming_params": "golden/easylm/streaming_params_bf16",
    },
    "llama2_jax": {
        "llama2-7B": f"{HF}/config.json",
        "tokenizer.model": TOKENIZER,
        "llama2-7B.pickle": "golden/llama2_jax/stories260K.pickle",
        "saved/llama2-7B.pickle": "golden/llama2_jax/stories260K.pickle",
        "saved/config.json": f"{HF}/config.json",
        "saved/tokenizer.model": TOKENIZER,
    },
    "megatron": {
        "llama2_7b": "golden/hf_variants/hf_4layer/config.json",
        "llama2-7b-tp2-pp2": "golden/megatron/core_local_4layer_tp2_pp2",
        "llama2-7b-tp2-pp2/tokenizer.model": TOKENIZER,
    },
    "mindformers": {
        "llama_7b": "golden/hf_variants/hf_mha_untied/config.json",
        "tokenizer.model": TOKENIZER,
        "llama_7b.ckpt": "golden/mindspore/r1.0_mha_fp16.ckpt",
        "llama_7b_2023.ckpt": "golden/mindspore/seed_mha_fp16.ckpt",
    },
}


def recipes(page: Path) -> dict[str, str]:
    """The recipes of a page by the name that each begins with."""
    return {
        block.text.partition("\n")[0].removeprefix("# "): block.text
        for block in parse(page)[0]
        if block.language == "toml"
    }


def ours(page: Path) -> list[str]:
    """What stands between backticks, but for blocks and for the first column of tables, which is the other system's."""
    return re.findall(r"`([^`]+)`", re.sub(r"^\|[^|]*\|", "", parse(page)[1], flags=re.M))


def lay(files: dict[str, str], assets: Path, folder: Path) -> None:
    for name, asset in (TEXT | files).items():
        source, target = assets / asset, folder / name
        for file in [source] if source.is_file() else filter(Path.is_file, source.rglob("*")):
            copy = target / file.relative_to(source) if file != source else target
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def shrunk(recipe: str) -> dict[str, Any]:
    """The same run for two steps of short rows."""
    table = tomllib.loads(recipe)
    steps = 8 if table.get("init_optimizer") else 2  # EasyLM has made six of them
    table["train"] |= {"steps": steps}
    table["data"] |= {"sequence_length": 32, "batch_size": 8 * table["train"].get("accumulate", 1)}
    return table


def test_each_system_has_its_page_in_the_index():
    assert {page.stem for page in PAGES} == FILES.keys()
    index = (ROOT / "docs" / "migrating" / "index.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lay(FILES[page.stem], assets, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, text in recipes(page).items():
        (tmp_path / name).write_text(tomli_w.dumps(shrunk(text)))
    trained = False
    for block in parse(page)[0]:
        if block.language == "python":
            exec(block.text, {})
        for line in block.text.splitlines() if block.language == "console" else ():
            prompt, program, *arguments = shlex.split(line)
            assert (prompt, program) == ("$", "camelid"), f"{page.name}:{block.line}: {line}"
            done = called(*arguments)
            assert done.returncode == 0, f"{page.name}:{block.line}: {line}\n{done.stdout}{done.stderr}"
            trained |= arguments[0] == "train"
    assert trained, "no recipe of this page is trained"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_recipes_of_a_page_are_understood_as_printed(page: Path, tmp_path: Path):
    for name, text in recipes(page).items():
        assert re.fullmatch(r"\w+\.toml", name), f"{page.name}: {name!r} is no name for a recipe"
        (tmp_path / name).write_text(text)
        assert isinstance(read_recipe(tmp_path / name), Recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_fields_that_a_page_names_are_fields_of_a_recipe(page: Path):
    kinds = typing.get_type_hints(Recipe)
    tables = {
        name: {field.name for field in dataclasses.fields(kind)}
        for name, hint in kinds.items()
        for kind in (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(kind)
    }
    tables["model"].add("preset")
    named = [
        match.groups() for text in ours(page) if (match := re.match(rf"({'|'.join(tables)})\.(?!py\b)(\w+)", text))
    ]
    assert len(named) > 10
    assert not [f"{table}.{name}" for table, name in named if name not in tables[table]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_options_that_a_page_names_are_options_of_the_command(page: Path):
    printed = [text.split() for text in ours(page) if text.startswith("camelid ")]
    assert len(printed) > 5
    for _, command, *rest in printed:
        words = [command, *rest[:1]] if command in ("evaluate", "delta", "data") else [command]
        text = called(*words, "--help").stdout
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        known = {*re.findall(r"--[a-z][\w-]*", text)} | ({"--init"} if command == "train" else set())
        assert options <= known, f"{page.name}: camelid {command} has no {options - known}"
        formats = [after for word, after in itertools.pairwise(rest) if word in ("--to", "--from")]
        assert all(re.search(rf"\b{re.escape(name)}\b", text) for name in formats), f"{page.name}: {formats}"
