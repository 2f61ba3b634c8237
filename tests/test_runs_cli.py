"""`camelid runs` and `camelid plot`: the state of runs from their files, and their losses in one picture."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from camelid.disk.locks import is_locked, locked
from runs import assert_refused, called


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs in each state but `running`."""
    made(tmp_path / "a" / "done", steps=4, rows=[(0, 3.0), *((n, 2.0 / n) for n in range(1, 5)), (4, 0.75)], saved=4)
    (tmp_path / "a" / "done" / "finished.json").write_text('{"step": 4}\n')
    made(tmp_path / "b_stopped", steps=2000, rows=[(n, 1.0 + 1 / n) for n in range(1, 1501)], saved=1500)
    made(tmp_path / "c_new", steps=5, rows=[], saved=None)
    return tmp_path


def made(run: Path, steps: int, rows: list[tuple[int, float]], saved: int | None) -> None:
    """The folder of a run; the rows of step 0 and of a step that was logged before are validations."""
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(f"[train]\nsteps = {steps}\n")
    seen, lines = {0}, []
    for step, loss in rows:
        lines.append(json.dumps({"step": step, "validation_loss" if step in seen else "loss": loss}))
        seen.add(step)
    if lines:
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        os.utime(run / "metrics.jsonl", (1e9, 1e9))
    if saved is not None:
        (run / "checkpoints" / str(saved)).mkdir(parents=True)
        (run / "checkpoints" / f"{saved + 1}.orbax-checkpoint-tmp").mkdir()


def listed(folder: Path) -> dict[str, dict]:
    done = called("runs", folder, "--json")
    assert done.returncode == 0, done.stderr
    return {run["name"]: run for run in json.loads(done.stdout)["runs"]}


def test_runs_are_listed_with_their_state_and_last_losses(folder: Path):
    found = listed(folder)
    assert list(found) == ["a/done", "b_stopped", "c_new"]
    assert [run["state"] for run in found.values()] == ["finished", "stopped", "no checkpoint"]
    assert [(run["step"], run["steps"]) for run in found.values()] == [(4, 4), (1500, 2000), (0, 5)]
    assert [run["loss"] for run in found.values()] == [0.5, 1 + 1 / 1500, None]
    assert [run["validation_loss"] for run in found.values()] == [0.75, None, None]
    assert found["a/done"]["changed"] == "2001-09-09T01:46:40Z"
    shown = called("runs", folder).stdout.splitlines()
    assert shown[1].split() == ["a/done", "finished", "4", "4", "0.5000", "0.7500", "2001-09-09", "01:46:40", "UTC"]
    assert list(listed(folder / "a" / "done")) == ["done"]


def test_a_line_that_is_being_written_and_a_recipe_that_cannot_be_read_are_passed_over(folder: Path):
    with (folder / "b_stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1501, "lo')
    (folder / "c_new" / "recipe.toml").write_text("[train")
    found = listed(folder)
    assert found["b_stopped"]["step"] == 1500
    assert found["c_new"]["steps"] is None


def test_a_run_that_a_process_has_locked_is_running(folder: Path):
    with locked(folder / "a" / "done"):
        assert listed(folder)["a/done"]["state"] == "running"
    assert listed(folder)["a/done"]["state"] == "finished"
    assert not is_locked(folder / "c_new")
    assert not (folder / "c_new" / ".lock").exists()


def test_a_folder_without_runs_says_so(tmp_path: Path):
    assert called("runs", tmp_path).stderr == f"there is no run below {tmp_path}\n"
    assert_refused(called("runs", tmp_path / "nothing"), "is not a folder")


def test_the_losses_of_several_runs_are_in_one_picture(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: (drawn.append(self), save(self, *args)))
    out = folder / "both.png"
    done = called("plot", folder / "a" / "done", folder / "b_stopped", "--out", out)
    assert (done.returncode, done.stderr) == (0, f"losses {out}\n")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axes,) = drawn[0].axes
    names = [str(line.get_label()).removeprefix(f"{folder}/") for line in axes.lines]
    assert names == ["a/done: loss", "a/done: validation loss", "b_stopped: loss"]
    assert np.asarray(axes.lines[1].get_xydata()).tolist() == [[0.0, 3.0], [4.0, 0.75]]
    colors = [line.get_color() for line in axes.lines]
    assert colors[0] == colors[1] != colors[2], "a run has one color"


def test_a_plot_of_what_is_no_run_is_refused(folder: Path):
    assert_refused(called("plot", folder), f"{folder} has no metrics.jsonl")
    assert_refused(called("plot", folder / "b_stopped", "--out", folder / "x.pdf"), "is not a .png")
