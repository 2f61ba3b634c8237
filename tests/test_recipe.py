"""Recipes: strict TOML, overrides, and messages that name the field."""

import dataclasses
import datetime
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from camelid.errors import UserError
from camelid.recipe import Recipe, read_recipe, structure, write_recipe

MODEL = {
    "vocab_size": 512,
    "embed_dim": 64,
    "mlp_dim": 172,
    "num_layers": 5,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 8,
    "context_length": 512,
    "norm_eps": 1e-5,
    "rope_theta": 10_000,
}


def table(**fields: Any) -> dict[str, Any]:
    """A finetuning recipe with `fields` in place of its own; None takes one away."""
    whole = {
        "run": "runs/a",
        "init": "models/a",
        "data": {"train": ["a.txt", "b.txt"], "sequence_length": 32, "batch_size": 8},
        "train": {"steps": 20},
    }
    return {key: value for key, value in (whole | fields).items() if value is not None}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(table()))
    return path


# Reading --------------------------------------------------------------------------------


def test_what_a_recipe_leaves_out_is_the_default(file: Path):
    recipe = read_recipe(file)
    assert (recipe.run, recipe.init, recipe.model, recipe.tokenizer) == ("runs/a", "models/a", None, None)
    assert recipe.data.train == ("a.txt", "b.txt")
    assert (recipe.train.steps, recipe.train.accumulate, recipe.train.evaluate_every) == (20, 1, None)
    assert (recipe.optimizer.beta2, recipe.compute.dtype, recipe.mesh.fsdp) == (0.95, "float32", -1)


def test_a_recipe_from_scratch_has_a_model_and_a_tokenizer():
    scaling = {"factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 512}
    recipe = structure(table(init=None, tokenizer="tok", model=MODEL | {"rope_scaling": scaling, "eos_ids": [1, 2]}))
    assert recipe.model is not None
    assert recipe.model.rope_theta == 10_000.0
    assert type(recipe.model.rope_theta) is float
    assert recipe.model.eos_ids == (1, 2)
    assert recipe.model.rope_scaling is not None
    assert recipe.model.rope_scaling.factor == 8.0


@pytest.mark.parametrize(
    "recipe",
    [
        table(),
        table(
            init=None,
            model=MODEL | {"pad_id": 0, "tie_embeddings": True, "eos_ids": [1, 2]},
            tokenizer="tok",
            optimizer={"clip_norm": math.inf, "warmup_steps": 3},
            compute={"replicate": ["kv_heads"], "dtype": "bfloat16"},
            mesh={"data": 2, "tensor": 2},
        ),
    ],
    ids=["finetune", "from scratch"],
)
def test_a_recipe_written_and_read_back_is_the_same(tmp_path: Path, recipe: dict[str, Any]):
    first = structure(recipe)
    (tmp_path / "again.toml").write_text(write_recipe(first))
    assert read_recipe(tmp_path / "again.toml") == first
    # Every field is there to be seen, but those that are absent.
    written = tomllib.loads(write_recipe(first))
    for field in dataclasses.fields(first.optimizer):
        assert field.name in written["optimizer"]


def test_a_single_value_stands_for_a_list_of_one():
    data = table()["data"] | {"train": "only.txt"}
    assert structure(table(data=data)).data.train == ("only.txt",)


# Overrides ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--train.steps", "500"], "train.steps", 500),
        (["--train.steps=500"], "train.steps", 500),
        (["--optimizer.learning-rate", "1e-4"], "optimizer.learning_rate", 1e-4),
        (["--optimizer.learning_rate", "2"], "optimizer.learning_rate", 2.0),
        (["--optimizer.clip-norm", "inf"], "optimizer.clip_norm", math.inf),
        (["--mesh.fsdp", "-1"], "mesh.fsdp", -1),
        (["--run", "runs/second"], "run", "runs/second"),
        (["--run", "runs/a=b"], "run", "runs/a=b"),
        (["--run=a=b"], "run", "a=b"),
        (["--run", "2026-11-21"], "run", "2026-11-21"),
        (["--data.train", "one.txt"], "data.train", ("one.txt",)),
        (["--data.train", '["a b.txt", "c.txt"]'], "data.train", ("a b.txt", "c.txt")),
        (["--data.shuffle", "false"], "data.shuffle", False),
        (["--data.text-key", '"1"'], "data.text_key", "1"),
        (["--compute.dtype", "bfloat16"], "compute.dtype", "bfloat16"),
        (["--train.steps", "5", "--train.steps", "6"], "train.steps", 6),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_override_is_laid_over_the_file(file: Path, words: list[str], path: str, value: Any):
    found: Any = read_recipe(file, words)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.stpes", "3"], r"no field 'train\.stpes'\nDid you mean 'train\.steps'\?"),
        (["--trian.steps", "3"], r"no field 'trian'\nDid you mean 'train'\?"),
        (["--train.steps"], r"--train\.steps has no value"),
        (["steps", "3"], r"'steps' is neither an option nor its value"),
        (["--run.steps", "3"], r"run\.steps: run is not a table"),
        (["--train.steps", "3.7"], r"train\.steps: 3\.7 is not of type int"),
        (["--train.steps", "many"], r"train\.steps: 'many' is not of type int"),
        (["--train", "3"], r"train = 3 is not a table"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(file: Path, words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        read_recipe(file, words)


# Refusing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, r"no field 'modle'\nDid you mean 'model'\?"),
        ({"train": {"steps": 5, "acumulate": 2}}, r"no field 'train\.acumulate'\nDid you mean 'train\.accumulate'\?"),
        ({"train": {"steps": 5, "xyz": 2}}, r"no field 'train\.xyz'\nIt has steps, accumulate"),
        (
            {"init": None, "tokenizer": "t", "model": MODEL | {"rope_scaling": {"fator": 2}}},
            r"'model\.rope_scaling\.fator'",
        ),
        ({"train": {"steps": 3.7}}, r"train\.steps: 3\.7 is not of type int"),
        ({"train": {"steps": "20"}}, r"train\.steps: '20' is not of type int"),
        ({"train": {"steps": True}}, r"train\.steps: True is not of type int"),
        ({"train": {}}, r"the recipe lacks train\.steps"),
        ({"train": 5}, r"train = 5 is not a table"),
        ({"data": [1]}, r"data = \[1\] is not a table"),
        ({"data": None}, r"the recipe lacks data"),
        ({"optimizer": {"learning_rate": "1e-4"}}, r"optimizer\.learning_rate: '1e-4' is not of type float"),
        ({"optimizer": {"learning_rate": -1.0}}, r"optimizer\.learning_rate = -1\.0\nChoose a number above 0"),
        ({"run": 5}, r"run: 5 is not of type str"),
        ({"compute": {"dtype": "int8"}}, r"compute\.dtype: .*int8"),
        ({"compute": {"attention": "flash"}}, r"compute\.attention: .*flash"),
        ({"compute": {"replicate": [1]}}, r"compute\.replicate.*1 is not of type str"),
        ({"compute": {"replicate": {"a": 1}}}, r"compute\.replicate.*is not a list"),
        ({"train": {"steps": 0}}, r"train\.steps = 0\n.*1 or more"),
        ({"train": {"steps": 5, "evaluate_every": 0}}, r"train\.evaluate_every = 0"),
        ({"train": {"steps": 5, "checkpoint_every": -1}}, r"train\.checkpoint_every = -1"),
        ({"init": None}, r"needs one of init and model, and not both"),
        ({"model": MODEL}, r"needs one of init and model, and not both"),
        ({"init": None, "model": MODEL}, r"has a model and no tokenizer"),
        ({"init": None, "tokenizer": "t", "model": MODEL | {"num_kv_heads": 3}}, r"num_heads = 8 is not a multiple"),
        ({"init": None, "tokenizer": "t", "model": {"vocab_size": 9}}, r"the recipe lacks model\."),
    ],
    ids=str,
)
def test_a_recipe_that_is_not_understood_is_refused_with_the_field_and_a_way_out(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as refusal:
        structure(table(**change))
    assert refusal.value.advice


def test_a_boolean_is_a_boolean():
    data = table()["data"]
    for value in ("false", 0, 1):
        with pytest.raises(UserError, match=rf"data\.shuffle: {value!r} is not of type bool"):
            structure(table(data=data | {"shuffle": value}))
    assert structure(table(data=data | {"shuffle": False})).data.shuffle is False


def test_a_date_is_no_text():
    with pytest.raises(UserError, match=r"run: .* is not of type str"):
        structure(table(run=datetime.date(2026, 11, 21)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a = 1\nb = = 2", r"recipe\.toml is not TOML: .*line 2"),
        ("\xff", r"recipe\.toml is not TOML"),
        (None, r"recipe\.toml cannot be read: No such"),
    ],
)
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "recipe.toml").write_text(content, "latin-1")
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "recipe.toml")


def test_a_folder_is_no_recipe(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path)


def test_a_recipe_is_a_value():
    assert structure(table()) == structure(table())
    assert hash(structure(table())) == hash(structure(table()))
    assert dataclasses.is_dataclass(Recipe)
