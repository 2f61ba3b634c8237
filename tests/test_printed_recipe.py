"""What is printed about a recipe besides its fields: defaults that follow from others, and too large a batch."""

import dataclasses
import tomllib
from typing import Any

import pytest
import tomli_w

from camelid.data.config import DataConfig, Source
from camelid.data.report import SilentRows
from camelid.runs.notes import batch_notes, counted, silent_row_notes, times
from camelid.runs.recipe import structure
from camelid.runs.recipe_defaults import with_defaults
from runs import lay_over

FROM_STEPS = ("decay_steps", "warmup_steps")


def table(**fields: Any) -> dict[str, Any]:
    data = {"train": [{"files": "a.jsonl", "kind": "chat"}], "sequence_length": 8, "batch_size": 2}
    return lay_over({"run": "out", "init": "model", "data": data, "train": {"steps": 200}}, fields)


def printed(given: dict[str, Any]) -> dict[str, list[str]]:
    """The comments by section, each without what follows its value; the text itself still holds the table."""
    text = with_defaults(tomli_w.dumps(given), given, structure(given))
    assert tomllib.loads(text) == given
    first, *lines = text.splitlines()
    assert first.startswith("# Lines that begin with #")
    found: dict[str, list[str]] = {}
    section = ""
    for line in lines:
        section = line.strip("[]") if line.startswith("[") else section
        if line.startswith("# "):
            found.setdefault(section, []).append(line.removeprefix("# ").rpartition("  # ")[0])
    return found


def test_defaults_that_follow_from_other_fields_are_comments():
    samples = {"prompts": ["One day"]}
    given = table(lora={"rank": 8}, compute={"dtype": "bfloat16"}, mesh={"data": 2}, samples=samples)
    comments = printed(given)
    assert comments == {
        "": ['tokenizer = "model"'],
        "data": ['packing = "best_fit"'],
        "lora": ["alpha = 16.0", 'base = "bfloat16"'],
        "samples": ["every = 200"],
    }
    assert printed(given | {"train": {"steps": 200, "evaluate_every": 50}})["samples"] == ["every = 50"]


def test_what_is_given_has_no_comment():
    lora = {"rank": 8, "alpha": 3.0, "base": "nf4"}
    given = table(lora=lora, tokenizer="mine", data__packing="none", optimizer={"schedule": "constant"})
    assert printed(given).keys() == {"optimizer"}
    assert not [line for line in printed(given)["optimizer"] if line.startswith(("schedule", "decay_steps"))]
    whole = table(tokenizer="mine", data__packing="none")
    assert with_defaults(tomli_w.dumps(whole), whole, structure(whole)) == tomli_w.dumps(whole)


@pytest.mark.parametrize("name", ["adamw", "palm", "muon", "sgd"])
def test_the_comments_of_an_optimizer_are_what_is_used(name: str):
    given = table(optimizer={"name": name, "warmup_ratio": 0.1, "schedule": "wsd"})
    lines = printed(given)["optimizer"]
    fields = tomllib.loads("\n".join(lines))
    assert {key: fields.pop(key) for key in FROM_STEPS} == {"decay_steps": 200, "warmup_steps": 20}
    plain = structure(given).optimizer
    assert structure(lay_over(given, {f"optimizer__{key}": value for key, value in fields.items()})).optimizer == plain
    values = dataclasses.asdict(plain)
    assert {key for key, value in values.items() if value is not None} - fields.keys() == {
        *("name", "warmup_ratio", "schedule", "clip_norm", "factors")
    }


def test_a_batch_of_more_rows_than_there_are_is_noted():
    data = DataConfig(train=(Source(files=("a",)),), sequence_length=8, batch_size=12)
    (note,) = batch_notes(data, 5.0)
    assert "fills 5 rows of 8 tokens, and data.batch_size is 12, so that each step reads it 2.4 times" in note
    (note,) = batch_notes(data, 1.0)
    assert "fills 1 row of 8 tokens, and data.batch_size is 12, so that each step reads it 12 times" in note
    assert not list(batch_notes(data, 12.0))


@pytest.mark.parametrize(
    ("number", "rows", "often"),
    [
        (1, "1 row", "once"),
        (1.0, "1 row", "once"),
        (0.5, "0.5 rows", "0.5 times"),
        (8, "8 rows", "8 times"),
        (2500, "2,500 rows", "2,500 times"),
        (123456, "123,456 rows", "120,000 times"),
        (123456.0, "123,500 rows", "120,000 times"),
        (8e-6, "0.000008 rows", "0.000008 times"),
    ],
)
def test_notes_have_plain_numbers_with_the_singular_for_one(number: float, rows: str, often: str):
    assert counted(number, "row") == rows
    assert times(number) == often


def test_the_note_on_one_row_without_a_loss_has_the_singular():
    (note,) = silent_row_notes([SilentRows(number=1, examined=5, rows=9)])
    assert note.startswith("1 of the first 5 rows of source 1 has no loss: the weights of all its tokens are 0. ")
