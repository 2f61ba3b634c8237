"""The folder of a run: what goes on in it, what is refused, and that a bad start leaves nothing."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

import camelid
import camelid.runs.run
from camelid.parallel.mesh import one_device
from camelid.text.templates import NAMED
from camelid.train.loggers import read_metrics
from runs import assert_refused, called, lay_over, losses, tiny_run, write_recipe_file


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
        assert train(folder).returncode == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, its recipe.toml apart."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def train(folder: Path, **fields: Any):
    table = lay_over(tiny_run(folder, train={"steps": 4, "checkpoint_every": 2, "evaluate_every": 3}), fields)
    # Paths are fields too: those of a copied run are the original's.
    table |= {"run": str(folder / "run")}
    return called("train", write_recipe_file(table, folder / "recipe.toml"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def modified(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


# Going on --------------------------------------------------------------------------------


def test_a_finished_run_leaves_a_recipe_metrics_a_picture_and_a_model_that_opens(finished: Path):
    run = finished / "run"
    assert [row["step"] for row in losses(run)] == [1, 2, 3, 4]
    assert {file.name for file in run.iterdir()} == {
        ".lock",
        "recipe.toml",
        "data.json",
        "versions.json",
        "finished.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
        "model",
    }
    model = camelid.load(run / "model")
    assert model.generate("ab", max_new_tokens=3)[0].prompt == "ab"
    # What the folder keeps is the recipe, and starts the same run.
    assert camelid.runs.recipe.read_recipe(run / "recipe.toml").train.steps == 4


@pytest.mark.parametrize("prepared", [False, True])
def test_a_model_that_learnt_chats_has_their_template_beside_it(tmp_path: Path, prepared: bool):
    table = tiny_run(tmp_path, train={"steps": 1})
    chats = tmp_path / "chats.jsonl"
    row = {"conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]}
    chats.write_text(f"{json.dumps(row)}\n" * 20)
    source: dict[str, Any] = {"files": [str(chats)], "kind": "chat", "template": "zephyr"}
    if prepared:
        words = ["--kind", "chat", "--template", "zephyr", "--tokenizer", table["tokenizer"]]
        assert called("data", "prepare", chats, *words, "--out", tmp_path / "store").returncode == 0
        source = {"files": [str(tmp_path / "store")], "kind": "tokens"}
    table = lay_over(table, {"data__train": [source]})
    done = called("train", write_recipe_file(table, tmp_path / "recipe.toml"))
    assert done.returncode == 0
    assert "note: optimizer.warmup_steps = 2 is not less than train.steps = 1" in done.stderr
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        assert (folder / "chat_template.jinja").read_text() == NAMED["zephyr"].text
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    asked = [{"role": "user", "content": "Say it."}]
    written = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert written.startswith("<|user|>\nSay it.")
    assert written.endswith("<|assistant|>\n")


def test_starting_a_finished_run_again_changes_nothing(finished: Path):
    before, times = contents(finished / "run"), modified(finished / "run")
    again = train(finished)
    assert again.returncode == 0
    assert "this run is finished: it has made all 4 steps; a larger train.steps continues it" in again.stderr
    assert "resuming" not in again.stderr
    assert modified(finished / "run") == times
    after = contents(finished / "run")
    # The store is shared by all runs on the same text, and names the files of the run that prepared it last.
    stores = [json.loads(each.pop("data.json"))["train"] for each in (before, after)]
    for store in (*stores[0], *stores[1]):
        del store["sources"]
    assert stores[0] == stores[1]
    assert after == before


def test_a_model_that_is_missing_or_of_an_earlier_step_is_saved_again(folder: Path, finished: Path):
    """As of a run that was stopped after its last checkpoint, before its model was saved."""
    run = finished / "run"
    shutil.rmtree(run / "model")
    assert train(finished).returncode == 0
    assert contents(run / "model") == contents(folder / "run" / "model")
    for spoiled in ('{"step": 3}', None):
        (run / "finished.json").unlink() if spoiled is None else (run / "finished.json").write_text(spoiled)
        before = modified(run / "model")
        assert train(finished).returncode == 0
        assert modified(run / "model")["model.safetensors"] > before["model.safetensors"]
        assert contents(run / "model") == contents(folder / "run" / "model")
        assert json.loads((run / "finished.json").read_text()) == {"step": 4}


def test_a_run_may_be_asked_for_more_steps_and_other_notes(folder: Path, finished: Path):
    more = train(finished, train__steps=6, train__log_every=2, run=str(finished / "run"))
    assert more.returncode == 0, more.stderr
    assert [row["step"] for row in losses(finished / "run")] == [1, 2, 3, 4, 6]
    assert json.loads((finished / "run" / "finished.json").read_text()) == {"step": 6}
    # Put back for the other tests.
    shutil.rmtree(finished / "run")
    shutil.copytree(folder / "run", finished / "run")


def test_fewer_steps_than_were_made_are_refused(finished: Path):
    assert_refused(train(finished, train__steps=3), "has already made 4 steps, and the recipe sets train.steps = 3")


@pytest.mark.parametrize(
    ("field", "value", "there"),
    [("data__seed", 1, "0"), ("optimizer__learning_rate", 0.5, "0.001"), ("compute__dtype", "bfloat16", '"float32"')],
)
def test_another_recipe_is_refused_with_the_field_and_both_values(finished: Path, field: str, value: Any, there: str):
    before = contents(finished / "run")
    path = field.replace("__", ".")
    here = json.dumps(value)
    assert_refused(train(finished, **{field: value}), f"another recipe: {path} = {there} there, {here} here")
    assert contents(finished / "run") == before


def test_a_recipe_may_be_mended_as_long_as_nothing_was_trained_with_it(tmp_path: Path):
    assert train(tmp_path, train__steps=1).returncode == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = contents(tmp_path / "run")
    assert_refused(train(tmp_path, train__steps=1), "has the model of a run without checkpoints")
    assert contents(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run" / "model")
    mended = train(tmp_path, train__steps=1, data__seed=1)
    assert mended.returncode == 0, mended.stderr
    assert [row["step"] for row in losses(tmp_path / "run")] == [1]
    assert "seed = 1" in (tmp_path / "run" / "recipe.toml").read_text()


# Refusing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "about"),
    [
        ({"data__train": ["missing.txt"]}, "missing.txt matches no file"),
        (
            {"data__batch_size": 6, "train__accumulate": 4},
            "data.batch_size = 6 is not divisible by train.accumulate x data-parallel size = 4 x 1",
        ),
        ({"data__sequence_length": 65}, "data.sequence_length = 65 exceeds the context of 64"),
        ({"model__vocab_size": 200}, "holds token id 257, but the vocabulary of the model has 200 tokens"),
        ({"model__num_kv_heads": 4}, "num_heads = 6 is not a multiple of num_kv_heads = 4"),
        ({"model__head_dim": 9}, "head_dim = 9 has 9 rotary features; an even number"),
        ({"model__parallel_block": True}, "cannot express parallel_block = True"),
        ({"tokenizer": "nowhere"}, "no tokenizer: looked for nowhere"),
        ({"compute__replicate": ["head"]}, "compute.replicate names 'head'"),
        ({"data__train": ["empty.txt"]}, "empty.txt"),
        (
            {"data__train": [{"files": ["text.jsonl"], "kind": "preference"}]},
            "the recipe has no loss that compares them",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_start_that_cannot_work_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], about: str
):
    monkeypatch.chdir(tmp_path)
    assert_refused(train(tmp_path, **fields), about)
    assert not (tmp_path / "run").exists()


def test_an_init_that_is_no_checkpoint_leaves_no_folder(tmp_path: Path):
    table = tiny_run(tmp_path, init=str(tmp_path / "nowhere"))
    del table["model"], table["tokenizer"]
    assert_refused(called("train", write_recipe_file(table, tmp_path / "recipe.toml")), "nowhere does not exist")
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_divide_over_the_devices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # all eight devices
    assert_refused(train(tmp_path, data__batch_size=12), "data.batch_size = 12 is not divisible", "= 1 x 8")
    assert_refused(train(tmp_path, mesh={"data": 3, "fsdp": 1}), "does not fill 8 devices")
    assert_refused(train(tmp_path, model__vocab_size=260), "vocab_in = 260 does not divide over fsdp x tensor = 8")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert_refused(train(tmp_path), "has files and is not the folder of a run")
    assert contents(tmp_path / "run") == {"notes.txt": b"mine"}


def test_a_file_in_the_folders_place_is_refused_and_stays(tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    assert_refused(train(tmp_path), "is a file")
    assert (tmp_path / "run").read_text() == "mine"


def test_text_that_changed_since_the_run_began_is_refused_by_name(tmp_path: Path):
    """All batches would be others; the run would go on with rows that it has seen, and without some that it has not."""
    table = tiny_run(tmp_path, train={"steps": 2}, data__validation_fraction=0.2)
    assert called("train", write_recipe_file(table, tmp_path / "recipe.toml")).returncode == 0
    text = Path(table["data"]["train"][0])
    before, kept = contents(tmp_path / "run"), text.read_bytes()
    more = write_recipe_file(lay_over(table, {"train__steps": 4}), tmp_path / "recipe.toml")
    text.write_bytes(kept + b'{"text": "more"}\n')
    assert_refused(called("train", more), f"{text} changed since {tmp_path / 'run'} was started")
    assert contents(tmp_path / "run") == before
    text.write_bytes(kept)
    assert called("train", more).returncode == 0
    (tmp_path / "run" / "data.json").unlink()  # of a run that began before there was one
    assert called("train", more).returncode == 0


def test_a_run_that_another_process_trains_is_refused(finished: Path):
    before = contents(finished / "run")
    with (finished / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(train(finished), "another process is training in")
    assert contents(finished / "run") == before


def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = iter([10**12, 1000])  # at step 2, and at step 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    assert_refused(train(tmp_path), " kB free, and a checkpoint of 1.2 MB is due")
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
    again = train(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 2" in again.stderr
    assert [row["step"] for row in losses(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("checkpoint_every", [2, 1000])
def test_a_run_that_dies_in_a_validation_leaves_no_gap(
    checkpoint_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A step is saved before it is validated; a resumed run makes up for the validation, and repeats no other."""
    validate, calls = camelid.runs.run.mean_losses, 0

    def dying(*given: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:  # before training, after step 2, after step 4
            raise RuntimeError("power failure")
        return validate(*given)

    fields = {"train__evaluate_every": 2, "data__validation_fraction": 0.1, "train__steps": 6}
    fields["train__checkpoint_every"] = checkpoint_every
    with monkeypatch.context() as patch:
        patch.setattr(camelid.runs.run, "mean_losses", dying)
        with pytest.raises(RuntimeError, match="power failure"):
            train(tmp_path, **fields)
    again = train(tmp_path, **fields)
    assert again.returncode == 0
    assert ("resuming after step 4" in again.stderr) == (checkpoint_every == 2)
    rows = [(row["step"], "loss" in row) for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    expected = [(0, False), *((1, True), (2, True), (2, False)), *((3, True), (4, True), (4, False))]
    assert rows == [*expected, (5, True), (6, True), (6, False)]
