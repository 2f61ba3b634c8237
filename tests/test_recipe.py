"""Recipes: strict TOML, overrides, and messages that name the field."""

import codecs
import dataclasses
import datetime
import math
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tomli_w

from camelid.data.config import Source
from camelid.errors import UserError
from camelid.model.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from camelid.model.presets import PRESETS, preset
from camelid.runs.components import _train_step
from camelid.runs.recipe import Recipe, completed, read_recipe, structure, write_recipe
from camelid.runs.run_folder import check_folder, kept_recipe
from camelid.train.config import DropoutConfig, LossConfig
from camelid.train.objective import NextTokenLoss
from runs import called

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

DATA = {"train": ["a.txt", "b.txt"], "sequence_length": 32, "batch_size": 8}


def table(**fields: Any) -> dict[str, Any]:
    """A finetuning recipe with `fields` in place of its own; None takes one away."""
    whole = {
        "run": "runs/a",
        "init": "models/a",
        "data": DATA,
        "train": {"steps": 20},
    }
    return {key: value for key, value in (whole | fields).items() if value is not None}


def from_scratch(**model: Any) -> ModelConfig:
    """The model of a recipe with this [model] table."""
    found = structure(table(init=None, tokenizer="tok", model=model)).model
    assert found is not None
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(table()))
    return path


# Reading --------------------------------------------------------------------------------


def test_what_a_recipe_leaves_out_is_the_default(file: Path):
    recipe = read_recipe(file)
    assert (recipe.run, recipe.init, recipe.model, recipe.tokenizer) == ("runs/a", "models/a", None, None)
    assert recipe.data.train == (Source(files=("a.txt",)), Source(files=("b.txt",)))
    assert (recipe.train.steps, recipe.train.accumulate, recipe.train.evaluate_every) == (20, 1, None)
    assert (recipe.optimizer.beta2, recipe.compute.dtype, recipe.mesh.fsdp) == (0.95, "float32", -1)


def test_a_recipe_from_scratch_has_a_model_and_a_tokenizer():
    model = from_scratch(**MODEL, eos_ids=[1, 2], sliding_window=8, window_pattern=[True, False])
    assert model.rope_theta == 10_000.0
    assert type(model.rope_theta) is float
    assert model.eos_ids == (1, 2)
    assert (model.sliding_window, model.window_pattern) == (8, (True, False))


@pytest.mark.parametrize(
    "recipe",
    [
        table(),
        table(
            init=None,
            model=MODEL | {"pad_id": 0, "tie_embeddings": True, "eos_ids": [1, 2], "norm": "layer", "family": "llama"},
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
    present = {name for name, value in vars(first.optimizer).items() if value is not None}
    assert written["optimizer"].keys() == present


def test_a_single_value_stands_for_a_list_of_one():
    data = table()["data"] | {"train": "only.txt"}
    assert structure(table(data=data)).data.train == (Source(files=("only.txt",)),)


def test_a_source_may_be_a_table():
    chat = {"files": ["a.jsonl", "b.jsonl"], "kind": "chat", "weight": 2}
    expected = Source(files=("a.jsonl", "b.jsonl"), kind="chat", weight=2.0)
    assert structure(table(data=table()["data"] | {"train": chat})).data.train == (expected,)
    both = structure(table(data=table()["data"] | {"train": [chat, chat | {"files": "c.jsonl"}]})).data.train
    assert both == (expected, dataclasses.replace(expected, files=("c.jsonl",)))
    mixed = structure(table(data=table()["data"] | {"train": [chat | {"weight": None}, "c.txt"]})).data.train
    assert mixed == (dataclasses.replace(expected, weight=None), Source(files=("c.txt",)))


# The model ------------------------------------------------------------------------------

LLAMA3 = {"kind": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 512}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"kind": "linear", "factor": 2}, LinearScaling(factor=2.0)),
        ({"kind": "dynamic", "factor": 1.5}, DynamicScaling(factor=1.5)),
        (LLAMA3, Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=512)),
        ({"kind": "yarn", "original_context": 64}, YarnScaling(original_context=64)),
        (
            {"kind": "yarn", "original_context": 64, "factor": 4, "truncate": False},
            YarnScaling(original_context=64, factor=4.0, truncate=False),
        ),
        (
            {"kind": "longrope", "original_context": 64, "short_factor": [1, 1, 1, 2], "long_factor": [1.5, 2, 3, 4]},
            LongRopeScaling(original_context=64, short_factor=(1.0, 1.0, 1.0, 2.0), long_factor=(1.5, 2.0, 3.0, 4.0)),
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_each_kind_of_rope_scaling_is_read_and_written(tmp_path: Path, scaling: dict[str, Any], expected: RopeScaling):
    recipe = structure(table(init=None, tokenizer="tok", model=MODEL | {"rope_scaling": scaling}))
    assert recipe.model is not None
    assert recipe.model.rope_scaling == expected
    (tmp_path / "again.toml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize("name", [*PRESETS, "llama1-7B", "tiny_llama_1b"])
def test_a_preset_is_resolved_and_survives_writing(tmp_path: Path, name: str):
    recipe = structure(table(init=None, tokenizer="tok", model={"preset": name}))
    assert recipe.model == preset(name)
    written = tomllib.loads(write_recipe(recipe))["model"]
    assert "preset" not in written
    present = {key for key, value in dataclasses.asdict(preset(name)).items() if value is not None}
    assert written.keys() == present
    (tmp_path / "again.toml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "again.toml") == recipe


def test_what_the_table_says_is_laid_over_the_preset():
    model = from_scratch(preset="llama2_7b", num_layers=8, eos_ids=[7, 8], pad_id=0)
    assert model == dataclasses.replace(preset("llama2_7b"), num_layers=8, eos_ids=(7, 8), pad_id=0)


def test_a_table_of_the_same_kind_is_laid_over_the_presets_and_one_of_another_replaces_it():
    stretched = preset("llama3_1_8b")
    assert isinstance(stretched.rope_scaling, Llama3Scaling)
    further = dataclasses.replace(stretched.rope_scaling, factor=16.0)
    for kind in ({}, {"kind": "llama3"}):
        model = from_scratch(preset="llama3_1_8b", rope_scaling={"factor": 16, **kind})
        assert model == dataclasses.replace(stretched, rope_scaling=further)
    model = from_scratch(preset="llama3_1_8b", rope_scaling={"kind": "linear", "factor": 2})
    assert model.rope_scaling == LinearScaling(factor=2.0)


def test_a_preset_can_be_chosen_and_changed_on_the_command_line(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(table(init=None, tokenizer="tok", model={"preset": "llama2_7b", "num_layers": 2})))
    words = ["--model.preset", "llama3_1_8b", "--model.rope-scaling.factor", "4", "--model.embed-dim=64"]
    model = read_recipe(path, words).model
    assert model is not None
    assert (model.vocab_size, model.num_layers, model.embed_dim) == (128256, 2, 64)
    assert isinstance(model.rope_scaling, Llama3Scaling)
    assert model.rope_scaling.factor == 4.0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"preset": "llama2_7bb"}, r"no preset 'llama2_7bb'\nDid you mean llama2_7b or"),
        ({"preset": 7}, r"model\.preset = 7 is not a name\n.*camelid inspect --presets"),
        ({"prset": "llama2_7b"}, r"no field 'model\.prset'\nDid you mean 'model\.preset'\?"),
        ({"preset": "llama2_7b", "num_layer": 2}, r"no field 'model\.num_layer'\nDid you mean 'model\.num_layers'\?"),
        ({"preset": "llama2_7b", "xyz": 2}, r"no field 'model\.xyz'\nIt has vocab_size, .*, preset\."),
        ({"preset": "llama2_7b", "num_layers": "2"}, r"model\.num_layers: '2' is not of type int"),
        ({"preset": "llama2_7b", "num_kv_heads": 5}, r"num_heads = 32 is not a multiple of num_kv_heads = 5"),
        ({"preset": "llama2_7b", "norm": "layr"}, r"model\.norm: .*layr"),
        (
            {"preset": "llama2_7b", "rope_scaling": {"factor": 2}},
            r"lacks the field 'model\.rope_scaling\.kind'\n.*linear, dynamic",
        ),
        ({"preset": "llama3_1_8b", "rope_scaling": 3}, r"model\.rope_scaling = 3 is not a table"),
        (
            MODEL | {"rope_scaling": {}},
            r"lacks the field 'model\.rope_scaling\.kind'\nChoose one of .*, yarn, longrope\.",
        ),
        (
            MODEL | {"rope_scaling": {"kind": "yran"}},
            r"model\.rope_scaling\.kind = 'yran' is unknown\nChoose one of lin",
        ),
        (MODEL | {"rope_scaling": {"kind": ["yarn"]}}, r"model\.rope_scaling\.kind = \['yarn'\] is unknown"),
        (MODEL | {"rope_scaling": "yarn"}, r"model\.rope_scaling = 'yarn' is not a table"),
        (MODEL | {"rope_scaling": {"kind": "yarn"}}, r"lacks the field 'model\.rope_scaling\.original_context'"),
        (MODEL | {"rope_scaling": LLAMA3 | {"factor": "8"}}, r"model\.rope_scaling\.factor: '8' is not of type float"),
        (
            MODEL | {"rope_scaling": LLAMA3 | {"fator": 2}},
            r"'model\.rope_scaling\.fator'\nDid you .*rope_scaling\.factor",
        ),
        (
            # a field of another kind
            MODEL | {"rope_scaling": {"kind": "linear", "factor": 2, "truncate": False}},
            r"no field 'model\.rope_scaling\.truncate'\nIt has kind, factor\.",
        ),
    ],
    ids=str,
)
def test_a_model_that_is_not_understood_is_refused_by_its_field(model: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        from_scratch(**model)


def test_the_page_on_recipes_lists_every_field():
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()

    seen = set()

    def listed(cls: type, prefix: str) -> None:
        if cls in seen:
            return
        seen.add(cls)
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            row = f"| `{prefix}{field.name}` |"
            assert row in page, row
            arms = [arm for arm in (hints[field.name], *get_args(hints[field.name])) if dataclasses.is_dataclass(arm)]
            if len(arms) == 1:
                listed(arms[0], f"{prefix}{field.name}.")

    listed(Recipe, "")
    for kind in get_args(RopeScaling):
        for field in dataclasses.fields(kind):
            assert field.name == "kind" or f"| `{kind.kind}` | `{field.name}` |" in page, (kind, field.name)


# Packing of a run that began before its default was another ---------------------------------


def test_a_run_goes_on_with_the_packing_that_it_began_with(tmp_path: Path):
    def packing(*overrides: str) -> str | None:
        recipe = read_recipe(file, overrides)
        return completed(recipe, kept_recipe(Path(recipe.run))).data.packing_method

    chats = {**DATA, "train": [{"files": "a.jsonl", "kind": "chat"}]}
    file, run = tmp_path / "recipe.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(table(run=str(run), data=chats)))
    assert packing() == "best_fit"
    run.mkdir()
    (run / "recipe.toml").write_text(tomli_w.dumps(table(run=str(run), data=chats | {"packing": "stream"})))
    assert packing() == "best_fit", "it has not begun"
    (run / "checkpoints" / "10").mkdir(parents=True)
    assert packing() == "stream"
    assert packing("--data.packing", "none") == "none"
    assert packing("--run", str(tmp_path / "other")) == "best_fit"
    assert 'packing = "stream"' in called("train", file, "--print-recipe").stdout, "a resolved recipe says which it is"
    check_folder(run, completed(read_recipe(file), kept_recipe(run)))
    with pytest.raises(UserError, match=r'data\.packing = "stream" there, "none" here'):
        check_folder(run, read_recipe(file, ["--data.packing", "none"]))


def test_another_recipe_is_described_with_causes_first_and_in_toml(tmp_path: Path):
    """The defaults of other fields follow the optimizer, and a table that is added is one difference."""

    def refused(**changed: Any) -> str:
        with pytest.raises(UserError) as caught:
            check_folder(run, completed(structure(table(run=str(run), **changed)), kept_recipe(run)))
        return caught.value.problem.removeprefix(f"{run} has a run with another recipe: ")

    run, same = tmp_path / "run", {"name": "muon"}
    (run / "checkpoints" / "10").mkdir(parents=True)
    (run / "recipe.toml").write_text(tomli_w.dumps(table(run=str(run), optimizer=same)))
    listed = refused(optimizer={"name": "adamw"}).split("; ")
    assert listed[0] == 'optimizer.name = "muon" there, "adamw" here'
    assert "optimizer.bias_correction = nothing there, true here" in listed[1:]
    linear = {"name": "muon", "schedule": "linear"}
    listed = refused(init="models/b", lora={"rank": 8}, optimizer=linear).split("; ")
    assert listed[0] == 'init = "models/a" there, "models/b" here'
    assert listed[1] == "no [lora] there, [lora] here"
    assert listed[2] == 'optimizer.schedule = "cosine" there, "linear" here'
    one = {"train": ["a.txt", {"files": ["c.txt", "d.txt"]}]}
    assert refused(data=DATA | one, optimizer=same) == 'data.train[1].files = ["b.txt"] there, ["c.txt", "d.txt"] here'
    frozen = {"steps": 20, "freeze": ["embed"]}
    assert refused(train=frozen, optimizer=same) == 'train.freeze = [] there, ["embed"] here'


# Home folders, and how the file is encoded ----------------------------------------------


def test_a_tilde_is_the_home_folder_wherever_a_recipe_names_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = {"files": ["~/a.txt", "~/b [v2]/*.txt", "c~.txt", "~unknown-user/d.txt", "hf:org/name"]}
    found = structure(
        table(
            run="~/runs/x",
            init="easylm::~/m",
            tokenizer="~",
            data={
                "train": [source],
                "validation": "~/v.txt",
                "sequence_length": 8,
                "batch_size": 2,
                "cache": "~/cache",
            },
        )
    )
    assert (found.run, found.init, found.tokenizer) == (f"{tmp_path}/runs/x", f"easylm::{tmp_path}/m", str(tmp_path))
    assert found.data.cache == f"{tmp_path}/cache"
    assert found.data.validation[0].files == (f"{tmp_path}/v.txt",)
    expected = (f"{tmp_path}/a.txt", f"{tmp_path}/b [v2]/*.txt", "c~.txt", "~unknown-user/d.txt", "hf:org/name")
    assert found.data.train[0].files == expected
    assert structure(table(init="org/name@v~1")).init == "org/name@v~1"
    (tmp_path / "recipe.toml").write_text(write_recipe(structure(table())))
    assert read_recipe(tmp_path / "recipe.toml", ["--run=~/y"]).run == f"{tmp_path}/y"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_recipe_may_have_any_unicode_encoding_with_a_byte_order_mark(tmp_path: Path, encoding: str, line_break: str):
    text = write_recipe(structure(table(run="läufe/ß"))).replace("\n", line_break)
    (tmp_path / "recipe.toml").write_bytes(text.encode(encoding))
    assert read_recipe(tmp_path / "recipe.toml") == structure(table(run="läufe/ß"))


def test_big_endian_utf_16_is_read_by_its_mark(tmp_path: Path):
    text = write_recipe(structure(table()))
    (tmp_path / "recipe.toml").write_bytes(codecs.BOM_UTF16_BE + text.encode("utf-16-be"))
    assert read_recipe(tmp_path / "recipe.toml") == structure(table())


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
        (["--run", "2024"], "run", "2024"),
        (["--run=nan"], "run", "nan"),
        (["--run", "true"], "run", "true"),
        (["--run", "1e5"], "run", "1e5"),
        (["--run", "[1]"], "run", "[1]"),
        (["--run", "{}"], "run", "{}"),
        (["--run", "07:32:00"], "run", "07:32:00"),
        (["--run", '"a"\nb = 1'], "run", '"a"\nb = 1'),
        (["--init", "7"], "init", "7"),
        (["--tokenizer", "-0.5"], "tokenizer", "-0.5"),
        (["--data.cache", "inf"], "data.cache", "inf"),
        (["--data.train", "2024"], "data.train", (Source(files=("2024",)),)),
        (["--data.train", "[1, 2]"], "data.train", (Source(files=("[1, 2]",)),)),
        (
            ["--data.train", '{files = "1"}', "--data.train.text_key", "1"],
            "data.train",
            (Source(files=("1",), text_key="1"),),
        ),
        (["--compute.replicate", "heads"], "compute.replicate", ("heads",)),
        (["--compute.replicate", '["heads", "mlp"]'], "compute.replicate", ("heads", "mlp")),
        (["--data.train", "one.txt"], "data.train", (Source(files=("one.txt",)),)),
        (
            ["--data.train", '["a b.txt", "c.txt"]'],
            "data.train",
            (Source(files=("a b.txt",)), Source(files=("c.txt",))),
        ),
        (["--data.train", '{files = "a", text_key = "1"}'], "data.train", (Source(files=("a",), text_key="1"),)),
        (["--data.shuffle", "false"], "data.shuffle", False),
        (["--data.cache", '"1"'], "data.cache", "1"),
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
        (["--train.stpes", "3"], r"no field 'train\.stpes'\nDid you mean --train\.steps\?"),
        (["--trian.steps", "3"], r"no field 'trian'\nDid you mean 'train'\?"),
        (["--train.steps"], r"--train\.steps has no value"),
        (["steps", "3"], r"'steps' is neither an option nor its value"),
        (["--run.steps", "3"], r"run\.steps: run is not a table"),
        (["--train.steps", "3.7"], r"train\.steps: 3\.7 is not of type int"),
        (["--train.steps", "many"], r"train\.steps: 'many' is not of type int"),
        (["--train", "3"], r"train = 3 is not a table"),
        (["--data.shuffle", "2024"], r"data\.shuffle: 2024 is not of type bool"),
        (["--train.trackers", "7"], r"trackers: '7' is not one of 'tensorboard', 'wandb'"),
        (["--model.preset", "7"], r"preset.*'7'|'7'.*preset"),
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
        ({"train": {"steps": 3.7}}, r"train\.steps: 3\.7 is not of type int"),
        ({"train": {"steps": "20"}}, r"train\.steps: '20' is not of type int"),
        ({"train": {"steps": True}}, r"train\.steps: True is not of type int"),
        ({"train": {}}, r"the recipe lacks the field 'train\.steps'"),
        ({"train": 5}, r"train = 5 is not a table"),
        ({"data": [1]}, r"data = \[1\] is not a table"),
        ({"data": None}, r"the recipe lacks the field 'data'"),
        (
            {"data": DATA | {"train": [{"files": "a", "knid": "chat"}]}},
            r"'data\.train\[0\]\.knid'\nDid .*train\[0\]\.kind",
        ),
        ({"data": DATA | {"train": ["a", {"kind": "chat"}]}}, r"the recipe lacks the field 'data\.train\.files'"),
        ({"data": DATA | {"train": ["a", 5]}}, r"data\.train\[1\] = 5 is not a table"),
        (
            {"data": DATA | {"train": {"files": "a", "kind": "Text"}}},
            r"^data\.train\.kind: 'Text' is not one of 'text', 'fields', 'instruct',[^\[]*'tokens'\n",
        ),
        ({"data": DATA | {"stages": [{"first_step": 5, "weights": [1]}]}}, r"1 weights for 2 sources"),
        ({"data": DATA | {"stages": [{"first": 5, "weights": [1, 1]}]}}, r"no field 'data\.stages\[0\]\.first'"),
        ({"optimizer": {"learning_rate": "1e-4"}}, r"optimizer\.learning_rate: '1e-4' is not of type float"),
        ({"optimizer": {"learning_rate": -1.0}}, r"optimizer\.learning_rate = -1\.0\nChoose a number above 0"),
        ({"run": 5}, r"run: 5 is not of type str"),
        ({"compute": {"dtype": "int8"}}, r"^compute\.dtype: 'int8' is not one of 'float32', [^\[]*\n"),
        ({"compute": {"dtype": ["float32"]}}, r"^compute\.dtype: \['float32'\] is not one of 'float32', "),
        ({"compute": {"attention": "flash"}}, r"compute\.attention: .*flash"),
        ({"compute": {"replicate": [1]}}, r"compute\.replicate.*1 is not of type str"),
        ({"compute": {"replicate": {"a": 1}}}, r"compute\.replicate.*is not a list"),
        ({"train": {"steps": 0}}, r"train\.steps = 0\n.*1 or more"),
        ({"train": {"steps": 5, "evaluate_every": 0}}, r"train\.evaluate_every = 0"),
        ({"dropout": {"residual": 1.0}}, r"dropout\.residual = 1\.0\nIt is a probability"),
        ({"dropout": {"attention": -0.1}}, r"dropout\.attention = -0\.1\nIt is a probability"),
        ({"dropout": {"embedding": math.nan}}, r"dropout\.embedding = nan\nIt is a prob"),
        ({"dropout": {"mlp": 1.5}}, r"dropout\.mlp = 1\.5\nIt is a probability"),
        ({"dropout": {"forgetful_max_ratio": 1.0}}, r"dropout\.forgetful_max_ratio = 1\.0\nIt is a probability"),
        (
            {"dropout": {"forgetful_min_ratio": 0.2, "forgetful_max_ratio": 0.1}},
            r"forgetful_min_ratio = 0\.2 exceeds forgetful_max_ratio = 0\.1\nSet dropout\.forgetful_max_ratio",
        ),
        (
            {"train": {"steps": 5, "residual_dropout": 0.1}},
            r"no field 'train\.residual_dropout'\nDid you mean 'dropout\.residual'\? The field was renamed",
        ),
        ({"loss": {"z": -1e-4}}, r"loss\.z = -0\.0001\nChoose a number of 0 or more"),
        ({"loss": {"z": math.inf}}, r"loss\.z = inf\nChoose a number"),
        ({"loss": {"label_smoothing": 1.0}}, r"loss\.label_smoothing = 1\.0\nIt is a probability"),
        ({"loss": {"average": "row"}}, r"loss\.average: 'row' is not one of 'tokens', 'rows'"),
        ({"train": {"steps": 5, "metrics": ["acc"]}}, r"train\.metrics: 'acc' is not one of 'accuracy', 'param_norm'"),
        ({"train": {"steps": 5, "checkpoint_every": -1}}, r"train\.checkpoint_every = -1"),
        ({"init": None}, r"neither init nor model"),
        ({"init": None, "model": MODEL}, r"has a model and no tokenizer"),
        ({"init": None, "tokenizer": "t", "model": MODEL | {"num_kv_heads": 3}}, r"num_heads = 8 is not a multiple"),
        ({"init": None, "tokenizer": "t", "model": {"vocab_size": 9}}, r"the recipe lacks the field 'model\."),
    ],
    ids=str,
)
def test_a_recipe_that_is_not_understood_is_refused_with_the_field_and_a_way_out(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as refusal:
        structure(table(**change))
    assert refusal.value.advice


def test_loss_dropout_and_metrics_reach_the_step():
    tables = {
        "loss": {"average": "rows", "z": 1e-4, "label_smoothing": 0.1},
        "dropout": {"embedding": 0.1, "attention": 0.2, "residual": 0.3, "mlp": 0.4, "forgetful_max_ratio": 0.15},
    }
    fields = {**tables, "train": {"steps": 5, "seed": 3, "metrics": ["accuracy", "param_norm"]}}
    recipe = structure(table(init=None, tokenizer="tok", model=MODEL, **fields))
    assert recipe.model is not None
    step = _train_step(recipe, recipe.model)
    assert isinstance(step.objective, NextTokenLoss)
    assert step.objective.loss == LossConfig(**tables["loss"])
    assert step.objective.dropout == DropoutConfig(**tables["dropout"])
    assert (step.objective.accuracy, step.param_norm, step.seed) == (True, True, 3)
    plain = _train_step(structure(table(init=None, tokenizer="tok", model=MODEL)), recipe.model)
    assert isinstance(plain.objective, NextTokenLoss)
    assert (plain.objective.accuracy, plain.param_norm) == (False, False)


def test_an_older_run_with_dropout_is_resumed_by_the_new_names(tmp_path: Path):
    """The recipe in its folder has the old ones, and no [loss] or [dropout]."""
    old = {"embedding_dropout": 0.1, "attention_dropout": 0.2, "residual_dropout": 0.3}
    run = tmp_path / "run"
    (run / "checkpoints" / "10").mkdir(parents=True)
    (run / "recipe.toml").write_text(tomli_w.dumps(table(run=str(run), train={"steps": 20, **old})))
    kept = kept_recipe(run)
    assert kept is not None
    assert kept.dropout == DropoutConfig(embedding=0.1, attention=0.2, residual=0.3)
    assert kept.loss == LossConfig()
    rates = {"embedding": 0.1, "attention": 0.2, "residual": 0.3}
    check_folder(run, completed(structure(table(run=str(run), dropout=rates)), kept))
    with pytest.raises(UserError, match=r"dropout\.residual = 0\.3 there, 0\.0 here"):
        check_folder(run, completed(structure(table(run=str(run), dropout=rates | {"residual": 0.0})), kept))


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
        ("\xff", r"recipe\.toml is not utf-8 at byte 0\nSave the file as UTF-8\."),
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
