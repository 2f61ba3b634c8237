"""`camelid evaluate perplexity` of answers and of a recipe: the validation loss that a run reports."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import camelid.runs.run
from camelid.parallel.mesh import one_device
from camelid.runs.run import run
from camelid.train.loggers import read_metrics
from runs import assert_refused, called, recipe, stories_run, tiny_run

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Path:
    """A folder with `run`, which trained on instructions and validated on held_out.jsonl."""
    folder = tmp_path_factory.mktemp("evaluation")
    records = json.loads((assets / "data" / "instruct" / "rasbt-instruction-data.json").read_text())
    write(folder / "train.jsonl", *records[:24])
    write(folder / "held_out.jsonl", *records[24:60])
    read = {"kind": "instruct", "template": "alpaca"}
    data: dict[str, Any] = {
        "train": [{"files": [str(folder / "train.jsonl")], **read}],
        "validation": [{"files": [str(folder / "held_out.jsonl")], **read}],
        "sequence_length": 192,
        "batch_size": 4,
        "overlong": "truncate",
    }
    table = stories_run(folder, assets, data=data, optimizer={"learning_rate": 3e-3})
    table["train"] |= {"steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
        assert run(recipe(table)).finished
    return folder


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evaluated(*arguments: object) -> dict[str, Any]:
    done = called("evaluate", "perplexity", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_loss_of_answers_is_the_validation_loss_of_a_run(work: Path, stories: Path):
    rows = read_metrics(work / "run" / "metrics.jsonl")
    before, after = (row["validation_loss"] for row in rows if "validation_loss" in row)
    assert before - after > 0.01
    for model, expected in ((stories, before), (work / "run", after)):
        of_recipe = evaluated(model, work / "run")
        of_file = evaluated(model, work / "held_out.jsonl", "--sequence-length", 192)
        assert of_recipe["loss"] == pytest.approx(expected, rel=1e-6)
        assert of_file == pytest.approx(of_recipe, rel=1e-6)
        assert of_recipe["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    # Answers alone, which end with EOS: fewer tokens than the texts, and more than half of them are prompts.
    records = [json.loads(line) for line in (work / "held_out.jsonl").read_text().splitlines()]
    tokenizer = camelid.load(stories).tokenizer
    assert tokenizer is not None
    answers = sum(len(tokenizer.encode(record["output"], bos=False)) for record in records)
    assert 0.8 * answers < of_recipe["tokens"] < 1.2 * answers


def test_the_result_is_printed_with_the_template_that_is_assumed(work: Path, stories: Path):
    done = called("evaluate", "perplexity", stories, work / "held_out.jsonl", "--sequence-length", 192)
    assert "has no chat template: 'alpaca' is used" in done.stderr
    assert "nats per token of the answers\n" in done.stdout
    named = called("evaluate", "perplexity", stories, work / "held_out.jsonl", "--template", "alpaca")
    assert "has no chat template" not in named.stderr
    assert "truncated" not in named.stderr
    of_recipe = called("evaluate", "perplexity", stories, work / "run")
    assert "nats per token of the validation data\n" in of_recipe.stdout


def test_truncated_answers_are_noted_and_tokens_are_counted(work: Path, stories: Path):
    short, long = ({"instruction": "Repeat", "output": "dog " * count} for count in (1, 200))
    given = write(work / "long.jsonl", short, long, short), "--template", "alpaca", "--sequence-length"
    done = called("evaluate", "perplexity", stories, *given, 256, "--json")
    note = re.search(r"note: 1 of 3 examples is longer than a row of 256 tokens, and is truncated; .*", done.stderr)
    assert note is not None, done.stderr
    tokenizer = camelid.load(stories).tokenizer
    assert tokenizer is not None
    tokens = len(tokenizer.encode("dog " * 200, bos=False))
    assert tokens < int(note.group().split()[-1].replace(",", "")) < tokens + 256
    assert isinstance(json.loads(done.stdout)["tokens"], int)


def test_rows_that_prompts_fill_are_refused(work: Path, stories: Path):
    refused = called("evaluate", "perplexity", stories, work / "held_out.jsonl", "--sequence-length", 10)
    assert_refused(refused, "held_out.jsonl: no answer has a token with a loss in rows of 10 tokens")
    assert "Increase --sequence-length, up to the context of the model, 512 tokens" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["held_out.jsonl", "story.txt"], "some files hold texts, and others examples with answers"),
        (["held_out.jsonl", "--max-tokens", "10"], "--max-tokens does not apply to"),
        (["run", "--sequence-length", "10"], "--sequence-length does not apply to"),
        (["story.txt", "--template", "alpaca"], "--template does not apply to"),
        (["run", "held_out.jsonl"], "is a recipe, and there is more than its validation data"),
        (["none.toml"], "has no validation data"),
        (["pairs.toml"], "the recipe has [dpo], whose loss compares the model with the reference of its run"),
        (["bad.toml"], "bad.toml is not TOML"),
        (["held_out.jsonl", "--sequence-length", "1000"], "rows of 1000 tokens exceed the context of 512"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(work: Path, stories: Path, arguments: list[str], message: str):
    (work / "story.txt").write_text("One day, Tim saw a dog.")
    table = tiny_run(work, run=str(work / "other"))
    (work / "none.toml").write_text(tomli_w.dumps(table))
    pairs = table | {"dpo": {}, "data": table["data"] | {"train": [{"files": ["x.jsonl"], "kind": "preference"}]}}
    pairs = {name: value for name, value in pairs.items() if name != "model"} | {"init": str(stories)}
    (work / "pairs.toml").write_text(tomli_w.dumps(pairs))
    (work / "bad.toml").write_text("run =")
    given = [work / each if (work / each).exists() else each for each in arguments]
    assert_refused(called("evaluate", "perplexity", stories, *given), message)
