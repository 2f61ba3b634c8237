"""A run that uses all of what long runs need: what it saves, validates, logs, traces and records."""

import json
from pathlib import Path

import jax
import pytest

import camelid
from camelid.checkpoint.state.saved_state import steps_in
from camelid.data.preparation.store import Store
from camelid.train.loggers import read_metrics
from runs import called, column, losses, tiny_run, write_recipe_file, write_text

STEPS = 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    sources = [
        {"files": [str(write_text(folder / f"{name}.jsonl", n))], "name": name} for name, n in (("a", 30), ("b", 12))
    ]
    table = tiny_run(
        folder,
        data__validation=sources,
        data__max_validation_tokens=16 * 24,
        train__steps=STEPS,
        train__evaluate_every=2,
        train__checkpoint_every=100,
        train__milestones_every=3,
        train__keep_checkpoints=1,
        train__keep_best=True,
        profile={"first_step": 2, "steps": 2},
        optimizer={"learning_rate": 1.0, "warmup_steps": 4},  # so that the loss soon rises
    )
    done = called("train", write_recipe_file(table, folder / "recipe.toml"))
    assert done.returncode == 0, done.stderr
    (folder / "stderr.txt").write_text(done.stderr)
    return folder / "run"


def test_the_best_checkpoint_milestones_and_the_newest_are_kept(run: Path):
    validated = {
        row["step"]: row["validation_loss"] for row in read_metrics(run / "metrics.jsonl") if "validation_loss" in row
    }
    assert list(validated) == [0, 2, 4, 6, 7]
    best = json.loads((run / "best.json").read_text())
    assert best == min(
        ({"step": n, "validation_loss": validated[n]} for n in (2, 4, 6, 7)), key=lambda at: at["validation_loss"]
    )
    assert steps_in(run / "checkpoints") == sorted({3, 6, 7, best["step"]})


def test_each_source_has_a_validation_loss_and_the_choice_of_rows_is_said(run: Path):
    for row in read_metrics(run / "metrics.jsonl"):
        if "validation_loss" in row:
            low, high = sorted((row["validation_loss/a"], row["validation_loss/b"]))
            assert low < row["validation_loss"] < high
    said = (run.parent / "stderr.txt").read_text()
    assert "validates 24 of " in said
    assert f"step {STEPS}/{STEPS}" in said


def test_tokens_and_epochs_are_counted(run: Path):
    rows = losses(run)
    assert column(rows, "tokens").tolist() == [128 * step for step in range(1, STEPS + 1)]
    store = Store.open(json.loads((run / "data.json").read_text())["train"][0]["folder"])
    rows_of_store = -(-(store.num_tokens - 1) // 16)
    assert column(rows, "epoch") == pytest.approx([8 * step / rows_of_store for step in range(1, STEPS + 1)])


def test_versions_and_the_trace_of_the_chosen_steps_are_in_the_folder(run: Path):
    (start,) = json.loads((run / "versions.json").read_text())
    assert start["after_step"] == 0
    assert (start["camelid"], start["jax"]) == (camelid.__version__, jax.__version__)
    assert (start["devices"], start["device"]) == (jax.device_count(), jax.devices()[0].device_kind)
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
