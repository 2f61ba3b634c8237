"""A damaged checkpoint is named, those that are whole are listed, and an older one is taken only when asked for."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid.runs.run
from camelid.checkpoint.state.saved_state import open_arrays
from camelid.parallel.mesh import one_device
from camelid.train.loggers import read_metrics
from runs import assert_refused, called, contents, losses, recipe, tensor_bytes, tiny_run, write_recipe_file


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


def table(folder: Path, steps: int, **fields: Any) -> dict[str, Any]:
    train = {"steps": steps, "checkpoint_every": 2, "keep_checkpoints": 9}
    return tiny_run(folder, train=train, optimizer__decay_steps=8, **fields)


def train(folder: Path, steps: int, *words: object):
    # Everything but the run is where it was when the original run began.
    recipe = table(folder.parent / "original", steps) | {"run": str(folder / "run")}
    return called("train", write_recipe_file(recipe, folder / "recipe.toml"), *words)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("damage") / "original"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
        camelid.runs.run.run(recipe(table(folder, 6)))
    return folder


@pytest.fixture
def run(original: Path) -> Iterator[Path]:
    """A copy of it, which a test may damage."""
    folder = original.with_name("copy")
    shutil.copytree(original / "run", folder / "run")
    yield folder / "run"
    shutil.rmtree(folder)


def largest(step: Path) -> Path:
    return max((step / "default").rglob("d/*"), key=lambda file: file.stat().st_size)


def flip(step: Path) -> None:
    """The last bit of a parameter, in files that TensorStore finds to be whole."""
    store = open_arrays(step)["params.layers.mlp.up_proj"].store
    value = np.atleast_1d(store[1, 2, 3].read().result())
    store[1, 2, 3].write((value.view(np.uint32) ^ 1).view(np.float32)[0]).result()


def truncate(step: Path) -> None:
    largest(step).write_bytes(largest(step).read_bytes()[:100])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "default is gone": lambda step: shutil.rmtree(step / "default"),
    "the folder is empty": lambda step: [shutil.rmtree(step), step.mkdir()],
    # All of them: the largest may hold moments alone, which only training reads.
    "numbers are gone": lambda step: [file.unlink() for file in (step / "default").rglob("d/*")],
    "numbers are cut short": truncate,
    "a bit is flipped": flip,
    "the manifest is garbage": lambda step: (step / "default" / "manifest.ocdbt").write_bytes(b"\xff" * 99),
    "the metadata is gone": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "the metadata is of zeros": lambda step: (step / "_CHECKPOINT_METADATA").write_bytes(bytes(2000)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_resuming_names_the_damage_and_the_steps_that_are_whole_and_changes_nothing(run: Path, damage: Callable):
    damage(run / "checkpoints" / "6")
    before = contents(run)
    refused = train(run.parent, 8)
    assert_refused(refused, f"the checkpoint of step 6 in {run / 'checkpoints'} is damaged: ")
    assert "Steps 4, 2 are intact. To resume from step 4, add --from-step 4" in refused.stderr
    assert contents(run) == before


@pytest.mark.parametrize("damage", ["default is gone", "numbers are gone", "a bit is flipped"])
def test_opening_a_run_names_the_damage_and_the_steps_that_are_whole(run: Path, tmp_path: Path, damage: str):
    DAMAGES[damage](run / "checkpoints" / "6")
    before = contents(run)
    other = table(run.parent.parent / "original", 2) | {"run": str(tmp_path / "other"), "init": str(run)}
    del other["model"], other["tokenizer"]
    recipe_file = write_recipe_file(other | {"init_optimizer": False}, tmp_path / "recipe.toml")
    for words in (("convert", run, tmp_path / "hf"), ("generate", run, "ab"), ("train", recipe_file)):
        refused = called(*words)
        assert_refused(refused, f"the checkpoint of step 6 in {run / 'checkpoints'} is damaged: ")
        assert f"Steps 4, 2 are intact. To open step 4, give {run / 'checkpoints' / '4'}." in refused.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.toml"}
    assert contents(run) == before
    assert called("convert", run / "checkpoints" / "4", tmp_path / "hf").returncode == 0


def test_a_step_that_is_damaged_too_is_not_listed(run: Path):
    flip(run / "checkpoints" / "6")
    flip(run / "checkpoints" / "4")
    assert "Step 2 is intact. To resume from step 2" in train(run.parent, 8).stderr
    assert "Step 2 is intact. To resume from step 2" in train(run.parent, 8, "--from-step", 4).stderr
    flip(run / "checkpoints" / "2")
    assert "No other step of this run is intact" in train(run.parent, 8).stderr


def test_from_an_older_step_the_run_becomes_the_one_that_never_was_disturbed(run: Path, original: Path, tmp_path: Path):
    whole = camelid.runs.run.run(recipe(table(original, 8) | {"run": str(tmp_path / "whole")})).folder
    flip(run / "checkpoints" / "6")
    damaged, metrics = contents(run / "checkpoints" / "6"), (run / "metrics.jsonl").read_bytes()
    done = train(run.parent, 8, "--from-step", 4)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 4" in done.stderr
    assert f"checkpoints of later steps and a copy of metrics.jsonl were moved to {run / 'set_aside_1'}" in done.stderr
    assert tensor_bytes(run / "model") == tensor_bytes(whole / "model")
    assert [(row["step"], row["loss"]) for row in losses(run)] == [(row["step"], row["loss"]) for row in losses(whole)]
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["2", "4", "6", "8"]
    # Nothing is lost: neither what is damaged, nor the metrics of the steps that were made again.
    assert contents(run / "set_aside_1" / "6") == damaged
    assert (run / "set_aside_1" / "metrics.jsonl").read_bytes() == metrics
    assert "set_aside" not in train(run.parent, 8).stderr


def test_steps_that_are_whole_are_set_aside_too_and_earlier_ones_set_aside_stay(run: Path):
    before = contents(run / "checkpoints")
    for number, step in ((1, 4), (2, 2)):
        done = train(run.parent, 6, "--from-step", step)
        assert done.returncode == 0, done.stderr
        aside = run / f"set_aside_{number}"
        for later in range(step + 2, 7, 2):
            assert contents(aside / str(later)).keys() >= {"_CHECKPOINT_METADATA"}
        assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    # Put back, they are what they were.
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
    shutil.move(run / "set_aside_1" / "6", run / "checkpoints" / "6")
    assert {name: content for name, content in before.items() if name.startswith("6/")} == {
        f"6/{name}": content for name, content in contents(run / "checkpoints" / "6").items()
    }


def test_the_newest_step_may_be_named(run: Path):
    done = train(run.parent, 8, "--from-step", 6)
    assert done.returncode == 0, done.stderr
    assert not (run / "set_aside_1").exists()


def test_a_step_that_is_not_there_is_refused(run: Path, tmp_path: Path):
    before = contents(run)
    refused = train(run.parent, 8, "--from-step", 5)
    assert_refused(refused, f"{run} has no checkpoint of step 5")
    assert "It has checkpoints of steps 2, 4, 6." in refused.stderr
    assert contents(run) == before
    new = write_recipe_file(tiny_run(tmp_path), tmp_path / "recipe.toml")
    refused = called("train", new, "--from-step", 1)
    assert_refused(refused, "run has no checkpoint of step 1")
    assert "It has no checkpoints yet." in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_whose_checkpoints_vanish_while_it_starts_does_not_begin_anew(run: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(run / "model")  # which has a refusal of its own
    build = camelid.runs.run.build_components

    def build_and_lose(*arguments: Any, **options: Any):
        components = build(*arguments, **options)
        shutil.rmtree(run / "checkpoints")
        return components

    monkeypatch.setattr(camelid.runs.run, "build_components", build_and_lose)
    assert_refused(train(run.parent, 8), f"the checkpoints in {run / 'checkpoints'} were removed")
    assert not (run / "checkpoints").exists()


def test_from_python_an_older_step_is_an_argument(run: Path, original: Path):
    flip(run / "checkpoints" / "6")
    whole = recipe(table(original, 6) | {"run": str(run)})
    with pytest.raises(camelid.UserError, match=r"step 6 .* is damaged: .*its checksum does not match"):
        camelid.runs.run.run(whole)
    assert camelid.runs.run.run(whole, from_step=4).steps == 6


def test_checkpoints_of_an_older_camelid_have_no_checksums_and_are_resumed(run: Path):
    file = run / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    assert metadata["custom_metadata"].pop("checksums")
    file.write_text(json.dumps(metadata))
    done = train(run.parent, 8)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 6" in done.stderr


def test_check_reads_the_optimizer_state_too(run: Path):
    whole = called("convert", run, "--check")
    assert whole.returncode == 0, whole.stderr
    assert "checksums: those embedded in checkpoints/6 match" in whole.stdout
    flip(run / "checkpoints" / "6")
    assert_refused(called("convert", run, "--check"), "the checkpoint of step 6 in")
