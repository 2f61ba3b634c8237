"""The learning rates of a run stay what they were when it is asked for more steps."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid.runs.run
from camelid.parallel.mesh import one_device
from camelid.runs.recipe import Recipe, completed, read_recipe
from camelid.runs.summary import schedule_change
from camelid.train.schedules import learning_rate
from runs import called, column, lay_over, losses, recipe, tiny_run, write_recipe_file

PEAK, FINAL = 1e-3, 1e-4


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


def train(folder: Path, steps: int, **fields: Any) -> str:
    table = tiny_run(folder, train={"steps": steps}, optimizer={"learning_rate": PEAK}, **fields)
    done = called("train", write_recipe_file(table, folder / "recipe.toml"))
    assert done.returncode == 0, done.stderr
    return done.stderr


def cosine(step: int, horizon: int) -> float:
    """The learning rate of a step, from 1."""
    return FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * min(step, horizon) / horizon)) / 2


def rates(folder: Path) -> list[float]:
    return column(losses(folder / "run"), "learning_rate").tolist()


def kept(folder: Path) -> Recipe:
    return read_recipe(folder / "run" / "recipe.toml")


def test_more_steps_keep_the_schedule_and_say_so_once(tmp_path: Path):
    assert "decay" not in train(tmp_path, 4)
    assert kept(tmp_path).optimizer.decay_steps is None  # a copy of the recipe is one of any length
    told = train(tmp_path, 8)
    assert "train.steps changes from 4 to 8; the learning rate still decays to 0.0001 at step 4 and stays" in told
    assert "(optimizer.decay_steps = 8 stretches the decay)" in told
    np.testing.assert_allclose(rates(tmp_path), [cosine(step, 4) for step in range(1, 9)], rtol=1e-5)
    assert kept(tmp_path).optimizer.decay_steps == 4
    assert "decay" not in train(tmp_path, 8)


def test_a_schedule_that_is_asked_for_is_announced_with_both_learning_rates(tmp_path: Path):
    train(tmp_path, 4)
    told = train(tmp_path, 8, optimizer__decay_steps=8)
    about = "optimizer.decay_steps changes from 4 to 8: the learning rate of step 5 is"
    assert f"{about} {cosine(5, 8):.3g} instead of 0.0001" in told
    expected = [cosine(step, 4) for step in range(1, 5)] + [cosine(step, 8) for step in range(5, 9)]
    np.testing.assert_allclose(rates(tmp_path), expected, rtol=1e-5)
    assert "decay" not in train(tmp_path, 8)


def test_a_run_of_1000_steps_that_gets_1000_more_does_not_jump(tmp_path: Path):
    """Without decay_steps the learning rate of step 1001 was 5.5 times that of step 1000."""
    table = tiny_run(tmp_path, train={"steps": 1000}, optimizer={"learning_rate": PEAK})
    first = completed(recipe(table), None)
    longer = completed(recipe(lay_over(table, {"train__steps": 2000})), first)
    assert longer.optimizer.decay_steps == 1000
    schedule = learning_rate(longer.optimizer, longer.train.steps)
    found = [float(schedule(made)) for made in (499, 999, 1000, 1999)]
    np.testing.assert_allclose(found, [cosine(500, 1000), FINAL, FINAL, FINAL], rtol=1e-5)
    jumping = learning_rate(first.optimizer, 2000)
    assert float(jumping(1000)) == pytest.approx(5.5 * FINAL, rel=0.01)
    again = completed(recipe(table | {"train": {"steps": 3000}}), longer)
    assert again.optimizer.decay_steps == 1000
    shorter = completed(recipe(table | {"train": {"steps": 500}}), first)
    assert shorter.optimizer.decay_steps == 1000
    told = schedule_change(shorter, first, 400)
    assert told is not None
    assert "still decays to 0.0001 at step 1000, which this run does not reach" in told
    assert told.endswith("(optimizer.decay_steps = 500 ends the decay at step 500)")
    own = recipe(lay_over(table, {"train__steps": 3000, "optimizer__decay_steps": 3000}))
    assert completed(own, longer).optimizer.decay_steps is None  # as long as the run
