"""The recipes that are installed with camelid: each is valid, and the small run that its header describes works."""

import itertools
import os
import re
import shlex
from pathlib import Path

import jax
import pytest

from camelid import recipes
from camelid.parallel.mesh import make_mesh
from camelid.runs.components import build_components
from camelid.runs.recipe import read_recipe
from camelid.train.loggers import read_metrics
from runs import assert_refused, called


def small_run(name: str, assets: Path) -> list[str]:
    """The command in the header of a recipe that runs a small version of it, without the name of the program."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), recipes.path_of(name).read_text().splitlines())
    header = "\n".join(line.removeprefix("#").strip() for line in lines)
    found = re.search(r"^camelid (train (?:.*\\\n)*.*)$", header, re.MULTILINE)
    assert found, f"{name} has no small version"
    os.environ["CAMELID_ASSETS"] = str(assets)
    return shlex.split(os.path.expandvars(found[1].replace("\\\n", "")))


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_valid_and_begins_with_what_it_is(name: str):
    recipe = read_recipe(recipes.path_of(name))
    assert Path(recipe.run).name == name
    assert re.fullmatch(r"[A-Z][^\n]*\.", recipes.summary(name)), recipes.summary(name)
    assert len(recipes.summary(name)) <= 80


@pytest.mark.parametrize("name", recipes.names())
def test_the_small_version_of_a_recipe_is_built_from_real_files(name: str, assets: Path):
    command, about, *overrides = small_run(name, assets)
    assert (command, about) == ("train", name)
    small, large = read_recipe(recipes.path_of(name), overrides), read_recipe(recipes.path_of(name))
    assert small.train.steps <= 20 < large.train.steps
    # It is a version of this recipe: how it trains is not overridden.
    assert small.optimizer.name == large.optimizer.name
    assert (small.lora, small.loss, small.dropout) == (large.lora, large.loss, large.dropout)
    mesh = make_mesh(small.mesh)
    with jax.set_mesh(mesh):
        assert build_components(small, mesh).loader.num_rows > small.data.batch_size


@pytest.mark.quick_compile
@pytest.mark.parametrize("name", ["llama2_7b_gsm8k", "wikipedia_mixture"])
def test_the_small_version_of_a_recipe_trains(name: str, assets: Path, tmp_path: Path):
    done = called(*small_run(name, assets), "--run", tmp_path / "run", "--train.steps", 2, "--data.stages", "[]")
    assert done.returncode == 0, done.stderr
    assert f"camelid generate {tmp_path / 'run'}" in done.stderr
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


def test_recipes_are_listed_shown_and_copied(tmp_path: Path):
    listed = called("recipes").stdout
    assert listed == called("recipes", "ls").stdout
    assert all(f"{name} " in listed for name in recipes.names())
    text = recipes.path_of("finetune").read_text()
    assert called("recipes", "show", "finetune").stdout == text
    assert called("recipes", "cp", "finetune", tmp_path / "mine.toml").returncode == 0
    assert (tmp_path / "mine.toml").read_text() == text
    assert_refused(called("recipes", "cp", "pretrain_tiny", tmp_path / "mine.toml"), "mine.toml exists")
    assert (tmp_path / "mine.toml").read_text() == text
    done = called("recipes", "show", "fintune")
    assert_refused(done, "there is no recipe 'fintune'")
    assert "Did you mean 'finetune'?" in done.stderr


def test_train_takes_the_name_of_a_recipe_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    printed = called("train", "llama2_7b_gsm8k", "--init", "mine", "--print-recipe")
    assert printed.returncode == 0, printed.stderr
    assert 'init = "mine"' in printed.stdout
    assert 'kind = "gsm8k"' in printed.stdout
    done = called("train", "llama2_7b_alpacca")
    assert_refused(done, "llama2_7b_alpacca is neither a file nor the name of a recipe")
    assert "Did you mean 'llama2_7b_alpaca'" in done.stderr
    assert_refused(called("train", "finetune.toml"), "finetune.toml")  # not found, and no name of a recipe
    Path("finetune").write_text(recipes.path_of("pretrain_tiny").read_text())
    assert 'run = "runs/pretrain_tiny"' in called("train", "finetune", "--print-recipe").stdout
