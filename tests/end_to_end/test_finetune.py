"""`camelid finetune`: the recipe that it prints, the run that it trains, and what it refuses."""

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from camelid.runs import finetune_defaults
from camelid.runs.finetune import Request
from camelid.runs.recipe import structure
from camelid.train.loggers import read_metrics
from runs import assert_refused, called

PAIR = {"prompt": "Who is Tim?", "chosen": "A boy.", "rejected": "A dog."}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: Path) -> Path:
    """The current folder, with 240 real instructions."""
    monkeypatch.chdir(tmp_path)
    records = json.loads((assets / "data" / "instruct" / "rasbt-instruction-data.json").read_text())
    write(Path("instruct.jsonl"), *records[:240])
    return tmp_path


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def printed(*arguments: object) -> dict[str, Any]:
    done = called("finetune", *arguments, "--print-recipe")
    assert done.returncode == 0, done.stderr
    Path("printed.toml").write_text(done.stdout)
    again = called("train", "printed.toml", "--print-recipe")  # it is a recipe for `camelid train`
    assert again.returncode == 0, again.stderr
    return tomllib.loads(done.stdout)


def test_the_recipe_fits_the_data_and_the_model(stories: Path, work: Path):
    table = printed(stories, "instruct.jsonl")
    assert table["run"] == "runs/stories260K-instruct"
    assert table["init"] == str(stories)
    assert table["data"]["train"] == [{"files": "instruct.jsonl", "kind": "instruct", "template": "alpaca"}]
    assert table["data"]["sequence_length"] == 512  # the context
    assert table["data"]["batch_size"] == 8  # one row for each device
    assert table["data"]["validation_fraction"] == 0.05
    assert table["compute"] == {"dtype": "float32"}
    assert table["optimizer"] == {"learning_rate": 1e-3, "warmup_ratio": 0.03, "weight_decay": 0.0}
    assert 20 < table["train"]["steps"] < 60
    assert "lora" not in table
    assert not Path("runs").exists()


def test_fields_that_are_given_are_kept_and_the_others_chosen_around_them(stories: Path, work: Path):
    options = ["--lora.rank", 4, "--data.sequence-length", 128, "--optimizer.warmup_steps", 5, "--data.batch_size", 16]
    table = printed(stories, "instruct.jsonl", *options, "--template", "zephyr")
    usual = printed(stories, "instruct.jsonl", "--lora")
    assert (table["lora"], usual["lora"]) == ({"rank": 4}, {"rank": 16})
    assert (table["run"], usual["run"]) == ("runs/stories260K-instruct-lora",) * 2
    assert table["optimizer"] == {"learning_rate": 5e-3, "warmup_steps": 5, "weight_decay": 0.0}
    assert table["data"]["train"][0]["template"] == "zephyr"
    assert table["data"]["overlong"] == "truncate"  # some are longer than 128
    assert table["train"]["steps"] != usual["train"]["steps"]  # of shorter rows, and more of them
    assert structure(table).lora is not None


@pytest.mark.quick_compile
def test_preferences_are_trained_on_with_dpo(stories: Path, work: Path):
    write(Path("pairs.jsonl"), *({**PAIR, "prompt": f"Who is {n}?"} for n in range(300)))
    table = printed(stories, "pairs.jsonl", "--dpo", "--lora")
    assert table["data"]["train"] == [{"files": "pairs.jsonl", "kind": "preference", "template": "zephyr"}]
    assert table["run"] == "runs/stories260K-pairs-lora-dpo"
    assert table["dpo"] == {"beta": 0.1}
    assert table["optimizer"] == {"learning_rate": 2.5e-4, "warmup_ratio": 0.1, "weight_decay": 0.0}
    # Both answers of a pair are in one row.
    assert table["data"]["sequence_length"] == 256
    short = ["--data.sequence_length", 128, "--data.validation_fraction", 0.0]
    done = called("finetune", stories, "pairs.jsonl", "--dpo", "--lora", "--train.steps", 2, "--out", "x", *short)
    assert done.returncode == 0, done.stderr
    (first, _) = [row for row in read_metrics(Path("x/metrics.jsonl")) if "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4)


def test_several_files_and_texts(stories: Path, work: Path, assets: Path):
    story = assets / "data" / "tinystories" / "tinystories_sample.txt"
    write(Path("more.jsonl"), {"instruction": "Say hello.", "output": "Hello."})
    table = printed(stories, "instruct.jsonl", "more.jsonl", story)
    first, second = table["data"]["train"]
    assert first["files"] == ["instruct.jsonl", "more.jsonl"]
    assert second == {"files": str(story), "kind": "text"}
    assert table["run"] == "runs/stories260K-instruct-2_more"
    assert "overlong" not in table["data"]  # the story is longer than a row, and no part of it is lost
    other = printed(stories, "instruct.jsonl", "--data.sequence_length", 128, "--data.packing", "stream")
    assert "overlong" not in other["data"]
    texts = printed(stories, story)
    assert texts["data"]["train"] == [{"files": str(story), "kind": "text"}]
    assert "overlong" not in texts["data"]


@pytest.mark.quick_compile
def test_a_run_trains_says_what_to_try_next_and_is_resumed_by_the_same_command(
    stories: Path, work: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ["finetune", stories, "instruct.jsonl", "--lora", "--out", "x", "--data.sequence_length", 256]
    command += ["--data.overlong", "drop", "--data.validation_fraction", 0.0]
    done = called(*command, "--train.steps", 2)
    assert done.returncode == 0, done.stderr
    for line in ("[lora]", "camelid generate x ", "camelid convert x merged", "camelid evaluate perplexity x "):
        assert line in done.stderr
    assert Path("x/adapter/adapter_model.safetensors").is_file()
    # What is chosen may change, with other devices for example; the run keeps what it began with.
    monkeypatch.setattr(finetune_defaults, "learning_rate", lambda *size: 0.5)
    again = called(*command)
    assert again.returncode == 0, again.stderr
    assert "x has a run of this model and data" in again.stderr
    assert "this run is finished: it has made all 2 steps" in again.stderr
    more = called(*command, "--train.steps", 3)
    assert more.returncode == 0, more.stderr
    rows = [row for row in read_metrics(Path("x/metrics.jsonl")) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(row["learning_rate"] for row in rows) <= 5e-3
    # Another run is refused, by the names of this command.
    write(Path("other.jsonl"), {"instruction": "Say hello.", "output": "Hello."})
    other = called("finetune", stories, "other.jsonl", "--lora", "--out", "x")
    assert_refused(other, 'another recipe: data.train.files = ["instruct.jsonl"] there, ["other.jsonl"] here')
    full = called("finetune", stories, "instruct.jsonl", "--out", "x")
    assert_refused(full, "x has a run with another recipe: [lora] there, no [lora] here")
    kind = called(*command, "--template", "zephyr")
    assert_refused(kind, 'x has a run with another recipe: data.train.template = "alpaca" there, "zephyr" here')
    assert "Choose another --out" in full.stderr
    rate = called(*command, "--optimizer.learning_rate", 1e-4)
    assert_refused(rate, "another recipe", "learning_rate")
    assert "Choose another --out" in rate.stderr


def test_the_note_on_the_data_has_the_singular_and_plain_numbers(stories: Path, work: Path):
    write(Path("one.jsonl"), {"instruction": "Say hello.", "output": "Hello."})
    steps, rows = ("--train.steps", 5000), ("--data.batch_size", 8)
    done = called("finetune", stories, "one.jsonl", *steps, *rows, "--print-recipe")
    assert "1 example fills 1 row, which 5,000 steps of 8 rows read 40,000 times" in done.stderr
    done = called("finetune", stories, "one.jsonl", "--train.steps", 1, *rows, "--print-recipe")
    assert "1 example fills 1 row, which 1 step of 8 rows reads 8 times" in done.stderr


def test_a_record_that_cannot_be_used_is_skipped_by_the_option_that_the_error_names(stories: Path, work: Path):
    write(Path("pairs.jsonl"), *({**PAIR, "prompt": f"Who is {n}?"} for n in range(9)), {**PAIR, "rejected": "A boy."})
    command = ["finetune", stories, "pairs.jsonl", "--dpo", "--print-recipe"]
    refused = called(*command)
    assert_refused(refused, "pairs.jsonl, line 10: chosen and rejected are equal")
    assert "set --max-unreadable to the fraction" in refused.stderr
    assert "or raise --max-unreadable" in called(*command, "--max-unreadable", 0.01).stderr
    done = called(*command, "--max-unreadable", 0.1)
    assert done.returncode == 0, done.stderr
    assert "9 examples fill" in done.stderr


def test_pairs_that_are_not_used_are_noted(stories: Path, work: Path):
    write(Path("both.jsonl"), {"instruction": "Say hello.", "output": "Hello.", "chosen": "Hello.", "rejected": "No."})
    ignored = "both.jsonl is read as kind 'instruct': its keys chosen and rejected are ignored; --dpo trains on them"
    command = ["finetune", stories, "both.jsonl", "--train.steps", 1, "--print-recipe"]
    assert ignored in called(*command).stderr
    assert "are ignored" not in called(*command, "--kind", "instruct").stderr
    assert "are ignored" not in called(*command, "--dpo").stderr
    assert "are ignored" not in called("finetune", stories, "instruct.jsonl", "--print-recipe").stderr


def test_what_is_contradictory_is_refused_before_the_model_is_read(work: Path):
    write(Path("pairs.jsonl"), PAIR)
    write(Path("odd.jsonl"), {"q": "a", "a": "b"})
    for arguments, problem, advice in (
        (["pairs.jsonl"], "pairs.jsonl holds pairs", "Add --dpo"),
        (["instruct.jsonl", "--dpo"], "instruct.jsonl holds no preferences", "leave it out"),
        (["instruct.jsonl", "--dpo", "--kind", "instruct"], "read as kind 'instruct'", "Leave out --dpo"),
        (["odd.jsonl"], "odd.jsonl: its records have the keys 'q', 'a'", "--fields '[q],a'"),
        (["none.jsonl"], "none.jsonl matches no file", "Check the path"),
        ([], "finetune needs DATA...", "camelid finetune --help"),
    ):
        done = called("finetune", "no-model-here", *arguments)
        assert_refused(done, problem)
        assert advice in done.stderr


def test_the_data_are_named_by_arguments_alone(stories: Path, work: Path):
    done = called("finetune", stories, "instruct.jsonl", "--data.train", "other.jsonl")
    assert_refused(done, "data.train is set by the arguments after MODEL")


def test_a_field_that_does_not_exist_is_named_with_the_option_to_set(stories: Path, work: Path):
    done = called("finetune", stories, "instruct.jsonl", "--optimizer.lr", 1e-4)
    assert_refused(done, "no field 'optimizer.lr'")
    assert_refused(called("finetune", stories, "instruct.jsonl", "--train.steps", "many"), "train.steps: 'many'")
    done = called("finetune", stories, "instruct.jsonl", "--optimizer.lr", 1e-4)
    assert "--optimizer.learning-rate" in done.stderr


@pytest.mark.parametrize(
    ("model", "data", "fields", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", ["alpaca_data.json"], {}, "Llama-2-7b-hf-alpaca_data"),
        ("models/stories/hf/", ["a.jsonl.gz", "b.txt"], {"lora": {}}, "stories-a-1_more-lora"),
        ("easylm::x/streaming_params", ["chats/*.jsonl"], {"dpo": {}}, "streaming_params-chats-dpo"),
        ("runs/chat/model", ["hf:tatsu-lab/alpaca"], {}, "chat-alpaca"),
    ],
)
def test_the_folder_of_a_run_is_named_after_model_data_and_method(
    model: str, data: list[str], fields: dict[str, Any], name: str
):
    request = Request(model=model, data=tuple(data), lora="lora" in fields, dpo="dpo" in fields)
    assert request.run == str(Path("runs", name))
