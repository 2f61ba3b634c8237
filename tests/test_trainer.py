"""camelid.Trainer: the runs, losses and generations of the commands, from Python."""

import json
import multiprocessing
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid
from camelid import Trainer, TrainEvent, UserError
from camelid.data.config import Source
from camelid.data.preparation.prepare import prepare
from camelid.evaluate.perplexity import perplexity
from camelid.runs.datasets import Rows, names_or_rows
from camelid.runs.recipe import structure
from runs import VOCAB, called, losses, tensor_bytes, tiny_run, write_recipe_file, write_text
from text.tiny import BOS, save_byte_tokenizer
from tiny import save_hf, tiny_config, tiny_params, transformers_twin

pytestmark = pytest.mark.quick_compile

TEXTS = [f"The {color} camel saw {number} dogs." for color in ("red", "blue", "old") for number in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word * 3}]}
    for word in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")
]
ARGUMENTS = ("train", "validation")
SIZES = {"data.sequence_length": 16, "data.batch_size": 8, "train.steps": 4}
TINY = {**SIZES, "data.sequence_length": 64, "train.steps": 2, "optimizer.learning_rate": 1e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny model, with a tokenizer of bytes."""
    config = tiny_config(vocab_size=VOCAB, bos_id=BOS, eos_ids=(257,), context_length=512)
    folder = save_hf(transformers_twin(config, tiny_params(config, scale=1.0)), tmp_path_factory.mktemp("model"))
    return save_byte_tokenizer(folder)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def without_data(table: dict[str, Any]) -> dict[str, Any]:
    return {**table, "data": {name: value for name, value in table["data"].items() if name not in ARGUMENTS}}


# Training ---------------------------------------------------------------------------------


def test_the_losses_are_those_of_the_command_however_the_recipe_and_the_data_are_given(tmp_path: Path):
    table = tiny_run(tmp_path, run="command", train__steps=4, data__validation=["held_out.jsonl"])
    write_text(tmp_path / "held_out.jsonl", documents=5)
    file = write_recipe_file(table, tmp_path / "recipe.toml")
    done = called("train", file)
    assert done.returncode == 0, done.stderr
    expected = [row["loss"] for row in losses(Path("command"))]
    assert len(set(expected)) == 4
    text, held_out = Path("text.jsonl"), Path("held_out.jsonl")
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    held_out_rows = (json.loads(line) for line in held_out.read_text().splitlines())
    dotted = {name: value for name, value in without_data(table).items() if name != "train"} | {"train.steps": 4}
    for number, (args, datasets) in enumerate(
        [
            (file, {}),
            (structure(table), {"train_dataset": text, "eval_dataset": [held_out]}),
            (dotted, {"train_dataset": rows, "eval_dataset": held_out_rows}),
        ]
    ):
        trainer = Trainer(args=args, overrides={"run": f"run{number}"}, **datasets)
        result = trainer.train()
        assert (result.folder, result.steps, result.finished) == (tmp_path / f"run{number}", 4, True)
        assert [row["loss"] for row in result.history if "loss" in row] == expected
        assert tensor_bytes(Path(f"run{number}/model")) == tensor_bytes(Path("command/model"))
        validated = [row["validation_loss"] for row in result.history if "validation_loss" in row]
        assert result.metrics["validation_loss"] == validated[-1]
        assert result.metrics["loss"] == expected[-1]
        # The same rows, of the same parameters, in the same batches.
        assert trainer.evaluate()["loss"] == validated[-1]


def test_a_story_from_random_values_to_a_text(tmp_path: Path):
    table = without_data(tiny_run(tmp_path, train__steps=6, optimizer__learning_rate=1e-2))
    trainer = Trainer(train_dataset=TEXTS, eval_dataset=TEXTS[:4], args={**table, "run": "run"})
    with pytest.raises(UserError, match="random values before it is trained"):
        trainer.predict("The")
    result = trainer.train()
    after, before = trainer.evaluate(), result.history[0]["validation_loss"]
    assert after["loss"] < before
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]))
    assert result.metrics["validation_loss"] == after["loss"]
    (completion,) = trainer.predict("The", max_new_tokens=6)
    assert completion == camelid.load("run").generate("The", max_new_tokens=6)[0]
    assert completion == result.model().generate("The", max_new_tokens=6)[0]
    # Another process finds the run by its folder.
    later = Trainer(args={"run": "run"})
    assert later.predict("The", predict_checkpoint=True, max_new_tokens=6) == [completion]
    assert later.evaluate(TEXTS[:4], eval_checkpoint=True)["loss"] == after["loss"]
    assert later.predict(["The"], "run/model", max_new_tokens=6) == [completion]


def test_a_run_is_resumed_and_other_rows_are_refused(tmp_path: Path):
    table = without_data(tiny_run(tmp_path, run="run", train__checkpoint_every=2))
    whole = Trainer(args=table, train_dataset=TEXTS, overrides={"run": "whole"}).train()

    def stop(event: TrainEvent) -> None:
        if (event.kind, event.step) == ("save", 2):
            signal.raise_signal(signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    rows = list(TEXTS)
    trainer = Trainer(args=table, train_dataset=rows, callbacks=[stop])
    first = trainer.train()
    assert (first.steps, first.finished) == (3, False)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    rows[0] = "Another text."
    with pytest.raises(UserError, match=r"(?s)another recipe: data\.train.*args=\{'run'"):
        trainer.train()
    rows[0] = TEXTS[0]
    second = trainer.train()
    assert (second.steps, second.finished) == (4, True)
    assert [row["loss"] for row in losses(second.folder)] == [row["loss"] for row in losses(whole.folder)]
    steps = [row["step"] for row in second.history if "loss" in row]
    assert steps == [1, 2, 3, 4]
    assert trainer.train().steps == 4  # it is finished
    assert trainer.train(from_step=3).steps == 4
    assert Path("run/set_aside_1/4").is_dir()


def test_a_model_in_memory_is_trained_like_its_checkpoint(model: Path):
    args = {**SIZES, "train.steps": 2}
    paths = Trainer(model=model, train_dataset=TEXTS, args={"run": "path", **args}).train()
    loaded = camelid.load(model)
    trainer = Trainer(model=loaded, train_dataset=TEXTS, args={"run": "run", **args})
    result = trainer.train()
    assert [row["loss"] for row in losses(result.folder)] == [row["loss"] for row in losses(paths.folder)]
    assert trainer.train().steps == 2  # it is the same model: the run is finished
    other = camelid.load(paths.folder)
    with pytest.raises(UserError, match="has a run with another recipe: init"):
        Trainer(model=other, train_dataset=TEXTS, args={"run": "run", **args}).train()


# Finetuning -------------------------------------------------------------------------------


def test_chats_are_finetuned_with_adapters_as_the_command_does(model: Path):
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    options = [f"--{name}={value}" for name, value in TINY.items()]
    done = called("finetune", model, "chats.jsonl", "--lora.rank", 4, *options, "--out", "command")
    assert done.returncode == 0, done.stderr
    args = {"lora": {"rank": 4}, **TINY}
    trainer = Trainer(model=model, train_dataset=iter(CHATS), eval_dataset=CHATS[:2], args=args)
    before = trainer.evaluate()
    result = trainer.finetune()
    assert result.folder == Path(f"runs/{model.name}-rows-lora").resolve()
    assert [row["loss"] for row in losses(result.folder)] == [row["loss"] for row in losses(Path("command"))]
    assert result.saved == (result.folder / "adapter",)
    assert tensor_bytes(result.folder / "adapter") == tensor_bytes(Path("command/adapter"))
    # A template was chosen for the validation data, too.
    assert result.history[0]["validation_loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert trainer.evaluate()["loss"] == pytest.approx(result.metrics["validation_loss"], rel=1e-6)
    assert trainer.evaluate()["loss"] < before["loss"]
    assert trainer.evaluate(eval_checkpoint=False)["loss"] == pytest.approx(before["loss"], rel=1e-6)
    (answer,) = trainer.predict("Say ab.", chat=True, max_new_tokens=4)
    assert "Say ab." in answer.prompt
    assert answer.prompt != "Say ab."
    loaded = camelid.load(result.folder, mesh=result.mesh)
    assert trainer.predict(["Say ab."], max_new_tokens=4) == loaded.generate("Say ab.", max_new_tokens=4)
    assert trainer.finetune().steps == 2  # the same call finds the run, which is finished
    more = Trainer(model=model, train_dataset=CHATS[:-1], args=args)
    with pytest.raises(UserError, match=r"has a run with another recipe: data\.train\.files = "):
        more.finetune()


def test_a_worker_that_runs_the_script_again_starts_nothing(model: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(model=model, train_dataset=TEXTS, eval_dataset=TEXTS, args={"run": "run", **SIZES})
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    for call in (trainer.train, trainer.finetune, trainer.evaluate, lambda: trainer.predict("a")):
        refused(call, "each of them runs the script again", "__main__")
    assert not Path("run").exists()


# Evaluation -------------------------------------------------------------------------------


def test_instructions_with_inputs_are_evaluated_as_in_the_run(model: Path):
    rows = [{"instruction": "Repeat", "input": word, "output": word * 2} for word in ("ab", "cd", "ef")]
    args = {"run": "run", **TINY, "data.sequence_length": 512, "train.steps": 1}  # the template is long
    trainer = Trainer(model=model, train_dataset=rows, eval_dataset=rows[:2], args=args)
    result = trainer.finetune()
    assert result.metrics["validation_loss"] == trainer.evaluate()["loss"]


def test_the_loss_of_a_text_is_that_of_its_tokens(model: Path):
    """As `evaluate perplexity` computes it, apart from the tokens at the ends of texts."""
    loaded = camelid.load(model)
    for given in (loaded, model):
        found = Trainer(model=given).evaluate(["The old camel saw a dog."])
        ids = np.array([BOS, *b"The old camel saw a dog.", 257])
        expected = perplexity(loaded.params, ids, len(ids), 64, loaded.config, loaded.compute, loaded.mesh)
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert not Path("runs").exists()
    assert Trainer(model=loaded).predict("ab", max_new_tokens=3) == loaded.generate("ab", max_new_tokens=3)


def test_preferences_are_not_evaluated_but_their_chosen_answers_are(model: Path):
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    tokenizer = camelid.load(model).tokenizer
    assert tokenizer is not None
    Path("pairs.jsonl").write_text(json.dumps(pairs[0]))
    prepare([Source(files=("pairs.jsonl",), kind="preference", template="alpaca")], tokenizer, Path("store"))
    args = {"data.packing": "best_fit"}
    for trainer in (
        Trainer(model=model, eval_dataset=pairs),
        Trainer(model=model, eval_dataset=pairs, args={"dpo": {}}),
        Trainer(model=model, eval_dataset=pairs, dataset_options={"kind": "preference"}),
        Trainer(model=model, eval_dataset="store", args=args, dataset_options={"kind": "tokens"}),
    ):
        refused(trainer.evaluate, "preferences cannot be evaluated", "metrics.jsonl")
    chosen = Trainer(model=model, eval_dataset=pairs, dataset_options={"fields": "[prompt],chosen"})
    assert chosen.evaluate()["loss"] > 0


# Callbacks --------------------------------------------------------------------------------


def test_callbacks_are_called_when_metrics_are_written_and_checkpoints_saved(tmp_path: Path):
    fields = {"train__log_every": 2, "train__checkpoint_every": 3, "train__evaluate_every": 2}
    table = without_data(tiny_run(tmp_path, run="run", **fields))
    events: list[TrainEvent] = []
    others: list[tuple[str, int]] = []
    Trainer(
        train_dataset=TEXTS,
        eval_dataset=TEXTS[:8],
        args=table,
        callbacks=[events.append, lambda event: others.append((event.kind, event.step))],
    ).train()
    order = [(event.kind, event.step) for event in events]
    assert others == order
    assert sorted(order) == sorted(
        [("evaluate", 0), ("log", 2), ("evaluate", 2), ("save", 3), ("log", 4), ("save", 4), ("evaluate", 4)]
    )
    assert order.index(("log", 2)) < order.index(("evaluate", 2))
    assert order.index(("save", 4)) < order.index(("evaluate", 4))
    assert {event.folder for event in events} == {tmp_path / "run"}
    rows = [{"step": event.step, **event.metrics} for event in events if event.kind != "save"]
    written = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows == written


def test_an_exception_of_a_callback_ends_the_run_which_can_be_resumed(tmp_path: Path):
    class Enough(Exception):
        pass

    def stop(event: TrainEvent) -> None:
        if (event.kind, event.step) == ("log", 3):
            raise Enough

    table = without_data(tiny_run(tmp_path, run="run", train__checkpoint_every=2))
    with pytest.raises(Enough):
        Trainer(train_dataset=TEXTS, args=table, callbacks=[stop]).train()
    assert losses(Path("run"))[-1]["step"] == 3
    assert [folder.name for folder in Path("run/checkpoints").iterdir() if folder.name.isdecimal()] == ["2"]
    # The folder is not locked any more, and no handler of a signal is left.
    assert Trainer(train_dataset=TEXTS, args=table).train().steps == 4
    assert [row["step"] for row in losses(Path("run"))] == [1, 2, 3, 4]


# Datasets ---------------------------------------------------------------------------------


def rows_of(dataset: Any) -> Rows:
    found = names_or_rows(dataset, "data")
    assert isinstance(found, Rows)
    return found


def file_of(dataset: Any) -> Path:
    return Path(rows_of(dataset).file(Path("inputs")))


def test_strings_are_names_if_they_could_be():
    Path("story").write_text("A story.")
    assert names_or_rows("missing.jsonl", "data") == ("missing.jsonl",)
    assert names_or_rows(["a.jsonl", "texts/*.txt", Path("b"), "hf:c/d", "story"], "data") == (
        ("a.jsonl", "texts/*.txt", "b", "hf:c/d", "story")
    )
    assert file_of(["One day.", "a story"]).read_text() == '{"text": "One day."}\n{"text": "a story"}\n'
    for mixed in (["One day.", "story"], ["story", "One day."], [{"text": "a"}, Path("story")]):
        with pytest.raises(UserError, match=r"texts and names of files.*'story'"):
            Trainer(train_dataset=mixed, model="llama_7b").train()


def test_a_file_of_rows_is_named_after_its_content():
    rows = [{"text": "a \U0001f600"}, {"text": "b", "id": 1.5, "tags": ["x", None]}]

    first = file_of(rows)
    assert re.fullmatch(r"rows-[0-9a-f]{16}\.jsonl", first.name)
    assert [json.loads(line) for line in first.read_text().splitlines()] == rows
    time = first.stat().st_mtime_ns
    assert (file_of(row for row in rows), first.stat().st_mtime_ns) == (first, time)
    assert file_of(rows[::-1]) != first
    first.write_text("changed\n")
    assert file_of(tuple(rows)).read_text().count("\n") == 2
    assert {path.name for path in Path("inputs").iterdir()} == {first.name, file_of(rows[::-1]).name}


def test_an_iterator_is_read_once_and_a_list_again(tmp_path: Path):
    once, again = rows_of(iter(TEXTS)), rows_of(texts := list(TEXTS))
    assert once.file(tmp_path) == once.file(tmp_path) == again.file(tmp_path)
    elsewhere = Path(once.file(tmp_path / "elsewhere"))
    assert elsewhere.parent == tmp_path / "elsewhere"
    assert elsewhere.read_bytes() == Path(again.file(tmp_path)).read_bytes()
    texts.append("One more.")
    assert again.file(tmp_path) != once.file(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ([], "train_dataset is empty"),
        (5, "train_dataset = 5 is neither a path nor rows"),
        ({"text": "a"}, "neither a path nor rows"),
        ([["a"]], "row 0 of train_dataset is"),
        (["A text.", {"text": "a"}], "row 1 of train_dataset is"),
        ([{"text": "a"}, {"text": "b", "n": float("nan")}], "row 1 cannot be written as JSON"),
        ([{"text": "a", "n": {1, 2}}], "row 0 cannot be written as JSON"),
    ],
)
def test_what_is_no_dataset_is_refused_and_leaves_nothing(model: Path, dataset: Any, problem: str):
    with pytest.raises(UserError, match=re.escape(problem)):
        Trainer(model=model, train_dataset=dataset, args={"run": "run", **SIZES}).train()
    assert not Path("run").exists()


# Bad input --------------------------------------------------------------------------------


def refused(make: Callable[[], object], problem: str, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert problem in str(caught.value).split("\n")[0]
    assert advice in str(caught.value).split("\n")[1]


def test_arguments_that_do_not_exist_or_contradict_each_other_are_refused(model: Path):
    Path("text.txt").write_text("One day.")
    for arguments, problem, advice in (
        ({"task": "fill_mask"}, "task = 'fill_mask'", "text_generation"),
        ({"args": {"train.step": 5}}, "no field 'train.step'", "train.steps"),
        ({"args": {"train.steps": "many"}}, "train.steps: 'many'", "docs/recipes.md"),
        ({"args": 5}, "args = 5 is not a dictionary", "train.steps"),
        ({"args": "no_such_recipe"}, "no_such_recipe", "camelid recipes"),
        ({"overrides": "recipe.toml"}, "overrides = 'recipe.toml' is not a dictionary", "train.steps"),
        ({"model": 7}, "model = 7", "Give a preset"),
        ({"model": model, "args": {"init": "other"}}, "args has init = 'other'", "Leave out one"),
        ({"train_dataset": "text.txt", "args": {"data.train": ["a.txt"]}}, "args has data.train", "Leave out one"),
        ({"dataset_options": {"knd": "chat"}}, "dataset_options has 'knd'", "kind, text_key"),
        ({"callbacks": ["print"]}, "callbacks has 'print'", "functions"),
    ):
        refused(lambda given=arguments: Trainer(**given), problem, advice)
    Trainer(eval_dataset="text.txt", args={"train.keep_best": True})  # there are validation data


def test_a_call_that_lacks_something_names_it(model: Path):
    Path("text.txt").write_text("One day.")
    Path("taken").mkdir()
    Path("taken/file").touch()
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    loaded = camelid.load(model)
    for trainer, method, problem, advice in (
        (Trainer(), "train", "there is no model", "preset"),
        (Trainer(model=model), "train", "there is no training data", "train_dataset"),
        (Trainer(model=model), "finetune", "finetune needs train_dataset", "train follows"),
        (Trainer(model="llama_7b", train_dataset="text.txt"), "finetune", "the model has random values", "use train"),
        (Trainer(model="llama_7b", train_dataset="text.txt", args=SIZES), "train", "no tokenizer", "Set tokenizer"),
        (Trainer(model=model, train_dataset="text.txt"), "train", "lacks the field", "docs/recipes.md"),
        (Trainer(model=loaded, train_dataset=["A"], args={"run": "taken"}), "finetune", "taken has files", "run"),
        (Trainer(model=model, train_dataset=pairs), "finetune", "holds pairs", "Add args={'dpo': {}}"),
        (Trainer(model=model), "evaluate", "there is no validation data", "Give eval_dataset, or args with"),
        (Trainer(), "evaluate", "there is no model", "preset"),
        (Trainer(model=model, train_dataset=["A text."], args={"run": "taken"}), "finetune", "taken has files", "run"),
    ):
        refused(getattr(trainer, method), problem, advice)
    refused(lambda: Trainer(model=model).predict("a", predict_checkpoint=True), "no trained model", "Call train")
    refused(lambda: Trainer(model=model).predict("a", chat=True), "no chat template", "Leave out chat")
    refused(lambda: Trainer(model=loaded).predict([[1]], chat=True), "[1] is not a text", "messages")
    assert sorted(path.name for path in Path().iterdir()) == ["runs", "taken", "text.txt"]
    assert [path.name for path in Path("taken").iterdir()] == ["file"]
