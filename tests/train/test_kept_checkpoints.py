"""Which checkpoints of a run are kept: the newest, milestones, and the best."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.checkpoint.state.saved_state import steps_in
from camelid.errors import UserError
from camelid.runs.best import BestCheckpoint
from camelid.train.config import TrainConfig
from camelid.train.loggers import MetricsFile
from runs import recipe, tiny_run


def state(step: int) -> dict:
    return {"x": jnp.full(4, step, jnp.float32)}


def trained(
    run: Path, losses: dict[int, float], every: int = 10**9, resume_from: int = 0, unsaved: tuple[int, ...] = ()
) -> None:
    """A run that saves these steps but the `unsaved`, and validates all of them; it keeps one besides the best."""
    run.mkdir(exist_ok=True)
    metrics = MetricsFile(run / "metrics.jsonl", resume_from)
    checkpoints = RunCheckpoints(run / "checkpoints", 1, every)
    best = BestCheckpoint(run, checkpoints)
    for step, loss in losses.items():
        if step not in unsaved:
            checkpoints.save(step, state(step))
        metrics.write({"step": step, "validation_loss": loss})
        best.offer(step, loss, state(step))
    metrics.close()
    checkpoints.wait()
    checkpoints.close()


def kept(run: Path) -> tuple[list[int], dict]:
    return steps_in(run / "checkpoints"), json.loads((run / "best.json").read_text())


def test_the_best_checkpoint_is_kept_and_named_also_by_a_resumed_run(tmp_path: Path):
    trained(tmp_path, {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0})
    assert kept(tmp_path) == ([2, 4], {"step": 2, "validation_loss": 2.0})
    trained(tmp_path, {5: 2.25, 6: 2.75}, resume_from=4)
    assert kept(tmp_path) == ([2, 6], {"step": 2, "validation_loss": 2.0})
    trained(tmp_path, {7: 1.5, 8: 1.75}, resume_from=6)
    assert kept(tmp_path) == ([7, 8], {"step": 7, "validation_loss": 1.5})


def test_a_checkpoint_that_is_gone_is_not_the_best_any_more(tmp_path: Path):
    trained(tmp_path, {1: 2.0, 2: 3.0, 3: 2.5}, every=1)
    for gone, resume_from, best in (
        (1, 3, {"step": 3, "validation_loss": 2.5}),
        (3, 2, {"step": 2, "validation_loss": 3.0}),
    ):
        (tmp_path / "checkpoints" / str(gone)).rename(tmp_path / f"aside_{gone}")
        trained(tmp_path, {}, resume_from=resume_from)
        assert kept(tmp_path)[1] == best


def test_a_step_without_a_checkpoint_is_saved_if_it_is_the_best(tmp_path: Path):
    trained(tmp_path, {1: 3.0, 2: 3.5, 3: 2.5}, unsaved=(2, 3))
    assert kept(tmp_path) == ([3], {"step": 3, "validation_loss": 2.5})


def test_milestones_are_never_removed(tmp_path: Path):
    trained(tmp_path, {step: 1 / step for step in range(1, 8)}, every=3)
    assert steps_in(tmp_path / "checkpoints") == [3, 6, 7]


def test_a_discarded_checkpoint_replaces_no_earlier_one(tmp_path: Path):
    checkpoints = RunCheckpoints(tmp_path, 1)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    checkpoints.discard(1)  # it is not the last
    checkpoints.discard(2)
    checkpoints.wait()
    assert (steps_in(tmp_path), checkpoints.latest()) == ([1], 1)
    checkpoints.close()


def test_fields_that_cannot_work_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"train\.checkpoint_minutes = 0\n"):
        TrainConfig(steps=1, checkpoint_minutes=0)
    with pytest.raises(UserError, match=r"train\.milestones_every = 0\n"):
        TrainConfig(steps=1, milestones_every=0)
    with pytest.raises(UserError, match=r"keep_best = true compares .* only the last step is validated"):
        TrainConfig(steps=1, keep_best=True)
    with pytest.raises(UserError, match=r"keep_best = true compares .* has no validation data"):
        recipe(tiny_run(tmp_path, train__keep_best=True, train__evaluate_every=1))
