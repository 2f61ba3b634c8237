"""Nothing of the user's is lost, and a refused command writes nothing."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import camelid
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.runs.run import compile_step
from foreign import NAMES, add_foreign
from names import KINDS
from runs import assert_refused, called, contents, tensor_bytes, tiny_run, write_recipe_file, write_text
from text.tiny import save_byte_tokenizer

pytestmark = pytest.mark.quick_compile

Snapshot = dict[str, tuple]


def snapshot(folder: Path) -> Snapshot:
    """All that is in and below a folder: contents, and what a file that was moved or written again would not keep."""
    about = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        about[str(path.relative_to(folder))] = (stat.st_ino, stat.st_mtime_ns if path.is_file() else None)
    return {name: (*what, contents(folder).get(name)) for name, what in about.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.toml and its finished run of 2 steps."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe_file(tiny_run(folder, train={"steps": 2, "checkpoint_every": 1}), folder / "recipe.toml")
    assert called("train", recipe).returncode == 0
    return folder


# Foreign files ---------------------------------------------------------------------------


def test_every_command_that_writes_leaves_the_files_of_others_as_they_are(tmp_path: Path):
    """In the folders that are written, in those below, and beside them; of a run, among its checkpoints too."""
    recipe = write_recipe_file(tiny_run(tmp_path, train={"steps": 2, "checkpoint_every": 1}), tmp_path / "recipe.toml")
    run, model = tmp_path / "run", tmp_path / "run" / "model"
    base, out, applied = tmp_path / "base", tmp_path / "out", tmp_path / "applied"
    again = "--overwrite"
    delta = ("delta", "make", base, model, out, again)
    loaded: list[camelid.Model] = []

    def save() -> None:
        loaded[0].save(tmp_path / "saved", overwrite=True)

    commands: dict[str, tuple[Path, Callable[[], object]]] = {
        "train": (run, lambda: called("train", recipe)),
        "train more steps": (run, lambda: called("train", recipe, "--train.steps", 3)),
        "train even more steps": (model, lambda: called("train", recipe, "--train.steps", 4)),
        "convert": (base, lambda: called("convert", run / "checkpoints" / "3", base, again)),
        "convert again": (base, lambda: called("convert", run / "checkpoints" / "3", base, "--shards", 2, again)),
        "convert to 16 bits": (
            base,
            lambda: called("convert", run / "checkpoints" / "3", base, "--dtype", "bfloat16", again),
        ),
        "make a delta": (out, lambda: called(*delta)),
        "make a delta again": (out, lambda: called(*delta, "--kind", "sum")),
        "make an adapter": (out, lambda: called(*delta, "--kind", "lora", "--rank", 2)),
        "apply it": (applied, lambda: called("delta", "apply", base, out, applied, again)),
        "apply it again": (applied, lambda: called("delta", "apply", base, out, applied, again)),
        "prepare": (tmp_path, lambda: called("data", "prepare", *data(tmp_path))),
        "prepare anew": (tmp_path, lambda: called("data", "prepare", *data(tmp_path), "--seed", 1, again)),
        "save": (tmp_path / "saved", save),
        "save again": (tmp_path / "saved", save),
    }
    add_foreign(tmp_path)
    for name, (folder, command) in commands.items():
        if folder.exists() and not (folder / "notes.txt").exists():
            add_foreign(folder)
        if name == "train more steps":
            (run / "checkpoints" / "notes.txt").write_text("mine")
            (run / "README.md").write_text("my own")
            with (run / "tokenizer_config.json").open("a") as file:
                file.write("\n\n")
        if name == "save":
            loaded.append(camelid.load(model))
        before = {name: about for name, about in snapshot(tmp_path).items() if is_foreign(name)}
        assert len(before) >= 8
        result = command()
        assert result is None or getattr(result, "returncode", None) == 0, (name, result)
        after = snapshot(tmp_path)
        assert {name: after.get(name) for name in before} == before, name


def is_foreign(name: str) -> bool:
    return name in ("run/README.md", "run/tokenizer_config.json") or not {*NAMES, "data"}.isdisjoint(name.split("/"))


def data(folder: Path) -> list[object]:
    words = [folder / "text.jsonl", "--tokenizer", folder / "tokenizer", "--out", folder / "a store"]
    return [*words, "--validation-fraction", 0.1]


def test_files_beside_a_store_are_named_and_the_store_stays(tmp_path: Path):
    write_text(tmp_path / "text.jsonl")
    save_byte_tokenizer(tmp_path / "tokenizer")
    assert called("data", "prepare", *data(tmp_path)).returncode == 0
    store = tmp_path / "a store"
    for name, about in {
        "validation/notes.txt": "holds validation/notes.txt in addition",
        "plans/notes.txt": "holds plans/notes.txt and 1 more in addition",
        "mine": "holds mine and 2 more in addition",
    }.items():
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_text("mine")
        before = contents(tmp_path)
        assert_refused(called("data", "prepare", *data(tmp_path), "--seed", 1, "--overwrite"), about)
        assert contents(tmp_path) == before


def test_what_the_user_put_in_the_place_of_the_model_is_found_before_training(tmp_path: Path):
    recipe = write_recipe_file(tiny_run(tmp_path), tmp_path / "recipe.toml")
    assert called("train", recipe).returncode == 0
    (tmp_path / "run" / "model" / "config.json").write_text('{"model_type": "llama", "mine": true}')
    before = snapshot(tmp_path)
    assert_refused(called("train", recipe, "--train.steps", 5), "changed since: config.json")
    assert snapshot(tmp_path) == before


# A refused command writes nothing --------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["--train.steps", 1], "the run has already made 2 steps"),
        (["--optimizer.learning_rate", 1], "has a run with another recipe"),
        (["--train.steps", 3, "--data.train", "other.jsonl"], "has a run with another recipe"),
        (["--train.steps", 3, "--mesh.data", 2, "--data.batch_size", 7], "7"),
        (["--train.steps", 3, "--train.trackers", '["wandb"]'], "requests wandb"),
    ],
)
def test_a_refused_start_leaves_a_run_as_it_was(
    trained: Path, words: list[object], about: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = snapshot(trained)
    assert_refused(called("train", trained / "recipe.toml", *words), about)
    assert snapshot(trained) == before


def test_data_that_changed_is_refused_and_the_run_stays_as_it_was(tmp_path: Path):
    recipe = write_recipe_file(tiny_run(tmp_path), tmp_path / "recipe.toml")
    assert called("train", recipe).returncode == 0
    write_text(tmp_path / "text.jsonl", documents=41)
    before = snapshot(tmp_path)
    assert_refused(called("train", recipe, "--train.steps", 5), "changed since")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["--train.trackers", '["wandb"]'], "requests wandb"),
        (["--init", "nowhere/at-all"], "nowhere"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.sequence_length", 4096], "exceeds the context"),
        (["--mesh.tensor", 5], ""),
        (["--compute.attention", "cudnn"], ""),  # found when the step is compiled
    ],
)
def test_a_refused_first_start_leaves_nothing(
    tmp_path: Path, words: list[object], about: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = write_recipe_file(tiny_run(tmp_path, run=str(tmp_path / "runs" / "x" / "run")), tmp_path / "recipe.toml")
    before = snapshot(tmp_path)
    assert_refused(called("train", recipe, *words), about)
    assert snapshot(tmp_path) == before


def test_a_first_start_that_is_refused_when_its_folder_is_locked_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the folder was made for its lock."""

    def refuse(*arguments: object) -> None:
        raise camelid.UserError("the weights cannot be read", "Copy them again.")

    monkeypatch.setattr("camelid.runs.run.find_start", refuse)
    recipe = write_recipe_file(tiny_run(tmp_path, run=str(tmp_path / "runs" / "x")), tmp_path / "recipe.toml")
    before = snapshot(tmp_path)
    assert_refused(called("train", recipe), "the weights cannot be read")
    assert snapshot(tmp_path) == before


def test_conversions_and_stores_that_are_refused_in_the_midst_leave_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = trained / "run" / "model"
    place = tmp_path / "new" / "folders" / "out"
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "good"}) + "\nbad\n")
    assert_refused(called("convert", model, place, "--to", "meta", "--tensor-parallel", 7))
    assert_refused(called("delta", "apply", model, trained, place))
    assert_refused(called("delta", "make", model, model, place, "--kind", "lora", "--rank", 2), "all matrices of")
    words = [tmp_path / "bad.jsonl", "--tokenizer", trained / "tokenizer", "--out", place]
    assert_refused(called("data", "prepare", *words), "bad.jsonl")
    monkeypatch.setattr("camelid.checkpoint.files._write", lambda *arguments: os.stat("/nowhere"))
    assert_refused(called("convert", model, place), "/nowhere")
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl"}


# Names of runs ---------------------------------------------------------------------------


class Killed(BaseException):
    """In the place of a signal, which would end the tests too."""


def test_runs_of_every_kind_of_name_are_killed_and_resumed_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A killed process leaves what is on the disk at some moment: a copy, made while a checkpoint is being written."""
    save, killed = RunCheckpoints.save, tmp_path / "killed"

    def save_and_end(self: RunCheckpoints, step: int, state: object) -> None:
        save(self, step, state)
        while step == 4 and not killed.exists():
            try:
                shutil.copytree(self._folder.parent, killed)
            except OSError:  # a file was renamed meanwhile; shutil.Error is one, too
                shutil.rmtree(killed)
        if step == 4:
            raise Killed

    compiled: list[object] = []

    def compile_once(*arguments: Any) -> object:
        """All runs have the same program, and compiling it would take most of the time."""
        compiled.extend([] if compiled else [compile_step(*arguments)])
        return compiled[0]

    monkeypatch.setattr("camelid.runs.run.compile_step", compile_once)
    table = tiny_run(tmp_path, train={"steps": 5, "checkpoint_every": 2})
    undisturbed = write_recipe_file(table | {"run": str(tmp_path / "undisturbed")}, tmp_path / "undisturbed.toml")
    assert called("train", undisturbed).returncode == 0
    # A name within another, which saves half of the runs; tests/checkpoint/test_paths.py has each alone.
    for name in (f"{parent}/{own}" for parent, own in zip(KINDS[:6], KINDS[6:12], strict=True)):
        run = tmp_path / name
        recipe = write_recipe_file(table | {"run": str(run)}, tmp_path / "recipe.toml")
        monkeypatch.setattr(RunCheckpoints, "save", save_and_end)
        with pytest.raises(Killed):
            called("train", recipe)
        monkeypatch.setattr(RunCheckpoints, "save", save)
        shutil.rmtree(run)
        killed.rename(run)
        done = called("train", recipe)
        assert done.returncode == 0, (name, done)
        assert "resuming after step 2" in done.stderr or "resuming after step 4" in done.stderr, (name, done.stderr)
        assert tensor_bytes(run / "model") == tensor_bytes(tmp_path / "undisturbed" / "model"), name
        assert called("inspect", run).returncode == 0


def test_a_name_that_is_not_utf8_is_refused_for_a_run(tmp_path: Path):
    recipe = write_recipe_file(tiny_run(tmp_path), tmp_path / "recipe.toml")
    run = os.fsdecode(bytes(tmp_path) + b"/bad\xff")
    assert_refused(called("train", recipe, "--run", run), r"bad\udcff' is not UTF-8")
    assert not os.path.exists(run)
