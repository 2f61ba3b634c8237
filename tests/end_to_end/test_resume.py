"""A run that is killed, or asked to stop, and started again by the same command is the run that never was disturbed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from camelid.interrupts import STOPPED
from camelid.train.loggers import read_metrics
from runs import TIMEOUT_S, command, losses, started, tensor_bytes, tiny_run, wait_until, write_recipe_file

STEPS = 40
DROPOUT = {"embedding": 0.05, "attention": 0.05, "residual": 0.05}
# What a row says about the machine, not about the run.
ABOUT_TIME = ("tokens_per_second", "mfu", "step_s", "data_s", "eta_s")


def write_run(folder: Path) -> Path:
    """A recipe whose steps are slow enough to be interrupted at a chosen one, with packing, mixing, dropout and EMA."""
    folder.mkdir()
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": f"abc {n} " * 9}) + "\n" for n in range(40)))
    return write_recipe_file(
        tiny_run(
            folder,
            model__embed_dim=96,
            model__mlp_dim=256,
            data={
                "train": [
                    {"files": str(folder / "text.jsonl"), "weight": 3},
                    {"files": str(folder / "more.jsonl"), "weight": 1},
                ],
                "packing": "best_fit",
                "sequence_length": 64,
                "batch_size": 32,
                "validation_fraction": 0.1,
            },
            train={"steps": STEPS, "checkpoint_every": 10, "evaluate_every": 10, "accumulate": 2},
            dropout=DROPOUT,
            ema={"decay": 0.9},
        ),
        folder / "recipe.toml",
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    found = read_metrics(folder / "run" / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ABOUT_TIME} for row in found]


def interrupt(recipe: Path, env: dict[str, str], step: int, number: signal.Signals) -> tuple[int, int]:
    """Starts the run and sends a signal after about this step; the exit status, and the last step in metrics.jsonl."""
    run = recipe.parent / "run"
    with started("train", recipe, env=env, log=recipe.with_name(f"{step}.log")) as process:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= step, process)
        os.kill(process.pid, number)
        code = process.wait(TIMEOUT_S)
    reached = losses(run)[-1]["step"]
    assert step <= reached < STEPS, f"interrupted after {reached} steps"
    return code, reached


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory, user_env: dict[str, str]) -> Path:
    """Made once for the tests of this file."""
    folder = tmp_path_factory.getbasetemp() / "undisturbed"
    if not folder.exists():
        done = command("train", write_run(folder), env=user_env)
        assert done.returncode == 0, done.stderr
    return folder


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    assert rows(folder) == rows(undisturbed)
    for name in ("model", "model_ema"):
        assert tensor_bytes(folder / "run" / name) == tensor_bytes(undisturbed / "run" / name)
    assert {file.name for file in (folder / "run").iterdir()} == {file.name for file in (undisturbed / "run").iterdir()}
    assert sorted(file.name for file in (folder / "run" / "checkpoints").iterdir()) == ["30", "40"]


def test_an_undisturbed_run_leaves_every_step_once_and_learns(undisturbed: Path):
    steps = [(row["step"], "loss" in row) for row in rows(undisturbed)]
    expected = [(0, False)]
    for step in range(1, STEPS + 1):
        expected += [(step, True)] + ([(step, False)] if step % 10 == 0 else [])
    assert steps == expected
    validation = [row["validation_loss"] for row in rows(undisturbed) if "validation_loss" in row]
    assert validation[-1] < validation[0] - 0.5
    assert (undisturbed / "run" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert_as_undisturbed(undisturbed, undisturbed)


def test_a_run_killed_twice_ends_with_the_same_bits_and_the_same_rows(
    tmp_path: Path, undisturbed: Path, user_env: dict[str, str]
):
    recipe = write_run(tmp_path / "killed")
    code, _ = interrupt(recipe, user_env, 4, signal.SIGKILL)  # before the first checkpoint
    assert code == -signal.SIGKILL
    code, reached = interrupt(recipe, user_env, 27, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "killed" / "run" / "model").exists()
    done = command("train", recipe, env=user_env)
    assert done.returncode == 0, done.stderr
    resumed = int(done.stderr.split("resuming after step ")[1].split()[0])
    # A kill may come while the newest checkpoint is still being written; then the one before counts.
    assert resumed in (10, 20, 30)
    assert resumed <= reached
    assert_as_undisturbed(tmp_path / "killed", undisturbed)


def test_a_run_asked_to_stop_saves_ends_well_and_goes_on_to_the_same_bits_and_rows(
    tmp_path: Path, undisturbed: Path, user_env: dict[str, str]
):
    recipe = write_run(tmp_path / "stopped")
    code, reached = interrupt(recipe, user_env, 14, signal.SIGTERM)
    assert code == STOPPED
    assert (
        f"stopped after step {reached} of {STEPS}; run the same command again to resume"
        in recipe.with_name("14.log").read_text()
    )
    done = command("train", recipe, env=user_env)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {reached}" in done.stderr
    assert_as_undisturbed(tmp_path / "stopped", undisturbed)
